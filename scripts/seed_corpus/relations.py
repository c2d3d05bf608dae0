"""Text that calculates and concludes: arithmetic and order.

Every writer takes a generator and about how many words to write. Whatever it says is true: a sum is right, and a
conclusion follows from the statements of its line.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from scripts.seed_corpus.grammar import COUNTED, LEXICON, an, num_words, number_word, plural

Show = Callable[[int], str]

_SUMS = ("{a} and {b} make {c}.", "{a} plus {b} is {c}.", "{b} more than {a} is {c}.", "what is {a} plus {b}? {c}.")
_DIFFERENCES = (
    "{c} minus {b} is {a}.",
    "{c} without {b} leaves {a}.",
    "{b} less than {c} is {a}.",
    "what is {c} minus {b}? {a}.",
)
_PRODUCTS = ("{a} times {b} is {c}.", "{a} by {b} makes {c}.", "what is {a} times {b}? {c}.")
_COUNT_STORIES = (
    "{p} had {a} {things} and got {b} more, so {p} had {c} {things}.",
    "{p} had {c} {things} and lost {b}, so {p} had {a} {things}.",
    "{p} has {a} {things} and {q} has {b}. together they have {c} {things}.",
    "there were {c} {things}. {p} took {b}, so {a} were left.",
)


def _sum(rng: random.Random, show: Show) -> str:
    a, b = rng.randint(0, 49), rng.randint(0, 49)
    if rng.random() < 0.5:
        a, b = a % 11, b % 11
    slots = {"a": show(a), "b": show(b), "c": show(a + b)}
    if rng.random() < 0.6:
        return rng.choice((_SUMS, _DIFFERENCES)[rng.randrange(2)]).format(**slots)
    one, other = rng.sample(LEXICON.people, 2)
    return rng.choice(_COUNT_STORIES).format(p=one, q=other, things=plural(rng.choice(COUNTED)), **slots)


def _product(rng: random.Random, show: Show) -> str:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return rng.choice(_PRODUCTS).format(a=show(a), b=show(b), c=show(a * b))


def _compare(rng: random.Random, show: Show) -> str:
    a, b = rng.sample(range(100), 2)
    more, less = max(a, b), min(a, b)
    return rng.choice(
        (
            f"{show(more)} is more than {show(less)}.",
            f"{show(less)} is less than {show(more)}.",
            f"is {show(a)} more than {show(b)}? {'yes' if a > b else 'no'}.",
            f"is {show(a)} less than {show(b)}? {'yes' if a < b else 'no'}.",
            f"after {show(less)} comes {show(less + 1)}.",
            f"before {show(more)} comes {show(more - 1)}.",
        )
    )


def _count(rng: random.Random, show: Show) -> str:
    """Count from a start by a step, up or down."""
    step, length = rng.randint(1, 9), rng.randint(5, 10)
    first = rng.randint(0, 9)
    numbers = [first + step * place for place in range(length)]
    if rng.random() < 0.25:
        numbers.reverse()
    start = rng.choice(("count", f"by {step}", "series", "on and on"))
    return f"{start}: {', '.join(map(show, numbers))}."


def _sort(rng: random.Random, show: Show) -> str:
    numbers = rng.sample(range(100), rng.choice((3, 3, 4)))
    shown, low, high = ", ".join(map(show, numbers)), min(numbers), max(numbers)
    return rng.choice(
        (
            f"{shown} | from low to high {', '.join(map(show, sorted(numbers)))}.",
            f"{shown} | from high to low {', '.join(map(show, sorted(numbers, reverse=True)))}.",
            f"of {shown} the least is {show(low)} and the most is {show(high)}.",
        )
    )


def _line(rng: random.Random, show: Show) -> str:
    """Write x and a*x + b for hidden a and b, x in no order."""
    slope, offset = rng.randint(1, 5), rng.randint(0, 20)
    mark = rng.choice((": ", " | ", " makes ", " - ", "; "))
    rows = [f"{show(x)}{mark}{show(slope * x + offset)}" for x in rng.sample(range(16), rng.randint(6, 12))]
    return "\n".join(rows)


def arithmetic(rng: random.Random, size: int) -> str:
    """Write sums, differences, products, comparisons, counts, orders and tables of a hidden line; 0 to 99 mostly."""
    shows: tuple[Show, ...] = (str, str, number_word)
    show = rng.choice(shows)
    kinds = rng.sample((_sum, _sum, _product, _compare, _count, _sort, _line), rng.randint(2, 5))
    joint = "\n" if _line in kinds else rng.choice(("\n", " "))
    lines: list[str] = []
    while size > 0:
        lines.append(rng.choice(kinds)(rng, show))
        size -= num_words(lines[-1])
    return joint.join(lines)


# (relation, its opposite)
_RELATIONS = (
    ("bigger than", "smaller than"),
    ("older than", "younger than"),
    ("heavier than", "lighter than"),
    ("left of", "right of"),
    ("inside", "around"),
    ("before", "after"),
    ("above", "below"),
    ("faster than", "slower than"),
)


def _chain(rng: random.Random, names: list[str]) -> str:
    """State neighbours of a hidden order in any order, then state or ask what follows about others."""
    forth, back = rng.choice(_RELATIONS)
    stated = []
    for high, low in pairwise(names):
        stated.append(f"{high} is {forth} {low}." if rng.random() < 0.7 else f"{low} is {back} {high}.")
    if rng.random() < 0.5:
        rng.shuffle(stated)
    follows = []
    for _ in range(rng.randint(2, 5)):
        first, last = sorted(rng.sample(range(len(names)), 2))
        high, low = names[first], names[last]
        follows.append(
            rng.choice(
                (
                    f"so {high} is {forth} {low}.",
                    f"so {low} is {back} {high}.",
                    f"{low} is not {forth} {high}.",
                    f"is {high} {forth} {low}? yes.",
                    f"is {low} {forth} {high}? no.",
                    f"is {low} {back} {high}? yes.",
                )
            )
        )
    return " ".join([*stated, *follows])


def _quantity(rng: random.Random) -> str:
    """State what is true of all, some or none of a group, then what follows about somebody, or that nothing does."""
    group, kind = rng.sample(LEXICON.jobs, 2)
    name, other = rng.sample(LEXICON.people, 2)
    groups, kinds, a_group, a_kind = plural(group), plural(kind), an(group), an(kind)
    return rng.choice(
        (
            f"all {groups} are {kinds}. {name} is {a_group}. so {name} is {a_kind}.",
            f"no {groups} are {kinds}. {name} is {a_group}. so {name} is not {a_kind}.",
            f"no {groups} are {kinds}. {name} is {a_kind}. so {name} is not {a_group}.",
            f"some {groups} are {kinds}. {name} is {a_group}. is {name} {a_kind}? we do not know.",
            f"all {groups} are {kinds}. {name} is {a_kind}. is {name} {a_group}? we do not know.",
            f"all {groups} are {kinds}. {name} is not {a_kind}. so {name} is not {a_group}.",
            f"all {groups} are {kinds}. {name} is {a_group} and {other} is not {a_kind}. is {other} {a_group}? no.",
            f"some {groups} are {kinds}. are all {groups} {kinds}? we do not know. are no {groups} {kinds}? no.",
            f"all {groups} are {kinds}. are some {groups} {kinds}? yes. are all {kinds} {groups}? we do not know.",
        )
    )


def order(rng: random.Random, size: int) -> str:
    """Write chains of a relation and statements about all, some or none, each with what follows from it or does not."""
    share = rng.choice((0.0, 0.3, 0.6))
    topic = rng.choice(sorted(LEXICON.topics))
    lines: list[str] = []
    while size > 0:
        if rng.random() < share:
            line = _quantity(rng)
        elif rng.random() < 0.3:
            line = _chain(rng, rng.sample(LEXICON.people, rng.randint(3, 6)))
        else:
            line = _chain(rng, [f"the {noun}" for noun in rng.sample(LEXICON.topics[topic], rng.randint(3, 7))])
        lines.append(line)
        size -= num_words(line)
    return "\n".join(lines)
