"""Packing: whole episodes into rows of at most `pack_tokens`, within fixed blocks of the plan."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manyicl.episodes.plan import PLAIN_MIXING, Episode, EpisodeSettings, Mixing, TaskLengths, iter_episodes
from manyicl.seeds import make_stream

# Episodes are packed only with others of their block. So pack j is known without the whole plan, and a short run sees
# the plan's beginning. A block has the tokens of this many packs: its last pack may be half empty, which is less than
# 1 % of the block.
BLOCK_PACKS = 64


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of whole episodes."""

    index: int
    """Its place in the run."""
    episodes: tuple[Episode, ...]
    """In the order of the plan; together at most `pack_tokens` long."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all its episodes, without padding."""
        return sum(episode.num_tokens for episode in self.episodes)


def iter_packs(
    tasks: Sequence[TaskLengths],
    *,
    settings: EpisodeSettings,
    pack_tokens: int,
    seed: int,
    mixing: Mixing = PLAIN_MIXING,
) -> Iterator[Pack]:
    """Yield the endless plan of packs: pack j depends only on (lengths, settings, pack_tokens, seed, mixing, j).

    pack_tokens: at least `settings.token_budget`, which RunConfig checks.
    """
    plan = iter_episodes(tasks, settings=settings, seed=seed, mixing=mixing)
    yield from pack_episodes(plan, pack_tokens=pack_tokens, seed=seed)


def pack_episodes(episodes: Iterator[Episode], *, pack_tokens: int, seed: int) -> Iterator[Pack]:
    """Yield the packs of an endless plan of episodes, as `iter_packs` does."""
    block_number = index = 0
    while True:
        block = _take_block(episodes, num_tokens=BLOCK_PACKS * pack_tokens)
        bins = pack_lengths([episode.num_tokens for episode in block], pack_tokens=pack_tokens)
        # Best-fit decreasing gives the packs of long episodes first. Instead, each pack takes the position of one of
        # its episodes, picked at random: so the steps of a block are statistically alike, and packs of a single episode
        # keep the order of the plan.
        rng = make_stream("packing", seed, block_number)
        for places in sorted(bins, key=lambda places: places[rng.integers(len(places))]):
            yield Pack(index=index, episodes=tuple(block[place] for place in places))
            index += 1
        block_number += 1


def _take_block(episodes: Iterator[Episode], *, num_tokens: int) -> list[Episode]:
    """Return the next episodes, as few as have `num_tokens` together."""
    block: list[Episode] = []
    while num_tokens > 0:
        block.append(next(episodes))
        num_tokens -= block[-1].num_tokens
    return block


def pack_lengths(lengths: Sequence[int], *, pack_tokens: int) -> list[list[int]]:
    """Return bins of indices whose lengths sum to at most `pack_tokens`, by best-fit decreasing.

    Each length goes to the fullest bin that can take it (Johnson 1973: at most 11/9 of the fewest possible bins, + 1).

    >>> pack_lengths([6, 5, 4, 5], pack_tokens=10)
    [[0, 2], [1, 3]]
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect.bisect_left(free, (length, -1))
        if place < len(free):
            left, number = free.pop(place)
        else:
            left, number = pack_tokens, len(bins)
            bins.append([])
        bins[number].append(index)
        bisect.insort(free, (left - length, number))
    return [sorted(indices) for indices in bins]
