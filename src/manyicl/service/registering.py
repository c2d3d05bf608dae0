"""Files and rows -> examples of a served task, through the readers that `manyicl check` uses; drops are counted."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from manyicl.conversion import SETTINGS, name_arguments, tell_faults, write_settings, write_source
from manyicl.errors import UserError, list_some
from manyicl.service.library import TaskChange
from manyicl.service.refusals import BadExamples
from manyicl.tasks import (
    Example,
    Source,
    Task,
    describe_lookalikes,
    find_labels,
    inspect_task,
    is_name,
    name_sources,
    source_of,
    tidy_answer,
)

Rows = str | Path | Sequence[Mapping[str, Any]]
MOST_NAME = 100
DUPLICATE = "duplicate input"
CONTRADICTION = "duplicate with another answer"


@dataclass(frozen=True, slots=True)
class Registration:
    """What became of the rows of an upload, or of the row that was corrected."""

    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of rows."""
    notes: tuple[str, ...] = ()
    """What is good to know about how the rows were read."""
    warnings: tuple[str, ...] = ()
    """What may be a mistake in the rows."""
    ids: tuple[int, ...] = ()
    """Of the new examples, or of the corrected one; empty for those of a new task."""


@dataclass(frozen=True, slots=True)
class ReadExamples:
    """Examples as they were read, before they are kept."""

    task: Task
    """All of them are train rows."""
    source: str
    """Where they came from, in a word."""
    settings: Mapping[str, Any]
    """The task.json that they were read with."""

    @property
    def registration(self) -> Registration:
        """What became of the rows."""
        task = self.task
        return Registration(len(task.train), dict(task.dropped), tuple(task.notes), tuple(task.warnings))

    def about(self) -> dict[str, Any]:
        """Return what the library keeps of the task besides examples."""
        task = self.task
        return {
            "family": task.family,
            "metric": task.metric,
            "instruction": task.instruction,
            "labels": list(task.labels),
            "settings": dict(self.settings),
            "registration": asdict(self.registration),
        }


def check_name(name: str) -> str:
    """Return the name of a task.

    Raises:
        BadExamples: it cannot be one.
    """
    fix = f"give one of at most {MOST_NAME} characters on one line, without slashes"
    shown = repr(name[:MOST_NAME])
    if not is_name(name):
        raise BadExamples(f"name={shown}: cannot be a task's name; {fix}")
    if len(name) > MOST_NAME:
        raise BadExamples(f"name={shown}...: has {len(name):,} characters; {fix}")
    return name


def read_examples(
    rows: Rows,
    *,
    name: str | None,
    settings: Mapping[str, Any] | None,
    most: int,
    is_append: bool = False,
) -> ReadExamples:
    """Return the examples in a file, a folder of one task, or rows; whatever their split, all become examples.

    settings: as a task.json; default: the one beside the file. most: examples. is_append: they come to others, whose
    settings these are.

    Raises:
        BadExamples: they cannot be read; each kind of mistake is in its `faults`.
        UserError: there is no such file.
    """
    if name is not None:
        check_name(name)
    with tempfile.TemporaryDirectory(prefix="manyicl-") as place:
        source, words = _find_source(rows, Path(place), name=name, settings=settings)
        called = "`settings` when you replace the task" if is_append else SETTINGS
        has_file = source.settings_path not in words  # a task.json lies beside it, or can be put there
        task, faults = inspect_task(source, one_split=True, settings_name=None if has_file else called)
        raw = _read_settings(source.settings_path)
    if task is None:
        faults = name_arguments(faults, words)
        raise BadExamples(tell_faults(faults), faults)
    shown = words.get(source.path, str(source.path))
    check_name(task.name if name is None else name)
    if not task.train:
        raise BadExamples(f"{shown}: holds no examples; add some")
    if len(task.train) > most:
        raise BadExamples(f"{shown}: holds {len(task.train):,} examples, more than {most:,}; leave some out")
    return ReadExamples(task, words.get(source.path, source.path.name), raw)


def _find_source(
    rows: Rows, place: Path, *, name: str | None, settings: Mapping[str, Any] | None
) -> tuple[Source, dict[Path, str]]:
    """Return what to read, and file -> argument for the files that were written to `place`."""
    if not isinstance(rows, str | Path):
        if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
            raise BadExamples(f"examples={str(rows)[:50]}: give a file, a folder of one task, or a list of rows")
        if name is None:
            raise BadExamples("name: is missing; examples without a file need the name of their task")
        try:
            source = write_source(place, name=name, examples=rows, settings=settings)
        except UserError as error:
            raise BadExamples(str(error)) from None
        return source, {source.path: "examples", source.settings_path: "settings"}
    path = Path(rows)
    if path.is_dir():
        sources = name_sources(path)
        if len(sources) > 1:
            raise BadExamples(f"{path}: holds {len(sources)} tasks ({list_some(sources)}); add one each")
        source = next(iter(sources.values()))
    else:
        source = source_of(path)
    source = replace(source, stem=name if name is not None else source.stem)
    if settings is None:
        return source, {}
    try:
        settings_path = write_settings(place, settings)
    except UserError as error:
        raise BadExamples(str(error)) from None
    return replace(source, settings_path=settings_path), {settings_path: "settings"}


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the content of a task.json, which was found to be right; {} if there is none."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    return content if isinstance(content, dict) else {}


def append_settings(about: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Return the task.json by which more examples of a task are read: as the first were, and of its kind.

    A file has the columns of the first one; rows that come as such have our own names, whatever that file's were.
    """
    left_out = {"name"} if isinstance(rows, str | Path) else {"name", "columns", "answer_index"}
    given = {key: value for key, value in about["settings"].items() if key not in left_out}
    return {**given, "family": about["family"], "metric": about["metric"], "instruction": about["instruction"]}


def append_examples(change: TaskChange, read: ReadExamples, *, most: int) -> Registration:
    """Add those of the examples whose inputs are new to the task; new labels become its own, and are reported.

    Raises:
        BadExamples: there would be too many examples.
    """
    new: list[Example] = []
    dropped = Counter(read.registration.dropped)
    for example in read.task.train:
        known = change.find_input(example.input)
        if known is None:
            new.append(example)
        else:
            dropped[DUPLICATE if known.answer == example.answer else CONTRADICTION] += 1
    if change.num_examples() + len(new) > most:
        raise BadExamples(
            f"{read.source}: task '{change.record.name}' would have {change.num_examples() + len(new):,} examples,"
            f" more than {most:,}; remove some first"
        )
    labels = change.about["labels"]
    ids = change.add(new, source=read.source)
    update_labels(change)
    notes, warnings = _report_new_labels(change, since=labels)
    return Registration(
        len(ids),
        dict(dropped),
        notes=(*read.registration.notes, *notes),
        warnings=tuple(dict.fromkeys((*read.registration.warnings, *warnings))),
        ids=tuple(ids),
    )


def correct_example(change: TaskChange, id_: int, answer: str) -> Registration:
    """Change the answer of an example; a new label becomes the task's own, and is reported as that of an upload.

    Raises:
        UnknownExample: there is none with this id.
        BadExamples: the answer is empty, not a text, or is not one of the answers to choose from.
    """
    example = change.find(id_)
    if not isinstance(answer, str):
        raise BadExamples(f"example {id_}: answer {answer!r} is not a text; write it as text")
    answer = tidy_answer(answer)
    if not answer:
        raise BadExamples(f"example {id_}: the answer is empty; give one, or remove the example")
    fixed = example.options or tuple(change.about["settings"].get("labels") or ())
    if fixed and answer not in fixed:
        raise BadExamples(f"example {id_}: {answer[:60]!r} is not among its answers ({', '.join(fixed)[:200]})")
    labels = change.about["labels"]
    if answer != example.answer:
        change.correct(id_, answer)
        update_labels(change)
    notes, warnings = _report_new_labels(change, since=labels)
    return Registration(1, notes=notes, warnings=warnings, ids=(example.id,))


def _report_new_labels(change: TaskChange, *, since: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a note of the labels that are new to a task with labels, and a warning if they look like others of it.

    since: the labels before the change.
    """
    others = [label for label in change.about["labels"] if label not in since]
    if not since or not others:
        return (), ()
    alike = describe_lookalikes(Counter(example.answer for example in change.examples()), of=others)
    return (f"new labels: {list_some(map(repr, others), most=5)}",), ((alike,) if alike else ())


def update_labels(change: TaskChange) -> None:
    """Find the labels anew after a change of examples, as the readers find them, unless the settings name them."""
    about = change.about
    if about["family"] not in ("classification", "nli") or about["settings"].get("labels"):
        return
    change.about = {**about, "labels": list(find_labels(change.examples()))}
