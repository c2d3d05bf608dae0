"""What a task of the world is made of: a rule, drawn once, and the examples that it writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from manyicl.demo.lexicon import Lexicon


@dataclass(frozen=True, slots=True)
class Draft:
    """One example before it joins a task: what is given, what is wanted, and the row's own options if it has any."""

    input: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One task's hidden rule.

    parameters: all that the rule depends on, printable; two tasks of one kind with equal parameters are the same task.
    labels: the classes' names, () where answers are open. write: draws an example; its answer follows from its input.
    twins: other parameters that would be the same rule, where their order says nothing; a pool holds all or none.
    """

    parameters: tuple[object, ...]
    labels: tuple[str, ...]
    write: Callable[[random.Random], Draft]
    twins: tuple[tuple[object, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Words:
    """The words that rules are made from: the lexicon, and the label words of one pool."""

    lexicon: Lexicon
    labels: tuple[str, ...]

    def draw_labels(self, rng: random.Random, count: int) -> tuple[str, ...]:
        """Return `count` different label words."""
        return tuple(rng.sample(self.labels, count))

    def draw_noun(self, rng: random.Random) -> str:
        """Return a noun of any topic."""
        return rng.choice(self.lexicon.topics[rng.choice(tuple(self.lexicon.topics))])


DrawRule = Callable[[random.Random, Words], Rule]


def name_sentence(rng: random.Random, words: Words, noun: str) -> str:
    """Return one of several sentences around `noun`; nothing else in it is a noun of a topic."""
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
