"""The finished cells of an evaluation that is not finished: a killed one goes on where it stopped.

Beside `FILE.json` stands a folder `FILE.json.parts` until the result is whole: a header with everything that decides
the result, and one predictions file for each cell, written as it comes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa

from manyicl.distributed import ALONE, Ranks
from manyicl.errors import UserError
from manyicl.evaluation.points import Prediction, predictions_bytes, read_predictions
from manyicl.evaluation.shots import Shots
from manyicl.files import write_atomically
from manyicl.locks import sole_writer

PACKAGES = ("manyicl", "torch", "transformers", "tokenizers", "numpy")
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
                lock_on_main(stack, Path(out), ranks=ranks)
            return evaluation(*args, **kwargs)

    return with_lock


def lock_on_main(stack: ExitStack, out: Path, *, ranks: Ranks) -> None:
    """Have the main process hold the lock of `out` until `stack` is left; an error is every rank's."""

    def enter() -> None:
        if ranks.is_main:
            stack.enter_context(sole_writer(out, is_file=True))

    ranks.gather(enter)


class Parts:
    """The folder of one evaluation's finished cells; made where it is absent.

    identity: everything that decides the result, as plain values; its "tasks" are the tasks' names and hashes.

    Raises:
        UserError: the folder holds another evaluation, or is none of ours.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = parts_folder(out)
        self._numbers = {name: number for number, name in enumerate(identity["tasks"])}
        header = self.folder / HEADER
        if header.is_file():
            self._refuse_another(out, json.loads(header.read_bytes()), json.loads(json.dumps(identity)))
        elif self.folder.exists() and (not self.folder.is_dir() or any(self._visible())):
            raise UserError(f"--out {out}: {self.folder} stands in its way; name another --out, or move that away")
        else:
            write_atomically(header, json.dumps(identity, indent=1) + "\n")

    def read(self, task: str, *, draw: int, shots: Shots, queries: Sequence[str]) -> list[Prediction] | None:
        """Return the answers of a finished cell; None where it is not finished, or its file is damaged."""
        try:
            rows = read_predictions(self._path(task, draw=draw, shots=shots))
        except (OSError, pa.ArrowException):
            return None
        expected = [(task, draw, shots, query) for query in queries]
        return rows if [(p.task, p.draw, p.asked, p.query) for p in rows] == expected else None

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Keep the answers of one cell."""
        first = predictions[0]
        path = self._path(first.task, draw=first.draw, shots=first.asked)
        write_atomically(path, predictions_bytes(predictions))

    def remove(self) -> None:
        """Remove the folder, its header last: what a kill leaves of it is still this evaluation's."""
        for path in self.folder.iterdir():
            if path.name != HEADER:
                path.unlink()
        (self.folder / HEADER).unlink()
        self.folder.rmdir()

    def _path(self, task: str, *, draw: int, shots: Shots) -> Path:
        # A task's name may hold what no file's name can.
        return self.folder / f"task{self._numbers[task]}-draw{draw}-shots{shots}.parquet"

    def _visible(self) -> Iterator[Path]:
        """Yield what lies in the folder but files that are being written: another rank may be writing the header."""
        return (path for path in self.folder.iterdir() if not path.name.startswith("."))

    def _refuse_another(self, out: Path, there: Any, here: Any) -> None:
        before, now = dict(_flatten(there)), dict(_flatten(here))
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if keys:
            told = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in keys[:3])
            more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"--out {out}: {self.folder} holds cells of an unfinished evaluation that differs: {told}{more}; repeat"
                " that one to go on, name another --out, or remove the folder"
            )


def parts_folder(out: Path) -> Path:
    """Return where the finished cells of an evaluation with its result at `out` lie."""
    return out.with_name(f"{out.name}.parts")


def read_header(out: Path) -> Mapping[str, Any]:
    """Return what decides the unfinished evaluation at `out`; empty if there is none."""
    header = parts_folder(out) / HEADER
    content: dict[str, Any] = json.loads(header.read_bytes()) if header.is_file() else {}
    return content


def package_versions() -> dict[str, str]:
    """Return the versions of what computes the result."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _flatten(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value of a JSON object under its dotted name; lists are values."""
    if not isinstance(value, dict):
        yield place, value
        return
    for key, item in value.items():
        yield from _flatten(item, f"{place}.{key}" if place else key)
