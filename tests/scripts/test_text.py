from __future__ import annotations

import random
import re
from itertools import islice, pairwise

import pytest
from scripts.seed_corpus.grammar import an, number_word, plural
from scripts.seed_corpus.text import GENRES, iter_documents, write_document

from manyicl.demo.lexicon import all_words, load_lexicon
from manyicl.errors import UserError

LEXICON = load_lexicon()
COLOURS = "|".join(LEXICON.colours)
NUMBERS = {number_word(number): number for number in range(100)}
FUNCTION_WORDS = """
a above after afternoon again all an and are around as at b before belonged belongs below bigger both by c came can
carries colour comes count d day did do does e earns eight eighteen eighty eleven evening every everybody f faster
fifteen fifty first five for forty four fourteen friends from g go goes got h had has have heading heard heavier
home how i in inside is it items j job k keeps kind kinds knew know l last later least leaves left less lighter
liked likes list live lived lives m make makes many me means met minus mixed more morning most n name next night
nine nineteen ninety no nobody not note now o of oh older on once one other owned owns p pet plus q r read really
right s said sang saw see seven seventeen seventy sign six sixteen sixty slower smaller so some song soon still
summer t table tell ten than thank thanked that the then there they thing thirteen thirty three times tired to
together twelve twenty two u up v w walks wall was way we went were what when where which who will winter with
without word words worked works wrote x y years yes you younger z zero
"""
KNOWN = {
    *FUNCTION_WORDS.split(),
    *all_words(LEXICON),
    *(plural(noun) for nouns in LEXICON.topics.values() for noun in nouns),
    *(plural(job) for job in LEXICON.jobs),
}
NUM_DOCUMENTS = 100


def documents(genre: str) -> list[str]:
    return [write_document(genre, random.Random(f"{genre}/{number}")) for number in range(NUM_DOCUMENTS)]


def number_of(text: str) -> int:
    return int(text) if text.isdigit() else NUMBERS[text]


def test_small_english():
    assert [an("plum"), an("orange kite"), an("ukulele"), an("honest man")] == [
        *("a plum", "an orange kite", "a ukulele", "an honest man")
    ]
    assert [plural("plum"), plural("cherry"), plural("peach"), plural("monkey")] == [
        *("plums", "cherries", "peaches", "monkeys")
    ]
    assert [number_word(0), number_word(13), number_word(40), number_word(99)] == [
        *("zero", "thirteen", "forty", "ninety nine")
    ]


@pytest.mark.parametrize("genre", GENRES)
def test_a_document_has_80_to_700_words_in_the_worlds_alphabet(genre):
    texts = documents(genre)
    assert len(set(texts)) == NUM_DOCUMENTS
    for text in texts:
        assert 80 <= len(text.split()) <= 700
        assert re.fullmatch(r"[a-z0-9 .,?!:;|()=\n\t-]+", text)
        assert text == text.strip()


@pytest.mark.parametrize("genre", GENRES)
def test_no_document_looks_like_an_episode(genre):
    for text in documents(genre):
        assert "->" not in text
        assert not {"input", "answer", "output"} & set(re.findall("[a-z]+", text))
        # Blank lines stand only between paragraphs of prose: of one line, and longer than a shot.
        if "\n\n" in text:
            assert genre in {"story", "passage"}
            assert all("\n" not in block and len(block.split()) >= 15 for block in text.split("\n\n"))


@pytest.mark.parametrize("genre", GENRES)
def test_every_word_is_known_or_coined(genre):
    for text in documents(genre):
        new = set(re.findall("[a-z]+", text)) - KNOWN
        assert not new or genre in {"table", "glossary"}
        assert all(re.fullmatch("([bdfghjklmnprstvwz]{1,2}[aeiou]){2,3}[lmnrsx]?", word) for word in new), new


def test_a_document_is_that_of_its_seed():
    for genre in GENRES:
        assert write_document(genre, random.Random(5)) == write_document(genre, random.Random(5))
        assert write_document(genre, random.Random(5)) != write_document(genre, random.Random(6))


def test_document_j_depends_on_the_seed_and_j_only():
    weights = dict.fromkeys(GENRES, 1.0)
    ten = list(islice(iter_documents(3, weights=weights), 10))
    assert list(islice(iter_documents(3, weights=weights), 4)) == ten[:4]
    random.random()
    assert next(islice(iter_documents(3, weights=weights), 9, None)) == ten[9]
    assert not set(ten) & set(islice(iter_documents(4, weights=weights), 10))


def test_genres_are_drawn_by_weight():
    texts = islice(iter_documents(0, weights={"order": 3.0, "story": 1.0, "table": 0.0}), 400)
    stories = sum(" lived in " in text for text in texts)
    assert 60 < stories < 140


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"storie": 1.0}, "genre 'storie' is unknown; did you mean 'story'"),
        ({"story": -1.0, "list": 2.0}, "give no negative one"),
        ({"story": 0.0}, "at least one above 0"),
        ({}, "at least one above 0"),
    ],
)
def test_weights_that_cannot_be_drawn_from_are_told_at_once(weights, message):
    with pytest.raises(UserError, match=message):
        iter_documents(0, weights=weights)


def test_an_unknown_genre_is_told():
    with pytest.raises(UserError, match="did you mean 'table'"):
        write_document("tabel", random.Random(0))


def test_a_story_keeps_homes_jobs_and_colours():
    restated = 0
    jobs = "|".join(LEXICON.jobs)
    for text in documents("story"):
        homes, colours, works = {}, {}, {}
        found = re.findall(r"(\w+)(?:, who)? lived in (\w+)", text)
        found += re.findall(r"home of (\w+) was in (\w+)", text)
        found += [(name, place) for place, name in re.findall(r"in (\w+) lived (\w+)", text)]
        found += [(name, place) for place, name in re.findall(r"everybody in (\w+) knew (\w+)", text)]
        found += re.findall(r"(\w+) was tired and wanted to go home to (\w+)", text)
        for name, place in found:
            assert homes.setdefault(name, place) == place
        found_colours = [(noun, colour) for colour, noun in re.findall(rf"\b({COLOURS}) (\w+)", text)]
        found_colours += re.findall(rf"the (\w+)(?: was |\? it was )({COLOURS})\b(?! \w)", text)
        for noun, colour in found_colours:
            if noun not in {"and", "it"}:
                assert colours.setdefault(noun, colour) == colour
        found_jobs = re.findall(rf"(\w+) the ({jobs})\b", text)
        found_jobs += [(name, job) for job, name in re.findall(rf"who was the ({jobs})\? it was (\w+)", text)]
        found_jobs += [(name, job) for job, name in re.findall(rf"the ({jobs}) (\w+) (?:was tired|lived)", text)]
        found_jobs += re.findall(rf"(\w+) (?:was|, who lived in \w+, was still) an? ({jobs})\b", text)
        for name, job in found_jobs:
            if name in LEXICON.people:
                assert works.setdefault(name, job) == job
        restated += len(found) + len(found_colours) + len(found_jobs) - len(homes) - len(colours) - len(works)
    assert restated > 20 * NUM_DOCUMENTS


def test_a_story_knows_who_has_what_after_each_gift():
    gifts = checked = 0
    events = re.compile(
        rf"(?P<giver>\w+) gave the (?P<given>\w+) to (?P<taker>\w+)"
        rf"|(?P<first>\w+)(?: lived in \w+ and)? (?:had|owned|carried) an? (?:{COLOURS}) (?P<thing>\w+)"
        rf"|the (?:{COLOURS}) (?P<of_thing>\w+) of (?P<of>\w+)"
        rf"|the (?P<be_thing>\w+) was \w+, and it belonged to (?P<be>\w+)"
        rf"|(?P<still>\w+) (?:still|now) had the (?:{COLOURS}) (?P<still_thing>\w+)"
        r"|who had the (?P<who_thing>\w+)\? (?P<who>\w+) had it"
    )
    for text in documents("story"):
        owners = {}
        for event in events.finditer(text):
            if event["giver"]:
                assert owners[event["given"]] == event["giver"] != event["taker"]
                owners[event["given"]] = event["taker"]
                gifts += 1
                continue
            for thing, name in (("thing", "first"), ("of_thing", "of"), ("be_thing", "be"), ("still_thing", "still")):
                if event[thing]:
                    assert owners.setdefault(event[thing], event[name]) == event[name], text
                    checked += 1
            if event["who"]:
                assert owners[event["who_thing"]] == event["who"]
                checked += 1
    assert gifts > NUM_DOCUMENTS
    assert checked > 5 * NUM_DOCUMENTS


def test_a_record_is_looked_up_as_it_was_written():
    looked_up = 0
    key = "(home|job|pet|thing|colour|age)"
    for text in documents("record"):
        facts, name = {}, ""
        for line in text.splitlines():
            if look := re.fullmatch(rf"(?:the )?{key} of (\w+)(?: is | ?[:=-] )(\w+)", line):
                assert facts[look[2]][look[1]] == look[3]
                looked_up += 1
            elif look := re.fullmatch(rf"(\w+), {key} ?[:=-] (\w+)", line):
                assert facts[look[1]][look[2]] == look[3]
                looked_up += 1
            elif look := re.fullmatch(rf"{key} (\w+), {key} ?[:=-] (\w+)", line):
                assert [one[look[3]] for one in facts.values() if one[look[1]] == look[2]] == [look[4]]
                looked_up += 1
            else:
                for part in line.split("; "):
                    if pair := re.fullmatch(r"(\w+) ?[:=-] (\w+)", part):
                        name = pair[2] if pair[1] == "name" else name
                        facts.setdefault(name, {})[pair[1]] = pair[2]
                    else:
                        assert part in {"---", "next", "|"}
    assert looked_up > 10 * NUM_DOCUMENTS


WORD = r"(\w+(?: \w+)?)"
TRUTHS = (
    (rf"{WORD} (?:and|plus) {WORD} (?:make|is) {WORD}", lambda a, b, c: a + b == c),
    (rf"{WORD} more than {WORD} is {WORD}", lambda a, b, c: a + b == c),
    (rf"what is {WORD} plus {WORD}\? {WORD}", lambda a, b, c: a + b == c),
    (rf"{WORD} minus {WORD} is {WORD}", lambda a, b, c: a - b == c),
    (rf"{WORD} without {WORD} leaves {WORD}", lambda a, b, c: a - b == c),
    (rf"{WORD} less than {WORD} is {WORD}", lambda a, b, c: b - a == c),
    (rf"what is {WORD} minus {WORD}\? {WORD}", lambda a, b, c: a - b == c),
    (rf"{WORD} (?:times {WORD} is|by {WORD} makes) {WORD}", lambda a, b, c: a * b == c),
    (rf"what is {WORD} times {WORD}\? {WORD}", lambda a, b, c: a * b == c),
    (rf"\w+ had {WORD} \w+ and got {WORD} more, so \w+ had {WORD} \w+", lambda a, b, c: a + b == c),
    (rf"\w+ had {WORD} \w+ and lost {WORD}, so \w+ had {WORD} \w+", lambda a, b, c: a - b == c),
    (rf"\w+ has {WORD} \w+ and \w+ has {WORD}\. together they have {WORD} \w+", lambda a, b, c: a + b == c),
    (rf"there were {WORD} \w+\. \w+ took {WORD}, so {WORD} were left", lambda a, b, c: a - b == c),
    (rf"{WORD} is more than {WORD}", lambda a, b: a > b),
    (rf"{WORD} is less than {WORD}", lambda a, b: a < b),
    (rf"is {WORD} more than {WORD}\? yes", lambda a, b: a > b),
    (rf"is {WORD} more than {WORD}\? no", lambda a, b: a <= b),
    (rf"is {WORD} less than {WORD}\? yes", lambda a, b: a < b),
    (rf"is {WORD} less than {WORD}\? no", lambda a, b: a >= b),
    (rf"after {WORD} comes {WORD}", lambda a, b: b == a + 1),
    (rf"before {WORD} comes {WORD}", lambda a, b: b == a - 1),
)


def is_true(sentence: str) -> bool:
    """Judge a sentence of the genre arithmetic; fails on one that it cannot read."""
    for pattern, holds in TRUTHS:
        if match := re.fullmatch(pattern, sentence):
            numbers = [group for group in match.groups() if group is not None]
            if all(number.isdigit() or number in NUMBERS for number in numbers):
                return holds(*map(number_of, numbers))
    if match := re.fullmatch(r"(?:count|series|on and on|by (\d+)): (.+)", sentence):
        steps = [number_of(each) for each in match[2].split(", ")]
        apart = {after - before for before, after in pairwise(steps)}
        return len(apart) == 1 and match[1] in {None, str(abs(apart.pop()))}
    if match := re.fullmatch(r"(.+) \| from (low|high) to \w+ (.+)", sentence):
        drawn, in_order = ([number_of(each) for each in part.split(", ")] for part in (match[1], match[3]))
        return sorted(drawn, reverse=match[2] == "high") == in_order
    match = re.fullmatch(r"of (.+) the least is (.+) and the most is (.+)", sentence)
    assert match, sentence
    drawn = [number_of(each) for each in match[1].split(", ")]
    return [min(drawn), max(drawn)] == [number_of(match[2]), number_of(match[3])]


def test_the_judge_of_arithmetic_is_not_a_rubber_stamp():
    assert is_true("3 and 4 make 7")
    assert not is_true("3 and 4 make 8")
    assert is_true("series: 2, 5, 8")
    assert not is_true("series: 2, 5, 9")
    assert not is_true("is nine more than two? no")


def test_arithmetic_is_right():
    judged = tables = 0
    for text in documents("arithmetic"):
        rows = []
        for line in [*text.splitlines(), "end"]:
            if row := re.fullmatch(rf"{WORD}(?:: | \| | makes | - |; ){WORD}", line):
                rows.append((number_of(row[1]), number_of(row[2])))
                continue
            if rows:
                # Two tables may follow each other: a table is fitted from its first rows, at least 6 belong to it.
                tables += 1
                (x0, y0), (x1, y1) = rows[:2]
                assert (y1 - y0) % (x1 - x0) == 0
                assert all(y - y0 == (x - x0) * (y1 - y0) // (x1 - x0) for x, y in rows[:6])
                rows = []
            if line == "end":
                break
            for sentence in re.findall(r"[^.]*(?:\?|there were [^.]*\.|\w+ has [^.]*\.) [^.]+\.|[^.]+\.", line):
                assert is_true(sentence.strip(" .")), sentence
                judged += 1
    assert judged > 10 * NUM_DOCUMENTS
    assert tables > 30


OPPOSITES = {
    **{"bigger than": "smaller than", "older than": "younger than", "heavier than": "lighter than"},
    **{"left of": "right of", "inside": "around", "before": "after", "above": "below", "faster than": "slower than"},
}


def closed(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return all pairs that follow by transitivity."""
    found: set[tuple[str, str]] = set()
    following = set(pairs)
    while following - found:
        found |= following
        following = {(first, last) for first, middle in found for other, last in found if middle == other}
    return found


def test_what_a_chain_says_follows_from_what_it_states():
    concluded = 0
    back = {low: high for high, low in OPPOSITES.items()}
    words = "|".join([*OPPOSITES, *back])
    for line in (line for text in documents("order") for line in text.splitlines() if re.search(words, line)):
        pairs = set()

        def put(first, relation, second):
            return (first, second) if relation in OPPOSITES else (second, first)

        parts = re.findall(
            rf"(so |is )?(\w+) (is |is not )?({words}) (\w+)(\?(?: yes| no)|\.)", re.sub(r"\bthe ", "", line)
        )
        assert len(parts) == line.count(".")
        for opening, first, verb, relation, second, end in parts:
            pair = put(first, relation, second)
            if not opening and verb == "is " and end == ".":
                pairs.add(pair)
                continue
            closure = closed(pairs)
            denied = verb == "is not " or end == "? no"
            assert (pair[::-1] if denied else pair) in closure, line
            concluded += 1
    assert concluded > 5 * NUM_DOCUMENTS


def test_what_is_said_of_all_some_or_none_holds_in_every_small_world():
    judged = 0
    lines = {line for text in documents("order") for line in text.splitlines() if re.match("(all|some|no) ", line)}
    for line in lines:
        first, rest = line.split(". ", 1)
        quantity, groups, kinds = re.fullmatch(r"(all|some|no) (\w+) are (\w+)", first).groups()
        judged += 1
        # A world: which of (group, kind) each of two people and a third has; keep those where the premises hold.
        cells = [(False, False), (False, True), (True, False), (True, True)]
        names = list(dict.fromkeys(re.findall(rf"\b({'|'.join(LEXICON.people)})\b", rest)))
        worlds = [
            (one, other, third)
            for one in cells
            for other in cells
            for third in cells
            if holds(quantity, (one, other, third)) and any(who[0] for who in (one, other, third))
        ]
        singular = {
            an(job): place for job in LEXICON.jobs for place, many in ((0, groups), (1, kinds)) if plural(job) == many
        }
        for part in re.findall(r"(?:is|are) [^?]+\? (?:yes|no|we do not know)\.|[^.?]+\.", rest):
            sentence = part.strip(" .")
            if asked := re.fullmatch(r"(is|are) (\w+) (.+)\? (.+)", sentence):
                if asked[1] == "is":
                    who, which = names.index(asked[2]), singular[asked[3]]
                    seen = {world[who][which] for world in worlds}
                else:
                    subject, _ = asked[3].split()
                    turned = subject == kinds
                    seen = {holds(asked[2], [who[::-1] if turned else who for who in world]) for world in worlds}
                assert {"yes": {True}, "no": {False}, "we do not know": {True, False}}[asked[4]] == seen, line
                continue
            for claim in sentence.removeprefix("so ").split(" and "):
                name, negated, what = re.fullmatch(r"(\w+) is (not )?(.+)", claim).groups()
                who, which, is_so = names.index(name), singular[what], negated is None
                if sentence.startswith("so "):
                    assert all(world[who][which] == is_so for world in worlds), line
                else:
                    worlds = [world for world in worlds if world[who][which] == is_so]
        assert worlds
    assert judged > 60


def holds(quantity: str, world) -> bool:
    both = [kind for group, kind in world if group]
    return {"all": all(both), "some": any(both), "no": not any(both)}[quantity]


def test_a_dialogue_answers_yes_and_no_by_what_was_told():
    checked = 0
    for written in documents("dialogue"):
        text = re.sub(r"\n(\w+)( - | \| )", r"\n\1: ", written.replace(" said: ", ": "))
        homes = dict(re.findall(r"(\w+) is an? \w+ and lives in (\w+)", text))
        for name, home, reply in re.findall(r"does (\w+) live in (\w+)\?\n\w+: (yes|no)", text):
            assert (homes[name] == home) == (reply == "yes")
            checked += 1
        for name, home in re.findall(r"where does (\w+) live\?\n\w+: .*in (\w+)\.", text):
            assert homes[name] == home
            checked += 1
    assert checked > 2 * NUM_DOCUMENTS


TOPIC_OF = {noun: topic for topic, nouns in LEXICON.topics.items() for noun in nouns}
TONE_OF = {word: tone for tone in ("good", "bad", "plain") for word in getattr(LEXICON, tone)}
VIEWS = (
    lambda word: word,
    lambda word: TOPIC_OF.get(word, ""),
    lambda word: TONE_OF.get(word, ""),
    lambda word: str(int(word) % 2) if word.isdigit() else "",
)


def is_ruled(firsts: list[list[str]], codes: list[str]) -> bool:
    """Tell whether one word of the first column, or its topic, tone or parity, of at most 8 kinds, gives the code."""
    for place in range(len(firsts[0])):
        for view in VIEWS:
            pairs = {(view(first[place]), code) for first, code in zip(firsts, codes, strict=True)}
            if len(pairs) == len({seen for seen, _ in pairs}) == len({code for _, code in pairs}) <= 8:
                return True
    return False


@pytest.mark.slow
def test_a_tables_code_is_a_rule_of_one_word_of_its_row():
    checked = 0
    for number in range(1000):
        lines = write_document("table", random.Random(number)).splitlines()
        rows = [line.split(" | ") for line in lines if not line.startswith("table of")]
        if len(rows) < 8 or len(rows[0]) < 2 or lines[-1][0].isdigit():
            continue
        rows = rows if " " in "".join(row[0] for row in rows) else [row[::-1] for row in rows]
        firsts = [row[0].split(" ") for row in rows]
        for column in range(1, len(rows[0])):
            ruled = is_ruled(firsts, [row[column] for row in rows])
            # Turned round, a table of single words has its code first.
            assert ruled or is_ruled([[row[-1]] for row in rows], [row[column - 1] for row in rows]), lines
            checked += 1
    assert checked > 50


def test_a_table_without_a_rule_would_be_found():
    firsts = [["red", "plum"], ["red", "pear"], ["blue", "hammer"]]
    assert is_ruled(firsts, ["a", "a", "b"])
    assert not is_ruled([*firsts, ["blue", "pear"]], ["a", "b", "b", "a"])


def test_a_coined_word_keeps_its_meaning():
    checked = 0
    for text in documents("glossary"):
        kinds = {}
        for word, topic in re.findall(r"\ban? (\w+) is a kind of (\w+)", text):
            kinds[word] = topic
        for word, asked, reply in re.findall(r"is an? (\w+) an? (\w+)\? (yes|no)", text):
            if word in kinds:
                assert (kinds[word] == asked) == (reply == "yes")
                checked += 1
        for word, topic in re.findall(r"\w+ has an? (\w+), so \w+ has an? (\w+)", text):
            assert kinds.setdefault(word, topic) == topic
            checked += 1
    assert checked > NUM_DOCUMENTS
