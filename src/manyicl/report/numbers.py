"""Numbers as a reader sees them: units, signs, intervals, and a dash where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from manyicl.console import DASH, is_known
from manyicl.evaluation import Shots, sort_shots

MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def tell_percent(value: float | None) -> str:
    """Return a score of 0 to 1 in %, to a tenth, without the sign."""
    return _minus(f"{100 * value:z.1f}") if is_known(value) else DASH


def tell_points(value: float | None) -> str:
    """Return a difference of scores in points, signed."""
    return _signed(f"{100 * value:+.1f}") if is_known(value) else DASH


def tell_bits(value: float | None, *, signed: bool = False) -> str:
    """Return bits per byte, to a thousandth."""
    if not is_known(value):
        return DASH
    return _signed(f"{value:+.3f}") if signed else _minus(f"{value:z.3f}")


def tell_change(value: float | None, *, unit: str) -> str:
    """Return a signed difference in "points" or "bits" (per byte)."""
    return tell_points(value) if unit == "points" else tell_bits(value, signed=True)


def tell_count(value: float | None) -> str:
    """Return a count, exactly, with commas."""
    if not is_known(value):
        return DASH
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


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


def tell_rate(value: float | None) -> str:
    """Return a learning rate as in a recipe."""
    return f"{value:g}" if is_known(value) else DASH


def tell_nats(value: float | None) -> str:
    """Return nats, to a hundredth."""
    return _minus(f"{value:z.2f}") if is_known(value) else DASH


def tell_interval(low: float | None, high: float | None, *, unit: str = "percent") -> str:
    """Return [low, high] in percent, points or bits; '' if there is no interval."""
    if not (is_known(low) and is_known(high)):
        return ""
    ends = (tell_percent(end) if unit == "percent" else tell_change(end, unit=unit) for end in (low, high))
    return f"[{', '.join(ends)}]"


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


def _signed(text: str) -> str:
    """Return a signed number with a real minus sign; one that rounds to zero has no sign."""
    return text[1:] if not text.strip("+-0.,") else text.replace("-", MINUS)
