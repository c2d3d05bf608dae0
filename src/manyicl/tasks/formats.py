"""What data files are made of: suffixes, words, encodings, lists, and JSON whose numbers keep their digits (1.50)."""

from __future__ import annotations

import ast
import codecs
import decimal
import gzip
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# More words for splits. "other": not for training, but which split is unclear.
PARTS = SPLIT_WORDS | dict.fromkeys(("eval", "evaluation", "holdout", "heldout", "held-out", "unseen"), "other")
# None: the record could not be read; its fault is in the log.
Record = Mapping[str, object] | None
HEAD_SIZE = 65_536  # bytes or characters from which a file's format is recognised
# First bytes of other formats, and what to do about each.
_FOREIGN = {
    b"PK\x03\x04": "is a zip file, as Excel's .xlsx is; name it .xlsx and use manyicl import, or save it as CSV UTF-8",
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
# A text in a list as JSON, Python or numpy writes it, and such a list: numpy puts no comma between texts.
_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_LIST = re.compile(rf"\[\s*(?:{_QUOTED}(?:\s*,\s*|\s+))*{_QUOTED}?\s*,?\s*\]", re.DOTALL)
# UTF-8 that was read as Windows' cp1252 or as Latin-1: the characters of its first byte, then those of the others.
_MOJIBAKE = re.compile(
    r"""(?x) \u00c3[\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]
    | \u00c2[\xa0-\xbf] | \u00e2(?:\u20ac|\x80). | \u00f0(?:\u0178|\x9f)..
    | (?:[\u00d0\u00d1][^\x00-\x7f\u0370-\u1fff]){3}"""
)
# What a spreadsheet writes into a cell instead of a value, in English and German.
_CELL_ERROR = re.compile(r"#(?:N/A|REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|NV|BEZUG!|WERT!)")
_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


# Names of columns of true and false that mark rows for training, or not for training.
_FLAGS = re.compile(
    r"(?:is|in)[-_ ]?(?:train|test|training|testing|valid|validation|val|dev|eval|heldout|holdout)", re.I
)
_TRUTHS = frozenset({"true", "false", "0", "1", "yes", "no", "0.0", "1.0"})


def data_suffix(path: Path) -> str:
    """Return the suffix that decides how a file is read, such as ".csv" or ".csv.gz"; "" if it is not a data file."""
    name = path.name.lower()
    bare = name.removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if bare.endswith(suffix) and bare != suffix), "")
    if bare == name or not suffix:
        return suffix
    return "" if suffix == ".parquet" else f"{suffix}.gz"


def open_file(path: Path) -> Any:
    """Return a file open for reading bytes, decompressed if its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def find_foreign(head: bytes) -> str:
    """Return what a file is if it is not text; "" if it may be text."""
    if _PAGE.match(drop_marks(head)):
        return "is a web page (HTML), not the data; download the file itself"
    return next((what for start, what in _FOREIGN.items() if head.startswith(start)), "")


def find_utf16(head: bytes) -> str:
    """Return the codec of a text in UTF-16, known by its byte-order mark or a NUL in every second byte; else ""."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = head[:16]  # a header or JSON begins with ASCII, even if the rest is not
    if len(start) >= 8 and not any(start[1::2]) and all(start[::2]):
        return "utf-16-le"
    if len(start) >= 8 and not any(start[::2]) and all(start[1::2]):
        return "utf-16-be"
    return ""


def drop_marks(content: bytes) -> bytes:
    """Return bytes without the byte-order marks of UTF-8 at their start; some programs write several."""
    while content.startswith(codecs.BOM_UTF8):
        content = content.removeprefix(codecs.BOM_UTF8)
    return content


class JsonNumber(str):
    """A JSON number as it is written: an answer 1.50 must not become 1.5."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)  # without quotes in messages


class RepeatedKeys(dict[str, object]):
    """A JSON object in which a key occurs twice; it keeps the last value, as JSON does."""

    repeated: tuple[str, ...] = ()
    """The keys that occur more than once."""


def _make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        found = RepeatedKeys(value)
        found.repeated = tuple(name for name in value if names.count(name) > 1)
        return found
    return value


_JSON = json.JSONDecoder(parse_int=JsonNumber, parse_float=JsonNumber, object_pairs_hook=_make_object)


def decode_json(text: str) -> object:
    """Return the value of a JSON text, with each number as a JsonNumber.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_list(text: str) -> list[object] | None:
    """Return the list in a table's cell, as JSON, Python (pandas) or numpy writes it; None if it is not a list."""
    text = text.strip()
    if not text.startswith("["):
        return None
    try:
        value = decode_json(text)
    except ValueError:
        if not _LIST.fullmatch(text):
            return None
        # One text at a time: Python would join numpy's 'a' 'b'.
        texts = (found[0].replace("\n", "\\n").replace("\r", "\\r") for found in re.finditer(_QUOTED, text, re.DOTALL))
        try:
            return [ast.literal_eval(quoted) for quoted in texts]
        except (SyntaxError, ValueError):  # an escape that is none, such as in 'C:\users', or a NUL
            return None
    return value if isinstance(value, list) else None


def describe_damage(texts: Iterable[str]) -> list[str]:
    """Return warnings with counts if characters of some texts were lost or misread before they came into the file."""
    lost, misread, errors = 0, [], Counter[str]()
    for text in texts:
        if text.startswith("#") and _CELL_ERROR.fullmatch(text.strip()):
            errors[text.strip()] += 1
        if text.isascii():
            continue
        lost += "\ufffd" in text
        if found := _MOJIBAKE.search(text):
            misread.append(text[max(0, found.start() - 15) : found.end() + 10])
    warnings = []
    if lost:
        rows = "1 text has" if lost == 1 else f"{lost:,} texts have"
        warnings.append(f"{rows} the mark of a lost character (U+FFFD); convert the source to UTF-8 again")
    if misread:
        rows = "1 text looks" if len(misread) == 1 else f"{len(misread):,} texts look"
        warnings.append(
            f"{rows} like UTF-8 that was read as another encoding, such as {misread[0]!r}; convert the source again"
        )
    if errors:
        told = ", ".join(f"{error!r} {count:,}" for error, count in errors.most_common(4))
        warnings.append(f"cells that hold the error of a spreadsheet: {told}; correct or remove these rows")
    return warnings


def as_text(value: object) -> str | None:
    """Return a text as it is, and a finite number, true or false as JSON writes them; None for anything else.

    A whole float is written without ".0", since pandas turns a column of whole numbers into floats if one is missing.
    This concerns only Parquet: numbers from JSON stay as they are written.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return f"{value:f}"  # a column of decimals keeps 1.50 as it is
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(int(value) if value.is_integer() and abs(value) < 2**53 else value)
    return None


def is_missing(value: object) -> bool:
    """Return whether a cell has no value: null, or NaN, which pandas writes for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_unicode(text: str) -> bool:
    r"""Return whether `text` can be encoded. JSON can contain half of a surrogate pair ("\ud800"), which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pack_vector(value: object) -> bytes:
    """Return a list of numbers, or one in a cell's text, as the bytes of float32 numbers.

    Raises:
        ValueError: with what is wrong with it.
    """
    if isinstance(value, str) and not isinstance(value, JsonNumber):
        with suppress(ValueError):
            value = decode_json(value)
    numbers = value if isinstance(value, list | tuple) else []
    if not numbers or not all(
        isinstance(one, int | float | JsonNumber) and not isinstance(one, bool) for one in numbers
    ):
        raise ValueError("is not a list of numbers")
    packed = array("f", map(float, numbers))
    if not all(map(math.isfinite, packed)) or not any(packed):
        raise ValueError("has no direction: numbers that are not finite, or only zeros")
    return packed.tobytes()


def split_cell(cell: str) -> object:
    """Return the options in a CSV cell, a list or values between bars; the cell itself if it is a broken list."""
    cell = cell.strip()
    if not cell:
        return None
    if cell.startswith("["):
        found = read_list(cell)
        return cell if found is None else found
    return [option.strip() for option in cell.split("|")]


def read_split_word(name: str, value: object) -> str:
    """Return the split that a cell of an unread column seems to name; "" if it does not name one."""
    text = as_text(value)
    word = text.strip().lower() if text is not None and len(text) < 20 else ""
    if word in _TRUTHS:
        return word if _FLAGS.fullmatch(name.strip()) else ""
    return PARTS.get(word, "")
