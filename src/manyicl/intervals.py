"""A mean with its 95 % interval, over training seeds, draws of shots and queries at once (docs/intervals.md).

Scores are tables: one row per draw, one column per query. A draw's shots move a whole row. A hard query moves a whole
column, in the tables of all seeds that have it. A training run moves a whole table. So an interval that treated the
cells as independent would be far too short. Legend: D draws, Q queries, S seeds, U distinct queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

# With this many training seeds or more, an interval covers other seeds too; with fewer, only these very runs.
MIN_SEEDS = 5
_HIGH = 0.975
_TIE = 1e-9  # relative; far above what float64 sums lose, far below any real difference
_ROUNDING = 1e-20  # variance of scores between -1 and 1: far above what float64 loses, far below any real variance


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval, in the unit of the scores."""

    mean: float
    low: float
    """Lower end; NaN if a single value gives no interval."""
    high: float
    """Upper end; NaN if `low` is."""

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Both ends; (None, None) if a single value gives no interval."""
        return (None, None) if isnan(self.low) else (self.low, self.high)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Scores of one task with one training seed.

    Raises:
        ValueError: `scores` is not a table with one query id per column, is empty, or has a cell that is not finite
            (a missing score must not become a number).
    """

    scores: NDArray[np.float64]
    """(D, Q): one row per draw, one column per query."""
    queries: tuple[str, ...]
    """The query id of each column."""

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[1] != len(self.queries) or not self.scores.size:
            raise ValueError(f"scores of shape {self.scores.shape} with {len(self.queries)} query ids are not a table")
        if not np.isfinite(self.scores).all():
            raise ValueError("a value is NaN or infinite; a missing cell is never a number")


Run = Mapping[str, Table]  # task -> its scores with one training seed


def mean_interval(runs: Sequence[Run]) -> Interval:
    """Return the mean over seeds of the mean over tasks, with Student's 95 % interval; a point if nothing varies.

    runs: one per training seed. With fewer than `MIN_SEEDS` the interval holds for these very runs, else for other
    seeds of the same recipe; in both cases for these tasks, with other draws and queries.

    Raises:
        ValueError: there are no runs, or one has no task.
    """
    spread = _measure_spread(runs)
    reach = float(stdtrit(spread.freedom, _HIGH)) * sqrt(spread.variance)
    return Interval(spread.mean, spread.mean - reach, spread.mean + reach)


def score_interval(runs: Sequence[Run]) -> Interval:
    """Return the mean of scores from 0 to 1 with its 95 % interval, which is never a point. Else as `mean_interval`.

    Wilson's interval (1927) with an effective number of queries: as many independent right/wrong answers of this mean
    as have the measured variance (Franco, Little, Louis and Slud 2019, Journal of Survey Statistics and Methodology
    7:334-364). If no score varies, the number of distinct queries is used.
    """
    spread = _measure_spread(runs)
    if isnan(spread.variance):
        return Interval(spread.mean, nan, nan)
    mean, freedom, binomial = spread.mean, spread.freedom, spread.mean * (1 - spread.mean)
    if spread.variance > _ROUNDING and binomial > 0:
        number = binomial / spread.variance
    else:
        number, freedom = float(spread.num_queries), max(spread.num_queries - 1.0, 1.0)
    quantile = float(stdtrit(freedom, _HIGH))
    pull = quantile**2 / number
    middle = (mean + pull / 2) / (1 + pull)
    reach = quantile * sqrt(binomial / number + pull / (4 * number)) / (1 + pull)
    return Interval(mean, max(0.0, middle - reach), min(1.0, middle + reach))


def difference_interval(runs: Sequence[Run]) -> Interval:
    """Return the mean of paired differences of scores, -1 to 1, with its 95 % interval, which is never a point.

    In general Student's interval, as `mean_interval`. In two cases it would look far too certain. Right/wrong answers
    of a single draw may seldom differ: two queries are added, one in favour of each side (Bonett and Price 2012,
    Journal of Educational and Behavioral Statistics 37:479-488). Differences may be all equal: up to
    1 - 0.025 ** (1 / n) of all queries (Clopper and Pearson 1934) could still differ in another way, by 1 at most.
    """
    spread = _measure_spread(runs)
    if isnan(spread.variance):
        return Interval(spread.mean, nan, nan)
    mean, variance, number = spread.mean, spread.variance, spread.num_queries
    tables = [table.scores for run in runs for table in run.values()]
    if all(len(scores) == 1 and np.isin(scores, (-1, 0, 1)).all() for scores in tables):
        freedom = spread.freedom if variance > _ROUNDING else max(number - 1.0, 1.0)
        fraction = number / (number + 2)  # of the queries that were asked among those that are counted
        reach = float(stdtrit(freedom, _HIGH)) * sqrt(fraction**2 * variance + 2 / (number + 2) ** 2)
        low, high = fraction * mean - reach, fraction * mean + reach
    elif variance > _ROUNDING:
        reach = float(stdtrit(spread.freedom, _HIGH)) * sqrt(variance)
        low, high = mean - reach, mean + reach
    else:
        others = 1 - 0.025 ** (1 / number)
        low, high = mean - others * (1 + mean), mean + others * (1 - mean)
    return Interval(mean, max(-1.0, low), min(1.0, high))


def t_interval(values_N: NDArray[np.float64]) -> Interval:
    """Return the mean of independent values with Student's 95 % interval; low and high are NaN for a single value.

    Raises:
        ValueError: the values are not one row, there are none, or one is not finite.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    if values_N.ndim != 1:
        raise ValueError(f"values have shape {values_N.shape}; a t interval needs one row of them")
    if values_N.size == 0:
        raise ValueError("no values; a cell where nothing was scored has no mean")
    if not np.isfinite(values_N).all():
        raise ValueError("a value is NaN or infinite; a missing cell is never a number")
    if len(values_N) == 1:
        return Interval(float(values_N[0]), nan, nan)
    if values_N.min() == values_N.max():
        return Interval(float(values_N[0]), float(values_N[0]), float(values_N[0]))
    mean = float(values_N.mean())
    margin = float(stdtrit(len(values_N) - 1, _HIGH)) * sqrt(float(values_N.var(ddof=1)) / len(values_N))
    return Interval(mean, mean - margin, mean + margin)


@dataclass(frozen=True, slots=True)
class _Part:
    """One term of an estimated variance."""

    variance: float
    freedom: float
    """Degrees of freedom of the estimate."""
    queries_of: str | None = None
    """If the term comes from the choice of queries: the task that they are of."""


@dataclass(frozen=True, slots=True)
class _Spread:
    """A mean and how sure it is."""

    mean: float
    variance: float
    """Variance of the mean; NaN if there is only a single value."""
    freedom: float
    """Degrees of freedom of `variance`."""
    num_queries: int
    """Distinct queries of all tasks."""


def _measure_spread(runs: Sequence[Run]) -> _Spread:
    """Return the mean over runs of the mean over tasks, and its variance.

    For these very runs: the sum of each table's own variance over draws and queries, and of the covariances that tables
    of one task have through queries that they have in common. For other seeds: S equally correlated means with the
    observed variance v (which does not contain their covariance c) have a mean of variance v / S + c. The larger of the
    two is returned, since other seeds cannot be more certain than these runs.
    """
    if not runs or not all(runs):
        raise ValueError("no scores; a cell where nothing was scored has no mean")
    num_seeds = len(runs)
    means_S = np.array([np.mean([table.scores.mean() for table in run.values()]) for run in runs])
    mean = float(means_S.mean())
    by_task: dict[str, list[tuple[float, Table]]] = {}
    for run in runs:
        for task, table in run.items():
            by_task.setdefault(task, []).append((1 / (num_seeds * len(run)), table))
    num_queries = sum(len({q for _, table in tables for q in table.queries}) for tables in by_task.values())
    within = _sum_tables((task, *weighted) for task, tables in by_task.items() for weighted in tables)
    shared = [part for task, tables in by_task.items() for part in _find_covariances(task, tables)]
    if _total(shared) <= 0:  # a noisy estimate: queries in common can only make runs more alike
        shared = []
    here = _add_parts(_merge_queries(within, shared))
    if num_seeds >= MIN_SEEDS:
        factor = num_seeds / (num_seeds - 1)  # rescales sums over ordered pairs from 1 / S ** 2 to 1 / (S (S - 1))
        between = _Part(float(means_S.var(ddof=1)) / num_seeds, num_seeds - 1)
        there = _add_parts([between, *(_Part(factor * part.variance, part.freedom) for part in shared)])
        here = here if here.variance >= there.variance else there  # if one is NaN, the other seeds' estimate
    return _Spread(mean, here.variance, here.freedom, num_queries)


def _sum_tables(tables: Iterable[tuple[str, float, Table]]) -> list[_Part]:
    """Return the terms of the variance of a weighted sum of tables' means; draws and queries are independent.

    With the mean squares of a two-way table, var = (MS_d + MS_q - MS_e) / (D Q): the terms of draws and of queries each
    contain the noise of the cells, so it is subtracted once (Searle, Casella and McCulloch 1992, Variance Components,
    ch. 4). The estimate can come out near 0 or below. Its expectation is never below that of any of the three terms
    summed over tables, so the largest of these is the floor.
    """
    parts: list[_Part] = []
    kinds: dict[str, list[_Part]] = {"draws": [], "queries": [], "cells": []}
    for task, weight, table in tables:
        for kind, part in _split_variance(table.scores).items():
            queries_of = task if kind == "queries" else None
            kinds[kind].append(_Part(weight**2 * part.variance, part.freedom, queries_of))
            sign = -1 if kind == "cells" else 1
            parts.append(_Part(sign * weight**2 * part.variance, part.freedom, queries_of))
    floor = max(map(_total, kinds.values()))
    if _total(parts) > floor * (1 + _TIE) or isnan(_total(parts)):
        return parts
    # Sums that differ only by rounding count as equal; else rounding would choose the degrees of freedom.
    largest = [kind for kind in kinds.values() if _total(kind) >= floor * (1 - _TIE)]
    return max(largest, key=lambda kind: _add_parts(kind).freedom)


def _merge_queries(parts: Sequence[_Part], shared: Sequence[_Part]) -> list[_Part]:
    """Return all terms, with those of a task's queries merged if seeds have them in common: one choice, one term."""
    tasks = {part.queries_of for part in shared}
    merged = [part for part in parts if part.queries_of is None or part.queries_of not in tasks]
    for one in shared:
        same = [part for part in parts if part.queries_of == one.queries_of]
        merged.append(_Part(_total([*same, one]), one.freedom))
    return merged


def _total(parts: Iterable[_Part]) -> float:
    return sum(part.variance for part in parts)


def _split_variance(scores_DQ: NDArray[np.float64]) -> dict[str, _Part]:
    """Return the mean squares of draws, queries and cells over D Q; for a single row or column, its own variance."""
    num_draws, num_queries = scores_DQ.shape
    if scores_DQ.size == 1:
        return {"queries": _Part(nan, nan)}
    draw_means_D, query_means_Q = scores_DQ.mean(axis=1), scores_DQ.mean(axis=0)
    if num_draws == 1:
        return {"queries": _Part(float(query_means_Q.var(ddof=1)) / num_queries, num_queries - 1)}
    if num_queries == 1:
        return {"draws": _Part(float(draw_means_D.var(ddof=1)) / num_draws, num_draws - 1)}
    residual_DQ = scores_DQ - draw_means_D[:, None] - query_means_Q + scores_DQ.mean()
    freedom = (num_draws - 1) * (num_queries - 1)
    return {
        "draws": _Part(float(draw_means_D.var(ddof=1)) / num_draws, num_draws - 1),
        "queries": _Part(float(query_means_Q.var(ddof=1)) / num_queries, num_queries - 1),
        "cells": _Part(float((residual_DQ**2).sum()) / (freedom * scores_DQ.size), freedom),
    }


def _find_covariances(task: str, tables: Sequence[tuple[float, Table]]) -> list[_Part]:
    """Return the covariance of one task's weighted table means through common queries, summed over all ordered pairs.

    For two tables with m of their n and n' queries in common: a query's mean deviates from the mean of each table. The
    products of the two deviations are summed over common queries and divided by 1 - 1 / n - 1 / n' + m / (n n'), since
    deviations from the tables' own means instead of the true ones lose the rest.
    """
    columns: dict[str, int] = {}
    for _, table in tables:
        for query in table.queries:
            columns.setdefault(query, len(columns))
    # No query is in two tables, or there is only one: then a query's mean is its table's, and nothing deviates.
    if len(columns) in (1, sum(len(table.queries) for _, table in tables)):
        return []
    deviations_SU = np.zeros((len(tables), len(columns)))
    asked_SU = np.zeros_like(deviations_SU)
    for place, (weight, table) in enumerate(tables):
        own = [columns[query] for query in table.queries]
        query_means_Q = table.scores.mean(axis=0)
        deviations_SU[place, own] = (query_means_Q - query_means_Q.mean()) * weight / len(own)
        asked_SU[place, own] = 1
    inverse_S = 1 / asked_SU.sum(axis=1)
    left_SS = 1 - inverse_S[:, None] - inverse_S + asked_SU @ asked_SU.T * np.outer(inverse_S, inverse_S)
    products_SS = deviations_SU @ deviations_SU.T
    np.fill_diagonal(products_SS, 0.0)
    known_SS = left_SS > 0  # 0 for tables of a single query
    return [_Part(float((products_SS[known_SS] / left_SS[known_SS]).sum()), len(columns) - 1, task)]


def _add_parts(parts: Sequence[_Part]) -> _Part:
    """Return the sum, with the degrees of freedom of Satterthwaite 1946 (Biometrics Bulletin 2:110-114)."""
    total = _total(parts)
    if not total > 0:  # NaN too
        return _Part(total, 1.0)
    # Fractions of the total, since squares of tiny variances would underflow.
    return _Part(total, 1 / sum((part.variance / total) ** 2 / part.freedom for part in parts))
