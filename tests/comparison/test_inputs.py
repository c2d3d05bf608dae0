"""A9: a comparison goes on only with the task and text files that it began with."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyicl.comparison.grid import Grid, open_comparison
from manyicl.comparison.inputs import INPUTS_FILE, read_whole
from manyicl.comparison.settings import CompareConfig
from manyicl.comparison.summary import summarize
from manyicl.comparison.worker import run_comparison
from manyicl.errors import UserError
from manyicl.models.loading import LoraSettings
from manyicl.models.places import SEED_MODEL
from manyicl.tasks.task import load_tasks
from manyicl.training.run_folder import RunFolder
from tests.support.comparison_setting import make_recipe, write_world
from tests.trajectory.setting import run_command


@pytest.fixture
def began(tmp_path) -> tuple[Path, CompareConfig]:
    """The folder and recipe of a comparison of the base alone that has begun, with no work done."""
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["base"], flips=False, orders=False)
    open_comparison(tmp_path / "out", config)
    return tmp_path / "out", config


def change_tests(folder: Path, task: str) -> Path:
    """Change the input of every test row of a task; return its file."""
    file = folder / f"{task}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["split"] == "test":
            row["input"] += " (changed)"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def refusal(folder: Path, config: Any = None) -> str:
    with pytest.raises(UserError) as refused:
        open_comparison(folder, config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_unchanged_files_are_gone_on_with(began):
    folder, config = began
    open_comparison(folder, None)
    open_comparison(folder, config)


def test_a_changed_task_file_is_refused_by_name(began):
    folder, config = began
    task = config.compare.held_out_tasks[0]
    file = change_tests(Path(config.tasks.folder), task)
    assert refusal(folder) == refusal(folder, config) == (
        f"{file}: task '{task}' is not what it was when the comparison in {folder} began; put the file back, or start"
        " a new comparison"
    )  # fmt: skip


def test_a_changed_text_is_refused_by_name(began):
    folder, config = began
    (text,) = config.compare.text_files
    Path(text).write_text(Path(text).read_text(encoding="utf-8") + "One more line.\n", encoding="utf-8")
    assert refusal(folder).startswith(f"{text}: this text is not what it was when the comparison in {folder} began; ")
    Path(text).unlink()
    assert refusal(folder).endswith(
        f": compare.text_files = {text} is not there any more; if it was moved, say where it is now: manyicl compare"
        f""" --resume {folder} 'compare.text_files=["PATH"]'"""
    )


@pytest.mark.slow
def test_without_recorded_hashes_those_of_the_finished_results_count(began):
    """A comparison of an earlier version has no inputs.json."""
    folder, config = began
    grid = open_comparison(folder, None)
    run_comparison(grid, seeds=[0], console=Console(file=StringIO()))
    (folder / INPUTS_FILE).unlink()
    open_comparison(folder, None)
    assert (folder / INPUTS_FILE).is_file()
    (folder / INPUTS_FILE).unlink()
    task = grid.roles.asked_trained[0]
    file = change_tests(Path(config.tasks.folder), task)
    assert refusal(folder).startswith(f"{file}: task '{task}' is not what it was when")


def test_results_of_trained_tasks_that_are_not_asked_now_are_refused(began):
    """An earlier version did not give compare.dedicated_tasks the first places if no arm had a model of its own."""
    folder, _ = began
    grid = open_comparison(folder, None)
    (other,) = sorted({*grid.roles.trained} - {*grid.roles.asked_trained})[:1]
    file = folder / "seed-0" / "base.test.json"
    file.parent.mkdir()
    asked = [{"task": name, "sha256": grid.inputs.tasks[name]} for name in [*grid.roles.asked, other]]
    file.write_text(json.dumps({"tasks": asked[:-1]}), encoding="utf-8")
    open_comparison(folder, None)
    file.write_text(json.dumps({"tasks": asked}), encoding="utf-8")
    assert refusal(folder) == (
        f"{file}: holds answers of task '{other}', which the recipe does not ask: an earlier version chose other"
        f" trained tasks; write compare.dedicated_tasks = [] into {folder / 'recipe.toml'}, or start a new comparison"
    )


def test_the_hashes_that_are_reported_are_those_of_the_results(began):
    folder, config = began
    before = {task.name: task.sha256 for task in load_tasks(config.tasks.folder)}
    change_tests(Path(config.tasks.folder), config.compare.held_out_tasks[0])
    found = {entry.task: entry.sha256 for entry in summarize(Grid(folder, config)).tasks}
    assert found == before


def test_a_kill_before_the_recipe_was_written_leaves_a_folder_that_can_be_begun_in(tmp_path):
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["base"])
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / INPUTS_FILE).write_text('{"tasks": {}, "texts": {}}')
    assert set(open_comparison(folder, config).inputs.tasks) >= set(config.tasks.names)


@pytest.mark.slow
def test_results_that_an_earlier_version_asked_after_other_shots_are_not_added_to(tmp_path):
    """A2: the answers of two arms would not be pairs."""
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["base"], flips=False, orders=False, text_files=[])
    grid = open_comparison(tmp_path / "out", config)
    run_comparison(grid, console=Console(file=StringIO()))
    tests = sorted((tmp_path / "out").glob("seed-*/base.test.json"))
    content = json.loads(tests[0].read_text(encoding="utf-8"))
    assert content.pop("streams") == 2
    tests[0].write_text(json.dumps(content), encoding="utf-8")
    run_comparison(grid, console=Console(file=StringIO()))  # nothing is missing, so nothing is mixed
    tests[-1].unlink()
    with pytest.raises(UserError, match=r"seed-0.base.test.json was asked by another version of manyicl, which draws"):
        run_comparison(grid, console=Console(file=StringIO()))


def test_a_comparison_whose_project_was_moved_goes_on_with_the_new_places(tmp_path):
    """It was "no such folder; give a folder of tasks", which `--resume` does not take."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    open_comparison(old / "out", make_recipe(old, write_world(old)))
    old.rename(new)
    out = new / "out"
    assert refusal(out) == (
        f"resume={out}: tasks.folder = {old / 'tasks'} and compare.text_files = {old / 'neutral.txt'} is not there any"
        f" more; if it was moved, say where it is now: manyicl compare --resume {out} tasks.folder=PATH"
        """ 'compare.text_files=["PATH"]'"""
    )
    places = [f"tasks.folder={new / 'tasks'}", f'compare.text_files=["{new / "neutral.txt"}"]']
    open_comparison(out, None, overrides=places)
    config = open_comparison(out, None).config
    assert (config.tasks.folder, config.compare.text_files) == (str(new / "tasks"), (str(new / "neutral.txt"),))


def test_new_places_of_a_comparison_must_hold_the_same_files(began, tmp_path):
    folder, config = began
    recipe = (folder / "recipe.toml").read_bytes()

    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as told:
            open_comparison(folder, None, overrides=overrides)
        assert (folder / "recipe.toml").read_bytes() == recipe
        return str(told.value)

    assert refused("compare.draws=7", "train.num_steps=9") == (
        f"resume={folder}: train.num_steps, compare.draws would be another than in its recipe.toml; leave it out to go"
        " on (only tasks.folder, model.path, compare.text_files may change), or start anew in another folder"
    )
    tasks = shutil.copytree(config.tasks.folder, tmp_path / "copy")
    file = change_tests(tasks, config.compare.held_out_tasks[0])
    assert refused(f"tasks.folder={tasks}").startswith(f"{file}: task '{file.stem}' is not what it was when")
    (tmp_path / "other.txt").write_text("Another text.\n" * 30)
    told = refused(f'compare.text_files=["{tmp_path / "other.txt"}"]')
    assert told.startswith(f"{tmp_path / 'other.txt'}: this text is not what it was when")
    assert refused("compare.text_files=[]").startswith("compare.text_files: names 0 texts, but the comparison in")
    model = shutil.copytree(SEED_MODEL, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    told = refused(f"model.path={model}")
    assert told.startswith(f"model.path = {model}: holds other weights than the comparison in {folder} began with; ")
    assert refused(f"tasks.folder={tmp_path / 'nowhere'}").startswith(f"resume={folder}: tasks.folder = ")


@pytest.mark.slow
def test_a_moved_comparison_is_resumed_and_its_adapters_are_answered_on_the_moved_base(tmp_path):
    """Its runs know their base by its old path, and a finished trial is still taken over as the run that it is."""
    old, new = tmp_path / "old", tmp_path / "elsewhere"
    old.mkdir()
    base = shutil.copytree(SEED_MODEL, old / "base")
    config = make_recipe(
        old, write_world(old), arms=["base", "manyicl"], flips=False, orders=False, text_files=[], learning_rates=[1e-3]
    )
    model = config.model.model_copy(update={"path": str(base), "lora": LoraSettings(rank=2, alpha=2)})
    grid = open_comparison(old / "out", config.model_copy(update={"model": model}))
    trial = next(item for item in grid.work() if item.rate is not None)
    run_comparison(grid, seeds=[], console=Console(file=StringIO()))  # the trials alone
    assert grid.is_done(trial)
    old.rename(new)
    (new / "base").rename(new / "start")
    code = run_command(
        *("compare", "--resume", new / "out", f"tasks.folder={new / 'tasks'}", f"model.path={new / 'start'}")
    )
    assert code.returncode == 0, code.stderr
    run = RunFolder(new / "out" / "seed-0" / "manyicl")
    assert run.read_config().model.path == str(new / "start")
    assert json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"] == str(new / "start")
    trained = RunFolder(new / "out" / "trials" / "0.001" / "manyicl").read_state()
    assert run.read_state().wall_s == trained.wall_s  # copied, not trained again


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file_of_a_comparison_is_told_in_one_line(tmp_path, content):
    open_comparison(tmp_path / "out", make_recipe(tmp_path, write_world(tmp_path)))
    damaged = tmp_path / "out" / INPUTS_FILE
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"^{damaged}: is damaged; restore it from a copy, or start a new comparison$"):
        open_comparison(tmp_path / "out", None)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_file_of_a_comparison_that_is_gone_or_lacks_what_is_read_is_damaged(tmp_path, content):
    """A plan that was gone ended a finished comparison's report in a traceback."""
    file = tmp_path / "manyicl.plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"^{file}: is damaged; restore it from a copy, or start a new comparison$"):
        read_whole(file, "learning_rate")
    file.write_text('{"learning_rate": 0.5}')
    assert read_whole(file, "learning_rate") == {"learning_rate": 0.5}
