"""Mistakes that a caller from Python makes, each in one line with the value and the fix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
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
        (["the red fox"], "fill", "shots='fill': give a whole number from 0, or leave it out for as many as fit"),
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


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda model: ask(model, make_task("animals"), ["a"], seed="a"), "seed='a': give a whole number"),
        (lambda model: ask(model, make_task("animals"), 7), "inputs=7: give a list of texts"),
        (
            lambda model: ask(model, make_task("animals"), {"input": "the red fox"}),
            "inputs: is a table; give one of its columns, such as table['input']",
        ),
        (
            lambda model: ask(model, make_task("animals"), pa.table({"input": ["the red fox"]})),
            "inputs: is a table; give one of its columns, such as table['input']",
        ),
        (
            lambda model: manyicl.evaluate(model, [make_task("animals")], shots=[0], draws=1.5),
            "draws=1.5: give a whole number",
        ),
        (
            lambda model: manyicl.evaluate(model, [make_task("animals")], shots=[0, "1"]),
            "shots=[0, '1'], draws=5, queries=200: need shots from 0, and at least 1",
        ),
        (
            lambda model: manyicl.evaluate(model, [make_task("animals")], template="1"),
            "template='1': give a whole number",
        ),
        (
            lambda model: manyicl.evaluate(model, []),
            "tasks: is empty; give a list of tasks, such as that of manyicl.load_tasks(FOLDER)",
        ),
        (
            lambda model: manyicl.one_pass_curve(model, [make_task("animals")], episodes="2"),
            "episodes='2': give a whole number",
        ),
        (lambda _: manyicl.load_for_inference("seed", max_tokens="100"), "max_tokens='100': give a whole number"),
        (lambda _: manyicl.plan("recipe.toml", num_devices=0), "num_devices=0: give a whole number from 1"),
        (lambda _: manyicl.show("recipe.toml", episode=-1), "episode=-1: give a whole number from 0"),
        (lambda _: manyicl.write_world("world", num_train="7"), "num_train='7': give a whole number"),
        (lambda _: manyicl.AnswerSettings(temperature="hot"), "temperature='hot': is not a number; give one"),
        (lambda _: manyicl.AnswerSettings(max_new_tokens=1.5), "max_new_tokens=1.5: give a whole number"),
        (lambda _: manyicl.ShotChoice(count="3"), "shots.count='3': give a whole number from 0"),
        (lambda _: manyicl.ShotChoice("fixed", ids=3), "shots.ids=3: is one value, not a list; give [3]"),
        (lambda _: ServiceSettings(max_queue=-1), "max_queue=-1: give a whole number from 0"),
        (lambda _: ServiceSettings(shots=4), "shots=4: give a manyicl.ShotChoice"),
        (
            lambda _: manyicl.load_recipe("recipe.toml", overrides={"train.num_steps": 2}),
            "overrides={'train.num_steps': 2}: is a mapping; give a list, such as ['train.num_steps=20']",
        ),
    ],
)
def test_what_no_parameter_takes(asked, call, told):
    with pytest.raises(UserError) as raised:
        call(asked)
    assert str(raised.value) == told


def test_an_override_that_is_no_text(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    with pytest.raises(UserError, match="overrides=3: is not a text"):
        manyicl.load_recipe(recipe, overrides=[3])


def test_numbers_of_numpy_are_numbers(asked, tmp_path):
    task, out = make_task("animals"), tmp_path / "result.json"
    given = {"shots": np.array([0, 2]), "draws": np.int64(2), "queries": np.int32(3), "seed": np.int64(1)}
    assert (
        manyicl.evaluate(asked, [task], out=out, **given).curves
        == manyicl.evaluate(asked, [task], shots=[0, 2], draws=2, queries=3, seed=1).curves
    )
    assert manyicl.Evaluation.load(out).seed == 1
    assert ask(asked, task, ["the red fox"], shots=np.int64(1)) == ask(asked, task, ["the red fox"], shots=1)
    assert manyicl.AnswerSettings(temperature=np.float32(1), samples=np.int64(3)).samples == 3
    assert manyicl.ShotChoice("fixed", ids=[np.int64(2), 1]).ids == (2, 1)


def test_inputs_are_any_texts_that_can_be_counted_through(asked):
    task = make_task("animals")
    texts = ["the red fox", "a blue whale"]
    answers = ask(asked, task, texts, shots=1)
    assert [answer.input for answer in answers] == texts
    assert ask(asked, task, (text for text in texts), shots=1) == answers
    from_numpy = ask(asked, task, np.array(texts), shots=1)
    assert from_numpy == answers
    assert type(from_numpy[0].input) is str


def test_threads_that_ask_one_model_get_the_answers_of_one(asked):
    task, texts = make_task("animals"), ["the red fox", "a blue whale"]
    alone = ask(asked, task, texts)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: ask(asked, task, texts), range(8))) == [alone] * 8


def test_a_result_is_saved_where_a_text_says(asked, tmp_path):
    result = manyicl.evaluate(asked, [make_task("animals")], shots=[0], draws=1, queries=2)
    beside = result.save(str(tmp_path / "result.json"))
    assert beside == tmp_path / "result.predictions.parquet"
    assert manyicl.Evaluation.load(tmp_path / "result.json").curves == result.curves


def test_what_a_prompt_shows_is_one_line(asked):
    task = make_task("animals")
    sizes = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test rows"
    assert repr(task) == f"Task('animals', {task.family}, {task.metric}, {len(task.labels)} labels, {sizes})"
    assert repr(asked) == "InferenceModel('tiny', 400 tokens, cpu)"
    result = manyicl.evaluate(asked, [task], shots=[0], draws=1, queries=2)
    assert repr(result) == "Evaluation('tiny', sweep, of animals)"
