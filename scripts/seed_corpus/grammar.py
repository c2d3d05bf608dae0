"""A little English: articles, plurals, number words, and people with facts for the text to tell."""

from __future__ import annotations

import random
from dataclasses import dataclass

from manyicl.demo.lexicon import load_lexicon

LEXICON = load_lexicon()
# Topics of things that somebody can carry, and of things that can be counted, as their nouns have a regular plural.
CARRIED = tuple(
    noun
    for topic in ("fruit", "tool", "garment", "instrument", "toy", "utensil", "school")
    for noun in LEXICON.topics[topic]
    if noun not in {"pliers", "tweezer", "homework", "glue", "dice", "skipping", "hopscotch", "jack", "pogo"}
)
PETS = tuple(noun for topic in ("animal", "bird") for noun in LEXICON.topics[topic] if noun not in {"moose", "bison"})
COUNTED = (*(LEXICON.topics["fruit"]), *(LEXICON.topics["utensil"]), *PETS, *(LEXICON.topics["vehicle"]))
# Written with a vowel, spoken with a consonant.
_A_WORDS = frozenset({"ukulele", "euro", "useless", "unique", "unit", "universe", "usual", "unity"})
_AN_WORDS = frozenset({"honest", "hour", "honour"})
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def an(phrase: str) -> str:
    """Return the phrase after its indefinite article.

    >>> an("apple"), an("red apple"), an("ukulele")
    ('an apple', 'a red apple', 'a ukulele')
    """
    first = phrase.split(" ", 1)[0]
    vowel = (first[0] in "aeiou" and first not in _A_WORDS) or first in _AN_WORDS
    return f"an {phrase}" if vowel else f"a {phrase}"


def plural(noun: str) -> str:
    """Return a regular plural.

    >>> plural("plum"), plural("cherry"), plural("bus"), plural("peach")
    ('plums', 'cherries', 'buses', 'peaches')
    """
    if noun == "scarf":
        return "scarves"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "es" if noun.endswith(("s", "x", "ch", "sh", "z")) else noun + "s"


def number_word(number: int) -> str:
    """Return a number of 0 to 99 in words.

    >>> number_word(7), number_word(40), number_word(42)
    ('seven', 'forty', 'forty two')
    """
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return f"{_TENS[tens]} {_ONES[ones]}" if ones else _TENS[tens]


@dataclass(frozen=True)
class Person:
    """A person and the facts about them in one document; `noun` is the thing that they own, with its colour."""

    name: str
    home: str
    job: str
    pet: str
    noun: str
    colour: str
    age: int

    @property
    def slots(self) -> dict[str, str]:
        """The values for templates of sentences."""
        return {
            "p": self.name,
            "home": self.home,
            "job": self.job,
            "a_job": an(self.job),
            "pet": self.pet,
            "a_pet": an(self.pet),
            "noun": self.noun,
            "a_noun": an(self.noun),
            "colour": self.colour,
            "a_thing": an(f"{self.colour} {self.noun}"),
            "age": str(self.age),
        }


def draw_people(rng: random.Random, *, count: int) -> list[Person]:
    """Return people, no two with the same name, home, job, pet, thing or age; colours may repeat."""
    return [
        Person(*facts)
        for facts in zip(
            rng.sample(LEXICON.people, count),
            rng.sample(LEXICON.places, count),
            rng.sample(LEXICON.jobs, count),
            rng.sample(PETS, count),
            rng.sample(CARRIED, count),
            rng.choices(LEXICON.colours, k=count),
            rng.sample(range(5, 96), count),
            strict=True,
        )
    ]


def num_words(text: str) -> int:
    """Return roughly how many words the text has: one more than its spaces and line ends."""
    return text.count(" ") + text.count("\n") + 1
