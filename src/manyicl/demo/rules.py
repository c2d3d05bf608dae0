"""The parts of a generated task: a hidden rule, drawn once, and the examples that it writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from manyicl.demo.lexicon import Lexicon


@dataclass(frozen=True, slots=True)
class Draft:
    """One example before it becomes a row of a task file."""

    input: str
    answer: str
    options: tuple[str, ...] = ()
    """Answers to choose from, if the row has its own; else ()."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One task's hidden rule."""

    parameters: tuple[object, ...]
    """Everything that the rule depends on, printable. Tasks of one kind with equal parameters are the same task."""
    labels: tuple[str, ...]
    """The names of the classes; () if answers are open."""
    write: Callable[[random.Random], Draft]
    """Draws an example; its answer follows from its input."""
    twins: tuple[tuple[object, ...], ...] = ()
    """Other parameters that give the same rule because their order does not matter; a pool has all of them or none."""


@dataclass(frozen=True, slots=True)
class Words:
    """The words that rules are made from: the lexicon, and the label words of one pool."""

    lexicon: Lexicon
    """All words."""
    labels: tuple[str, ...]
    """Label words of the pool."""

    def draw_labels(self, rng: random.Random, count: int) -> tuple[str, ...]:
        """Return `count` different label words."""
        return tuple(rng.sample(self.labels, count))

    def draw_noun(self, rng: random.Random) -> str:
        """Return a noun of any topic."""
        return rng.choice(self.lexicon.topics[rng.choice(tuple(self.lexicon.topics))])


DrawRule = Callable[[random.Random, Words], Rule]


def name_sentence(rng: random.Random, words: Words, noun: str) -> str:
    """Return one of several sentences about `noun`; no other word in it is a noun of a topic."""
    lexicon = words.lexicon
    person, place, colour = rng.choice(lexicon.people), rng.choice(lexicon.places), rng.choice(lexicon.colours)
    past = rng.choice(lexicon.verbs)[1]
    return rng.choice(
        (
            f"{person} {past} a {noun}",
            f"the {noun} is {colour}",
            f"a {noun} in {place}",
            f"{person} {past} the {colour} {noun}",
            f"in {place} {person} {past} a {noun}",
        )
    )
