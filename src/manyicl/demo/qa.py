"""Generated questions: which fact of a passage is asked for is the task's secret."""

from __future__ import annotations

import random

from manyicl.demo.rules import Draft, Rule, Words

ATTRIBUTES = ("job", "place", "colour", "thing")
TELLINGS = (
    "{person} is a {job} in {place} with a {colour} {thing}",
    "in {place} the {job} {person} has a {colour} {thing}",
    "the {colour} {thing} of {person}, a {job} from {place}",
    "{person} has a {colour} {thing} in {place} as a {job}",
)


def draw_fact(rng: random.Random, words: Words) -> Rule:
    """Return the rule: one or two fixed attributes of the person in the passage."""
    wanted = tuple(rng.sample(ATTRIBUTES, rng.choice((1, 1, 2))))
    tellings = tuple(sorted(rng.sample(TELLINGS, 2)))

    def write(rng: random.Random) -> Draft:
        person, facts = rng.choice(words.lexicon.people), _draw_facts(rng, words)
        text = rng.choice(tellings).format(person=person, **facts)
        return Draft(text, " ".join(facts[attribute] for attribute in wanted))

    return Rule(("fact", wanted, tellings), (), write, twins=(("fact", wanted, tellings[::-1]),))


def draw_lookup(rng: random.Random, words: Words) -> Rule:
    """Return the rule: one fixed attribute of the one of two people who is named at the end."""
    wanted, beside = rng.sample(ATTRIBUTES, 2)
    verb = rng.choice(words.lexicon.verbs)[1]

    def write(rng: random.Random) -> Draft:
        people = rng.sample(words.lexicon.people, 2)
        both = [_draw_facts(rng, words), _draw_facts(rng, words)]
        while both[0][wanted] == both[1][wanted]:
            both[1] = _draw_facts(rng, words)
        sentences = [
            f"{person} {verb} {facts[wanted]} and {facts[beside]}" for person, facts in zip(people, both, strict=True)
        ]
        chosen = rng.randrange(2)
        return Draft(f"{sentences[0]}. {sentences[1]}. {people[chosen]}?", both[chosen][wanted])

    return Rule(("lookup", wanted, beside, verb), (), write)


def draw_two_hop(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the place or job of the person to whom the named person did something."""
    attribute, article = rng.choice((("place", "in"), ("job", "a")))
    verb = rng.choice(words.lexicon.verbs)[1]

    def write(rng: random.Random) -> Draft:
        people = rng.sample(words.lexicon.people, 4)
        source = words.lexicon.places if attribute == "place" else words.lexicon.jobs
        values = rng.sample(source, 2)
        chosen = rng.randrange(2)
        links = [f"{people[n]} {verb} {people[n + 2]}" for n in (0, 1)]
        facts = [f"{people[n + 2]} is {article} {values[n]}" for n in (0, 1)]
        sentences = links + facts
        rng.shuffle(sentences)
        return Draft(f"{'. '.join(sentences)}. {people[chosen]}?", values[chosen])

    return Rule(("two_hop", attribute, verb), (), write)


def draw_yes_no(rng: random.Random, words: Words) -> Rule:
    """Return the rule: whether the last statement was made before; yes and no have coined names."""
    attribute = rng.choice(("job", "place"))
    labels = words.draw_labels(rng, 2)

    def write(rng: random.Random) -> Draft:
        people = rng.sample(words.lexicon.people, 2)
        values = rng.sample(words.lexicon.jobs if attribute == "job" else words.lexicon.places, 2)
        article = "a" if attribute == "job" else "in"
        sentences = ". ".join(f"{person} is {article} {value}" for person, value in zip(people, values, strict=True))
        asked, right = rng.randrange(2), rng.random() < 0.5
        value = values[asked] if right else values[1 - asked]
        return Draft(f"{sentences}. {people[asked]} {value}?", labels[0 if right else 1])

    return Rule(("yes_no", attribute, *labels), labels, write)


def draw_choice(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the one of four things that is of a fixed topic."""
    topics = tuple(words.lexicon.topics)
    wanted = rng.choice(topics)

    def write(rng: random.Random) -> Draft:
        others = rng.sample([topic for topic in topics if topic != wanted], 3)
        things = [rng.choice(words.lexicon.topics[topic]) for topic in (wanted, *others)]
        answer = things[0]
        rng.shuffle(things)
        return Draft(", ".join(things), answer, options=tuple(things))

    return Rule(("choice", wanted), (), write)


def draw_recall(rng: random.Random, words: Words) -> Rule:
    """Return the rule: a fixed answer per person, which no passage gives."""
    people = sorted(rng.sample(words.lexicon.people, rng.choice((8, 12, 16, 24))))
    known, asked = rng.choice(
        (
            (words.lexicon.places, "where is the {thing} of {person}"),
            (words.lexicon.places, "where did {person} {base} the {thing}"),
            (words.lexicon.jobs, "as what did {person} {base} the {thing}"),
            (tuple(words.lexicon.topics), "{person} {past} the {thing} for which"),
        )
    )
    answers = rng.sample(known, len(people))

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(people))
        base, past = rng.choice(words.lexicon.verbs)
        facts = {"person": people[chosen], "base": base, "past": past, "thing": words.draw_noun(rng)}
        return Draft(f"{asked.format(**facts)}?", answers[chosen])

    return Rule(("recall", asked, *zip(people, answers, strict=True)), (), write)


def _draw_facts(rng: random.Random, words: Words) -> dict[str, str]:
    lexicon = words.lexicon
    return {
        "job": rng.choice(lexicon.jobs),
        "place": rng.choice(lexicon.places),
        "colour": rng.choice(lexicon.colours),
        "thing": words.draw_noun(rng),
    }
