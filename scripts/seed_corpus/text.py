"""Generated plain text for language modelling: eleven genres, endless, in formats that no episode has."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import count

from scripts.seed_corpus.patterns import listing, record, repeat, table
from scripts.seed_corpus.prose import dialogue, glossary, passage, rewrite, story
from scripts.seed_corpus.relations import arithmetic, order

from manyicl.errors import UserError, suggest

_WRITERS: dict[str, Callable[[random.Random, int], str]] = {
    "story": story,
    "passage": passage,
    "dialogue": dialogue,
    "list": listing,
    "table": table,
    "repeat": repeat,
    "record": record,
    "glossary": glossary,
    "arithmetic": arithmetic,
    "order": order,
    "rewrite": rewrite,
}
GENRES: tuple[str, ...] = tuple(_WRITERS)
# Target lengths in words; a writer stops after the sentence or block that passes its target.
_LEAST_AIM, _MOST_AIM = 120, 440


def write_document(genre: str, rng: random.Random) -> str:
    """Return a document of 80 to 700 words without a line end after it.

    Raises:
        UserError: there is no such genre.
    """
    if genre not in _WRITERS:
        raise UserError(f"genre {genre!r} is unknown{suggest(genre, GENRES)}")
    return _WRITERS[genre](rng, rng.randint(_LEAST_AIM, _MOST_AIM))


def iter_documents(seed: int, *, weights: Mapping[str, float]) -> Iterator[str]:
    """Yield documents without end, the genre of each drawn by `weights`; document j depends only on (seed, j).

    Raises:
        UserError: a genre is unknown, a weight is negative, or all are zero.
    """
    genres, shares = list(weights), list(weights.values())
    for genre in genres:
        if genre not in _WRITERS:
            raise UserError(f"genre {genre!r} is unknown{suggest(genre, GENRES)}")
    if min(shares, default=0) < 0 or sum(shares) <= 0:
        raise UserError(f"weights {shares} cannot be drawn from; give no negative one and at least one above 0")
    return _iter_documents(seed, genres, shares)


def _iter_documents(seed: int, genres: list[str], shares: list[float]) -> Iterator[str]:
    for number in count():
        rng = random.Random(f"{seed}/{number}")
        yield write_document(rng.choices(genres, shares)[0], rng)
