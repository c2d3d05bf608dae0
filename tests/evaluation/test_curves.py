"""Which queries and shot counts a sweep asks, and what it says where nothing was scored."""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.answering import answer_draw
from manyicl.evaluation.curves import make_curve, score_one_pass
from manyicl.evaluation.loop import evaluate, one_pass_curve
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.answering.questions import write_queries
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.drawing import write_answers
from manyicl.inference.engine import score_whole_prompts
from manyicl.inference.model import InferenceModel
from manyicl.tasks.task import Example, flip_labels, flip_map
from tests.conftest import make_task, tiny_model
from tests.support.answers import curve_of, engine_of


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
    room = len(task.head_ids) + int(task.splits["test"].lengths.max()) + 10  # for the long one, and no two shots
    sweep = Sweep(shots=(0, 2), num_draws=2, num_queries=50, max_tokens=room)
    curve = curve_of(tiny_model("llama"), task, tokenizer=tokenizer, sweep=sweep)
    assert curve.num_queries == 10
    assert [(cell.num_scored, cell.num_unfit) for cell in curve.points] == [(10, 1), (20, 1)]
    assert all(0 <= cell.num_cut <= cell.num_scored for cell in curve.points)


def test_a_shot_count_that_does_not_fit_is_null_never_zero(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 30, 4000), num_draws=2, num_queries=5, max_tokens=200)
    curve = curve_of(tiny_model("llama"), task, tokenizer=tokenizer, sweep=sweep)
    zero, thirty, thousands = curve.points
    assert zero.score is not None
    for cell in (thirty, thousands):
        assert (cell.score, cell.low, cell.high, cell.nll, cell.majority_score) == (None, None, None, None, None)
        assert (cell.num_scored, cell.num_unfit) == (0, 5)


def test_the_majority_stands_beside_each_score(tokenizer):
    task = make_task("animals")
    lopsided = replace(task, train=tuple(replace(e, answer="owl") for e in task.train), sha256="lopsided")
    tokenized = tokenize_task(lopsided, tokenizer=tokenizer)
    sweep = Sweep(shots=(1,), num_draws=1, num_queries=10, max_tokens=200)
    cell = curve_of(tiny_model("llama"), tokenized, tokenizer=tokenizer, sweep=sweep).points[0]
    assert cell.majority_score == sum(e.answer == "owl" for e in task.test) / 10
    assert cell.chance_score == pytest.approx(1 / len(task.labels))


def test_a_task_without_test_rows_is_null_in_a_sweep_and_an_error_in_one_pass(tokenizer):
    task = tokenize_task(replace(make_task("animals"), test=(), sha256="no-test"), tokenizer=tokenizer)
    curve = curve_of(tiny_model("llama"), task, tokenizer=tokenizer, sweep=Sweep(shots=(0, 1), max_tokens=200))
    assert [cell.score for cell in curve.points] == [None, None]
    with pytest.raises(UserError, match="has no test rows"):
        score_one_pass(tiny_model("llama"), task, num_episodes=2, token_budget=100)


def test_a_one_pass_curve_counts_each_row_once_at_each_number_of_shots(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)  # ten test rows make three episodes
    once = score_one_pass(tiny_model("llama"), task, num_episodes=3, token_budget=100)
    counts = [cell.num_scored for cell in once.points]
    assert counts[0] == once.num_queries == 3
    assert sum(counts) == 10
    assert counts == sorted(counts, reverse=True)
    assert all(cell.nll is not None and cell.nll > 0 for cell in once.points)
    often = score_one_pass(tiny_model("llama"), task, num_episodes=100, token_budget=100)
    assert often.points[0].num_scored == 10  # not 100: there are no more rows


def test_a_one_pass_curve_of_rows_that_all_fit_one_episode_has_an_interval_at_every_number_of_shots(tokenizer):
    """A task of 300 rows had 59 test rows, one episode, and so a curve of single answers: 0 or 100 % at each k."""
    task = make_task("animals")
    task = replace(task, train=tuple(replace(e, answer="owl") for e in task.train), sha256="lopsided")
    tokenized = tokenize_task(task, tokenizer=tokenizer)
    curve = score_one_pass(tiny_model("llama"), tokenized, num_episodes=8, token_budget=4000)
    assert [cell.shots for cell in curve.points] == list(range(10))
    assert all(cell.low is not None and cell.num_scored > 3 for cell in curve.points)
    assert {cell.majority_score for cell in curve.points} == {sum(e.answer == "owl" for e in task.test) / 10}
    assert {cell.chance_score for cell in curve.points} == {1 / len(task.labels)}


def test_a_broken_model_has_no_one_pass_curve(tokenizer):
    """Its nats were NaN, and writing the result ended in a traceback."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    tokenized = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"^the model gives .* answers no finite likelihood; it is broken, or needs"):
        score_one_pass(model, tokenized, num_episodes=1, token_budget=100)


def test_a_one_pass_curve_reports_the_episodes_of_all_tasks(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=400, trained_shots={})
    seen = []
    tasks = [make_task("animals"), make_task("colours")]
    one_pass_curve(asked, tasks, episodes=2, on_progress=lambda *progress: seen.append(progress))
    assert seen == [(f"{name}, episodes", done, 4) for done, name in enumerate(["animals"] * 2 + ["colours"] * 2, 1)]


def test_a_new_task_asked_beyond_any_trained_number_of_shots_is_marked(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=400, trained_shots={"other": 1})
    sweep = evaluate(asked, [make_task("animals")], shots=(1, 2), draws=1, queries=3)
    one_pass = one_pass_curve(asked, [make_task("animals")], episodes=1)
    for result in (sweep, one_pass):
        marks = {cell.shots: cell.extrapolated for cell in result.curves[0].points}
        assert (marks[1], marks[2]) == (False, True)


def test_a_model_that_gives_no_finite_likelihood_is_an_error_not_a_score(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    asked = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=400, trained_shots={})
    with pytest.raises(UserError, match="no finite likelihood"):
        evaluate(asked, [make_task("animals")], shots=(1,), draws=1, queries=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shots": ()}, {"shots": (-1,)}, {"shots": ("all",)}, {"draws": 0}, {"queries": 0},
    ],
)  # fmt: skip
def test_an_impossible_sweep_is_one_line(tokenizer, wrong):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError, match=r"^shots=.*, draws=.*, queries=.*: need shots from 0, and at least 1$"):
        evaluate(asked, [make_task("animals")], **wrong)


def test_a_number_of_shots_is_whole_or_fill(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError, match=r"^shots=1\.5: give a whole number, or 'fill'$"):
        evaluate(asked, [make_task("animals")], shots=(1.5,))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"episodes": 0}, "episodes=0, token_budget=200: need at least 1 episode, of 1 to 200 tokens"),
        ({"token_budget": 0}, "episodes=20, token_budget=0: need at least 1 episode"),
        ({"token_budget": 201}, "episodes=20, token_budget=201: need at least 1 episode, of 1 to 200 tokens"),
    ],
)
def test_an_impossible_one_pass_curve_is_one_line(tokenizer, wrong, told):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError) as refused:
        one_pass_curve(asked, [make_task("animals")], **wrong)
    assert str(refused.value).startswith(told)


@pytest.mark.slow
def test_the_same_shots_in_other_orders_are_told_apart_by_order_alone(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=400, trained_shots={})
    options = {"shots": (0, 6), "draws": 3, "queries": 4}
    task = make_task("animals")
    fixed, plain = (evaluate(asked, [task], **options, fixed_shots=fixed) for fixed in (6, None))
    last, same = (result.curves[0].points[-1] for result in (fixed, plain))
    assert len({one.shots_sha256 for one in last.draws}) == 3
    assert len({one.top_label_share for one in last.draws}) == 1
    assert last.draws[0] == same.draws[0]
    assert {p.query for p in fixed.curves[0].predictions} == {p.query for p in plain.curves[0].predictions}
    # Another order is another prompt: the likelihoods differ, or this would test nothing.
    nats = {p.draw: p.nll for p in fixed.curves[0].predictions if p.shots == 6}
    assert len(set(nats.values())) == 3
    assert (fixed.to_json()["fixed_shots"], "fixed_shots" in plain.to_json()) == (6, False)


@pytest.mark.parametrize(("fixed", "draws"), [(1, 2), (3, 2), (0, 2), (4, 1), ("fill", 2), ("all", 2)])
def test_fixed_shots_that_no_orders_can_be_compared_at_are_refused(tokenizer, fixed, draws):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError, match=rf"fixed_shots = {fixed}: needs one of the shot counts \[1, 4\] from 2"):
        evaluate(asked, [make_task("animals")], shots=(4, 1), draws=draws, fixed_shots=fixed)


@pytest.mark.slow
def test_a_flipped_task_is_asked_the_same_behind_the_same_shots_and_mapped_back(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=400, trained_shots={})
    task, flipped = make_task("animals"), flip_labels(make_task("animals"), seed=1)
    plans = [
        TaskSweep(tokenize_task(t, tokenizer=tokenizer), tokenizer=tokenizer, sweep=Sweep()) for t in (task, flipped)
    ]
    assert [d.tolist() for d in plans[0].draws] == [d.tolist() for d in plans[1].draws]
    back = {new: old for old, new in flip_map(task.labels, seed=1).items()}
    rows = [evaluate(asked, [t], shots=(0, 2), draws=1, queries=9).curves[0].predictions for t in (task, flipped)]
    assert [back[p.answer] for p in rows[1]] == [p.answer for p in rows[0]]
    zero = [[p.prediction for p in of if p.shots == 0] for of in rows]
    assert zero[0] == zero[1]  # without shots nothing told of the exchange
    follows, keeps = (
        sum(p.prediction == (p.answer if follow else back[p.answer]) for p in rows[1]) for follow in (True, False)
    )
    assert follows == sum(p.score for p in rows[1])
    assert follows + keeps <= len(rows[1])


def test_two_tasks_of_one_name_are_refused(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError, match="tasks animals, animals: two have one name"):
        evaluate(asked, [make_task("animals"), make_task("animals", answer="colour")])


def test_an_evaluation_says_which_kind_it_is(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    assert one_pass_curve(asked, [make_task("animals")], episodes=1).to_json()["kind"] == "one-pass"


# Draws ------------------------------------------------------------------------------------------------------------


def test_a_cell_says_what_its_draws_scored_and_what_they_held(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 2), num_draws=3, num_queries=10, max_tokens=200)
    curve = curve_of(tiny_model("llama"), task, tokenizer=tokenizer, sweep=sweep)
    zero, two = curve.points
    assert (zero.spread, zero.worst_draw, zero.best_draw) == (None, None, None)
    assert [(one.draw, one.top_label_share, one.num_missing_labels) for one in zero.draws] == [(0, None, None)]
    scores = [[p.score for p in curve.predictions if (p.shots, p.draw) == (2, draw)] for draw in range(3)]
    means = [sum(row) / 10 for row in scores]
    assert [one.score for one in two.draws] == pytest.approx(means)
    assert (two.worst_draw, two.best_draw) == (min(means), max(means))
    assert two.spread == pytest.approx(statistics.stdev(means))
    assert two.score == pytest.approx(statistics.mean(means))
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=sweep)
    for one, draw in zip(two.draws, plan.draws, strict=True):
        shots = [task.task.train[task.splits["train"].rows[i]] for i in draw[:2]]
        answers = {shot.answer for shot in shots}
        assert one.top_label_share == (0.5 if len(answers) == 2 else 1.0)
        assert one.num_missing_labels == 4 - len(answers)
        assert one.shots_sha256 == hashlib.sha256("\n".join(shot.id for shot in shots).encode()).hexdigest()


def test_every_choice_has_its_likelihood_and_a_generated_answer_says_if_it_was_cut(tokenizer):
    sweep = Sweep(shots=(1,), num_draws=2, num_queries=12, max_tokens=200)
    for task in (make_task("animals"), open_task()):
        tokenized = tokenize_task(task, tokenizer=tokenizer)
        curve = curve_of(tiny_model("llama"), tokenized, tokenizer=tokenizer, sweep=sweep)
        for p in curve.predictions:
            if task.labels:
                assert list(p.choice_nll) == list(task.labels)
                assert p.prediction == min(p.choice_nll, key=p.choice_nll.__getitem__)
                assert (p.nll, p.cut) == (p.choice_nll[p.answer], False)
            else:
                assert p.choice_nll is None
        (cell,) = curve.points
        assert cell.num_cut == sum(p.cut for p in curve.predictions) == sum(one.num_cut for one in cell.draws)
    assert cell.num_cut > 0  # a random model does not end its answers


@pytest.mark.slow
def test_copies_among_the_shots_are_counted_from_the_k_that_shows_them(tokenizer):
    task = make_task("animals")
    copied, near = task.test[0], task.test[1]
    long = "a tale that is told again and again of the owl who slept in the old oak tree by the mill"
    train = list(task.train)
    test = (*task.test[:1], replace(near, input=long), *task.test[2:])
    plan = TaskSweep(
        tokenize_task(replace(task, test=test, sha256="copies-0"), tokenizer=tokenizer),
        tokenizer=tokenizer,
        sweep=Sweep(shots=(0, 1, 4), num_draws=2, num_queries=10, max_tokens=500),
    )
    # The first draw shows the copy first and the near-duplicate third; the second draw is left as it comes.
    first, third = plan.draws[0][0], plan.draws[0][2]
    train[first], train[third] = copied, Example(input=long.upper() + "!", answer="owl")
    tokenized = tokenize_task(replace(task, train=tuple(train), test=test, sha256="copies-1"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 1, 4), num_draws=2, num_queries=10, max_tokens=500)
    curve = curve_of(tiny_model("llama"), tokenized, tokenizer=tokenizer, sweep=sweep)
    found = {
        (cell.shots, one.draw): (one.num_copies, one.num_near_copies) for cell in curve.points for one in cell.draws
    }
    second = [i in plan.draws[1][:4] for i in (first, third)]
    assert found[0, 0] == (0, 0)
    assert found[1, 0] == (1, 0)
    assert found[4, 0] == (1, 1)
    assert found[4, 1] == tuple(map(int, second))


@pytest.mark.slow
def test_a_draw_gone_on_with_gives_the_same_to_the_bit(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(shots=(0, 1, 4, 7), num_queries=5, max_tokens=400))
    engine = engine_of(tiny_model("gemma3"), tokenizer)
    whole = dict(answer_draw(engine, plan, draw=0))
    assert sorted(whole) == [0, 1, 4, 7]
    for finished in ((), (0,), (0, 1, 4), (1, 7), (0, 1, 4, 7)):
        rest = dict(answer_draw(engine, plan, draw=0, finished=finished))
        assert rest == {shots: rows for shots, rows in whole.items() if shots not in finished}


def test_a_missing_cell_is_null_never_zero(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 1), num_draws=2, num_queries=5, max_tokens=400)
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=sweep)
    rows = dict(answer_draw(engine_of(tiny_model("llama"), tokenizer), plan, draw=0))
    zero, one = make_curve(plan, {(0, 0): rows[0]}).points
    assert zero.num_scored == 5
    assert (one.score, one.worst_draw, one.num_scored, one.draws) == (None, None, 0, ())


def test_length_normalised_choice_takes_the_best_mean_of_a_tokens_nats(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    model = tiny_model("llama")
    lengths = {label: len(ids) for label, ids in write_answers(tokenizer, task.task.labels)}
    assert len(set(lengths.values())) > 1
    sweep = Sweep(shots=(2,), num_draws=1, num_queries=12, max_tokens=300)
    summed = curve_of(model, task, tokenizer=tokenizer, sweep=sweep).predictions
    mean = curve_of(
        model, task, tokenizer=tokenizer, sweep=replace(sweep, answering=AnswerSettings(normalize="tokens"))
    ).predictions
    assert [p.choice_nll for p in mean] == [p.choice_nll for p in summed]
    assert [p.prediction for p in summed] == [min(p.choice_nll, key=p.choice_nll.__getitem__) for p in summed]
    best = [min(p.choice_nll, key=lambda label, p=p: p.choice_nll[label] / lengths[label]) for p in mean]
    assert [p.prediction for p in mean] == best
    assert best != [p.prediction for p in summed]


def test_contextual_calibration_divides_by_the_answers_after_inputs_without_content(tokenizer):
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    model = tiny_model("llama")
    answering = AnswerSettings(calibrate="contextual")
    sweep = Sweep(shots=(0, 2), num_draws=1, num_queries=6, max_tokens=300, answering=answering)
    calibrated = curve_of(model, task, tokenizer=tokenizer, sweep=sweep).predictions
    own = TaskSweep(task, tokenizer=tokenizer, sweep=sweep)
    pairs = write_answers(tokenizer, task.task.labels)
    for shots in (0, 2):
        before = own.prefix_ids(0, start=0, stop=shots) if shots else []
        ids = np.concatenate([task.head_ids, before]).astype(np.int32)
        free = [
            score_whole_prompts(model, ids, [query], [[answer for _, answer in pairs]])[0]
            for query in write_queries(tokenizer, ("N/A", "[MASK]", ""), after_shots=shots > 0)
        ]
        prior = np.mean([np.exp(-nats) / np.exp(-nats).sum() for nats in free], axis=0)
        for p in [p for p in calibrated if p.shots == shots]:
            weights = np.exp(-np.array(list(p.choice_nll.values()))) / prior
            assert p.prediction == pairs[int(weights.argmax())][0]
            assert p.confidence == pytest.approx(weights.max() / weights.sum(), rel=1e-3)


def test_every_right_answer_counts_in_the_score_the_majority_and_the_metric_beside_it(tokenizer):
    task = make_task("animals")
    every = tuple(sorted(task.labels))
    test = tuple(replace(e, also_right=tuple(label for label in every if label != e.answer)) for e in task.test)
    tokenized = tokenize_task(replace(task, test=test, metric="exact_match", sha256="several"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 1), num_draws=2, num_queries=10, max_tokens=200)
    curve = curve_of(tiny_model("llama"), tokenized, tokenizer=tokenizer, sweep=sweep)
    assert [(cell.score, cell.majority_score) for cell in curve.points] == [(1.0, 1.0), (1.0, 1.0)]
