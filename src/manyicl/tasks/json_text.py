"""JSON in which numbers keep their digits: 1.50 stays 1.50."""

from __future__ import annotations

import decimal
import json
import math


class JsonNumber(str):
    """A JSON number, kept as it was written: 1.50 must not come back as 1.5."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)  # without quotes in messages


class RepeatedKeys(dict[str, object]):
    """A JSON object that names a key twice, of which JSON keeps the last; `repeated` are these keys."""

    repeated: tuple[str, ...] = ()


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
    """Return the value of a JSON text; `as_text` turns its numbers into the text that was written.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def as_text(value: object) -> str | None:
    """Return a text as it is, a finite number and a truth value as JSON writes them; None for anything else.

    A float that is a whole number is written without ".0": pandas turns whole numbers into floats as soon as one is
    missing. (JSON's own numbers are kept as they were written, so this concerns Parquet alone.)
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return f"{value:f}"  # 1.50 as it stands in a column of decimals
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(int(value) if value.is_integer() and abs(value) < 2**53 else value)
    return None


def is_missing(value: object) -> bool:
    """Return whether a cell holds nothing: null, or NaN, which is what pandas writes for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_unicode(text: str) -> bool:
    r"""Return whether `text` can be encoded; JSON can spell half of a surrogate pair ("\ud800"), which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
