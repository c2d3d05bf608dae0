"""The majority among sampled answers (self-consistency, Wang et al. 2022, arXiv 2203.11171)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manyicl.inference.answering.generation import Generated, OnIds
from manyicl.inference.answering.math_answers import is_same_answer
from manyicl.inference.answering.settings import Decoding
from manyicl.models import Prefix

if TYPE_CHECKING:
    from manyicl.inference.engine import Engine

IsSame = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Vote:
    """What most samples say."""

    winner: int
    """The place of the first sample that says it."""
    share: float
    """Fraction of the samples that say it."""


def vote(texts: Sequence[str], *, is_same: IsSame) -> Vote:
    """Return the answer that most samples give; of equally many votes the one that came first wins.

    is_same: whether a text says what an earlier one says.
    """
    groups: list[list[int]] = []
    for place, text in enumerate(texts):
        group = next((one for one in groups if is_same(text, texts[one[0]])), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    best = max(groups, key=len)
    return Vote(best[0], len(best) / len(texts))


def sameness_of(metric: str) -> IsSame:
    """Return when two answers of a task are one vote: their values are equal in mathematics, else their texts."""
    if metric == "math_exact_match":
        return lambda text, earlier: is_same_answer(text, answer=earlier)
    return lambda text, earlier: text.strip() == earlier.strip()


def generate_voted(
    engine: Engine,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    *,
    limits: Sequence[int],
    decodings: Sequence[Sequence[Decoding]],
    is_same: IsSame,
    on_answer: Callable[[int], None] = lambda _: None,
    on_ids: OnIds | None = None,
) -> tuple[list[Generated], list[float | None]]:
    """Return each query's answer, the majority of its samples, and their share; None for a single sample.

    decodings: of each query's samples. A query has a fault if a server gave no answer to one of them.
    on_answer, on_ids: as in `Engine.generate`; the place is the query's.
    """
    flat = [(place, one) for place, samples in enumerate(decodings) for one in samples]
    given = engine.generate(
        prefix,
        [queries[place] for place, _ in flat],
        limits=[limits[place] for place, _ in flat],
        decodings=[one for _, one in flat],
        on_answer=on_answer,
        on_ids=None if on_ids is None else lambda n, ids: on_ids(flat[n][0], ids),
    )
    samples_of: list[list[Generated]] = [[] for _ in queries]
    for (place, _), one in zip(flat, given, strict=True):
        samples_of[place].append(one)
    voted = [_elect(samples, is_same) for samples in samples_of]
    return [one for one, _ in voted], [share for _, share in voted]


def _elect(samples: Sequence[Generated], is_same: IsSame) -> tuple[Generated, float | None]:
    faulty = next((one for one in samples if one.fault), None)
    if faulty is not None or len(samples) == 1:
        return faulty or samples[0], None
    found = vote([one.text for one in samples], is_same=is_same)
    counts = [one.num_tokens for one in samples]
    total = None if None in counts else sum(count or 0 for count in counts)
    return replace(samples[found.winner], num_tokens=total), found.share
