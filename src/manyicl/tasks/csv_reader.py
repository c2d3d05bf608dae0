"""Reads the rows of CSV and TSV files, with any usual separator and quoting."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manyicl.tasks.columns import Columns
from manyicl.tasks.faults import FaultLog, show
from manyicl.tasks.formats import (
    HEAD_SIZE,
    Record,
    data_suffix,
    decode_json,
    drop_marks,
    find_foreign,
    find_utf16,
    open_file,
)

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def read_table(path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    """Yield (row number, record) for every row of a CSV or TSV file; faults go to `log`."""
    with open_file(path) as file:
        content = drop_marks(file.read())
    if what := find_foreign(content):
        log.add("not CSV", what, path=path)
        return
    codec = find_utf16(content)
    try:
        text = content.decode(codec or "utf-8").lstrip("\ufeff").rstrip("\x1a")  # DOS's mark of the end of a file
    except UnicodeDecodeError as error:
        if codec:
            log.add("broken UTF-16", "looks like UTF-16, but is broken; save it as UTF-8", path=path)
        else:
            # With one more character, so that the broken row counts even if its first byte is the broken one.
            before = csv.reader(io.StringIO(content[: error.start].decode() + "x", newline=""))
            number = _count_rows(before) - 1
            what = f"byte {error.start + 1:,} of the file is not UTF-8; save it as UTF-8 (Excel calls it CSV UTF-8)"
            log.add("not UTF-8", what, row=number if number > 0 else None, path=path)
        return
    del content
    if text.endswith("\0") and text.strip("\0"):
        count = len(text) - len(text.rstrip("\0"))
        what = f"ends in {count:,} NUL bytes, as after a crash or on a full disk; remove them, or copy the file again"
        log.add("NUL bytes", what, path=path)
        text = text.rstrip("\0")
    # The default refuses cells over 131,072 characters. It is not put back: the limit is the whole process's, and other
    # threads may be in the middle of a table.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    yield from _read_cells(text, path, columns, log)


def _count_rows(lines: Iterator[list[str]]) -> int:
    try:
        return sum(1 for cells in lines if cells)
    except csv.Error:
        return 0


def _read_cells(text: str, path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    """Yield the data rows of a CSV text with a header."""
    given, text = _split_off_separator(text)
    usual = "\t" if data_suffix(path).startswith(".tsv") else ","
    separator = given or _find_separator(text, columns, usual=usual)
    first = next((cells for cells in _sample(text, separator) if any(cells)), [])
    if columns.missing_from([name.strip() for name in first]) and (what := _describe_text(text, separator, columns)):
        log.add("not the header", what, path=path)
        return
    number = 0
    try:
        # strict, because otherwise an unclosed quote silently swallows the rest of the file
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, **_dialect(text, separator))
        header = [name.strip() for name in next((cells for cells in lines if any(cells)), [])]
        repeated = sorted({name for name in header if name and header.count(name) > 1 and columns.reads(name)})
        if repeated:
            what = f"the header names {show(repeated[0])} twice; rename one of them"
            log.add("repeated column", what, path=path)
            return
        for cells in lines:
            if not cells:
                continue
            number += 1
            yield number, _check_cells(cells, header, separator, row=number, path=path, log=log)
    except csv.Error as error:
        what = f"invalid CSV ({error}); close the quote, double quotes inside one"
        log.add("invalid CSV", what, row=number + 1, path=path)


def _check_cells(cells: list[str], header: list[str], separator: str, *, row: int, path: Path, log: FaultLog) -> Record:
    """Return a row's cells by column; None if there are too many or too few, or they repeat the header."""
    if len(cells) != len(header):
        surplus, lacking = cells[len(header) :], header[len(cells) :]
        if any(cell.strip() for cell in surplus) or any(lacking):
            name = _SEPARATORS.get(separator, separator)
            if not any(cells):  # a blank row of separators, but not enough of them
                return dict.fromkeys(header, "")
            fix = f"put a cell that holds a {name} in double quotes" if surplus else f"a {name} is missing"
            what = f"{len(cells)} cells, but the header has {len(header)}, separated by a {name}; {fix}"
            log.add("wrong number of cells", what, row=row, path=path)
            return None
        cells = [*cells[: len(header)], *[""] * len(lacking)]
    elif [cell.strip(" \t\r\n\ufeff") for cell in cells] == header and any(header):
        log.add("repeated header", "the row repeats the header; remove it", row=row, path=path)
        return None
    record = dict(zip(header, cells, strict=True))
    if len(record) == len(header):
        return record
    # Of two columns with one name the first is kept. Only columns that we do not read can have the same name.
    return {name: cells[header.index(name)] for name in record}


def _dialect(text: str, separator: str) -> dict[str, Any]:
    """Return the csv module's options: cells are quoted as usual, or after a blank, or with tabs maybe not at all."""
    cells = [cell for row in _sample(text, separator) for cell in row]
    if any(len(cell) > 2 and cell.startswith(" ") and cell.strip()[:1] == cell.strip()[-1:] == '"' for cell in cells):
        return {"delimiter": separator, "skipinitialspace": True}
    if (
        separator != "\t"
        or '"' not in text
        or _is_even(csv.reader(io.StringIO(text, newline=""), "excel-tab", strict=True))
    ):
        return {"delimiter": separator}
    plain: dict[str, Any] = {"delimiter": separator, "quoting": csv.QUOTE_NONE}
    return plain if _is_even(csv.reader(io.StringIO(text, newline=""), **plain)) else {"delimiter": separator}


def _is_even(lines: Iterator[list[str]]) -> bool:
    """Return whether every row has as many cells as the first."""
    try:
        return len({len(cells) for cells in lines if cells}) == 1
    except csv.Error:
        return False


def _describe_text(text: str, separator: str, columns: Columns) -> str:
    """Return what a text without our columns in its first row is: JSON, or a table below other lines; else ""."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            decode_json(text.strip().split("\n", 1)[0])
        except ValueError:
            kind = ".json" if text.rstrip()[-1:] in ("}", "]") and text.lstrip()[:2].strip() in ("[", "{") else ""
        else:
            kind = ".jsonl"
        if kind:
            return f"is JSON, not a table; name it {kind}"
    for mark in dict.fromkeys((separator, *_SEPARATORS)):
        rows = _sample(text, mark)
        for place, cells in enumerate(rows[1:], start=2):
            if not columns.missing_from([cell.strip() for cell in cells]):
                return f"the header is row {place}; remove the {'row' if place == 2 else f'{place - 1} rows'} above it"
    return ""


def _split_off_separator(text: str) -> tuple[str, str]:
    """Return the separator in Excel's "sep=;" line, "" if there is no such line, and the text without the line."""
    line, _, rest = text.partition("\n")
    line = line.strip("\r \ufeff\"'")
    if line[:4].lower() == "sep=" and len(line) == 5:
        return line[4], rest
    return ("\t", rest) if line.lower() == "sep=" or line.lower() == "sep=\t" else ("", text)


def _find_separator(text: str, columns: Columns, *, usual: str) -> str:
    """Return the separator with which the header has our columns, else one that gives all rows as many cells."""
    candidates = [usual, *(separator for separator in _SEPARATORS if separator != usual)]
    tables = {separator: _sample(text, separator) for separator in candidates}
    for separator, table in tables.items():
        if table and not columns.missing_from(tuple(name.strip() for name in table[0])):
            return separator
    even = {
        separator: len(table[0])
        for separator, table in tables.items()
        if table and len(table[0]) > 1 and all(len(cells) == len(table[0]) for cells in table)
    }
    return usual if usual in even or not even else max(even, key=even.__getitem__)


def _sample(text: str, separator: str) -> list[list[str]]:
    """Return the first rows of a text, split by `separator`."""
    rows: list[list[str]] = []
    head = text[:HEAD_SIZE]
    lines = csv.reader(io.StringIO(head, newline=""), delimiter=separator)
    try:
        for cells in lines:
            if cells:
                rows.append(cells)
            if len(rows) > 20:
                break
    except csv.Error:
        pass
    whole = len(head) == len(text) or len(rows) > 20 or len(rows) < 2
    return rows if whole else rows[:-1]  # the last may be incomplete
