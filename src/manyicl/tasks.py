"""Task and Example: a folder of labelled data, read, checked and split.

A task is a file `<name>.jsonl`, `.csv` or `.parquet` with the columns `input` and `answer` and, if there are any,
`split` (train, validation or test; also dev, valid, val) and `options` (the candidate answers of this row: a list; in
CSV a JSON list or values between bars, `a|b`). Beside it may lie `<name>.task.json` with any of these keys:

    name          the task's name; else the file's, without its suffix
    family        one of FAMILIES; else classification where rows have options, or where there are at most 64 different
                  answers, each on one line of at most 50 characters, with 5 rows or more each on average; else qa
    metric        one of METRICS; else accuracy for classification and nli, rouge_l for summarization, and for qa and
                  math accuracy where there are options or labels, else exact_match and math_exact_match
    instruction   a text that opens every episode; else none
    labels        the answers there are; else, for classification and nli, the options if all rows have the same, or,
                  if none has any, the answers of all rows, where they are at most 256
    columns       our column names to the file's own: {"input": "text", "answer": "label"}

Other keys are ignored, but not one that is nearly one of these. Row numbers in messages are explained in rows.py.

Inputs and answers are kept as written. Where no row names a split, 20 % become test, by a hash of the input; where none
names validation, 10 % of train become validation, likewise: an input's split never depends on other rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from manyicl.errors import UserError, suggest
from manyicl.rows import (
    COLUMNS,
    SUFFIXES,
    Fault,
    FaultLog,
    Row,
    as_text,
    decode_json,
    near_word,
    read_rows,
    show,
)
from manyicl.seeds import make_seed

__all__ = [
    "FAMILIES",
    "METRICS",
    "SPLITS",
    "Example",
    "Fault",
    "Task",
    "find_task_files",
    "inspect_task",
    "load_task",
    "load_tasks",
]

FAMILIES = ("classification", "nli", "qa", "summarization", "math")
METRICS = ("accuracy", "exact_match", "token_f1", "rouge_l", "math_exact_match")
SPLITS = ("train", "validation", "test")

_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.1
_MOST_LABELS = 256
# When a file without a family is taken for classification.
_MOST_CLASSES = 64
_LONGEST_CLASS = 50
_ROWS_PER_CLASS = 5
# Nearer than this, an unknown key of a task.json is a misspelt one ("famly"); "note" and "label_count" are not.
_MISSPELT = 0.75


@dataclass(frozen=True, slots=True)
class Example:
    """One pair of texts: an input, and the answer that is trained and shown.

    options: the candidate answers of this row, empty if it has none. also_right: other answers that count as right when
    a prediction is scored; they are never trained.
    """

    input: str
    answer: str
    options: tuple[str, ...] = ()
    also_right: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, the trained one first."""
        return (self.answer, *self.also_right)

    @property
    def id(self) -> str:
        """16 hex digits made from input and answer: the same in every run and file."""
        return hashlib.sha256(f"{self.input}\0{self.answer}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """A named set of examples with its metric; `labels` is the fixed answer set, sorted, or () where answers are open.

    `sha256` covers everything a run depends on: name, family, metric, instruction, labels and the examples of each
    split in order. Of the `num_rows` read, `dropped` says how many were left out and why; the others were kept.
    """

    name: str
    family: str
    metric: str
    instruction: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    sha256: str
    num_rows: int
    dropped: Mapping[str, int]
    split_note: str

    def choices(self, example: Example) -> tuple[str, ...]:
        """Return the answers to choose from: the example's options, else the labels, else () for an open answer."""
        return example.options or self.labels


@dataclass(frozen=True)
class _Settings:
    """A task.json; None stands for what it leaves open."""

    name: str
    family: str | None = None
    metric: str | None = None
    instruction: str = ""
    labels: tuple[str, ...] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def load_tasks(folder: str | Path, *, names: Sequence[str] | None = None) -> list[Task]:
    """Return the tasks of a folder sorted by name: all of them, or those in `names`.

    Raises:
        UserError: no such folder or task, two files for one task, or a fault in a file.
    """
    paths = {_read_name(path): path for path in find_task_files(folder)}
    for name in names or ():
        if name not in paths:
            raise UserError(f"{folder}: no task '{name}'{suggest(name, paths)}")
    return [load_task(paths[name]) for name in sorted(paths) if names is None or name in names]


def load_task(path: Path) -> Task:
    """Return the task of one data file.

    Raises:
        UserError: the file is not there or has a fault; the message is the first one's.
    """
    task, faults = inspect_task(path)
    if task is not None:
        return task
    others = len(faults) - 1
    more = f" (and {others} other {'fault' if others == 1 else 'faults'}: run manyicl check {Path(path).parent})"
    raise UserError(faults[0].message + (more if others else ""))


def ask_validation(task: Task) -> Task:
    """Return the task with its validation rows in place of its test rows, to choose settings on."""
    sha256 = hashlib.sha256(f"{task.sha256} validation".encode()).hexdigest()
    return replace(task, validation=(), test=task.validation, sha256=sha256)


def flip_map(labels: Sequence[str], *, seed: int) -> dict[str, str]:
    """Return for each label another one, each once: a derangement, any with the same chance.

    Raises:
        UserError: there are fewer than two labels.
    """
    known = sorted(labels)
    if len(known) < 2:
        raise UserError(f"labels {known}: there is no other label to exchange one with; leave the task out")
    rng, others = random.Random(make_seed("exchanged labels", seed)), known.copy()
    while any(label == other for label, other in zip(known, others, strict=True)):
        rng.shuffle(others)
    return dict(zip(known, others, strict=True))


def flip_labels(task: Task, *, seed: int) -> Task:
    """Return the task with its labels exchanged by `flip_map` in all answers, of shots and queries alike.

    Its score is the share of answers that follow the shots; an answer that the map sends to the query's own is the true
    label, kept against them. Name, inputs, order and so draws and queries stay; the instruction does too, whatever it
    says of the labels.

    Raises:
        UserError: the task has no two fixed labels.
    """
    if len(task.labels) < 2:
        raise UserError(f"task '{task.name}': has no two fixed labels to exchange; leave it out")
    flipped = flip_map(task.labels, seed=seed)
    train, validation, test = (
        tuple(
            replace(
                example,
                answer=flipped[example.answer],
                also_right=tuple(flipped.get(answer, answer) for answer in example.also_right),
            )
            for example in examples
        )
        for examples in (task.train, task.validation, task.test)
    )
    sha256 = hashlib.sha256(f"{task.sha256} flipped {json.dumps(flipped)}".encode()).hexdigest()
    return replace(task, train=train, validation=validation, test=test, sha256=sha256)


def inspect_task(path: Path) -> tuple[Task | None, list[Fault]]:
    """Return the task of one data file, or None and what is wrong with it, in the order in which it was met.

    Raises:
        UserError: the file is not there, cannot be opened, or is of another kind; never for what it holds.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: cannot read '{path.suffix}' files; known: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    log = FaultLog(path)
    settings = _read_settings(path, log)
    if settings is None:  # the columns are unknown: every row would be a fault
        return None, log.list_faults()
    rows = read_rows(path, columns=settings.columns, log=log)
    _check_splits(rows, log)
    _check_labels(rows, settings.labels, log)
    faults = log.list_faults()
    return (None if faults else _build_task(settings, rows)), faults


def find_task_files(folder: str | Path) -> list[Path]:
    """Return the data files of a folder, sorted; hidden files and subfolders are left out.

    Raises:
        UserError: no such folder, no data file in it, two files for one task, or a task.json without its data file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a folder of tasks")
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    paths = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not is_result(entry)]
    if not paths:
        raise UserError(f"{folder}: no task in it; add a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    stems = {path.stem for path in paths}
    for entry in entries:
        stem = entry.name.removesuffix(".task.json")
        if stem != entry.name and stem not in stems:
            raise UserError(
                f"{entry}: no data file {stem}.jsonl, .csv or .parquet beside it{near_word(stem, (*stems,))}"
            )
    owners: dict[str, Path] = {}
    for path in paths:
        name = _read_name(path)
        if name in owners:
            raise UserError(f"{path}: task '{name}' is also {owners[name].name}; rename or remove one")
        owners[name] = path
    return paths


def is_result(path: Path) -> bool:
    """Return whether a file holds the answers of an evaluation, which someone wrote into the folder of its tasks."""
    return path.name.endswith(".predictions.parquet")


def _read_name(path: Path) -> str:
    settings = _read_settings(path, FaultLog(path))  # its faults are told when the task is loaded
    return settings.name if settings else path.stem


def _read_settings(path: Path, log: FaultLog) -> _Settings | None:
    """Return the task.json beside `path`, less what is wrong in it; None where the columns cannot be known."""
    settings_path = path.with_name(f"{path.stem}.task.json")
    settings = _Settings(name=path.stem)
    if not settings_path.is_file():
        return settings
    try:
        raw = decode_json(settings_path.read_bytes().decode("utf-8-sig"))
        json.dumps(raw, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except OSError as error:
        raise UserError(f"{settings_path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        log.add("bad task.json", f"invalid JSON ({error}); correct it", path=settings_path)
        return None
    if not isinstance(raw, dict):
        log.add("bad task.json", f'{show(raw)} is not an object; write {{"family": ...}}', path=settings_path)
        return None
    readers: dict[str, Callable[[object], object]] = {
        "name": _parse_name,
        "family": lambda value: _parse_word(value, FAMILIES),
        "metric": lambda value: _parse_word(value, METRICS),
        "instruction": _parse_text,
        "labels": _parse_labels,
        "columns": _parse_columns,
    }
    values: dict[str, object] = {}
    columns_known = True
    for key, value in raw.items():
        if key in readers:
            try:
                values[key] = readers[key](value)
            except ValueError as error:
                log.add(f"bad {key}", f"{key} {show(value)} {error}", path=settings_path)
        elif near := difflib.get_close_matches(key.lower(), readers, n=1, cutoff=_MISSPELT):
            log.add(f"unknown key {key}", f"unknown key {show(key)}; did you mean '{near[0]}'?", path=settings_path)
            columns_known = columns_known and near[0] != "columns"
    if not columns_known or ("columns" in raw and "columns" not in values):
        return None
    return replace(settings, **values)  # type: ignore[arg-type]  # each reader returns its field's type


def _parse_text(value: object) -> str:
    if type(value) is not str:  # a JSON number is a str of another type
        raise ValueError("is not a text")
    return value


def _parse_name(value: object) -> str:
    # A name becomes part of file names and of plots.
    if type(value) is not str or not value.strip() or not value.isprintable() or set(value) & set("/\\"):
        raise ValueError("is not a name: a text on one line, without slashes")
    return value


def _parse_word(value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"is unknown{suggest(str(value), known)}")
    return value


def _parse_labels(value: object) -> tuple[str, ...]:
    texts = [as_text(label) for label in value] if isinstance(value, list) else []
    labels = {text for text in texts if text is not None and text.strip()}
    if not labels or len(labels) < len(texts):
        raise ValueError("are not a list of different, non-empty texts")
    return tuple(sorted(labels))


def _parse_columns(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(type(own) is str and own for own in value.values()):
        raise ValueError('does not map our column names to the file\'s own, as {"input": "text"}')
    for name in value:
        if name not in COLUMNS:
            raise ValueError(f"maps an unknown name {show(name)}{suggest(name, COLUMNS)}")
    if len(set(value.values())) < len(value):
        raise ValueError("maps two of our columns to one of the file's")
    return value


def _check_splits(rows: list[Row], log: FaultLog) -> None:
    without = [row for row in rows if not row.split]
    if 0 < len(without) < len(rows):
        what = f"no split, while {len(rows) - len(without):,} other rows have one; give one to every row or to none"
        for row in without:
            log.add("split on some rows only", what, row=row.number)


def _check_labels(rows: list[Row], labels: tuple[str, ...] | None, log: FaultLog) -> None:
    if labels is None:
        return
    known = frozenset(labels)
    for row in rows:
        if row.answer not in known:
            log.add("answer not among the labels", partial(_tell_label, row.answer, labels), row=row.number)


def _tell_label(answer: str, labels: tuple[str, ...]) -> str:
    return f"answer {show(answer)} is not among the labels of its task.json{near_word(answer, labels)}"


def _build_task(settings: _Settings, rows: list[Row]) -> Task:
    family = settings.family or _guess_family(rows)
    labels = settings.labels
    if labels is None:
        labels = _find_labels(rows) if family in ("classification", "nli") else ()
    has_choices = bool(labels) or any(row.options for row in rows)
    metric = settings.metric or _default_metric(family, has_choices)
    splits, dropped = _split_rows(rows)
    digest = hashlib.sha256()
    for part in ("manyicl task 1", settings.name, family, metric, settings.instruction, labels):
        digest.update(f"{json.dumps(part)}\n".encode())
    for split in SPLITS:
        digest.update(f"{json.dumps([split, len(splits[split])])}\n".encode())
        for example in splits[split]:
            parts = [example.input, example.answer, example.options]
            # Only if there are any: without them, a task keeps the hash that earlier versions gave it.
            parts += [example.also_right] if example.also_right else []
            digest.update(f"{json.dumps(parts)}\n".encode())
    return Task(
        name=settings.name,
        family=family,
        metric=metric,
        instruction=settings.instruction,
        labels=labels,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        sha256=digest.hexdigest(),
        num_rows=len(rows),
        dropped=dropped,
        split_note=_describe_split(rows),
    )


def _guess_family(rows: list[Row]) -> str:
    answers = {row.answer for row in rows}
    are_classes = (
        len(answers) <= _MOST_CLASSES
        and len(answers) * _ROWS_PER_CLASS <= len(rows)
        and all(len(answer) <= _LONGEST_CLASS and "\n" not in answer for answer in answers)
    )
    return "classification" if are_classes or any(row.options for row in rows) else "qa"


def _default_metric(family: str, has_choices: bool) -> str:
    if family in ("classification", "nli") or (has_choices and family != "summarization"):
        return "accuracy"
    return {"qa": "exact_match", "math": "math_exact_match", "summarization": "rouge_l"}[family]


def _find_labels(rows: list[Row]) -> tuple[str, ...]:
    """Return the answer set that all rows share, sorted; () where there is none."""
    option_sets = {frozenset(row.options) for row in rows}
    if len(option_sets) > 1:  # each row has its own candidates: multiple choice
        return ()
    labels = option_sets.pop() or {row.answer for row in rows}
    return tuple(sorted(labels)) if len(labels) <= _MOST_LABELS else ()


def _hash_share(purpose: str, text: str) -> float:
    """Return a number in [0, 1) that depends on the two texts alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{text}".encode()).digest()[:6]) / 2**48


def _split_rows(rows: list[Row]) -> tuple[dict[str, tuple[Example, ...]], dict[str, int]]:
    """Return the examples of each split, in file order, and why the other rows were dropped."""
    placed = [row.split or ("test" if _hash_share("split", row.input) < _TEST_SHARE else "train") for row in rows]
    inputs: dict[str, set[str]] = {split: set() for split in SPLITS}
    for row, split in zip(rows, placed, strict=True):
        inputs[split].add(row.input)
    has_validation = bool(inputs["validation"])
    kept: dict[str, list[Example]] = {split: [] for split in SPLITS}
    seen: dict[tuple[str, str], str] = {}
    dropped: Counter[str] = Counter()
    for row, split in zip(rows, placed, strict=True):
        if split != "test" and row.input in inputs["test"]:
            dropped["train/test overlap"] += 1
        elif split == "train" and row.input in inputs["validation"]:
            dropped["train/validation overlap"] += 1
        elif (split, row.input) in seen:
            same = seen[split, row.input] == row.answer
            dropped["duplicate input" if same else "duplicate with another answer"] += 1
        else:
            seen[split, row.input] = row.answer
            if split == "train" and not has_validation and _hash_share("validation", row.input) < _VALIDATION_SHARE:
                split = "validation"  # noqa: PLW2901
            kept[split].append(Example(row.input, row.answer, row.options))
    return {split: tuple(examples) for split, examples in kept.items()}, dict(dropped)


def _describe_split(rows: list[Row]) -> str:
    named = {row.split for row in rows}
    if "validation" in named:
        return "Train, validation and test are as the file says."
    if named == {""}:
        return "The file names no split: 20 % are test and 10 % of the rest validation, by a hash of the input."
    return "Train and test are as the file says; 10 % of its train rows are validation, by a hash of the input."
