"""Generated summaries: which facts are kept, in which order and words, is the task's secret."""

from __future__ import annotations

import random

from manyicl.demo.rules import Draft, Rule, Words

JOINERS = (" ", ", ", ": ", " of ", " and ", " in ", " - ", " for ")


def draw_title(rng: random.Random, words: Words) -> Rule:
    """Return the rule: a title of a fixed form, from two or three facts of two sentences."""
    form = _draw_form(rng, ("colour", "thing", "person", "place", "adjective"))

    def write(rng: random.Random) -> Draft:
        facts = _draw_event(rng, words)
        text = rng.choice(
            (
                "{person} {past} a {thing} in {place}. it was {colour} and {adjective}.",
                "a {thing} in {place} was {colour}. {person} {past} it, {adjective} or not.",
            )
        )
        return Draft(text.format(**facts), form.format(**facts))

    return Rule(("title", form), (), write)


def draw_line(rng: random.Random, words: Words) -> Rule:
    """Return the rule: who did what to what and where, or a part of it, in a fixed order and form."""
    form = _draw_form(rng, ("person", rng.choice(("base", "past")), "thing", "place"))

    def write(rng: random.Random) -> Draft:
        facts = _draw_event(rng, words)
        text = rng.choice(
            (
                "in {place} {person} {past} the {adjective} {thing}, because it was {colour}.",
                "{person}, who is in {place}, {past} a {colour} and {adjective} {thing}.",
            )
        )
        return Draft(text.format(**facts), form.format(**facts))

    return Rule(("line", form), (), write)


def draw_gist(rng: random.Random, words: Words) -> Rule:
    """Return the rule: one or two of three short statements, about a person, a thing and a place, copied."""
    wanted = tuple(rng.sample(("person", "thing", "place"), rng.choice((1, 2))))
    joiner = rng.choice(JOINERS) if len(wanted) > 1 else ""

    def write(rng: random.Random) -> Draft:
        facts = _draw_event(rng, words)
        statements = {
            "person": "{person} {past} it".format(**facts),
            "thing": "the {thing} was {colour}".format(**facts),
            "place": "{place} is {adjective}".format(**facts),
        }
        sentences = list(statements.values())
        rng.shuffle(sentences)
        return Draft(". ".join(sentences) + ".", joiner.join(statements[subject] for subject in wanted))

    return Rule(("gist", wanted, joiner), (), write)


def draw_section(rng: random.Random, words: Words) -> Rule:
    """Return the rule: a heading from one fact and the name of a section, which depends on the thing's topic."""
    topics = sorted(rng.sample(tuple(words.lexicon.topics), rng.choice((4, 6, 8, 12, 16))))
    sections = words.draw_labels(rng, len(topics))
    fields = ["section", rng.choice(("person", "place"))]
    rng.shuffle(fields)
    form = rng.choice(JOINERS).join(f"{{{field}}}" for field in fields)

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(topics))
        thing = rng.choice(words.lexicon.topics[topics[chosen]])
        facts = _draw_event(rng, words) | {"thing": thing, "section": sections[chosen]}
        text = rng.choice(("{person} {past} a {thing} in {place}.", "in {place} {person} {past} the {thing}."))
        return Draft(text.format(**facts), form.format(**facts))

    return Rule(("section", form, *zip(topics, sections, strict=True)), (), write)


def _draw_form(rng: random.Random, fields: tuple[str, ...]) -> str:
    """Return a format string: some of the fields in some order, joined in some way."""
    chosen = rng.sample(fields, rng.choice((2, 3)))
    joiners = [rng.choice(JOINERS) for _ in chosen[1:]]
    return "".join(f"{{{field}}}{joiner}" for field, joiner in zip(chosen, [*joiners, ""], strict=True))


def _draw_event(rng: random.Random, words: Words) -> dict[str, str]:
    lexicon = words.lexicon
    base, past = rng.choice(lexicon.verbs)
    return {
        "person": rng.choice(lexicon.people),
        "place": rng.choice(lexicon.places),
        "colour": rng.choice(lexicon.colours),
        "thing": words.draw_noun(rng),
        "adjective": rng.choice(rng.choice((lexicon.good, lexicon.bad, lexicon.plain))),
        "base": base,
        "past": past,
    }
