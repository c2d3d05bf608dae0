"""Generated mathematics: word problems with a coined verb, hidden rules, and picks among numbers."""

from __future__ import annotations

import random

from manyicl.demo.lexicon import coin_words
from manyicl.demo.rules import Draft, Rule, Words

PICKS = ("largest", "smallest", "middle", "first", "second", "last")


def draw_story(rng: random.Random, words: Words) -> Rule:
    """Return the rule: somebody has things and does something, named by a coined verb, with more; how many now?"""
    verb = coin_words(rng, count=1)[0]
    operation = rng.choice(("plus", "minus", "times"))

    def write(rng: random.Random) -> Draft:
        person, noun = rng.choice(words.lexicon.people), words.draw_noun(rng)
        first, second = rng.randint(2, 20), rng.randint(1, 10)
        if operation == "minus":
            second = min(second, first)
        if operation == "times":
            first, second = rng.randint(2, 9), rng.randint(2, 5)
        result = {"plus": first + second, "minus": first - second, "times": first * second}[operation]
        return Draft(f"{person} has {first} {noun}. {person} {verb} {second}.", str(result))

    return Rule(("story", verb, operation), (), write)


def draw_linear(rng: random.Random, words: Words) -> Rule:  # noqa: ARG001 (numbers need no words)
    """Return the rule: x becomes a * x + b."""
    a, b = rng.choice((1, 2)), rng.randint(0, 59)

    def write(rng: random.Random) -> Draft:
        x = rng.randint(0, 199)
        return Draft(str(x), str(a * x + b))

    return Rule(("linear", a, b), (), write)


def draw_price(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the price of a thing, fixed per thing, plus a fixed fee if it is sent."""
    things = sorted(
        rng.sample(words.lexicon.topics[rng.choice(tuple(words.lexicon.topics))], rng.choice((6, 8, 12, 16, 24)))
    )
    prices, fee = rng.sample(range(1, 90), len(things)), rng.choice((0, 1, 2, 5, 10))

    def write(rng: random.Random) -> Draft:
        chosen, person = rng.randrange(len(things)), rng.choice(words.lexicon.people)
        if fee and rng.random() < 0.3:
            return Draft(f"{things[chosen]} to {rng.choice(words.lexicon.places)}", str(prices[chosen] + fee))
        return Draft(f"{person} takes a {things[chosen]}", str(prices[chosen]))

    return Rule(("price", fee, *zip(things, prices, strict=True)), (), write)


def draw_pick(rng: random.Random, words: Words) -> Rule:  # noqa: ARG001 (numbers need no words)
    """Return the rule: one of three numbers, picked by size or position, in most tasks plus a fixed number."""
    wanted, added = rng.choice(PICKS), rng.randint(0, 9)

    def write(rng: random.Random) -> Draft:
        numbers = rng.sample(range(1, 60), 3)
        ordered = sorted(numbers)
        picked = dict(zip(PICKS, (ordered[2], ordered[0], ordered[1], *numbers), strict=True))
        return Draft(" ".join(map(str, numbers)), str(picked[wanted] + added))

    return Rule(("pick", wanted, added), (), write)


def draw_tally(rng: random.Random, words: Words) -> Rule:
    """Return the rule: how many of the listed things are of one fixed topic."""
    topics = tuple(words.lexicon.topics)
    wanted = rng.choice(topics)

    def write(rng: random.Random) -> Draft:
        length = rng.randint(2, 6)
        count = rng.randint(0, min(length, 4))
        things = [rng.choice(words.lexicon.topics[wanted]) for _ in range(count)]
        others = [topic for topic in topics if topic != wanted]
        things += [rng.choice(words.lexicon.topics[rng.choice(others)]) for _ in range(length - count)]
        rng.shuffle(things)
        return Draft(" ".join(things), str(count))

    return Rule(("tally", wanted), (), write)
