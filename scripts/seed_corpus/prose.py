"""Text in sentences: story, passage, dialogue, rewrite and glossary.

Every writer takes a generator and about how many words to write. What a document states once it keeps to: a fact said
again is the same fact, so that a reader who looks back is right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from scripts.seed_corpus.grammar import CARRIED, LEXICON, Person, an, draw_people, num_words

from manyicl.demo.lexicon import coin_words

_PAST = tuple(past for _, past in LEXICON.verbs if past not in {"gave", "lost", "found"})
_ADJECTIVES = (*LEXICON.good, *LEXICON.bad, *LEXICON.plain)

_STORY_OPENINGS = (
    "{p} lived in {home} and worked as {a_job}. {p} had {a_thing}.",
    "{p} was {a_job}. the home of {p} was in {home}. {p} owned {a_thing}.",
    "in {home} lived {p}, {a_job}. {p} carried {a_thing} every day.",
    "there was {a_job} with the name {p}. {p} lived in {home} and had {a_thing}.",
    "the {job} {p} lived in {home}. everybody knew the {colour} {noun} of {p}.",
)
_STORY_RECALLS = (
    "{p} lived in {home}.",
    "{p}, who lived in {home}, was still {a_job}.",
    "{p} went back to {home}, for the home of {p} was in {home}.",
    "the {job} {p} was tired and wanted to go home to {home}.",
    "everybody in {home} knew {p} the {job}.",
    "{p} was {a_job}, as we said.",
    "who was the {job}? it was {p}.",
    "where did {p} live? {p} lived in {home}.",
)
_STORY_WEATHER = (
    "in the {when} there was {weather}.",
    "the {weather} came in the {when}.",
    "that {when} nobody liked the {weather}.",
)
_TIMES = ("morning", "evening", "night", "afternoon", "summer", "winter")


def _thing_event(rng: random.Random, cast: list[Person], owners: dict[str, Person]) -> str:
    """Write a sentence about a thing: what somebody did to it, its colour or owner, or that it changed hands."""
    thing = rng.choice(cast)
    noun, colour, owner = thing.noun, thing.colour, owners[thing.noun]
    kind = rng.randrange(7)
    if kind == 0:
        taker = rng.choice([one for one in cast if one is not owner])
        owners[noun] = taker
        end = rng.choice(("so now {q} had the {c} {n}.", "and {q} thanked {p} for the {c} {n}.", "so {q} had it now."))
        end = end.format(p=owner.name, q=taker.name, c=colour, n=noun)
        return f"{owner.name} gave the {noun} to {taker.name}, {end}"
    if kind == 1:
        return f"the {noun} was {colour}, and it belonged to {owner.name}."
    if kind == 2:
        return f"{owner.name} still had the {colour} {noun}."
    if kind == 3:
        return f"who had the {noun}? {owner.name} had it."
    if kind == 4:
        return f"what colour was the {noun}? it was {colour}."
    actor = rng.choice(cast)
    return f"{actor.name} {rng.choice(_PAST)} the {colour} {noun} of {owner.name} in {rng.choice(cast).home}."


def story(rng: random.Random, size: int) -> str:
    """Write people, their homes, jobs and things, then events in order; things change hands, homes and jobs do not."""
    cast = draw_people(rng, count=rng.randint(2, 4))
    owners = {one.noun: one for one in cast}
    slots = [one.slots for one in cast]
    opening = " ".join([rng.choice(_STORY_OPENINGS).format(**each) for each in slots])
    paragraphs = [f"once, {opening}" if rng.random() < 0.3 else opening]
    size -= num_words(opening)
    thens = ("then ", "later ", "after that ", "next ", "soon ", "the next day ", "")
    while size > 0:
        sentences = []
        for _ in range(rng.randint(4, 8)):
            draw = rng.random()
            if draw < 0.5:
                sentence = _thing_event(rng, cast, owners)
            elif draw < 0.78:
                sentence = rng.choice(_STORY_RECALLS).format(**rng.choice(slots))
            elif draw < 0.9:
                one, other = rng.sample(cast, 2)
                place = rng.choice(cast).home
                sentence = f"{one.name} went to {place}. there {one.name} met {other.name} the {other.job}."
                sentence = rng.choice(thens) + sentence
            else:
                weather = rng.choice(LEXICON.topics["weather"])
                sentence = rng.choice(_STORY_WEATHER).format(weather=weather, when=rng.choice(_TIMES))
            sentences.append(sentence)
        paragraphs.append(" ".join(sentences))
        size -= num_words(paragraphs[-1])
    return rng.choice(("\n", "\n\n", " ")).join(paragraphs)


# Attribute -> the phrase after a name.
_TELLINGS = {
    "home": ("lives in {home}", "has a house in {home}", "comes from {home}"),
    "job": ("works as {a_job}", "is {a_job}", "earns money as {a_job}"),
    "thing": ("owns {a_thing}", "has {a_thing}", "carries {a_thing}"),
    "pet": ("keeps {a_pet}", "has {a_pet} at home", "walks with {a_pet}"),
    "age": ("is {age} years old", "is {age}"),
}
# (attributes that must be known, sentence)
_NAMINGS = (
    ({"home"}, "the home of {p} is {home}."),
    ({"job"}, "the job of {p} is {job}."),
    ({"thing"}, "the {noun} of {p} is {colour}."),
    ({"pet"}, "the pet of {p} is {a_pet}."),
    ({"age"}, "the age of {p} is {age}."),
    ({"thing"}, "the colour of the {noun} is {colour}."),
    ({"thing"}, "the {noun} belongs to {p}."),
    ({"pet", "home"}, "the {pet} of {p} lives in {home}."),
    ({"job", "home"}, "the {job} in {home} is {p}."),
    ({"pet"}, "the owner of the {pet} is {p}."),
    ({"pet", "thing"}, "the owner of the {pet} has the {colour} {noun}."),
    ({"job", "thing"}, "the {job} has the {noun}, which is {colour}."),
)


def _recap(rng: random.Random, slots: dict[str, str], known: list[str]) -> str:
    """Write one or two known facts about somebody in other words."""
    first, second = [rng.choice(_TELLINGS[key]).format(**slots) for key in rng.sample(known, 2)]
    draw = rng.random()
    if draw < 0.4:
        needed, naming = rng.choice(_NAMINGS)
        return naming.format(**slots) if needed <= set(known) else f"{slots['p']} {first}."
    if draw < 0.6:
        return f"{slots['p']}, who {first}, {second}."
    return f"the one who {first} {second}." if draw < 0.85 else f"{slots['p']} {first}."


def passage(rng: random.Random, size: int) -> str:
    """Write blocks of facts in several phrasings, each followed by sentences that need one or two of them."""
    everybody = [one.slots for one in draw_people(rng, count=48)]
    blocks = []
    while size > 0:
        cast = [everybody.pop() for _ in range(rng.randint(2, 4))]
        known = rng.sample(sorted(_TELLINGS), rng.randint(3, 5))
        facts = []
        for slots in cast:
            rng.shuffle(known)
            parts = [rng.choice(_TELLINGS[attribute]).format(**slots) for attribute in known]
            facts.append(f"{slots['p']} {parts[0]} and {parts[1]}.")
            facts += [f"{slots['p']} {part}." for part in parts[2:]]
        if rng.random() < 0.5:
            rng.shuffle(facts)
        recaps = [_recap(rng, rng.choice(cast), known) for _ in range(rng.randint(len(cast), 3 * len(cast)))]
        start = rng.choice(("so ", "then we know: ", "in other words, ", ""))
        blocks.append(f"{' '.join(facts)} {start}{' '.join(recaps)}")
        size -= num_words(blocks[-1])
    return rng.choice(("\n", "\n\n")).join(blocks)


# (question, short reply, full reply), all true.
_OPEN_QUESTIONS = (
    ("where does {p} live?", "in {home}.", "{p} lives in {home}."),
    ("what is the job of {p}?", "{job}.", "{p} is {a_job}."),
    ("who is the {job}?", "{p}.", "{p} is the {job}."),
    ("who lives in {home}?", "{p}.", "{p} lives in {home}."),
    ("what colour is the {noun}?", "{colour}.", "the {noun} is {colour}."),
    ("who has the {noun}?", "{p}.", "{p} has the {noun}."),
    ("what does {p} have?", "{a_thing}.", "{p} has {a_thing}."),
    ("how many {pet} friends has {p}?", "{age}.", "{p} has {age}."),
    ("where is the {noun}?", "in {home}.", "{p} has it, so it is in {home}."),
    ("what colour is the thing of the {job}?", "{colour}.", "the {job} is {p}, and the {noun} is {colour}."),
)
# (question with the slot `w` of this kind, kind)
_CLOSED_QUESTIONS = (
    ("does {p} live in {w}?", "home"),
    ("is {p} {w}?", "a_job"),
    ("is the {noun} {w}?", "colour"),
    ("does the {w} belong to {p}?", "noun"),
)


def dialogue(rng: random.Random, size: int) -> str:
    """Write two speakers: one states facts, the other asks about earlier ones, and the replies are right."""
    teller, asker = rng.sample(LEXICON.people, 2)
    mark = rng.choice((": ", " - ", " | ", " said: "))
    full = rng.random()
    cast = [one for one in draw_people(rng, count=rng.randint(3, 8)) if one.name not in (teller, asker)]
    waiting = [one.slots for one in cast]
    told: list[dict[str, str]] = []
    lines: list[str] = []
    hearings = ("i see.", "really?", "good.", "tell me more.", "and then?", "oh, i did not know that.", "thank you.")
    while size > 0:
        start = len(lines)
        if waiting and (not told or rng.random() < 0.4):
            told.append(waiting.pop())
            fact = "{p} is {a_job} and lives in {home}. {p} has {a_thing} and {age} {pet} friends."
            lines.append(f"{teller}{mark}{fact.format(**told[-1])}")
            if rng.random() < 0.4:
                lines.append(f"{asker}{mark}{rng.choice(hearings)}")
        slots = rng.choice(told)
        if rng.random() < 0.6:
            asked, short, said = rng.choice(_OPEN_QUESTIONS)
            reply = (said if rng.random() < full else short).format(**slots)
            asked = asked.format(**slots)
        else:
            asked, kind = rng.choice(_CLOSED_QUESTIONS)
            claimed = slots[kind] if rng.random() < 0.5 else rng.choice(told)[kind]
            asked = asked.format(w=claimed, **slots)
            reply = "yes." if claimed == slots[kind] else f"no, {slots[kind]}." if rng.random() < full else "no."
        lines += [f"{asker}{mark}{asked}", f"{teller}{mark}{reply}"]
        size -= sum(map(num_words, lines[start:]))
    return "\n".join(lines)


# The first, second and third sentence of a paragraph, in four wordings.
_LONG = (
    ("{p} is {a_job} from {home}.", "{p} has {a_thing}, and it is {adj}.", "{p} {past} the {noun} in {place}."),
    ("{p} works as {a_job} in {home}.", "the {noun} of {p} is {colour} and {adj}.", "in {place}, {p} {past} it."),
    ("there is {a_job} in {home}: {p}.", "{p} owns {a_thing}. it is {adj}.", "it was in {place} that {p} {past} it."),
    (
        "in {home} lives {p}, {a_job}.",
        "{p} likes the {adj} {colour} {noun}.",
        "{p} {past} it, and that was in {place}.",
    ),
)
_SHORT = (
    "{p} {past} the {noun}.",
    "the {adj} {noun} of {p}",
    "{noun}, {colour}, {place}",
    "{a_job} {past} {a_noun} in {place}.",
    "the {noun} is {colour} and {adj}. the {job} {past} it.",
    "{p}, {job}, {home}",
    "{p} in {place}",
    "what {p} {past} in {place} was {a_thing}.",
)


def rewrite(rng: random.Random, size: int) -> str:
    """Write paragraphs, each repeated in the document's own way: shorter, as a heading, backwards, ..."""
    way = rng.randrange(len(_SHORT) + 1)
    wordings = rng.sample(_LONG, rng.choice((1, 2, 4)))
    mark = rng.choice(("in short: ", "again: ", "- ", "that is: ", "(", "heading - ", "| "))
    before, join = rng.random() < 0.25, rng.choice((" ", "\n"))
    lines: list[str] = []
    for one in draw_people(rng, count=40):
        past, place, adjective = rng.choice(_PAST), rng.choice(LEXICON.places), rng.choice(_ADJECTIVES)
        slots = one.slots | {"past": past, "place": place, "adj": adjective}
        facts = [fact.format(**slots) for fact in rng.choice(wordings)]
        # The way after the short ones tells the facts backwards.
        short = _SHORT[way].format(**slots) if way < len(_SHORT) else " ".join(reversed(facts))
        other, long = f"{mark}{short}{')' if mark == '(' else ''}", " ".join(facts)
        lines.append(f"{other}{join}{long}" if before else f"{long}{join}{other}")
        size -= num_words(lines[-1])
        if size <= 0:
            break
    return "\n".join(lines)


def _meanings(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
    """Return coined nouns with their topic, coined verbs with a base form, coined adjectives with a colour or tone."""
    coined = coin_words(rng, count=9)
    topics = rng.sample(sorted(LEXICON.topics), rng.randint(2, 4))
    bases = [base for base, _ in rng.sample(LEXICON.verbs, rng.randint(1, 3))]
    qualities = rng.sample((*LEXICON.colours, *LEXICON.plain), rng.randint(1, 2))
    nouns = list(zip(coined[:4], topics, strict=False))
    return nouns, list(zip(coined[4:7], bases, strict=False)), list(zip(coined[7:], qualities, strict=False))


def _use(rng: random.Random, nouns: Sequence[tuple[str, str]], verbs: Sequence[tuple[str, str]], quality: str) -> str:
    """Use coined words; `quality` is a coined adjective and its meaning, such as `golo/red`."""
    new_quality, old_quality = quality.split("/")
    new_noun, topic = rng.choice(nouns)
    new_verb, base = rng.choice(verbs)
    name, thing = rng.choice(LEXICON.people), rng.choice(CARRIED)
    kind = rng.randrange(9)
    if kind == 0:
        return f"{name} has {an(new_noun)}, so {name} has {an(topic)}."
    if kind == 1:
        return f"{name} will {new_verb} the {thing}. that is, {name} will {base} the {thing}."
    if kind == 2:
        return f"the {new_quality} {thing} is {old_quality}."
    if kind == 3:
        asked = rng.choice(nouns)[1]
        return f"is {an(new_noun)} {an(asked)}? {'yes' if asked == topic else 'no'}."
    if kind == 4:
        return f"{name} likes to {new_verb} {an(f'{new_quality} {thing}')}. it is {old_quality}."
    if kind == 5:
        known = rng.choice(LEXICON.topics[topic])
        return f"{an(new_noun)} and {an(known)} are both of the kind {topic}."
    if kind == 6:
        return f"{name} can {new_verb} {an(new_noun)}: that is to {base} {an(topic)}."
    if kind == 7:
        return f"which word is for {an(topic)}? {new_noun}."
    return f"{name} saw {an(f'{new_quality} {new_noun}')}, {an(f'{old_quality} {topic}')}."


def glossary(rng: random.Random, size: int) -> str:
    """Give coined words a meaning, then use them with it."""
    nouns, verbs, qualities = _meanings(rng)
    of_noun = rng.choice(("{a} is a kind of {m}.", "{w}: {a_m}.", "the word {w} is for a kind of {m}."))
    of_verb = rng.choice(("to {w} is to {m}.", "{w}: to {m}.", "when we {w}, we {m}."))
    of_quality = rng.choice(("{w} means {m}.", "{w}: {m}.", "what is {w} is {m}."))
    lines = [of_noun.format(a=an(word), w=word, m=topic, a_m=an(topic)) for word, topic in nouns]
    lines += [of_verb.format(w=word, m=base) for word, base in verbs]
    lines += [of_quality.format(w=word, m=meaning) for word, meaning in qualities]
    rng.shuffle(lines)
    size -= sum(map(num_words, lines))
    while size > 0:
        lines.append(_use(rng, nouns, verbs, "/".join(rng.choice(qualities))))
        size -= num_words(lines[-1])
    return rng.choice(("\n", " ")).join(lines)
