"""Mixtures: shares by weight and temperature, caps on rows, and that plans without them are what they always were."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.episodes.plan import PLAIN_MIXING, EpisodeSettings, Mixing, Mixture, TaskLengths, cap_rows, iter_episodes

BUDGET = 120


def make_tasks() -> list[TaskLengths]:
    """Three tasks of 40, 300 and 90 examples of 3 to 25 tokens, with a head of 7."""
    return [
        TaskLengths(name, 7, 2, np.array([3 + (i * step) % 23 for i in range(size)]))
        for name, size, step in (("a", 40, 5), ("b", 300, 7), ("c", 90, 11))
    ]


def plan(
    num_episodes: int, *, mixing: Mixing = PLAIN_MIXING, seed: int = 5, mixture: Mixture = "proportional", **options
):
    settings = EpisodeSettings(token_budget=BUDGET, mixture=mixture, **options)
    episodes = iter_episodes(make_tasks(), settings=settings, seed=seed, mixing=mixing)
    return list(islice(episodes, num_episodes))


def shares_of(episodes, *, with_heads: bool) -> dict[str, float]:
    """Return the fraction of the tokens of each task."""
    lengths = {task.name: task.lengths for task in make_tasks()}
    tokens: Counter[str] = Counter()
    for one in episodes:
        tokens[one.task] += one.num_tokens if with_heads else int(lengths[one.task][one.examples].sum())
    return {name: count / tokens.total() for name, count in sorted(tokens.items())}


# Written down before there were weights, temperatures and caps.
@pytest.mark.parametrize(
    ("options", "sha256"),
    [
        ({}, "1e299075448c4cfd"),
        ({"mixture": "uniform"}, "6d6651b90bd34dc5"),
        ({"shots": (1, 6)}, "addbe7953a0c9009"),
    ],
)
def test_old_recipes_plan_the_very_same_episodes(options, sha256):
    lines = [(e.task, e.epoch, e.examples.tolist(), e.num_tokens) for e in plan(200, **options)]
    assert hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16] == sha256


def test_a_weight_multiplies_the_share_of_a_task():
    found = shares_of(plan(3000, mixture="uniform", mixing=Mixing({"a": 2.0})), with_heads=True)
    assert found == pytest.approx({"a": 1 / 2, "b": 1 / 4, "c": 1 / 4}, abs=0.002)


@pytest.mark.slow
def test_a_temperature_brings_the_shares_nearer_to_each_other():
    sizes = {task.name: int(task.lengths.sum()) for task in make_tasks()}
    assert sizes == {"a": 547, "b": 4189, "c": 1269}
    plain = shares_of(plan(3000), with_heads=False)
    assert plain == pytest.approx({"a": 547 / 6005, "b": 4189 / 6005, "c": 1269 / 6005}, abs=0.002)
    # Square roots of the sizes: 23.4, 64.7 and 35.6.
    rooted = shares_of(plan(3000, mixing=Mixing(temperature=2.0)), with_heads=False)
    assert rooted == pytest.approx({"a": 0.189, "b": 0.523, "c": 0.288}, abs=0.002)
    hot = shares_of(plan(3000, mixing=Mixing(temperature=1000.0)), with_heads=False)
    assert hot == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, abs=0.002)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    weights=st.dictionaries(st.sampled_from("abc"), st.floats(0.2, 5.0), max_size=3),
    temperature=st.floats(0.5, 20.0),
    cap=st.none() | st.integers(5, 200),
    seed=st.integers(0, 3),
)
def test_planned_shares_are_right_to_within_an_episode_of_each_task(weights, temperature, cap, seed):
    mixing = Mixing(weights, temperature, cap)
    episodes = plan(400, mixing=mixing, seed=seed)
    wanted = {}
    for task in make_tasks():
        rows = cap_rows(np.arange(len(task.lengths), dtype=np.int32), task=task.name, max_rows=cap, seed=seed)
        wanted[task.name] = weights.get(task.name, 1.0) * float(task.lengths[rows].sum()) ** (1 / temperature)
    total = sum(wanted.values())
    lengths = {task.name: task.lengths for task in make_tasks()}
    tokens: Counter[str] = Counter()
    for one in episodes:
        tokens[one.task] += int(lengths[one.task][one.examples].sum())
    # Tasks are never further apart than one episode of each, in tokens over their fraction.
    progress = {name: tokens[name] / (wanted[name] / total) for name in wanted}
    step = {name: BUDGET / (wanted[name] / total) for name in wanted}
    assert max(progress.values()) - min(progress.values()) <= 2 * max(step.values())


@pytest.mark.slow
def test_every_row_is_used_once_in_an_epoch_and_a_cap_keeps_the_same_rows_in_all_of_them():
    for cap, counts in ((None, {"a": 40, "b": 300, "c": 90}), (50, {"a": 40, "b": 50, "c": 50})):
        used: dict[tuple[str, int], list[int]] = defaultdict(list)
        for one in takewhile(lambda episode: episode.epoch < 3, plan(2000, mixing=Mixing(max_rows=cap))):
            used[one.task, one.epoch] += one.examples.tolist()
        for name, count in counts.items():
            rows = [sorted(used[name, epoch]) for epoch in (0, 1)]
            assert len(set(rows[0])) == len(rows[0]) == count
            assert rows[0] == rows[1]
    rows = np.arange(300, dtype=np.int32)
    drawn = [cap_rows(rows, task="b", max_rows=50, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert cap_rows(rows, task="b", max_rows=300, seed=0) is rows
