"""Rows of a program as a task: read as a file of them would be."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from manyicl.errors import UserError, check_text
from manyicl.tasks import NO_SPLIT_NOTE, Fault, Source, Task, inspect_task, is_name

# What messages call the task.json of rows.
SETTINGS = "`settings`"


def make_task(
    name: str,
    examples: Iterable[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    split: bool = False,
) -> Task:
    """Return the task of some rows, each a mapping with `input` and `answer`, as a file of them would give it.

    Duplicates are dropped, labels found and answers tidied as in files: `Task.dropped`, `Task.notes` and
    `Task.warnings` say what was done.

    examples: a list or an iterator; of a table of pandas, table.to_dict("records"). Keys may have other names, which
        settings={"columns": {"input": "text", "answer": "label"}} tells.
    settings: what a task.json may hold, but for the name. Default: all is found from the rows.
    split: of rows that name no split, set 20 % aside as test and 10 % of the rest as validation, to measure a model.
        Default: all of them are train, so that `ask` may show each.

    Raises:
        UserError: the name cannot be one, or the rows or settings have faults; the message is the first fault's.
    """
    check_text("name", name, "tickets")
    if not is_name(name):
        raise UserError(f"name={name[:100]!r}: cannot be a task's name; give a text on one line, without slashes")
    if settings is not None:
        if not isinstance(settings, Mapping):
            raise UserError(f"settings={str(settings)[:60]}: give a dict, such as {{'family': 'classification'}}")
        settings = {**settings, "name": name}
    with tempfile.TemporaryDirectory(prefix="manyicl-") as place:
        source = write_source(Path(place), name=name, examples=examples, settings=settings)
        task, faults = inspect_task(source, settings_name=SETTINGS)
        if task is not None and task.split_note == NO_SPLIT_NOTE and not split:
            task, faults = inspect_task(source, one_split=True, settings_name=SETTINGS)
        if task is None:
            words = {source.path: "examples", source.settings_path: "settings"}
            raise UserError(tell_faults(name_arguments(faults, words)))
    return task


def write_source(
    place: Path, *, name: str, examples: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None
) -> Source:
    """Write rows, and settings if there are any, as files of a folder, and return the task's source.

    Raises:
        UserError: a row or the settings are not made of texts, numbers and lists.
    """
    if isinstance(examples, str | Mapping) or not isinstance(examples, Iterable):
        shown = " ".join(str(examples).split())[:50]
        part = ", such as examples['train']" if isinstance(examples, Mapping) and "train" in examples else ""
        raise UserError(f"examples={shown}: give a list of rows, {{'input': ..., 'answer': ...}} each{part}")
    lines = [_write_row(row, number) for number, row in enumerate(examples, start=1)]
    if not lines:
        raise UserError("examples: there are no rows; give some")
    path = place / "examples.jsonl"
    path.write_bytes(b"".join(lines))
    return Source(path, name, ((path, ""),), write_settings(place, settings))


def write_settings(place: Path, settings: Mapping[str, Any] | None) -> Path:
    """Write settings as a task.json in a folder, if there are any, and return where it is, or would be.

    Raises:
        UserError: they are not made of texts, numbers and lists.
    """
    path = place / "task.json"
    if settings is not None:
        try:
            path.write_text(json.dumps({**settings}), encoding="utf-8")
        except (TypeError, ValueError) as error:
            raise UserError(f"settings: are not made of texts, numbers and lists ({error})") from None
    return path


def name_arguments(faults: Iterable[Fault], words: Mapping[Path, str]) -> list[Fault]:
    """Return faults whose messages name the arguments of a caller in place of the files that hold them.

    words: file -> argument.
    """
    for path, word in words.items():
        faults = [replace(fault, message=fault.message.replace(str(path), word)) for fault in faults]
    return list(faults)


def tell_faults(faults: Sequence[Fault]) -> str:
    """Return the message of the first fault, and how many kinds of mistakes there are besides."""
    others = len(faults) - 1
    more = f" (and {others} more {'kind' if others == 1 else 'kinds'} of mistakes)" if others else ""
    return faults[0].message + more


def _write_row(row: Mapping[str, Any], number: int) -> bytes:
    if not isinstance(row, Mapping):  # of a table of pandas, its columns come out
        raise UserError(
            f"examples, row {number}: {str(row)[:50]!r} is not a row; give {{'input': ..., 'answer': ...}} each, of a"
            " table of pandas table.to_dict('records')"
        )
    try:
        return _to_json(dict(row))
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise UserError(
            f"examples, row {number}: {_name_column(row)}is not made of texts, numbers and lists ({error})"
        ) from None


def _to_json(row: object) -> bytes:
    return json.dumps(row, allow_nan=True, default=_to_plain).encode() + b"\n"


def _name_column(row: Mapping[str, Any]) -> str:
    """Return "'when' ", the first column whose value no file can hold; "" if it is not a value."""
    for column, value in row.items():
        try:
            _to_json(value)
        except (TypeError, ValueError, UnicodeEncodeError):
            return f"{column!r} "
    return ""


def _to_plain(value: object) -> Any:
    """Return what files hold in place of a number or array of numpy, a date, a decimal number or a gap of pandas."""
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which need not be installed
        return None
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError(f"it has a value of type {type(value).__name__}")
