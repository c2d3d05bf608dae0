"""Trials of learning rates: what they are judged by, and that processes beside one another share them (B1)."""

from __future__ import annotations

import json
import os
import shutil
import time
import weakref
from dataclasses import replace
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from rich.console import Console

from manyicl.comparison import worker
from manyicl.comparison.answers import Judged, Trials, judge_trial
from manyicl.comparison.comparison_file import check_comparison
from manyicl.comparison.forecast import forecast_comparison
from manyicl.comparison.grid import Grid, WorkItem, open_comparison
from manyicl.comparison.settings import CompareConfig
from manyicl.comparison.summary import summarize
from manyicl.comparison.worker import Worker, _do_unclaimed, _needs_of, run_comparison
from manyicl.errors import UserError
from manyicl.evaluation.points import ShotCurve, ShotPoint
from manyicl.evaluation.results import Evaluation
from manyicl.files import write_atomically
from manyicl.inference import InferenceModel, load_for_inference
from manyicl.inference.budget import usable_memory
from manyicl.locks import claiming
from manyicl.report.markdown import render_markdown
from manyicl.report.terminal import comparison_table
from manyicl.report.verdict import tell_rates
from manyicl.training.memory.choice import GpuShare
from manyicl.training.metrics import MetricsLog
from manyicl.training.recipe import load_recipe
from manyicl.training.run_folder import RunFolder
from tests.support.claims import other_process
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.forked import run_forked
from tests.support.rendering import render_terminal
from tests.trajectory.setting import python_process

RATES = [1e-4, 1e-3]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder)


def make_small(world, **compare: Any) -> CompareConfig:
    """Return the recipe of a comparison of the smallest kind that has trials."""
    return make_recipe(
        *world,
        train={"num_steps": 1},
        **{
            "arms": ["manyicl"], "learning_rates": RATES, "shots": [0, 1], "queries": 2, "asked_tasks": 1,
            "draws": 1, "familiar_tasks": [], "held_out_tasks": world[1][1][:1], "flips": False, "orders": False,
            "text_files": [], **compare,
        },
    )  # fmt: skip


def with_budget(config: CompareConfig, token_budget: int) -> CompareConfig:
    episodes = config.episodes.model_copy(update={"token_budget": token_budget})
    return config.model_copy(update={"episodes": episodes})


def begin(world, folder: Path, **compare: Any) -> Grid:
    return open_comparison(folder, make_small(world, **compare))


def run(grid, **options: Any) -> str:
    console = Console(file=StringIO(), width=200)
    run_comparison(grid, console=console, **options)
    return console.file.getvalue()


@pytest.mark.slow
def test_a_later_seed_that_is_done_first_does_the_trials_of_the_first_one(world, tmp_path):
    """B1: they were left out, and reading them ended in a traceback."""
    grid = begin(world, tmp_path / "out")
    run(grid, seeds=[1])
    done = [item for item in grid.work() if grid.is_done(item)]
    assert {(item.seed, item.rate) for item in done} == {(0, 1e-4), (0, 1e-3), (1, None)}


@pytest.mark.slow
def test_the_shots_that_an_arm_was_trained_with_are_no_more_than_fitted(world, tmp_path):
    """The report said 16, and an episode of 80 tokens holds fewer than 10; later only `trained_shots` said so."""
    config = make_small(world, arms=["metaicl"], learning_rates=[], seeds=[0], shots=[0])
    grid = open_comparison(tmp_path / "out", with_budget(config, 80))
    printed = run(grid)
    comparison = summarize(grid)
    (arm,) = comparison.arms
    assert arm.trained_shots is not None
    assert 0 < arm.trained_shots < 10
    told = f"MetaICL's own setting: at most {arm.trained_shots} of its 16 shots in training, on 4 of 4 tasks ("
    assert told in printed
    assert arm.fewer_shots.startswith(told)
    assert arm.fewer_shots.endswith(", and 1 more), because its episodes of 80 tokens hold no more")
    assert told in render_markdown(comparison)
    assert told in render_terminal(comparison_table(comparison), width=200)
    assert told not in run(grid)  # nothing is left to train


@pytest.mark.slow
def test_the_shots_in_training_are_the_same_before_and_after_it(world, tmp_path):
    """`plan` counted the first seed alone: 14 shots on 11 tasks, where the report of the same recipe said 15 on 10."""
    config = make_small(world, arms=["metaicl"], learning_rates=[], seeds=[0, 1], shots=[0])
    grid = open_comparison(tmp_path / "out", with_budget(config, 80))
    group, keyword, price, topic = sorted(grid.roles.trained)
    trained = [grid.matcher.match("metaicl", seed=seed)[1].most_shots for seed in (0, 1)]
    assert trained == [{group: 5, keyword: 5, price: 6, topic: 5}, {group: 5, keyword: 6, price: 6, topic: 6}]
    most, why = "MetaICL's own setting: at most 6 of its 16 shots", "because its episodes of 80 tokens hold no more"
    first = (
        f"{most} in training with 1 of 2 seeds, on 4 of 4 tasks ({group} 5, {keyword} 5, {topic} 5, and 1 more), {why}"
    )
    both = f"{most} in training, on 4 of 4 tasks ({group} 5, {keyword} 6, {price} 6, and 1 more), {why}"
    assert forecast_comparison(Grid(tmp_path, grid.config)).notes[0] == both
    # One of several processes counts no other seeds while the GPU waits, and says so.
    assert f"{first}\n" in run(grid, shared_by=2, seeds=[0])
    assert summarize(grid).arms[0].fewer_shots == first
    assert f"{both}\n" in run(grid)
    assert summarize(grid).arms[0].fewer_shots == both


@pytest.mark.slow
def test_two_processes_share_the_trials(world, tmp_path):
    """B1: each is trained once, by whichever process comes first, and both end well."""
    grid = begin(world, tmp_path / "out")
    environment = {**python_process([])["env"], "COLUMNS": "200"}
    call = ["-m", "manyicl", "compare", "--resume", str(grid.folder), "--seed"]
    ended = run_forked(*(([*call, seed], environment) for seed in "01"))
    assert ended.returncode == 0, ended.stderr
    assert all(map(grid.is_done, grid.work()))
    printed = ended.stderr
    for rate in ("1e-4", "1e-3"):
        lines = [line for line in printed.splitlines() if f"learning rate {rate}: train" in line]
        numbers = {line.split("]")[0] for line in lines}
        assert len(numbers) == 1, printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_what_another_process_does_is_waited_for(world, tmp_path):
    grid = begin(world, tmp_path / "out", seeds=[0])
    trial = WorkItem("manyicl", 0, "train", rate=RATES[0])
    with other_process(grid.claim_file(trial), seconds=5) as process:
        assert process.stdout.readline().strip() == "None"
        printed = run(grid)
    waited = f"waiting for process {process.pid} on "
    assert printed.count(waited) == 1
    assert "seed 0, ManyICL, learning rate 1e-4" in printed
    assert all(map(grid.is_done, grid.work()))


@pytest.mark.slow
def test_what_needs_no_trial_is_done_while_another_process_holds_one(world, tmp_path):
    """The base and other arms waited for every trial."""
    grid = begin(world, tmp_path / "out", arms=["base", "few-shot", "manyicl"], seeds=[0])
    trial = WorkItem("manyicl", 0, "train", rate=RATES[0])
    with other_process(grid.claim_file(trial)) as process:
        assert process.stdout.readline().strip() == "None"
        thread = Thread(target=run, args=[grid], daemon=True)
        thread.start()
        while not grid.is_done(WorkItem("few-shot", 0, "test")):
            time.sleep(0.1)
            assert thread.is_alive()
        assert grid.is_done(WorkItem("base", 0, "test"))
        assert not grid.is_done(trial)
    thread.join()
    assert all(map(grid.is_done, grid.work()))


@pytest.mark.slow
def test_processes_share_the_evaluations_of_one_model(world, tmp_path):
    """One process did all of them, so a comparison of one model gained nothing from a second process."""
    grid = begin(world, tmp_path / "out", seeds=[0], learning_rates=[], validation_queries=2)
    validation, test = (WorkItem("manyicl", 0, kind) for kind in ("validation", "test"))
    with other_process(grid.claim_file(validation)) as process:
        assert process.stdout.readline().strip() == "None"
        thread = Thread(target=run, args=[grid], daemon=True)
        thread.start()
        while not grid.is_done(test):
            time.sleep(0.1)
            assert thread.is_alive()
        assert not grid.is_done(validation)
    thread.join()
    assert grid.is_done(validation)


def test_a_process_that_works_on_a_model_is_told_once_whatever_it_does_with_it(world, tmp_path):
    grid = begin(world, tmp_path / "out", arms=["base"], seeds=[0], learning_rates=[], validation_queries=2)
    items = list(grid.work())
    assert [item.kind for item in items] == ["validation", "test"]
    with claiming(grid.claim_file(items[0])), claiming(grid.claim_file(items[1])):
        waits = _do_unclaimed(Worker(grid, Console()), items, titles={})
    [(process, line)] = waits.items()
    assert process.startswith(f"process {os.getpid()} on ")
    assert process.endswith(": seed 0, base")
    assert line.startswith("waiting for process ")


def test_processes_at_work_are_counted_by_what_they_do(world, tmp_path):
    grid = begin(world, tmp_path / "out", arms=["base"], seeds=[0], learning_rates=[], validation_queries=2)
    assert grid.count_claims() == 1  # this process, before its first item
    first, second = grid.work()
    with claiming(grid.claim_file(first)):
        assert grid.count_claims() == 1
        with other_process(grid.claim_file(second)) as process:
            assert process.stdout.readline() == "None\n"  # it has the claim
            assert grid.count_claims() == 2


def test_a_process_with_a_part_of_the_gpu_counts_on_all_of_it(world, tmp_path):
    """Alone on its GPU, as with one process for each, it waits for nobody's kernels."""
    grid, console = begin(world, tmp_path / "out", arms=["base"], seeds=[0], learning_rates=[]), Console()
    with other_process(grid.claim_file(grid.work()[0])) as other:
        assert other.stdout.readline() == "None\n"  # it has the claim
        shares = {shared_by: Worker(grid, console, shared_by=shared_by).gpu_share() for shared_by in (None, 1, 2)}
    assert shares == {None: GpuShare(1.0), 1: GpuShare(), 2: GpuShare(is_part=True)}


def test_asking_counts_on_a_share_of_the_gpu_while_others_are_at_work(world, tmp_path, monkeypatch):
    """Only training did: a dozen processes asked with batches of half of the free memory each."""
    grid = begin(world, tmp_path / "out", arms=["base"], seeds=[0], learning_rates=[], validation_queries=2)
    first, second = grid.work()
    usable = []

    def ask(*_: Any, out: Path, **__: Any) -> None:
        usable.append(usable_memory(torch.device("cuda")))
        write_atomically(out, "asked")

    monkeypatch.setattr(worker, "evaluate_sweep", ask)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    process = Worker(grid, Console(file=StringIO()))
    with other_process(grid.claim_file(first)) as other:
        assert other.stdout.readline() == "None\n"  # it has the claim
        _do_unclaimed(process, [second], titles={second: ""})
    _do_unclaimed(process, [first], titles={first: ""})
    assert usable == [500, 1000]


@pytest.mark.slow
def test_a_process_that_waits_leaves_the_memory_of_its_model_to_those_at_work(world, tmp_path, monkeypatch):
    grid = begin(world, tmp_path / "out", arms=["base"], seeds=[0], learning_rates=[], validation_queries=2)
    validation, test = grid.work()
    loaded, alive = [], []

    def load(*arguments: Any, **options: Any) -> InferenceModel:
        model = load_for_inference(*arguments, **options)
        loaded.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(worker, "load_for_inference", load)
    with other_process(grid.claim_file(validation)) as other:
        assert other.stdout.readline() == "None\n"

        def wait(seconds: float) -> None:
            alive.append([model() is not None for model in loaded])
            other.kill()
            other.wait()

        monkeypatch.setattr(worker.time, "sleep", wait)
        run(grid)
    assert alive == [[False]]
    assert all(map(grid.is_done, (validation, test)))


def test_a_model_of_one_task_waits_for_its_own_trials_alone(world, tmp_path):
    """dedicated-tuned has a rate per task; the other arms choose one over all tasks."""
    tasks = world[1][0][:2]
    grid = begin(world, tmp_path / "out", arms=["dedicated", "dedicated-tuned"], dedicated_tasks=tasks, seeds=[0])
    needs = {
        arm: {need.task for need in _needs_of(grid, WorkItem(arm, 0, "train", tasks[0]))}
        for arm in ("dedicated", "dedicated-tuned")
    }
    assert needs == {"dedicated": set(tasks), "dedicated-tuned": {tasks[0]}}


@pytest.mark.slow
def test_the_first_seed_takes_the_run_of_its_trial_and_its_answers(world, tmp_path, monkeypatch):
    """The same recipe is not trained twice, and its model not asked the same validation rows twice."""
    grid = begin(world, tmp_path / "out", seeds=[0])
    run(grid)
    rate = Trials(grid).chosen_rate("manyicl")
    trial, kept = (grid.path_of(WorkItem("manyicl", 0, "train", rate=r)) for r in (rate, None))
    assert (kept / "run.json").read_bytes() == (trial / "run.json").read_bytes()
    weights = [next((run / "model").glob("*.safetensors")) for run in (trial, kept)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads(kept.with_name("manyicl.plan.json").read_bytes())["learning_rate"] == rate
    asked = [grid.path_of(WorkItem("manyicl", 0, "validation", rate=r)) for r in (rate, None)]
    of_trial, own = (Evaluation.load(path) for path in asked)
    assert own == replace(of_trial, model=str(kept))
    # It is asked by itself if its run is another: a trial that was trained again, say.
    (trial / "run.json").write_text((trial / "run.json").read_text() + "\n")
    asked[1].unlink()
    with monkeypatch.context() as patched:
        patched.setattr(worker, "evaluate_sweep", lambda *_, out, **__: out.write_text("asked"))
        run(grid)
    assert asked[1].read_text() == "asked"


def curve(**scores: float | None) -> ShotCurve:
    """Return a task's curve: k1=0.5 is a score of 0.5 at 1 shot; its nats are 1 minus the score."""
    points = [
        ShotPoint(int(k[1:]), score, None, None, None if score is None else 1 - score, 1, 0, None)
        for k, score in scores.items()
    ]
    return ShotCurve("task", "qa", "exact_match", num_queries=1, num_draws=1, points=tuple(points))


@pytest.mark.slow
def test_a_finished_run_whose_model_has_gone_says_how_it_is_made_again(world, tmp_path):
    """It "has not finished", and what it named to go on with was no comparison."""
    grid = begin(world, tmp_path / "out", seeds=[0])
    run(grid)
    rate = Trials(grid).chosen_rate("manyicl")
    trial, kept = (grid.path_of(WorkItem("manyicl", 0, "train", rate=r)) for r in (rate, None))
    before = summarize(grid)
    for folder in (trial, kept):
        shutil.rmtree(folder / "model")
    run(grid)  # nothing needs it
    assert summarize(grid) == before
    test = grid.path_of(WorkItem("manyicl", 0, "test"))
    answers = json.loads(test.read_bytes())["tasks"]
    test.unlink()
    with pytest.raises(UserError) as raised:
        run(grid)
    told = "this run has finished, but its folder 'model' has gone; put it back, or delete"
    assert str(raised.value) == f"{kept}: {told} {kept}, and `resume` of its comparison trains it again"
    shutil.rmtree(kept)
    run(grid)
    assert (kept / "model").is_dir()
    assert json.loads(test.read_bytes())["tasks"] == answers


def test_a_trial_is_judged_by_its_best_mean_over_tasks():
    assert judge_trial([curve(k0=0.2, k1=0.9), curve(k0=0.4, k1=0.5)]) == Judged(1, 0.7, pytest.approx(0.3))


def test_a_task_that_was_not_asked_with_so_many_shots_counts_with_its_most(world, tmp_path):
    """B1: without a shot count that all tasks share, the choice ended in a ValueError."""
    judged = judge_trial([curve(k16=0.8), curve(k1=0.4, k4=0.6)])
    assert judged == Judged(4, pytest.approx(0.7), pytest.approx(0.3))
    judged = judge_trial([curve(k0=0.1, k1=0.2, k16=0.8), curve(k0=0.1, k1=0.6)])
    assert judged == Judged(16, pytest.approx(0.7), pytest.approx(0.3))


@pytest.mark.slow
def test_a_trial_that_was_not_asked_anything_is_not_judged(world, tmp_path):
    assert judge_trial([]) is None
    assert judge_trial([curve(k0=None)]) is None
    # No task has so many rows; a comparison that an earlier version began was not refused at once.
    grid = Grid(tmp_path / "out", make_small(world, shots=[500], seeds=[0]))
    with pytest.raises(UserError, match=r"^compare\.learning_rates: no validation row could be asked of ManyICL, so"):
        run(grid)
    assert [trial.chosen for trial in summarize(grid).trials] == [False, False]


def test_rates_that_no_validation_row_can_choose_are_refused_before_any_is_trained(tmp_path):
    """All trials were trained first."""
    rows = [{"input": f"{n}", "answer": "yes", "split": "test" if n == 2 else "train"} for n in range(3)]
    (tmp_path / "tasks").mkdir()
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(
        UserError, match=r"^compare\.learning_rates: no task that ManyICL is evaluated on has validation"
    ):
        begin((tmp_path, (["one"], ["two"], [])), tmp_path / "out", dedicated_tasks=[])
    assert not (tmp_path / "out" / "recipe.toml").exists()
    config = load_recipe(tmp_path / "recipe.toml", kind=CompareConfig)
    (blocker,) = forecast_comparison(Grid(tmp_path / "out", config)).blockers
    assert blocker.startswith("compare.learning_rates: no task that ManyICL is evaluated on has validation rows")


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A finished comparison of the tuned ceiling alone. Not to be changed."""
    tasks = world[1][0][:2]
    grid = begin(
        world, tmp_path_factory.mktemp("tuned") / "out", arms=["dedicated-tuned"], dedicated_tasks=tasks, seeds=[0, 1]
    )
    run(grid)
    return grid


@pytest.mark.slow
def test_a_tuned_dedicated_model_has_the_rate_and_the_steps_that_its_own_task_chose(tuned):
    """B7: per task, by its validation rows alone; the later seeds take the rates of the first."""
    trials = Trials(tuned)
    for task in tuned.roles.dedicated:
        judged = {rate: judge_trial(trials.read("dedicated-tuned", rate, task)) for rate in RATES}
        best = max(RATES, key=lambda rate: (judged[rate].score, -judged[rate].nll))
        assert trials.chosen_rate("dedicated-tuned", task) == best
        for seed in (0, 1):
            folder = tuned.path_of(WorkItem("dedicated-tuned", seed, "train", task))
            assert RunFolder(folder).read_config().train.learning_rate == best
            records = MetricsLog(folder / "metrics.jsonl").read()
            losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
            assert len(losses) > 4
            assert json.loads((folder / "run.json").read_bytes())["model_step"] == min(losses, key=losses.get)


@pytest.mark.slow
def test_what_was_tuned_is_told(tuned):
    found = summarize(tuned)
    assert [(t.task, t.learning_rate) for t in found.trials] == [
        (task, rate) for task in tuned.roles.dedicated for rate in RATES
    ]
    chosen = {t.task: t.learning_rate for t in found.trials if t.chosen}
    assert [(t.task, t.seed) for t in found.tuned] == [(task, seed) for seed in (0, 1) for task in chosen]
    for one in found.tuned:
        assert one.learning_rate == chosen[one.task]
        assert 0 < one.step <= one.steps
    told = tell_rates(found)
    assert "dedicated FT, tuned (ceiling, not matched): the rate of 2 of 2 tasks is the lowest or highest tried" in told
    page = render_markdown(found)
    assert "## Tuned for each task" in page


def test_without_named_rates_only_the_ceiling_has_trials_half_a_decade_apart(world, tmp_path):
    arms = ["manyicl", "dedicated-tuned"]
    grid = begin(world, tmp_path / "out", arms=arms, learning_rates=[], dedicated_tasks=world[1][0][:1])
    assert grid.config.train.learning_rate == 1e-3
    rates = {arm: [i.rate for i in grid.work() if i.arm == arm and i.rate and i.kind == "train"] for arm in arms}
    assert rates == {"manyicl": [], "dedicated-tuned": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}
    assert Trials(grid).chosen_rate("manyicl") == 1e-3


def rates_told(*trials: tuple[str, float, bool], **given: float) -> str:
    """Return the sentences about trials (arm, rate, is chosen), and about arms with a rate that is given."""
    arms = [{"arm": arm, "title": arm} for arm in dict.fromkeys(arm for arm, _, _ in trials)]
    arms += [{"arm": arm, "title": arm, "learning_rate": rate} for arm, rate in given.items()]
    listed = [{"arm": arm, "learning_rate": rate, "chosen": chosen} for arm, rate, chosen in trials]
    about = {"schema": 1, "name": "n", "finished": True, "config": "", "seeds": [0], "shots": [0], "match": "tokens"}
    return tell_rates(check_comparison(about | {"arms": arms, "tasks": [], "trials": listed}))


def test_a_rate_at_an_end_of_those_tried_is_told():
    """A4: a chosen rate that is not bracketed is no best rate."""
    inner = rates_told(("a", 1e-4, False), ("a", 1e-3, True), ("a", 1e-2, False))
    assert inner == "Chosen on validation rows: a 1e-3."
    ends = rates_told(("a", 1e-4, True), ("a", 1e-3, False), ("b", 1e-4, False), ("b", 1e-3, True))
    assert ends == (
        "Chosen on validation rows: a 1e-4, b 1e-3. The rate of a is the lowest that was tried, so a lower one may"
        " do better. The rate of b is the highest that was tried, so a higher one may do better."
    )
    both = rates_told(("a", 1e-4, False), ("a", 1e-3, True), ("b", 1e-4, False), ("b", 1e-3, True))
    assert both.endswith("The rates of a and b are the highest that were tried, so higher ones may do better.")
    assert rates_told(("a", 1e-3, True)) == "Chosen on validation rows: a 1e-3."
    assert rates_told(("a", 1e-3, False), ("a", 1e-2, False)) == ""


def test_a_rate_that_the_recipe_gives_is_told_beside_others():
    told = rates_told(("a", 1e-4, False), ("a", 1e-3, True), ("a", 1e-2, False), b=3e-4, c=1e-4)
    assert told == "Chosen on validation rows: a 1e-3. Given by the recipe: b 3e-4, c 1e-4."
    assert rates_told(b=3e-4, c=1e-4) == "Given by the recipe: b 3e-4, c 1e-4."
    assert rates_told(b=1e-4, c=1e-4) == ""  # the recipe's one rate is in the recipe
