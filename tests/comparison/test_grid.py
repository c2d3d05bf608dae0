"""A tiny comparison from end to end: all arms, two seeds, killed and gone on with, and what it says it spent."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from manyicl.comparison.comparison_file import read_comparison
from manyicl.comparison.grid import open_comparison
from manyicl.comparison.summary import summarize
from manyicl.errors import UserError
from manyicl.models.costs import count_flops, shape_model
from manyicl.models.loading import load_config
from manyicl.report.document import print_outcome, write_outcome
from manyicl.training.preparation import prepare_run
from manyicl.training.run_folder import RunFolder
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.forked import forked
from tests.trajectory.setting import python_process, run_command

SHARED_ARMS = ("zero-shot", "few-shot", "manyicl")
ARMS = ("base", *SHARED_ARMS, "dedicated")
COMPARE = ["-m", "manyicl", "compare"]
# What two runs of one recipe may differ in.
OWN = ("wall_s", "peak_bytes", "device", "git_commit")


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command("compare", *arguments)


def refusal(*arguments: object) -> str:
    """Return the one line of a call that is refused."""
    ended = compare(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    return ended.stderr.removeprefix("error: ").strip()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder)


@pytest.fixture(scope="module")
def recipe(world) -> Path:
    held_out = world[1][1][:1]
    make_recipe(*world, train={"num_steps": 2}, held_out_tasks=held_out, queries=2, text_windows=2)
    kept = world[0] / "kept.toml"
    shutil.copy(world[0] / "recipe.toml", kept)
    return kept


@pytest.fixture(scope="module")
def base_recipe(world) -> Path:
    """A comparison of the base alone, which trains nothing."""
    make_recipe(*world, arms=["base"], asked_tasks=1, draws=1, queries=1, flips=False, orders=False, text_files=[])
    kept = world[0] / "base.toml"
    shutil.copy(world[0] / "recipe.toml", kept)
    return kept


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """The folder of a finished comparison. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "tiny"
    ended = compare(recipe, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "ManyICL" in ended.stdout
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def without_own(content: Any) -> Any:
    """Return comparison.json without what differs from run to run."""
    if isinstance(content, dict):
        return {key: without_own(value) for key, value in content.items() if key not in OWN}
    return [without_own(value) for value in content] if isinstance(content, list) else content


@pytest.mark.slow
def test_it_ends_with_a_whole_report(finished):
    found = read_comparison(finished)
    assert found.finished
    assert [arm.arm for arm in found.arms] == list(ARMS)
    assert all(work.done == work.total > 0 for work in found.grid)
    assert {cost.arm for cost in found.costs} == set(ARMS)
    content = read_json(finished / "comparison.json")
    for name in (
        "curves",
        "means",
        "headline",
        "differences",
        "flatness",
        "shot_losses",
        "flips",
        "orders",
        "examples",
    ):
        assert content[name], name
    assert content["forgetting"]["text"]
    assert content["forgetting"]["drift"]
    assert not any(row["best"] for row in content["headline"])  # two seeds
    assert all(len(row["seeds"]) == 2 for row in content["headline"])
    for name in ("report.html", "report.md"):
        assert "ManyICL" in (finished / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(finished, recipe, tmp_path):
    ended = compare(recipe, "--out", tmp_path / "tiny", "--processes", 2)
    assert ended.returncode == 0, ended.stderr
    done = [line for line in ended.stderr.splitlines() if ": done in " in line]
    assert len(done) == len(set(done)) == sum(work.total for work in read_comparison(finished).grid)
    two, one = (read_json(folder / "comparison.json") for folder in (tmp_path / "tiny", finished))
    assert without_own(two) == without_own(one)
    by_helper = (tmp_path / "tiny" / "logs" / "process-2.log").read_text("utf-8").count(": done in ")
    assert 0 < by_helper < len(done)


@pytest.mark.slow
def test_a_helper_without_the_process_that_it_helps_does_nothing(copied):
    (copied / "comparison.json").unlink()
    script = [*COMPARE, "--resume", str(copied), "--shared-by", "2"]
    for helped, code in ((str(2**22 + 1), 1), (str(os.getpid()), 0)):
        environment = {**os.environ, "MANYICL_HELPED_PROCESS": helped}
        ended = subprocess.run([sys.executable, *script], env=environment, capture_output=True, check=False)
        assert ended.returncode == code
    assert not (copied / "comparison.json").exists()  # the report is for the process that it helps


@pytest.mark.slow
def test_the_costs_it_states_are_those_counted_from_the_runs(finished):
    """Tokens and answers from what each training step logged; FLOPs from the segments and targets of its rows."""
    costs = {(cost["arm"], cost["seed"]): cost for cost in read_json(finished / "comparison.json")["costs"]}
    assert len(costs) == len(ARMS) * 2
    shape = shape_model(load_config(open_comparison(finished, None).config.model))
    for (arm, seed), stated in costs.items():
        if arm == "base":
            assert (stated["tokens"], stated["answers"], stated["flops"], stated["steps"]) == (0, 0, 0, 0)
            continue
        folder = finished / f"seed-{seed}" / arm
        runs = [folder] if arm in SHARED_ARMS else sorted(path for path in folder.iterdir() if path.is_dir())
        assert len(runs) == (1 if arm in SHARED_ARMS else 2)
        counted = dict.fromkeys(("tokens", "answers", "steps", "packs", "episodes", "targets", "flops"), 0)
        for run in runs:
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            logged = [record for record in records if "loss" in record]
            counted["steps"] += len(logged)
            counted["tokens"] += sum(record["tokens"] for record in logged)
            counted["answers"] += sum(record["answers"] for record in logged)
            packs = prepare_run(RunFolder(run).read_config()).packs
            for number in range(len(packs)):
                row = packs.collate([packs[number]])
                counted["packs"] += 1
                counted["episodes"] += len(row.segment_lengths)
                counted["targets"] += len(row.target_positions_N)
                counted["flops"] += count_flops(shape, row.segment_lengths, num_targets=len(row.target_positions_N))
            plan = read_json(run / "run.json")["plan"]
            assert plan["tokens"] == sum(record["tokens"] for record in logged)
        assert {name: stated[name] for name in counted} == counted, (arm, seed)


@pytest.mark.slow
def test_drift_stands_at_the_tokens_that_were_processed_by_then(finished):
    content = read_json(finished / "comparison.json")
    for arm in SHARED_ARMS:
        lines = (finished / "seed-0" / arm / "metrics.jsonl").read_text().splitlines()
        by_step = {r["step"]: r["tokens"] for r in map(json.loads, lines) if "tokens" in r}
        points = [p for p in content["forgetting"]["drift"] if (p["arm"], p["seed"]) == (arm, 0)]
        assert [(p["step"], p["tokens"]) for p in points] == [
            (0, 0),
            *((step, sum(by_step[done] for done in range(1, step + 1))) for step in (1, 2)),
        ]


def finished_work(out: Path) -> dict[Path, int]:
    """Return when each file of finished work was written, and each weights file of a finished run."""
    if not (out / "recipe.toml").is_file():
        return {}
    grid = open_comparison(out, None)
    files: list[Path] = []
    for item in [item for item in grid.work() if grid.is_done(item)]:
        path = grid.path_of(item)
        files += [path] if item.kind != "train" else [path / "run.json", *(path / "model").glob("*.safetensors")]
    return {file: file.stat().st_mtime_ns for file in files}


def num_done(out: Path) -> int:
    grid = open_comparison(out, None)
    return sum(map(grid.is_done, grid.work()))


def kill_when(out: Path, arguments: list[str], *, num_items: int, pause_s: float) -> None:
    """Start a comparison, and kill it a moment after so many items are done."""
    with forked([*COMPARE, *arguments], python_process([])["env"]) as process:
        while not (out / "recipe.toml").is_file():
            assert process.is_alive()
            time.sleep(0.05)
        grid = open_comparison(out, None)
        while sum(map(grid.is_done, grid.work())) < num_items:
            assert process.is_alive(), "it ended before it could be killed"
            time.sleep(0.05)
        time.sleep(pause_s)
        assert process.is_alive()


@pytest.mark.slow
def test_killed_twice_and_gone_on_with_it_finds_what_an_uninterrupted_one_does(recipe, finished, tmp_path):
    out, rng = tmp_path / "tiny", random.Random(os.getpid())
    total = num_done(finished)
    kill_when(out, [str(recipe), "--out", str(out)], num_items=rng.randint(1, total // 3), pause_s=rng.random())
    after_first = finished_work(out)
    # The first may have come far before it was killed: the second is killed after at least one item of its own.
    least = max(total // 3, num_done(out)) + 1
    second = rng.randint(least, max(least, 2 * total // 3))
    kill_when(out, ["--resume", str(out)], num_items=second, pause_s=rng.random())
    after_second = finished_work(out)
    ended = compare("--resume", out)
    assert ended.returncode == 0, ended.stderr
    last = finished_work(out)
    assert 0 < len(after_first) < len(after_second) < len(last) == len(finished_work(finished))
    assert {file: last[file] for file in after_first} == after_first  # no finished work is done again
    assert {file: last[file] for file in after_second} == after_second
    one, other = (without_own(read_json(folder / "comparison.json")) for folder in (finished, out))
    assert one.keys() == other.keys()
    for key in one:
        assert other[key] == one[key], key


@pytest.mark.slow
def test_a_finished_one_that_is_gone_on_with_does_nothing_but_the_report(copied):
    before = finished_work(copied)
    (copied / "report.html").unlink()
    ended = compare("--resume", copied)
    assert ended.returncode == 0
    assert finished_work(copied) == before
    assert (copied / "report.html").is_file()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "damage", "result"),
    [
        ("few-shot.test.json", cut_short, "few-shot.test.json"),
        ("few-shot.test.predictions.parquet", Path.unlink, "few-shot.test.json"),
        ("few-shot.test.predictions.parquet", cut_short, "few-shot.test.json"),
        ("manyicl.flip.json", cut_short, "manyicl.flip.json"),
        ("manyicl.text.json", cut_short, "manyicl.text.json"),
    ],
)
def test_a_damaged_result_is_named_with_how_to_have_it_made_again(copied, damaged, damage, result):
    folder = copied / "seed-0"
    damage(folder / damaged)
    with pytest.raises(UserError) as refused:
        write_outcome(open_comparison(copied, None))
    fault = str(refused.value)
    assert fault.startswith(f"{folder / damaged}: ")
    assert fault.endswith(f"; delete {folder / result}, and `resume` does this piece of work again")
    (folder / result).unlink()
    assert not write_outcome(open_comparison(copied, None)).finished


@pytest.mark.slow
def test_a_finished_comparison_is_reported_again_after_its_models_were_deleted(copied):
    """Without one model's folder `--resume` ended in an error, and asked for a training that had ended."""
    before = (copied / "comparison.json").read_text()
    for model in copied.glob("seed-*/**/model"):
        shutil.rmtree(model)
    (copied / "report.md").unlink()
    ended = compare("--resume", copied)
    assert ended.returncode == 0, ended.stderr
    assert (copied / "report.md").is_file()
    assert (copied / "comparison.json").read_text() == before
    assert list(copied.glob("seed-*/**/model")) == []


@pytest.mark.slow
def test_a_missing_result_is_absent_and_never_zero(copied):
    (copied / "seed-1" / "manyicl.test.json").unlink()
    (copied / "seed-0" / "few-shot.test.json").unlink()
    (copied / "seed-1" / "few-shot.test.json").unlink()
    task = open_comparison(copied, None).roles.dedicated[0]
    (copied / "seed-0" / "dedicated" / f"{task}.test.json").unlink()
    (copied / "seed-0" / "zero-shot.text.json").unlink()
    state = copied / "seed-1" / "zero-shot" / "run.json"
    state.write_text(json.dumps(read_json(state) | {"finished": False}))
    whole = read_json(copied / "comparison.json")
    text = StringIO()
    found = write_outcome(open_comparison(copied, None))
    print_outcome(found, copied, console=Console(file=text))
    assert found.finished is False
    assert "not finished; resume it: manyicl compare --resume" in text.getvalue().replace("\n", " ")
    content = read_json(copied / "comparison.json")
    assert content["finished"] is False
    read_comparison(copied)
    seeds = {(row["arm"], row["role"], row["asked"]): row["seeds"] for row in content["headline"]}
    unbroken = {(row["arm"], row["role"], row["asked"]): row["seeds"] for row in whole["headline"]}
    for (arm, role, asked), values in seeds.items():
        missing = {"manyicl": {1}}.get(arm, set())
        expected = [None if seed in missing else value for seed, value in enumerate(unbroken[arm, role, asked])]
        assert values == expected
    assert {arm for arm, _, _ in seeds} == {"base", "zero-shot", "manyicl"}
    assert not [row for row in content["curves"] if row["arm"] == "few-shot"]
    assert {tuple(s is None for s in row["seeds"]) for row in content["curves"] if row["arm"] == "dedicated"} == {
        (True, False)
    }
    assert [(c["arm"], c["seed"]) for c in whole["costs"] if c not in content["costs"]] == [("zero-shot", 1)]
    losses = {row["arm"]: row["seeds"] for row in content["forgetting"]["text"]}
    assert [value is None for value in losses["zero-shot"]] == [True, False]
    grid = {(work["arm"], work["seed"], work["what"]): (work["done"], work["total"]) for work in content["grid"]}
    assert grid["manyicl", 1, "test"] == (0, 1)
    assert grid["dedicated", 0, "test"] == (1, 2)
    assert grid["zero-shot", 1, "train"] == (0, 1)


@pytest.mark.slow
def test_nothing_done_is_reported_as_nothing(recipe, tmp_path):
    (tmp_path / "tiny").mkdir()
    shutil.copy(recipe, tmp_path / "tiny" / "recipe.toml")
    grid = open_comparison(tmp_path / "tiny", None)
    found = summarize(grid)
    assert found.finished is False
    for name in ("curves", "means", "headline", "differences", "flatness", "flips", "orders", "examples", "trials"):
        assert getattr(found, name) == (), name
    assert {work.done for work in found.grid} == {0}
    assert write_outcome(grid).finished is False


@pytest.mark.slow
def test_the_status_is_the_grid(copied, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (copied / "seed-1" / "manyicl.test.json").unlink()
    ended = compare("--status", copied)
    assert ended.returncode == 0
    for arm in ("base", "zero-shot FT", "few-shot FT", "ManyICL", "dedicated FT"):
        assert arm in ended.stdout
    assert not (copied / "seed-1" / "manyicl.test.json").exists()


@pytest.mark.slow
def test_one_seed_is_done_alone(base_recipe, tmp_path):
    out = tmp_path / "tiny"
    ended = compare(base_recipe, "--out", out, "--seed", 1)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in sorted(out.glob("seed-*"))] == ["seed-1"]
    content = read_json(out / "comparison.json")
    assert content["finished"] is False
    assert all(row["seeds"][0] is None and row["seeds"][1] is not None for row in content["headline"])
    assert refusal("--resume", out, "--seed", 2).startswith("--seed 2: is none of this comparison's [0, 1]")
    assert compare("--resume", out, "--seed", 0).returncode == 0
    assert read_json(out / "comparison.json")["finished"] is True


@pytest.mark.slow
def test_learning_rates_are_tried_for_every_arm_without_one_of_its_own_and_one_is_chosen(world, tmp_path):
    rates = [1e-6, 3e-3]
    make_recipe(
        *world,
        train={"num_steps": 2, "checkpoint_every_steps": 2},
        arms=["base", "zero-shot", "manyicl", "dedicated"],
        seeds=[0],
        learning_rates=rates,
        arm_rates={"zero-shot": [2e-4]},
        asked_tasks=2,
        shots=[0, 1],
        draws=1,
        queries=1,
        flips=False,
        orders=False,
        text_files=[],
    )
    out = tmp_path / "tiny"
    ended = compare(world[0] / "recipe.toml", "--out", out)
    assert ended.returncode == 0, ended.stderr
    read_comparison(out)
    content = read_json(out / "comparison.json")
    trials = content["trials"]
    tried = ("manyicl", "dedicated")
    assert [(trial["arm"], trial["learning_rate"]) for trial in trials] == [(a, r) for a in tried for r in rates]
    assert next(one["learning_rate"] for one in content["arms"] if one["arm"] == "zero-shot") == 2e-4
    assert RunFolder(out / "seed-0" / "zero-shot").read_config().train.learning_rate == 2e-4
    for arm in tried:
        mine = [trial for trial in trials if trial["arm"] == arm]
        best = max(mine, key=lambda trial: (trial["score"], -trial["nll"]))
        assert [trial for trial in mine if trial["chosen"]] == [best]
        used = next(one["learning_rate"] for one in content["arms"] if one["arm"] == arm)
        assert used == best["learning_rate"]
        run = next((out / "seed-0" / arm).glob("**/config.toml"))
        assert RunFolder(run.parent).read_config().train.learning_rate == used


@pytest.mark.slow
def test_a_folder_that_holds_something_else_is_refused(base_recipe, tmp_path):
    taken, other = tmp_path / "taken", tmp_path / "other"
    taken.mkdir()
    (taken / "thesis.tex").write_text("precious")
    assert refusal(base_recipe, "--out", taken) == f"--out {taken}: is not empty (thesis.tex); name a new folder"
    assert compare(base_recipe, "--out", other).returncode == 0
    assert refusal(base_recipe, "compare.draws=2", "--out", other).startswith(
        f"--out {other}: holds a comparison with another compare.draws; go on with that one by --resume {other}"
    )
    assert refusal("--resume", taken).startswith(f"{taken}: holds no comparison (recipe.toml); start one")
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_a_folder_is_made(world, base_recipe, tmp_path, monkeypatch):
    held_out = world[1][1][0]
    out = tmp_path / "new"
    told = refusal(base_recipe, f'compare.held_out_tasks=["{held_out}x"]', "--out", out)
    assert told.endswith(f"no task '{held_out}x'; did you mean '{held_out}'?")
    told = refusal(base_recipe, f'compare.text_files=["{tmp_path}/absent.txt"]', "--out", out)
    assert told.startswith(f"compare.text_files: {tmp_path}/absent.txt: cannot be read")
    if not torch.cuda.is_available():
        told = refusal(base_recipe, "train.cuda_graph=true", "--out", out)
        assert told == "train.cuda_graph = true: there is no GPU; set it to 'auto' or false"
    text = f'compare.text_files=["{world[0]}/neutral.txt"]'
    told = refusal(base_recipe, text, "compare.text_window_tokens=9999", "--out", out)
    assert told.startswith("compare.text_window_tokens = 9999: the model knows ")
    either = "compare: give either a recipe (*.toml), or --resume FOLDER of a comparison that was stopped"
    assert refusal() == refusal(base_recipe, "--resume", out) == either
    assert refusal("--resume", out, "--out", out) == f"--resume {out}: keeps its own folder; omit --out"
    assert refusal("--status", out, "--seed", 1).startswith(f"--status {out}: only shows a comparison; leave the other")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refusal(base_recipe, "--out", out)
    assert told.startswith("2 processes of a launch: a comparison starts its own; call it once, with --processes 2")
    assert not out.exists()


@pytest.mark.slow
def test_a_report_names_what_models_were_trained_on_not_who_summarised_them(copied):
    """Results of a GPU machine that were summarised on a laptop were those of "CPU, 1 threads"."""
    files = sorted(copied.rglob("run.json"))
    for place, file in enumerate(files):
        state = read_json(file)
        state["device"], state["git_commit"] = "NVIDIA H200", "076dd11"
        state["packages"]["torch"] = "2.11.0" if place else "2.12.0"
        file.write_text(json.dumps(state))
    found = summarize(open_comparison(copied, None))
    assert (found.device, found.git_commit) == ("NVIDIA H200", "076dd11")
    assert sorted((found.versions["torch"] or "").split(" and ")) == ["2.11.0", "2.12.0"]
    for file in files:  # as earlier versions wrote them
        file.write_text(json.dumps({key: value for key, value in read_json(file).items() if key != "device"}))
    assert summarize(open_comparison(copied, None)).device is None


@pytest.mark.slow
def test_what_whole_prompts_cost_in_all_evaluations_is_added_up(base_recipe, tmp_path):
    """Issue 16, fault 1: of a model that cannot share its shots, how much slower its evaluations were."""
    assert compare(base_recipe, "--out", tmp_path / "tiny").returncode == 0
    grid = open_comparison(tmp_path / "tiny", None)
    assert summarize(grid).plain_path is None
    for file in sorted(grid.folder.glob("seed-*/base.test.json")):
        content = json.loads(file.read_text())
        for task in content["tasks"]:
            task["plain_path"] = {"processed_tokens": 900, "shared_tokens": 30}
        file.write_text(json.dumps({**content, "sharing_fault": "keeps a state"}))
    found = summarize(grid).plain_path
    assert found.processed_tokens == 30 * found.shared_tokens > 0
    assert found.fault == "keeps a state"
