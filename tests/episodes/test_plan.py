"""The plan of episodes: exact coverage, budgets, shares of the mixture, and that it depends on nothing else."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, islice, pairwise, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from manyicl.episodes.plan import (
    Episode,
    EpisodeSettings,
    TaskLengths,
    find_usable,
    iter_episodes,
)
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import join_examples, lengths_of, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from tests.conftest import make_task
from tests.episodes.test_template import CHATML, chat_tokenizer


def task_of(name: str, lengths: Sequence[int], *, head: int = 0, between: int = 0) -> TaskLengths:
    return TaskLengths(
        name=name, num_head_tokens=head, num_between=between, lengths=np.asarray(list(lengths), dtype=np.int64)
    )


def first_episodes(
    tasks: TaskLengths | Sequence[TaskLengths], num_episodes: int, *, seed: int = 0, **options
) -> list[Episode]:
    tasks = [tasks] if isinstance(tasks, TaskLengths) else tasks
    return list(islice(iter_episodes(tasks, settings=EpisodeSettings(**options), seed=seed), num_episodes))


def one_epoch(task: TaskLengths, *, seed: int = 0, **options) -> list[Episode]:
    plan = iter_episodes([task], settings=EpisodeSettings(**options), seed=seed)
    return list(takewhile(lambda episode: episode.epoch == 0, plan))


def written_out(episodes: Sequence[Episode]) -> list[tuple]:
    return [(e.index, e.task, e.epoch, e.examples.tolist(), e.num_tokens) for e in episodes]


# --- coverage and budget -----------------------------------------------------------------------------------------

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=25)
all_shots = st.sampled_from(["fill", 0, 1, 3, (0, 0), (0, 7), (2, 5)])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(lengths_lists, min_size=1, max_size=3),
    heads=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=3, max_size=3),
    budget=st.integers(50, 120),
    shots=all_shots,
    mixture=st.sampled_from(["proportional", "uniform"]),
    seed=st.integers(0, 2**40),
)
def test_each_epoch_of_a_task_uses_each_example_once_within_the_budget(lengths, heads, budget, shots, mixture, seed):
    tasks = {
        f"t{n}": task_of(f"t{n}", of_task, head=heads[n][0], between=heads[n][1]) for n, of_task in enumerate(lengths)
    }
    used: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, episode in enumerate(
        first_episodes(list(tasks.values()), 80, seed=seed, token_budget=budget, shots=shots, mixture=mixture)
    ):
        task = tasks[episode.task]
        assert episode.index == number
        assert len(set(episode.examples.tolist())) == len(episode.examples) > 0
        whole = task.num_head_tokens - task.num_between + task.lengths[episode.examples].sum()
        assert episode.num_tokens == whole <= budget
        used[episode.task, episode.epoch] += episode.examples.tolist()
    last = {name: max(epoch for task, epoch in used if task == name) for name, _ in used}
    for (name, epoch), examples in used.items():
        everything = list(range(len(tasks[name].lengths)))
        if epoch < last[name]:
            assert sorted(examples) == everything
        else:  # not finished within the first 80 episodes
            assert len(set(examples)) == len(examples) <= len(everything)
    assert set(used) == {(name, epoch) for name in last for epoch in range(last[name] + 1)}


def test_fill_leaves_no_room_for_the_next_example():
    task = task_of("a", np.random.default_rng(0).integers(1, 30, 200), head=7, between=2)
    episodes = one_epoch(task, token_budget=100)
    assert len(episodes) > 10
    for episode, following in pairwise(episodes):
        assert episode.num_tokens + task.lengths[following.examples[0]] > 100


def test_an_example_that_fits_to_the_token_is_used_and_one_token_more_is_dropped():
    # Alone, an example costs the head (10) and its length, less the 3 tokens that only stand between two.
    task = task_of("a", [43, 44, 5], head=10, between=3)
    assert find_usable([task], token_budget=50)["a"].tolist() == [0, 2]
    assert {n for e in first_episodes(task, 20, token_budget=50) for n in e.examples.tolist()} == {0, 2}
    assert max(e.num_tokens for e in first_episodes(task, 20, token_budget=50)) == 50


def test_a_task_of_which_no_example_fits_is_refused_by_name():
    tasks = [task_of("short", [10]), task_of("long", [60, 51, 70], head=5)]
    with pytest.raises(UserError, match=r"task 'long': .*token_budget = 55 .*shortest needs 56.*; raise") as error:
        first_episodes(tasks, 1, token_budget=55)
    assert "\n" not in str(error.value)
    assert len(first_episodes(tasks, 3, token_budget=56)) == 3


def test_a_task_without_examples_is_refused():
    with pytest.raises(UserError, match="task 'empty': no train example"):
        first_episodes(task_of("empty", []), 1)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_the_tokens_of_an_episode_are_the_ids_that_are_built(style, tokenizers):
    tokenizer = TaskTokenizer(chat_tokenizer(tokenizers["bpe"], CHATML), TemplateSettings(style=style))
    tokenized = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    for episode in first_episodes(lengths_of(tokenized), 30, token_budget=200, shots=(0, 9)):
        built = join_examples(tokenized, split="train", indices=episode.examples)
        assert len(built.ids) == episode.num_tokens <= 200
        assert len(built.spans) == len(episode.examples)


# --- order -------------------------------------------------------------------------------------------------------


def test_every_epoch_has_a_new_order_and_new_companions():
    task = task_of("a", [10] * 60)
    epochs: dict[int, list[list[int]]] = defaultdict(list)
    for episode in first_episodes(task, 60, token_budget=60):
        epochs[episode.epoch].append(episode.examples.tolist())
    assert [len(epochs[n]) for n in range(6)] == [10] * 6
    orders = [[n for examples in epochs[epoch] for n in examples] for epoch in range(6)]
    assert len({tuple(order) for order in orders}) == 6
    companions = [
        {frozenset((a, b)) for examples in epochs[n] for a in examples for b in examples if a < b} for n in range(6)
    ]
    # 150 pairs of 1,770 stand together in an epoch; of them some 13 should meet again in the next.
    for one, other in pairwise(companions):
        assert len(one & other) < 40


def test_a_plan_as_it_is_written_out():
    # Fixed: a resumed run must find the plan that it began with. Whoever changes it raises seeds.STREAMS.
    tasks = [task_of("a", [10, 20, 30, 40, 50]), task_of("b", [5, 5, 5], head=2)]
    assert written_out(first_episodes(tasks, 7, token_budget=60, mixture="proportional")) == [
        # index, task, epoch, examples, tokens
        (0, "a", 0, [4], 50),
        (1, "a", 0, [3, 0], 50),
        (2, "b", 0, [2, 0, 1], 17),
        (3, "a", 0, [1, 2], 50),
        (4, "a", 1, [0, 1], 30),
        (5, "a", 1, [4], 50),
        (6, "b", 1, [1, 0, 2], 17),
    ]


def test_the_same_seed_gives_the_same_plan_and_another_seed_another():
    tasks = [task_of("a", range(1, 40), head=3), task_of("b", [10] * 30)]
    options = {"token_budget": 80, "shots": (0, 6)}
    plans = [written_out(first_episodes(tasks, 50, seed=seed, **options)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_the_order_in_which_tasks_are_given_changes_nothing():
    tasks = [task_of("a", range(1, 40), head=3), task_of("b", [10] * 30), task_of("c", [7] * 5)]
    assert written_out(first_episodes(tasks, 60, token_budget=50)) == written_out(
        first_episodes(tasks[::-1], 60, token_budget=50)
    )


@pytest.mark.parametrize("shots", ["fill", 2, (0, 6)])
@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_a_tasks_own_episodes_are_the_same_in_any_company(shots, mixture):
    options = {"token_budget": 80, "shots": shots, "mixture": mixture}
    a, b = task_of("a", range(1, 40), head=3), task_of("b", [10] * 30)
    alone = [e[2:] for e in written_out(first_episodes(a, 20, **options))]
    mixed = [e[2:] for e in written_out(first_episodes([a, b], 100, **options)) if e[1] == "a"]
    assert mixed[:20] == alone


def test_tasks_of_equal_lengths_have_orders_of_their_own():
    tasks = [task_of(name, [10] * 30) for name in ("a", "b")]
    orders = {e.task: e.examples.tolist() for e in first_episodes(tasks, 2, token_budget=300)}
    assert orders["a"] != orders["b"]


def test_which_answers_are_targets_switches_nothing_in_the_plan():
    tasks = [task_of("a", range(1, 40), head=3), task_of("b", [10] * 30)]
    options = {"token_budget": 80, "shots": (0, 6)}
    assert written_out(first_episodes(tasks, 50, targets="all", **options)) == written_out(
        first_episodes(tasks, 50, targets="last", **options)
    )


# --- shots -------------------------------------------------------------------------------------------------------


def test_fixed_shots_give_one_example_more_and_the_rest_at_the_end_of_an_epoch():
    assert [len(e.examples) for e in one_epoch(task_of("a", [10] * 20), token_budget=1000, shots=5)] == [6, 6, 6, 2]


def test_no_shots_give_single_examples():
    assert [len(e.examples) for e in one_epoch(task_of("a", [10] * 20), token_budget=1000, shots=0)] == [1] * 20


def test_the_budget_comes_before_the_shots():
    assert [len(e.examples) for e in one_epoch(task_of("a", [10] * 20), token_budget=49, shots=5)] == [4] * 5


def test_a_range_of_one_number_is_that_number():
    task = task_of("a", [10] * 20)
    assert written_out(one_epoch(task, token_budget=1000, shots=(5, 5))) == written_out(
        one_epoch(task, token_budget=1000, shots=5)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(0, 15), (3, 10)])
def test_a_range_of_shots_is_log_uniform_in_the_number_of_examples(low, high):
    counts: Counter[int] = Counter()
    for seed in range(40):
        episodes = one_epoch(task_of("a", [1] * 1000), token_budget=1000, shots=(low, high), seed=seed)
        counts.update(len(e.examples) for e in episodes[:-1])
    total = sum(counts.values())
    assert total > 5000
    assert set(counts) == set(range(low + 1, high + 2))
    for number in counts:
        share = np.log((number + 1) / number) / np.log((high + 2) / (low + 1))
        assert counts[number] / total == pytest.approx(share, abs=4 * np.sqrt(share / total))


@pytest.mark.parametrize("shots", [-1, (5, 2), (-1, 3), "many", 1.5])
def test_shots_that_are_no_count_or_range_are_refused(shots):
    with pytest.raises(ValidationError):
        EpisodeSettings(shots=shots)


def test_an_empty_budget_is_refused():
    with pytest.raises(ValidationError):
        EpisodeSettings(token_budget=0)


# --- the mixture -------------------------------------------------------------------------------------------------

MIXED = [
    # Short examples under a long instruction, a task that fits one episode, a large one, and long examples.
    task_of("long head", [12] * 80, head=60),
    task_of("tiny", [10] * 9, head=4),
    task_of("large", [20, 30, 40] * 150, head=5),
    task_of("long examples", [300, 200] * 10, head=2, between=2),
]


def widest_gap(steps: Sequence[tuple[str, float]]) -> float:
    """Return by how many steps of both any task was ever ahead of any other: 0 is level, 1 is one step of each."""
    largest = {name: max(step for n, step in steps if n == name) for name, _ in steps}
    done = dict.fromkeys(largest, 0.0)
    widest = 0.0
    for name, step in steps:
        done[name] += step
        for a, b in combinations(done, 2):
            widest = max(widest, abs(done[a] - done[b]) / (largest[a] + largest[b]))
    return widest


@pytest.mark.slow
@pytest.mark.parametrize("shots", ["fill", 0, (0, 15)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_proportional_brings_all_tasks_to_the_end_of_their_epochs_together(shots, seed):
    lengths = {task.name: task.lengths for task in MIXED}
    plan = first_episodes(MIXED, 1200, token_budget=1024, shots=shots, seed=seed, mixture="proportional")
    assert {episode.task for episode in plan} == set(lengths)
    steps = [(e.task, lengths[e.task][e.examples].sum() / lengths[e.task].sum()) for e in plan]
    # Each task is within one episode of the common point, so any two are within one episode of each.
    assert widest_gap(steps) <= 1 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("shots", ["fill", 0, (0, 15)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_gives_every_task_the_same_tokens_to_within_one_episode(shots, seed):
    plan = first_episodes(MIXED, 1200, token_budget=1024, shots=shots, seed=seed, mixture="uniform")
    assert {episode.task for episode in plan} == {task.name for task in MIXED}
    assert widest_gap([(episode.task, episode.num_tokens) for episode in plan]) <= 1


def test_tasks_of_one_size_do_not_always_come_in_the_same_order():
    tasks = [task_of(name, [10] * 30) for name in "abc"]
    begins = {"".join(e.task for e in first_episodes(tasks, 3, seed=s, token_budget=60)) for s in range(40)}
    assert begins == {"abc", "acb", "bac", "bca", "cab", "cba"}


# --- what was planned before stays planned -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sha256"),
    [
        ({"mixture": "proportional"}, "e452d75777b14d5b"),
        ({"shots": (0, 15), "mixture": "proportional"}, "8475e184516dd05a"),
        ({"shots": 5, "mixture": "uniform"}, "46dd89fdc4d518a3"),
    ],
)
def test_the_plan_stays_what_it_is_and_renames_nothing_unless_it_should(options, sha256):
    digest = hashlib.sha256()
    episodes = EpisodeSettings(token_budget=1024, **options)
    for e in islice(iter_episodes(MIXED, settings=episodes, seed=7), 2000):
        digest.update(repr((e.index, e.task, e.epoch, e.examples.tolist(), e.num_tokens)).encode())
        assert e.names is None
    assert digest.hexdigest()[:16] == sha256
