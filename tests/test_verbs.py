"""Every verb of the command line is a function, in the words of parameters."""

from __future__ import annotations

import json

import pytest
from typer.main import get_command

import manyicl
from manyicl.cli.app import app
from tests.trajectory.setting import write_setting

# Where the names differ: Python has an `eval` and an `import` of its own, and `report` and `demo` are packages.
FUNCTIONS = {
    "eval": "evaluate",
    "curve": "one_pass_curve",
    "report": "write_report",
    "world": "write_world",
    "demo": "run_demo",
    "import": "import_tasks",
    "token": "make_token",
}


def test_every_verb_has_a_function():
    verbs = get_command(app).commands
    assert len(verbs) == 17
    assert {FUNCTIONS.get(verb, verb) for verb in verbs} <= set(manyicl.__all__)


def test_a_folder_is_checked_and_its_held_out_rows_are_found_in_other_tasks(tmp_path):
    rows = [{"input": f"row {number}", "answer": "yes" if number % 2 else "no"} for number in range(40)]
    for name, kept in {"old": rows, "new": [*rows[:10], {"input": "another", "answer": "no"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    found = manyicl.check(tmp_path, held_out=["new"])
    assert [audit.name for audit in found.audits] == ["new", "old"]
    assert found.usable
    assert found.overlaps["new"].count > 0
    with pytest.raises(manyicl.UserError, match="held_out=: no task 'nwe' in the folder; did you mean 'new'"):
        manyicl.check(tmp_path, held_out=["nwe"])


def test_a_faulty_task_hides_no_overlap_of_other_tasks_in_its_folder(tmp_path):
    rows = "input,answer\n" + "".join(f"row {number},{'yes' if number % 2 else 'no'}\n" for number in range(40))
    for name, kept in {"old_train": rows, "new_test": rows, "bad_train": "input,answer\nrow 1,\n"}.items():
        (tmp_path / f"{name}.csv").write_text(kept)
    for name in ("old_test", "new_train", "bad_test"):
        (tmp_path / f"{name}.csv").write_text("input,answer\nanother,no\n")
    assert manyicl.check(tmp_path, held_out=["new"]).overlaps["new"].count > 0


def test_a_held_out_task_that_is_not_there_is_not_blamed_on_the_recipe(tmp_path):
    write_setting(tmp_path, num_steps=2)
    recipe = (tmp_path / "recipe.toml").read_text() + "\n[compare]\n"
    (tmp_path / "compare.toml").write_text(recipe)
    with pytest.raises(manyicl.UserError, match=r"^held_out=: no task 'gone' in the folder"):
        manyicl.check(tmp_path / "tasks", held_out=["gone"], recipe=tmp_path / "compare.toml")


@pytest.mark.slow
def test_a_recipe_is_shown_planned_and_exported(tmp_path):
    write_setting(tmp_path, num_steps=2)
    recipe = tmp_path / "recipe.toml"
    assert manyicl.show(recipe).num_targets > 0
    assert manyicl.plan(recipe).blockers == ()
    loaded = manyicl.load_recipe(recipe)
    assert manyicl.show(loaded).num_targets == manyicl.show(recipe).num_targets
    assert manyicl.plan(loaded).tasks == manyicl.plan(recipe).tasks
    with pytest.raises(manyicl.UserError, match="are for a recipe that is read from a file"):
        manyicl.plan(loaded, overrides=["train.num_steps=2"])
    assert sum(manyicl.export(recipe, tmp_path / "rows").values()) > 0


def test_a_resumed_comparison_takes_no_other_folder(tmp_path):
    with pytest.raises(manyicl.UserError, match="resume=c: keeps its own folder; omit `out`"):
        manyicl.compare(resume="c", out=tmp_path)


def test_a_comparison_is_no_work_for_one_of_several_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(manyicl.UserError, match="2 processes of a launch: a comparison starts its own"):
        manyicl.compare(tmp_path / "recipe.toml")
