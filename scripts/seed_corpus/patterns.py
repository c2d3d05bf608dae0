"""Text in lines: list, table, repeat and record. What comes later follows from what came before.

Every writer takes a generator and about how many words to write.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import accumulate

from scripts.seed_corpus.grammar import LEXICON, draw_people, num_words, number_word

from manyicl.demo.lexicon import all_words, coin_words

_ALL = all_words(LEXICON)
_PAST = tuple(past for _, past in LEXICON.verbs)
_NOUNS = tuple(noun for nouns in LEXICON.topics.values() for noun in nouns)


def _list_lines(heading: str, items: Sequence[str], mark: str) -> str:
    """Write the items under their heading in one of the forms: bullets, numbers, or in a line."""
    if mark == "1":
        return "\n".join([f"{heading}:", *(f"{place}) {item}" for place, item in enumerate(items, 1))])
    if mark in {"- ", "| "}:
        return "\n".join([f"{heading}:", *(mark + item for item in items)])
    return f"{heading}: {mark.join(items)}."


def _about_list(rng: random.Random, topic: str, items: list[str], mark: str) -> str:
    """Repeat the list in another order, with one item less or more, or state its count, ends or members."""
    item = rng.choice(items)
    fresh = rng.choice([noun for noun in LEXICON.topics[topic] if noun not in items])
    kind = rng.randrange(12)
    if kind < 7:
        heading, others = (
            (f"{topic}, the other way round", items[::-1]),
            (f"{topic}, mixed", rng.sample(items, len(items))),
            (f"{topic} from a to z", sorted(items)),
            (f"{topic} without {item}", [one for one in items if one != item]),
            (f"{topic} and then {fresh}", [*items, fresh]),
            (f"{topic} once more", items),
            (f"{topic} with {fresh} for {item}", [fresh if one == item else one for one in items]),
        )[kind]
        return _list_lines(heading, others, mark)
    return (
        f"the {topic} list has {len(items)} items.",
        f"how many items has the {topic} list? {number_word(len(items))}.",
        f"first in {topic}: {items[0]}. last in {topic}: {items[-1]}.",
        f"where is {item}? in {topic}, at {items.index(item) + 1}.",
        f"is {fresh} in the {topic} list? no. is {item}? yes.",
    )[kind - 7]


def listing(rng: random.Random, size: int) -> str:
    """Write lists under headings, and statements about earlier lists."""
    marks = (", ", "- ", "1", "; ", " and ", "| ")
    mark, again = rng.choice(marks), rng.choice(marks)
    blocks: list[str] = []
    lists: list[tuple[str, list[str]]] = []
    topics = rng.sample(sorted(LEXICON.topics), 24)
    while size > 0:
        if topics and (not lists or rng.random() < 0.25):
            topic = topics.pop()
            lists.append((topic, rng.sample(LEXICON.topics[topic], rng.randint(3, 9))))
            blocks.append(_list_lines(topic, lists[-1][1], mark))
            size -= num_words(blocks[-1])
        blocks.append(_about_list(rng, *rng.choice(lists), again))
        size -= num_words(blocks[-1])
    return "\n".join(blocks)


# The first column of a table; a code can depend on any of its slots.
_FORMS = (
    *("{noun}", "{noun}", "{adjective} {noun}", "{colour} {noun}", "{place}", "{person}", "{number}", "{adjective}"),
    *("{person} {verb} the {noun}", "{person} {verb} the {colour} {noun}", "the {adjective} {noun} in {place}"),
    *("{person} the {job}", "{person} the {job} {verb} the {noun}", "{number} {colour} {noun}", "{word} {noun} {job}"),
    *("in {place} {person} {verb} the {adjective} {noun}", "{noun} of {person} in {place}", "{word} {word2} {colour}"),
    *("the {noun} is {adjective}", "the {noun} was {colour} and {adjective}", "{adjective} {job} from {place}"),
)
_SLOT_WORDS = {
    "colour": LEXICON.colours,
    "place": LEXICON.places,
    "person": LEXICON.people,
    "job": LEXICON.jobs,
    "verb": _PAST,
    "word": _ALL,
    "word2": LEXICON.labels,
}


def _draw_classes(rng: random.Random, slot: str, *, count: int) -> list[Sequence[str]]:
    """Return the words of each class: nouns by topic, adjectives by tone, numbers by parity, else one word each."""
    if slot == "noun" and rng.random() < 0.75:
        width = rng.choice((4, 8, 16, 32))
        return [rng.sample(LEXICON.topics[topic], width) for topic in rng.sample(sorted(LEXICON.topics), count)]
    if slot == "adjective" and rng.random() < 0.75:
        width = rng.choice((6, 20, 60))
        tones = [LEXICON.good, LEXICON.bad, LEXICON.plain]
        return [rng.sample(tone, width) for tone in rng.sample(tones, min(3, count))]
    if slot == "number":
        return [[str(number) for number in range(start, 100, 2)] for start in rng.sample((0, 1), 2)]
    words = _SLOT_WORDS.get(slot) or (_NOUNS if slot == "noun" else LEXICON.plain)
    return [[word] for word in rng.sample(words, count)]


def _draw_codes(rng: random.Random, *, count: int) -> list[str]:
    """Return a distinct code for each class, of one kind: words, coined words, numbers or letters."""
    kind = rng.randrange(6)
    if kind < 2:
        return rng.sample(LEXICON.labels, count)
    if kind == 2:
        return coin_words(rng, count=count)
    if kind == 3:
        return [str(number) for number in rng.sample(range(100), count)]
    return rng.sample(string.ascii_lowercase, count) if kind == 4 else rng.sample(_ALL, count)


def zipf(count: int, power: float) -> list[float]:
    """Return cumulative weights of ranks 1 to `count`, falling as rank to the minus `power`, for random.choices."""
    return list(accumulate(rank**-power for rank in range(1, count + 1)))


def table(rng: random.Random, size: int) -> str:
    """Write rows of a word or short sentence and one or two codes; a code is a function of one slot's class."""
    form = rng.choice(_FORMS)
    slots = [slot for _, slot, _, _ in string.Formatter().parse(form) if slot]
    classes = {slot: _draw_classes(rng, slot, count=rng.randint(2, 8)) for slot in slots}
    weights = {slot: zipf(len(words), rng.choice((0.0, 0.7, 1.2))) for slot, words in classes.items()}
    ruled = rng.sample(slots, rng.choice((1, 1, 2)) if len(slots) > 1 else 1)
    codes = {slot: _draw_codes(rng, count=len(classes[slot])) for slot in ruled}
    separator = rng.choice((" | ", "\t", "; ", ", ", " = ", " : ", " - ", ": ", " is ", " goes with ", " ("))
    close = ")" if separator == " (" else ""
    if close and len(ruled) == 2:
        separator, close = " | ", ""
    numbered, turned, told = rng.random() < 0.1, not close and rng.random() < 0.12, rng.random() < 0.15
    ranks = {slot: rng.choices(range(len(words)), cum_weights=weights[slot], k=128) for slot, words in classes.items()}
    lines = [f"table of {len(classes[ruled[0]])} kinds"] if told else []
    for row in range(128):
        if size <= 0 and row >= 8:
            break
        drawn = {slot: rng.choice(words[ranks[slot][row]]) for slot, words in classes.items()}
        cells = [form.format(**drawn), *(codes[slot][ranks[slot][row]] for slot in ruled)]
        line = separator.join(reversed(cells) if turned else cells) + close
        lines.append(f"{row + 1}) {line}" if numbered else line)
        size -= len(line.split())
    return rng.choice(("\n", "\n", "\n", "\n", " . ")).join(lines)


def _draw_runs(rng: random.Random, pool: Sequence[str], cumulative: Sequence[float]) -> list[list[str]]:
    """Return sequences of 3 to 14 words."""
    return [rng.choices(pool, cum_weights=cumulative, k=rng.randint(3, 14)) for _ in range(rng.randint(2, 4))]


def _repeat_runs(rng: random.Random, size: int, pool: Sequence[str], cumulative: Sequence[float]) -> list[str]:
    """Return sequences repeated 2 to 6 times with gaps; in some documents words are swapped, always in the same way."""
    swapped = rng.random() < 0.4
    parts: list[str] = []
    while size > 0:
        runs = _draw_runs(rng, pool, cumulative)
        other = {word: rng.choice(pool) for run in runs for word in rng.sample(run, 1)} if swapped else {}
        turns = [run for run in runs for _ in range(rng.randint(2, 6))]
        rng.shuffle(turns)
        for run in turns:
            said = [other.get(word, word) for word in run] if other and rng.random() < 0.5 else run
            gap = rng.choices(pool, cum_weights=cumulative, k=rng.randint(0, 5))
            parts.append(" ".join([*said, *gap]))
            size -= len(run) + len(gap)
            if size <= 0:
                break
    return parts


def _repeat_pairs(rng: random.Random, size: int, pool: Sequence[str], cumulative: Sequence[float]) -> list[str]:
    """Return pairs: a key is always followed by the same one to three words."""
    keys = list(dict.fromkeys(rng.choices(pool, cum_weights=cumulative, k=rng.randint(6, 30))))
    width = rng.randint(1, 3)
    follows = {key: " ".join(rng.choices(_ALL, k=width)) for key in keys}
    cumulative = zipf(len(keys), rng.choice((0.0, 1.0)))
    joint = rng.choice((" ", " ", ", ", " - ", " and "))
    drawn = rng.choices(keys, cum_weights=cumulative, k=size // (1 + width + len(joint) // 3) + 1)
    return [f"{key}{joint}{follows[key]}" for key in drawn]


_FRAMES = (
    "{p} wrote {s} on the wall",
    "then {p} sang {s} again",
    "on the sign in {t} we read {s}",
    "{p} and {q} know the song {s} by heart",
    "{p} heard {s} and then went to {t}",
    "the note said {s}",
    "{s} was what {p} said to {q}",
)


def repeat(rng: random.Random, size: int) -> str:
    """Write sequences of random words that repeat: alone, with a word swapped, as pairs, or inside sentences."""
    pool = rng.sample(_ALL, rng.choice((20, 40, 80, 200)))
    cumulative = zipf(len(pool), rng.choice((0.0, 0.6, 1.0)))
    kind = rng.randrange(4)
    joint = rng.choice((" ", "\n", ", ", " ; ", ". ", " | "))
    size = size if len(joint) < 3 else 3 * size // 4  # the marks between pairs count as words
    if kind == 0:
        return joint.join(_repeat_pairs(rng, size, pool, cumulative))
    if kind < 3:
        return joint.join(_repeat_runs(rng, size, pool, cumulative))
    sentences = []
    songs = [" ".join(run) for run in _draw_runs(rng, pool, cumulative)]
    people, towns = rng.sample(LEXICON.people, 4), rng.sample(LEXICON.places, 3)
    while size > 0:
        one, other = rng.sample(people, 2)
        said = rng.choice(_FRAMES).format(p=one, q=other, t=rng.choice(towns), s=rng.choice(songs))
        sentences.append(f"{said}.")
        size -= num_words(said)
    return rng.choice((" ", "\n")).join(sentences)


_LOOK_UPS = ("{key} of {p}{mark}{value}", "the {key} of {p} is {value}", "{p}, {key}{mark}{value}")


def record(rng: random.Random, size: int) -> str:
    """Write people as lines of key and value, the keys in any order, and look facts up, also by another fact."""
    everybody = draw_people(rng, count=40)
    keys = rng.sample(("home", "job", "pet", "thing", "colour", "age"), rng.randint(3, 6))
    mark, rule = rng.choice((": ", " = ", " - ", " : ")), rng.choice(("---", "", "next", "|"))
    inline, mixed, look_up = rng.random() < 0.3, rng.random() < 0.7, rng.choice(_LOOK_UPS)
    known: list[tuple[str, dict[str, str]]] = []
    lines = []
    while size > 0:
        for _ in range(min(rng.randint(2, 4), len(everybody))):
            one = everybody.pop()
            every = {"home": one.home, "job": one.job, "pet": one.pet, "thing": one.noun, "colour": one.colour}
            every["age"] = str(one.age)
            known.append((one.name, {key: every[key] for key in keys}))
            if mixed:
                rng.shuffle(keys)
            block = [f"name{mark}{one.name}", *(f"{key}{mark}{every[key]}" for key in keys)]
            lines.append("; ".join(block) if inline else "\n".join(block))
            size -= num_words(lines[-1])
            if rule and not inline:
                lines.append(rule)
        for name, facts in rng.choices(known, k=rng.randint(2, 6)):
            key, other = rng.sample(keys, 2)
            if rng.random() < 0.65 or "colour" in (key, other):
                lines.append(look_up.format(key=key, p=name, mark=mark, value=facts[key]))
            else:
                lines.append(f"{key} {facts[key]}, {other}{mark}{facts[other]}")
            size -= num_words(lines[-1])
    return "\n".join(lines)
