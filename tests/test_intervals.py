"""Intervals: tables a reader can work out by hand, invariants, and how often they hold a known truth (A3, B12)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.coverage import MIXES, measure_coverage
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import stdtrit

from manyicl.intervals import (
    Interval,
    Table,
    difference_interval,
    mean_interval,
    score_interval,
    t_interval,
)

SCORES = st.integers(0, 8).map(lambda eighths: eighths / 8)


def arrays() -> st.SearchStrategy[NDArray[np.float64]]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9)
    return hnp.arrays(np.float64, shapes, elements=SCORES)


def table(scores: object, *, first: int = 0) -> Table:
    """Return a table whose queries are numbered from `first` on."""
    scores_DQ = np.array(scores, dtype=float)
    return Table(scores_DQ, tuple(f"q{first + number}" for number in range(scores_DQ.shape[1])))


def mean_of(scores: object) -> Interval:
    return mean_interval([{"t": table(scores)}])


def close(interval: Interval, mean: float, low: float, high: float) -> bool:
    return np.allclose([interval.mean, interval.low, interval.high], [mean, low, high], atol=1e-9)


def width(interval: Interval) -> float:
    return interval.high - interval.low


# One table ---------------------------------------------------------------------------------------------------------


def test_t_interval_by_hand() -> None:
    # mean 2, variance 1, standard error 1 / sqrt(3), t(2) = 4.302653
    margin = 4.302652729749 / math.sqrt(3)
    assert close(t_interval(np.array([1.0, 2.0, 3.0])), 2, 2 - margin, 2 + margin)


def test_two_way_variance_by_hand() -> None:
    # rows 1, 4 and columns 2, 3 on average; the residuals are +-0.5.
    # MS_d = 2 * 4.5 = 9, MS_q = 2 * 0.5 = 1, MS_e = 4 * 0.25 / 1 = 1: the total is 9, which is the floor, on 1 degree.
    # t(1) = 12.706205, standard error sqrt(9 / 4)
    margin = 12.706204736175 * 1.5
    assert close(mean_of([[0, 2], [4, 4]]), 2.5, 2.5 - margin, 2.5 + margin)


def test_satterthwaite_by_hand() -> None:
    # rows 1, 5 and columns 2, 4 without residual: MS_d = 16, MS_q = 4, MS_e = 0;
    # 20^2 / (16^2 / 1 + 4^2 / 1) = 400 / 272 degrees
    margin = stdtrit(400 / 272, 0.975) * math.sqrt(20 / 4)
    assert close(mean_of([[0, 2], [4, 6]]), 3, 3 - margin, 3 + margin)


def test_noise_alone_still_has_a_width() -> None:
    # Every row and column averages 0.5, so that only MS_e is left.
    assert mean_of([[0, 1], [1, 0]]).low < 0.5
    interval = mean_of(np.indices((10, 10)).sum(axis=0) % 2)
    assert interval.high - 0.5 == pytest.approx(0.5 - interval.low) != 0


def test_one_draw_varies_over_queries_and_one_query_over_draws() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.5])
    expected = t_interval(values)
    for scores in (values[None, :], values[:, None]):
        assert close(mean_of(scores), expected.mean, expected.low, expected.high)


def test_repeated_draws_are_one_draw() -> None:
    # At 0 shots all draws are one: repeating it must not shorten the interval.
    row = np.array([[0.0, 1.0, 1.0, 0.5, 0.0]])
    once = mean_of(row)
    assert close(mean_of(np.repeat(row, 5, axis=0)), once.mean, once.low, once.high)


@pytest.mark.parametrize("kind", [mean_interval, score_interval, difference_interval])
def test_a_lone_value_has_no_interval(kind) -> None:
    interval = kind([{"t": table([[0.25]])}])
    assert interval.mean == 0.25
    assert interval.ends == (None, None)
    assert kind([{"t": table([[0.25]]), "u": table([[0.0, 1.0]])}]).ends == (None, None)
    assert t_interval(np.array([0.25])).ends == (None, None)


def test_what_is_no_table_is_refused() -> None:
    for shape in ((0, 3), (3, 0), (1, 0)):
        with pytest.raises(ValueError, match="not a table"):
            Table(np.empty(shape), tuple("abc"[: shape[1]]))
    with pytest.raises(ValueError, match=r"scores of shape \(1, 2\) with 1 query ids"):
        Table(np.zeros((1, 2)), ("a",))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            table([[0, bad]])
        with pytest.raises(ValueError, match="NaN or infinite"):
            t_interval(np.array([0, bad]))
    with pytest.raises(ValueError, match="one row"):
        t_interval(np.zeros((2, 2)))
    for runs in ([], [{}]):
        with pytest.raises(ValueError, match="no scores"):
            mean_interval(runs)


@pytest.mark.slow
@given(arrays())
@settings(deadline=None)
def test_the_mean_lies_inside_and_order_changes_nothing(scores_DQ) -> None:
    rng = np.random.default_rng(scores_DQ.size)
    mixed_DQ = rng.permutation(rng.permutation(scores_DQ, axis=0), axis=1)
    for kind in (mean_interval, score_interval):
        interval = kind([{"t": table(scores_DQ)}])
        assert interval.low <= interval.mean + 1e-12
        assert interval.mean <= interval.high + 1e-12
        assert close(kind([{"t": table(mixed_DQ)}]), interval.mean, interval.low, interval.high)


# Here all three mean squares are equal, and rounding once chose the degrees of freedom.
@pytest.mark.slow
@example(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.125]]), -1, 0.5)
@given(arrays(), st.integers(-4, 4), st.sampled_from([0.5, 2.0, 4.0]))
def test_shift_and_scale_carry_over(scores_DQ, shift: int, scale: float) -> None:
    interval = mean_of(scores_DQ)
    moved = [shift + scale * end for end in (interval.mean, interval.low, interval.high)]
    assert close(mean_of(shift + scale * scores_DQ), *moved)


# Several tasks and seeds --------------------------------------------------------------------------------------------


def test_the_mean_of_two_tasks_by_hand() -> None:
    # Over D Q = 4 the mean squares of the first are 9 / 4, 1 / 4 and 1 / 4, on 1 degree each (see above); the lone draw
    # 1, 2, 3 has the variance 1 / 3 on 2 degrees. MS_d + MS_q - MS_e of both tasks: 9 / 4 + 1 / 4 + 1 / 3 - 1 / 4.
    runs = [{"t": table([[0, 2], [4, 4]]), "u": table([[1, 2, 3]])}]
    total = 9 / 4 + 1 / 3
    freedom = total**2 / ((9 / 4) ** 2 + (1 / 4) ** 2 + (1 / 4) ** 2 + (1 / 3) ** 2 / 2)
    margin = stdtrit(freedom, 0.975) * math.sqrt(total) / 2
    assert close(mean_interval(runs), 2.25, 2.25 - margin, 2.25 + margin)


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 4, 5, 8])
def test_the_same_answers_again_make_nothing_surer(num_seeds: int) -> None:
    """A3: the base answers alike with every seed, so its table counts once however often it stands there."""
    once = table([[0, 1, 1, 0, 1, 0, 0, 1, 1, 1]])
    alone = mean_interval([{"t": once}])
    assert close(mean_interval([{"t": once}] * num_seeds), alone.mean, alone.low, alone.high)
    wilson = score_interval([{"t": once}])
    assert close(score_interval([{"t": once}] * num_seeds), wilson.mean, wilson.low, wilson.high)


def test_two_seeds_with_separate_queries_are_surer_than_one() -> None:
    one, other = table([[0, 1, 1, 0, 1, 0]]), table([[0, 1, 1, 0, 1, 0]], first=6)
    # The variance of a seed's mean is 0.3 / 6 on 5 degrees; of both halves of it, on 10.
    margin = stdtrit(10, 0.975) * math.sqrt(0.3 / 6 / 2)
    assert close(mean_interval([{"t": one}, {"t": other}]), 0.5, 0.5 - margin, 0.5 + margin)


def test_queries_in_common_count_by_how_many_they_are() -> None:
    scores = [[0, 1] * 5]  # by whether the number of the query is odd
    same, half, none = (width(mean_interval([{"t": table(scores)}, {"t": table(scores, first=n)}])) for n in (0, 4, 10))
    assert same > half > none


@pytest.mark.parametrize("kind", [mean_interval, score_interval, difference_interval])
def test_a_task_of_one_query_beside_another_by_hand(kind) -> None:
    """Its query says nothing of queries, with no degrees of freedom, by which the whole report was divided."""
    interval = kind([{"a": table([[0], [1]]), "b": table([[0, 1, 1]])}] * 2)
    # Of a each seed has draws of its own, 1 / 4 each; of b both have the same queries, (1 / 3) / 3 once; half of both.
    draws, queries = 1 / 4 / 16, 1 / 9 / 4
    variance = 2 * draws + queries
    freedom = variance**2 / (2 * draws**2 / 1 + queries**2 / 2)
    reach = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    assert interval.mean == pytest.approx(7 / 12)
    if kind is mean_interval:
        assert close(interval, 7 / 12, 7 / 12 - reach, 7 / 12 + reach)
    assert interval.low < 7 / 12 < interval.high


def test_from_five_seeds_on_the_runs_own_spread_counts_too() -> None:
    """Five runs whose queries hardly differ, and whose means are 0.1 to 0.5: Student's on 4 degrees."""
    runs = [{"t": table([[m - 0.001, m + 0.001]], first=2 * n)} for n, m in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))]
    margin = stdtrit(4, 0.975) * math.sqrt(0.025 / 5)
    assert close(mean_interval(runs), 0.3, 0.3 - margin, 0.3 + margin)
    assert width(mean_interval(runs[:4])) < 0.01  # four speak of these runs alone


def test_five_seeds_with_equal_means_are_no_surer_than_these_runs() -> None:
    runs = [{"t": table([[0, 1, 1, 0]], first=4 * n)} for n in range(5)]
    margin = stdtrit(15, 0.975) * math.sqrt(1 / 3 / 4 / 5)
    assert close(mean_interval(runs), 0.5, 0.5 - margin, 0.5 + margin)


# Near 0 and 1, and where nothing varies (B12) -----------------------------------------------------------------------


def test_wilsons_interval_by_hand() -> None:
    # 18 of 20 right: the variance of the mean is 0.09 / 19, so 19 answers count, with t(19) = 2.093024
    interval = score_interval([{"t": table([[1] * 18 + [0] * 2])}])
    pull = 2.093024054408**2 / 19
    middle, reach = (0.9 + pull / 2) / (1 + pull), 2.093024054408 * math.sqrt(0.09 / 19 + pull / (4 * 19)) / (1 + pull)
    assert close(interval, 0.9, middle - reach, middle + reach)
    assert 0.65 < interval.low < 0.9 < interval.high < 0.99


def test_all_right_is_not_certain() -> None:
    # Wilson's of 12 of 12, with t(11) = 2.200985: low = 1 / (1 + t^2 / 12)
    interval = score_interval([{"t": table(np.ones((1, 12)))}])
    assert close(interval, 1, 1 / (1 + 2.200985160083**2 / 12), 1)
    tasks = score_interval([{name: table(np.ones((2, 12))) for name in "abc"}])
    assert interval.low < tasks.low < tasks.high == pytest.approx(1)  # 36 queries, whatever the draws
    none = score_interval([{"t": table(np.zeros((1, 12)))}])
    assert close(none, 0, 0, 1 - interval.low)


def test_one_task_all_right_and_one_all_wrong_is_not_certain() -> None:
    interval = score_interval([{"t": table(np.ones((1, 12))), "u": table(np.zeros((1, 12)))}])
    assert interval.low < 0.4
    assert interval.high > 0.6


def test_scores_that_do_not_come_near_an_end_have_students_interval() -> None:
    scores = np.random.default_rng(0).normal(0.5, 0.02, (5, 200))
    plain, wilson = mean_of(scores), score_interval([{"t": table(scores)}])
    assert (wilson.low, wilson.high) == pytest.approx((plain.low, plain.high), abs=1e-5)


def test_two_that_always_answer_alike_may_differ_on_other_queries() -> None:
    # One draw of right/wrong answers: two queries more, one for either side. t(18) = 2.100922
    same = difference_interval([{"t": table(np.zeros((1, 19)))}])
    reach = 2.100922040241 * math.sqrt(2) / 21
    assert close(same, 0, -reach, reach)
    # Behind several draws, or of other scores: Clopper and Pearson's.
    assert close(
        difference_interval([{"t": table(np.zeros((2, 19)))}]), 0, 0.025 ** (1 / 19) - 1, 1 - 0.025 ** (1 / 19)
    )
    better = difference_interval([{"t": table(np.ones((1, 19)))}])
    assert 0.7 < better.low < better.mean == better.high == 1


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    shared_DQ = 0.1 * (rng.normal(size=(5, 1)) + rng.normal(size=(1, 40)))
    a_DQ, b_DQ = shared_DQ + 0.5 + 0.001 * rng.normal(size=(5, 40)), shared_DQ
    paired, alone = difference_interval([{"t": table(a_DQ - b_DQ)}]), mean_of(a_DQ)
    assert 0.499 < paired.low < paired.high < 0.501
    assert width(alone) > 50 * width(paired)


# Coverage (docs/intervals.md has the whole table) -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_seeds", "shared"), [(1, True), (2, True), (2, False), (3, True), (5, True), (5, False), (8, True)]
)
@pytest.mark.parametrize("title", ["difference, 5 draws", "0 shots, score .97, run effect"])
def test_an_interval_holds_the_truth_95_times_in_100(title: str, num_seeds: int, shared: bool) -> None:
    """A3, B12: the review had 38.5 % for differences with five seeds that share their queries."""
    (mix,) = (mix for mix in MIXES if mix.title == title)
    assert 0.92 <= measure_coverage(mix, repetitions=400, num_seeds=num_seeds, num_tasks=1, shared=shared) <= 0.98


@pytest.mark.slow
def test_an_interval_over_16_tasks_and_5_seeds_holds_the_truth_95_times_in_100() -> None:
    assert 0.92 <= measure_coverage(MIXES[0], repetitions=150, num_seeds=5, num_tasks=16, shared=True) <= 0.98
