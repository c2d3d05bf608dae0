"""Chosen shots on real pretrained models: `ask` and `eval` have the same nearest ones, balanced ones all labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.evaluation.loop import evaluate
from manyicl.inference.answering.questions import ask
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import Example, Task

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(params=["smollm2", "gemma3"])
def base(request) -> Path:
    """Each real base in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def lockers() -> Task:
    """48 lockers, whose colours have nothing to do with their owners and rooms; every tenth is also asked for."""
    names = ("Anna", "Boris", "Clara", "David", "Edith", "Frank", "Greta", "Henry")
    rooms = ("kitchen", "cellar", "garage", "attic", "library", "stable")
    train = tuple(
        Example(f"{name}'s locker in the {room}", COLOURS[(3 * n + 5 * r + n * r) % 6])
        for n, name in enumerate(names)
        for r, room in enumerate(rooms)
    )
    asked = train[::10]
    return Task("lockers", "classification", "accuracy", "", COLOURS, train, (), asked, "lockers", 48, {}, "")


def test_ask_answers_after_nearest_shots_as_eval_does(base, lockers):
    """The last shot of each question is the row that says the same; likelihoods are those of `eval`."""
    model = load_for_inference(str(base), precision="fp32", max_tokens=512)
    chosen = {"choose": "nearest", "num_nearest": 2}
    answers = ask(model, lockers, [one.input for one in lockers.test], shots=8, **chosen)
    found = evaluate(model, [lockers], shots=[8], draws=1, queries=5, **chosen)
    inputs = {one.id: one.input for one in lockers.test}
    by_input = {inputs[one.query]: one for one in found.curves[0].predictions}
    assert len(by_input) == len(answers) == 5
    for answer in answers:
        prediction = by_input[answer.input]
        assert prediction.prediction == answer.answer
        assert prediction.choice_nll[answer.answer] == pytest.approx(answer.nll, abs=1e-3)


def test_balanced_shots_have_each_label_equally_often(base, lockers):
    model = load_for_inference(str(base), precision="fp32", max_tokens=512)
    [curve] = evaluate(model, [lockers], shots=[12], draws=2, queries=5, choose="balanced").curves
    assert [(draw.top_label_share, draw.num_missing_labels) for draw in curve.points[0].draws] == [(1 / 6, 0)] * 2
    assert len({draw.shots_sha256 for draw in curve.points[0].draws}) == 2
    assert curve.points[0].num_scored == 10
