"""Nearest shots on real pretrained models: `ask` and `eval` have the same."""

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


def test_ask_answers_after_nearest_shots_as_eval_does(base):
    """The last shot of each question is the row that says the same; likelihoods are those of `eval`."""
    names = ("Anna", "Boris", "Clara", "David", "Edith", "Frank", "Greta", "Henry")
    rooms = ("kitchen", "cellar", "garage", "attic", "library", "stable")
    train = tuple(
        Example(f"{name}'s locker in the {room}", COLOURS[(3 * n + 5 * r + n * r) % 6])
        for n, name in enumerate(names)
        for r, room in enumerate(rooms)
    )
    asked = train[::10]
    task = Task("lockers", "classification", "accuracy", "", COLOURS, train, (), asked, "lockers", 48, {}, "")
    model = load_for_inference(str(base), precision="fp32", max_tokens=512)
    chosen = {"choose": "nearest", "num_nearest": 2}
    answers = ask(model, task, [one.input for one in asked], shots=8, **chosen)
    found = evaluate(model, [task], shots=[8], draws=1, queries=5, **chosen)
    inputs = {one.id: one.input for one in asked}
    by_input = {inputs[one.query]: one for one in found.curves[0].predictions}
    assert len(by_input) == len(answers) == 5
    for answer in answers:
        prediction = by_input[answer.input]
        assert prediction.prediction == answer.answer
        assert prediction.choice_nll[answer.answer] == pytest.approx(answer.nll, abs=1e-3)
