"""Nearest shots on real pretrained models: what only a query's own shot can tell is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.inference.answering.questions import ask
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import Example, Task

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(params=["smollm2", "gemma3"])
def base(request) -> Path:
    """Each real base in turn."""
    return request.getfixturevalue(request.param)


def test_a_register_is_looked_up_by_nearest_shots_and_guessed_after_random_ones(base):
    """Nobody can know the colour of locker 17: one of 48 rows says so."""
    names = ("Anna", "Boris", "Clara", "David", "Edith", "Frank", "Greta", "Henry")
    rooms = ("kitchen", "cellar", "garage", "attic", "library", "stable")
    train = tuple(
        Example(f"{name}'s locker in the {room}", COLOURS[(3 * n + 5 * r + n * r) % 6])
        for n, name in enumerate(names)
        for r, room in enumerate(rooms)
    )
    task = Task("lockers", "classification", "accuracy", "", COLOURS, train, (), (), "lockers", 48, {}, "")
    model = load_for_inference(str(base), precision="fp32", max_tokens=512)
    asked = train[::5]
    inputs = [one.input for one in asked]
    right = {
        choose: sum(
            answer.answer == one.answer
            for answer, one in zip(ask(model, task, inputs, shots=8, choose=choose, num_nearest=2), asked, strict=True)
        )
        for choose in ("random", "nearest")
    }
    assert right["nearest"] >= 8
    assert right["random"] <= 6
