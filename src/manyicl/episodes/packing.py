"""Whole episodes into packs of `pack_tokens`, inside fixed blocks of the plan."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manyicl.episodes.plan import Episode, EpisodeSettings, TaskLengths, iter_episodes
from manyicl.seeds import make_stream

# Episodes are only ever packed with others of their block, so that pack j can be known without the whole plan, and a
# short run sees the first stretch of it. A block has as many tokens as this many packs: the last of its packs may be
# half empty, which is less than 1 % of it.
BLOCK_PACKS = 64


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of whole episodes, at most `pack_tokens` long. index: its place in the run."""

    index: int
    episodes: tuple[Episode, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all its episodes; nothing is padded."""
        return sum(episode.num_tokens for episode in self.episodes)


def iter_packs(
    tasks: Sequence[TaskLengths], *, settings: EpisodeSettings, pack_tokens: int, seed: int
) -> Iterator[Pack]:
    """Yield the endless plan of packs: pack j depends on (lengths, settings, pack_tokens, seed, j) and nothing else.

    pack_tokens must be at least `settings.token_budget`; the recipe's check sees to it.
    """
    yield from pack_episodes(iter_episodes(tasks, settings=settings, seed=seed), pack_tokens=pack_tokens, seed=seed)


def pack_episodes(episodes: Iterator[Episode], *, pack_tokens: int, seed: int) -> Iterator[Pack]:
    """Yield the packs of an endless plan of episodes, as `iter_packs` does."""
    block_number = index = 0
    while True:
        block = _take_block(episodes, num_tokens=BLOCK_PACKS * pack_tokens)
        bins = pack_lengths([episode.num_tokens for episode in block], pack_tokens=pack_tokens)
        # Best-fit decreasing leaves the long episodes first. A pack stands where one of its episodes, whichever, stands
        # in the plan: the steps of a block are alike, and packs of one episode keep the plan's order and its coverage.
        rng = make_stream("packing", seed, block_number)
        for places in sorted(bins, key=lambda places: places[rng.integers(len(places))]):
            yield Pack(index=index, episodes=tuple(block[place] for place in places))
            index += 1
        block_number += 1


def _take_block(episodes: Iterator[Episode], *, num_tokens: int) -> list[Episode]:
    """Return the next episodes, as few as have `num_tokens`."""
    block: list[Episode] = []
    while num_tokens > 0:
        block.append(next(episodes))
        num_tokens -= block[-1].num_tokens
    return block


def pack_lengths(lengths: Sequence[int], *, pack_tokens: int) -> list[list[int]]:
    """Return groups of indices whose lengths sum to at most `pack_tokens`, by best-fit decreasing.

    Each length goes to the fullest group that still has room (Johnson 1973: at most 11/9 of the fewest groups + 1).

    >>> pack_lengths([6, 5, 4, 5], pack_tokens=10)
    [[0, 2], [1, 3]]
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, group = rooms.pop(place)
        else:
            room, group = pack_tokens, len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(rooms, (room - length, group))
    return [sorted(group) for group in groups]
