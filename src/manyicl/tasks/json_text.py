"""JSON whose numbers keep their digits: 1.50 stays 1.50."""

from __future__ import annotations

import decimal
import json
import math


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
