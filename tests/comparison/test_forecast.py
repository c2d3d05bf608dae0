"""`manyicl plan` of a comparison's recipe: what it counts beforehand is what the comparison then spends."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyicl.cli.tables.comparisons import comparison_forecast_table
from manyicl.comparison.forecast import (
    WHILE_TRAINING,
    ArmForecast,
    ComparisonForecast,
    Work,
    count_sweep,
    forecast_comparison,
)
from manyicl.comparison.grid import Grid, WorkItem, open_comparison
from manyicl.comparison.summary import summarize
from manyicl.comparison.worker import run_comparison
from manyicl.evaluation.answering import answer_draw
from manyicl.evaluation.sweep import TaskSweep
from manyicl.inference.engine import choose_engine
from manyicl.inference.model import load_for_inference, tokenize_for
from manyicl.planning.devices import Device, find_device
from manyicl.training.memory.choice import PacksChoice
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.rendering import render_terminal
from tests.trajectory.setting import run_command

LESS: dict[str, Any] = {
    "arms": ["base", "zero-shot", "manyicl", "dedicated", "dedicated-tuned"], "learning_rates": [1e-4, 1e-3],
    "familiar_tasks": [], "orders": False, "asked_tasks": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder)


def small(world, **compare: Any):
    """Return a recipe with every kind of work, of one dedicated task."""
    return make_recipe(*world, train={"num_steps": 2}, dedicated_tasks=world[1][0][:1], **{**LESS, **compare})


@pytest.mark.slow
def test_the_planned_tokens_are_those_that_the_comparison_spends(world, tmp_path):
    """Issue 16, fault 4: plan of a comparison's recipe."""
    less = {"draws": 1, "queries": 1, "validation_queries": 1, "shots": [0, 1], "held_out_tasks": [], "flips": False}
    config = small(world, **less, learning_rates=[1e-3], text_files=[])
    planned = forecast_comparison(Grid(tmp_path, config))
    grid = open_comparison(tmp_path / "out", config)
    run_comparison(grid, console=Console(file=StringIO()))
    costs = {(cost.arm, cost.seed): cost for cost in summarize(grid).costs}
    assert {arm.arm: arm.tokens for arm in planned.arms} == {arm: costs[arm, 0].tokens for arm in LESS["arms"]}
    # Every run that was really trained, those of the first seed in its trials: by what its steps logged.
    runs = {path.parent for path in grid.folder.glob("**/metrics.jsonl")}
    logged = {
        run: sum(json.loads(line).get("tokens", 0) for line in (run / "metrics.jsonl").read_text().splitlines())
        for run in runs
    }
    trials = sum(tokens for run, tokens in logged.items() if "trials" in run.parts)
    assert planned.work["trials: training"].tokens == trials
    # The first seed's runs are those of trials; the second is taken to be like the first.
    assert planned.work["training"].tokens == sum(costs[arm, 0].tokens for arm in LESS["arms"])
    assert planned.work["training"].items == 4 * 2


@pytest.mark.slow
def test_the_planned_work_is_that_of_the_grid(world, tmp_path):
    grid = Grid(tmp_path, small(world))
    planned = forecast_comparison(grid)
    assert sum(work.items for work in planned.work.values()) == len(grid.work())
    assert planned.work["text"].items == 3 * 2  # base, zero-shot and ManyICL, two seeds
    assert planned.work["text"].tokens == 3 * 2 * sum(len(ids) for text in grid.texts for ids in text.ids)
    assert planned.blockers == ()
    for arm in planned.arms:
        assert (arm.memory is None) is (arm.arm == "base")
        assert arm.total.flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "choose"), [("test", "random"), ("validation", "random"), ("flip", "random"), ("test", "nearest")]
)
def test_the_tokens_after_a_shared_prefix_are_those_that_go_through_the_model(world, tmp_path, kind, choose):
    """Of known answers exactly; an open answer is taken to be as long as its reference."""
    grid = Grid(tmp_path, small(world, choose=choose, **({"num_nearest": 3} if choose == "nearest" else {})))
    model = load_for_inference("seed", precision="fp32", max_tokens=192, template=grid.config.template)
    tasks, sweep = grid.sweep_of(WorkItem("manyicl", 1, kind))
    labelled = next(task for task in tasks if task.labels)
    one = TaskSweep(tokenize_for(labelled, model), tokenizer=model.tokenizer, sweep=sweep)
    counted = count_sweep(one, forward=lambda lengths, **_: 0)
    engine = choose_engine(model)
    for draw in range(sweep.num_draws):
        for _ in answer_draw(engine, one, draw=draw):
            pass
    assert counted.tokens == engine.count.num_prefix_tokens + engine.count.num_query_tokens > 0
    prefixes = [sum(len(one.prefix_ids(d, start=0, stop=one.num_shots(d, k))) for d, k in one.points)]
    assert counted.plain_tokens > sum(prefixes) * len(one.queries)


@pytest.mark.slow
def test_each_token_of_a_generated_answer_is_predicted_to_take_a_pass(world, tmp_path):
    grid = Grid(tmp_path, small(world))
    model = load_for_inference("seed", precision="fp32", max_tokens=192, template=grid.config.template)
    tasks, sweep = grid.sweep_of(WorkItem("manyicl", 1, "test"))
    for task in tasks:
        one = TaskSweep(tokenize_for(task, model), tokenizer=model.tokenizer, sweep=sweep)
        counted = count_sweep(one, forward=lambda *_, **__: 0, predict=lambda _, num_passes: num_passes)
        open_ones = [query for query in one.queries.tolist() if not one.candidates[query]]
        longest = max(one.tokenized.splits["test"].answer_lengths[open_ones].tolist(), default=0)
        encoded = [draw for draw in range(sweep.num_draws) if one.shots_of(draw)]
        assert counted.seconds == len(encoded) + len(one.points) * (1 + longest)


@pytest.mark.slow
def test_validation_losses_of_joined_episodes_cost_the_same_in_fewer_passes(world, tmp_path):
    """A pass of this model takes 4 ms: four layers, each of which its host starts in 1 ms."""
    found = {}
    for pack_tokens in (192, 384):
        train = {"num_steps": 2, "validation_tokens": 600, "pack_tokens": pack_tokens}
        config = make_recipe(*world, train=train, arms=["zero-shot"], text_files=[], flips=False)
        planned = forecast_comparison(Grid(tmp_path, config), device=find_device("h100"))
        found[pack_tokens] = planned.arms[0].work[WHILE_TRAINING]
    short, long = found[192], found[384]
    assert (short.tokens, short.flops) == (long.tokens, long.flops)
    # Two seeds have two checkpoints each, at which all 203 tokens that the tasks have are read.
    assert short.tokens == 4 * 203
    assert short.seconds == pytest.approx(4 * 2 * 0.004)
    assert long.seconds == pytest.approx(4 * 1 * 0.004)


@pytest.mark.slow
@pytest.mark.parametrize(("points", "times"), [(1, 1), (2, 2), (9, 2)])
def test_texts_are_read_evenly_over_a_run_at_each_step_at_most(world, tmp_path, points, times):
    config = make_recipe(*world, train={"num_steps": 2}, arms=["zero-shot"], flips=False, drift_points=points)
    grid = Grid(tmp_path, config)
    read = forecast_comparison(grid).arms[0].work[WHILE_TRAINING].tokens
    assert read == 2 * times * sum(len(ids) for text in grid.texts for ids in text.ids)  # two seeds


def plan_joined(world, folder, together, *, arms, device):
    train = {"num_steps": 2, "packs_per_step": 4, "packs_per_batch": together}
    config = make_recipe(*world, train=train, arms=arms, text_files=[], flips=False)
    return forecast_comparison(Grid(folder, config), device=device and find_device(device))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "number", "line"),
    [
        ("h100", 4, "rows: 4 packs go through the model at once on h100: all that a step has for a rank"),
        (None, 1, "rows: 1 pack goes through the model at once: no device is named, and a CPU gains nothing from more"),
    ],
)
def test_arms_are_planned_with_the_packs_that_they_join_on_the_device(world, tmp_path, device, number, line):
    found, fixed, other = (
        plan_joined(world, tmp_path, together, arms=["zero-shot", "manyicl"], device=device)
        for together in ("auto", number, 2)
    )
    assert [[choice.number for choice in arm.joined] for arm in found.arms] == [[number], [number]]
    assert [arm.joined for arm in fixed.arms] == [(), ()]  # the recipe says how many
    assert [replace(arm, joined=()) for arm in found.arms] == list(fixed.arms)
    assert list(fixed.arms) != list(other.arms)  # in their peaks
    shown = render_terminal(comparison_forecast_table(found), width=200).splitlines()
    assert f"{line} (train.packs_per_batch = 'auto')" in [text.strip() for text in shown]
    assert "rows:" not in render_terminal(comparison_forecast_table(fixed), width=200)


def test_arms_that_join_other_numbers_of_packs_have_a_line_each():
    def arm(name, title, *numbers):
        joined = tuple(PacksChoice(number, "more would not fit the memory") for number in numbers)
        return ArmForecast(name, title, 0, {}, None, joined=joined)

    arms = arm("base", "base"), arm("zero-shot", "zero-shot FT", 8), arm("manyicl", "ManyICL", 8)
    planned = ComparisonForecast((0,), (*arms, arm("dedicated", "dedicated FT", 2, 4, 2)), device=None, num_devices=1)
    shown = render_terminal(comparison_forecast_table(planned), width=200)
    assert [line.partition(":")[0].strip() for line in shown.splitlines() if line.startswith("rows")] == [
        "rows of zero-shot FT, ManyICL",
        "rows of dedicated FT",
    ]
    assert "dedicated FT: 2 to 4 packs go through the model at once: more would not fit the memory" in shown
    assert [one["number"] for one in planned.to_json()["arms"][3]["joined"]] == [2, 4, 2]


def test_work_adds_up():
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) == Work(11, 22, 33, 44)
    assert Work(1, 2, 3, 4).times(3) == Work(3, 6, 9, 12)


@pytest.mark.slow
def test_the_table_fits_80_columns_and_says_what_it_assumes(world, tmp_path):
    planned = forecast_comparison(Grid(tmp_path, small(world)), device=find_device("h100"), num_devices=2)
    shown = render_terminal(comparison_forecast_table(planned), width=80)
    for words in (
        "│ zero-shot FT",
        "trials: validation",
        "plain path",
        "30%",
        "On 2 of them",
        "MiB",
        "Counted with seed 0;",
    ):
        assert words in shown, words
    total = planned.to_json()["total"]
    # So small a model waits for its host: it has four layers, and each pass through one takes 1 ms.
    assert total["hours"] == total["seconds"] / 3600
    assert total["seconds"] / 0.004 == pytest.approx(round(total["seconds"] / 0.004))
    assert total["seconds"] > 100 * total["flops"] / (989.5e12 * 0.3)
    assert "nothing stands in its way" in shown


@pytest.mark.slow
@pytest.mark.parametrize(("device", "count"), [(None, 1), ("H100", 0)])
def test_bf16_that_this_cpu_would_emulate_is_noted_once(world, tmp_path, monkeypatch, device, count):
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = small(world, arms=["base", "zero-shot", "manyicl"])
    half = config.model_copy(update={"model": config.model.model_copy(update={"precision": "bf16"})})
    found = forecast_comparison(Grid(tmp_path, half), device=find_device(device) if device else None)
    assert sum("this CPU has no units" in note for note in found.notes) == count


def test_a_warm_up_longer_than_the_run_is_noted_of_each_arm(world, tmp_path):
    """`plan` of a run noted it, and of a comparison did not."""
    config = make_recipe(*world, train={"num_steps": 2, "warmup_steps": 2}, arms=["zero-shot", "manyicl", "dedicated"])
    late = "train.warmup_steps = 2: the learning rate is still rising when the run ends, at step 2"
    grid = Grid(tmp_path, config)
    assert forecast_comparison(grid).notes == (f"zero-shot FT: {late}", f"ManyICL: {late}")
    # A dedicated model's warm-up is a tenth of its own steps.
    alone = grid.matcher.match("dedicated", seed=0, task=grid.roles.dedicated[0])[0].train
    assert alone.warmup_steps <= alone.num_steps // 10


def test_the_command_plans_a_comparison_and_tells_what_is_in_its_way(world):
    """Issue 16, fault 4: it ended with "compare: unknown key"."""
    small(world)
    recipe = world[0] / "recipe.toml"
    ended = run_command("plan", recipe, "--json", "--device", "h100")
    assert ended.returncode == 0, ended.stderr
    content = json.loads(ended.stdout)
    assert [arm["arm"] for arm in content["arms"]] == LESS["arms"]
    assert content["total"]["hours"] > 0
    ended = run_command("plan", recipe, "compare.max_tokens=10000000")
    assert ended.returncode == 1
    assert "in the way: " in ended.stdout
    graph = ("train.cuda_graph=true", "train.recompute=none", "model.precision=fp32")
    ended = run_command("plan", recipe, *graph, "--device", "h100")
    assert ended.returncode == 1
    told = " ".join(ended.stdout.split())
    assert "in the way: train.cuda_graph = true: products are in float32, whose attention goes segment by" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "fix"), [("auto", "model.quantize = 'nf4' with [model.lora]"), ("none", "train.recompute = 'auto'")]
)
def test_an_arm_that_does_not_fit_is_not_told_to_recompute_less(world, tmp_path, recompute, fix):
    """A plan with 'auto' once proposed 'full', which saves less memory than what 'auto' tries by itself."""
    config = small(world, arms=["base", "manyicl"])
    config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})
    planned = forecast_comparison(Grid(tmp_path, config), device=Device("tiny", 2**20, peak_flops_per_s=1e12))
    assert planned.blockers
    for blocker in planned.blockers:
        assert blocker.endswith(f"the tiny has 0.0; choose a larger device, lower episodes.token_budget, or set {fix}")


def test_what_the_first_seed_is_asked_is_drawn_once(world, tmp_path, monkeypatch):
    """`plan` drew the queries and shots of each task to see whether it can be asked, and again to count them."""
    drawn: list[tuple[str, int]] = []

    class CountedSweep(TaskSweep):
        def __init__(self, tokenized: Any, **options: Any) -> None:
            drawn.append((tokenized.task.name, options["sweep"].num_queries))
            super().__init__(tokenized, **options)

    for module in ("grid", "forecast"):
        monkeypatch.setattr(f"manyicl.comparison.{module}.TaskSweep", CountedSweep)
    config = small(world, arms=["base", "manyicl"], flips=False, text_files=[])
    grid = Grid(tmp_path, config)
    assert forecast_comparison(grid).blockers == ()
    asked = [(name, config.compare.queries) for name in grid.roles.asked]
    judged = [(name, config.compare.validation_queries) for name in grid.roles.asked_trained]
    assert sorted(drawn) == sorted(asked + judged)
