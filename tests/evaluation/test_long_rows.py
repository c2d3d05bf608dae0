"""Rows too long for a sequence (review finding A6) are no shots and no queries, and are counted wherever one asks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from manyicl.cli import app
from manyicl.cli.tables.results import evaluation_table
from manyicl.console import make_console
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate, one_pass_curve
from manyicl.evaluation.sweep import LONG_TEST, Sweep, TaskSweep, refuse_empty, tokens_kept_for_query
from manyicl.inference.answering.questions import ask
from manyicl.inference.drawing import LONG_TRAIN
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import Example, Task
from tests.conftest import make_task


@pytest.fixture(scope="module")
def asked():
    return load_for_inference("seed", max_tokens=512)


def stretch(task: Task, *, train: tuple[int, ...] = (), test: tuple[int, ...] = (), times: int = 400) -> Task:
    """Return the task with the inputs of some rows made many times as long."""

    def longer(examples: tuple[Example, ...], rows: tuple[int, ...]) -> tuple[Example, ...]:
        return tuple(
            replace(example, input=" ".join([example.input] * times)) if row in rows else example
            for row, example in enumerate(examples)
        )

    sha = f"{task.sha256}-{train}-{test}-{times}"
    return replace(task, train=longer(task.train, train), test=longer(task.test, test), sha256=sha)


def plan_of(tokenizers, task: Task, **options) -> TaskSweep:
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    return TaskSweep(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer, sweep=Sweep(**options))


def test_one_long_train_row_takes_no_number_of_shots_away(tokenizers):
    """A6's own case: one train row of 400 times the length, and 16 shots were gone with five draws."""
    task = make_task("animals")  # 40 train rows
    plain = plan_of(tokenizers, task, shots=(0, 1, 4, 16), max_tokens=512)
    spoilt = plan_of(tokenizers, stretch(task, train=(7,)), shots=(0, 1, 4, 16), max_tokens=512)
    assert spoilt.asked_shots == plain.asked_shots == (0, 1, 4, 16)
    assert spoilt.queries.tolist() == plain.queries.tolist()
    assert spoilt.left_out == {LONG_TRAIN: 1}
    assert plain.left_out == {}
    for draw, other in zip(plain.draws, spoilt.draws, strict=True):
        assert other.tolist() == [shot for shot in draw.tolist() if shot != 7]


def test_a_train_row_that_fits_but_leaves_no_room_for_a_query_is_no_shot(tokenizers):
    task = make_task("animals")
    task = stretch(task, train=(7,), times=20)
    tokenized = plan_of(tokenizers, task).tokenized
    room = len(tokenized.head_ids) + int(tokenized.splits["train"].lengths[7])  # just enough for it alone
    plan = plan_of(tokenizers, task, shots=(0, 1), max_tokens=room)
    assert plan.left_out == {LONG_TRAIN: 1}
    assert all(7 not in draw for draw in plan.draws)


def test_long_test_rows_are_counted_and_the_others_are_asked(tokenizers):
    """A quarter of the test rows does not fit; the sweep was refused, although all others did."""
    task = make_task("animals")  # 10 test rows
    plan = plan_of(tokenizers, stretch(task, test=(0, 3, 6)), shots=(0, 4), max_tokens=512)
    assert sorted(plan.queries.tolist()) == [1, 2, 4, 5, 7, 8, 9]
    assert plan.left_out == {LONG_TEST: 3}
    assert (plan.num_unfit, plan.asked_shots) == (0, (0, 4))


def test_queries_are_drawn_from_the_rows_that_fit(tokenizers):
    task = make_task("animals")
    plan = plan_of(tokenizers, stretch(task, test=(0, 3, 6)), shots=(0,), max_tokens=512, num_queries=7)
    assert len(plan.queries) == 7


@pytest.mark.parametrize(
    ("needs", "kept"),
    [
        ([10] * 20, 10),
        ([10] * 19 + [24], 24),  # the longest decides
        ([10] * 19 + [90], 10),  # but not one that needs more than a quarter of 100 tokens
        ([10] * 17 + [90] * 3, 90),  # three of 20 are more than a tenth
        ([], 0),
    ],
)
def test_room_is_kept_for_the_longest_query_but_for_few_very_long_ones(needs, kept):
    assert tokens_kept_for_query(np.array(needs, dtype=np.int64), max_tokens=100) == kept


@pytest.mark.parametrize(
    ("change", "shots", "why"),
    [
        ({"test": ()}, 0, "it has no test rows"),
        ({}, 41, "it has only 40 train rows"),
        ({"train": ()}, 1, "it has only 0 train rows"),
        ({}, 40, "they do not fit 512 tokens"),
        ({}, 4, ""),
    ],
)
def test_a_number_of_shots_that_is_not_asked_has_its_true_reason(tokenizers, change, shots, why):
    task = replace(make_task("animals"), sha256=f"why {sorted(change)}", **change)
    plan = plan_of(tokenizers, task, shots=(shots,), max_tokens=512)
    assert plan.why_not(shots) == why


def test_rows_too_long_are_the_reason_where_they_are(tokenizers):
    task = make_task("animals")
    plan = plan_of(tokenizers, stretch(task, train=tuple(range(30))), shots=(0, 16), max_tokens=512)
    assert plan.why_not(16) == "only 10 of its 40 train rows are short enough for 512 tokens"
    none = plan_of(tokenizers, stretch(task, test=tuple(range(10))), shots=(0,), max_tokens=512)
    assert none.why_not(0) == "none of its 10 test rows fits 512 tokens"
    with pytest.raises(
        UserError, match="task 'animals' at 0 shots: none of its 10 test rows fits 512 tokens; add rows"
    ):
        refuse_empty([none])


def test_a_task_without_test_rows_is_not_sent_to_fewer_shots(tokenizers):
    task = replace(make_task("animals"), test=(), sha256="untested")
    with pytest.raises(UserError, match=r"it has no test rows; give some rows the split 'test', or name no splits$"):
        refuse_empty([plan_of(tokenizers, task, shots=(0, 16), max_tokens=512)])


def test_an_evaluation_counts_what_it_leaves_out_in_its_file_and_its_table(asked, tmp_path):
    task = stretch(make_task("animals"), train=(0, 5), test=(1,))
    result = evaluate(asked, [task], shots=(0, 4, 99), draws=2, queries=5, out=tmp_path / "r.json")
    entry = json.loads((tmp_path / "r.json").read_text())["tasks"][0]
    assert entry["left_out"] == {LONG_TRAIN: 2, LONG_TEST: 1}
    assert [cell["why_not"] for cell in entry["curve"]] == ["", "", "it has only 40 train rows"]
    console = make_console()
    with console.capture() as captured:
        console.print(evaluation_table(result))
    shown = captured.get()
    assert "animals: 2 train rows too long to be shots" in shown
    assert "animals: 1 test rows too long to be asked" in shown
    assert "animals: not asked at 99 shots: it has only 40 train rows" in shown


def test_ask_uses_every_row_that_fits_with_every_seed_and_says_how_many(asked):
    """A6: as many as 61 and as few as 3 shots, by the seed, where all others would fit."""
    task = stretch(make_task("animals", num_examples=30), train=(2, 9))  # 20 train rows, 18 of them short
    for seed in range(5):
        (answer,) = ask(asked, task, ["the red fox 7"], seed=seed)
        assert (answer.shots, answer.left_out) == (18, {LONG_TRAIN: 2})


def test_ask_with_more_shots_than_there_are_train_rows_says_so(asked):
    with pytest.raises(UserError, match="shots=64: task 'animals' has only 20 train rows; lower `shots`"):
        ask(asked, make_task("animals", num_examples=30), ["the red fox 7"], shots=64)


@pytest.mark.slow
def test_a_one_pass_curve_counts_the_rows_it_leaves_out(asked):
    task = stretch(make_task("animals"), test=(1, 2))
    result = one_pass_curve(asked, [task], episodes=1)
    assert result.curves[0].left_out == {LONG_TEST: 2}
    with pytest.raises(UserError, match=r"none of its 10 test rows fits 512 tokens \(the shortest needs"):
        one_pass_curve(asked, [stretch(task, test=tuple(range(10)))], episodes=1)


@pytest.mark.slow
def test_check_and_ask_tell_of_long_rows_on_the_command_line(tmp_path):
    rows = [{"input": f"the lamp is {word} {i}", "answer": word} for i in range(30) for word in ("bent", "new")]
    rows[4]["input"] *= 4000
    split = ["train"] * 50 + ["test"] * 10
    lines = [json.dumps(row | {"split": part}) for row, part in zip(rows, split, strict=True)]
    (tmp_path / "lamps.jsonl").write_text("\n".join(lines) + "\n")
    runner = CliRunner()
    checked = runner.invoke(app.app, ["check", str(tmp_path), "--model", "seed"])
    assert "usable, but 1 train rows too long to be shots (longest sequence: 4,096 tokens)" in checked.stdout
    command = ["ask", "seed", "--tasks", str(tmp_path), "--task", "lamps"]
    answered = runner.invoke(app.app, command, input="the lamp is bent\n")
    assert answered.stderr.startswith("shots: ")
    assert answered.stderr.endswith("train rows; 1 train rows too long to be shots\n")
    assert len(answered.stdout.splitlines()) == 1
    told = json.loads(runner.invoke(app.app, [*command, "--json"], input="the lamp is bent\n").stdout)
    assert told["left_out"] == {LONG_TRAIN: 1}
