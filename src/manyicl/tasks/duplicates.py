"""Copies of an input among others: the same input or a near-duplicate, from which a model could copy the answer.

Two inputs are near-duplicates if their words are equal, or if the sets of their 3-word shingles have a Jaccard
similarity of at least 0.8. Shingles and their resemblance are Broder's ("On the resemblance and containment of
documents", 1997); 0.8 is the threshold of Lee et al. ("Deduplicating Training Data Makes Language Models Better",
2022). Words are numbers with their inner punctuation, runs of letters, single ideographs, and symbols ("5 - 3" is not
"5 + 3"), compared in Unicode's compatibility form (NFKC) and without case. Punctuation and quotes are ignored.

Every such pair is found. A shingle is a 64-bit hash in a numpy array: 8 bytes per word. Two similar sets have one of
the rarest few shingles of each in common, so an index of these gives every candidate (prefix filtering: Bayardo, Ma,
Srikant, "Scaling up all pairs similarity search", 2007). The rank of the first common one bounds how many more there
can be (positional filtering: Xiao, Wang, Lin, Yu, "Efficient similarity joins for near duplicate detection", 2008). So
boilerplate that is in all inputs costs little.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 3
MIN_JACCARD = 0.8

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORDS = re.compile(
    rf"\d+(?:[.,:]\d+)*|[{_IDEOGRAPHS}]|[^\W\d{_IDEOGRAPHS}]+"
    r"|[^\w\s.,;:!?\u2026'\"`\u2018\u2019\u201c\u201d\u00ab\u00bb]"
)
# The same in a text of ASCII in lower case, found in half the time.
_ASCII_WORDS = re.compile(r"[a-z_]+|[0-9]+(?:[.,:][0-9]+)*|[^a-z0-9_\s.,;:!?'\"`]")
# Words, candidates or shingles that are processed at once: about 100 MB.
BLOCK = 1 << 20
# Shingles are counted by the last bits of their hashes. Two with the same bits only look less rare than they are.
_MOST_COUNTS = 1 << 22
# Candidates of a (query, group) that are compared first; the others are needed only if none of these is similar.
_FIRST = 4

IntArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of one query's input, as indices of shots."""

    exact: tuple[int, ...]
    """Shots with the same input."""
    near: tuple[int, ...]
    """Shots with a near-duplicate of it."""


def find_copies(queries: Sequence[str], *, shots: Sequence[str]) -> list[Copies]:
    """Return the copies of each query's input among the inputs of `shots`."""
    by_text: dict[str, list[int]] = {}
    for number, text in enumerate(shots):
        by_text.setdefault(text, []).append(number)
    similar: dict[int, list[int]] = {}
    for query, shot in CopyIndex(shots).find_similar(queries):
        similar.setdefault(query, []).append(shot)
    found = [Copies((), ())] * len(queries)
    for number, text in enumerate(queries):
        exact, near = by_text.get(text, ()), similar.get(number, ())
        if exact or near:
            found[number] = Copies(tuple(exact), tuple(sorted({*near}.difference(exact))))
    return found


def split_words(text: str) -> list[str]:
    """Return the words of a text by which inputs are compared: in Unicode's compatibility form and without case."""
    if text.isascii():  # its compatibility form is itself
        return _ASCII_WORDS.findall(text.lower())
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


class CopyIndex:
    """Finds inputs that are similar to a query.

    groups: the group of each input, from 0, such as its task. In each group, at least one similar input is found;
    without groups, all are.
    """

    def __init__(self, inputs: Sequence[str], *, groups: Sequence[int] | None = None) -> None:
        self.groups = None if groups is None else np.asarray(groups, dtype=np.int64)
        self.sets = _hash_inputs(inputs)
        size = 1024
        while size < min(2 * len(self.sets.hashes), _MOST_COUNTS):
            size *= 2
        self.counts = np.zeros(size, dtype=np.int64)
        for start in range(0, len(self.sets.hashes), BLOCK):
            self.counts += np.bincount(self._place(self.sets.hashes[start : start + BLOCK]), minlength=size)
        shared = _rarest(self.sets, self._rarity)
        order = np.argsort(shared.hashes, kind="stable")
        self.shared = _Rare(shared.hashes[order], shared.rows[order], shared.ranks[order])

    def find_similar(self, queries: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yield (query, input) for the inputs that are a query's near-duplicates or have the same words.

        With groups: some of them, at least one in each group that has any.
        """
        query_sets = _hash_inputs(queries)
        rare = _rarest(query_sets, self._rarity)
        first = np.searchsorted(self.shared.hashes, rare.hashes, side="left")
        num = np.searchsorted(self.shared.hashes, rare.hashes, side="right") - first
        per_query = np.bincount(rare.rows, weights=num, minlength=len(query_sets)).astype(np.int64)
        ends = np.searchsorted(rare.rows, np.arange(len(query_sets)), side="right")
        for start, end in _blocks(per_query):
            part = slice(ends[start - 1] if start else 0, ends[end - 1])
            rows = np.repeat(rare.rows[part], num[part])
            ranks = np.repeat(rare.ranks[part], num[part])
            places = _ranges(first[part], num[part])
            for pairs in self._compare(query_sets, rows, ranks, places):
                yield from zip(*(numbers.tolist() for numbers in pairs), strict=True)

    def _compare(
        self, query_sets: _Sets, rows: IntArray, ranks: IntArray, places: IntArray
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield the similar pairs (query, input) among candidates.

        A candidate is a shingle in common: the row of its query, its rank there, and its place in the index.
        """
        # The ranks of a query ascend, so of several candidates for a pair the first is the rarest common shingle.
        _, kept = np.unique(rows * len(self.sets) + self.shared.rows[places], return_index=True)
        rows, ranks, places = rows[kept], ranks[kept], places[kept]
        inputs = self.shared.rows[places]
        mine, others = query_sets.sizes[rows], self.sets.sizes[inputs]
        most = np.minimum(mine - ranks, others - self.shared.ranks[places])
        fit = 9 * most >= 4 * (mine + others)  # a Jaccard similarity of 4/5 needs 4/9 of both sizes together in common
        rows, inputs = rows[fit], inputs[fit]
        if self.groups is None:
            yield self._keep_similar(query_sets, rows, inputs)
            return
        group = rows * (int(self.groups.max(initial=0)) + 1) + self.groups[inputs]
        order = np.argsort(group, kind="stable")
        rows, inputs, group = rows[order], inputs[order], group[order]
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        early = rank < _FIRST
        found = self._keep_similar(query_sets, rows[early], inputs[early])
        yield found
        done = found[0] * (int(self.groups.max(initial=0)) + 1) + self.groups[found[1]]
        late = ~early & ~np.isin(group, done)
        yield self._keep_similar(query_sets, rows[late], inputs[late])

    def _keep_similar(self, query_sets: _Sets, rows: IntArray, inputs: IntArray) -> tuple[IntArray, IntArray]:
        """Return the pairs that are similar."""
        keep = np.zeros(len(rows), dtype=bool)
        sizes = query_sets.sizes[rows]
        for start, end in _blocks(sizes):
            mine, others = rows[start:end], inputs[start:end]
            shared = _count_shared(query_sets, mine, self.sets, others)
            keep[start:end] = shared / (sizes[start:end] + self.sets.sizes[others] - shared) >= MIN_JACCARD
        return rows[keep], inputs[keep]

    def _place(self, hashes: HashArray) -> IntArray:
        return (hashes & np.uint64(len(self.counts) - 1)).astype(np.int64)

    def _rarity(self, hashes: HashArray) -> IntArray:
        return self.counts[self._place(hashes)]


@dataclass(frozen=True, slots=True)
class _Sets:
    """The shingles of many inputs; those of input n are `hashes[starts[n] : starts[n] + sizes[n]]`, sorted."""

    hashes: HashArray
    starts: IntArray
    sizes: IntArray

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True, slots=True)
class _Rare:
    """The rarest shingles of many inputs."""

    hashes: HashArray
    rows: IntArray
    """The input of each shingle."""
    ranks: IntArray
    """Number of rarer shingles in that input."""


def _hash_inputs(inputs: Sequence[str]) -> _Sets:
    """Return the shingles of inputs; all words of an input of fewer than 3 words are one shingle."""
    hashes, sizes = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
    words, lengths = array("q"), array("q")
    for number, text in enumerate(inputs, start=1):
        mine = list(map(hash, split_words(text)))  # 64 pseudo-random bits, the same within a process
        if mine:
            mine += [0] * (SHINGLE_WORDS - len(mine))
        words.extend(mine)
        lengths.append(len(mine))
        if len(words) >= BLOCK or number == len(inputs):
            block = _hash_shingles(np.array(words).view(np.uint64), np.array(lengths))
            hashes.append(block[0])
            sizes.append(block[1])
            words, lengths = array("q"), array("q")
    every = np.concatenate(sizes)
    return _Sets(np.concatenate(hashes), np.cumsum(every) - every, every)


def _hash_shingles(words: HashArray, lengths: IntArray) -> tuple[HashArray, IntArray]:
    """Return the distinct shingles of each input, sorted, and their number. lengths: words of each input."""
    num_shingles = np.maximum(lengths - SHINGLE_WORDS + 1, 0)
    places = _ranges(np.cumsum(lengths) - lengths, num_shingles)
    hashes = np.zeros(len(places), dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):
        hashes = _mix(hashes + words[places + offset])
    rows = np.repeat(np.arange(len(lengths)), num_shingles)
    order = np.lexsort((hashes, rows))
    hashes, rows = hashes[order], rows[order]
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    return hashes[is_first], np.bincount(rows[is_first], minlength=len(lengths))


def _mix(hashes: HashArray) -> HashArray:
    """Return the hashes mixed, so that each bit depends on all others (the last steps of splitmix64)."""
    hashes = (hashes + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _rarest(sets: _Sets, rarity: Callable[[HashArray], IntArray]) -> _Rare:
    """Return the rarest few shingles of each set, rarest first: a similar set must have one of them.

    It must have at least 4/5 of the set's shingles, so it lacks fewer than are returned.
    """
    num_kept = sets.sizes - (4 * sets.sizes + 4) // 5 + 1
    parts: list[tuple[HashArray, IntArray, IntArray]] = []
    for start, end in _blocks(sets.sizes):
        sizes = sets.sizes[start:end]
        hashes = sets.hashes[sets.starts[start] : sets.starts[start] + int(sizes.sum())]
        rows = np.repeat(np.arange(start, end), sizes)
        order = np.lexsort((hashes, rarity(hashes), rows))
        ranks = _ranges(np.zeros(end - start, dtype=np.int64), sizes)
        kept = ranks < num_kept[rows]
        parts.append((hashes[order][kept], rows[kept], ranks[kept]))
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return _Rare(np.zeros(0, dtype=np.uint64), none, none)
    hashes, rows, ranks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _Rare(hashes, rows, ranks)


def _count_shared(mine: _Sets, rows: IntArray, others: _Sets, inputs: IntArray) -> IntArray:
    """Return the number of common shingles of each pair of sets, by a binary search for all of them at once."""
    sizes = mine.sizes[rows]
    pair = np.repeat(np.arange(len(rows)), sizes)
    wanted = mine.hashes[_ranges(mine.starts[rows], sizes)]
    low = others.starts[inputs][pair]
    end = low + others.sizes[inputs][pair]
    high, last = end.copy(), len(others.hashes) - 1
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_less = others.hashes[np.minimum(middle, last)] < wanted
        low = np.where(is_open & is_less, middle + 1, low)
        high = np.where(is_open & ~is_less, middle, high)
    found = (low < end) & (others.hashes[np.minimum(low, last)] == wanted)
    return np.bincount(pair[found], minlength=len(rows))


def _ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Return start, start + 1, ..., as many as its size, for each start; joined."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


def _blocks(sizes: IntArray) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, end) whose sizes add up to at most BLOCK, or of a single larger one."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        yield start, end
        start = end
