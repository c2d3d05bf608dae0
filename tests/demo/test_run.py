"""The demo: the comparison on two regimes of the embedded world, made tiny here."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
from rich.console import Console

from manyicl.comparison.comparison_file import read_comparison
from manyicl.demo.regimes import CONTRAST, HEADLINE
from manyicl.demo.run import FULL, QUICK, Size, demo_config, open_demo, run_demo, write_regime
from manyicl.errors import UserError
from manyicl.tasks.task import load_tasks

TINY = Size(
    num_steps=2,
    packs_per_step=1,
    learning_rates=(1e-4, 1e-3),
    asked_tasks=2,
    held_out_tasks=1,
    draws=1,
    queries=1,
    analysis=False,
    dedicated_tasks=1,
    familiar_tasks=1,
    token_budget=192,
)


SHORT_HEADLINE, SHORT_CONTRAST = (
    replace(regime, num_tasks=4, num_train=40, num_test=12, num_held_out=2) for regime in (HEADLINE, CONTRAST)
)
SHORT = ((SHORT_HEADLINE, TINY), (SHORT_CONTRAST, TINY))


def run(out, **options) -> str:
    console = Console(width=160, record=True, file=StringIO())
    run_demo(out=out, console=console, **{"parts": SHORT, **options})
    return console.export_text()


@pytest.mark.parametrize("regime", [HEADLINE, CONTRAST], ids=lambda regime: regime.name)
def test_a_regime_is_written_as_tasks_of_three_roles(tmp_path, regime):
    regime = replace(regime, num_tasks=10, num_held_out=4, num_train=20, num_test=10)
    size = replace(TINY, held_out_tasks=3)
    trained, held_out, familiar = write_regime(tmp_path, regime, size, seed=1)
    assert (len(trained), len(held_out), len(familiar)) == (10, 3, 1)
    written = {task.name: task for task in load_tasks(tmp_path)}
    assert sorted(written) == sorted({*trained, *held_out, *familiar})
    assert {len(task.train) + len(task.validation) for task in written.values()} == {20}
    config = demo_config(tmp_path, size, names=(trained, held_out, familiar), seeds=[1, 2])
    assert set(config.tasks.names) == set(trained)
    assert set(config.compare.dedicated_tasks) < set(trained)
    assert (config.compare.seeds, config.compare.held_out_tasks) == ((1, 2), tuple(held_out))


def test_every_arm_of_a_regime_has_the_same_trials_half_a_decade_apart(tmp_path):
    """A4: a rate that suits one arm only is no fair comparison; both folders are there before any work is done."""
    comparisons = open_demo(tmp_path / "demo", seeds=[3, 4], parts=SHORT)
    assert [c.folder.name for c in comparisons] == [HEADLINE.name, CONTRAST.name]
    for comparison in comparisons:
        assert (comparison.folder / "recipe.toml").is_file()
        tried = {(item.arm, item.rate) for item in comparison.work() if item.rate is not None}
        arms = ("zero-shot", "few-shot", "manyicl", "dedicated")
        assert tried == {(arm, rate) for arm in arms for rate in (1e-4, 1e-3)}
    for _, size in FULL:
        steps = [math.log10(high / low) for low, high in pairwise(size.learning_rates)]
        assert steps == pytest.approx([0.5] * len(steps), abs=0.03)
        assert len(size.learning_rates) >= 4


def test_a_regime_is_a_pure_function_of_the_seed(tmp_path):
    regime = replace(HEADLINE, num_tasks=5, num_held_out=1, num_train=10, num_test=5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_regime(tmp_path / name, regime, TINY, seed=seed)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.jsonl")} for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.slow
def test_the_demo_runs_both_regimes_to_a_report_and_goes_on(tmp_path):
    out = tmp_path / "demo"
    printed = run(out)
    for arm in ("base", "zero-shot FT", "few-shot FT", "ManyICL", "dedicated FT"):
        assert arm in printed
    assert "the headline: 4 tasks of 40 examples each" in printed
    assert "the contrast: 4 tasks of 40 examples each" in printed
    for name in (HEADLINE.name, CONTRAST.name):
        assert read_comparison(out / name).finished
        for file in ("report.html", "report.md", "comparison.json", "seed-0/manyicl/model/manyicl.json"):
            assert (out / name / file).is_file(), file
    cards = {"README.md", "shot-curve.svg"}  # written anew with the report
    finished = {
        path: path.stat().st_mtime_ns for path in out.glob("*/seed-0/**/*") if path.is_file() and path.name not in cards
    }
    assert len(finished) > 50
    lost = out / CONTRAST.name / "seed-0" / "manyicl.test.json"
    lost.unlink()
    run(out)
    again = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-0/**/*") if path.is_file()}
    assert {p for p in finished if again[p] != finished[p]} <= {
        lost, lost.with_name("manyicl.test.predictions.parquet")
    }  # fmt: skip
    other_size = [(regime, replace(TINY, num_steps=1)) for regime, _ in SHORT]
    for options in ({"seed": 1}, {"num_seeds": 2}, {"parts": other_size}):
        with pytest.raises(UserError, match="holds a demo of other seeds or size; repeat that one") as refused:
            run(out, **options)
        assert str(refused.value).startswith(f"out={out}: ")


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    place = tmp_path / "many_tasks"
    place.mkdir()
    (place / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=f"^out={tmp_path}: is not empty; name a new folder"):
        run(tmp_path)
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]


def test_the_sizes_that_ship_name_both_regimes():
    for parts in (FULL, QUICK):
        assert [regime for regime, _ in parts] == [HEADLINE, CONTRAST]
