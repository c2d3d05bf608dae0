"""The world's tasks: every answer found again by a solver of its own, from the rule's parameters and the text alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice, permutations, product

import pytest

from manyicl.demo.lexicon import load_lexicon
from manyicl.demo.tasks import KINDS, METRICS, draw_task, export_tasks, find_kinds, iter_tasks, pool_words, write_tasks
from manyicl.errors import UserError
from manyicl.evaluation.scoring.answers import score_answer
from manyicl.tasks.task import load_tasks

LEXICON = load_lexicon()
POOLS = ("pretraining", "open")
NAMES = tuple(kind.name for kind in KINDS)
BASE_OF = {past: base for base, past in LEXICON.verbs}
TOPIC_OF = {noun: topic for topic, nouns in LEXICON.topics.items() for noun in nouns}
TONE_OF = {word: tone for tone in ("good", "bad", "plain") for word in getattr(LEXICON, tone)}


def draw_tasks(name, *, each):
    """Return up to `each` tasks of a kind from either pool, with 50 examples of each task."""
    kinds = find_kinds([name])
    tasks = [task for pool in POOLS for task in islice(iter_tasks(kinds, seed=7, pool=pool), each)]
    return [(task, task.draw_examples(random.Random(number), count=50)) for number, task in enumerate(tasks)]


# Solvers: (the rule's parameters, text) -> answer. Unpacking one value is the claim that there is only one.


def words_in(text):
    return re.findall("[a-z]+", text)


def solve_topic(parameters, text):
    (topic,) = (TOPIC_OF[word] for word in words_in(text) if word in TOPIC_OF)
    return dict(parameters[1:])[topic]


def solve_tone(parameters, text):
    (tone,) = (TONE_OF[word] for word in words_in(text) if word in TONE_OF)
    return dict(parameters[1:])[tone]


def solve_keyword(parameters, text):
    label_of = dict(parameters[2:])
    (keyword,) = (word for word in words_in(text) if word in label_of)
    return label_of[keyword]


def solve_group(parameters, text):
    (label,) = (label for label, *members in parameters[2:] for word in words_in(text) if word in members)
    return label


def solve_form(parameters, text):
    if parameters[1] == "shape":
        seen = list(dict.fromkeys(text.split()))
        form = tuple(seen.index(word) for word in text.split())
    else:
        form = text[-1] if parameters[1] == "ending" else text.count(",") + 1
    return dict(parameters[2:])[form]


def judge(worlds, premise, claim):
    """Return yes, no or maybe: is the claim true in all, none or some of the worlds in which the premise is?"""
    truths = {claim(world) for world in worlds if premise(world)}
    return {(True,): "yes", (False,): "no", (False, True): "maybe"}[tuple(sorted(truths))]


def solve_size(parameters, text):
    more, _, *labels = parameters[1:]
    said = re.fullmatch(r"(\w+) is (\w+) than (\w+)\. (\w+) is (\w+) than (\w+)\?", text).groups()
    (big, small), (claimed, beaten) = ((a, b) if word == more else (b, a) for a, word, b in (said[:3], said[3:]))
    orders = [order.index for order in permutations({big, small, claimed, beaten})]
    return dict(labels)[judge(orders, lambda at: at(big) > at(small), lambda at: at(claimed) > at(beaten))]


def solve_containment(parameters, text):
    pair = rf"(\w+) is {parameters[1]} (\w+)"
    a, b, b_again, c, inner, outer = re.fullmatch(rf"{pair}, {pair}\. {pair}\?", text).groups()
    assert b == b_again
    chain = [a, b, c]
    if not {inner, outer} <= set(chain):
        return dict(parameters[2:])["maybe"]
    return dict(parameters[2:])["yes" if chain.index(inner) < chain.index(outer) else "no"]


def solve_negation(parameters, text):
    says = rf"(\w+) (never )?{parameters[1]} a (\w+)"
    who, denied, what, asked, denied_again, asked_what = re.fullmatch(rf"{says}\. {says}\?", text).groups()
    if (who, what) != (asked, asked_what):
        return dict(parameters[2:])["maybe"]
    return dict(parameters[2:])["yes" if denied == denied_again else "no"]


def solve_quantity(parameters, text):
    says = r"(all|some|no) (\w+) is (\w+)"
    told, noun, colour, asked, noun_again, asked_colour = re.fullmatch(rf"{says}\. {says}\?", text).groups()
    assert noun == noun_again

    def holds(much, wanted):
        return lambda things: {"all": all, "some": any, "no": lambda found: not any(found)}[much](
            [thing == wanted for thing in things]
        )

    worlds = [things for many in (1, 2, 3) for things in product({colour, asked_colour, "another"}, repeat=many)]
    return dict(parameters[1:])[judge(worlds, holds(told, colour), holds(asked, asked_colour))]


def facts_in(text):
    """Return each fact that a passage tells of its one person; every word is in one list of the lexicon only."""
    lists = {
        "person": LEXICON.people, "job": LEXICON.jobs, "place": LEXICON.places, "colour": LEXICON.colours,
        "thing": TOPIC_OF, "adjective": TONE_OF, "past": BASE_OF,
    }  # fmt: skip
    facts = {}
    for field, known in lists.items():
        found = {word for word in words_in(text) if word in known}
        assert len(found) <= 1
        facts |= dict.fromkeys((field,) if found else (), "".join(found))
    return facts | ({"base": BASE_OF[facts["past"]]} if "past" in facts else {})


def solve_fact(parameters, text):
    return " ".join(facts_in(text)[attribute] for attribute in parameters[1])


def solve_lookup(parameters, text):
    says = rf"(\w+) {parameters[3]} (\w+) and \w+"
    one, its, other, others, asked = re.fullmatch(rf"{says}\. {says}\. (\w+)\?", text).groups()
    assert one != other
    return {one: its, other: others}[asked]


def solve_two_hop(parameters, text):
    *told, asked = text.removesuffix("?").split(". ")
    links = dict(line.split(f" {parameters[2]} ") for line in told if " is " not in line)
    values = dict(re.split(" is (?:in|a) ", line) for line in told if " is " in line)
    assert len(links) == len(values) == 2
    return values[links[asked]]


def solve_yes_no(parameters, text):
    *told, asked = text.removesuffix("?").split(". ")
    return parameters[2] if asked in [re.sub(" is (?:in|a) ", " ", line) for line in told] else parameters[3]


def solve_choice(parameters, text):
    (answer,) = (thing for thing in text.split(", ") if TOPIC_OF[thing] == parameters[1])
    return answer


def solve_form_of_facts(parameters, text):
    facts = facts_in(text)
    return re.sub(r"\{(\w+)\}", lambda field: facts[field[1]], parameters[1])


def solve_gist(parameters, text):
    told = {}
    for line in text.removesuffix(".").split(". "):
        told["person" if line.endswith(" it") else "thing" if line.startswith("the ") else "place"] = line
    assert len(told) == 3
    return parameters[2].join(told[subject] for subject in parameters[1])


def solve_story(parameters, text):
    who, first, again, second = re.fullmatch(
        rf"(\w+) has (\d+) \w+\. (\w+) {parameters[1]} (\d+)\.", text
    ).groups()  # fmt: skip
    assert who == again
    a, b = int(first), int(second)
    return str({"plus": a + b, "minus": a - b, "times": a * b}[parameters[2]])


def solve_linear(parameters, text):
    return str(parameters[1] * int(text) + parameters[2])


def solve_pick(parameters, text):
    numbers = [int(number) for number in text.split()]
    low, middle, high = sorted(numbers)
    first, second, last = numbers
    picks = {"smallest": low, "middle": middle, "largest": high, "first": first, "second": second, "last": last}
    return str(picks[parameters[1]] + parameters[2])


def solve_tally(parameters, text):
    return str(sum(TOPIC_OF[thing] == parameters[1] for thing in text.split()))


def solve_implication(parameters, text):
    who, job, again, quality = re.fullmatch(r"(\w+) is a (\w+)\. (\w+) is (\w+)\?", text).groups()
    assert (who, parameters[1]) == (again, quality)
    (label,) = (label for label, *jobs in parameters[2:] if job in jobs)
    return label


def solve_recall(parameters, text):
    known = dict(parameters[2:])
    (person,) = (word for word in words_in(text) if word in known)
    return known[person]


def solve_section(parameters, text):
    facts = facts_in(text)
    facts["section"] = dict(parameters[2:])[TOPIC_OF[facts["thing"]]]
    return re.sub(r"\{(\w+)\}", lambda field: facts[field[1]], parameters[1])


def solve_price(parameters, text):
    prices = dict(parameters[2:])
    thing, sent = re.fullmatch(r"(\w+) to \w+|\w+ takes a (\w+)", text).groups()
    return str(prices[thing] + parameters[1] if thing else prices[sent])


SOLVERS = {
    "topic": solve_topic, "tone": solve_tone, "keyword": solve_keyword, "group": solve_group, "form": solve_form,
    "size": solve_size, "containment": solve_containment, "negation": solve_negation, "quantity": solve_quantity,
    "fact": solve_fact, "lookup": solve_lookup, "two_hop": solve_two_hop, "yes_no": solve_yes_no,
    "choice": solve_choice, "title": solve_form_of_facts, "line": solve_form_of_facts, "gist": solve_gist,
    "implication": solve_implication, "recall": solve_recall, "section": solve_section, "price": solve_price,
    "story": solve_story, "linear": solve_linear, "pick": solve_pick, "tally": solve_tally,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_solver_of_its_own_finds_every_answer(name):
    drawn = draw_tasks(name, each=10)
    assert len(drawn) == (16 if name == "choice" else 20)  # 6 of its 24 rules are in the pretraining pool
    for task, examples in drawn:
        assert len(examples) == 50
        for example in examples:
            found = SOLVERS[name](task.rule.parameters, example.input)
            assert found == example.answer, (task.rule.parameters, example)
            metric = "accuracy" if example.options else METRICS[task.kind.family]
            assert score_answer(found, answer=example.answer, metric=metric) == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_one_of_the_labels_or_options(name):
    for task, examples in draw_tasks(name, each=10):
        labels = task.rule.labels
        assert len(set(labels)) == len(labels)
        assert bool(labels) == (task.kind.family in ("classification", "nli") or name == "yes_no")
        assert not labels or {example.answer for example in examples} <= set(labels)
        for example in examples:
            assert len(set(example.options)) == len(example.options) == (4 if name == "choice" else 0)
            assert not example.options or example.answer in example.options
            assert example.options == (tuple(example.input.split(", ")) if name == "choice" else ())


def test_answers_that_a_reader_can_check():
    sizes = ("size", "older", "younger", ("yes", "abc"), ("no", "def"), ("maybe", "ghi"))
    assert solve_size(sizes, "plum is older than hammer. hammer is younger than plum?") == "abc"
    assert solve_size(sizes, "plum is older than hammer. hammer is older than plum?") == "def"
    assert solve_size(sizes, "plum is older than hammer. hammer is older than owl?") == "ghi"
    amounts = ("quantity", ("yes", "abc"), ("no", "def"), ("maybe", "ghi"))
    assert solve_quantity(amounts, "all plum is red. some plum is red?") == "abc"
    assert solve_quantity(amounts, "some plum is red. no plum is red?") == "def"
    assert solve_quantity(amounts, "some plum is red. some plum is blue?") == "ghi"
    assert solve_pick(("pick", "middle", 3), "9 50 20") == "23"
    assert solve_tally(("tally", "fruit"), "plum hammer plum") == "2"


# The largest share of one answer in 200 examples: what an answer that ignores its input can score. Two classes
# make 0.5 and what chance adds; of numbers of things, small ones come often.
LABELLED = 0.6
OPEN = {
    "recall": 0.25, "section": 0.1, "price": 0.25,
    "story": 0.25, "linear": 0.02, "pick": 0.15, "tally": 0.3, "fact": 0.15, "lookup": 0.15, "two_hop": 0.1,
    "choice": 0.1, "title": 0.05, "line": 0.05, "gist": 0.05,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_answer_that_ignores_the_input_is_good(name):
    for task, _ in draw_tasks(name, each=10):
        examples = task.draw_examples(random.Random(1), count=200)
        assert len(examples) >= 150
        (_, times), *others = Counter(example.answer for example in examples).most_common()
        assert others
        assert times / len(examples) <= OPEN.get(name, LABELLED)


def fingerprint(seed):
    """Return a digest of two tasks of each kind and pool, and of three examples of each task."""
    told = [
        [task.name, task.instruction, repr(task.identity), repr(task.draw_examples(random.Random(seed), count=3))]
        for pool in POOLS
        for task in islice(iter_tasks(KINDS, seed=seed, pool=pool), 2 * len(KINDS))
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_draws_the_same_tasks(hash_seed):
    code = "from tests.demo.test_tasks import fingerprint; print(fingerprint(3))"
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert told.strip() == fingerprint(3)
    assert fingerprint(3) != fingerprint(4)


def test_the_series_has_the_kinds_in_turn_and_nothing_twice():
    tasks = list(islice(iter_tasks(KINDS, seed=0, pool="open"), 10 * len(KINDS)))
    assert [task.kind for task in tasks] == list(KINDS) * 10
    assert len({task.identity for task in tasks}) == len({task.name for task in tasks}) == len(tasks)
    others = {task.identity for task in islice(iter_tasks(KINDS, seed=1, pool="open"), 10 * len(KINDS))}
    assert len(others - {task.identity for task in tasks}) > 100


def test_a_kind_drops_out_when_its_rules_are_used_up():
    wanted = {pool: [] for pool in POOLS}
    for pool in POOLS:
        for task in iter_tasks(find_kinds(["choice"]), seed=0, pool=pool):
            wanted[pool].append(task.rule.parameters[1])
    assert sorted(wanted["pretraining"] + wanted["open"]) == sorted(LEXICON.topics)


def meaning(task):
    """Return what decides the answers and inputs of a task, freed of any order that decides nothing."""
    kind, *parameters = task.rule.parameters
    if task.rule.labels:
        return (kind, frozenset(parameters))
    return (kind, parameters[0], frozenset(parameters[1])) if kind == "fact" else (kind, *parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_rule_is_in_both_pools(name):
    (kind,) = find_kinds([name])
    drawn = {
        pool: {meaning(draw_task(kind, random.Random(f"{pool} {n}"), pool=pool)) for n in range(400)} for pool in POOLS
    }
    assert min(len(found) for found in drawn.values()) >= 6
    assert not drawn["pretraining"] & drawn["open"]


@pytest.mark.parametrize("name", NAMES)
def test_two_tasks_of_the_series_never_mean_the_same(name):
    tasks = list(islice(iter_tasks(find_kinds([name]), seed=0, pool="open"), 200))
    assert len({meaning(task) for task in tasks}) == len(tasks)


def test_no_label_word_is_in_both_pools():
    known = [set(pool_words(pool).labels) for pool in POOLS]
    assert [len(labels) for labels in known] == [240, 240]
    assert known[0] | known[1] == set(LEXICON.labels)
    for pool, labels in zip(POOLS, known, strict=True):
        for task in islice(iter_tasks(KINDS, seed=5, pool=pool), 10 * len(KINDS)):
            assert set(task.rule.labels) <= labels


def words_of(parameters):
    for part in parameters:
        if isinstance(part, tuple):
            yield from words_of(part)
        else:
            yield from words_in(str(part))


def test_name_and_instruction_tell_nothing_of_the_rule():
    taken = {*LEXICON.topics, *LEXICON.labels, *NAMES, *TOPIC_OF, *TONE_OF, *LEXICON.colours, *LEXICON.places}
    for pool in POOLS:
        for task in islice(iter_tasks(KINDS, seed=2, pool=pool), 20 * len(KINDS)):
            coined = task.name.removeprefix(f"{task.kind.name}_")
            assert task.instruction == f"{coined}:\n"
            assert re.fullmatch("(([bdfghjklmnprstvwz]{1,2}[aeiou]){2,3}[lmnrsx]?){2}", coined)
            assert coined not in taken
            # Coined syllables hold a word of two or three letters now and then, by chance.
            own = {*task.rule.labels, *words_of(task.rule.parameters[1:])} - {*LEXICON.people}
            assert not [word for word in own if len(word) > 3 and word in coined]


@pytest.mark.slow
def test_files_load_as_they_were_drawn(tmp_path):
    tasks = list(islice(iter_tasks(KINDS, seed=3, pool="open"), 2 * len(KINDS)))
    write_tasks(tmp_path, tasks, num_train=40, num_test=10, seed=0)
    loaded = {task.name: task for task in load_tasks(tmp_path)}
    assert sorted(loaded) == sorted(task.name for task in tasks)
    for task in tasks:
        found = loaded[task.name]
        assert (found.family, found.instruction) == (task.kind.family, task.instruction)
        assert found.labels == tuple(sorted(task.rule.labels))
        assert len(found.train) + len(found.validation) == 40
        assert len(found.test) == 10
        assert not found.dropped
        inputs = [example.input for example in (*found.train, *found.validation, *found.test)]
        assert len(set(inputs)) == 50
        for example in (*found.train, *found.validation, *found.test):
            assert SOLVERS[task.kind.name](task.rule.parameters, example.input) == example.answer
        choice = task.kind.name == "choice"
        assert found.metric == ("accuracy" if choice else METRICS[task.kind.family])
        assert {len(example.options) for example in found.train} == {4 if choice else 0}


def test_the_files_are_a_pure_function_of_the_seed(tmp_path):
    tasks = list(islice(iter_tasks(KINDS, seed=3, pool="open"), len(KINDS)))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tasks(tmp_path / name, tasks, num_train=5, num_test=5, seed=seed)
    a, b, c = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b", "c"))
    assert len(a) == 2 * len(KINDS)
    assert a == b
    assert a != c


@pytest.mark.parametrize("wrong", [{"num_tasks": 0}, {"num_train": 0}, {"num_test": -1}])
def test_no_tasks_or_no_rows_are_a_users_mistake(tmp_path, wrong):
    with pytest.raises(UserError, match=r"^num_tasks=.*, num_train=.*, num_test=.*: need at least 1 each$"):
        export_tasks(tmp_path / "new", **{"num_tasks": 1, "num_train": 1, "num_test": 1, "seed": 0} | wrong)
    assert not list(tmp_path.iterdir())


def test_a_rule_of_few_inputs_is_a_users_mistake(tmp_path):
    task = next(t for t in iter_tasks(find_kinds(["linear"]), seed=0, pool="open") if t.rule.parameters[1] == 2)
    with pytest.raises(UserError) as caught:
        write_tasks(tmp_path, [task], num_train=195, num_test=10, seed=0)
    assert str(caught.value) == (
        f"task '{task.name}': has only 200 different inputs, not 195 for training and 10 for testing; ask for fewer"
    )
    assert not list(tmp_path.iterdir())
