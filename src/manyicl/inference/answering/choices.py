"""Which of its known answers a query gets, and how probable each is among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manyicl.inference.answering.settings import Normalize
from manyicl.models import Prefix

if TYPE_CHECKING:
    from manyicl.inference.engine import Engine


# Inputs without content, as in section 5 of Zhao et al. 2021.
CONTENT_FREE = ("N/A", "[MASK]", "")
Choices = Sequence[tuple[str, Sequence[int]]]
# By what a choice's log-probability is divided, from its text and its ids.
_LENGTHS: Mapping[str, Callable[[str, Sequence[int]], int]] = {
    "tokens": lambda _, ids: len(ids),
    "characters": lambda text, _: len(text),
    "bytes": lambda text, _: len(text.encode()),
}


def score_content_free(
    engine: Engine,
    prefix: Prefix,
    free: Sequence[Sequence[NDArray[np.int32]]],
    choices: Sequence[Choices],
) -> list[NDArray[np.float64]]:
    """Return for each query the nats (S, O) of its choices after its inputs without content.

    free: the ids of these inputs as queries, for each query. Queries that share both `free` and `choices` as objects
        are scored once.
    """
    distinct = {
        (id(ids), id(pairs)): (ids, [answer for _, answer in pairs]) for ids, pairs in zip(free, choices, strict=True)
    }
    flat = [(one, options) for ids, options in distinct.values() for one in ids]
    nats = iter(engine.score(prefix, [one for one, _ in flat], [options for _, options in flat]))
    found = {key: np.stack([next(nats) for _ in ids]) for key, (ids, _) in distinct.items()}
    return [found[id(ids), id(pairs)] for ids, pairs in zip(free, choices, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """The known answers of a query, weighed against each other."""

    best: int
    """The place of the one with the highest score; of equal ones the first."""
    probabilities_O: NDArray[np.float64]
    """(O,): the softmax of the scores. Without normalisation, a choice's part of the likelihood of all choices."""

    @property
    def confidence(self) -> float:
        """The probability of the best one."""
        return float(self.probabilities_O[self.best])


def weigh_choices(
    nats_O: NDArray[np.float64],
    choices: Sequence[tuple[str, Sequence[int]]],
    *,
    normalize: Normalize = "none",
    free_SO: NDArray[np.float64] | None = None,
) -> Weighed:
    """Return the choices weighed by their scores: log-probabilities, divided by lengths if `normalize` says so.

    nats_O: negative log-probability of each choice with its terminator.
    choices: text and ids of each; the ids end with the terminator, the text is without it.
    free_SO: (S, O), the same after S inputs without content. The choices' probabilities are divided by their mean
        probabilities there: Zhao et al. 2021 with W = diag(p_cf)^-1 and b = 0.
    """
    scores_O = -np.asarray(nats_O, dtype=np.float64)
    if normalize != "none":
        scores_O = scores_O / np.maximum(1, [_LENGTHS[normalize](text, ids) for text, ids in choices])
    if free_SO is not None:
        weights_SO = np.exp(free_SO.min(axis=1, keepdims=True) - free_SO)
        prior_O = (weights_SO / weights_SO.sum(axis=1, keepdims=True)).mean(axis=0)
        scores_O = scores_O - np.log(np.maximum(prior_O, np.finfo(np.float64).tiny))
    weights_O = np.exp(scores_O - scores_O.max())
    return Weighed(int(np.argmax(scores_O)), weights_O / weights_O.sum())
