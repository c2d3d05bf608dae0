"""Numbers of shots: a count, or `fill`, as many as fit in each draw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Shots = int | Literal["fill"]
FILL: Literal["fill"] = "fill"


def sort_shots(shots: Iterable[Shots]) -> list[Shots]:
    """Return the numbers of shots once each, ascending; `fill`, which is never fewer than another, comes last."""
    return sorted(set(shots), key=shots_order)


def shots_order(shots: Shots) -> float:
    """Return the key that sorts a number of shots; that of `fill` is infinite."""
    return float("inf") if shots == FILL else shots


def cap_shots(shots: Shots, known: Iterable[Shots]) -> Shots:
    """Return the largest of the `known` numbers that is not above `shots`; the smallest of them if all are above."""
    ordered = sort_shots(known)
    return max((k for k in ordered if shots_order(k) <= shots_order(shots)), key=shots_order, default=ordered[0])


def tell_shot_count(shots: Shots) -> str:
    """Return a number of shots in words: '1 shot', '4 shots', 'as many shots as fit'."""
    return "as many shots as fit" if shots == FILL else f"{shots:,} shot{'s' * (shots != 1)}"


def tell_asked_with(shots: Shots) -> str:
    """Return how something was asked, in words: 'at 4 shots', 'with as many shots as fit'."""
    return f"{'with' if shots == FILL else 'at'} {tell_shot_count(shots)}"


def record_choice(choose: str, num_nearest: int | None) -> dict[str, Any]:
    """Return how shots are chosen as results keep it: empty if at random, as results of earlier versions are.

    >>> record_choice("random", 8), record_choice("balanced", 8), record_choice("nearest", 8)
    ({}, {'choose': 'balanced'}, {'choose': 'nearest', 'num_nearest': 8})
    """
    if choose == "random":
        return {}
    return {"choose": choose, "num_nearest": num_nearest} if choose == "nearest" else {"choose": choose}
