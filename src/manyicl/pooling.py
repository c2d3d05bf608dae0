"""What several training seeds say together: means, paired differences and their intervals.

A table scores_DQ holds one arm's scores of one task at one number of shots: a row a draw, a column a query. With five
seeds or more the interval is Student's over the seeds' own means, for other seeds of the same recipe on these tasks;
with fewer it is over draws and queries, for these very runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manyicl.cells import Prediction
from manyicl.errors import UserError
from manyicl.intervals import Interval, mean_of_tables, t_interval

# From here on seeds tell of other seeds, and an arm may be called best.
MIN_SEEDS = 5

Table = NDArray[np.float64]  # (draws, queries)
Tables = Mapping[str, Mapping[int, Table]]  # task -> shots -> scores


@dataclass(frozen=True, slots=True)
class Pooled:
    """A mean over seeds and tasks.

    seeds: each seed's own mean, None where it is missing. num_tasks: how many tasks are in it, each counting the same.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[float | None, ...]
    num_tasks: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval has one sign."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def tabulate(predictions: Sequence[Prediction]) -> dict[str, dict[int, Table]]:
    """Return the scores of a result's predictions; draws and queries keep their order.

    Raises:
        UserError: the draws of a cell were not asked the same queries.
    """
    rows: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for p in predictions:
        rows.setdefault((p.task, p.shots), {}).setdefault(p.draw, {})[p.query] = p.score
    tables: dict[str, dict[int, Table]] = {}
    for (task, shots), draws in rows.items():
        queries = sorted(next(iter(draws.values())))
        if any(sorted(scores) != queries for scores in draws.values()):
            raise UserError(f"task '{task}': its draws at {shots} shots were asked other queries; evaluate it again")
        tables.setdefault(task, {})[shots] = np.array([[draws[d][q] for q in queries] for d in sorted(draws)])
    return tables


def pool_means(seeds: Sequence[Sequence[Table] | None]) -> Pooled | None:
    """Return the mean over seeds of the mean over tasks; None where no seed has been asked.

    seeds: for each seed the tables of its tasks, or None where a cell is missing.
    """
    known = [tables for tables in seeds if tables]
    if not known:
        return None
    means = tuple(float(np.mean([table.mean() for table in tables])) if tables else None for tables in seeds)
    if len(known) >= MIN_SEEDS:
        interval = t_interval(np.array([mean for mean in means if mean is not None]))
    else:
        interval = mean_of_tables([table for tables in known for table in tables])
    return make_pooled(interval, seeds=means, num_tasks=len(known[0]))


def make_pooled(interval: Interval, *, seeds: Sequence[float | None], num_tasks: int) -> Pooled:
    """Return an interval with the seeds' own values; ends that are NaN become None."""
    low, high = (None if math.isnan(end) else end for end in (interval.low, interval.high))
    return Pooled(interval.mean, low, high, tuple(seeds), num_tasks)


def pool_differences(
    a: Sequence[Tables | None], b: Sequence[Tables | None], *, tasks: Sequence[str], shots: tuple[int, int]
) -> Pooled | None:
    """Return a - b on the tasks, seed by seed and query by query; None where no seed has both.

    shots: the number of shots of a and of b. Without shots all draws are one, which then stands against each of the
    other's.
    """
    seeds: list[list[Table] | None] = []
    for one, other in zip(a, b, strict=True):
        if one is None or other is None:
            seeds.append(None)
            continue
        pairs = [(one.get(task, {}).get(shots[0]), other.get(task, {}).get(shots[1])) for task in tasks]
        seeds.append([_subtract(x, y) for x, y in pairs if x is not None and y is not None] or None)
    return pool_means(seeds)


def _subtract(a_DQ: Table, b_DQ: Table) -> Table:
    unlike_draws = a_DQ.shape[0] != b_DQ.shape[0] and 1 not in (a_DQ.shape[0], b_DQ.shape[0])
    if a_DQ.shape[1] != b_DQ.shape[1] or unlike_draws:
        what = "draws" if unlike_draws else "queries"
        raise UserError(f"two arms were asked other {what}; remove the result of one, and go on with --resume")
    difference: Table = a_DQ - b_DQ  # a single row is broadcast
    return difference
