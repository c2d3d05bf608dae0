"""Mistakes that a caller from Python makes, each in one line with the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

import manyicl
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.questions import ask
from manyicl.inference.model import InferenceModel
from tests.conftest import make_task, tiny_model, train_tokenizer


@pytest.fixture
def asked() -> InferenceModel:
    tokenizer = TaskTokenizer(train_tokenizer("bpe"), TemplateSettings())
    return InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=400, trained_shots={})


@pytest.mark.parametrize(
    ("tasks", "shots", "told"),
    [
        (make_task("animals"), (0, 1), "tasks: is one task, 'animals'; give a list of tasks, [task]"),
        ("my-tasks", (0, 1), "tasks=my-tasks: is a name, no list of tasks; give manyicl.load_tasks('my-tasks')"),
        ([make_task("animals")], 4, "shots=4: give a list, such as [0, 1, 4, 'fill']"),
        ([make_task("animals")], "0,4", "shots=0,4: give a list, such as [0, 1, 4, 'fill']"),
    ],
)
def test_a_value_in_place_of_a_list(asked, tasks, shots, told):
    with pytest.raises(UserError) as raised:
        manyicl.evaluate(asked, tasks, shots=shots)
    assert str(raised.value) == told


def test_one_task_in_place_of_a_list_for_a_one_pass_curve(asked):
    with pytest.raises(UserError, match="tasks: is one task, 'animals'; give a list of tasks"):
        manyicl.one_pass_curve(asked, make_task("animals"))


@pytest.mark.parametrize(
    ("inputs", "shots", "told"),
    [
        ("the red fox", 1, "inputs='the red fox': is one text; give a list of inputs, such as ['the red fox']"),
        (["the red fox", 7], 1, "input 2: 7 is not a text; give a list of texts"),
        (["the red fox"], "fill", "shots=fill: give a whole number from 0, or leave it out for as many as fit"),
        (["the red fox"], 2.5, "shots=2.5: give a whole number from 0, or leave it out for as many as fit"),
    ],
)
def test_what_cannot_be_asked(asked, inputs, shots, told):
    with pytest.raises(UserError) as raised:
        ask(asked, make_task("animals"), inputs, shots=shots)
    assert str(raised.value) == told


def test_an_unknown_precision_is_not_taken_for_another():
    with pytest.raises(UserError, match="precision=fp64: is unknown"):
        manyicl.load_for_inference("seed", precision="fp64")


def test_a_path_names_a_model_and_a_text_a_recipe(tmp_path: Path):
    with pytest.raises(UserError, match=r"recipe\.toml: cannot be read"):
        manyicl.load_recipe(str(tmp_path / "recipe.toml"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot load its config"):
        manyicl.load_for_inference(tmp_path / "empty")
