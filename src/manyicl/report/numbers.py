"""Numbers as a reader sees them: units, signs, intervals, and a dash where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from manyicl.console import DASH, MINUS, deciding_digits, is_known, tell_signed, tell_signed_interval
from manyicl.evaluation import Shots, sort_shots

# Unit of a difference -> what it is multiplied by, and its decimals.
_UNITS = {"points": (100, 1), "bits": (1, 3)}
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def tell_percent(value: float | None) -> str:
    """Return a score of 0 to 1 in %, to a tenth, without the sign."""
    return _minus(f"{100 * value:z.1f}") if is_known(value) else DASH


def tell_points(value: float | None) -> str:
    """Return a difference of scores in points, signed."""
    return tell_change(value, unit="points")


def tell_bits(value: float | None, *, signed: bool = False) -> str:
    """Return bits per byte, to a thousandth."""
    if signed:
        return tell_change(value, unit="bits")
    return _minus(f"{value:z.3f}") if is_known(value) else DASH


def tell_change(value: float | None, *, unit: str, low: float | None = None, high: float | None = None) -> str:
    """Return a signed difference in "points" or "bits" (per byte).

    low, high: its interval, if that stands beside it; then it has the decimals of it.
    """
    if not is_known(value):
        return DASH
    factor, digits = _UNITS[unit]
    if is_known(low) and is_known(high):
        digits = deciding_digits(factor * low, factor * high, digits=digits)
    return tell_signed(factor * value, digits=digits)


def tell_count(value: float | None) -> str:
    """Return a count, exactly, with commas; a mean of counts to a tenth, or from a thousand on to a whole number."""
    if not is_known(value):
        return DASH
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:,.1f}"


def tell_times(value: float | None) -> str:
    """Return an average count or a ratio, to a hundredth."""
    return f"{value:,.2f}" if is_known(value) else DASH


def tell_plain_path(*, processed_tokens: int, shared_tokens: int, fault: str) -> str:
    """Return how much slower an evaluation was because its model cannot share encoded shots.

    processed_tokens: tokens that were processed.
    shared_tokens: tokens that sharing would have processed.
    fault: why the model cannot share; continues "the model". '' if that is not known.

    >>> print(tell_plain_path(processed_tokens=12000, shared_tokens=600, fault=""))
    every prompt was processed as a whole: 12,000 tokens, 20.0 times the 600 of shared shots, about as many times slower
    """
    why = f" because the model {fault}" if fault else ""
    return (
        f"every prompt was processed as a whole{why}: {processed_tokens:,} tokens,"
        f" {processed_tokens / max(1, shared_tokens):,.1f} times the {shared_tokens:,} of shared shots,"
        " about as many times slower"
    )


def tell_power(value: float | None) -> str:
    """Return a large number to three digits: 3.21 × 10¹⁵."""
    if not is_known(value):
        return DASH
    if abs(value) < 1e6:
        return tell_count(value)
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def tell_bytes(value: float | None) -> str:
    """Return a size in GB or MB (powers of ten)."""
    if not is_known(value):
        return DASH
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def tell_nats(value: float | None) -> str:
    """Return nats, to a hundredth."""
    return _minus(f"{value:z.2f}") if is_known(value) else DASH


def tell_interval(low: float | None, high: float | None, *, unit: str = "percent") -> str:
    """Return [low, high] in percent, points or bits; '' if there is no interval."""
    if not (is_known(low) and is_known(high)):
        return ""
    if unit == "percent":
        return f"[{tell_percent(low)}, {tell_percent(high)}]"
    factor, digits = _UNITS[unit]
    return tell_signed_interval(factor * low, factor * high, digits=digits)


def tell_shots(shots: Shots | None) -> str:
    """Return a number of shots for a table; None means that each task has its own."""
    return "by task" if shots is None else str(shots)


def tell_shots_range(shots: Iterable[Shots]) -> str:
    """Return numbers of shots as one number, or as the fewest and the most: "4", "1 to 16", "16 to fill"."""
    ordered = sort_shots(shots)
    return f"{ordered[0]} to {ordered[-1]}" if len(ordered) > 1 else "".join(map(str, ordered))


def join_words(words: Sequence[str], *, last: str = "and") -> str:
    """Return words as a sentence lists them: "a", "a and b", "a, b and c"."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def count_noun(count: int, noun: str) -> str:
    """Return "1 task", "2 tasks", "2 copies"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def _minus(text: str) -> str:
    """Return a number with a real minus sign."""
    return text.replace("-", MINUS)
