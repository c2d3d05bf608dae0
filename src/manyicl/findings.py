"""What every arm answered, read from the finished cells of a comparison, and what it says over seeds and tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from manyicl.arms import ARMS, Arm, ArmName
from manyicl.cells import Prediction
from manyicl.comparison import Comparison, GridCell, What, mean_by_shots, plan_file
from manyicl.intervals import Run, Table
from manyicl.metrics import MetricsLog
from manyicl.pooling import Pooled, pool_differences, pool_means, tabulate
from manyicl.results import read_result

ROLES = ("trained", "held-out")


@dataclass(frozen=True, slots=True)
class Asked:
    """One arm's answers with one seed: the result's task entries by name, its predictions, and their scores."""

    entries: Mapping[str, Mapping[str, Any]]
    predictions: Sequence[Prediction]
    tables: Mapping[str, Mapping[int, Table]]


class Findings:
    """What a comparison has found so far."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.settings = comparison.settings
        self.seeds = self.settings.seeds
        self.tasks = {
            "trained": comparison.asked_trained,
            "held-out": comparison.held_out,
            "familiar": comparison.familiar,
        }

    @cached_property
    def tests(self) -> dict[ArmName, list[Asked | None]]:
        """Arm -> its answers to the test rows, a seed each."""
        return self.read("test")

    def read(self, what: What) -> dict[ArmName, list[Asked | None]]:
        """Return arm -> its answers in one kind of cells, a seed each; None where a cell is missing."""
        arms = self.comparison.arms
        return {arm.name: [self._read_cells(arm, seed, what) for seed in self.seeds] for arm in arms}

    def _read_cells(self, arm: Arm, seed: int, what: What) -> Asked | None:
        """Return an arm's answers, those of all its models together; None where one is missing."""
        cells = [GridCell(arm.name, seed, what, task) for task in self.comparison.models_of(arm)]
        if not all(self.comparison.is_done(cell) for cell in cells):
            return None
        results = [read_result(self.comparison.place(cell)) for cell in cells]
        predictions = [p for result in results for p in result.predictions]
        entries = {task["task"]: task for result in results for task in result.content["tasks"]}
        return Asked(entries, predictions, tabulate(predictions))

    def tasks_of(self, arm: ArmName, role: str) -> list[str]:
        """Return the tasks of a role that an arm answers."""
        if not ARMS[arm].per_task:
            return self.tasks[role]
        return [task for task in self.tasks[role] if task in self.comparison.dedicated]

    def pool(self, arm: ArmName, tasks: Sequence[str], shots: int) -> Pooled | None:
        """Return an arm's mean score over those of the tasks that were asked with so many shots."""
        seeds: list[Run | None] = []
        for asked in self.tests[arm]:
            run = {t: asked.tables[t][shots] for t in tasks if shots in asked.tables.get(t, {})} if asked else {}
            seeds.append(run or None)
        return pool_means(seeds)

    def tables_of(self, arm: ArmName) -> list[Mapping[str, Mapping[int, Table]] | None]:
        """Return an arm's scores by task and shots, a seed each."""
        return [asked.tables if asked else None for asked in self.tests[arm]]

    def differ(self, a: ArmName, b: ArmName, role: str, shots: tuple[int, int]) -> tuple[Pooled | None, int]:
        """Return a - b on the tasks that both answer, and how many these are."""
        tasks = [task for task in self.tasks_of(a, role) if task in self.tasks_of(b, role)]
        one, other = self.tables_of(a), self.tables_of(b)
        pooled = pool_differences(one, other, tasks=tasks, shots=shots)
        return pooled, pooled.num_tasks if pooled else 0

    @cached_property
    def chosen(self) -> dict[ArmName, tuple[int, list[dict[str, Any]]]]:
        """Arm -> the number of shots it is asked with in the headline, and the validation scores that chose it."""
        found: dict[ArmName, tuple[int, list[dict[str, Any]]]] = {}
        validation = self.read("validation") if self.settings.validation_queries else {}
        for arm in self.comparison.arms:
            asked = [one for one in validation.get(arm.name, []) if one is not None]
            curves = [mean_by_shots(list(one.entries.values())) for one in asked]
            shared = sorted(set.intersection(*map(set, curves))) if curves else []
            means = {k: float(np.mean([curve[k][0] for curve in curves])) for k in shared}
            best = max(means, key=lambda k: (means[k], -k)) if means else self._usual_shots(arm)
            found[arm.name] = best, [{"shots": k, "score": score} for k, score in means.items()]
        return found

    def _usual_shots(self, arm: Arm) -> int:
        """Return the shots of an arm that has no validation score: the most that it was trained behind."""
        most = self.trained_shots(arm)
        return max(k for k in self.settings.shots if most is None or k <= most or k == min(self.settings.shots))

    def trained_shots(self, arm: Arm) -> int | None:
        """Return the most shots that an answer was trained behind; None of the base, and where it differs by task."""
        if arm.name in ("zero-shot", "dedicated", "dedicated-tuned"):
            return 0
        if arm.name == "few-shot":
            return self.settings.few_shot_shots
        if not arm.trained or arm.per_task:
            return None
        notes = [self.comparison.place(GridCell(arm.name, s, "train")) / "model" / "manyicl.json" for s in self.seeds]
        known = [json.loads(note.read_bytes())["trained_shots"] for note in notes if note.is_file()]
        return max((max(shots.values()) for shots in known), default=None)

    def asked_shots(self, role: str) -> list[int]:
        """Return the numbers of shots that every task of a role was asked with, by every arm that has been asked."""
        shared: set[int] | None = None
        for arm, seeds in self.tests.items():
            for asked in seeds:
                for task in self.tasks_of(arm, role) if asked else []:
                    shots = set(asked.tables.get(task, {})) if asked else set()
                    shared = shots if shared is None else shared & shots
        return sorted(shared or ())

    def shots_as(self, asked: str, arm: ArmName, role: str) -> int | None:
        """Return the shots of a headline column: 'chosen', 'zero' or 'most'; None where it was not asked so."""
        shots = self.asked_shots(role)
        wanted = {"chosen": self.chosen[arm][0], "zero": 0, "most": max(shots, default=-1)}[asked]
        return wanted if wanted in shots else None


def runs_of(comparison: Comparison, arm: Arm) -> Iterator[tuple[int, Path, dict[str, Any], dict[str, Any]]]:
    """Yield (seed, folder, what its plan spends, its run.json) of every finished run of an arm."""
    for seed in comparison.settings.seeds:
        for task in comparison.models_of(arm) if arm.trained else []:
            cell = GridCell(arm.name, seed, "train", task)
            if comparison.is_done(cell):
                folder = comparison.place(cell)
                plan = json.loads(plan_file(folder).read_bytes())
                yield seed, folder, plan, json.loads((folder / "run.json").read_bytes())


def pooled_json(pooled: Pooled, *, mean: str = "score") -> dict[str, Any]:
    """Return a pooled mean as comparison.json has it, under the name `mean`."""
    low, high = pooled.low, pooled.high
    if mean == "score":  # what a score can be
        low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (low, high))
    return {mean: pooled.mean, "low": low, "high": high, "seeds": list(pooled.seeds)}


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def metrics_of(comparison: Comparison) -> Iterator[tuple[ArmName, int, dict[str, Any]]]:
    """Yield (arm, seed, record) of the shared arms' metrics.jsonl, each record with the tokens processed until then."""
    for arm in [arm for arm in comparison.arms if not arm.per_task]:
        for seed, folder, _, _ in runs_of(comparison, arm):
            records = MetricsLog(folder / "metrics.jsonl").read()
            steps = np.array([record["step"] for record in records])
            order = np.argsort(steps, kind="stable")
            totals = np.cumsum([records[place].get("tokens", 0) for place in order])
            for record in records:  # drift is kept before the log of its own step
                last = int(np.searchsorted(steps[order], record["step"], side="right")) - 1
                yield arm.name, seed, record | {"tokens": int(totals[last])}
