"""Services with the packaged seed model, and rows that it learns from its context."""

from __future__ import annotations

import random

import pytest

from manyicl.inference.model import load_for_inference
from manyicl.service.served import open_service
from manyicl.service.settings import ServiceSettings

ANIMALS = ("fox", "owl", "cat", "dog")
COLOURS = ("red", "blue", "green", "grey")


def make_rows(num: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return rows with different inputs: 'the red fox 0' -> fox."""
    rng = random.Random(seed)
    return [
        {"input": f"the {rng.choice(COLOURS)} {animal} {seed * 1000 + number}", "answer": animal}
        for number in range(num)
        for animal in [rng.choice(ANIMALS)]
    ]


ROWS = make_rows(80)
INPUTS = ["the red fox 1", "a blue owl", "the green cat in the garden", "grey dog"]
# No measurement comes between what a test does.
QUIET = ServiceSettings(measure=False)


@pytest.fixture(scope="session")
def seed_model():
    """The packaged model, loaded once."""
    return load_for_inference("seed", precision="fp32")


@pytest.fixture
def service(seed_model):
    """A service that keeps nothing and measures nothing."""
    with open_service(seed_model, settings=QUIET) as opened:
        yield opened


@pytest.fixture
def animals(service):
    """A task with labels."""
    return service.add_task(ROWS, name="animals")
