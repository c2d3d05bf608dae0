"""A mean with its 95 % interval, over draws of shots and queries at once.

Scores stand in a table `scores_DQ`: one row a draw, one column a query, a score or a loss in each cell. A draw's shots
move a whole row, a hard query moves a whole column, so cells are not independent and an interval that takes them to be
is far too short. Legend: D draws, Q queries, N values, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from manyicl.errors import UserError
from manyicl.seeds import make_stream

NUM_RESAMPLES = 2_000
MIN_RESAMPLED_DRAWS = 10
_LOW, _HIGH = 0.025, 0.975
_ROUNDING = 1e-9  # relative; far above what float64 sums lose, far below any real difference
_MAX_BLOCK = 1 << 21  # resampled choices held in one array (16 MiB)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval [low, high], in the unit of the scores; low and high are NaN for a lone value."""

    mean: float
    low: float
    high: float


def mean_interval(scores_DQ: NDArray[np.float64], *, seed: int = 0) -> Interval:
    """Return the mean of all cells with a 95 % interval for other draws and other queries.

    One draw: a t interval over queries, which says nothing about other draws. One query: the same over draws. Else the
    two-way variance of `_two_way_variance` with its t quantile; from 10 draws on, draws and queries are resampled
    (2,000 times, from `seed`) for the shape of the interval, which then leans to the side where scores are spread out.
    The order of draws and of queries changes nothing but rounding. A single cell has a mean and no interval (NaN).

    Coverage measured on known truths (3,000 tables each; tests/test_intervals.py holds 600 of them), 50 and 200
    queries, 5 to 20 draws: 94 to 98 %, for Gaussian scores and for right/wrong answers with moderate effects; the upper
    end where cells differ by noise alone. Outside 92 to 98 %:

    - Two draws: 87 to 98 %, often below 92 % where draws matter. Two cannot tell how much draws differ: take 5.
    - Right/wrong answers near 1 whose log-odds draws shift wildly (standard deviation 2): 79 to 83 % with 2 draws, 85 %
      with 5, 90 % with 10, 93 % with 20. Few draws seldom show the rare bad one.

    Raises:
        ValueError: not a table, no cells, or a cell that is not finite (a missing cell is never a number).
    """
    scores_DQ = np.asarray(scores_DQ, dtype=np.float64)
    if scores_DQ.ndim != 2:
        raise ValueError(f"scores have shape {scores_DQ.shape}; an interval needs a table of draws x queries")
    num_draws, num_queries = scores_DQ.shape
    if num_draws == 1 or num_queries == 1:
        return t_interval(scores_DQ.ravel())
    _require_finite(scores_DQ)
    if scores_DQ.min() == scores_DQ.max():  # rounding in the mean must not make a width
        return _point(float(scores_DQ[0, 0]))
    mean = float(scores_DQ.mean())
    variance, freedom = _two_way_variance(scores_DQ)
    margin = float(stdtrit(freedom, _HIGH)) * sqrt(variance)
    if num_draws < MIN_RESAMPLED_DRAWS:
        return Interval(mean, mean - margin, mean + margin)
    below, above = _resampled_shape(scores_DQ, seed=seed)
    return Interval(mean, mean - below * margin, mean + above * margin)


def paired_interval(a_DQ: NDArray[np.float64], b_DQ: NDArray[np.float64], *, seed: int = 0) -> Interval:
    """Return the mean of a - b with its 95 % interval, both asked the same queries behind the same draws.

    What draws and queries do to both alike cancels, so this is mostly far shorter than either's own interval.

    Raises:
        UserError: the tables differ in shape.
        ValueError: as `mean_interval`.
    """
    a_DQ, b_DQ = np.asarray(a_DQ, dtype=np.float64), np.asarray(b_DQ, dtype=np.float64)
    if a_DQ.shape != b_DQ.shape:
        raise UserError(
            f"scores of {a_DQ.shape} and {b_DQ.shape} (draws, queries) cannot be paired; "
            "ask both the same queries behind the same draws"
        )
    _require_finite(a_DQ)  # before inf - inf warns
    _require_finite(b_DQ)
    return mean_interval(a_DQ - b_DQ, seed=seed)


def mean_of_tables(tables: Sequence[NDArray[np.float64]], *, seed: int = 0) -> Interval:
    """Return the mean of the tables' means with its 95 % interval, for these tasks: only draws and queries vary.

    Each table is a task of its own, with its own draws and queries, so variances add up; degrees of freedom are
    Satterthwaite's (1946). A single table has `mean_interval`'s. A lone value among the tables leaves no interval.

    Raises:
        ValueError: no tables, or as `mean_interval`.
    """
    if len(tables) == 1:
        return mean_interval(tables[0], seed=seed)
    mean = float(np.mean([mean_interval(table_DQ, seed=seed).mean for table_DQ in tables]))
    known = [_mean_variance(np.asarray(table_DQ, dtype=np.float64)) for table_DQ in tables]
    total = sum(variance for variance, _ in known)
    if not total > 0:  # NaN too
        return Interval(mean, mean + total, mean + total)
    freedom = 1 / sum((variance / total) ** 2 / degrees for variance, degrees in known)
    margin = float(stdtrit(freedom, _HIGH)) * sqrt(total) / len(tables)
    return Interval(mean, mean - margin, mean + margin)


def t_interval(values_N: NDArray[np.float64]) -> Interval:
    """Return the mean of independent values with Student's 95 % interval; low and high are NaN for a lone value.

    Raises:
        ValueError: not one row of values, none, or one that is not finite.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    if values_N.ndim != 1:
        raise ValueError(f"values have shape {values_N.shape}; a t interval needs one row of them")
    _require_finite(values_N)
    if len(values_N) == 1:
        return Interval(float(values_N[0]), nan, nan)
    if values_N.min() == values_N.max():
        return _point(float(values_N[0]))
    mean = float(values_N.mean())
    margin = float(stdtrit(len(values_N) - 1, _HIGH)) * sqrt(float(values_N.var(ddof=1)) / len(values_N))
    return Interval(mean, mean - margin, mean + margin)


def _mean_variance(scores_DQ: NDArray[np.float64]) -> tuple[float, float]:
    """Return the variance of the mean of all cells and its degrees of freedom; NaN for a lone value."""
    if scores_DQ.size == 1:
        return nan, nan
    if scores_DQ.min() == scores_DQ.max():
        return 0.0, 1.0
    if 1 in scores_DQ.shape:
        return float(scores_DQ.var(ddof=1)) / scores_DQ.size, float(scores_DQ.size - 1)
    return _two_way_variance(scores_DQ)


def _two_way_variance(scores_DQ: NDArray[np.float64]) -> tuple[float, float]:
    """Return the variance of the mean under crossed random draws and queries, and its degrees of freedom.

    With the mean squares of the two-way table, var = (MS_d + MS_q - MS_e) / (D Q): draws and queries each bring the
    noise of the cells along, so it is taken off once (Searle, Casella and McCulloch 1992, Variance Components, ch. 4).
    The estimate can come out near or below 0, its expectation is never below that of any of the three: the largest is
    the floor. Degrees of freedom: Satterthwaite 1946 (Biometrics Bulletin 2:110-114) for the sum; at the floor, those
    of the mean square that is the floor.
    """
    num_draws, num_queries = scores_DQ.shape
    draw_means_D, query_means_Q = scores_DQ.mean(axis=1), scores_DQ.mean(axis=0)
    residual_DQ = scores_DQ - draw_means_D[:, None] - query_means_Q + scores_DQ.mean()
    freedom_d, freedom_q = num_draws - 1, num_queries - 1
    freedom_e = freedom_d * freedom_q
    square_d = num_queries * float(draw_means_D.var(ddof=1))
    square_q = num_draws * float(query_means_Q.var(ddof=1))
    square_e = float((residual_DQ**2).sum()) / freedom_e

    squares = ((square_d, freedom_d), (square_q, freedom_q), (square_e, freedom_e))
    floor = max(square for square, _ in squares)
    total = square_d + square_q - square_e
    # Mean squares that are equal but for rounding tie, or the rounding would choose the degrees of freedom.
    if total <= floor * (1 + _ROUNDING):
        freedom = max(degrees for square, degrees in squares if square >= floor * (1 - _ROUNDING))
        return floor / (num_draws * num_queries), float(freedom)
    # Shares of the total, since squares of tiny mean squares would underflow.
    satterthwaite = 1 / sum((square / total) ** 2 / degrees for square, degrees in squares)
    return total / (num_draws * num_queries), satterthwaite


def _resampled_shape(scores_DQ: NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """Return how far the resampled mean reaches below and above, in units of a normal's 95 % reach; (1, 1) is a normal.

    Rows and columns are resampled independently. The plain bootstrap of this kind (Owen 2007, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1:386-411) counts the noise of the cells three times, which is far too wide
    where noise dominates. So only row and column means are resampled, and only the shape is kept: the width comes from
    `_two_way_variance`.
    """
    mean = scores_DQ.mean()
    # Sorted, so that the interval does not hang on the order of draws or queries.
    moved_B = _resampled_means(np.sort(scores_DQ.mean(axis=1) - mean), seed=seed, axis=0)
    moved_B += _resampled_means(np.sort(scores_DQ.mean(axis=0) - mean), seed=seed, axis=1)
    reach = float(stdtrit(np.inf, _HIGH)) * float(moved_B.std())
    if reach <= 1e-12 * float(np.abs(scores_DQ).max()):  # equal row and column means: noise alone, no shape to learn
        return 1.0, 1.0
    low, high = np.quantile(moved_B, [_LOW, _HIGH])
    return float(-low / reach), float(high / reach)


def _resampled_means(values_N: NDArray[np.float64], *, seed: int, axis: int) -> NDArray[np.float64]:
    """Return the means of `NUM_RESAMPLES` resamples of the values, the same choices for every call alike in shape."""
    num_values = len(values_N)
    size = min(NUM_RESAMPLES, max(1, _MAX_BLOCK // num_values))
    blocks = range(-(-NUM_RESAMPLES // size))
    means = [_resample_counts((size, num_values), (seed, axis, block)) @ values_N for block in blocks]
    return np.concatenate(means)[:NUM_RESAMPLES] / num_values


@lru_cache(maxsize=4)  # the cells of a shot curve share their shape; at most 64 MiB in all
def _resample_counts(shape: tuple[int, int], seeds: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return how often each value (column) is chosen in each resample (row); every row sums to its length."""
    num_resamples, num_values = shape
    chosen = make_stream("resampling", *seeds).integers(num_values, size=shape)
    chosen += num_values * np.arange(num_resamples)[:, None]
    return np.bincount(chosen.ravel(), minlength=chosen.size).reshape(shape).astype(np.float64)


def _require_finite(values: NDArray[np.float64]) -> None:
    if values.size == 0:
        raise ValueError("no values; a cell where nothing was scored has no mean")
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite; a missing cell is never a number")


def _point(value: float) -> Interval:
    return Interval(value, value, value)
