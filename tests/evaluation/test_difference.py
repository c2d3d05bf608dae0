"""Paired differences: what joins, what does not and why, and what is said of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manyicl.cli.tables.results import difference_table
from manyicl.errors import UserError
from manyicl.evaluation.difference import MeanDifference, PointDifference, compare_results, tell_difference
from manyicl.evaluation.points import DrawPoint, Prediction, ShotCurve, ShotPoint
from manyicl.evaluation.results import Evaluation
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.intervals import Table, difference_interval
from tests.support.rendering import render

Scores = dict[tuple[int, int], dict[str, float]]  # (shots, draw) -> query -> score


def result(name: str, tasks: dict[str, Scores], *, metric: str = "accuracy", shots: str = "same") -> Evaluation:
    """Return a result whose draws have shots that are named `shots`."""
    curves = []
    for task, scores in tasks.items():
        rows = tuple(
            Prediction(task, draw, k, query, "", "", score, 1.0)
            for (k, draw), by_query in scores.items()
            for query, score in by_query.items()
        )
        cells = tuple(
            ShotPoint(k, 0.5, None, None, 1.0, 1, 0, None, draws=tuple(
                DrawPoint(draw, 0.5, f"{shots if k else 'none'}-{draw}", 0, 0, None, None, 0)
                for asked, draw in scores if asked == k
            ))
            for k in sorted({k for k, _ in scores})
        )  # fmt: skip
        curves.append(ShotCurve(task, "qa", metric, num_queries=1, num_draws=1, points=cells, predictions=rows))
    return Evaluation(name, "sweep", seed=0, max_tokens=9, curves=tuple(curves), path=Path(f"{name}.json"))


def table(scores_DQ: np.ndarray, *, shots: int = 4) -> Scores:
    return {(shots, draw): {f"q{q}": float(score) for q, score in enumerate(row)} for draw, row in enumerate(scores_DQ)}


def scores(values_DQ: np.ndarray) -> Table:
    return Table(values_DQ, tuple(f"q{q}" for q in range(values_DQ.shape[1])))


RNG = np.random.default_rng(0)
A, B = RNG.random((5, 20)).round(2), RNG.random((5, 20)).round(2)


def test_a_cell_has_the_paired_interval_of_its_table_in_any_order():
    b = table(B)
    shuffled = {key: dict(reversed(scores.items())) for key, scores in reversed(b.items())}
    found = compare_results(result("a", {"t": table(A)}), result("b", {"t": shuffled}))
    (cell,) = found.cells
    interval = difference_interval([{"t": scores(B - A)}])
    assert (cell.num_draws, cell.num_queries, found.num_rows, found.unjoined) == (5, 20, 100, {})
    assert (cell.difference, cell.low, cell.high) == pytest.approx((interval.mean, interval.low, interval.high))
    assert (cell.a, cell.b) == pytest.approx((A.mean(), B.mean()))
    (mean,) = found.means
    assert (mean.tasks, mean.difference, mean.low) == (("t",), cell.difference, cell.low)


def test_the_mean_is_over_the_tasks_that_have_the_cell():
    a = {"t": table(A) | table(A[:1], shots=0), "u": table(A[:, :7])}
    b = {"t": table(B) | table(B[:1], shots=0), "u": table(B[:, :7])}
    zero, four = compare_results(result("a", a), result("b", b)).means
    assert (zero.shots, zero.tasks) == (0, ("t",))
    interval = difference_interval([{"t": scores(B - A), "u": scores((B - A)[:, :7])}])
    assert (four.shots, four.tasks) == (4, ("t", "u"))
    assert (four.difference, four.low, four.high) == pytest.approx((interval.mean, interval.low, interval.high))


def test_what_does_not_join_is_counted_by_reason():
    a = {"t": table(A) | table(A, shots=8), "only a": table(A[:1])}
    b = {"t": table(B[:3, :19]) | table(B[:1], shots=1)}
    found = compare_results(result("a", a), result("b", b))
    assert [(cell.task, cell.shots, cell.num_draws, cell.num_queries) for cell in found.cells] == [("t", 4, 3, 19)]
    assert found.unjoined == {
        "task 'only a' is in A alone": 20,
        "B has no score at 8 shots": 100,
        "A has no score at 1 shot": 20,
        "the draw is in A alone": 40,
        "the query was asked in one alone (other numbers of queries or tokens, another seed, or other data)": 3,
    }
    assert found.num_rows == 57
    assert 2 * found.num_rows + sum(found.unjoined.values()) == 200 + 20 + 57 + 20


def test_a_null_cell_is_left_out_and_never_a_zero():
    a, b = {"t": table(A)}, {"t": table(B, shots=1)}
    with pytest.raises(UserError, match=r"nothing to compare .*A has no score at 1 shot;.*B has no score at 4 shots"):
        compare_results(result("a", a), result("b", b))


def test_other_shots_do_not_join_but_none_are_always_the_same():
    a = {"t": table(A) | table(A[:1], shots=0)}
    b = {"t": table(B) | table(B[:1], shots=0)}
    found = compare_results(result("a", a), result("b", b, shots="another seed's"))
    assert [cell.shots for cell in found.cells] == [0]
    assert list(found.unjoined.values()) == [200]
    assert "other shots were drawn" in next(iter(found.unjoined))
    with pytest.raises(UserError, match=r"nothing to compare \(200 rows: other shots were drawn.*`seed`"):
        compare_results(result("a", {"t": table(A)}), result("b", {"t": table(B)}, shots="another seed's"))


def test_other_numbers_of_shots_that_fit_are_told_apart_from_another_seed():
    """A base and a run that were asked in other templates were said to have another seed or other data."""

    def filled(name: str, shots: str) -> Evaluation:
        one = result(name, {"t": table(A) | table(A[:1], shots=0)}, shots=shots)
        (curve,) = one.curves
        points = tuple(replace(point, shots="fill") if point.shots else point for point in curve.points)
        rows = tuple(replace(row, fill=bool(row.shots)) for row in curve.predictions)
        return replace(one, curves=(replace(curve, points=points, predictions=rows),))

    (reason,) = compare_results(filled("a", "seven"), filled("b", "five")).unjoined
    assert reason.startswith("other shots fit (another template, tokenizer or limit of tokens")


def test_another_metric_is_another_score():
    with pytest.raises(UserError, match=r"task 't' has another metric in each \(accuracy, rouge_l\)"):
        compare_results(result("a", {"t": table(A)}), result("b", {"t": table(B)}, metric="rouge_l"))


def test_no_query_in_common_is_nothing_to_compare():
    b = {key: {f"other {query}": score for query, score in row.items()} for key, row in table(B).items()}
    with pytest.raises(UserError, match=r"nothing to compare .*the query was asked in one alone"):
        compare_results(result("a", {"t": table(A)}), result("b", {"t": b}))


def test_equal_answers_are_not_certain_to_stay_equal():
    same = compare_results(result("a", {"t": table(A)}), result("b", {"t": table(A)})).cells[0]
    reach = 1 - 0.025 ** (1 / 20)
    assert (same.difference, same.low, same.high) == pytest.approx((0, -reach, reach))
    won = compare_results(result("a", {"t": table(0 * A)}), result("b", {"t": table(0 * A + 1)})).cells[0]
    assert (won.difference, won.low, won.high) == pytest.approx((1, 1 - 2 * reach, 1))


def test_one_answer_has_a_difference_and_no_interval():
    one = compare_results(result("a", {"t": table(A[:1, :1])}), result("b", {"t": table(B[:1, :1])}))
    assert (one.cells[0].low, one.means[0].high) == (None, None)
    assert one.to_json()["means"][0]["sentence"].endswith("a single answer tells no difference")
    assert not any(isinstance(v, float) and math.isnan(v) for v in one.to_json()["cells"][0].values())


@pytest.mark.parametrize(
    ("difference", "low", "high", "expected"),
    [
        (0.041, 0.012, 0.07, "B is better by 4.1 points [1.2, 7.0] at 16 shots, mean of 2 tasks"),
        (-0.041, -0.07, -0.012, "A is better by 4.1 points [1.2, 7.0] at 16 shots, mean of 2 tasks"),
        (0.01, -0.02, 0.04, "no difference can be told at 16 shots, mean of 2 tasks: B is ahead by 1.0 points"
         " [−2.0, 4.0]"),
        (-0.01, -0.04, 0.02, "no difference can be told at 16 shots, mean of 2 tasks: A is ahead by 1.0 points"
         " [−2.0, 4.0]"),
        (0.0, -0.1, 0.1, "no difference can be told at 16 shots, mean of 2 tasks: both score the same [−10.0, 10.0]"),
        (0.0237, 0.0004, 0.0469, "B is better by 2.37 points [0.04, 4.69] at 16 shots, mean of 2 tasks"),
        (-0.01, -0.02, 0.0, "no difference can be told at 16 shots, mean of 2 tasks: A is ahead by 1.0 points"
         " [0.0, 2.0]"),
    ],
)  # fmt: skip
def test_a_difference_is_told_plainly(difference, low, high, expected):
    assert tell_difference(MeanDifference(16, ("t", "u"), difference, low, high)) == expected


def test_a_cell_names_its_task():
    cell = PointDifference("banking77", 1, 5, 200, 0.5, 0.6, 0.1, 0.05, 0.15)
    assert tell_difference(cell) == "B is better by 10.0 points [5.0, 15.0] at 1 shot, banking77"


def answered(name: str, answers: dict[str, tuple[str, str, float, float]]) -> Evaluation:
    """Return a result of one draw at 4 shots: query -> prediction, answer, exact match, token F1."""
    rows = tuple(
        Prediction("t", 0, 4, query, given, wanted, score, 1.0, other_scores={"token_f1": f1})
        for query, (given, wanted, score, f1) in answers.items()
    )
    draws = (DrawPoint(0, 0.5, "same", 0, 0, None, None, 0),)
    cell = ShotPoint(4, 0.5, None, None, 1.0, len(rows), 0, None, other_scores={"macro_f1": 0.5}, draws=draws)
    curve = ShotCurve("t", "qa", "exact_match", num_queries=1, num_draws=1, points=(cell,), predictions=rows)
    return Evaluation(name, "sweep", seed=0, max_tokens=9, curves=(curve,), path=Path(f"{name}.json"))


def test_metrics_beside_the_main_one_are_compared_on_the_same_answers():
    a = answered("a", {"q1": ("x", "x", 1.0, 1.0), "q2": ("y", "x z", 0.0, 0.0), "only a": ("x", "x", 1.0, 1.0)})
    b = answered("b", {"q1": ("x", "x", 1.0, 1.0), "q2": ("x", "x z", 0.0, 2 / 3)})
    found = compare_results(a, b)
    (cell,) = found.cells
    f1, macro = cell.others
    assert (f1.metric, f1.a, f1.b) == ("token_f1", 0.5, pytest.approx(5 / 6))
    assert f1.difference == pytest.approx(1 / 3)
    assert f1.low < f1.difference < f1.high
    # a: x is right, F1 1; y and "x z" have F1 0. b: x has precision 1/2 and recall 1, F1 2/3; "x z" has F1 0.
    assert (macro.metric, macro.a, macro.b) == ("macro_f1", pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert macro.low is None
    text = render(difference_table(found))
    assert "other metrics, B - A in points" in text
    (shown,) = [line for line in text.splitlines() if "token_f1" in line]
    assert "+33.3" in shown
    assert found.to_json()["cells"][0]["others"][0]["metric"] == "token_f1"


def test_a_result_of_an_earlier_version_has_no_metric_beside_the_main_one():
    (cell,) = compare_results(result("a", {"t": table(A)}), result("b", {"t": table(B)})).cells
    assert cell.others == ()


def test_results_that_were_answered_in_other_ways_are_compared_and_say_so():
    scores = {"a task": {(0, 0): {"q": 1.0, "r": 0.0}}}
    summed = result("one", scores)
    by_byte = replace(result("two", scores), answering=AnswerSettings(normalize="bytes"))
    difference = compare_results(summed, by_byte)
    assert difference.settings == {"normalize": ("none", "bytes")}
    assert "answered in other ways: normalize is none in A, bytes in B" in render(difference_table(difference))
    assert compare_results(summed, summed).settings == {}


def test_other_templates_are_told_and_results_that_do_not_say_theirs_are_not():
    scores = {"a task": {(0, 0): {"q": 1.0, "r": 0.0}}}
    plain, chat = ({"style": style, "input": "Q: {input}\n"} for style in ("plain", "chat"))
    one, two = (replace(result(n, scores), prompt_template=t) for n, t in (("one", plain), ("two", chat)))
    difference = compare_results(one, two)
    assert difference.settings == {"template.style": ("plain", "chat")}
    assert "prompts were written in other ways: template.style is 'plain' in A, 'chat' in B" in render(
        difference_table(difference)
    )
    assert compare_results(one, replace(two, prompt_template=None)).settings == {}
