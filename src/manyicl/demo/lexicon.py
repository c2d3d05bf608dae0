"""The words of the generated tasks, each in one list only (words.toml), and coined words."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

ONSETS = (*"bdfghjklmnprstvwz", "br", "dr", "gl", "pl", "st")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "", "", "l", "m", "n", "r", "s", "x")
# Other words of the seed model's text that a coined word could equal.
_GRAMMAR = (
    "before", "faster", "five", "have", "home", "later", "likes", "live", "lives", "make", "makes", "minus", "more",
    "name", "nine", "note", "seven", "some", "time", "times", "were", "zero", "same", "here", "like", "none", "lower",
)  # fmt: skip


@dataclass(frozen=True)
class Lexicon:
    """All words, lower-case ASCII, none twice."""

    topics: Mapping[str, tuple[str, ...]]
    """Topic -> singular nouns."""
    good: tuple[str, ...]
    """Adjectives of a good tone; `bad` and `plain` are those of the other two tones."""
    bad: tuple[str, ...]
    plain: tuple[str, ...]
    colours: tuple[str, ...]
    people: tuple[str, ...]
    places: tuple[str, ...]
    jobs: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]
    """(base form, past form) of things that a person does to a thing."""
    labels: tuple[str, ...]
    """Words that serve as names of classes."""


@lru_cache(maxsize=1)
def load_lexicon() -> Lexicon:
    """Return the lexicon that ships with the package."""
    lists = tomllib.loads(resources.files("manyicl.demo").joinpath("words.toml").read_text(encoding="utf-8"))
    topics = {topic: tuple(nouns) for topic, nouns in lists.pop("topics").items()}
    verbs = tuple((base, past) for base, past in lists.pop("verbs"))
    others = {name: tuple(words) for name, words in lists.items()}
    return Lexicon(topics=MappingProxyType(topics), verbs=verbs, **others)


def all_words(lexicon: Lexicon) -> tuple[str, ...]:
    """Return every word once: the names of the topics, their nouns, then the other lists."""
    nouns = tuple(noun for nouns in lexicon.topics.values() for noun in nouns)
    adjectives = (*lexicon.good, *lexicon.bad, *lexicon.plain, *lexicon.colours)
    verbs = tuple(form for pair in lexicon.verbs for form in pair)
    names = (*lexicon.people, *lexicon.places, *lexicon.jobs)
    return (*lexicon.topics, *nouns, *adjectives, *names, *verbs, *lexicon.labels)


@lru_cache(maxsize=1)
def _known_words() -> frozenset[str]:
    return frozenset((*all_words(load_lexicon()), *_GRAMMAR))


def coin_words(rng: random.Random, *, count: int) -> list[str]:
    """Return `count` distinct pseudo-words of two or three syllables, such as mivo, none of which is a known word."""
    known = _known_words()
    coined: dict[str, None] = {}
    choice = rng.choice
    while len(coined) < count:
        syllables = 2 if rng.random() < 0.75 else 3
        word = "".join([choice(ONSETS) + choice(VOWELS) for _ in range(syllables)]) + choice(CODAS)
        if word not in known:
            coined[word] = None
    return list(coined)
