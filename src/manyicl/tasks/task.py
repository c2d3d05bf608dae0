"""Task and Example: labelled data from a folder, read, checked and split.

A task is a file `<name>.jsonl`, `.json`, `.csv`, `.tsv` (these also `.gz`) or `.parquet`, or several files
(`layouts.py`). It has the columns `input` and `answer`. An answer is a text, a number, true or false, or a list of
right answers: the first is trained, and a prediction gets the best score that one of them gives. Two more columns are
optional: `split` (train, validation or test; also dev, valid, val, training, testing) and `options` (this row's
candidate answers: a list; in CSV a JSON list, or values between bars, `a|b`). If all answers of a CSV
file are lists of texts, as JSON or Python writes them, each is a list of right answers.

A file `<name>.task.json` beside it can have any of these keys:

    name          the task's name. Default: the file's without its suffix, or the folder's
    family        one of FAMILIES. Default: classification if rows have options, or if there are at most 64 different
                  answers, each on one line of at most 50 characters, with 5 rows or more each on average; else qa
    metric        one of METRICS. Default: accuracy for classification and nli, and for qa and math with options or
                  labels; else rouge_l for summarization, exact_match for qa, math_exact_match for math
    instruction   a text before the first example of every episode. Default: none
    labels        the fixed answers. Default, for classification and nli: the options if all rows have the same, or
                  if no row has options, all different answers if there are at most 256
    columns       our column names -> the file's: {"input": "text", "answer": "label"}. Also a path into nested values
                  ("answers.text", "messages.-1.content"), or a list: several inputs or answers are joined by line
                  breaks, without empty ones; several options are columns of one option each. "option_labels" is the
                  column of the options' labels, if answers use these; "embedding" that of a list of numbers, by whose
                  cosine nearest shots are then chosen in evaluation. An input or answer may also be a template of
                  columns and paths, such as "{premise} Therefore: {hypothesis}", none of which may be empty; {{ and }}
                  are braces.
    templates     instead of the input in "columns", several templates of the same columns. An episode of training
                  draws one of them for all its examples; validation and evaluation use the first, or the one that
                  `manyicl eval --template` names
    answer_index  0 or 1: answers are numbers of options, and this is the first. Default: found if only one is possible

Other keys are ignored, but one that looks like a misspelling is refused. readers.py explains row numbers in messages.

Inputs stay as they are. Answers lose white space and invisible characters at their ends, and are put into Unicode form
NFC. Labels that are one whole number, such as 1 and 1.0, become the shortest of its forms, or the one that "labels"
lists. If neither rows nor file names give a split, 20 % become test, by a hash of the input. If none gives validation,
10 % of train become validation in the same way. So the split of an input does not depend on other rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from manyicl.errors import UserError, check_list, suggest, take_path
from manyicl.seeds import make_seed
from manyicl.tasks.answers import (
    check_spellings,
    describe_lists,
    find_labels,
    find_warnings,
    guess_family,
    join_number_forms,
    resolve_choices,
    resolve_lists,
)
from manyicl.tasks.faults import Fault, FaultLog, near_word, show
from manyicl.tasks.formats import describe_damage
from manyicl.tasks.layouts import Source, find_layout, source_of
from manyicl.tasks.rows import FileRows, Row, read_rows, retell_unlike_files
from manyicl.tasks.settings import NO_NAME, TaskSettings, default_metric, is_name, read_settings
from manyicl.tasks.shapes import describe_unread

SPLITS = ("train", "validation", "test")
NO_SPLIT_NOTE = "No split is given: 20 % are test and 10 % of the rest validation, by a hash of the input."

_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.1
_PANDAS_INDEX = "__index_level_0__"  # row numbers, which pandas adds to Parquet


@dataclass(frozen=True, slots=True)
class Example:
    """One input with its answer."""

    input: str
    answer: str
    """The right answer that is trained, and shown in shots."""
    options: tuple[str, ...] = ()
    """This row's own candidate answers; () if it has none."""
    also_right: tuple[str, ...] = ()
    """Other answers that count as right when a prediction is scored; they are never trained."""
    wordings: tuple[str, ...] = ()
    """The input as each of the task's further templates writes it; () if the task has one or none."""
    embedding: bytes = b""
    """Numbers (float32) by which it is like other examples, for nearest shots; b"" if the task.json names none."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, the trained one first."""
        return (self.answer, *self.also_right)

    def in_template(self, number: int) -> Example:
        """Return the example with its input as the task's template of that number writes it, from 1."""
        return self if number == 1 else replace(self, input=self.wordings[number - 2], wordings=())

    @property
    def id(self) -> str:
        """16 hex digits, a hash of input and answer: the same in every run and file."""
        return hashlib.sha256(f"{self.input}\0{self.answer}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """Labelled examples of one task, in three splits."""

    name: str
    family: str
    """One of FAMILIES."""
    metric: str
    """One of METRICS: the main metric."""
    instruction: str
    """Text before the first example of every episode; "" if there is none."""
    labels: tuple[str, ...]
    """The fixed answers, sorted; () for open answers, or if each row has its own options."""
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    sha256: str
    """Hash of the name, family, metric, instruction, labels and all examples of each split, in order."""
    num_rows: int
    """Rows that were read."""
    dropped: Mapping[str, int]
    """Reason -> number of rows that were read but are in no split."""
    split_note: str
    """One sentence on where the splits come from."""
    warnings: tuple[str, ...] = ()
    """What may be a mistake in the data."""
    notes: tuple[str, ...] = ()
    """What else is good to know about how the data was read."""
    templates: tuple[str, ...] = ()
    """The templates of its inputs, if its task.json has several: training draws one per episode."""
    template: int = 1
    """Number of the template that `Example.input` is written in, from 1."""

    def __repr__(self) -> str:
        """Say what it is in one line: its rows would fill a screen, or a thousand."""
        sizes = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in ("train", "validation", "test"))
        return f"Task({self.name!r}, {self.family}, {self.metric}, {len(self.labels)} labels, {sizes} rows)"

    def choices(self, example: Example) -> tuple[str, ...]:
        """Return the answers to choose from: the example's options, else the labels, else () for an open answer."""
        return example.options or self.labels


def load_tasks(folder: str | Path, *, names: Sequence[str] | None = None) -> list[Task]:
    """Return the tasks of a folder, sorted by name: all, or those in `names`.

    Files that are not read are logged once, in one line.

    Raises:
        UserError: there is no such folder or task, two tasks have the same name, or a file has a fault.
    """
    check_list("names", names)
    sources = name_sources(Path(take_path("folder", folder)))
    for name in names or ():
        if name not in sources:
            raise UserError(f"{folder}: no task '{name}'{suggest(name, sources)}")
    return [load_task(sources[name]) for name in sorted(sources) if names is None or name in names]


def name_sources(folder: str | Path) -> dict[str, Source]:
    """Return task name -> source for a folder's tasks, sorted by file; log what is not read.

    Raises:
        UserError: there is no such folder, no task in it, or two tasks have the same name.
    """
    layout = find_layout(folder)
    layout.log_left_out()
    sources: dict[str, Source] = {}
    for source in layout.sources:
        settings = read_settings(source.settings_path, stem=source.stem, log=FaultLog(source.path))
        name = settings.name if settings else source.stem  # its faults are reported when the task is loaded
        if name in sources:
            (file, _), (other, _) = source.files[0], sources[name].files[0]  # the path may be one folder for both
            raise UserError(f"{file}: {other.name} is also called '{name}'; rename or remove one")
        sources[name] = source
    return sources


def load_task(source: Path | Source, *, one_split: bool = False) -> Task:
    """Return the task of one data file, or of the files of a source.

    one_split: every row is train, in the order of the files, whatever split it or its file names.

    Raises:
        UserError: the file does not exist or has faults; the message is the first fault's.
    """
    task, faults = inspect_task(source, one_split=one_split)
    if task is not None:
        return task
    others = len(faults) - 1
    place = source.path if isinstance(source, Source) else Path(source)
    folder = place if place.is_dir() else place.parent
    more = f" (and {others} other {'fault' if others == 1 else 'faults'}: run manyicl check {folder})"
    raise UserError(faults[0].message + (more if others else ""))


def ask_validation(task: Task) -> Task:
    """Return the task with its validation rows in place of its test rows, to choose settings by them."""
    sha256 = hashlib.sha256(f"{task.sha256} validation".encode()).hexdigest()
    return replace(task, validation=(), test=task.validation, sha256=sha256)


def with_template(task: Task, number: int) -> Task:
    """Return the task with the inputs of all rows as one of its templates writes them.

    task: as it was read, in its first template. number: of the template, from 1. A task without templates has one.

    Raises:
        UserError: the task has no template of that number.
    """
    num_templates = len(task.templates) or 1
    if not 1 <= number <= num_templates:
        has = "one template" if num_templates == 1 else f"templates 1 to {num_templates}"
        raise UserError(f"template={number}: task '{task.name}' has {has}; choose one that it has, or leave it out")
    if number == task.template:
        return task
    assert task.template == 1, "the wordings are those of a task as it was read"
    changed = _change_examples(task, lambda example: example.in_template(number), how=f"template {number}")
    return replace(changed, template=number)


def flip_map(labels: Sequence[str], *, seed: int) -> dict[str, str]:
    """Return a random derangement of the labels: each is mapped to another one, and each is used once.

    Raises:
        UserError: there are fewer than two labels.
    """
    known = sorted(labels)
    if len(known) < 2:
        raise UserError(f"labels {known}: exchanging labels needs two or more; leave the task out")
    rng, others = random.Random(make_seed("exchanged labels", seed)), known.copy()
    while any(label == other for label, other in zip(known, others, strict=True)):
        rng.shuffle(others)
    return dict(zip(known, others, strict=True))


def flip_labels(task: Task, *, seed: int) -> Task:
    """Return the task with its labels exchanged by `flip_map` in the answers of all rows.

    Its score is the fraction of predictions that follow the shots; a prediction of the true label goes against them.
    Name, inputs and order stay, so draws and queries are the same. The instruction stays too, whatever it says about
    the labels.

    Raises:
        UserError: the task has fewer than two fixed labels.
    """
    if len(task.labels) < 2:
        raise UserError(f"task '{task.name}': has fewer than two fixed labels, so none to exchange; leave it out")
    flipped = flip_map(task.labels, seed=seed)

    def flip(example: Example) -> Example:
        also_right = tuple(flipped.get(answer, answer) for answer in example.also_right)
        return replace(example, answer=flipped[example.answer], also_right=also_right)

    return _change_examples(task, flip, how=f"flipped {json.dumps(flipped)}")


def _change_examples(task: Task, change: Callable[[Example], Example], *, how: str) -> Task:
    """Return the task with each example changed. how: the change in words, for the hash."""
    train, validation, test = (tuple(map(change, getattr(task, split))) for split in SPLITS)
    sha256 = hashlib.sha256(f"{task.sha256} {how}".encode()).hexdigest()
    return replace(task, train=train, validation=validation, test=test, sha256=sha256)


def inspect_task(
    source: Path | Source, *, one_split: bool = False, settings_name: str | None = None
) -> tuple[Task | None, list[Fault]]:
    """Return the task of one data file or source; if it has faults, None and the faults in order of occurrence.

    one_split: every row is train, in the order of the files, whatever split it or its file names.
    settings_name: what messages call the task.json; default: its name.

    Raises:
        UserError: a file does not exist, cannot be opened, or is not a data file; never because of its content.
    """
    source = source if isinstance(source, Source) else source_of(Path(source))
    log = FaultLog(source.path)
    settings = read_settings(source.settings_path, stem=source.stem, log=log)
    if settings is None:  # the columns are unknown, so every row would be a fault
        return None, log.list_faults()
    settings_name = settings_name or source.settings_path.name
    if not is_name(settings.name):  # its file's
        fix = f'rename the file, or give another "name" in its {settings_name}'
        log.add("bad name", f"its name {show(settings.name)} {NO_NAME}; {fix}")
    files = [
        read_rows(
            path,
            columns=settings.columns,
            templates=settings.templates,
            split=split,
            settings_name=settings_name,
            log=log,
        )
        for path, split in source.files
    ]
    retell_unlike_files(files, log=log)
    notes = resolve_lists(files, log=log)
    notes += resolve_choices(files, answer_index=settings.answer_index, settings_name=settings_name, log=log)
    notes += join_number_forms(files, family=settings.family, labels=settings.labels)
    for file in files if one_split else ():
        file.rows = [replace(row, split="train") for row in file.rows]
    _check_splits(files, log)
    check_spellings(files, family=settings.family, labels=settings.labels, settings_name=settings_name, log=log)
    _check_labels(files, settings.labels, settings_name, log)
    if faults := log.list_faults():
        return None, faults
    return _build_task(settings, files, notes=notes, settings_name=settings_name, one_split=one_split), []


def _check_splits(files: Sequence[FileRows], log: FaultLog) -> None:
    num_rows = sum(len(file.rows) for file in files)
    num_without = sum(not row.split for file in files for row in file.rows)
    if not 0 < num_without < num_rows:
        return
    what = f"no split, but {num_rows - num_without:,} other rows have one; give one to every row or to none"
    for file in files:
        for row in file.rows:
            if not row.split:
                log.add("split on some rows only", what, row=row.number, path=file.path)


def _check_labels(files: Sequence[FileRows], labels: tuple[str, ...] | None, settings_name: str, log: FaultLog) -> None:
    if labels is None:
        return
    known = frozenset(labels)
    for file in files:
        for row in file.rows:
            if row.answer not in known:
                what = partial(_describe_label, row.answer, labels, settings_name)
                log.add("answer not among the labels", what, row=row.number, path=file.path)


def _describe_label(answer: str, labels: tuple[str, ...], settings_name: str) -> str:
    return f"answer {show(answer)} is not among the labels of {settings_name}{near_word(answer, labels)}"


def _build_task(
    settings: TaskSettings, files: Sequence[FileRows], *, notes: Sequence[str], settings_name: str, one_split: bool
) -> Task:
    rows = [row for file in files for row in file.rows]
    family = settings.family or guess_family(rows)
    labels = settings.labels
    if labels is None:
        labels = find_labels(rows) if family in ("classification", "nli") else ()
    has_choices = bool(labels) or any(row.options for row in rows)
    metric = settings.metric or default_metric(family, has_choices=has_choices)
    splits, dropped = _split_rows(rows, one_split=one_split)
    if num_blank := sum(file.num_blank for file in files):
        dropped["blank row"] = num_blank
    return Task(
        name=settings.name,
        family=family,
        metric=metric,
        instruction=settings.instruction,
        labels=labels,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        sha256=_hash_task((settings.name, family, metric, settings.instruction, labels), splits),
        num_rows=len(rows) + num_blank,
        dropped=dropped,
        split_note="All rows are train." if one_split else _describe_split(rows),
        warnings=(
            *find_warnings(rows, family, labels=labels, has_choices=has_choices, settings_name=settings_name),
            *describe_lists(files),
            *describe_damage(text for row in rows for text in (row.input, row.answer, *row.options)),
        ),
        notes=(*notes, *_find_notes(files, rows, settings, settings_name=settings_name)),
        templates=settings.templates if len(settings.templates) > 1 else (),
    )


def _hash_task(about: Sequence[object], splits: Mapping[str, Sequence[Example]]) -> str:
    digest = hashlib.sha256()
    for part in ("manyicl task 1", *about):
        digest.update(f"{json.dumps(part)}\n".encode())
    for split in SPLITS:
        digest.update(f"{json.dumps([split, len(splits[split])])}\n".encode())
        for example in splits[split]:
            parts: list[object] = [example.input, example.answer, example.options]
            # Only if there are any: so a task without them has the same hash as in earlier versions.
            parts += [example.also_right] if example.also_right else []
            parts += [{"wordings": example.wordings}] if example.wordings else []
            parts += [{"embedding": example.embedding.hex()}] if example.embedding else []
            digest.update(f"{json.dumps(parts)}\n".encode())
    return digest.hexdigest()


def _find_notes(
    files: Sequence[FileRows], rows: Sequence[Row], settings: TaskSettings, *, settings_name: str
) -> list[str]:
    """Return notes on changes to answers, columns that are not read, and how to read some of them."""
    tidied: Counter[str] = sum((file.tidied for file in files), Counter())
    unread = sorted({name for file in files for name in file.unread} - {_PANDAS_INDEX})
    num_templates = len(settings.templates)
    return [
        *([f"{num_templates} templates: training draws one per episode"] if num_templates > 1 else []),
        *(f"answers tidied: {what} ({count:,})" for what, count in sorted(tidied.items())),
        *describe_unread(
            unread, answers={row.answer for row in rows}, columns=settings.columns, settings_name=settings_name
        ),
    ]


def _hash_to_unit(purpose: str, text: str) -> float:
    """Return a number in [0, 1) that depends only on the two texts."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{text}".encode()).digest()[:6]) / 2**48


def _split_rows(rows: list[Row], *, one_split: bool) -> tuple[dict[str, tuple[Example, ...]], dict[str, int]]:
    """Return the examples of each split, in file order, and the number of dropped rows by reason."""
    placed = [row.split or ("test" if _hash_to_unit("split", row.input) < _TEST_SHARE else "train") for row in rows]
    inputs: dict[str, set[str]] = {split: set() for split in SPLITS}
    for row, split in zip(rows, placed, strict=True):
        inputs[split].add(row.input)
    has_validation = one_split or bool(inputs["validation"])
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
            if split == "train" and not has_validation and _hash_to_unit("validation", row.input) < _VALIDATION_SHARE:
                split = "validation"  # noqa: PLW2901
            kept[split].append(Example(row.input, row.answer, row.options, row.also_right, row.wordings, row.embedding))
    return {split: tuple(examples) for split, examples in kept.items()}, dict(dropped)


def _describe_split(rows: list[Row]) -> str:
    named = {row.split for row in rows}
    if "validation" in named:
        return "Train, validation and test are as the files give them."
    if named == {""}:
        return NO_SPLIT_NOTE
    return "Train and test are as the files give them; 10 % of the train rows are validation, by a hash of the input."
