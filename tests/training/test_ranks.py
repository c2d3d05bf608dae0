"""Packs shared out over ranks: as many to each, alike in cost, and the step's packs the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.training.ranks import balance_packs, find_unshared
from manyicl.training.recipe import TrainSettings


def rank_costs(costs: list[float], order: list[int], *, num_ranks: int, packs_per_batch: int) -> list[float]:
    """Return the cost of each rank's packs, as batches go to the ranks in turn."""
    sums = [0.0] * num_ranks
    for place, pack in enumerate(order):
        sums[place // packs_per_batch % num_ranks] += costs[pack]
    return sums


@given(st.lists(st.integers(1, 1000), min_size=24, max_size=24), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]))
def test_every_pack_is_handed_out_once_and_no_rank_has_much_more(costs, num_ranks, packs_per_batch):
    order = balance_packs(costs, num_ranks=num_ranks, packs_per_batch=packs_per_batch)
    assert sorted(order) == list(range(24))
    sums = rank_costs(costs, order, num_ranks=num_ranks, packs_per_batch=packs_per_batch)
    assert sum(sums) == sum(costs)
    assert order == list(range(24)) or num_ranks > 1
    if num_ranks > 1:
        assert max(sums) - min(sums) <= max(costs)


def test_one_long_episode_is_met_by_short_ones_on_the_other_rank():
    order = balance_packs([100, 1, 1, 97], num_ranks=2, packs_per_batch=1)
    assert rank_costs([100, 1, 1, 97], order, num_ranks=2, packs_per_batch=1) == pytest.approx([101, 98])


@pytest.mark.parametrize(
    ("per_step", "together", "num_ranks", "fault"),
    [
        (8, "auto", 4, ""),
        (8, 2, 4, ""),
        (8, "auto", 3, "train.packs_per_step = 8: cannot be shared by 3 ranks; make it a multiple of 3"),
        (8, 1, 3, "train.packs_per_step = 8: cannot be shared by 3 ranks; make it a multiple of 3"),
        (
            8,
            4,
            4,
            "train.packs_per_step = 8: cannot be shared by 4 ranks with train.packs_per_batch = 4;"
            " make it a multiple of 16",
        ),
    ],
)
def test_packs_that_ranks_cannot_share_are_found(per_step, together, num_ranks, fault):
    settings = TrainSettings(num_steps=1, packs_per_step=per_step, packs_per_batch=together)
    assert find_unshared(settings, num_ranks=num_ranks) == fault
