"""Random streams (A2): every one has its purpose in its seed, so evaluation never asks behind a training episode."""

from __future__ import annotations

import dataclasses
from itertools import combinations, product
from typing import get_args

import pytest

from manyicl.episodes.plan import EpisodeSettings, iter_episodes
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import lengths_of, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.drawing import draw_shots
from manyicl.seeds import AskPurpose, PlanPurpose, Purpose, make_seed, make_stream
from tests.conftest import make_task


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


@pytest.fixture(scope="module")
def task(tokenizer):
    """40 train rows, and as many test rows."""
    task = make_task("animals")
    return tokenize_task(dataclasses.replace(task, test=task.train), tokenizer=tokenizer)


def purposes() -> list[Purpose]:
    nested = get_args(Purpose)
    return [one for name in nested for one in (get_args(name) or (name,))]


def test_no_two_purposes_share_a_stream():
    assert {*get_args(PlanPurpose), *get_args(AskPurpose), "packing"} < set(purposes())
    parts = [(), ("animals",), ("animals", 0), ("animals", 1), ("shots", "animals", 0), ("order", "animals", 0)]
    named = [(purpose, seed, *rest) for purpose, seed, rest in product(purposes(), (0, 1), parts)]
    assert len({make_seed(*names) for names in named}) == len(named)
    starts = [tuple(make_stream(*names).integers(2**62, size=2)) for names in named]
    assert len(set(starts)) == len(named)


def test_parts_are_not_run_together_and_a_last_zero_counts():
    assert make_seed("evaluation", 1, "a", 0) != make_seed("evaluation", 1, "a")
    assert make_seed("evaluation", 1, "1") != make_seed("evaluation", 1, 1)
    assert make_seed("evaluation", 1, "a", "b") != make_seed("evaluation", 1, "ab")


def test_a_draw_of_shots_is_no_training_episode(task):
    """The review's case: equal seeds, one whole epoch an episode, draw d against the episode of epoch d."""
    settings = EpisodeSettings(token_budget=100_000)
    plan = iter_episodes([lengths_of(task)], settings=settings, seed=0)
    for number in range(8):
        episode = next(plan)
        assert (episode.epoch, len(episode.examples)) == (number, 40)
        assert all(draw_shots(task, seed=0, draw=draw)[:8].tolist() != episode.examples[:8].tolist() for draw in (0, 1))
        assert draw_shots(task, seed=0, draw=number)[:8].tolist() != episode.examples[:8].tolist()


def test_plans_of_different_purposes_differ(task):
    settings = EpisodeSettings(token_budget=100_000)
    plans = [
        next(iter_episodes([lengths_of(task)], settings=settings, seed=0, purpose=purpose)).examples.tolist()
        for purpose in get_args(PlanPurpose)
    ]
    assert all(one != other for one, other in combinations(plans, 2))


def test_the_order_of_queries_is_not_that_of_the_first_draw(tokenizer, task):
    """Where a task has as many train as test rows both are permutations of one length."""
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(shots=(0,), num_queries=40, num_draws=1))
    assert sorted(plan.wanted.tolist()) == sorted(plan.draws[0].tolist()) == list(range(40))
    assert plan.wanted.tolist() != plan.draws[0].tolist()


def test_settings_are_chosen_behind_other_draws_than_those_reported(tokenizer, task):
    reported, choosing = (
        TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(shots=(4,), num_draws=2, purpose=purpose))
        for purpose in ("evaluation", "choice of settings")
    )
    assert all(one.tolist() != other.tolist() for one, other in zip(reported.draws, choosing.draws, strict=True))
