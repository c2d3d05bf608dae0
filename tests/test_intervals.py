"""Intervals: tables a reader can work out by hand, invariants, and coverage of a known truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import stdtrit

from manyicl.errors import UserError
from manyicl.intervals import (
    Interval,
    _resampled_shape,
    _two_way_variance,
    mean_interval,
    mean_of_tables,
    paired_interval,
    t_interval,
)

Table = NDArray[np.float64]
SCORES = st.integers(0, 8).map(lambda eighths: eighths / 8)


def tables(max_draws: int = 9) -> st.SearchStrategy[Table]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=max_draws)
    return hnp.arrays(np.float64, shapes, elements=SCORES)


def close(interval: Interval, mean: float, low: float, high: float) -> bool:
    return np.allclose([interval.mean, interval.low, interval.high], [mean, low, high], atol=1e-9)


def test_t_interval_by_hand() -> None:
    # mean 2, variance 1, standard error 1 / sqrt(3), t(2) = 4.302653
    margin = 4.302652729749 / math.sqrt(3)
    assert close(t_interval(np.array([1.0, 2.0, 3.0])), 2, 2 - margin, 2 + margin)


def test_two_way_variance_by_hand() -> None:
    # rows 1, 4 and columns 2, 3 on average; the residuals are +-0.5.
    # MS_d = 2 * 4.5 = 9, MS_q = 2 * 0.5 = 1, MS_e = 4 * 0.25 / 1 = 1: the total is 9, which is the floor, on 1 degree.
    variance, freedom = _two_way_variance(np.array([[0.0, 2.0], [4.0, 4.0]]))
    assert variance == pytest.approx(9 / 4)
    assert freedom == 1
    # t(1) = 12.706205, standard error 1.5
    margin = 12.706204736175 * 1.5
    assert close(mean_interval(np.array([[0.0, 2.0], [4.0, 4.0]])), 2.5, 2.5 - margin, 2.5 + margin)


def test_satterthwaite_by_hand() -> None:
    # rows 1, 5 and columns 2, 4 without residual: MS_d = 16, MS_q = 4, MS_e = 0;
    # 20^2 / (16^2 / 1 + 4^2 / 1) = 400 / 272
    variance, freedom = _two_way_variance(np.array([[0.0, 2.0], [4.0, 6.0]]))
    assert variance == pytest.approx(20 / 4)
    assert freedom == pytest.approx(400 / 272)


def test_noise_alone_still_has_a_width() -> None:
    # Every row and column averages 0.5, so that only MS_e is left.
    assert mean_interval(np.array([[0.0, 1.0], [1.0, 0.0]])).low < 0.5
    board = np.indices((10, 10)).sum(axis=0) % 2 * 1.0
    interval = mean_interval(board)
    assert interval.low < 0.5 < interval.high
    assert interval.high - 0.5 == pytest.approx(0.5 - interval.low)


def test_one_draw_varies_over_queries_and_one_query_over_draws() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.5])
    assert mean_interval(values[None, :]) == mean_interval(values[:, None]) == t_interval(values)


def test_repeated_draws_are_one_draw() -> None:
    # At 0 shots all draws are one: repeating it must not shorten the interval.
    row = np.array([[0.0, 1.0, 1.0, 0.5, 0.0]])
    once, often = mean_interval(row), mean_interval(np.repeat(row, 5, axis=0))
    assert close(often, once.mean, once.low, once.high)


def test_a_lone_value_has_no_interval() -> None:
    for interval in (t_interval(np.array([0.25])), mean_interval(np.array([[0.25]]))):
        assert interval.mean == 0.25
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (3, 7), (12, 7)])
def test_equal_values_have_no_width(shape: tuple[int, int]) -> None:
    assert mean_interval(np.full(shape, 0.1)) == Interval(0.1, 0.1, 0.1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 0)])
def test_no_values_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval(np.empty(shape))
    with pytest.raises(ValueError, match="no values"):
        t_interval(np.empty(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("num_draws", [1, 3, 12])
def test_missing_cells_are_refused(num_draws: int, bad: float) -> None:
    scores_DQ = np.zeros((num_draws, 4))
    scores_DQ[0, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        mean_interval(scores_DQ)
    with pytest.raises(ValueError, match="NaN or infinite"):
        paired_interval(scores_DQ, scores_DQ)
    with pytest.raises(ValueError, match="NaN or infinite"):
        t_interval(scores_DQ[0])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="draws x queries"):
        mean_interval(np.zeros(3))
    with pytest.raises(ValueError, match="one row"):
        t_interval(np.zeros((2, 2)))
    with pytest.raises(UserError, match="same queries"):
        paired_interval(np.zeros((2, 3)), np.zeros((1, 3)))


def test_seed_decides_the_resampling() -> None:
    scores_DQ = np.random.default_rng(0).random((10, 30))
    assert mean_interval(scores_DQ, seed=1) == mean_interval(scores_DQ, seed=1)
    assert mean_interval(scores_DQ, seed=1) != mean_interval(scores_DQ, seed=2)


def test_resampled_interval_leans_where_scores_spread() -> None:
    # One query in 20 is answered: the mean is more easily far above 0.05 than far below.
    scores_DQ = np.zeros((10, 20))
    scores_DQ[:, 0] = 1
    below, above = _resampled_shape(scores_DQ, seed=0)
    assert above > 1.1 * below


def test_more_queries_than_a_block_holds() -> None:
    scores_DQ = np.random.default_rng(0).random((10, 3_000))
    interval = mean_interval(scores_DQ)
    assert interval.low < interval.mean < interval.high
    variance, freedom = _two_way_variance(scores_DQ)
    assert interval.high - interval.low == pytest.approx(2 * stdtrit(freedom, 0.975) * math.sqrt(variance), rel=0.1)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    shared_DQ = rng.normal(size=(5, 1)) + rng.normal(size=(1, 40))
    a_DQ, b_DQ = shared_DQ + 0.5 + 0.01 * rng.normal(size=(5, 40)), shared_DQ
    paired, alone = paired_interval(a_DQ, b_DQ), mean_interval(a_DQ)
    assert 0.49 < paired.low < paired.high < 0.51
    assert alone.high - alone.low > 50 * (paired.high - paired.low)


def test_mean_of_tables_by_hand() -> None:
    # The variances of the means are 9 / 4 on 1 degree (see above) and, for the lone draw 1, 2, 3, 1 / 3 on 2 degrees.
    tables_ = [np.array([[0.0, 2.0], [4.0, 4.0]]), np.array([[1.0, 2.0, 3.0]])]
    total = 9 / 4 + 1 / 3
    freedom = total**2 / ((9 / 4) ** 2 / 1 + (1 / 3) ** 2 / 2)
    margin = stdtrit(freedom, 0.975) * math.sqrt(total) / 2
    assert close(mean_of_tables(tables_), 2.25, 2.25 - margin, 2.25 + margin)


def test_mean_of_tables_at_its_edges() -> None:
    table_DQ = np.random.default_rng(0).random((12, 9))
    assert mean_of_tables([table_DQ], seed=3) == mean_interval(table_DQ, seed=3)
    assert mean_of_tables([np.zeros((2, 2)), np.ones((3, 4))]) == Interval(0.5, 0.5, 0.5)
    lone = mean_of_tables([table_DQ, np.array([[1.0]])])
    assert math.isnan(lone.low)
    assert lone.mean == pytest.approx((table_DQ.mean() + 1) / 2)
    twice, once = mean_of_tables([table_DQ, table_DQ]), mean_of_tables([table_DQ[:9]])
    assert twice.high - twice.low < once.high - once.low
    with pytest.raises(ValueError, match="NaN or infinite"):
        mean_of_tables([table_DQ, np.array([[math.nan, 1.0]])])


@given(tables(max_draws=14))
@settings(deadline=None)
def test_the_mean_lies_inside(scores_DQ: Table) -> None:
    interval = mean_interval(scores_DQ)
    assert interval.low <= interval.mean <= interval.high
    assert interval.mean == pytest.approx(scores_DQ.mean())


@given(tables(max_draws=14))
@settings(deadline=None)
def test_order_changes_nothing(scores_DQ: Table) -> None:
    rng = np.random.default_rng(scores_DQ.size)
    mixed_DQ = rng.permutation(rng.permutation(scores_DQ, axis=0), axis=1)
    interval = mean_interval(scores_DQ)
    assert close(mean_interval(mixed_DQ), interval.mean, interval.low, interval.high)


# Here all three mean squares are equal, and rounding once chose the degrees of freedom.
@example(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.125]]), -1, 0.5)
@given(tables(max_draws=9), st.integers(-4, 4), st.sampled_from([0.5, 2.0, 4.0]))
def test_shift_and_scale_carry_over(scores_DQ: Table, shift: int, scale: float) -> None:
    interval = mean_interval(scores_DQ)
    moved = [shift + scale * end for end in (interval.mean, interval.low, interval.high)]
    assert close(mean_interval(shift + scale * scores_DQ), *moved)


@given(tables(max_draws=14))
def test_nothing_differs_from_itself(scores_DQ: Table) -> None:
    assert paired_interval(scores_DQ, scores_DQ) == Interval(0, 0, 0)


# Coverage ---------------------------------------------------------------------------------------------------------

REPETITIONS = 600


@dataclass(frozen=True)
class Mix:
    """Standard deviations of what a draw, a query and (Gaussian only) a cell adds; `center` is the mean or log-odds."""

    kind: str
    draw: float
    query: float
    cell: float = 1.0
    center: float = 0.5


MIXES = {
    "gaussian, draws dominate": Mix("gaussian", 1.0, 0.3, 0.3),
    "gaussian, queries dominate": Mix("gaussian", 0.05, 1.0, 0.3),
    "gaussian, both": Mix("gaussian", 0.15, 1.0),
    "gaussian, noise only": Mix("gaussian", 0.0, 0.0),
    "right/wrong, draws dominate": Mix("bernoulli", 0.6, 0.3),
    "right/wrong, queries dominate": Mix("bernoulli", 0.1, 1.5),
    "right/wrong, both": Mix("bernoulli", 0.3, 1.5),
    "right/wrong, noise only": Mix("bernoulli", 0.0, 0.0),
    "right/wrong, wild draws near 1": Mix("bernoulli", 2.0, 0.6, center=2.5),
}
ACCEPTED = (0.92, 0.98)
# Named in the docstring of `mean_interval`: two draws that matter, and draws that are rarely very bad.
OTHERWISE = {
    ("gaussian, draws dominate", 2, 50): (0.88, 0.96),
    ("gaussian, both", 2, 200): (0.88, 0.96),
    ("right/wrong, draws dominate", 2, 50): (0.84, 0.92),
    ("right/wrong, draws dominate", 2, 200): (0.84, 0.92),
    ("right/wrong, both", 2, 200): (0.87, 0.95),
    **{("right/wrong, wild draws near 1", 2, num_queries): (0.76, 0.86) for num_queries in (50, 200)},
    **{("right/wrong, wild draws near 1", 5, num_queries): (0.82, 0.89) for num_queries in (50, 200)},
    **{("right/wrong, wild draws near 1", 10, num_queries): (0.86, 0.93) for num_queries in (50, 200)},
    **{("right/wrong, wild draws near 1", 20, num_queries): (0.89, 0.95) for num_queries in (50, 200)},
}


def true_mean(mix: Mix) -> float:
    if mix.kind == "gaussian":
        return mix.center
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)  # Gauss-Hermite, for a standard normal
    log_odds = mix.center + math.hypot(mix.draw, mix.query) * nodes
    return float((weights / weights.sum() / (1 + np.exp(-log_odds))).sum())


def simulate(mix: Mix, num_draws: int, num_queries: int) -> Table:
    rng = np.random.default_rng([num_draws, num_queries, list(MIXES.values()).index(mix)])
    shape = (REPETITIONS, num_draws, num_queries)
    effects = mix.center + mix.draw * rng.normal(size=(REPETITIONS, num_draws, 1))
    effects = effects + mix.query * rng.normal(size=(REPETITIONS, 1, num_queries))
    if mix.kind == "gaussian":
        return effects + mix.cell * rng.normal(size=shape)
    return (rng.random(shape) < 1 / (1 + np.exp(-effects))).astype(np.float64)


def coverage(mix: Mix, num_draws: int, num_queries: int) -> float:
    truth = true_mean(mix)
    intervals = [mean_interval(scores_DQ) for scores_DQ in simulate(mix, num_draws, num_queries)]
    return sum(interval.low <= truth <= interval.high for interval in intervals) / REPETITIONS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_draws", "num_queries"), list(product(MIXES, (2, 5, 10, 20), (50, 200))))
def test_coverage_of_a_known_truth(name: str, num_draws: int, num_queries: int) -> None:
    lowest, highest = OTHERWISE.get((name, num_draws, num_queries), ACCEPTED)
    assert lowest <= coverage(MIXES[name], num_draws, num_queries) <= highest


@pytest.mark.slow
@pytest.mark.parametrize(
    "mix", [Mix("gaussian", 0.0, 1.0), Mix("bernoulli", 0.0, 1.5)], ids=["gaussian", "right/wrong"]
)
@pytest.mark.parametrize("num_queries", [50, 200])
def test_coverage_without_shots_where_all_draws_are_one(mix: Mix, num_queries: int) -> None:
    rng = np.random.default_rng(num_queries)
    odds = mix.center + mix.query * rng.normal(size=(REPETITIONS, num_queries))
    right = (rng.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(np.float64)
    scores = odds + rng.normal(size=odds.shape) if mix.kind == "gaussian" else right
    intervals = [mean_interval(row_Q[None, :]) for row_Q in scores]
    truth = true_mean(mix)
    assert ACCEPTED[0] <= sum(i.low <= truth <= i.high for i in intervals) / REPETITIONS <= ACCEPTED[1]


def simulate_pair(repetition: int, num_draws: int, num_queries: int) -> tuple[Table, Table]:
    """Return right/wrong answers of two models whose log-odds share what draws and queries do, and differ by 0.5."""
    rng = np.random.default_rng([repetition, num_draws, num_queries])
    shared = 0.5 + 0.6 * rng.normal(size=(num_draws, 1)) + 1.5 * rng.normal(size=(1, num_queries))
    own = [0.3 * rng.normal(size=(num_draws, 1)) + 0.5 * rng.normal(size=(1, num_queries)) for _ in range(2)]
    log_odds = (shared + own[0], shared + own[1] + 0.5)
    a_DQ, b_DQ = ((rng.random(shared.shape) < 1 / (1 + np.exp(-odds))).astype(np.float64) for odds in log_odds)
    return a_DQ, b_DQ


def true_difference() -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = math.sqrt(0.6**2 + 1.5**2 + 0.3**2 + 0.5**2)
    right = [(weights / weights.sum() / (1 + np.exp(-(c + spread * nodes)))).sum() for c in (0.5, 1.0)]
    return float(right[1] - right[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_draws", [5, 10])
def test_coverage_of_a_known_difference(num_draws: int) -> None:
    truth = true_difference()
    intervals = [paired_interval(*simulate_pair(n, num_draws, 100)[::-1]) for n in range(REPETITIONS)]
    assert ACCEPTED[0] <= sum(i.low <= truth <= i.high for i in intervals) / REPETITIONS <= ACCEPTED[1]


@pytest.mark.slow
@pytest.mark.parametrize("num_draws", [5, 10])
def test_coverage_of_a_known_mean_difference_of_four_tasks(num_draws: int) -> None:
    truth = true_difference()
    hits = 0
    for repetition in range(REPETITIONS):
        pairs = [simulate_pair(4 * repetition + task, num_draws, (30, 50, 100, 200)[task]) for task in range(4)]
        interval = mean_of_tables([b_DQ - a_DQ for a_DQ, b_DQ in pairs])
        hits += interval.low <= truth <= interval.high
    assert ACCEPTED[0] <= hits / REPETITIONS <= ACCEPTED[1]
