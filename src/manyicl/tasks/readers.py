"""Reads the records of a data file: JSON Lines, a JSON list, CSV, TSV (each also in .gz) or Parquet.

Row numbers count from 1, as a person would count: the line in JSON Lines (blank lines are skipped but counted), the
place in a JSON list, the data row in CSV and TSV (1 is the first after the header; a quoted cell may contain newlines,
blank lines do not count), the row in Parquet.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from manyicl.errors import UserError
from manyicl.tasks.columns import Columns
from manyicl.tasks.faults import FaultLog, show
from manyicl.tasks.json_text import RepeatedKeys, decode_json

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# None: the record could not be read; its fault is in the log.
Record = Mapping[str, object] | None

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_HEAD = 65_536  # bytes or characters from which a file's format is recognised
_FOREIGN = {
    b"PK\x03\x04": "is a zip file, as Excel's .xlsx is; save it as CSV UTF-8",
    bytes.fromhex("d0cf11e0a1b11ae1"): "is an old Office file, as Excel's .xls is; save it as CSV UTF-8",
    b"PAR1": "is a Parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; write it as Parquet",
    b"\x1f\x8b": "is compressed by gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it",
    b"BZh": "is compressed by bzip2; unpack it",
    b"\xfd7zXZ\0": "is compressed by xz; unpack it",
    b"SQLite format 3\0": "is an SQLite database; export the table as CSV UTF-8",
    b"%PDF-": "is a PDF; write its table as CSV UTF-8",
    b"\x80\x04": "is a Python pickle; write it as JSON Lines",
    b"\x80\x05": "is a Python pickle; write it as JSON Lines",
    b"version https://git-lfs": "is a Git LFS pointer, not the data; run git lfs pull",
    codecs.BOM_UTF32_LE: "is text in UTF-32; save it as UTF-8",
    codecs.BOM_UTF32_BE: "is text in UTF-32; save it as UTF-8",
}
_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


def data_suffix(path: Path) -> str:
    """Return the suffix that decides how a file is read, such as ".csv" or ".csv.gz"; "" if it is not a data file."""
    name = path.name.lower()
    bare = name.removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if bare.endswith(suffix) and bare != suffix), "")
    if bare == name or not suffix:
        return suffix
    return "" if suffix == ".parquet" else f"{suffix}.gz"


def read_records(path: Path, *, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    """Yield (row number, record) for every row of a data file; faults of the file go to `log`.

    columns: what will be read from each record. The separator of a CSV is the one with which its header has these
    columns, and only these columns of a Parquet file are read.

    Raises:
        UserError: the file cannot be opened.
    """
    suffix = data_suffix(path).removesuffix(".gz")
    reader = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}.get(suffix, _read_table)
    try:
        yield from reader(path, columns, log)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        with path.open("rb") as file:
            head = file.read(200)
        what = f"the gzip data are damaged ({error}); compress the file again"
        if not head.startswith(b"\x1f\x8b"):
            what = _find_foreign(head) or "is not compressed by gzip; remove .gz from its name"
        log.add("damaged gzip", what, path=path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def holds_rows(path: Path) -> bool:
    """Return whether a .json file may be data: a list, JSON Lines, or an object that is a table.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with _open(path) as file:
            head = file.read(_HEAD).lstrip(codecs.BOM_UTF8).lstrip()
            if not head.startswith(b"{"):
                return True  # a list, or broken, which is reported when it is read
            content = head + file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return True
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        value = decode_json(content.decode())
    except ValueError:
        return b"\n" in content.strip()
    return isinstance(value, dict) and _list_rows(value) is not None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _find_foreign(head: bytes) -> str:
    """Return what a file is if it is not text; "" if it may be text."""
    if _PAGE.match(_drop_marks(head)):
        return "is a web page (HTML), not the data; download the file itself"
    return next((what for start, what in _FOREIGN.items() if head.startswith(start)), "")


def _utf16_of(head: bytes) -> str:
    """Return the codec of a text in UTF-16, known by its byte-order mark or a NUL in every second byte; else ""."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = head[:16]  # a header or JSON begins with ASCII, even if the rest is not
    if len(start) >= 8 and not any(start[1::2]) and all(start[::2]):
        return "utf-16-le"
    if len(start) >= 8 and not any(start[::2]) and all(start[1::2]):
        return "utf-16-be"
    return ""


def _drop_marks(content: bytes) -> bytes:
    while content.startswith(codecs.BOM_UTF8):
        content = content.removeprefix(codecs.BOM_UTF8)
    return content


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        head = file.read(_HEAD)
        if what := _find_foreign(head):
            log.add("not JSON", what, path=path)
            return
        file.seek(0)
        codec = _utf16_of(head)
        start = _drop_marks(head).lstrip()[:1]
        if not codec and start != b"[" and data_suffix(path).startswith(".jsonl"):
            yield from _read_lines(file, path, columns, log)
            return
        content = file.read()
        if codec:
            try:
                content = content.decode(codec).lstrip("\ufeff").encode()
            except UnicodeDecodeError:
                log.add("broken UTF-16", "looks like UTF-16, but is broken; save it as UTF-8", path=path)
                return
    try:
        value = decode_json(_drop_marks(content).decode())
    except ValueError as error:
        # A list over several lines is not JSON Lines; anything else may be.
        if start == b"[" and b"\n" in content.strip() and not _is_line(content):
            log.add("invalid JSON", f"invalid JSON ({error}); the file must be one list of objects", path=path)
            return
        value = None
    rows = value if isinstance(value, list) else _list_rows(value) if isinstance(value, dict) else None
    if rows is None:
        yield from _read_lines(io.BytesIO(content), path, columns, log)
        return
    for number, row in enumerate(rows, start=1):
        yield number, _check_object(row, number, path, columns, log)


def _is_line(content: bytes) -> bool:
    """Return whether the first line of a text is valid JSON."""
    try:
        decode_json(_drop_marks(content).lstrip().split(b"\n", 1)[0].decode())
    except ValueError:
        return False
    return True


def _list_rows(value: Mapping[str, Any]) -> Sequence[object] | None:
    """Return the rows of a JSON object that is a table; None if it is not one.

    Known tables: a single list of objects under any key; SQuAD's file (data, paragraphs, qas); and columns, as pandas
    ({"input": {"0": ...}}) and datasets ({"input": [...]}) write them.
    """
    tables = [inner for inner in value.values() if isinstance(inner, list) and any(isinstance(r, dict) for r in inner)]
    if len(tables) == 1:
        return _flatten_squad(tables[0])
    columns = list(value.values())
    if _are_rows(columns):
        return columns
    if not all(isinstance(column, dict) for column in columns):
        if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return None
        columns = [dict(enumerate(column)) for column in columns]
    if len(columns) < 2 or any(list(column) != list(columns[0]) for column in columns) or not columns[0]:
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*(c.values() for c in columns), strict=True)]


def _are_rows(values: Sequence[object]) -> bool:
    """Return whether an object's values are rows, as pandas writes them by index: {"0": {"input": ...}, ...}."""
    return len(values) > 1 and all(
        isinstance(value, dict) and {"input", "answer"} <= {key.strip().lower() for key in value} for value in values
    )


def _flatten_squad(articles: Sequence[Any]) -> Sequence[object]:
    """Return one row per question of SQuAD's articles and paragraphs; any other list as it is."""
    try:
        return [
            {"title": article.get("title"), "context": paragraph["context"], **question}
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (TypeError, KeyError, AttributeError):
        return articles


def _read_lines(file: IO[bytes], path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    # Bytes, not text: then only \n ends a line, and a line that is not UTF-8 does not hide the others.
    is_first = True
    for number, line in enumerate(file, start=1):
        content = _drop_marks(line)  # in any line, since files may have been joined with cat
        if not content.strip():
            continue
        if is_first and content.strip() in (b"{", b"[{"):
            what = "has objects that span several lines; write each on one line (jq -c . FILE does that)"
            log.add("object over several lines", what, path=path)
            return
        is_first = False
        record: Record = None
        try:
            record = _check_object(decode_json(content.decode()), number, path, columns, log)
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1:,} of the line is not UTF-8; save the file as UTF-8"
            log.add("broken UTF-8", what, row=number, path=path)
        except ValueError as error:
            kind, what = _describe_json_mistake(content, error)
            log.add(kind, what, row=number, path=path)
        yield number, record


def _describe_json_mistake(line: bytes, error: ValueError) -> tuple[str, str]:
    """Return the kind of mistake in a broken line, and its description with the fix."""
    text = line.strip()
    if not text.strip(b"\0"):
        return (
            "NUL bytes",
            f"{len(text):,} NUL bytes, as after a crash or on a full disk; remove them, or copy the file again",
        )
    if text.endswith(b",") and _is_line(text[:-1]):
        return "comma after the object", "a comma after the object; remove it, each line must be just one JSON object"
    if str(error).startswith("Extra data") and text.startswith((b"{", b"[")):
        return "several values on a line", "more than one value on the line; write each object on a line of its own"
    if text[:1] not in b"{[" and any(mark in text for mark in (b",", b"\t", b";")):
        kind = "not JSON"
        return kind, f"{show(text[:40].decode(errors='replace'))} is not JSON; if the file is a table, name it .csv"
    if text.startswith((b"{'", b"{ '")):
        return "single quotes", "invalid JSON (single quotes); write double quotes around names and texts"
    return "invalid JSON", f"invalid JSON ({error}); each line must be one JSON object"


def _check_object(value: object, number: int, path: Path, columns: Columns, log: FaultLog) -> Record:
    if isinstance(value, RepeatedKeys) and any(map(columns.reads, value.repeated)):
        name = next(name for name in value.repeated if columns.reads(name))
        log.add("repeated key", f"the object has {show(name)} twice; remove one of them", row=number, path=path)
        return None
    if isinstance(value, dict):
        return value
    what = f'{show(value)} is not an object; write {{"input": ..., "answer": ...}}'
    log.add("not an object", what, row=number, path=path)
    return None


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def _read_table(path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        content = _drop_marks(file.read())
    if what := _find_foreign(content):
        log.add("not CSV", what, path=path)
        return
    codec = _utf16_of(content)
    try:
        text = content.decode(codec or "utf-8").lstrip("\ufeff").rstrip("\x1a")  # DOS's mark of the end of a file
    except UnicodeDecodeError as error:
        if codec:
            log.add("broken UTF-16", "looks like UTF-16, but is broken; save it as UTF-8", path=path)
        else:
            # With one more character, so that the broken row counts even if its first byte is the broken one.
            before = csv.reader(io.StringIO(content[: error.start].decode() + "x", newline=""))
            number = _count_rows(before) - 1
            what = f"byte {error.start + 1:,} of the file is not UTF-8; save it as UTF-8"
            log.add("broken UTF-8", what, row=number if number > 0 else None, path=path)
        return
    del content
    if text.endswith("\0") and text.strip("\0"):
        count = len(text) - len(text.rstrip("\0"))
        what = f"ends in {count:,} NUL bytes, as after a crash or on a full disk; remove them, or copy the file again"
        log.add("NUL bytes", what, path=path)
        text = text.rstrip("\0")
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells over 131,072 characters
    try:
        yield from _read_cells(text, path, columns, log)
    finally:
        csv.field_size_limit(limit)


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
    # Of two columns with one name the first is kept. Only columns that we do not read can have the same name.
    return dict(zip(reversed(header), reversed(cells), strict=True))


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
    head = text[:_HEAD]
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


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    import pyarrow  # slow to import, and most folders have no Parquet file
    import pyarrow.parquet

    number = 0
    with path.open("rb") as raw:
        what = _find_foreign(raw.read(200))
    if what and "Parquet" not in what.partition(";")[0]:
        log.add("not Parquet", what, path=path)
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns.note_names(names)
            repeated = sorted({name for name in names if names.count(name) > 1 and columns.reads(name)})
            if repeated:
                log.add("repeated column", f"has a column {show(repeated[0])} twice; rename one of them", path=path)
                return
            short = {
                n for n in names if pyarrow.types.is_floating(t := file.schema_arrow.field(n).type) and t.bit_width < 64
            }
            wanted = [name for name in names if columns.reads(name)]
            wanted = wanted if not columns.missing_from(names) else names  # for a message that lists the columns
            known = {n: labels for n, labels in _class_names(file.schema_arrow.metadata).items() if n in wanted}
            for batch in file.iter_batches(batch_size=4096, columns=wanted):
                records = batch.to_pylist()
                for record in records:
                    number += 1
                    for name, labels in known.items():
                        record[name] = _name_class(record.get(name), labels)
                    for name in short.intersection(record):
                        record[name] = _shorten(record[name])
                    yield number, record
    except UnicodeDecodeError:
        what = "a text in this row or one of the 4,096 after it is not UTF-8; write the file again"
        log.add("broken UTF-8", what, row=number + 1, path=path)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        log.add("invalid Parquet", f"invalid Parquet ({error}); write the file again", path=path)


def _shorten(value: object) -> object:
    """Return a 32-bit float as the shortest 64-bit one: 0.1, not 0.10000000149."""
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return column -> names of its classes, from the metadata that the datasets library writes for a ClassLabel."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and _are_texts(feature.get("names"))
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(member, str) for member in value)


def _name_class(value: object, names: Sequence[str]) -> object:
    """Return the name of class number `value`; None for -1, which datasets writes for a missing class."""
    if isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else None if value == -1 else value
    return value
