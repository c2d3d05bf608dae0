"""`fill`, as many shots as fit, is a number of shots like any other (review finding A7)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from manyicl.cli import evaluate as evaluate_commands
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.difference import compare_results, tell_difference
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.results import Evaluation
from manyicl.evaluation.shots import FILL, sort_shots
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.answering.questions import ask
from manyicl.inference.drawing import prefix_lengths
from manyicl.inference.model import load_for_inference
from tests.conftest import make_task


def plan_of(tokenizers, task, **options) -> TaskSweep:
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    return TaskSweep(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer, sweep=Sweep(**options))


def test_fill_stands_last_among_the_numbers_of_shots():
    assert sort_shots([16, FILL, 0, 4, 16]) == [0, 4, 16, FILL]
    assert evaluate_commands.parse_shots("0,4, fill") == (0, 4, FILL)
    with pytest.raises(UserError, match="--shots 0,full: write numbers separated by commas, and fill for as many"):
        evaluate_commands.parse_shots("0,full")


def test_each_draw_is_filled_as_far_as_it_fits_and_no_further(tokenizers):
    task = make_task("animals")
    plan = plan_of(tokenizers, task, shots=(0, 4, FILL), num_draws=4, max_tokens=300)
    test = plan.tokenized.splits["test"]
    longest = max(test.lengths[q] for q in plan.queries)  # all labels of this task are one token
    for draw, num_shots in enumerate(plan.num_filling):
        ends = prefix_lengths(plan.tokenized, plan.draws[draw])
        assert 4 < num_shots < 40
        assert ends[num_shots] + longest <= 300 < ends[num_shots + 1] + longest
    assert plan.points[:3] == [(0, 0), (0, 4), (0, FILL)]
    assert plan.num_unfit == 0


def test_fill_is_all_rows_where_all_fit_and_is_not_asked_where_none_does(tokenizers):
    task = make_task("animals", num_examples=30)  # 20 train rows
    assert plan_of(tokenizers, task, shots=(FILL,), num_draws=2, max_tokens=2000).num_filling == [20, 20]
    tiny = plan_of(tokenizers, task, shots=(0, FILL), max_tokens=30)
    assert tiny.asked_shots == (0,)
    assert tiny.why_not(FILL).startswith("none of its 20 train rows is short enough")


def test_the_same_shots_in_other_orders_may_fill(tokenizers):
    task = make_task("animals")
    plan = plan_of(tokenizers, task, shots=(FILL,), num_draws=3, max_tokens=300, fixed_shots="most")
    num_shots = plan.num_filling[0]
    assert plan.num_filling == [num_shots] * 3
    assert len({tuple(draw[:num_shots].tolist()) for draw in plan.draws}) == 3
    assert len({frozenset(draw[:num_shots].tolist()) for draw in plan.draws}) == 1


@pytest.mark.slow
def test_an_evaluation_writes_fill_as_a_cell_of_its_own_and_two_are_compared_by_it(tmp_path):
    asked = load_for_inference("seed", max_tokens=300)
    tasks = [make_task("animals"), replace(make_task("few", num_examples=12), sha256="few")]  # 40 and 8 train rows
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        evaluate(asked, tasks, shots=(0, 4, FILL), draws=2, queries=4, out=file)
    animals, few = json.loads(files[0].read_text())["tasks"]
    assert [cell["shots"] for cell in animals["curve"]] == [0, 4, "fill"]
    assert few["curve"][-1]["mean_shots"] == 8
    filled = animals["curve"][-1]
    assert filled["mean_shots"] == sum(draw["num_shots"] for draw in filled["draws"]) / 2 > 8
    result = Evaluation.load(files[0])
    assert {(p.task, p.shots) for p in result.predictions if p.asked == FILL and p.task == "few"} == {("few", 8)}
    difference = compare_results(result, Evaluation.load(files[1]))
    assert [mean.shots for mean in difference.means] == [0, 4, FILL]
    assert "with as many shots as fit, mean of 2 tasks" in tell_difference(difference.means[-1])


def test_ask_is_filled_as_an_evaluation_is():
    asked = load_for_inference("seed", max_tokens=300)
    task = make_task("animals")
    plan = TaskSweep(
        tokenize_task(task, tokenizer=asked.tokenizer), tokenizer=asked.tokenizer,
        sweep=Sweep(shots=(FILL,), num_draws=1, num_queries=50, max_tokens=300),
    )  # fmt: skip
    longest = max(plan.queries, key=lambda q: plan.tokenized.splits["test"].lengths[q])
    (answer,) = ask(asked, task, [task.test[longest].input])
    assert answer.shots - plan.num_filling[0] in (0, 1)  # what ask needs is counted to the token
