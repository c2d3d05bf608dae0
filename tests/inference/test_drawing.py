"""How shots are chosen: labels that take turns, and the examples most like an input."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.questions import ask
from manyicl.inference.drawing import (
    InputIndex,
    check_choice,
    choose_own_shots,
    draw_shots,
    index_examples,
    pick_nearest,
)
from manyicl.inference.model import InferenceModel, load_for_inference
from manyicl.tasks.task import Example, Task
from tests.conftest import make_task, tiny_model

LENGTHS = np.array([5, 9, 3, 4])
ALL = np.arange(4)


def make_lopsided() -> Task:
    """Twelve train rows: 8 of label a, 3 of b, 1 of c."""
    answers = ["a"] * 8 + ["b"] * 3 + ["c"]
    train = tuple(Example(f"row {n}", answer) for n, answer in enumerate(answers))
    return Task("t", "classification", "accuracy", "", ("a", "b", "c"), train, (), (), "x", 12, {}, "")


def test_balanced_shots_let_labels_take_turns_until_their_examples_are_used_up(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    tokenized = tokenize_task(make_lopsided(), tokenizer=tokenizer)
    firsts = set()
    for draw in range(6):
        order = draw_shots(tokenized, seed=0, draw=draw, choose="balanced")
        answers = "".join(tokenized.task.train[row].answer for row in order)
        assert sorted(answers[:3]) == ["a", "b", "c"]
        assert sorted(answers[3:5]) == sorted(answers[5:7]) == ["a", "b"]
        assert answers[7:] == "aaaaa"
        assert sorted(order.tolist()) == list(range(12))
        firsts.add(answers[0])
    assert len(firsts) > 1  # the turns have another order each time, not that of the commonest label


def test_balanced_shots_of_open_answers_are_random_ones(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    task = make_lopsided()
    opened = Task(**{**{f: getattr(task, f) for f in Task.__dataclass_fields__}, "labels": (), "family": "qa"})
    tokenized = tokenize_task(opened, tokenizer=tokenizer)
    orders = [draw_shots(tokenized, seed=0, draw=1, choose=choose).tolist() for choose in ("random", "balanced")]
    assert orders[0] == orders[1]


def test_inputs_with_common_words_are_ranked_and_others_are_not():
    index = InputIndex(["the red fox ran", "a blue whale swam", "red whale", "nothing here"])
    assert index.rank("red fox") == [0, 2]
    assert index.rank("WHALE") == [2, 1]  # the shorter text first
    assert index.rank("zebra") == index.rank("") == []
    assert InputIndex(["", "?"]).rank("red") == []


def test_the_nearest_that_fit_are_picked_the_most_similar_last():
    assert pick_nearest([1, 0, 2], lengths=LENGTHS, count=2, room=14) == [0, 1]
    assert pick_nearest([1, 0, 2], lengths=LENGTHS, count=2, room=13) == [2, 1]  # 9 + 5 is too much, 9 + 3 is not
    assert pick_nearest([1, 0, 2], lengths=LENGTHS, count=2, room=2) == []


def test_an_input_gets_exactly_so_many_shots_of_its_own():
    """A long nearest example is passed over if the shortest others would not fit after it."""
    assert choose_own_shots([1], free=ALL, lengths=LENGTHS, count=2, room=14) == [0, 1]
    assert choose_own_shots([1], free=ALL, lengths=LENGTHS, count=2, room=11) == [2, 0]
    assert choose_own_shots([], free=ALL[::-1], lengths=LENGTHS, count=3, room=12) == [0, 2, 3]
    assert choose_own_shots([1, 3], free=ALL[2:], lengths=LENGTHS, count=2, room=100) == [2, 3]  # 1 is shared already


def test_as_many_shots_as_wanted_are_found_whatever_the_lengths():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 12, 8)
        count = int(rng.integers(1, 9))
        room = int(np.sort(lengths)[:count].sum()) + int(rng.integers(0, 6))
        ranked = rng.permutation(8)[: rng.integers(0, 9)].tolist()
        own = choose_own_shots(ranked, free=np.arange(8), lengths=lengths, count=count, room=room)
        assert len(set(own)) == count
        assert lengths[own].sum() <= room


def test_a_wrong_choice_is_one_line():
    with pytest.raises(UserError, match="choose=best: is unknown; known: random, balanced, nearest"):
        check_choice("best", 8)
    with pytest.raises(UserError, match="num_nearest=0: needs at least 1"):
        check_choice("nearest", 0)


def test_a_missing_bm25s_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match="nearest shots: bm25s is not installed; pip install bm25s"):
        InputIndex(["a fox"])


def pointing(*numbers: float, text: str = "the same words") -> Example:
    return Example(text, "a", embedding=np.array(numbers, dtype=np.float32).tobytes())


def test_examples_with_embeddings_are_ranked_by_the_cosine_and_not_by_their_words():
    east, north, north_east = pointing(1, 0), pointing(0, 3e30), pointing(0.1, 0.1)
    rank = index_examples([east, north, north_east])
    assert rank(pointing(5, 1, text="other words")) == [0, 2, 1]
    assert rank(pointing(-1, 2)) == [1, 2, 0]
    assert rank(pointing(1, 1)) == [2, 0, 1]  # of equally similar ones the first
    assert index_examples([Example("red fox", "a"), Example("blue fox", "a")])(Example("blue", "a")) == [1]


def test_embeddings_of_other_lengths_are_refused():
    with pytest.raises(UserError, match="one row's embedding has 3 numbers, another's 2; make all of them with one"):
        index_examples([pointing(1, 0), pointing(1, 0, 0)])
    with pytest.raises(UserError, match="has 1 numbers, another's 2"):
        index_examples([pointing(1, 0)])(pointing(1))


def test_an_input_without_an_embedding_cannot_be_compared_with_rows_that_have_one(tokenizers):
    asked = InferenceModel(
        "tiny",
        tiny_model("llama"),
        tokenizer=TaskTokenizer(tokenizers["bpe"], TemplateSettings()),
        max_tokens=200,
        trained_shots={},
    )
    task = replace(make_lopsided(), train=(pointing(1, 0), pointing(0, 1)))
    with pytest.raises(UserError, match="an input that is asked has none; choose random or balanced shots, or remove"):
        ask(asked, task, ["red"], choose="nearest")


def test_inputs_are_answered_after_shots_of_their_own(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})
    inputs = ["the red fox 3", "the blue owl 44"]
    nearest = ask(asked, make_task("animals"), inputs, shots=4, choose="nearest", num_nearest=2)
    assert [one.shots for one in nearest] == [4, 4]
    # One that stands alone gets the same shots, and so the same likelihood.
    alone = ask(asked, make_task("animals"), inputs[1:], shots=4, choose="nearest", num_nearest=2)
    assert alone[0].nll == pytest.approx(nearest[1].nll, abs=1e-4)
    random = ask(asked, make_task("animals"), inputs, shots=4)
    assert abs(random[1].nll - nearest[1].nll) > 1e-3


def test_no_inputs_have_no_answers():
    asked = load_for_inference("seed", weights=False)
    assert ask(asked, make_task("animals"), []) == []


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_a_longest_sequence_of_nothing_is_refused_and_no_default_taken(max_tokens):
    with pytest.raises(UserError, match=f"^max_tokens={max_tokens}: needs at least 1$"):
        load_for_inference("seed", max_tokens=max_tokens, weights=False)
