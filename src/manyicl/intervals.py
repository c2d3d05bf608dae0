"""A mean with its 95 % interval, over training seeds, draws of shots and queries at once (docs/intervals.md).

Scores stand in tables: one row per draw, one column per query. A draw's shots move a whole row, a hard query moves a
whole column, in the tables of all seeds that were asked it, and a training run moves a whole table. An interval that
took the cells to be independent would be far too short. Legend: D draws, Q queries, S seeds, U distinct queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

# From this number of training seeds on, an interval speaks of other seeds; with fewer, of these very runs.
MIN_SEEDS = 5
_HIGH = 0.975
_TIE = 1e-9  # relative; far above what float64 sums lose, far below any real difference
_ROUNDING = 1e-20  # of a variance of scores between -1 and 1: far above what float64 loses, below any real one


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval [low, high], in the unit of the scores; low and high are NaN for a lone value."""

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Both ends; (None, None) where a lone value gives no interval."""
        return (None, None) if isnan(self.low) else (self.low, self.high)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Scores of one task with one training seed. scores: (draws, queries). queries: the id of each column.

    Raises:
        ValueError: not a table of numbers with an id per column, or a cell that is not finite (a missing cell is never
            a number).
    """

    scores: NDArray[np.float64]
    queries: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[1] != len(self.queries) or not self.scores.size:
            raise ValueError(f"scores of shape {self.scores.shape} with {len(self.queries)} query ids are no table")
        if not np.isfinite(self.scores).all():
            raise ValueError("a value is NaN or infinite; a missing cell is never a number")


Run = Mapping[str, Table]  # task -> its scores with one training seed


def mean_interval(runs: Sequence[Run]) -> Interval:
    """Return the mean over seeds of the mean over tasks, with Student's 95 % interval; a point if nothing varies.

    runs: one per training seed. With fewer than `MIN_SEEDS` the interval is for these very runs, from there on for
    other seeds of the same recipe; always for these tasks, with other draws and queries.

    Raises:
        ValueError: no runs, or one without a task.
    """
    spread = _measure_spread(runs)
    reach = float(stdtrit(spread.freedom, _HIGH)) * sqrt(spread.variance)
    return Interval(spread.mean, spread.mean - reach, spread.mean + reach)


def score_interval(runs: Sequence[Run]) -> Interval:
    """Return the mean of scores from 0 to 1 with its 95 % interval, which is never empty, as `mean_interval` else.

    Wilson's (1927) with an effective number of queries: so many independent right/wrong answers with this mean have the
    variance that was measured (Franco, Little, Louis and Slud 2019, Journal of Survey Statistics and Methodology
    7:334-364). Where no score varies within its table, the distinct queries are counted.
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
    """Return the mean of paired differences of scores, -1 to 1, with its 95 % interval, never empty.

    Student's, as `mean_interval`. Without draws to average over, right/wrong answers that seldom differ would seem far
    too sure, so two queries more are counted, one that speaks for either side (Bonett and Price 2012, Journal of
    Educational and Behavioral Statistics 37:479-488). Differences that are all c show no variance, but not certainty:
    as many as 1 - 0.025 ** (1 / n) of all queries (Clopper and Pearson 1934) may differ otherwise, by 1 at the most.
    """
    spread = _measure_spread(runs)
    if isnan(spread.variance):
        return Interval(spread.mean, nan, nan)
    mean, variance, number = spread.mean, spread.variance, spread.num_queries
    tables = [table.scores for run in runs for table in run.values()]
    if all(len(scores) == 1 and np.isin(scores, (-1, 0, 1)).all() for scores in tables):
        freedom = spread.freedom if variance > _ROUNDING else max(number - 1.0, 1.0)
        share = number / (number + 2)
        reach = float(stdtrit(freedom, _HIGH)) * sqrt(share**2 * variance + 2 / (number + 2) ** 2)
        low, high = share * mean - reach, share * mean + reach
    elif variance > _ROUNDING:
        reach = float(stdtrit(spread.freedom, _HIGH)) * sqrt(variance)
        low, high = mean - reach, mean + reach
    else:
        others = 1 - 0.025 ** (1 / number)
        low, high = mean - others * (1 + mean), mean + others * (1 - mean)
    return Interval(mean, max(-1.0, low), min(1.0, high))


def t_interval(values_N: NDArray[np.float64]) -> Interval:
    """Return the mean of independent values with Student's 95 % interval; low and high are NaN for a lone value.

    Raises:
        ValueError: not one row of values, none, or one that is not finite.
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
    """One estimate that a variance is a sum of, and its degrees of freedom; of queries, the task too."""

    variance: float
    freedom: float
    queries_of: str | None = None


@dataclass(frozen=True, slots=True)
class _Spread:
    """A mean, its variance (NaN where a lone value shows none), degrees of freedom, and how many distinct queries."""

    mean: float
    variance: float
    freedom: float
    num_queries: int


def _measure_spread(runs: Sequence[Run]) -> _Spread:
    """Return the mean over runs of the mean over tasks, and its variance.

    For these runs: the sum of each table's own variance over draws and queries, and of the covariances that tables of
    one task have through the queries they share. For other seeds: that of the runs' own means over S, and the
    covariance of two runs: S equally correlated means with the observed variance v, which their covariance c is no part
    of, have a mean of variance v / S + c. The larger of both, since other seeds cannot be surer than these runs.
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
    shared = [part for task, tables in by_task.items() for part in _share_queries(task, tables)]
    if _total(shared) <= 0:  # sharing a query can only make runs more alike
        shared = []
    here = _add_parts(_merge_queries(within, shared))
    if num_seeds >= MIN_SEEDS:
        factor = num_seeds / (num_seeds - 1)  # the sum over ordered pairs, from over S ** 2 to over S (S - 1)
        between = _Part(float(means_S.var(ddof=1)) / num_seeds, num_seeds - 1)
        there = _add_parts([between, *(_Part(factor * part.variance, part.freedom) for part in shared)])
        here = here if here.variance >= there.variance else there  # also where one is NaN
    return _Spread(mean, here.variance, here.freedom, num_queries)


def _sum_tables(tables: Iterable[tuple[str, float, Table]]) -> list[_Part]:
    """Return the parts of the variance of a weighted sum of tables' means, of independent draws and queries.

    With the mean squares of a two-way table, var = (MS_d + MS_q - MS_e) / (D Q): draws and queries each bring the noise
    of the cells along, so it is taken off once (Searle, Casella and McCulloch 1992, Variance Components, ch. 4). The
    estimate can come out near or below 0; its expectation is never below that of any of the three, summed over tables:
    the largest is the floor.
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
    # Sums that are equal but for rounding tie, or the rounding would choose the degrees of freedom.
    largest = [kind for kind in kinds.values() if _total(kind) >= floor * (1 - _TIE)]
    return max(largest, key=lambda kind: _add_parts(kind).freedom)


def _merge_queries(parts: Sequence[_Part], shared: Sequence[_Part]) -> list[_Part]:
    """Return all parts, those over the queries of a task that seeds share as one: each query is one chance event."""
    tasks = {part.queries_of for part in shared}
    merged = [part for part in parts if part.queries_of is None or part.queries_of not in tasks]
    for one in shared:
        same = [part for part in parts if part.queries_of == one.queries_of]
        merged.append(_Part(_total([*same, one]), one.freedom))
    return merged


def _total(parts: Iterable[_Part]) -> float:
    return sum(part.variance for part in parts)


def _split_variance(scores_DQ: NDArray[np.float64]) -> dict[str, _Part]:
    """Return the mean squares of draws, queries and cells over D Q; of a single row or column its own variance."""
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


def _share_queries(task: str, tables: Sequence[tuple[float, Table]]) -> list[_Part]:
    """Return the covariances, summed over all ordered pairs, of one task's weighted table means through shared queries.

    Of two tables with m of their n and n' queries in common: the products of the deviations of a query's mean in both,
    summed and divided by 1 - 1 / n - 1 / n' + m / (n n'), which is what deviations from the tables' own means leave.
    """
    columns: dict[str, int] = {}
    for _, table in tables:
        for query in table.queries:
            columns.setdefault(query, len(columns))
    if len(columns) == sum(len(table.queries) for _, table in tables):  # nothing is shared, as with a single table
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
    known_SS = left_SS > 0  # not of a lone query
    return [_Part(float((products_SS[known_SS] / left_SS[known_SS]).sum()), len(columns) - 1, task)]


def _add_parts(parts: Sequence[_Part]) -> _Part:
    """Return the sum, with the degrees of freedom of Satterthwaite 1946 (Biometrics Bulletin 2:110-114)."""
    total = _total(parts)
    if not total > 0:  # NaN too
        return _Part(total, 1.0)
    # Shares of the total, since squares of tiny variances would underflow.
    return _Part(total, 1 / sum((part.variance / total) ** 2 / part.freedom for part in parts))
