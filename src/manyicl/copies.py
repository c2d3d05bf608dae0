"""Copies of a query among its shots: the very input, or a near-duplicate, from which the answer could be read off.

Two inputs are near-duplicates if their words are equal, or if the sets of their 3-word shingles have a Jaccard
similarity of at least 0.8. Shingles and their resemblance are Broder's ("On the resemblance and containment of
documents", 1997); 0.8 is the threshold of Lee et al. ("Deduplicating Training Data Makes Language Models Better",
2022). Words are compared in Unicode's compatibility form (NFKC) and without case; they are numbers with their inner
marks, runs of letters, single ideographs, and symbols ("5 - 3" is not "5 + 3"); sentence marks and quotes do not count.

The search is exact, not a hash's estimate. Sets that similar share one of the rarest few shingles of either, so an
index of those finds every candidate (prefix filtering: Bayardo, Ma, Srikant, "Scaling up all pairs similarity search",
2007), and boilerplate that all inputs share costs nothing.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SHINGLE_WORDS = 3
MIN_JACCARD = 0.8

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORDS = re.compile(
    rf"\d+(?:[.,:]\d+)*|[{_IDEOGRAPHS}]|[^\W\d{_IDEOGRAPHS}]+"
    r"|[^\w\s.,;:!?\u2026'\"`\u2018\u2019\u201c\u201d\u00ab\u00bb]"
)


@dataclass(frozen=True, slots=True)
class Copies:
    """Of one query: which of the shots hold its very input, and which others a near-duplicate (indices)."""

    exact: tuple[int, ...]
    near: tuple[int, ...]


def find_copies(queries: Sequence[str], *, shots: Sequence[str]) -> list[Copies]:
    """Return the copies of each query's input among the inputs of `shots`."""
    asked, shown = [_shingles(text) for text in queries], [_shingles(text) for text in shots]
    rarity = Counter(shingle for shingles in (*asked, *shown) for shingle in shingles)
    index: dict[str, list[int]] = {}
    for number, shingles in enumerate(shown):
        for shingle in _rarest(shingles, rarity):
            index.setdefault(shingle, []).append(number)
    by_text: dict[str, list[int]] = {}
    for number, text in enumerate(shots):
        by_text.setdefault(text, []).append(number)
    found = []
    for text, shingles in zip(queries, asked, strict=True):
        exact = by_text.get(text, [])
        candidates = {n for shingle in _rarest(shingles, rarity) for n in index.get(shingle, ())}
        near = sorted(n for n in candidates.difference(exact) if jaccard(shingles, shown[n]) >= MIN_JACCARD)
        found.append(Copies(tuple(exact), tuple(near)))
    return found


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share of both sets' members that are in both; 0 for two empty sets, which share nothing."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


def _shingles(text: str) -> frozenset[str]:
    """Return the 3-word shingles of a text; of a shorter one, all its words as one shingle."""
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return frozenset()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last))


def _rarest(shingles: frozenset[str], rarity: Counter[str]) -> list[str]:
    """Return the rarest few shingles of a set: a set at least 0.8 similar must share one of them.

    It must share 0.8 of this set's size or more, so it can miss fewer than this many.
    """
    num_kept = len(shingles) - math.ceil(MIN_JACCARD * len(shingles) - 1e-9) + 1
    return sorted(shingles, key=lambda shingle: (rarity[shingle], shingle))[:num_kept]
