"""Generated inference: does the second sentence follow from the first? Yes, no and maybe have coined names."""

from __future__ import annotations

import random

from manyicl.demo.rules import Draft, Rule, Words

VERDICTS = ("yes", "no", "maybe")


def draw_size(rng: random.Random, words: Words) -> Rule:
    """Return the rule: comparisons of two or three things, by opposites such as bigger and smaller."""
    more, less = rng.choice(
        (("bigger", "smaller"), ("older", "younger"), ("heavier", "lighter"), ("nearer", "farther"))
    )
    verdicts, labels = _draw_verdicts(rng, words)

    def write(rng: random.Random) -> Draft:
        a, b, c = _draw_things(rng, words, 3)
        verdict = rng.choice(verdicts)
        premise = f"{a} is {more} than {b}" if rng.random() < 0.5 else f"{b} is {less} than {a}"
        if verdict == "maybe":
            claim = rng.choice((f"{a} is {more} than {c}", f"{c} is {less} than {b}", f"{b} is {more} than {c}"))
        else:
            high, low = (a, b) if verdict == "yes" else (b, a)
            claim = f"{high} is {more} than {low}" if rng.random() < 0.5 else f"{low} is {less} than {high}"
        return Draft(f"{premise}. {claim}?", labels[verdicts.index(verdict)])

    return Rule(("size", more, less, *zip(verdicts, labels, strict=True)), labels, write)


def draw_containment(rng: random.Random, words: Words) -> Rule:
    """Return the rule: what is in a thing is also in whatever that thing is in."""
    within = rng.choice(("in", "inside", "under", "behind"))
    verdicts, labels = _draw_verdicts(rng, words)

    def write(rng: random.Random) -> Draft:
        a, b, c, d = _draw_things(rng, words, 4)
        verdict = rng.choice(verdicts)
        yes = (f"{a} is {within} {b}", f"{b} is {within} {c}", f"{a} is {within} {c}")
        no = (f"{b} is {within} {a}", f"{c} is {within} {b}", f"{c} is {within} {a}")
        maybe = (f"{a} is {within} {d}", f"{d} is {within} {b}", f"{d} is {within} {c}")
        claim = rng.choice({"yes": yes, "no": no, "maybe": maybe}[verdict])
        return Draft(f"{a} is {within} {b}, {b} is {within} {c}. {claim}?", labels[verdicts.index(verdict)])

    return Rule(("containment", within, *zip(verdicts, labels, strict=True)), labels, write)


def draw_negation(rng: random.Random, words: Words) -> Rule:
    """Return the rule: a statement about a person, then the same one, its negation, or one about somebody else."""
    verb = rng.choice(("likes", "has", "wants", "sees", "needs"))
    verdicts, labels = _draw_verdicts(rng, words)

    def write(rng: random.Random) -> Draft:
        person, other = rng.sample(words.lexicon.people, 2)
        noun, another = words.draw_noun(rng), words.draw_noun(rng)
        verdict = rng.choice(verdicts)
        denied = rng.random() < 0.5
        claimed = denied if verdict == "yes" else not denied
        who, what = (person, noun) if verdict != "maybe" else rng.choice(((other, noun), (other, another)))
        premise, claim = _state(person, verb, noun, denied=denied), _state(who, verb, what, denied=claimed)
        return Draft(f"{premise}. {claim}?", labels[verdicts.index(verdict)])

    return Rule(("negation", verb, *zip(verdicts, labels, strict=True)), labels, write)


def draw_quantity(rng: random.Random, words: Words) -> Rule:
    """Return the rule: all, some and none. There is at least one of each thing, so all implies some."""
    verdicts, labels = _draw_verdicts(rng, words)
    follows = {
        ("all", "some"): "yes", ("no", "some"): "no", ("some", "no"): "no",
        ("some", "all"): "maybe", ("all", "no"): "no", ("no", "all"): "no", ("all", "all"): "yes",
        ("some", "some"): "yes", ("no", "no"): "yes",
    }  # fmt: skip

    def write(rng: random.Random) -> Draft:
        noun = words.draw_noun(rng)
        colour, other = rng.sample(words.lexicon.colours, 2)
        verdict = rng.choice(verdicts)
        first, second = rng.choice([pair for pair, found in follows.items() if found == verdict])
        said = colour
        if verdict == "maybe" and rng.random() < 0.5:
            first, second, said = "some", "some", other
        return Draft(f"{first} {noun} is {colour}. {second} {noun} is {said}?", labels[verdicts.index(verdict)])

    return Rule(("quantity", *zip(verdicts, labels, strict=True)), labels, write)


def draw_implication(rng: random.Random, words: Words) -> Rule:
    """Return the rule: a person's job implies a fixed quality, excludes it, or neither; which is a fact of the task."""
    quality = rng.choice((*words.lexicon.good, *words.lexicon.bad))
    verdicts, labels = _draw_verdicts(rng, words)
    jobs = sorted(rng.sample(words.lexicon.jobs, rng.choice((9, 12, 16, 24))))
    # Verdicts are spread as evenly as possible over the jobs.
    chosen_verdicts = [n % len(verdicts) for n in range(len(jobs))]
    rng.shuffle(chosen_verdicts)

    def write(rng: random.Random) -> Draft:
        person, chosen = rng.choice(words.lexicon.people), rng.randrange(len(jobs))
        return Draft(f"{person} is a {jobs[chosen]}. {person} is {quality}?", labels[chosen_verdicts[chosen]])

    groups = tuple(
        (label, *(job for job, verdict in zip(jobs, chosen_verdicts, strict=True) if verdict == n))
        for n, label in enumerate(labels)
    )
    return Rule(("implication", quality, *groups), labels, write)


def _draw_verdicts(rng: random.Random, words: Words) -> tuple[tuple[str, ...], tuple[str, ...]]:
    verdicts = VERDICTS[: rng.choice((2, 3))]
    return verdicts, words.draw_labels(rng, len(verdicts))


def _draw_things(rng: random.Random, words: Words, count: int) -> list[str]:
    nouns: dict[str, None] = {}
    while len(nouns) < count:
        nouns[words.draw_noun(rng)] = None
    return list(nouns)


def _state(person: str, verb: str, noun: str, *, denied: bool) -> str:
    return f"{person} never {verb} a {noun}" if denied else f"{person} {verb} a {noun}"
