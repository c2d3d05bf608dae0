"""Trials of learning rates that diverge: recorded, counted as worst, and told; only without another rate an error."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyicl.comparison.answers import Trials
from manyicl.comparison.comparison_file import check_comparison
from manyicl.comparison.grid import Grid, WorkItem, open_comparison
from manyicl.comparison.summary import summarize
from manyicl.comparison.worker import run_comparison
from manyicl.errors import NonFiniteError, UserError
from manyicl.files import write_atomically
from manyicl.processes import is_finished_item
from manyicl.report.markdown import render_markdown
from manyicl.report.page import render_page
from manyicl.report.terminal import grid_table
from manyicl.report.verdict import tell_rates
from manyicl.training import trainer
from manyicl.training.run_folder import RunFolder, RunState
from tests.cli.test_app import refusal
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.rendering import render_terminal

GOOD, BAD, WORSE = 1e-3, 1e37, 1e38  # one step at 1e38 leaves weights whose next loss is not finite


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder)


def begin(world, folder: Path, *, num_steps: int = 2, **compare: Any) -> Grid:
    """Return a new comparison of the smallest kind that has trials."""
    small = {
        "arms": ["manyicl"], "learning_rates": [GOOD, WORSE], "seeds": [0], "shots": [0, 1], "queries": 2,
        "asked_tasks": 1, "draws": 1, "familiar_tasks": [], "held_out_tasks": world[1][1][:1], "text_files": [],
    }  # fmt: skip
    return open_comparison(folder, make_recipe(*world, train={"num_steps": num_steps}, **{**small, **compare}))


def run(grid: Grid, **options: Any) -> str:
    console = Console(file=StringIO(), width=200)
    run_comparison(grid, console=console, **options)
    return console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_steps", "kind", "what"),
    [
        (2, "train", "step 2: loss nan, gradient norm nan"),
        (1, "validation", "the model gives 32 of 32 answers no finite likelihood"),
    ],
)
def test_another_rate_wins_where_a_trial_diverges(world, tmp_path, num_steps, kind, what):
    """It ended the comparison with an error, and again each time that it was resumed."""
    grid = begin(world, tmp_path / "out", num_steps=num_steps)
    printed = run(grid)
    (line,) = [line for line in printed.splitlines() if "diverged" in line]
    assert re.search(rf"learning rate 1e\+?38: {kind}: done in .*; diverged \(", line)
    assert line.endswith(f"; diverged ({what}), so this rate counts as the worst")
    assert is_finished_item(line)  # so that it is seen where another process did it
    assert all(map(grid.is_done, grid.work()))
    assert Trials(grid).chosen_rate("manyicl") == GOOD
    trial = RunFolder(grid.path_of(WorkItem("manyicl", 0, "train", rate=WORSE)))
    assert json.loads(trial.state_file.read_bytes())["diverged"] == what
    assert not trial.checkpoints.path.exists()
    comparison = summarize(grid)
    assert comparison.finished
    assert [(t.learning_rate, t.chosen, t.diverged, t.score is None) for t in comparison.trials] == [
        (GOOD, True, False, False),
        (WORSE, False, True, True),
    ]
    assert run(grid).count("\n") == 1  # what it shares with other tasks, and no work


@pytest.mark.slow
def test_a_trial_that_diverged_is_shown_where_trials_are(world, tmp_path):
    grid = begin(world, tmp_path / "out", learning_rates=[WORSE, GOOD])
    assert "; 6 left; diverged (" in run(grid)  # it says nothing of how long the others take
    title = render_terminal(grid_table(grid), width=200)
    assert "4 of 4 pieces of work are done; 4 of 4 for trials of learning rates, in which 1 model diverged" in title
    comparison = summarize(grid)
    (row,) = [line for line in render_markdown(comparison).splitlines() if line.endswith("| diverged |")]
    assert row.startswith("| ManyICL | all | 1e")
    assert "<td>diverged</td>" in render_page(comparison)
    assert "Diverged (a loss that is not finite), so counted as worst: ManyICL 1e" in tell_rates(comparison)
    # 1e38 was tried, and was worse: nothing is to be said of the end of the rates there.
    assert "highest" not in tell_rates(comparison)


def test_trials_that_diverged_are_named_by_arm_and_rate():
    trials = [
        {"arm": "a", "learning_rate": 1e-4},
        {"arm": "a", "learning_rate": 1e-3, "chosen": True},
        {"arm": "a", "learning_rate": 1e-2, "diverged": True},
        {"arm": "b", "task": "sick", "learning_rate": 1e-2, "diverged": True},
        {"arm": "b", "task": "trec", "learning_rate": 1e-2, "diverged": True},
    ]
    about = {"schema": 2, "name": "n", "finished": True, "config": "", "seeds": [0], "shots": [0], "match": "tokens"}
    arms = [{"arm": arm, "title": arm.upper()} for arm in "ab"]
    assert tell_rates(check_comparison(about | {"arms": arms, "tasks": [], "trials": trials})) == (
        "Chosen on validation rows: A 1e-3."
        " Diverged (a loss that is not finite), so counted as worst: A 1e-2, B 1e-2 (2 tasks)."
    )


@pytest.mark.slow
def test_a_process_that_is_killed_before_it_notes_that_a_trial_diverged_does_it_again(world, tmp_path, monkeypatch):
    """The folder of an earlier version, which did not note it, is like this too."""
    grid = begin(world, tmp_path / "out")

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Grid, "keep_diverged", kill)
        with pytest.raises(KeyboardInterrupt):
            run(grid)
    trial = WorkItem("manyicl", 0, "train", rate=WORSE)
    assert not grid.is_done(trial)
    assert [step for step, _ in RunFolder(grid.path_of(trial)).checkpoints.all()] == [1]
    assert "diverged (step 2: " in run(grid)
    assert all(map(grid.is_done, grid.work()))


@pytest.mark.slow
def test_without_a_rate_that_did_not_diverge_the_comparison_ends_in_one_line(world, tmp_path, capfd):
    """At once, before the trials of the next arm, and so when it is resumed."""
    grid = begin(world, tmp_path / "out", arms=["few-shot", "manyicl"], learning_rates=[BAD, WORSE])
    rates = r"\[1e\+?37, 1e\+?38\]"
    told = (
        rf"compare\.learning_rates = {rates}: few-shot FT diverged at each of them \(a loss that is not finite\), so no"
        r" rate can be chosen; start a new comparison with lower compare\.learning_rates"
    )
    with pytest.raises(UserError, match=f"^{told}$"):
        run(grid)
    assert re.fullmatch(told, refusal(capfd, "compare", "--resume", grid.folder))
    assert not grid.path_of(WorkItem("manyicl", 0, "train", rate=BAD)).exists()
    assert [(trial.diverged, trial.chosen) for trial in summarize(grid).trials] == [(True, False)] * 2


@pytest.mark.slow
def test_rates_of_its_own_are_named_where_an_arm_diverged_at_all_of_them(world, tmp_path):
    grid = begin(world, tmp_path / "out", learning_rates=[], arm_rates={"manyicl": [BAD, WORSE]})
    with pytest.raises(UserError, match=r"^compare\.arm_rates\.manyicl = \[.*with lower compare\.arm_rates\.manyicl$"):
        run(grid)


def test_a_rate_is_out_of_the_choice_of_those_whose_model_diverged_with_it(world, tmp_path):
    """The rate of `dedicated` is for all its tasks; dedicated-tuned chooses one for each."""
    one, other = tasks = world[1][0][:2]
    arms = ["dedicated", "dedicated-tuned"]
    grid = begin(world, tmp_path / "out", arms=arms, dedicated_tasks=tasks)
    trials = Trials(grid)
    for arm in arms:
        write_started(grid, WorkItem(arm, 0, "train", one, WORSE))
        write_started(grid, WorkItem(arm, 0, "train", other, WORSE))
        grid.keep_diverged(WorkItem(arm, 0, "train", one, WORSE), "step 3: loss nan, gradient norm nan")
    assert {(arm, task): trials.has_diverged(arm, WORSE, task) for arm in arms for task in tasks} == {
        ("dedicated", one): True,
        ("dedicated", other): True,
        ("dedicated-tuned", one): True,
        ("dedicated-tuned", other): False,
    }
    assert not trials.has_diverged("dedicated", GOOD)
    assert {item.task for item in grid.work() if item.rate == WORSE and grid.is_done(item)} == {one}
    write_started(grid, WorkItem("dedicated-tuned", 0, "train", one, GOOD))
    grid.keep_diverged(WorkItem("dedicated-tuned", 0, "train", one, GOOD), "step 3: loss nan, gradient norm nan")
    with pytest.raises(UserError, match=rf"tuned \(ceiling, not matched\), task '{one}' diverged at each of them \("):
        trials.refuse_all_diverged("dedicated-tuned", one)
    trials.refuse_all_diverged("dedicated-tuned", other)
    trials.refuse_all_diverged("dedicated", one)


def write_started(grid: Grid, item: WorkItem) -> None:
    """Write what a run leaves as soon as it is started."""
    counts = dict.fromkeys(("packs", "episodes", "answers", "targets", "tokens", "fill"), 1)
    plan = {**counts, "tokens_by_task": {}, "sha256": ""}
    state = RunState.model_validate({"schema": 1, "finished": False, "tasks": {}, "plan": plan})
    write_atomically(RunFolder(grid.path_of(item)).state_file, state.to_json())


@pytest.mark.slow
def test_a_model_of_a_seed_that_diverges_is_an_error(world, tmp_path, monkeypatch):
    """No other rate can take the place of the one that was chosen."""
    grid = begin(world, tmp_path / "out", seeds=[0, 1])
    run(grid, seeds=[0])
    original = trainer.row_loss

    def poisoned(model: Any, batch: Any) -> Any:
        scored = original(model, batch)
        return replace(scored, loss=scored.loss * float("nan"), nll_A=scored.nll_A * float("nan"))

    monkeypatch.setattr(trainer, "row_loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"^step 1: loss nan, gradient norm nan; episodes .* weights were not"):
        run(grid)
    assert not grid.is_done(WorkItem("manyicl", 1, "train"))
