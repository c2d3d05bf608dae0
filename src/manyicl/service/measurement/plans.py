"""Which examples of a task a measurement answers, after which others.

If there is time to answer all examples, they are dealt into a few folds, labels spread evenly. The examples of one fold
are answered after growing numbers of shots from all others, in a random order: after none, 1, 2, 4 and so on up to as
many as fit. So every answer is given without its own example among the shots, each example can be answered, and none is
lost to a test set. All numbers of shots of a fold extend one prefix.

If there is not, and most examples are not among the shots that requests get, some of those are answered after these
very shots. Their prefix is shared with the requests, so it is encoded once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from manyicl.service.selection import Order, TaskIds, shuffle_by_label

# Parts of a measurement's tokens: encoding shots, and answering after the most shots; the rest is for all other points.
_PREFIX_SHARE, _LAST_SHARE = 0.35, 0.6
_MOST_FOLDS = 4
# Examples that are answered at each point, if that is not too dear; below it there are fewer points.
_ENOUGH_ROWS = 48
# Examples of a fold that are answered at each point at least.
FEWEST_ROWS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What a measurement answers, after which shots."""

    folds: tuple[Order, ...]
    """The examples of each fold, by index, in a random order."""
    orders: tuple[Order, ...]
    """The shots of each fold, from the other folds."""
    points: tuple[int, ...]
    """Numbers of shots, ascending."""
    num_rows: int
    """Examples of a fold that are answered at each point but the last."""
    num_last: int
    """The same at the last."""
    as_served: bool = False
    """Whether the shots are those of requests, and their prefix is shared with them."""


def make_plan(task: TaskIds, *, most_tokens: int, query_tokens: float, served: Sequence[int] | Order = ()) -> Plan:
    """Return the plan of a measurement that takes about `most_tokens`.

    query_tokens: of one answer, all its options included.
    served: the shots that requests get, by index.
    """
    lengths = task.tokens.lengths
    free = task.usual_room - len(task.tokenized.head_ids)
    usable = shuffle_by_label(task, np.flatnonzero(lengths <= max(free, 0)).astype(np.int64), seed=0)
    whole = int(lengths[usable].sum())
    budget = _PREFIX_SHARE * most_tokens
    num_folds = next((n for n in range(_MOST_FOLDS, 2, -1) if n * min(free, whole * (n - 1) / n) <= budget), 2)
    free = min(free, max(int(budget / num_folds), int(lengths[usable].max(initial=0))))
    folds = tuple(usable[fold::num_folds] for fold in range(num_folds))
    orders = []
    for fold in range(num_folds):
        others = np.concatenate([folds[other] for other in range(num_folds) if other != fold])
        order = shuffle_by_label(task, others, seed=fold + 1)
        orders.append(order[: int(np.searchsorted(np.cumsum(lengths[order]), free, side="right"))])
    plan = _fill_plan(task, folds, orders, most_tokens=most_tokens, query_tokens=query_tokens)
    shown = np.asarray(served, dtype=np.int64)
    shown = shown[: int(np.searchsorted(np.cumsum(lengths[shown]), budget, side="right"))]
    others = usable[~np.isin(usable, shown)]
    if num_folds * plan.num_last >= len(usable) or not len(shown) or len(others) < len(usable) / 2:
        return plan
    plan = _fill_plan(task, (others,), [shown], most_tokens=most_tokens, query_tokens=query_tokens)
    return replace(plan, as_served=True)


def _fill_plan(
    task: TaskIds, folds: tuple[Order, ...], orders: Sequence[Order], *, most_tokens: int, query_tokens: float
) -> Plan:
    """Return a plan that spends on answers what the shots of `orders` leave of `most_tokens`."""
    most, size, num_folds = min(map(len, orders)), max(map(len, folds)), len(folds)
    shot_tokens = sum(int(task.tokens.lengths[order[:most]].sum()) for order in orders)
    left = max(0.0, most_tokens - shot_tokens)
    for step in (2, 4):
        points = _list_points(most, step=step)
        num_last = max(FEWEST_ROWS, min(size, int(_LAST_SHARE * left / query_tokens / num_folds)))
        left_rows = (left / query_tokens - num_last * num_folds) / num_folds / max(1, len(points) - 1)
        num_rows = min(max(FEWEST_ROWS, int(left_rows)), num_last)
        if num_rows * num_folds >= _ENOUGH_ROWS:
            break
    return Plan(folds, tuple(orders), points, num_rows, num_last)


def _list_points(most: int, *, step: int) -> tuple[int, ...]:
    """Return 0, 1, and powers of `step` up to `most`, which is the last."""
    points, shots = [0], 1
    while shots * 1.4 < most:
        points.append(shots)
        shots *= step
    return (*points, most) if most else (0,)
