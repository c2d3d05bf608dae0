"""Reads the records of a data file: JSON Lines, a JSON list, CSV, TSV (each also in .gz) or Parquet.

Row numbers count from 1, as a person would count: the line in JSON Lines (blank lines are skipped but counted), the
place in a JSON list, the data row in CSV and TSV (1 is the first after the header; a quoted cell may contain newlines,
blank lines do not count), the row in Parquet.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeGuard

from manyicl.errors import UserError
from manyicl.tasks.columns import Columns
from manyicl.tasks.csv_reader import read_table
from manyicl.tasks.faults import FaultLog, show
from manyicl.tasks.formats import (
    HEAD_SIZE,
    PARTS,
    Record,
    RepeatedKeys,
    data_suffix,
    decode_json,
    drop_marks,
    find_foreign,
    find_utf16,
    open_file,
)


def read_records(path: Path, *, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    """Yield (row number, record) for every row of a data file; faults of the file go to `log`.

    columns: what will be read from each record. The separator of a CSV is the one with which its header has these
    columns, and only these columns of a Parquet file are read.

    Raises:
        UserError: the file cannot be opened.
    """
    suffix = data_suffix(path).removesuffix(".gz")
    reader = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}.get(suffix, read_table)
    try:
        yield from reader(path, columns, log)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        with path.open("rb") as file:
            head = file.read(200)
        what = f"the gzip data are damaged ({error}); compress the file again"
        if not head.startswith(b"\x1f\x8b"):
            what = find_foreign(head) or "is not compressed by gzip; remove .gz from its name"
        log.add("damaged gzip", what, path=path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def has_split_column(path: Path) -> bool:
    """Return whether the first row of a file has a column `split`, in any case.

    Raises:
        UserError: the file cannot be opened.
    """
    _, record = next(read_records(path, columns=Columns({}), log=FaultLog(path)), (0, None))
    return record is not None and any(name.strip().lower() == "split" for name in record)


def holds_rows(path: Path) -> bool:
    """Return whether a .json file may be data: a list, JSON Lines, or an object that is a table.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with open_file(path) as file:
            head = file.read(HEAD_SIZE).lstrip(codecs.BOM_UTF8).lstrip()
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
    return isinstance(value, dict) and (bool(_list_splits(value)) or _list_rows(value) is not None)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    with open_file(path) as file:
        head = file.read(HEAD_SIZE)
        if what := find_foreign(head):
            log.add("not JSON", what, path=path)
            return
        file.seek(0)
        codec = find_utf16(head)
        start = drop_marks(head).lstrip()[:1]
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
        value = decode_json(drop_marks(content).decode())
    except ValueError as error:
        # A list over several lines is not JSON Lines; anything else may be.
        if start == b"[" and b"\n" in content.strip() and not _is_line(content):
            log.add("invalid JSON", f"invalid JSON ({error}); the file must be one list of objects", path=path)
            return
        value = None
    if isinstance(value, dict) and (tables := _list_splits(value)):
        yield from _read_splits(value, tables, path, columns, log)
        return
    rows = value if isinstance(value, list) else _list_rows(value) if isinstance(value, dict) else None
    if rows is None:
        yield from _read_lines(io.BytesIO(content), path, columns, log)
        return
    for number, row in enumerate(rows, start=1):
        yield number, _check_object(row, number, path, columns, log)


def _list_splits(value: Mapping[str, Any]) -> dict[str, Sequence[object]]:
    """Return word -> rows if a JSON object holds the rows of splits ({"train": [...], "test": [...]}), else {}.

    The words may be any that name splits, also unclear ones such as "eval".
    """
    tables: dict[str, Sequence[object]] = {}
    for word, table in value.items():
        rows = table if isinstance(table, list) else _list_rows(table) if isinstance(table, dict) else None
        if word.strip().lower() in PARTS and rows and _has_objects(rows):
            tables[word] = _flatten_squad(rows)
    return tables


def _read_splits(
    value: Mapping[str, Any], tables: Mapping[str, Sequence[object]], path: Path, columns: Columns, log: FaultLog
) -> Iterator[tuple[int, Record]]:
    """Yield the rows of a JSON object that holds the rows of splits; each gets its split. They count through."""
    others = [word for word, table in value.items() if word not in tables and _has_objects(table)]
    unclear = [word for word in tables if PARTS[word.strip().lower()] == "other"]
    if others or unclear:
        what = f"holds the rows {show(next(iter(tables)))} and {show((unclear + others)[0])}"
        log.add("unclear split", f"{what}; name the splits train, validation and test, and remove others", path=path)
        return
    own = columns.paths["split"][0]
    alone = {PARTS[word.strip().lower()] for word in tables} == {"train"}
    number = 0
    for word, rows in tables.items():
        split = PARTS[word.strip().lower()]
        for row in rows:
            number += 1
            record = _check_object(row, number, path, columns, log)
            if record is None or alone:  # without test rows: divided as if no split were named
                yield number, record
                continue
            given = record.get(own)
            if given and PARTS.get(str(given).strip().lower()) != split:
                what = f"split {show(given)} among the rows of {word!r}; correct one of them"
                log.add("two splits", what, row=number, path=path)
                yield number, None
            else:
                yield number, {**record, own: split}


def _is_line(content: bytes) -> bool:
    """Return whether the first line of a text is valid JSON."""
    try:
        decode_json(drop_marks(content).lstrip().split(b"\n", 1)[0].decode())
    except ValueError:
        return False
    return True


def _list_rows(value: Mapping[str, Any]) -> Sequence[object] | None:
    """Return the rows of a JSON object that is a table; None if it is not one.

    Known tables: a single list of objects under any key; SQuAD's file (data, paragraphs, qas); columns, as pandas
    ({"input": {"0": ...}}) and datasets ({"input": [...]}) write them; and pandas' names beside lists of cells
    ({"columns": ["input", ...], "data": [[...], ...]}).
    """
    names, cells = value.get("columns"), value.get("data")
    if _are_texts(names) and isinstance(cells, list) and all(_fills(row, names) for row in cells):
        return [dict(zip(names, row, strict=True)) for row in cells]
    tables = [inner for inner in value.values() if _has_objects(inner)]
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


def _has_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _fills(row: object, names: Sequence[str]) -> bool:
    return isinstance(row, list) and len(row) == len(names)


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
    # Bytes, not text: then a line that is not UTF-8 does not hide the others.
    is_first = True
    for number, line in enumerate(_split_lines(file), start=1):
        content = drop_marks(line)  # in any line, since files may have been joined with cat
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


def _split_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield lines that end in \\n, \\r\\n or a single \\r, which no JSON holds but between its parts."""
    for line in file:
        if b"\r" in line.rstrip(b"\r\n"):
            yield from line.split(b"\r")
        else:
            yield line


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
    # Not its "line 1", or 2 if it is the end of the line: the row has a number of its own.
    why = str(error)
    if isinstance(error, json.JSONDecodeError):
        why = f"{error.msg.removesuffix(' at')} at character {min(error.pos, len(error.doc.rstrip())) + 1:,}"
    return "invalid JSON", f"invalid JSON ({why}); each line must be one JSON object"


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


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, columns: Columns, log: FaultLog) -> Iterator[tuple[int, Record]]:
    import pyarrow  # slow to import, and most folders have no Parquet file
    import pyarrow.parquet

    number = 0
    with path.open("rb") as raw:
        what = find_foreign(raw.read(200))
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


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(member, str) for member in value)


def _name_class(value: object, names: Sequence[str]) -> object:
    """Return the name of class number `value`; None for -1, which datasets writes for a missing class."""
    if isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else None if value == -1 else value
    return value
