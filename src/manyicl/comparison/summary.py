"""comparison.json, put together from the work that is done (docs/comparison-format.md)."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from manyicl.comparison.analyses import (
    find_forgetting,
    list_confidence,
    list_examples,
    list_flips,
    list_orders,
    list_shot_losses,
)
from manyicl.comparison.answers import Findings, FinishedRun, Trials, finished_runs
from manyicl.comparison.arms import tell_fewer_shots
from manyicl.comparison.comparison_file import Comparison
from manyicl.comparison.grid import SWEEP_KINDS, Grid, WorkKind
from manyicl.comparison.inputs import read_whole, redoable
from manyicl.comparison.schema import ArmEntry, Cost, PlainPath, TaskEntry, Trial, Tuned, WorkDone
from manyicl.comparison.scores import list_curves, list_differences, list_flatness, list_headline, list_means
from manyicl.comparison.settings import Arm, ArmName
from manyicl.evaluation import PlainPath as PlainPathTokens
from manyicl.evaluation import sum_plain_paths
from manyicl.training import device_name, dump_config, git_commit, package_versions


def summarize(grid: Grid) -> Comparison:
    """Return what is known from the work that is done; a number whose work is missing is None or absent, never 0."""
    findings = Findings(grid)
    work = tuple(_count_work(grid))
    return Comparison(
        name=grid.settings.name,
        finished=all(entry.done == entry.total for entry in work),
        config=dump_config(grid.config),
        **_find_origin(grid),
        seeds=findings.seeds,
        shots=tuple(grid.shots),
        match=grid.settings.match,
        arms=tuple(_describe_arm(findings, arm) for arm in grid.arms),
        tasks=tuple(_describe_task(grid, name) for name in grid.tasks),
        grid=work,
        costs=tuple(_list_costs(grid)),
        trials=tuple(_list_trials(grid)),
        tuned=tuple(_list_tuned(grid)),
        chosen=tuple(findings.chosen.values()),
        curves=tuple(list_curves(findings)),
        means=tuple(list_means(findings)),
        headline=tuple(list_headline(findings)),
        differences=tuple(list_differences(findings)),
        flatness=tuple(list_flatness(findings)),
        forgetting=find_forgetting(findings),
        shot_losses=tuple(list_shot_losses(grid)),
        flips=tuple(list_flips(findings)),
        orders=tuple(list_orders(findings)),
        confidence=tuple(list_confidence(findings)),
        examples=tuple(list_examples(findings)),
        plain_path=_sum_plain_paths(grid),
    )


def _find_origin(grid: Grid) -> dict[str, Any]:
    """Return the versions, commit and device that models were trained with: not those of who summarises them later.

    Where models differ, all values are named. Without a trained model they are this process's.
    """
    states = [run.state for arm in grid.arms for run in finished_runs(grid, arm)]
    if not states:
        own = {"python": platform.python_version(), **package_versions()}
        return {"versions": own, "git_commit": git_commit(), "device": device_name()}
    versions = [{"python": state.python, **state.packages} for state in states]
    return {
        "versions": {name: _join(one.get(name) for one in versions) for name in dict.fromkeys(chain(*versions))},
        "git_commit": _join(state.git_commit for state in states),
        "device": _join(state.device for state in states),
    }


def _join(values: Iterable[str | None]) -> str | None:
    """Return the different values that are known, with "and" between them; None if there is none."""
    return " and ".join(dict.fromkeys(value for value in values if value)) or None


def _describe_arm(findings: Findings, arm: Arm) -> ArmEntry:
    runs = list(finished_runs(findings.grid, arm))
    rates = {run.plan["learning_rate"] for run in runs}
    return ArmEntry(
        arm=arm.name,
        title=arm.title,
        trained_shots=findings.trained_shots(arm),
        fewer_shots=_tell_fewer_shots(findings.grid, arm, runs),
        learning_rate=rates.pop() if len(rates) == 1 else None,
        matched=arm.matched,
        trained=arm.trained,
        num_models=len(findings.grid.models_of(arm)),
        about=arm.about,
    )


def _tell_fewer_shots(grid: Grid, arm: Arm, runs: Sequence[FinishedRun]) -> str:
    """Return on which tasks the finished runs of an arm had fewer shots than its own number, and why."""
    most = {run.seed: run.most_shots for run in runs if run.most_shots}
    if arm.name not in grid.settings.fixed_shots or not most:
        return ""
    num_train = {name: len(task.train) for name, task in grid.tasks.items()}
    budget = runs[0].folder.read_config().episodes.token_budget
    return tell_fewer_shots(arm.name, grid.config, most=most, num_train=num_train, token_budget=budget)


def _describe_task(grid: Grid, name: str) -> TaskEntry:
    task, roles = grid.tasks[name], grid.roles
    return TaskEntry(
        task=name,
        family=task.family,
        metric=task.metric,
        role=roles.role_of(name),
        asked=name in roles.asked,
        dedicated=name in roles.dedicated and any(arm.per_task for arm in grid.arms),
        num_train=len(task.train),
        num_validation=len(task.validation),
        num_test=len(task.test),
        num_labels=len(task.labels) or None,
        dropped=dict(task.dropped),
        overlap=(grid.inputs.overlaps or {}).get(name),
        sha256=grid.inputs.tasks[name],
    )


def _count_work(grid: Grid) -> Iterator[WorkDone]:
    total: Counter[tuple[ArmName, int, WorkKind]] = Counter()
    done: Counter[tuple[ArmName, int, WorkKind]] = Counter()
    for item in grid.work():
        if item.rate is None:
            total[item.arm, item.seed, item.kind] += 1
            done[item.arm, item.seed, item.kind] += grid.is_done(item)
    for (arm, seed, kind), count in total.items():
        yield WorkDone(arm=arm, seed=seed, what=kind, done=done[arm, seed, kind], total=count)


def _list_costs(grid: Grid) -> Iterator[Cost]:
    """Yield what each arm spent with each seed, all its models together, once they are all trained."""
    for arm in grid.arms:
        runs = list(finished_runs(grid, arm))
        for seed in grid.settings.seeds:
            mine = [run for run in runs if run.seed == seed]
            if len(mine) == len(grid.models_of(arm)) or not arm.trained:
                yield _sum_costs(arm.name, seed, mine)


def _sum_costs(arm: ArmName, seed: int, runs: Sequence[FinishedRun]) -> Cost:
    """Return what the runs of an arm spent together."""
    plans = [run.plan for run in runs]
    counts = ("steps", "packs", "episodes", "short_episodes", "answers", "targets", "tokens", "flops")
    spent: dict[str, Any] = {count: sum(plan[count] for plan in plans) for count in counts}
    for count in ("head_tokens", "train_rows", "target_rows"):  # a run of an earlier version did not count them
        spent[count] = sum(plan[count] for plan in plans) if all(count in plan for plan in plans) else None
    walls: list[float | None] = [run.state.wall_s for run in runs]
    spent["wall_s"] = None if None in walls else sum(wall for wall in walls if wall is not None)
    peaks = [run.state.peak_bytes for run in runs if run.state.peak_bytes]
    return Cost(arm=arm, seed=seed, **spent, peak_bytes=max(peaks, default=None))


def _list_trials(grid: Grid) -> Iterator[Trial]:
    """Yield every finished trial of a learning rate: of an arm, or of each model of a tuned one."""
    trials = Trials(grid)
    for arm in [arm for arm in grid.arms if arm.trained]:
        rates = grid.config.rates_of(arm.name)
        for task in grid.models_of(arm) if arm.tuned else [None]:
            done = [rate for rate in rates if all(map(grid.is_done, trials.items(arm.name, rate, task)))]
            judged = {rate: trials.judge(arm.name, rate, task) for rate in done}
            diverged = [rate for rate in done if trials.has_diverged(arm.name, rate, task)]
            unjudged = [rate for rate, best in judged.items() if best is None]
            is_whole = len(diverged) < len(done) == len(rates) and unjudged == diverged
            for rate, best in judged.items():
                yield Trial(
                    arm=arm.name,
                    task=task,
                    learning_rate=rate,
                    shots=best.shots if best else None,
                    score=best.score if best else None,
                    nll=best.nll if best else None,
                    chosen=is_whole and trials.chosen_rate(arm.name, task) == rate,
                    diverged=rate in diverged,
                )


def _list_tuned(grid: Grid) -> Iterator[Tuned]:
    """Yield what was chosen for each finished model of a tuned arm: its rate, and the step of its checkpoint."""
    for arm in [arm for arm in grid.arms if arm.tuned]:
        for run in finished_runs(grid, arm):
            yield Tuned(
                arm=arm.name,
                task=run.folder.path.name,
                seed=run.seed,
                learning_rate=run.plan["learning_rate"],
                step=run.state.model_step,
                steps=run.plan["steps"],
            )


def _sum_plain_paths(grid: Grid) -> PlainPath | None:
    """Return what whole prompts cost in all evaluations of models that cannot share their shots; None without any."""
    faults: list[str] = []
    found: list[PlainPathTokens] = []
    for item in grid.work():
        if item.kind in SWEEP_KINDS and grid.is_done(item) and not grid.has_diverged(item):
            # The JSON alone, as there may be millions of predictions beside it.
            with redoable(grid.path_of(item)):
                content: Mapping[str, Any] = read_whole(grid.path_of(item))
            paths = [task["plain_path"] for task in content["tasks"] if task.get("plain_path")]
            if paths:
                faults.append(content.get("sharing_fault", ""))
                found += [PlainPathTokens(**path) for path in paths]
    whole = sum_plain_paths(found)
    return None if whole is None else PlainPath(**asdict(whole), fault=faults[0])
