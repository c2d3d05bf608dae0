"""Which queries and shot counts a sweep asks, and what it says where nothing was scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from manyicl.cells import score_bounds
from manyicl.errors import UserError
from manyicl.evaluation import AskedModel, evaluate, one_pass_curve
from manyicl.intervals import Interval
from manyicl.shot_curve import evaluate_task, score_one_pass
from manyicl.sweep import Sweep, TaskSweep
from manyicl.tasks import Example
from manyicl.templates import TemplateSettings
from manyicl.tokens import TaskTokenizer, tokenize_task
from tests.conftest import make_task, tiny_model


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


def open_task():
    """Return a task whose answers are generated: one test input is far longer than the others."""
    task = make_task("open")
    long = Example(input="a very long story " * 30, answer="fox")
    return replace(task, family="qa", metric="exact_match", labels=(), test=(*task.test, long), sha256="open")


def test_queries_that_do_not_fit_behind_the_most_shots_are_left_out_at_every_k_and_counted(tokenizer):
    task = tokenize_task(open_task(), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 2), num_draws=2, num_queries=50, max_tokens=200)
    curve = evaluate_task(tiny_model("llama"), task, tokenizer=tokenizer, sweep=sweep)
    assert curve.num_queries == 10
    assert [(cell.num_scored, cell.num_unfit) for cell in curve.cells] == [(10, 1), (20, 1)]
    assert all(0 <= cell.num_cut <= cell.num_scored for cell in curve.cells)


def test_a_shot_count_that_does_not_fit_is_null_never_zero(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 30, 4000), num_draws=2, num_queries=5, max_tokens=200)
    curve = evaluate_task(tiny_model("llama"), task, tokenizer=tokenizer, sweep=sweep)
    zero, thirty, thousands = curve.cells
    assert zero.score is not None
    for cell in (thirty, thousands):
        assert (cell.score, cell.low, cell.high, cell.nll, cell.majority_score) == (None, None, None, None, None)
        assert (cell.num_scored, cell.num_unfit) == (0, 5)


def test_the_same_seed_asks_the_same_and_another_seed_something_else(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    plans = [TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(seed=seed, num_queries=5)) for seed in (0, 0, 1)]
    assert plans[0].queries.tolist() == plans[1].queries.tolist()
    assert [d.tolist() for d in plans[0].draws] == [d.tolist() for d in plans[1].draws]
    assert plans[0].draws[0].tolist() != plans[2].draws[0].tolist()


def test_the_majority_stands_beside_each_score(tokenizer):
    task = make_task("animals")
    lopsided = replace(task, train=tuple(replace(e, answer="owl") for e in task.train), sha256="lopsided")
    tokenized = tokenize_task(lopsided, tokenizer=tokenizer)
    sweep = Sweep(shots=(1,), num_draws=1, num_queries=10, max_tokens=200)
    cell = evaluate_task(tiny_model("llama"), tokenized, tokenizer=tokenizer, sweep=sweep).cells[0]
    assert cell.majority_score == sum(e.answer == "owl" for e in task.test) / 10


def test_a_task_without_test_rows_is_null_in_a_sweep_and_an_error_in_one_pass(tokenizer):
    task = tokenize_task(replace(make_task("animals"), test=(), sha256="no-test"), tokenizer=tokenizer)
    curve = evaluate_task(tiny_model("llama"), task, tokenizer=tokenizer, sweep=Sweep(shots=(0, 1), max_tokens=200))
    assert [cell.score for cell in curve.cells] == [None, None]
    with pytest.raises(UserError, match="has no test rows"):
        score_one_pass(tiny_model("llama"), task, num_episodes=2, token_budget=100)


def test_one_pass_counts_the_episodes_that_reach_each_k_and_uses_no_row_twice(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    curve = score_one_pass(tiny_model("llama"), task, num_episodes=4, token_budget=100)
    counts = [cell.num_scored for cell in curve.cells]
    assert counts[0] == curve.num_queries == 3  # four were asked for, and ten rows make three
    assert sum(counts) == 10
    assert counts == sorted(counts, reverse=True)
    assert all(cell.nll is not None and cell.nll > 0 for cell in curve.cells)


def test_scores_that_are_all_alike_are_not_certain():
    assert score_bounds(Interval(1.0, 1.0, 1.0), num_independent=100) == pytest.approx((0.9638, 1.0), abs=1e-4)
    assert score_bounds(Interval(0.0, 0.0, 0.0), num_independent=1) == pytest.approx((0.0, 0.975))
    assert score_bounds(Interval(0.9, 0.7, 1.1), num_independent=5) == (0.7, 1.0)
    assert score_bounds(Interval(0.9, float("nan"), float("nan")), num_independent=1) == (None, None)


def test_a_new_task_asked_beyond_any_trained_number_of_shots_is_marked(tokenizer):
    asked = AskedModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=400, trained_shots={"other": 1})
    sweep = evaluate(asked, [make_task("animals")], shots=(1, 2), draws=1, queries=3)
    one_pass = one_pass_curve(asked, [make_task("animals")], episodes=1)
    for result in (sweep, one_pass):
        marks = {cell.shots: cell.extrapolated for cell in result.curves[0].cells}
        assert (marks[1], marks[2]) == (False, True)


def test_a_model_that_gives_no_finite_likelihood_is_an_error_not_a_score(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    asked = AskedModel("tiny", model, tokenizer=tokenizer, max_tokens=400, trained_shots={})
    with pytest.raises(UserError, match="no finite likelihood"):
        evaluate(asked, [make_task("animals")], shots=(1,), draws=1, queries=3)


@pytest.mark.parametrize("wrong", [{"shots": ()}, {"shots": (-1,)}, {"draws": 0}, {"queries": 0}])
def test_an_impossible_sweep_is_one_line(tokenizer, wrong):
    asked = AskedModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError, match="--shots"):
        evaluate(asked, [make_task("animals")], **wrong)


def test_an_evaluation_says_which_kind_it_is(tokenizer):
    asked = AskedModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    assert one_pass_curve(asked, [make_task("animals")], episodes=1).to_json()["kind"] == "one-pass"
