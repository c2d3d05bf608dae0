"""What several training seeds say together: means, paired differences and their intervals (docs/intervals.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manyicl.errors import UserError
from manyicl.evaluation import Prediction, Shots, tell_asked_with
from manyicl.intervals import Interval, Run, Table, difference_interval, score_interval

Tables = Mapping[str, Mapping[Shots, Table]]  # task -> shots -> scores


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


def tabulate(predictions: Sequence[Prediction]) -> dict[str, dict[Shots, Table]]:
    """Return the scores of a result's predictions by task and asked shots, draws and queries each in order.

    Raises:
        UserError: the draws of a cell were not asked the same queries.
    """
    rows: dict[tuple[str, Shots], dict[int, dict[str, float]]] = {}
    for p in predictions:
        rows.setdefault((p.task, p.asked), {}).setdefault(p.draw, {})[p.query] = p.score
    tables: dict[str, dict[Shots, Table]] = {}
    for (task, shots), draws in rows.items():
        queries = sorted(next(iter(draws.values())))
        if any(sorted(scores) != queries for scores in draws.values()):
            raise UserError(
                f"task '{task}': its draws {tell_asked_with(shots)} were asked other queries; evaluate it again"
            )
        scores_DQ = np.array([[draws[d][q] for q in queries] for d in sorted(draws)], dtype=np.float64)
        tables.setdefault(task, {})[shots] = Table(scores_DQ, tuple(queries))
    return tables


def pool_means(seeds: Sequence[Run | None]) -> Pooled | None:
    """Return the mean over seeds of the mean over tasks; None where no seed has been asked.

    seeds: for each seed the tables of its tasks, or None where a cell is missing.
    """
    known = [run for run in seeds if run]
    return make_pooled(score_interval(known), seeds=seeds) if known else None


def make_pooled(interval: Interval, *, seeds: Sequence[Run | None]) -> Pooled:
    """Return an interval with the seeds' own means."""
    means = tuple(float(np.mean([table.scores.mean() for table in run.values()])) if run else None for run in seeds)
    low, high = interval.ends
    return Pooled(interval.mean, low, high, means, num_tasks=next((len(run) for run in seeds if run), 0))


def pool_differences(
    a: Sequence[Tables | None], b: Sequence[Tables | None], *, shots: Mapping[str, tuple[Shots, Shots]]
) -> Pooled | None:
    """Return a - b on the tasks, seed by seed and query by query; None where no seed has both.

    shots: task -> the number of shots of a and of b on it. Without shots all draws are one, which then stands against
    each of the other's.

    Raises:
        UserError: the two were asked other queries, or other numbers of draws.
    """
    seeds: list[Run | None] = []
    for one, other in zip(a, b, strict=True):
        if one is None or other is None:
            seeds.append(None)
            continue
        pairs = {task: (one.get(task, {}).get(k), other.get(task, {}).get(m)) for task, (k, m) in shots.items()}
        known = {t: _subtract(x, y) for t, (x, y) in pairs.items() if x is not None and y is not None}
        seeds.append(known or None)
    runs = [run for run in seeds if run]
    return make_pooled(difference_interval(runs), seeds=seeds) if runs else None


def _subtract(a: Table, b: Table) -> Table:
    unlike_draws = len(a.scores) != len(b.scores) and 1 not in (len(a.scores), len(b.scores))
    if a.queries != b.queries or unlike_draws:
        what = "draws" if unlike_draws else "queries"
        raise UserError(f"two arms were asked other {what}; remove the result of one, and go on with --resume")
    return Table(a.scores - b.scores, a.queries)  # a single row is broadcast
