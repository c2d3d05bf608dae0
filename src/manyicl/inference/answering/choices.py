"""Which of its known answers a query gets, and how probable each is among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

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


class Weighed(NamedTuple):
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
    return weigh_all([nats_O], [choices], normalize=normalize, free=None if free_SO is None else [free_SO])[0]


def weigh_all(
    nats: Sequence[NDArray[np.float64]],
    choices: Sequence[Choices],
    *,
    normalize: Normalize = "none",
    free: Sequence[NDArray[np.float64]] | None = None,
) -> list[Weighed]:
    """Return what `weigh_choices` does for each query, given its nats (O,), its choices and its nats (S, O).

    Queries that share choices as an object are weighed together: for 500 of them a seventh of the time.
    """
    alike: dict[int, list[int]] = {}
    for place, pairs in enumerate(choices):
        alike.setdefault(id(pairs), []).append(place)
    weighed: dict[int, Weighed] = {}
    for places in alike.values():
        scores_QO = -np.concatenate([nats[place] for place in places], dtype=np.float64).reshape(len(places), -1)
        if normalize != "none":
            scores_QO = scores_QO / np.maximum(1, [_LENGTHS[normalize](*pair) for pair in choices[places[0]]])
        if free is not None:
            scores_QO = scores_QO - np.log(np.stack([_prior(free[place]) for place in places]))
        weights_QO = np.exp(scores_QO - scores_QO.max(axis=1, keepdims=True))
        probabilities_QO = weights_QO / weights_QO.sum(axis=1, keepdims=True)
        weighed.update(zip(places, map(Weighed, scores_QO.argmax(axis=1).tolist(), probabilities_QO), strict=True))
    return [weighed[place] for place in range(len(choices))]


def _prior(free_SO: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean probability of each choice after inputs without content, (O,); never 0."""
    weights_SO = np.exp(free_SO.min(axis=1, keepdims=True) - free_SO)
    prior_O = (weights_SO / weights_SO.sum(axis=1, keepdims=True)).mean(axis=0)
    return np.asarray(np.maximum(prior_O, np.finfo(np.float64).tiny), dtype=np.float64)
