"""Mistakes that a caller from Python makes, each in one line with the value and the fix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import manyicl
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.questions import ask
from manyicl.inference.endpoint import EndpointSettings
from manyicl.inference.model import InferenceModel
from manyicl.service.settings import ServiceSettings
from tests.conftest import make_task, tiny_model, train_tokenizer
from tests.trajectory.setting import write_setting


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


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: manyicl.Client(3), "url=3: is not a text; give one, such as 'http://127.0.0.1:8300'"),
        (
            lambda: manyicl.Client("http://127.0.0.1:8300", token=4),
            "token: is not a text; give it as `manyicl token` printed it",
        ),
        (lambda: manyicl.plan("recipes/seed.toml", device=3), "device=3: is not a text; give one, such as 'h100'"),
    ],
)
def test_a_number_in_place_of_a_text(call, told):
    with pytest.raises(UserError) as raised:
        call()
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
    with pytest.raises(UserError, match=r"empty: has no config\.json"):
        manyicl.load_for_inference(tmp_path / "empty")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: manyicl.load_tasks("tasks", names="banking77"), "names=banking77: is one value, not a list; give "),
        (lambda: manyicl.load_tasks("tasks", names=""), "names=: is one value, not a list; give "),
        (lambda: manyicl.check("tasks", held_out="rte"), "held_out=rte: is one value, not a list; give ['rte']"),
        (
            lambda: manyicl.show("r.toml", overrides="a.b=2"),
            "overrides=a.b=2: is one value, not a list; give ['a.b=2']",
        ),
        (lambda: manyicl.compare("r.toml", seeds="0"), "seeds=0: is one value, not a list; give [0]"),
        (lambda: manyicl.compare("r.toml", seeds=0), "seeds=0: is one value, not a list; give [0]"),
        (lambda: manyicl.write_report("c", others=Path("d")), "others=d: is one value, not a list; give ['d']"),
        (lambda: manyicl.AnswerSettings(stop="END"), "stop=END: is one value, not a list; give ['END']"),
        (lambda: manyicl.compare("r.toml", seeds=np.int64(3)), "seeds=3: is one value, not a list; give [3]"),
    ],
)
def test_one_text_in_place_of_a_list_is_not_taken_letter_by_letter(call, told):
    """Answers ended at the first E, N or D."""
    with pytest.raises(UserError) as raised:
        call()
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize("wrong", [3, None, ["tasks"]])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("folder", manyicl.check),
        ("folder", manyicl.load_tasks),
        ("folder", manyicl.write_report),
        ("folder", manyicl.write_world),
        ("others", lambda path: manyicl.write_report("c", others=[path])),
        ("recipe", manyicl.show),
        ("recipe", manyicl.plan),
        ("recipe", lambda path: manyicl.export(path, "out")),
        ("recipe", manyicl.train),
        ("out", lambda path: manyicl.export("r.toml", path)),
        ("out", lambda path: manyicl.merge("seed", path)),
        ("out", manyicl.run_demo),
        ("a", lambda path: manyicl.diff(path, "b.json")),
        ("path", manyicl.load_recipe),
        ("path", manyicl.Evaluation.load),
        ("path", manyicl.make_token),
        ("source", manyicl.import_tasks),
        ("model", lambda path: manyicl.merge(path, "out")),
        ("model", manyicl.load_for_inference),
        ("model", manyicl.open),
        ("model", lambda path: manyicl.evaluate(path, [make_task("animals")])),
        ("model", lambda path: manyicl.one_pass_curve(path, [make_task("animals")])),
    ],
)
def test_what_is_not_a_path_is_refused_by_its_parameter(name, call, wrong):
    """A number in place of a path ended in a TypeError of pathlib's, the model's in an AttributeError."""
    with pytest.raises(UserError) as raised:
        call(wrong)
    assert str(raised.value) == f"{name}={wrong}: is not a path; give one as a text or a pathlib.Path"


def test_what_is_not_a_path_is_refused_where_none_stands_for_the_default(asked):
    animals = make_task("animals")
    for name, call in (
        ("out", lambda path: manyicl.train("r.toml", out=path)),
        ("out", lambda path: manyicl.evaluate(asked, [animals], out=path)),
        ("out", lambda path: manyicl.import_tasks("x.csv", path)),
        ("recipe", manyicl.compare),
        ("resume", lambda path: manyicl.compare(resume=path)),
        ("out", lambda path: manyicl.compare("r.toml", out=path)),
        ("data", lambda path: manyicl.open(asked, data=path)),
    ):
        with pytest.raises(UserError, match=f"^{name}=3: is not a path; give one as a text or a pathlib.Path$"):
            call(3)


def test_what_is_not_a_list_of_tasks_is_refused(asked):
    for wrong in (3, None, ["animals"], {"animals": make_task("animals")}):
        for call in (manyicl.evaluate, manyicl.one_pass_curve):
            with pytest.raises(
                UserError, match=r"^tasks=.*: is not a list of tasks; give that of manyicl.load_tasks\("
            ):
                call(asked, wrong)
    with pytest.raises(UserError, match=r"task=animals: give a manyicl\.Task"):
        manyicl.ask(asked, "animals", ["the red fox"])
    with pytest.raises(UserError, match=r"model=seed: give a manyicl\.InferenceModel"):
        manyicl.ask("seed", make_task("animals"), ["the red fox"])


@pytest.mark.parametrize("options", [["yes", "no"], "ab"])
def test_options_of_one_input_are_a_list_of_their_own(asked, options):
    """The second input was asked to choose between n and o."""
    rows = [{"input": e.input, "answer": e.answer} for e in make_task("animals").train[:6]]
    with manyicl.open(asked, settings=ServiceSettings(measure=False)) as service:
        task = service.add_task(rows, name="animals")
        with pytest.raises(
            UserError, match=r"options=.*: give a list of answers for each input, such as \[\['yes', 'no'"
        ):
            task.predict(["the red fox 7", "the red fox 8"], options=options)


def test_settings_of_another_kind(asked):
    """A server's address in place of its settings, or a dict of settings, ended in an AttributeError."""
    task, url = make_task("animals"), "http://127.0.0.1:8000"
    for call, told in (
        (lambda: manyicl.open(asked, endpoint=url), f"endpoint={url}: give a manyicl.EndpointSettings"),
        (lambda: manyicl.open(asked, settings={"measure": False}), "settings={'measure': False}: give a manyicl.S"),
        (lambda: manyicl.evaluate(asked, [task], endpoint=url), f"endpoint={url}: give a manyicl.EndpointSettings"),
        (lambda: manyicl.evaluate(asked, [task], answering={"samples": 3}), "answering={'samples': 3}: give a many"),
        (lambda: manyicl.ask(asked, task, ["a fox"], answering={"samples": 3}), "answering={'samples': 3}: give a"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(told)
    assert {manyicl.EndpointSettings, manyicl.ServiceSettings} == {EndpointSettings, ServiceSettings}


def test_overrides_of_a_recipe_that_is_not_read_from_a_file_are_not_ignored(tmp_path):
    config = write_setting(tmp_path)
    with pytest.raises(UserError) as raised:
        manyicl.train(config, out=tmp_path / "out", overrides=["train.num_steps=1"])
    assert str(raised.value).startswith("overrides=['train.num_steps=1']: are for a recipe that is read from a file")
    assert not (tmp_path / "out").exists()


def test_an_unknown_word_is_not_taken_for_another(tmp_path):
    """A misspelled role made a token, and a misspelled kind of rows another kind."""
    write_setting(tmp_path)
    with pytest.raises(UserError, match="rows=pack: is unknown; known: episodes, packs"):
        manyicl.export(tmp_path / "recipe.toml", tmp_path / "out", rows="pack")
    with pytest.raises(UserError, match="rows=csv: is unknown; known: jsonl, parquet"):
        manyicl.import_tasks(tmp_path / "tasks" / "animals.jsonl", tmp_path / "out", rows="csv")
    with pytest.raises(UserError, match="role=wriet: is unknown; known: read, admin"):
        manyicl.make_token(tmp_path / "out", role="wriet")
    assert not (tmp_path / "out").exists()


def test_a_path_names_the_model_of_a_service(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no config\.json"):
        manyicl.open(tmp_path / "empty")
