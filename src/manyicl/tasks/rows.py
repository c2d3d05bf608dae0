"""Rows of a data file: records checked cell by cell, with mistakes collected as faults rather than raised.

Every record is counted as one of three: kept, blank, or faulty. readers.py explains row numbers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from manyicl.errors import list_some, suggest
from manyicl.tasks.columns import MISSING, Columns, describe_missing, nested_paths
from manyicl.tasks.faults import FaultLog, show
from manyicl.tasks.formats import (
    SPLIT_WORDS,
    JsonNumber,
    as_text,
    data_suffix,
    is_missing,
    is_unicode,
    pack_vector,
    read_split_word,
    split_cell,
)
from manyicl.tasks.readers import read_records
from manyicl.tasks.shapes import describe_shape, suggest_columns, write_columns

# Characters that are invisible, but not white space to Python. At the ends of an answer they are not part of it.
INVISIBLE = "\u200b\u2060\ufeff\u00ad"


@dataclass(frozen=True, slots=True)
class Row:
    """One row without a fault."""

    number: int
    input: str
    answer: str
    options: tuple[str, ...]
    """The row's own candidate answers; () if it has none."""
    split: str
    """"train", "validation" or "test"; "" if neither the row nor its file names one."""
    also_right: tuple[str, ...] = ()
    """Other answers that count as right."""
    option_labels: tuple[str, ...] = ()
    """Label of each option; () if the file gives none."""
    wordings: tuple[str, ...] = ()
    """The input as each further template of the task writes it."""
    embedding: bytes = b""
    """Numbers that say what the row is like, as float32; b"" if the task.json names no column of them."""


@dataclass(slots=True)
class FileRows:
    """The rows of one file. `num_read` is the sum of kept, blank and faulty rows."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    """Rows without a fault."""
    num_read: int = 0
    num_blank: int = 0
    """Rows whose cells are all empty."""
    num_faulty: int = 0
    tidied: Counter[str] = field(default_factory=Counter)
    """What was changed in answers -> number of rows."""
    unread: list[str] = field(default_factory=list)
    """Columns of the file that we do not read."""


def read_rows(
    path: Path,
    *,
    columns: Mapping[str, str | Sequence[str]],
    split: str,
    settings_name: str,
    log: FaultLog,
    templates: Sequence[str] = (),
) -> FileRows:
    """Return the rows of `path` without a fault; all faults go to `log`.

    columns: our names (`COLUMNS`) -> the file's, if they differ. split: the split in the file's name, or "".
    settings_name: the task.json that messages name. templates: of the input, the first as in `columns`.

    Raises:
        UserError: the file cannot be opened.
    """
    found = FileRows(path)
    known = Columns(columns)
    checker = _RowChecker(found, known, templates=templates, split=split, settings_name=settings_name, log=log)
    num_faults = len(log.list_faults())
    for number, record in read_records(path, columns=known, log=log):
        if not found.num_read and record is not None and checker.has_other_shape(record):
            return found
        found.num_read += 1
        row = None if record is None else checker.check(number, record)
        if row is not None:
            found.rows.append(row)
        elif record is None or not checker.is_blank(record):
            found.num_faulty += 1
        else:
            found.num_blank += 1
    if found.num_read:
        checker.check_columns()
    if found.num_read == found.num_blank and len(log.list_faults()) == num_faults:
        log.add("no rows", "the file has no rows; add some, or remove the file", path=path)
    found.unread = known.unread()
    return found


def retell_unlike_files(files: Sequence[FileRows], *, log: FaultLog) -> None:
    """Describe a file that lacks columns by a file of the same task that has them: no task.json would read both."""
    whole = next((file for file in files if file.rows), None)
    for file in files:
        if whole is None or file.rows:
            continue
        if log.has(file.path, "other columns") or log.has(file.path, "no input column"):
            what = f"its columns are called otherwise than in {whole.path.name}; call them alike in all files"
        else:
            what = f"has no answers, unlike {whole.path.name}; fill them in, or take the file out of the folder"
        log.retell(file.path, ("other columns", "no input column", "no answer column"), what)


def tidy_answer(text: str) -> str:
    """Return an answer without outer white space and in Unicode form NFC, so that each label has one spelling.

    The first line of a multi-line answer keeps its indentation, which may be part of it (code).
    """
    if text.isascii() and text == text.strip():
        return text
    text = unicodedata.normalize("NFC", _strip_end(text))
    while text[:1] and text[0] in INVISIBLE:
        text = text[1:]
    return text.lstrip() if "\n" not in text.strip() else text.lstrip("\r\n")


def _strip_end(text: str) -> str:
    bare = text.rstrip()
    while bare[-1:] and bare[-1] in INVISIBLE:
        bare = bare.rstrip(INVISIBLE).rstrip()
    return bare


def is_empty(text: str) -> bool:
    """Return whether a text has no visible characters."""
    return not text.strip() or (not text.isascii() and not text.translate(_UNSEEN).strip())


_UNSEEN = dict.fromkeys(map(ord, INVISIBLE + "\u200c\u200d\u200e\u200f"))


@dataclass
class _RowChecker:
    """Turns the records of one file into rows, or into faults."""

    found: FileRows
    columns: Columns
    templates: Sequence[str]
    split: str
    settings_name: str
    log: FaultLog

    def __post_init__(self) -> None:
        self._is_table = data_suffix(self.found.path).startswith((".csv", ".tsv"))
        self._embedding_bytes = 0  # of the first row that has one
        # Unread column -> its words, if all are words for splits; None before the first row.
        self._split_words: dict[str, set[str]] | None = None

    def has_other_shape(self, record: Mapping[str, object]) -> bool:
        """Return whether the file's first record cannot be read because it has another known layout; log it."""
        missing = self.columns.missing_from(record)
        if not missing or any(name in self.columns.mapped for name in missing):
            return False
        found = describe_shape(record, columns=self.columns.mapped, settings_name=self.settings_name)
        if found is not None:
            what, settings = f"no {missing[0]!r} column: {found[0]}", found[1]
            self.log.add("other columns", what, path=self.found.path, settings=settings)
        return found is not None

    def is_blank(self, record: Mapping[str, object]) -> bool:
        """Return whether every cell of a record is empty."""
        return bool(record) and all(
            is_missing(value) or (isinstance(value, str) and not value.strip()) for value in record.values()
        )

    def check(self, number: int, record: Mapping[str, object]) -> Row | None:
        """Return the row, or None if it is faulty or blank."""
        values = self.columns.find(record)
        first = values["input"][0]
        if (not isinstance(first, str) or not first.strip()) and self.is_blank(record):
            return None
        self._look_for_splits(record)
        texts = self._read_input(values["input"], number, record)
        answers = self._read_answers(values["answer"], number, record)
        options, labels = self._read_options(values, number)
        split = self._read_split(values["split"][0], number)
        embedding = self._read_embedding(values.get("embedding"), number)
        if not texts or not answers or options is None or split is None or embedding is None:
            return None
        return Row(number, texts[0], answers[0], options, split, answers[1:], labels, texts[1:], embedding)

    def check_columns(self) -> None:
        """Log an optional column that the task.json maps but no row has, and a column of splits that is not read."""
        mapped = self.columns.mapped
        lacking = [(n, mapped[n], n) for n in ("split", "options", "option_labels") if n in mapped]
        lacking = [one for one in lacking if not self.columns.has(one[0])]
        if not self.found.num_faulty:
            lacking += [(own, own, name) for name, own in self.columns.never_found() if self.columns.has(name)]
        for kind, own, name in lacking:
            what = f'no row has the column {show(own)} that "columns" in {self.settings_name} gives for {name!r}'
            self._add(f"no {kind} column", f"{what}; correct it")
        if self.columns.has("split") or "split" in self.columns.mapped or self.split:
            return
        # If it were ignored, its test rows would be trained on.
        for name, words in (self._split_words or {}).items():
            if "train" in words and len(words) > 1:
                what = f'column {show(name)} holds splits, but is not read; name it "split"'
                if "other" in words:
                    what += ", with the words train, validation and test"
                self._add("unread split", f'{what}, or write {{"columns": {{"split": "{name}"}}}}')
            elif len(words - set(SPLIT_WORDS.values())) > 1:  # true and false
                what = f"column {show(name)} marks rows that are not for training, but is not read"
                self._add("unread split", f'{what}; write train or test into a column "split", or remove it')

    def _add(self, kind: str, what: str | Callable[[], str], row: int | None = None) -> None:
        self.log.add(kind, what, row=row, path=self.found.path)

    def _look_for_splits(self, record: Mapping[str, object]) -> None:
        if self._split_words is None:
            self._split_words = {name: set() for name in record if not self.columns.reads(name)}
        for name in list(self._split_words):
            word = read_split_word(name, record.get(name))
            if word:
                self._split_words[name].add(word)
            else:
                del self._split_words[name]

    def _add_missing(self, name: str, number: int, record: Mapping[str, object], *, own: str | None = None) -> None:
        has = list_some(map(show, record), most=8) or "nothing"
        own = own or self.columns.paths[name][0]
        if lacks := describe_missing(own, record):
            self._add(f"no {name} column", f'{lacks}; add it, or correct "columns" in {self.settings_name}', number)
            return
        if name in self.columns.mapped:
            fix = f'correct "columns" in {self.settings_name}'
        else:
            fix = "add it" + suggest_columns(record, columns=self.columns, settings_name=self.settings_name)
        self._add(f"no {name} column", f"no {own!r} column (it has {has}); {fix}", number)

    def _read_input(self, values: list[object], number: int, record: Mapping[str, object]) -> tuple[str, ...]:
        """Return the input as each template writes it, or as its columns have it; () after a fault."""
        if all(value is MISSING for value in values):
            self._add_missing("input", number, record)
            return ()
        if self.columns.is_template("input"):
            return self._fill_templates("input", values, number, record, templates=self.templates)
        parts = []
        for value in values:
            members = value if isinstance(value, list | tuple) else [value]
            for member in members:
                if member is MISSING or is_missing(member):
                    continue
                if not isinstance(member, str) or isinstance(member, JsonNumber):
                    self._add_type("input", value, number)
                    return ()
                if member.strip() or len(values) == 1:
                    parts.append(member)
        text = self._check_text("input", "\n".join(parts), number, values[0])
        return () if text is None else (text,)

    def _read_answers(self, values: list[object], number: int, record: Mapping[str, object]) -> tuple[str, ...]:
        """Return the right answers, the trained one first; () after a fault."""
        if all(value is MISSING for value in values):
            self._add_missing("answer", number, record)
            return ()
        if self.columns.is_template("answer"):
            return tuple(map(self._tidy, self._fill_templates("answer", values, number, record)))
        if self.columns.is_joined("answer"):
            texts = [as_text(value) for value in values if value is not MISSING and not is_missing(value)]
            given: Sequence[object] = ["\n".join(text for text in texts if text)] if None not in texts else values
        else:
            given = values[0] if isinstance(values[0], list | tuple) else values
        answers: dict[str, None] = {}
        for value in given or [None]:
            text = "" if is_missing(value) else as_text(value)
            if text is None:
                self._add_type("answer", values[0] if len(values) == 1 else value, number)
                return ()
            text = self._check_text("answer", text, number, value)
            if text is None:
                return ()
            answers[self._tidy(text)] = None
        return tuple(answers)

    def _fill_templates(
        self,
        name: str,
        values: list[object],
        number: int,
        record: Mapping[str, object],
        *,
        templates: Sequence[str] = (),
    ) -> tuple[str, ...]:
        """Return each of the templates of `name`, or its only one, filled with a row's values; () after a fault."""
        texts = []
        for own, value in zip(self.columns.paths[name], values, strict=True):
            if value is MISSING:
                self._add_missing(name, number, record, own=own)
                return ()
            text = "" if is_missing(value) else as_text(value)
            if text is None:
                self._add_type(name, value, number, own=own)
                return ()
            if is_empty(text):
                what = f"column {show(own)} of the template of {name!r} is empty; fill it in or remove the row"
                self._add(f"empty {own}", what, number)
                return ()
            texts.append(text)
        if self._check_text(name, self.columns.fill(name, texts), number, values[0]) is None:
            return ()
        return tuple(self.columns.fill(name, texts, template=template) for template in templates or (None,))

    def _tidy(self, text: str) -> str:
        tidied = tidy_answer(text)
        if tidied is not text and tidied != text:
            what = "white space around the answer" if tidied == text.strip() or text.isascii() else "Unicode form"
            self.found.tidied[what] += 1
        return tidied

    def _add_type(self, name: str, value: object, number: int, *, own: str | None = None) -> None:
        wanted = "a text" if name == "input" and own is None else "a text, a number, true or false, or a list of these"
        fix = "write it as text"
        if isinstance(value, dict | list):
            paths = nested_paths(own or self.columns.paths[name][0], value)
            if paths and own is not None:
                fix = f"name the part that is, {{{paths[0]}}}, in the template in {self.settings_name}"
            elif paths:
                mapped = write_columns({**self.columns.mapped, name: paths[0]})
                fix = f"name the part that is: write {mapped} into {self.settings_name}"
        self._add(f"wrong type of {name}", f"{own or name} {show(value)} is not {wanted}; {fix}", number)

    def _check_text(self, name: str, text: str, number: int, value: object) -> str | None:
        if is_empty(text):
            fix = "fill it in or remove the row"
            if name == "input" and not self.columns.is_joined("input") and "instruction" in self.columns.unread():
                joined = {"input": ["instruction", self.columns.paths["input"][0]]}
                mapped = write_columns({**self.columns.mapped, **joined})
                fix += f", or join it to the instruction: write {mapped} into {self.settings_name}"
            self._add(f"empty {name}", f"{name} {show(value)} is empty; {fix}", number)
            return None
        if not is_unicode(text):
            what = f"{name} {show(text)} holds half of a surrogate pair; write the whole character"
            self._add("broken Unicode", what, number)
            return None
        return text

    def _read_options(
        self, values: Mapping[str, list[object]], number: int
    ) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """Return the options (() if there are none, None after a fault), and their labels (() if there are none)."""
        labels: tuple[str, ...] = ()
        if self.columns.is_joined("options"):
            names = [path.split(".")[-1] for path in self.columns.paths["options"]]
            pairs = [
                (name, value)
                for name, value in zip(names, values["options"], strict=True)
                if value is not MISSING and not is_missing(value) and value != ""
            ]
            labels, given = tuple(name for name, _ in pairs), [value for _, value in pairs]
            return self._check_options(given, number), labels
        value = values["options"][0]
        if self._is_table and isinstance(value, str):
            value = split_cell(value)
        if value is MISSING or is_missing(value) or value == []:
            return (), ()
        own = values["option_labels"][0]
        if isinstance(own, list) and isinstance(value, list) and len(own) == len(value):
            texts = [as_text(label) for label in own]
            labels = tuple(text for text in texts if text is not None) if None not in texts else ()
        return self._check_options(value, number), labels

    def _check_options(self, value: object, number: int) -> tuple[str, ...] | None:
        wrong = ""
        texts = [as_text(option) for option in value] if isinstance(value, list | tuple) else []
        options = tuple(tidy_answer(text) for text in texts if text is not None and text.strip() and is_unicode(text))
        if not isinstance(value, list | tuple):
            wrong = "are not a list; write " + ('"a|b" or ["a", "b"]' if self._is_table else '["a", "b"]')
        elif len(options) < len(texts):
            wrong = "hold one that is not a text, or an empty one; write a text for each"
        elif len(set(options)) < len(options):
            wrong = "name one answer twice; remove one of them"
        elif len(options) == 1:
            wrong = "leave no choice; give two or more, or none"
        if wrong:
            self._add("bad options", f"options {show(value)} {wrong}", number)
            return None
        return options

    def _read_embedding(self, values: list[object] | None, number: int) -> bytes | None:
        """Return the numbers of the row; b"" if the task has none, None after a fault."""
        if values is None:
            return b""
        value = values[0]
        try:
            if value is MISSING or is_missing(value):
                raise ValueError("is missing")
            packed = pack_vector(value)
            if len(packed) != (self._embedding_bytes or len(packed)):
                raise ValueError(f"has {len(packed) // 4} numbers, earlier ones have {self._embedding_bytes // 4}")
        except ValueError as error:
            own = show(self.columns.paths["embedding"][0])
            self._add("bad embedding", f"column {own}, the row's embedding, {error}; correct it", number)
            return None
        self._embedding_bytes = len(packed)
        return packed

    def _read_split(self, value: object, number: int) -> str | None:
        """Return the split; "" if neither the row nor its file names one, None after a fault."""
        if value is MISSING or is_missing(value) or (isinstance(value, str) and not value.strip()):
            return self.split
        split = SPLIT_WORDS.get(value.strip().lower()) if isinstance(value, str) else None
        if split is None:
            self._add("unknown split", partial(_describe_split, value), number)
        elif self.split and split != self.split:
            what = f"split {show(value)} in a file of {self.split} rows by its name; correct one of them"
            self._add("two splits", what, number)
            return None
        return split


def _describe_split(value: object) -> str:
    near = suggest(value, SPLIT_WORDS) if isinstance(value, str) else ""
    # "eval" is most similar to "val", but usually means test.
    near = near if "did you mean" in near and "'val'" not in near else "; write train, validation or test"
    return f"unknown split {show(value)}{near}"
