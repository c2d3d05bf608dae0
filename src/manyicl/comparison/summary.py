"""The finished cells of a comparison, put together: comparison.json (docs/comparison-format.md)."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from manyicl.comparison.analyses import list_examples, list_flips, list_orders, list_shot_losses
from manyicl.comparison.arms import Arm, ArmName
from manyicl.comparison.findings import Findings, runs_of
from manyicl.comparison.forgetting import find_forgetting
from manyicl.comparison.grid import Grid, What, judge_trial
from manyicl.comparison.scores import list_curves, list_differences, list_flatness, list_headline, list_means
from manyicl.evaluation import PlainPath, package_versions, sum_plain_paths
from manyicl.files import write_atomically
from manyicl.training import dump_config, git_commit

COMPARISON_SCHEMA = 2
COMPARISON_FILE = "comparison.json"


def collect_findings(comparison: Grid) -> dict[str, Any]:
    """Return comparison.json of the cells that are done; one that is missing is null or absent, never 0."""
    findings = Findings(comparison)
    grid = list(_grid(comparison))
    return {
        "schema": COMPARISON_SCHEMA,
        "name": comparison.settings.name,
        "finished": all(entry["done"] == entry["total"] for entry in grid),
        "config": dump_config(comparison.config),
        "versions": {"python": platform.python_version(), **package_versions()},
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "seeds": list(findings.seeds),
        "shots": comparison.shots,
        "match": comparison.settings.match,
        "arms": [_describe_arm(findings, arm) for arm in comparison.arms],
        "tasks": [_describe_task(comparison, name) for name in comparison.tasks],
        "grid": grid,
        "costs": list(_costs(comparison)),
        "trials": list(_trials(comparison)),
        "tuned": list(_tuned(comparison)),
        "chosen": [{"arm": arm, **asdict(chosen)} for arm, chosen in findings.chosen.items()],
        "curves": list(list_curves(findings)),
        "means": list(list_means(findings)),
        "headline": list(list_headline(findings)),
        "differences": list(list_differences(findings)),
        "flatness": list(list_flatness(findings)),
        "forgetting": find_forgetting(findings),
        "shot_losses": list(list_shot_losses(comparison)),
        "flips": list(list_flips(findings)),
        "orders": list(list_orders(findings)),
        "examples": list(list_examples(findings)),
        "plain_path": _plain_path(comparison),
    }


def write_findings(comparison: Grid) -> dict[str, Any]:
    """Write comparison.json, and return it."""
    content = collect_findings(comparison)
    write_atomically(comparison.folder / COMPARISON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def _describe_arm(findings: Findings, arm: Arm) -> dict[str, Any]:
    rates = {plan["learning_rate"] for _, _, plan, _ in runs_of(findings.comparison, arm)}
    return {
        "arm": arm.name,
        "title": arm.title,
        "trained_shots": findings.trained_shots(arm),
        "learning_rate": rates.pop() if len(rates) == 1 else None,
        "matched": arm.matched,
        "trained": arm.trained,
        "num_models": len(findings.comparison.models_of(arm)),
        "about": arm.about,
    }


def _describe_task(comparison: Grid, name: str) -> dict[str, Any]:
    task = comparison.tasks[name]
    overlap = (comparison.inputs.overlaps or {}).get(name)
    return {
        "task": name,
        "family": task.family,
        "metric": task.metric,
        "role": comparison.role_of(name),
        "asked": name not in comparison.trained or name in comparison.asked_trained,
        "dedicated": name in comparison.dedicated and any(arm.per_task for arm in comparison.arms),
        "num_train": len(task.train),
        "num_validation": len(task.validation),
        "num_test": len(task.test),
        "num_labels": len(task.labels) or None,
        "dropped": dict(task.dropped),
        "overlap": overlap.model_dump() if overlap else None,
        "sha256": comparison.inputs.tasks[name],
    }


def _grid(comparison: Grid) -> Iterator[dict[str, Any]]:
    total: Counter[tuple[ArmName, int, What]] = Counter()
    done: Counter[tuple[ArmName, int, What]] = Counter()
    for cell in comparison.cells():
        if cell.rate is None:
            total[cell.arm, cell.seed, cell.what] += 1
            done[cell.arm, cell.seed, cell.what] += comparison.is_done(cell)
    for (arm, seed, what), count in total.items():
        yield {"arm": arm, "seed": seed, "what": what, "done": done[arm, seed, what], "total": count}


def _costs(comparison: Grid) -> Iterator[dict[str, Any]]:
    """Yield what each arm spent with each seed, all its models together, once they are all trained."""
    counts = ("steps", "packs", "episodes", "short_episodes", "answers", "targets", "tokens", "flops")
    newer = ("head_tokens", "train_rows", "target_rows")  # a run of an earlier version did not count them
    for arm in comparison.arms:
        runs = list(runs_of(comparison, arm))
        for seed in comparison.settings.seeds:
            mine = [(plan, run) for run_seed, _, plan, run in runs if run_seed == seed]
            if len(mine) < len(comparison.models_of(arm)) and arm.trained:
                continue
            walls: list[float | None] = [run.wall_s for _, run in mine]
            peaks: list[int] = [run.peak_bytes for _, run in mine if run.peak_bytes]
            yield {
                "arm": arm.name,
                "seed": seed,
                **{count: sum(plan[count] for plan, _ in mine) for count in counts},
                **{key: sum(p[key] for p, _ in mine) if all(key in p for p, _ in mine) else None for key in newer},
                "wall_s": None if None in walls else sum(wall for wall in walls if wall is not None),
                "peak_bytes": max(peaks, default=None),
            }


def _trials(comparison: Grid) -> Iterator[dict[str, Any]]:
    """Yield every finished trial of a learning rate: of an arm, or of each model of a tuned one."""
    for arm in [arm for arm in comparison.arms if arm.trained]:
        rates = comparison.rates_of(arm.name)
        for task in comparison.models_of(arm) if arm.tuned else [None]:
            cells = {rate: comparison.trial_cells(arm.name, rate, task) for rate in rates}
            done = [rate for rate in rates if all(map(comparison.is_done, cells[rate]))]
            judged = {rate: judge_trial(comparison.read_validation(arm.name, rate, task)) for rate in done}
            is_whole = len(done) == len(rates) and None not in judged.values()
            for rate, trial in judged.items():
                yield {
                    "arm": arm.name,
                    "task": task,
                    "learning_rate": rate,
                    "shots": trial.shots if trial else None,
                    "score": trial.score if trial else None,
                    "nll": trial.nll if trial else None,
                    "chosen": is_whole and comparison.chosen_rate(arm.name, task) == rate,
                }


def _plain_path(comparison: Grid) -> dict[str, Any] | None:
    """Return what whole prompts cost in all evaluations of models that cannot share their shots; None without any."""
    faults, found = [], []
    for cell in comparison.cells():
        place = comparison.place(cell)
        if cell.what in ("train", "text") or not comparison.is_done(cell):
            continue
        content = json.loads(place.read_bytes())
        paths = [task["plain_path"] for task in content.get("tasks", ()) if task.get("plain_path")]
        if paths:
            faults.append(content.get("sharing_fault", ""))
            found += [PlainPath(**path) for path in paths]
    whole = sum_plain_paths(found)
    return None if whole is None else {**asdict(whole), "fault": faults[0]}


def _tuned(comparison: Grid) -> Iterator[dict[str, Any]]:
    """Yield what was chosen for each finished model of a tuned arm: its rate, and the step of its checkpoint."""
    for arm in [arm for arm in comparison.arms if arm.tuned]:
        for seed, folder, plan, run in runs_of(comparison, arm):
            yield {
                "arm": arm.name,
                "task": folder.path.name,
                "seed": seed,
                "learning_rate": plan["learning_rate"],
                "step": run.model_step,
                "steps": plan["steps"],
            }
