"""Generated classification by topic, tone, keyword, group or form; the names of the classes give no hint."""

from __future__ import annotations

import random

from manyicl.demo.rules import Draft, Rule, Words, name_sentence

# Patterns of three or four words: which of them are the same.
SHAPES = ((0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0))
ENDINGS = (".", "?", "!", ";", ":")


def draw_topic(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the class is the topic of the sentence's noun."""
    topics = rng.sample(tuple(words.lexicon.topics), rng.choice((2, 3, 4, 6, 8, 12, 16)))
    labels = words.draw_labels(rng, len(topics))

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(topics))
        return Draft(name_sentence(rng, words, rng.choice(words.lexicon.topics[topics[chosen]])), labels[chosen])

    return Rule(("topic", *zip(topics, labels, strict=True)), labels, write)


def draw_tone(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the class is the tone of the sentence's adjective: good, bad or, in some tasks, neither."""
    tones = ("good", "bad") if rng.random() < 0.5 else ("good", "bad", "plain")
    labels = words.draw_labels(rng, len(tones))

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(tones))
        adjective = rng.choice(getattr(words.lexicon, tones[chosen]))
        noun, person = words.draw_noun(rng), rng.choice(words.lexicon.people)
        texts = (f"the {noun} is {adjective}", f"a {adjective} {noun}", f"{person} has a {adjective} {noun}")
        return Draft(rng.choice(texts), labels[chosen])

    return Rule(("tone", *zip(tones, labels, strict=True)), labels, write)


def draw_keyword(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the sentences of each class contain a word of its own: a colour, place, person or verb."""
    source = rng.choice(("colours", "places", "people", "verbs"))
    known = [past for _, past in words.lexicon.verbs] if source == "verbs" else getattr(words.lexicon, source)
    keywords = rng.sample(tuple(known), rng.choice((2, 3, 4, 6, 8, 12, 16)))
    labels = words.draw_labels(rng, len(keywords))

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(keywords))
        return Draft(_sentence_with(rng, words, source, keywords[chosen]), labels[chosen])

    return Rule(("keyword", source, *zip(keywords, labels, strict=True)), labels, write)


def draw_group(rng: random.Random, words: Words) -> Rule:
    """Return the rule: each class is a group of colours, places or jobs that have nothing else in common."""
    source = rng.choice(("colours", "places", "jobs"))
    num_groups = rng.choice((2, 3, 4))
    known = getattr(words.lexicon, source)
    members = rng.sample(known, min(len(known), num_groups * rng.choice((3, 4, 6, 8))))
    labels = words.draw_labels(rng, num_groups)

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(members))
        return Draft(_sentence_with(rng, words, source, members[chosen]), labels[chosen % num_groups])

    groups = tuple((label, *members[n::num_groups]) for n, label in enumerate(labels))
    return Rule(("group", source, *groups), labels, write)


def draw_form(rng: random.Random, words: Words) -> Rule:
    """Return the rule: the class is the form of the input: which words repeat, its ending, or how many it lists."""
    aspect = rng.choice(("shape", "ending", "count"))
    forms: tuple[object, ...] = {"shape": SHAPES, "ending": ENDINGS, "count": (1, 2, 3, 4, 5)}[aspect]
    forms = tuple(rng.sample(forms, rng.choice((2, 3, 4))))
    labels = words.draw_labels(rng, len(forms))

    def write(rng: random.Random) -> Draft:
        chosen = rng.randrange(len(forms))
        form = forms[chosen]
        if isinstance(form, tuple):
            nouns = rng.sample(words.lexicon.topics[rng.choice(tuple(words.lexicon.topics))], 3)
            text = " ".join(nouns[place] for place in form)
        elif isinstance(form, str):
            text = name_sentence(rng, words, words.draw_noun(rng)) + form
        else:
            text = ", ".join(rng.sample(words.lexicon.topics[rng.choice(tuple(words.lexicon.topics))], int(str(form))))
        return Draft(text, labels[chosen])

    return Rule(("form", aspect, *zip(forms, labels, strict=True)), labels, write)


def _sentence_with(rng: random.Random, words: Words, source: str, keyword: str) -> str:
    """Return a sentence that contains `keyword` and no other word of the list it comes from."""
    noun = words.draw_noun(rng)
    person, other = rng.sample(words.lexicon.people, 2)
    past = rng.choice(words.lexicon.verbs)[1]
    texts = {
        "colours": (f"{person} has a {keyword} {noun}", f"the {noun} is {keyword}"),
        "places": (f"{person} is in {keyword}", f"the {noun} is from {keyword}"),
        "jobs": (f"{person} is a {keyword}", f"the {keyword} {past} a {noun}"),
        "people": (f"{keyword} {past} a {noun}", f"the {noun} of {keyword}"),
        "verbs": (f"{person} {keyword} a {noun}", f"{other} {keyword} it"),
    }
    return rng.choice(texts[source])
