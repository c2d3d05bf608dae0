"""Reads a task's rows as every reader of tasks does, but leaves a faulty row out and counts it by reason."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manyicl.conversion.material import Material, Part, name_splits
from manyicl.errors import UserError, list_some
from manyicl.tasks import (
    Columns,
    FaultLog,
    FileRows,
    Row,
    check_spellings,
    join_number_forms,
    read_records,
    read_rows,
    read_settings,
    recognise,
    resolve_choices,
    resolve_lists,
)

# Rows at the start of a file that are looked at to find out which columns are input and answer.
_LOOKED_AT = 20
_SHOWN_COLUMNS = 8
# What messages name in place of a task.json, if there is none beside the source.
_ARGUMENTS = "the arguments (`columns`, `answer_index`)"
_NO_ANSWER = "chat that does not end with a question and its answer"
_USERS = frozenset({"user", "human", "system", "tool", "function", "observation", "prompter"})
_NOT_USERS = frozenset({"assistant", "gpt", "system", "model"})


@dataclass(slots=True)
class KeptRows:
    """The rows of one task: `num_read` is the number of `rows` and of those in `left_out`."""

    rows: list[Row]
    shape: str
    """What the rows seem to be, such as "a row like SQuAD's"."""
    columns: dict[str, Any]
    """Our column names -> the source's."""
    settings: dict[str, Any]
    """Keys of its task.json other than columns."""
    num_read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first such row: its file, number and value."""
    notes: list[str] = field(default_factory=list)


class _ReasonLog(FaultLog):
    """A log that also knows the first fault of each row, so that every row has one reason."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reasons: dict[tuple[Path | None, int], str] = {}

    def add(
        self,
        kind: str,
        what: str | Callable[[], str],
        *,
        row: int | None = None,
        path: Path | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Record a fault, and of a row the first as its reason."""
        super().add(kind, what, row=row, path=path, settings=settings)
        if row is not None:
            self.reasons.setdefault((path, row), kind)


def read_material(
    material: Material,
    *,
    columns: Mapping[str, str | Sequence[str]],
    splits: Mapping[str, str],
    answer_index: int | None,
) -> KeptRows:
    """Return the rows of one task, and why the others are left out.

    columns: our names -> the source's, for what is not found by itself. splits: our split -> the source's.
    answer_index: 0 or 1 if answers are numbers of options: the number of the first option.

    Raises:
        UserError: nobody can tell which columns are input and answer, a file as a whole is faulty, or no row is left.
    """
    path = material.parts[0].path
    log = _ReasonLog(path)
    found = read_settings(material.settings_path or path.with_name("task.json"), stem=material.name, log=log)
    if found is None:
        raise UserError(_tell(log.list_faults()[0].message, material.parts))
    placed = name_splits((part.split for part in material.parts), chosen=splits, shown=material.name)
    parts = sorted(material.parts, key=lambda part: ("train", "", "validation", "test").index(placed[part.split] or ""))
    shape, mapped = _find_columns(parts, {**found.columns, **columns})
    keys = ("name", "family", "metric", "instruction")
    settings = {key: getattr(found, key) for key in keys if getattr(found, key)} | dict(material.settings)
    if found.labels is not None:
        settings["labels"] = list(found.labels)
    kept = KeptRows([], material.kind or shape, mapped, settings, notes=list(material.notes))
    if len(found.templates) > 1:
        kept.notes.append(f"inputs are those of the first of {len(found.templates)} templates; the others are lost")
    has_file = material.settings_path is not None and material.settings_path.is_file()
    shown = material.settings_path.name if material.settings_path and has_file else _ARGUMENTS
    files = _read_files(parts, kept, placed=placed, settings_name=shown, log=log)
    index = answer_index if answer_index is not None else found.answer_index
    kept.notes += resolve_lists(files, log=log)
    kept.notes += resolve_choices(files, answer_index=index, settings_name=shown, log=log)
    for file in files:
        _drop_ends_of_chats(file, mapped, log=log)
        _name_classes(file, mapped, material.class_names, log=log)
    family = settings.get("family")
    kept.notes += join_number_forms(files, family=family, labels=found.labels)
    called = shown if has_file else f"a {material.name}.task.json beside it"
    check_spellings(files, family=family, labels=found.labels, settings_name=called, log=log)
    for file in files:
        _drop_other_labels(file, found.labels, log=log)
        kept.rows += file.rows
    _count(kept, log, parts, num_blank=sum(file.num_blank for file in files))
    if not kept.rows:
        raise UserError(f"{parts[0].shown}: no row is left; {_first_reason(kept)}")
    return kept


def _first_reason(kept: KeptRows) -> str:
    reason, count = kept.left_out.most_common(1)[0] if kept.left_out else ("it has no rows", 0)
    return f"{reason} {count:,}" + (f" ({kept.examples[reason]})" if reason in kept.examples else "")


def _find_columns(parts: Sequence[Part], given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what the rows of a task seem to be, and its columns: those that are given, else those recognised.

    Raises:
        UserError: no row that was looked at has columns for input and answer.
    """
    seen: dict[str, None] = {}
    for part in parts:
        known = Columns(given)
        records = (record for _, record in read_records(part.path, columns=known, log=FaultLog(part.path)))
        for record, _ in zip((one for one in records if one is not None), range(_LOOKED_AT), strict=False):
            if not known.missing_from(record):
                return "rows with " + _tell_columns({"input": "input", "answer": "answer", **given}), dict(given)
            found = recognise(record)
            if found is not None:
                return f"{found[0]}: {_tell_columns({**found[1], **given})}", {**found[1], **given}
            seen |= dict.fromkeys(record)
    if len(seen) > 1 and not given:
        # A template of one column, where the command line would take a comma for the end of a name.
        first, *_, last = (f"{{{name}}}" if "," in name else name for name in seen)
        example = " and ".join(shlex.quote(pair) for pair in (f"input={first}", f"answer={last}"))
        told = list_some(map(repr, seen), most=_SHOWN_COLUMNS)
        raise UserError(
            f"{parts[0].shown}: input and answer are not recognised among its columns {told}; say which they"
            f" are with `columns`, such as {example}"
        )
    return "rows", dict(given)


def _tell_columns(mapped: Mapping[str, Any]) -> str:
    """Return columns as a person would say them.

    >>> _tell_columns({"input": ["context", "question"], "answer": "answers.text"})
    'input from context and question, answer from answers.text'
    """
    told = [
        f"{ours} from {own if isinstance(own, str) else ' and '.join(own)}"
        for ours, own in mapped.items()
        if ours != "option_labels"
    ]
    return ", ".join(told)


def _read_files(
    parts: Iterable[Part], kept: KeptRows, *, placed: Mapping[str, str | None], settings_name: str, log: FaultLog
) -> list[FileRows]:
    files = []
    for part in parts:
        split = placed[part.split]
        if split is None:
            num_rows = sum(1 for _ in read_records(part.path, columns=Columns({}), log=FaultLog(part.path)))
            kept.num_read += num_rows
            kept.left_out[f"split '{part.split}' has no place here"] += num_rows
            continue
        file = read_rows(part.path, columns=kept.columns, split=split, settings_name=settings_name, log=log)
        kept.num_read += file.num_read
        files.append(file)
    return files


def _drop_ends_of_chats(file: FileRows, mapped: Mapping[str, Any], *, log: FaultLog) -> None:
    """Leave out chats whose last turn is not an answer, or whose turn before it is not a question."""
    source = mapped.get("answer")
    root, *rest = source.split(".") if isinstance(source, str) else ("",)
    if rest[:1] != ["-1"]:
        return
    wrong: dict[int, str] = {}
    for number, record in read_records(file.path, columns=Columns(mapped), log=FaultLog(file.path)):
        turns = None if record is None else record.get(root)
        turns = turns if isinstance(turns, list) else []
        roles = [str(turn.get("role", turn.get("from"))).lower() for turn in turns if isinstance(turn, dict)][-2:]
        if roles and roles[-1] in _USERS:
            wrong[number] = f"the last turn is by {roles[-1]!r}"
        elif len(roles) > 1 and roles[0] in _NOT_USERS:
            wrong[number] = f"the turn before the last is by {roles[0]!r}"
    for row in file.rows:
        if row.number in wrong:
            log.add(_NO_ANSWER, wrong[row.number], row=row.number, path=file.path)
    file.rows = [row for row in file.rows if row.number not in wrong]


def _name_classes(
    file: FileRows, mapped: Mapping[str, Any], class_names: Mapping[str, tuple[str, ...]], *, log: FaultLog
) -> None:
    """Replace numbers of classes by their names, which the source says elsewhere."""
    names = class_names.get(str(mapped.get("answer", "answer")), ())
    kept = []
    for row in file.rows if names else ():
        if row.answer.isdecimal() and int(row.answer) < len(names):
            kept.append(replace(row, answer=names[int(row.answer)], also_right=()))
        elif row.answer in names:
            kept.append(row)
        else:
            what = f"answer {row.answer!r} is not the number of a class"
            log.add("no class" if row.answer != "-1" else "no answer (-1)", what, row=row.number, path=file.path)
    file.rows = kept if names else file.rows


def _drop_other_labels(file: FileRows, labels: tuple[str, ...] | None, *, log: FaultLog) -> None:
    for row in file.rows if labels is not None else ():
        if row.answer not in (labels or ()):
            what = f"answer {row.answer!r} is not among the labels of its task.json"
            log.add("answer not among the labels", what, row=row.number, path=file.path)
    file.rows = [row for row in file.rows if labels is None or row.answer in labels]


def _count(kept: KeptRows, log: _ReasonLog, parts: Iterable[Part], *, num_blank: int) -> None:
    """Count the reasons, and refuse a file that is faulty as a whole, after which its other rows are unknown."""
    kept.left_out.update(log.reasons.values())
    if num_blank:
        kept.left_out["blank row"] = num_blank
    faults = log.list_faults()
    whole = [fault for fault in faults if not fault.rows]
    if not whole and kept.num_read != len(kept.rows) + kept.left_out.total():
        whole = [fault for fault in faults if fault.kind == "broken UTF-8"] or faults
    if whole:
        raise UserError(_tell(whole[0].message, parts))
    for fault in faults:
        kept.examples.setdefault(fault.kind, _tell(fault.message, parts))


def _tell(message: str, parts: Iterable[Part]) -> str:
    """Return a message in which files of a temporary folder have the names that the user knows."""
    for part in parts:
        message = message.replace(str(part.path), part.shown)
    return message
