"""A task.json: a task's name, family, metric, instruction and labels, and where its columns are."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from manyicl.errors import UserError, suggest
from manyicl.tasks.columns import COLUMNS, template_fields
from manyicl.tasks.faults import FaultLog, show
from manyicl.tasks.formats import RepeatedKeys, as_text, decode_json
from manyicl.tasks.rows import tidy_answer

FAMILIES = ("classification", "nli", "qa", "summarization", "math")
# All metrics of an answer; any of them can be a task's main metric.
METRICS = ("accuracy", "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "math_exact_match")
# An unknown key that is at least this similar to a known one is a misspelling ("famly"), not a note of the user's own
# ("note", "label_count").
_MISSPELT = 0.75
# What a name cannot hold, in Unicode's terms: control characters, halves of surrogate pairs (a file's name that is not
# UTF-8 has them), and breaks of lines and paragraphs. Results, Parquet files or plots could not be written with it.
_NOT_IN_NAMES = frozenset(("Cc", "Cs", "Zl", "Zp"))
NO_NAME = "is not a name: a text on one line, without slashes"


@dataclass(frozen=True)
class TaskSettings:
    """The content of a task.json. None: the file leaves it open."""

    name: str
    family: str | None = None
    """One of FAMILIES."""
    metric: str | None = None
    """One of METRICS."""
    instruction: str = ""
    """Text before the first example of every episode."""
    labels: tuple[str, ...] | None = None
    """The fixed answers."""
    columns: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Our column names -> the file's, or a template of them (`columns.Columns`)."""
    templates: tuple[str, ...] = ()
    """Templates of the input, all of the same columns; the first is also the input's entry in `columns`. (): none."""
    answer_index: int | None = None
    """0 or 1 if answers are numbers of options: the number of the first option."""


def read_settings(settings_path: Path, *, stem: str, log: FaultLog) -> TaskSettings | None:
    """Return the settings in a task.json; what is wrong in it goes to `log`. None if the columns cannot be known.

    stem: the task's name if the file does not give one. If there is no file, everything is left open.

    Raises:
        UserError: the file cannot be opened.
    """
    settings = TaskSettings(name=stem)
    if not settings_path.is_file():
        return settings
    try:
        raw = decode_json(settings_path.read_bytes().decode("utf-8-sig"))
        json.dumps(raw, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except OSError as error:
        raise UserError(f"{settings_path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError:
        log.add("bad task.json", "is not UTF-8; save it as UTF-8", path=settings_path)
        return None
    except ValueError as error:
        log.add("bad task.json", f"invalid JSON ({error}); correct it", path=settings_path)
        return None
    if not isinstance(raw, dict):
        log.add("bad task.json", f'{show(raw)} is not an object; write {{"family": ...}}', path=settings_path)
        return None
    for key in raw.repeated if isinstance(raw, RepeatedKeys) else ():
        if key in _READERS:
            log.add(f"repeated {key}", f"has {show(key)} twice; remove one of them", path=settings_path)
    values: dict[str, object] = {}
    columns_known = True
    for key, value in raw.items():
        if key in _READERS:
            try:
                values[key] = parse_setting(key, value)
            except ValueError as error:
                log.add(f"bad {key}", f"{key} {show(value)} {error}", path=settings_path)
        elif near := difflib.get_close_matches(key.lower(), _READERS, n=1, cutoff=_MISSPELT):
            log.add(f"unknown key {key}", f"unknown key {show(key)}; did you mean '{near[0]}'?", path=settings_path)
            columns_known = columns_known and near[0] not in ("columns", "templates")
    if not columns_known or any(key in raw and key not in values for key in ("columns", "templates")):
        return None
    if templates := values.get("templates"):
        columns = values.get("columns", {})
        assert isinstance(columns, dict)
        assert isinstance(templates, tuple)
        if "input" in columns:
            what = '"templates" and the input of "columns" both say how an input is written; keep one of them'
            log.add("bad templates", what, path=settings_path)
            return None
        values["columns"] = {**columns, "input": templates[0]}
    return replace(settings, **values)  # type: ignore[arg-type]  # each reader returns its field's type


def parse_setting(key: str, value: object) -> object:
    """Return the value of a key of a task.json as TaskSettings has it.

    Raises:
        ValueError: with what is wrong with it.
    """
    return _READERS[key](value)


def _parse_text(value: object) -> str:
    if type(value) is not str:  # isinstance would accept a JsonNumber
        raise ValueError("is not a text")
    return value


def _parse_name(value: object) -> str:
    if type(value) is not str or not is_name(value):
        raise ValueError(NO_NAME)
    return value


def is_name(text: str) -> bool:
    """Return whether a text can be a task's name, which becomes part of paths, plots and Parquet files."""
    is_path = text in (".", "..") or bool(set(text) & set("/\\"))
    return bool(text.strip()) and not is_path and _NOT_IN_NAMES.isdisjoint(map(unicodedata.category, text))


def _parse_word(value: object, *, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"is unknown{suggest(str(value), known)}")
    return value


def _parse_labels(value: object) -> tuple[str, ...]:
    texts = [as_text(label) for label in value] if isinstance(value, list) else []
    labels = {tidy_answer(text) for text in texts if text is not None and text.strip()}
    if not labels or len(labels) < len(texts):
        raise ValueError("are not a list of different, non-empty texts")
    return tuple(sorted(labels))


def _parse_index(value: object) -> int:
    if str(value) not in ("0", "1"):
        raise ValueError("is not 0 or 1: the number of the first option")
    return int(str(value))


def _parse_columns(value: object) -> dict[str, str | tuple[str, ...]]:
    if not isinstance(value, dict) or not all(_is_column(own) for own in value.values()):
        raise ValueError('does not map our column names to the file\'s own, as {"input": "text"}')
    for name, own in value.items():
        if name not in COLUMNS:
            raise ValueError(f"maps an unknown name {show(name)}{suggest(name, COLUMNS)}")
        if name in ("split", "option_labels", "embedding") and isinstance(own, list):
            raise ValueError(f"maps {name!r} to a list; name one column")
        if name not in ("input", "answer") and isinstance(own, str) and template_fields(own):
            raise ValueError(f"maps {name!r} to a template, which only 'input' and 'answer' may have; name one column")
        if isinstance(own, list) and any(template_fields(one) for one in own):
            raise ValueError(f"maps {name!r} to a list with a template; write one template of all columns")
    columns = {name: own if isinstance(own, str) else tuple(own) for name, own in value.items()}
    if len(set(columns.values())) < len(columns):
        raise ValueError("maps two of our columns to one of the file's")
    return columns


def _parse_templates(value: object) -> tuple[str, ...]:
    """Return the templates: each names the same columns, so that rows that differ under one differ under all."""
    texts = value if isinstance(value, list) else []
    if not texts or not all(type(text) is str and template_fields(text) for text in texts):
        raise ValueError('is not a list of texts with columns in braces, as ["{question}", "Question: {question}"]')
    if len(set(texts)) < len(texts):
        raise ValueError("holds one template twice; remove one of them")
    wanted = set(template_fields(texts[0]))
    for number, text in enumerate(texts[1:], start=2):
        if odd := sorted(wanted ^ set(template_fields(text))):
            raise ValueError(f"uses {{{odd[0]}}} in only one of templates 1 and {number}; use it in all or in none")
    return tuple(texts)


def _is_column(own: object) -> bool:
    """Return whether `own` is a column's name, or a list of names."""
    names = own if isinstance(own, list) and own else [own]
    return all(type(name) is str and name for name in names)


_READERS: dict[str, Callable[[object], object]] = {
    "name": _parse_name,
    "family": partial(_parse_word, known=FAMILIES),
    "metric": partial(_parse_word, known=METRICS),
    "instruction": _parse_text,
    "labels": _parse_labels,
    "columns": _parse_columns,
    "templates": _parse_templates,
    "answer_index": _parse_index,
}


def default_metric(family: str, *, has_choices: bool) -> str:
    """Return the main metric of a family's tasks. has_choices: whether rows have options or labels."""
    if family in ("classification", "nli") or (has_choices and family != "summarization"):
        return "accuracy"
    return {"qa": "exact_match", "math": "math_exact_match", "summarization": "rouge_l"}[family]
