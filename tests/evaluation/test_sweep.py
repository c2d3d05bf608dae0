"""What a sweep asks: its draws, its queries and what fits."""

from __future__ import annotations

import numpy as np
import pytest

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import join_examples, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.sweep import Sweep, TaskSweep, refuse_empty
from manyicl.inference.drawing import draw_shots, most_answer_tokens, prefix_lengths, reorder_shots, write_answers
from tests.conftest import make_task


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


@pytest.fixture(scope="module")
def task(tokenizer):
    return tokenize_task(make_task("animals"), tokenizer=tokenizer)


def test_the_same_seed_asks_the_same_and_another_seed_something_else(tokenizer, task):
    plans = [TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(seed=seed, num_queries=5)) for seed in (0, 0, 1)]
    assert plans[0].queries.tolist() == plans[1].queries.tolist()
    assert [d.tolist() for d in plans[0].draws] == [d.tolist() for d in plans[1].draws]
    assert plans[0].draws[0].tolist() != plans[2].draws[0].tolist()
    assert plans[0].draws[0].tolist() != plans[0].draws[1].tolist()


def test_a_draw_depends_on_neither_the_other_draws_nor_the_window(tokenizer, task):
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(num_draws=3, num_queries=5, max_tokens=100))
    assert draw_shots(task, seed=0, draw=2).tolist() == plan.draws[2].tolist()
    assert sorted(plan.draws[2].tolist()) == list(range(40))


def test_without_shots_all_draws_are_one(tokenizer, task):
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(shots=(4, 0, 1, 1), num_draws=3, max_tokens=400))
    assert plan.shots_of(0) == (0, 1, 4)
    assert plan.shots_of(2) == (1, 4)
    assert plan.points == [(0, 0), (0, 1), (0, 4), (1, 1), (1, 4), (2, 1), (2, 4)]


def test_the_queries_are_named_by_their_examples(tokenizer, task):
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(num_queries=4, shots=(0,)))
    assert plan.query_ids == [task.task.test[q].id for q in plan.queries]  # no test row was dropped here


def test_lengths_of_prefixes_are_those_of_the_joined_shots(task):
    draw = np.array([3, 1, 7])
    lengths = prefix_lengths(task, draw)
    joined = [len(join_examples(task, split="train", indices=draw[:k].astype(np.int32)).ids) for k in range(4)]
    assert lengths.tolist() == joined  # the plain style writes nothing between two examples


def test_an_answer_takes_as_many_tokens_as_the_longest_there_is(tokenizer, task):
    written = write_answers(tokenizer, ["owl", "a longer answer", "ends\n\ntoo early"])
    assert [text for text, _ in written] == ["owl", "a longer answer"]
    assert most_answer_tokens(task, written) == len(written[1][1])
    assert most_answer_tokens(task, None) == max(task.splits["train"].answer_lengths)
    assert most_answer_tokens(task, []) == 0
    assert most_answer_tokens(task, None, limit=1000) == 1000  # --max-new-tokens; more than any train answer has
    assert most_answer_tokens(task, written, limit=1) == len(written[1][1])  # known answers are never cut


# --- the same shots in other orders ------------------------------------------------------------------------------


def test_fixed_shots_are_those_of_the_first_draw_in_every_draw_each_in_its_own_order(tokenizer, task):
    fixed = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep((0, 8), 4, 5, max_tokens=400, fixed_shots=8))
    plain = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep((0, 8), 4, 5, max_tokens=400))
    first = plain.draws[0].tolist()
    assert fixed.draws[0].tolist() == first
    assert len({tuple(draw[:8].tolist()) for draw in fixed.draws}) == 4
    for draw in fixed.draws:
        assert sorted(draw[:8].tolist()) == sorted(first[:8])
        assert draw[8:].tolist() == first[8:]
    assert fixed.queries.tolist() == plain.queries.tolist()


def test_an_order_depends_on_neither_the_other_draws_nor_what_else_is_asked(tokenizer, task):
    few = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep((8,), 2, 5, seed=3, fixed_shots=8))
    many = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep((0, 4, 8), 5, 9, seed=3, fixed_shots=8))
    assert few.draws[1].tolist() == many.draws[1].tolist()


def test_without_fixed_shots_the_draws_are_as_they_always_were(tokenizer, task):
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep((4,), 3, 5))
    assert [d.tolist() for d in plan.draws] == [draw_shots(task, seed=0, draw=draw).tolist() for draw in range(3)]


def test_more_fixed_shots_than_there_are_examples_are_all_of_them():
    assert sorted(reorder_shots(np.arange(5), num_fixed=9, rng=np.random.default_rng(1))) == [0, 1, 2, 3, 4]


def test_a_sweep_that_asks_nothing_of_any_task_is_refused(tokenizer, task):
    def plan(**options):
        return TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(num_queries=5, **options))

    some, none, short = plan(shots=(0, 4)), plan(shots=(41,), max_tokens=9999), plan(shots=(0, 4), max_tokens=8)
    refuse_empty([none, some])
    with pytest.raises(UserError, match="task 'animals' at 41 shots: it has only 40 train rows; add rows that fit"):
        refuse_empty([none])
    with pytest.raises(UserError, match="task 'animals' at 0 shots: none of its 10 test rows fits 8 tokens; task"):
        refuse_empty([short, short])
