"""The unfinished work of an evaluation: a killed one is resumed where it stopped.

Until the result FILE.json is complete, there stands beside it what is finished so far:

- of a model on this machine, the folder FILE.json.parts: a header with everything that decides the result, and one
  predictions file per finished point (task, draw, number of shots);
- of a server, FILE.answers.jsonl: one line per answer, under a key that says what was sent to whom. So a changed
  evaluation takes from it whatever still applies.
"""

from __future__ import annotations

import functools
import json
import os
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa

from manyicl.distributed import ALONE, Ranks
from manyicl.errors import UserError, list_some, take_path
from manyicl.evaluation.points import Prediction, predictions_bytes, read_predictions
from manyicl.evaluation.shots import Shots
from manyicl.files import read_object, sync_folder, write_atomically
from manyicl.inference import Generated
from manyicl.locks import sole_writer

HEADER = "evaluation.json"

P = ParamSpec("P")
R = TypeVar("R")


def sole_writer_of_out(evaluation: Callable[P, R]) -> Callable[P, R]:
    """Return `evaluation`, which takes `out` and maybe `ranks` by name, with the only right to write its result.

    Raises:
        UserError: another process is at work on that result.
    """

    @functools.wraps(evaluation)
    def with_lock(*args: P.args, **kwargs: P.kwargs) -> R:
        out: Any = kwargs.get("out")
        ranks: Any = kwargs.get("ranks", ALONE)
        with ExitStack() as stack:
            if out is not None:
                lock_on_main(stack, Path(take_path("out", out)), ranks=ranks)
            return evaluation(*args, **kwargs)

    return with_lock


def lock_on_main(stack: ExitStack, out: Path, *, ranks: Ranks) -> None:
    """Have the main process hold the lock of `out` until `stack` is left; an error is every rank's."""

    def enter() -> None:
        if ranks.is_main:
            stack.enter_context(sole_writer(out, is_file=True))

    ranks.gather(enter)


class Unfinished:
    """What is kept of one evaluation until its result is complete; nothing if there is no `out`.

    identity: everything that decides the answers of a model on this machine, as plain values; its "tasks" are the
    tasks' names and hashes. None: a server answers.
    answers: a server's answers by their keys; each is safe from a power cut as soon as it is added.

    Raises:
        UserError: another evaluation's work is there, or something that is not an evaluation's.
    """

    def __init__(self, out: Path | None, identity: Mapping[str, Any] | None) -> None:
        self.folder: Path | None = None
        self.answers: MutableMapping[str, Generated] = {}
        if out is None:
            return
        if identity is None:
            self.answers = AnswerLog(answer_log_path(out))
            return
        self.folder = parts_folder(out)
        self._numbers = {name: number for number, name in enumerate(identity["tasks"])}
        header = self.folder / HEADER
        # Before the header is looked for, which another rank may write meanwhile.
        is_taken = self.folder.exists() and (not self.folder.is_dir() or any(self._visible(self.folder)))
        if header.is_file():
            self._refuse_another(out, read_header(out), json.loads(json.dumps(identity)))
        elif is_taken:
            raise UserError(f"out={out}: {self.folder} stands in its way; name another `out`, or move that away")
        else:
            write_atomically(header, json.dumps(identity, indent=1) + "\n")

    def read(self, task: str, *, draw: int, shots: Shots, queries: Sequence[str]) -> list[Prediction] | None:
        """Return the answers of a finished point; None if it is not finished, or its file is damaged."""
        if self.folder is None:
            return None
        try:
            rows = read_predictions(self.folder / self._name(task, draw=draw, shots=shots))
        except (OSError, pa.ArrowException):
            return None
        expected = [(task, draw, shots, query) for query in queries]
        return rows if [(p.task, p.draw, p.asked, p.query) for p in rows] == expected else None

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Keep the answers of one point."""
        if self.folder is None:
            return
        first = predictions[0]
        path = self.folder / self._name(first.task, draw=first.draw, shots=first.asked)
        write_atomically(path, predictions_bytes(predictions))

    def close(self) -> None:
        """Keep everything as it is."""
        if isinstance(self.answers, AnswerLog):
            self.answers.close()

    def remove(self) -> None:
        """Remove everything: it is in a complete result."""
        if isinstance(self.answers, AnswerLog):
            self.answers.remove()
        if self.folder is None:
            return
        for path in self.folder.iterdir():
            if path.name != HEADER:
                path.unlink()
        # The header last: what a kill leaves of the folder is still this evaluation's.
        (self.folder / HEADER).unlink()
        self.folder.rmdir()

    def _name(self, task: str, *, draw: int, shots: Shots) -> str:
        # Not by the task's name, which may hold what no file's name can.
        return f"task{self._numbers[task]}-draw{draw}-shots{shots}.parquet"

    @staticmethod
    def _visible(folder: Path) -> Iterator[Path]:
        """Yield what lies in the folder, except files being written: another rank may be writing the header."""
        return (path for path in folder.iterdir() if not path.name.startswith("."))

    def _refuse_another(self, out: Path, before: Any, now: Any) -> None:
        old, new = dict(_flatten(before)), dict(_flatten(now))
        keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if keys:
            changes = list_some(f"{key} was {old.get(key)} and is {new.get(key)}" for key in keys)
            raise UserError(
                f"out={out}: {self.folder} holds points of an unfinished evaluation that differs: {changes};"
                " repeat that one to go on, name another `out`, or remove the folder"
            )


class AnswerLog(UserDict[str, Generated]):
    """A server's answers in a file, one line each; adding one returns when it is safe from a power cut.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("ab+")
            self._file.seek(0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it, or name another `out`") from error
        try:
            self._read(self._file.read())
        except UserError:
            self._file.close()
            raise
        sync_folder(path.parent)

    def _read(self, content: bytes) -> None:
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):  # a killed run's last line; what is written next must not be joined to it
                self._file.truncate(len(content) - len(line))
                return
            try:
                entry = json.loads(line)
                self.data[entry["key"]] = Generated(text=entry["text"], cut=entry["cut"])
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{self.path} line {number}: is not a kept answer; remove the file") from error

    def __setitem__(self, key: str, answer: Generated) -> None:
        self.data[key] = answer
        line = json.dumps({"key": key, "text": answer.text, "cut": answer.cut}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Keep the file as it is."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file: its answers are in a complete result."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def parts_folder(out: Path) -> Path:
    """Return where the finished points of an evaluation with its result at `out` lie."""
    return out.with_name(f"{out.name}.parts")


def answer_log_path(out: Path) -> Path:
    """Return where a server's answers lie until the result at `out` is complete."""
    return out.with_name(f"{out.name.removesuffix('.json')}.answers.jsonl")


def read_header(out: Path) -> Mapping[str, Any]:
    """Return what decides the unfinished evaluation at `out`; empty if there is none.

    Raises:
        UserError: the file that says so is damaged.
    """
    header = parts_folder(out) / HEADER
    content = read_object(header) if header.is_file() else {}
    if content is None:
        raise UserError(
            f"out={out}: {header} is damaged, so it is not known what the finished points beside it are of; name"
            f" another `out`, or remove {header.parent}"
        )
    return content


def _flatten(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value of a JSON object under its dotted name; lists are values."""
    if not isinstance(value, dict):
        yield place, value
        return
    for key, item in value.items():
        yield from _flatten(item, f"{place}.{key}" if place else key)
