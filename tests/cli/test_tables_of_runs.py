"""Tables of runs: what one will train on, and the losses that it ended with."""

from __future__ import annotations

import math
import re
from io import StringIO

from rich.console import Console

from manyicl.cli.tables.runs import held_out_table, plan_table
from manyicl.intervals import Interval
from manyicl.training.held_out import HeldOutRow
from manyicl.training.preparation import count_plan, prepare_run
from tests.support.rendering import cells_of, render
from tests.trajectory.setting import write_setting

NAN = math.nan


def held_out(task: str, **changes) -> HeldOutRow:
    values = {
        "family": "qa",
        "num_episodes": 4,
        "num_answers": 1200,
        "before": 3.456,
        "answers_only": 2.0,
        "after": 1.0,
    }
    intervals = {
        "after_minus_before": Interval(-2.456, -3.0, -1.912),
        "after_minus_answers_only": Interval(-1.0, -2.5, 0.5),
    }
    return HeldOutRow(**{"task": task, **values, **intervals, **changes})


def test_held_out_losses_and_their_means_are_shown():
    text = render(held_out_table([held_out("a"), held_out("b", num_answers=5, after=2.0)]))
    numbers = ["a", "qa", "1,200", "3.46", "2.00", "1.00", "−2.46 [−3.00, −1.91]", "−1.00 [−2.50, +0.50]"]
    assert cells_of(text, "a") == numbers
    mean = cells_of(text, "mean of tasks")
    assert mean[2:6] == ["1,205", "3.46", "2.00", "1.50"]
    assert mean[6].startswith("−2.46 [−2.")
    assert "differences paired over 4 episodes per task" in text


def test_one_episode_has_no_interval():
    lone = Interval(-1.0, NAN, NAN)
    text = render(
        held_out_table([held_out("a", num_episodes=1, after_minus_before=lone, after_minus_answers_only=lone)])
    )
    assert cells_of(text, "a")[6:] == cells_of(text, "mean of tasks")[6:] == ["−1.00", "−1.00"]
    assert text.splitlines()[-2:] == [
        "one episode per task: no interval; negative is better",
        "answers only: what guessing by the frequencies of the train answers would lose, without reading inputs",
    ]


def test_better_is_green_worse_is_red_and_undecided_neither():
    worse = held_out("b", after_minus_before=Interval(1.0, 0.5, 1.5))
    file = StringIO()
    Console(file=file, width=200, force_terminal=True, color_system="standard").print(
        held_out_table([held_out("a"), worse])
    )
    assert "\x1b[32m−2.46 [−3.00, −1.91]" in file.getvalue()
    assert "\x1b[31m+1.00 [+0.50, +1.50]" in file.getvalue()
    assert not re.search(r"\x1b\[3\dm−1.00 \[−2.50", file.getvalue())


def test_the_plan_counts_what_the_run_will_see(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    prepared = prepare_run(write_setting(tmp_path))
    text = render(plan_table(prepared))
    plan = count_plan(prepared.packs, pack_tokens=prepared.config.pack_tokens)
    assert cells_of(text, "animals") == [
        "animals", "classification", "40", "10", "10", f"{plan['tokens_by_task']['animals']:,}", "-",
    ]  # fmt: skip
    line = text.splitlines()[-1]
    assert line.startswith(f"{plan['episodes']:,} episodes, {plan['answers']:,} answers and {plan['tokens']:,} tokens")
    assert f"in 48 packs of 160 ({plan['fill']:.1%} full), 6 steps" in line


def test_a_warm_up_longer_than_the_run_is_told_before_it_is_trained(tmp_path, monkeypatch):
    """Only `manyicl plan` told it."""
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    config = write_setting(tmp_path)
    long = config.model_copy(update={"train": config.train.model_copy(update={"warmup_steps": 6})})
    last = render(plan_table(prepare_run(long))).splitlines()[-1]
    assert last == "train.warmup_steps = 6: the learning rate is still rising when the run ends, at step 6"


def test_a_task_that_the_steps_do_not_reach_is_told_before_it_is_trained(tmp_path, monkeypatch):
    """Only `manyicl plan` told it; the table of `manyicl train` had a 0."""
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    config = write_setting(tmp_path)
    short = config.train.model_copy(update={"num_steps": 1, "packs_per_step": 1})
    prepared = prepare_run(config.model_copy(update={"train": short}))
    reached = count_plan(prepared.packs, pack_tokens=160)["tokens_by_task"]
    others = [name for name in prepared.tasks if name not in reached]
    assert len(reached) == 1
    told = "not trained on, since the steps end before an episode of it: " + ", ".join(others)
    last = render(plan_table(prepared)).splitlines()[-1]
    assert last == f"{told}; raise train.num_steps or train.packs_per_step, or leave it out of tasks.names"
