"""Means, intervals and paired differences of several seeds, on tables checked by hand; and chosen shots."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from manyicl.comparison.answers import Pooled, pool_differences, pool_means, tabulate
from manyicl.errors import UserError
from manyicl.evaluation.points import Prediction
from manyicl.intervals import Table, difference_interval, score_interval
from tests.support.comparison_results import HELD_OUT, ask, level, make_findings

# Student's quantile t(0.975; 4 degrees of freedom), from any table.
T4 = 2.7764451


def predict(task: str, shots: int, draw: int, query: str, score: float) -> Prediction:
    return Prediction(task, draw, shots, query, prediction="x", answer="x", score=score, nll=1.0)


def table(*rows: list[float], first: int = 0) -> Table:
    """Return a table whose queries are numbered from `first` on."""
    return Table(np.array(rows, dtype=float), tuple(f"q{first + number}" for number in range(len(rows[0]))))


def test_a_table_has_a_row_a_draw_and_a_column_a_query_in_whatever_order_they_come():
    predictions = [
        predict("animals", 4, 1, "b", 0.0),
        predict("animals", 4, 0, "b", 1.0),
        predict("animals", 4, 1, "a", 0.25),
        predict("animals", 4, 0, "a", 0.5),
        predict("animals", 0, 0, "a", 0.75),
        predict("colours", 0, 0, "c", 1.0),
    ]
    tables = tabulate(predictions)
    assert {task: sorted(shots) for task, shots in tables.items()} == {"animals": [0, 4], "colours": [0]}
    assert tables["animals"][4].scores.tolist() == [[0.5, 1.0], [0.25, 0.0]]
    assert tables["animals"][4].queries == ("a", "b")
    assert tables["animals"][0].scores.tolist() == [[0.75]]


def test_draws_that_were_asked_other_queries_are_refused():
    asked = [predict("animals", 4, 0, "a", 1.0), predict("animals", 4, 1, "b", 1.0)]
    with pytest.raises(UserError, match=r"^task 'animals': its draws at 4 shots were asked other queries; evaluate"):
        tabulate(asked)


def test_the_mean_and_interval_are_those_of_all_seeds_tables_by_query():
    seeds = [{"t": table([0, 1, 1, 1], [0, 1, 0, 1])}, {"t": table([1, 1, 1, 1], [0, 1, 1, 1], first=2)}]
    pooled = pool_means(seeds)
    assert pooled is not None
    assert pooled.seeds == (0.625, 0.875)
    expected = score_interval(seeds)
    assert (pooled.mean, pooled.low, pooled.high) == (0.75, expected.low, expected.high)
    apart = pool_means([seeds[0], {"t": table([1, 1, 1, 1], [0, 1, 1, 1], first=4)}])
    assert apart is not None
    assert (apart.low, apart.high) != (pooled.low, pooled.high)  # two queries were shared


def test_every_task_counts_the_same_however_many_queries_it_has():
    pooled = pool_means([{"animals": table([1.0]), "colours": table([0.0, 0.0, 0.0, 0.0])}])
    assert pooled is not None
    assert (pooled.mean, pooled.num_tasks) == (0.5, 2)


def test_a_missing_seed_is_none_and_no_part_of_the_mean():
    pooled = pool_means([{"t": table([1.0, 0.5])}, None, {"t": table([0.5, 0.0])}])
    assert pooled is not None
    assert pooled.seeds == (0.75, None, 0.25)
    assert pooled.mean == 0.5
    assert pool_means([None, None]) is None
    assert pool_means([{}, None]) is None


def test_five_of_six_seeds_speak_of_other_seeds():
    means = (0.4, 0.45, None, 0.5, 0.55, 0.6)
    rows = [None if m is None else {"t": table([m - 0.001, m + 0.001], first=2 * n)} for n, m in enumerate(means)]
    pooled = pool_means(rows)
    assert pooled is not None
    assert pooled.mean == pytest.approx(0.5)
    # Student's on 4 degrees, which Wilson's pulls a little to the middle.
    assert pooled.high - pooled.low == pytest.approx(2 * T4 * math.sqrt(0.025 / 4 / 5), rel=0.02)


def test_a_lone_value_has_no_interval_and_no_sign():
    pooled = pool_means([{"t": table([0.5])}])
    assert pooled is not None
    assert (pooled.low, pooled.high, pooled.excludes_zero) == (None, None, False)


@pytest.mark.parametrize(
    ("low", "high", "sure"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0, 1, False)]
)
def test_an_interval_excludes_zero_where_it_has_one_sign(low, high, sure):
    assert Pooled(0.5, low, high, seeds=(0.5,), num_tasks=1).excludes_zero is sure


def test_a_difference_is_taken_query_by_query():
    """Both swing widely over queries, and one is above the other by about 0.25 at each."""
    easy_to_hard = [1.0, 0.75, 0.5, 0.25]
    above = {"animals": {4: table(easy_to_hard, easy_to_hard)}}
    below = {"animals": {4: table([0.75, 0.5, 0.25, 0.01], [0.75, 0.5, 0.25, 0.01])}}
    pooled = pool_differences([above], [below], shots={"animals": (4, 4)})
    assert pooled is not None
    expected = difference_interval([{"animals": table([0.25, 0.25, 0.25, 0.24])}])
    assert (pooled.mean, pooled.low, pooled.high) == pytest.approx((0.2475, expected.low, expected.high))
    assert 0.23 < pooled.low < pooled.high < 0.26
    turned = pool_differences([below], [above], shots={"animals": (4, 4)})
    assert turned is not None
    assert turned.mean == pytest.approx(-0.2475)


def test_the_one_row_without_shots_stands_against_every_draw():
    behind_shots = {"animals": {4: table([1.0, 1.0], [1.0, 0.0])}}
    without = {"animals": {0: table([0.5, 0.25])}}
    pooled = pool_differences([behind_shots], [without], shots={"animals": (4, 0)})
    assert pooled is not None
    # (0.5 + 0.75) and (0.5 - 0.25), over four.
    assert pooled.mean == 0.375


def test_only_seeds_and_tasks_that_both_have_are_paired():
    one = [
        {"animals": {4: table([1.0, 1.0])}, "colours": {4: table([1.0, 1.0])}},
        None,
        {"animals": {4: table([1, 1])}},
    ]
    other = [{"animals": {4: table([0.5, 0.5])}}, {"animals": {4: table([0, 0])}}, {"animals": {0: table([0, 0])}}]
    pooled = pool_differences(one, other, shots={"animals": (4, 4), "colours": (4, 4)})
    assert pooled is not None
    assert pooled.seeds == (0.5, None, None)
    assert pooled.num_tasks == 1
    assert pool_differences(one, other, shots={"sums": (4, 4)}) is None


@pytest.mark.parametrize("other", [table([1, 1, 1]), table([1, 1], first=1)], ids=["more", "as many others"])
def test_arms_that_were_asked_other_queries_are_refused(other):
    with pytest.raises(UserError, match="two arms were asked other queries"):
        pool_differences([{"a": {4: table([1, 1])}}], [{"a": {4: other}}], shots={"a": (4, 4)})


def test_arms_that_were_asked_other_numbers_of_draws_are_refused_unless_one_has_a_single_draw():
    two, three = table([1, 1], [1, 0]), table([1, 1], [0, 0], [1, 0])
    with pytest.raises(UserError, match="two arms were asked other draws"):
        pool_differences([{"a": {4: two}}], [{"a": {4: three}}], shots={"a": (4, 4)})
    single = pool_differences([{"a": {0: table([1, 1])}}], [{"a": {4: three}}], shots={"a": (0, 4)})
    assert single is not None
    assert single.mean == pytest.approx(1 - 0.5)


def test_the_shots_are_those_of_the_best_mean_validation_score_the_fewest_of_equals(tmp_path):
    scores = {0: (0.2, 0.2), 1: (0.6, 0.4), 4: (0.3, 0.7)}
    validation = [ask(lambda k, s, d, q: scores[k][s], shots=scores, seed=seed) for seed in (0, 1)]
    tests = [ask(level(0.5), shots=(0, 1, 4), seed=seed) for seed in (0, 1)]
    findings = make_findings(tmp_path, {"manyicl": tests}, validation={"manyicl": validation})
    chosen = findings.chosen["manyicl"]
    assert (chosen.shots, chosen.by_task) == (1, {HELD_OUT: 1})
    assert [one.shots for one in chosen.scores] == [0, 1, 4]
    assert [one.score for one in chosen.scores] == pytest.approx([0.2, 0.5, 0.5])


def test_without_validation_an_arm_is_asked_with_the_most_shots_it_was_trained_behind(tmp_path):
    findings = make_findings(
        tmp_path, {arm: [ask(level(0.5), shots=(0, 1, 4))] for arm in ("base", "zero-shot", "few-shot")}
    )
    assert {arm: one.shots for arm, one in findings.chosen.items()} == {"base": 4, "zero-shot": 0, "few-shot": 1}


def test_shots_that_one_arm_was_not_asked_with_are_no_column(tmp_path):
    whole, short = ask(level(0.5), shots=(0, 1, 4)), ask(level(0.5), shots=(0, 1))
    findings = make_findings(tmp_path, {"base": [whole], "manyicl": [short]})
    assert findings.shots_by_task == {HELD_OUT: [0, 1]}
    assert findings.pick_shots("most", "manyicl", [HELD_OUT]) == {HELD_OUT: 1}
    assert findings.pick_shots("chosen", "base", [HELD_OUT]) == {HELD_OUT: 1}  # chosen: 4
    assert findings.pick_shots(4, "base", [HELD_OUT]) == {}


def test_a_seed_that_is_missing_is_none_in_every_mean(tmp_path):
    findings = make_findings(tmp_path, {"manyicl": [ask(level(0.5), shots=(0, 1, 4)), None]})
    pooled = findings.pool("manyicl", {HELD_OUT: 4})
    assert pooled is not None
    assert pooled.seeds == (pytest.approx(0.51), None)
    assert replace(pooled, seeds=()).num_tasks == 1
