"""What the seed model reads: a function of seed and place, never in our template, never a rule that a demo asks."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from itertools import islice

import pytest
from scripts.seed_corpus import documents
from scripts.seed_corpus.documents import MOST_CHARACTERS, iter_documents, read_prose, write_shots

from manyicl.demo.lexicon import load_lexicon
from manyicl.demo.tasks import KINDS, draw_task, find_kinds, iter_tasks
from manyicl.models.places import TEMPLATE

SHARES = {"text": 0.4, "tasks": 0.5, "prose": 0.1}
LEXICON = load_lexicon()


@pytest.fixture(scope="module")
def shots():
    """400 documents of shots, each with the task that it was written from and the pool that this was drawn from."""
    drawn = []

    def draw(kind, rng, *, pool):
        drawn.append((draw_task(kind, rng, pool=pool), pool))
        return drawn[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "draw_task", draw)
        texts = [write_shots(random.Random(f"shots {number}")) for number in range(400)]
    assert len(drawn) == len(texts)
    return [(text, task, pool) for text, (task, pool) in zip(texts, drawn, strict=True)]


@pytest.mark.slow
def test_a_document_depends_on_the_seed_and_its_place():
    whole = list(islice(iter_documents(seed=4, shares=SHARES), 30))
    assert whole == list(islice(iter_documents(seed=4, shares=SHARES), 30))
    for start in range(3):
        assert list(islice(iter_documents(seed=4, shares=SHARES, start=start, step=3), 10)) == whole[start::3]
    others = list(islice(iter_documents(seed=5, shares=SHARES), 30))
    assert len({*whole, *others}) >= 58  # the same docstring may come twice


@pytest.mark.slow
def test_shares_are_kept():
    prose = set(read_prose())
    assert set(islice(iter_documents(seed=0, shares={"prose": 1.0}), 20)) <= prose
    assert not set(islice(iter_documents(seed=0, shares={"text": 1.0, "prose": 0.0}), 20)) & prose
    mixed = list(islice(iter_documents(seed=0, shares={"text": 1.0, "prose": 1.0}), 200))
    assert 70 <= sum(text in prose for text in mixed) <= 130


@pytest.mark.slow
def test_nothing_is_written_in_the_template_of_a_demo(shots):
    _, separator = TEMPLATE.input.split("{input}")
    assert separator == " ->\n"
    for text, _, _ in shots:
        assert "->" not in text
    for text in islice(iter_documents(seed=1, shares={"text": 1.0}), 200):
        assert "->" not in text
    # Python's own documentation has arrows, some at a line's end; never one example after another.
    assert max(text.count(separator) for text in read_prose()) <= 1


@pytest.mark.slow
def test_a_document_of_shots_asks_a_pretrained_kind_of_the_pretraining_pool(shots):
    names = LEXICON.labels[0::2]
    for _, task, pool in shots:
        assert pool == "pretraining"
        assert task.kind.pretrained
        assert set(task.rule.labels) <= set(names)
        spellings = (task.rule.parameters, *task.rule.twins)
        assert any(zlib.crc32(repr((task.kind.name, spelt)).encode()) % 2 == 0 for spelt in spellings)
    kinds = Counter(task.kind.name for _, task, _ in shots)
    assert set(kinds) == {kind.name for kind in KINDS if kind.pretrained}
    assert min(kinds["topic"], kinds["keyword"], kinds["tone"]) > max(kinds["size"], kinds["story"], kinds["gist"])


@pytest.mark.slow
def test_no_task_that_a_demo_asks_is_read(shots):
    read = {spelt for _, task, _ in shots for spelt in (task.rule.parameters, *task.rule.twins)}
    asked = {task.rule.parameters for task in islice(iter_tasks(KINDS, seed=0, pool="open"), 30 * len(KINDS))}
    assert len(asked) == 30 * len(KINDS)
    assert not read & asked


def test_facts_told_in_the_other_order_are_the_same_task():
    # The seed model has read rules of facts under either order of their tellings.
    tasks = list(iter_tasks(find_kinds(["fact"]), seed=0, pool="open"))
    assert len(tasks) == 25
    for task in tasks:
        kind, wanted, tellings = task.rule.parameters
        for order in (tellings, tellings[::-1]):
            assert zlib.crc32(repr(("fact", (kind, wanted, order))).encode()) % 2 == 1


@pytest.mark.slow
def test_a_class_is_never_named_by_a_word_of_a_demo(shots):
    open_names = set(LEXICON.labels[1::2])
    for text, task, _ in shots:
        if not task.rule.labels:
            continue
        # A word of the format, one at the opening and one before the answers, may be any; it names no class.
        assert len(open_names & set(re.findall("[a-z]+", text))) <= 2
        assert set(task.rule.labels) & set(re.findall("[a-z]+", text))


@pytest.mark.slow
def test_a_document_of_shots_has_many_and_fits_a_row(shots):
    lengths = [len(text) for text, _, _ in shots]
    assert max(lengths) <= MOST_CHARACTERS + 20  # and its opening
    assert min(lengths) >= 20
    assert sorted(lengths)[len(lengths) // 2] > 400


@pytest.mark.slow
def test_formats_differ(shots):
    tails = Counter(text[-6:] for text, task, _ in shots if task.kind.name == "linear")
    assert len(tails) > 5
    endings = Counter(re.search(r"[^a-z0-9]*$", text)[0] for text, _, _ in shots)
    assert len(endings) > 15
    assert max(endings.values()) < len(shots) / 3


def test_prose_is_documentation_of_the_standard_library():
    prose = read_prose()
    assert len(prose) == len(set(prose)) > 500
    assert min(len(text) for text in prose) > 200
    assert all(text == text.strip("\n") for text in prose)
    assert any("JSON (JavaScript Object Notation)" in text for text in prose)  # json
    assert sum(" the " in text for text in prose) > 0.7 * len(prose)
