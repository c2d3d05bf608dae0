"""Rows of a data file (JSONL, CSV, Parquet), checked cell by cell; what is wrong is collected as faults, not raised.

Row numbers count from 1 and are what a person sees: the line in JSONL (blank lines are skipped but counted), the data
row in CSV (1 is the first after the header; a quoted cell may hold newlines, blank lines do not count), the row in
Parquet.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from manyicl.errors import UserError, suggest

SUFFIXES = (".jsonl", ".csv", ".parquet")
COLUMNS = ("input", "answer", "split", "options")
SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_ROWS_NAMED = 5  # row numbers kept in one Fault


@dataclass(frozen=True, slots=True)
class Row:
    """One row that has no fault; `split` is train, validation or test, or "" where the row does not say."""

    number: int
    input: str
    answer: str
    options: tuple[str, ...]
    split: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of mistake in one file.

    `rows` are the first few row numbers, `count` is how many rows have it (1, with no rows, for a mistake of the file
    as a whole), and `message` is one line: file, first row, the value and the fix.
    """

    path: Path
    kind: str
    rows: tuple[int, ...]
    count: int
    message: str


@dataclass(slots=True)
class _Found:
    """What FaultLog knows about one kind of fault."""

    what: str
    rows: list[int] = field(default_factory=list)
    count: int = 0


class FaultLog:
    """Collects the mistakes of one task: thousands of rows with the same one become one Fault."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[tuple[Path, str], _Found] = {}

    def add(
        self, kind: str, what: str | Callable[[], str], *, row: int | None = None, path: Path | None = None
    ) -> None:
        """Note a fault; `what` (value and fix) is kept, and computed if it is a function, for the first row alone."""
        found = self._found.get((path or self._path, kind))
        if found is None:
            text = what if isinstance(what, str) else what()
            found = self._found[path or self._path, kind] = _Found(" ".join(text.split()))
        found.count += 1
        if row is not None and len(found.rows) < _ROWS_NAMED:
            found.rows.append(row)

    def list_faults(self) -> list[Fault]:
        """Return one Fault for each kind, in the order in which they were met."""
        faults = []
        for (path, kind), found in self._found.items():
            where = f"{path}, row {found.rows[0]:,}" if found.rows else f"{path}"
            others = found.count - 1
            if others and found.rows:
                where += f" (and {others:,} more {'row' if others == 1 else 'rows'})"
            faults.append(Fault(path, kind, tuple(found.rows), found.count, f"{where}: {found.what}"))
        return faults


def show(value: object) -> str:
    """Return `value` as a short one-line literal for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Number(str):
    """A JSON number, kept as it was written: 1.50 must not come back as 1.5."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)  # without quotes in messages


_JSON = json.JSONDecoder(parse_int=_Number, parse_float=_Number)


def decode_json(text: str) -> object:
    """Return the value of a JSON text; `as_text` turns its numbers into the text that was written.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def as_text(value: object) -> str | None:
    """Return a text as it is and a finite number as its JSON text; None for anything else."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return json.dumps(value)
    return None


def is_unicode(text: str) -> bool:
    r"""Return whether `text` can be encoded; JSON can spell half of a surrogate pair ("\ud800"), which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path, *, columns: Mapping[str, str], log: FaultLog) -> list[Row]:
    """Return the rows of `path` that have no fault; every fault goes to `log`.

    `columns` maps our names (`COLUMNS`) to the file's own, where they differ.

    Raises:
        UserError: the file cannot be opened.
    """
    checker = _RowChecker(path, columns, log)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    rows = []
    num_records = 0
    try:
        for number, record in readers[path.suffix.lower()](path, log):
            num_records += 1
            row = checker.check(number, record)
            if row is not None:
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if num_records:
        checker.check_columns()
    elif not log.list_faults():
        log.add("no rows", "the file has no rows; add some, or remove the file")
    return rows


def _read_jsonl(path: Path, log: FaultLog) -> Iterator[tuple[int, dict[str, object]]]:
    # Bytes, not text: a line ends at \n alone, and one broken line does not hide the others.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            try:
                record = decode_json(content.decode())
            except UnicodeDecodeError as error:
                what = f"byte {error.start + 1:,} of the line is not UTF-8; save the file as UTF-8"
                log.add("broken UTF-8", what, row=number)
            except ValueError as error:
                log.add("invalid JSON", f"invalid JSON ({error}); each line must be one JSON object", row=number)
            else:
                if isinstance(record, dict):
                    yield number, record
                else:
                    what = f'{show(record)} is not an object; write {{"input": ..., "answer": ...}}'
                    log.add("not an object", what, row=number)


def _read_csv(path: Path, log: FaultLog) -> Iterator[tuple[int, dict[str, object]]]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    number = 0
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells over 131,072 characters
    try:
        text = content.decode()
        # strict: else an unclosed quote silently swallows the rest of the file
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(lines, [])]
        repeated = sorted({name for name in header if name and header.count(name) > 1})
        if repeated:
            log.add("repeated column", f"the header names {show(repeated[0])} twice; rename one of them")
            return
        for cells in lines:
            if not cells:
                continue
            number += 1
            if len(cells) == len(header):
                yield number, dict(zip(header, cells, strict=True))
            else:
                what = f"{len(cells)} cells, but the header has {len(header)}; quote cells that hold a comma"
                log.add("wrong number of cells", what, row=number)
    except UnicodeDecodeError as error:
        # One more character, so that the broken row is begun and counted even where its first byte is the broken one.
        before = csv.reader(io.StringIO(content[: error.start].decode() + "x", newline=""))
        number = sum(1 for cells in before if cells) - 1
        what = f"byte {error.start + 1:,} of the file is not UTF-8; save it as UTF-8"
        log.add("broken UTF-8", what, row=number or None)
    except csv.Error as error:
        log.add("invalid CSV", f"invalid CSV ({error}); close the quote, double quotes inside one", row=number + 1)
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, log: FaultLog) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow  # slow to import, and most folders have no Parquet file
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except UnicodeDecodeError:
        what = "a text in this row or one of the 4,096 after it is not UTF-8; write the file anew"
        log.add("broken UTF-8", what, row=number + 1)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        log.add("invalid Parquet", f"invalid Parquet ({error}); write the file anew")


class _RowChecker:
    """Turns the records of one file into rows, or into faults."""

    def __init__(self, path: Path, columns: Mapping[str, str], log: FaultLog) -> None:
        self._mapped = columns
        self._own = {name: columns.get(name, name) for name in COLUMNS}
        self._is_csv = path.suffix.lower() == ".csv"
        self._settings_name = f"{path.stem}.task.json"
        self._log = log
        self._seen: set[str] = set()

    def check(self, number: int, record: Mapping[str, object]) -> Row | None:
        """Return the row, or None where it has a fault."""
        self._seen.update(record)
        text = self._read_text("input", number, record)
        answer = self._read_text("answer", number, record)
        options = self._read_options(number, record.get(self._own["options"]))
        split = self._read_split(number, record.get(self._own["split"]))
        if text is None or answer is None or options is None or split is None:
            return None
        if options and answer not in options:
            what = f"answer {show(answer)} is not among its options"
            self._log.add("answer not among its options", lambda: what + near_word(answer, options), row=number)
            return None
        return Row(number, text, answer, options, split)

    def check_columns(self) -> None:
        """Note an optional column that was asked for but is nowhere, or that is there in other letters."""
        for name in ("split", "options"):
            own = self._own[name]
            if own in self._seen:
                continue
            if name in self._mapped:
                what = f'no row has the column {show(own)} that "columns" in {self._settings_name} gives for {name!r}'
                self._log.add(f"no {name} column", what)
                continue
            # Left alone, "Split" would be ignored and test rows trained on.
            for other in sorted(self._seen):
                if other.strip().casefold() == name:
                    self._log.add(f"misspelt {name} column", f"column {show(other)} is not read; name it {name!r}")

    def _read_text(self, name: str, number: int, record: Mapping[str, object]) -> str | None:
        own = self._own[name]
        if own not in record:
            has = ", ".join(show(column) for column in list(record)[:8]) or "nothing"
            what = f'no {own!r} column (it has {has}); add it, or map it with "columns" in {self._settings_name}'
            self._log.add(f"no {name} column", what, row=number)
            return None
        value = record[own]
        is_number = not isinstance(value, str) or isinstance(value, _Number)
        text = None if is_number and name == "input" else as_text(value)
        if text is None:
            wanted = "a text" if name == "input" else "a text or a number"
            self._log.add(f"wrong type of {name}", f"{name} {show(value)} is not {wanted}; write it so", row=number)
            return None
        if not text.strip():
            self._log.add(f"empty {name}", f"{name} {show(text)} is empty; fill it in or remove the row", row=number)
            return None
        if not is_unicode(text):
            what = f"{name} {show(text)} holds half of a surrogate pair; write the whole character"
            self._log.add("broken Unicode", what, row=number)
            return None
        return text

    def _read_options(self, number: int, value: object) -> tuple[str, ...] | None:
        """Return the options, () for none, None for a fault."""
        if self._is_csv and isinstance(value, str):
            value = _split_cell(value)
        if value is None or value == []:
            return ()
        wrong = ""
        texts = [as_text(option) for option in value] if isinstance(value, list | tuple) else []
        options = tuple(text for text in texts if text is not None and text.strip() and is_unicode(text))
        if not isinstance(value, list | tuple):
            wrong = "are not a list" + (' ("a|b" or ["a", "b"])' if self._is_csv else "")
        elif len(options) < len(texts):
            wrong = "hold one that is not a text, or an empty one"
        elif len(set(options)) < len(options):
            wrong = "name one answer twice"
        elif len(options) == 1:
            wrong = "leave no choice; give two or more, or none"
        if wrong:
            self._log.add("bad options", f"options {show(value)} {wrong}", row=number)
            return None
        return options

    def _read_split(self, number: int, value: object) -> str | None:
        """Return the split, "" where the row does not say, None for a fault."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        split = SPLIT_WORDS.get(value.strip().lower()) if isinstance(value, str) else None
        if split is None:
            word = value if isinstance(value, str) else repr(value)
            self._log.add(
                "unknown split", lambda: f"unknown split {show(value)}{suggest(word, SPLIT_WORDS)}", row=number
            )
        return split


def near_word(word: str, known: tuple[str, ...]) -> str:
    """Return what `suggest` says, or nothing where that would be too long for a message."""
    text = suggest(word, known)
    return text if len(text) <= 160 else ""


def _split_cell(cell: str) -> object:
    """Return the options of a CSV cell: a JSON list, or values between bars; the cell itself where it is neither."""
    cell = cell.strip()
    if not cell:
        return None
    if cell.startswith("["):
        try:
            return decode_json(cell)
        except ValueError:
            return cell
    return [option.strip() for option in cell.split("|")]
