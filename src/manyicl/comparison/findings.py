"""What every arm answered, read from the finished cells of a comparison, and what it says over seeds and tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from manyicl.comparison.arms import ARMS, Arm, ArmName
from manyicl.comparison.grid import Grid, Scores, What, WorkItem, judge_shots, plan_file, validation_scores
from manyicl.comparison.pooling import Pooled, pool_differences, pool_means, tabulate
from manyicl.evaluation import FILL, Evaluation, Prediction, Shots, cap_shots, sort_shots
from manyicl.intervals import Run, Table
from manyicl.models import read_note
from manyicl.training import RunFolder, RunState

ROLES = ("trained", "held-out")
AskedAs = Literal["chosen", "zero", "fewest", "most"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One arm's answers with one seed: the result's task entries by name, its predictions, and their scores."""

    entries: Mapping[str, Mapping[str, Any]]
    predictions: Sequence[Prediction]
    tables: Mapping[str, Mapping[Shots, Table]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """With how many shots an arm is asked in the headline.

    shots: the number with the best mean over the tasks' validation rows. by_task: each task's own number. scores: the
    means over tasks that `shots` was chosen by.
    """

    shots: Shots
    by_task: Mapping[str, Shots]
    scores: Sequence[Mapping[str, Any]]


class Findings:
    """What a comparison has found so far."""

    def __init__(self, comparison: Grid) -> None:
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
        cells = [WorkItem(arm.name, seed, what, task) for task in self.comparison.models_of(arm)]
        if not all(self.comparison.is_done(cell) for cell in cells):
            return None
        results = [Evaluation.load(self.comparison.place(cell)) for cell in cells]
        predictions = [p for result in results for p in result.predictions]
        entries = {task["task"]: task for result in results for task in result.to_json()["tasks"]}
        return Asked(entries, predictions, tabulate(predictions))

    def tasks_of(self, arm: ArmName, role: str) -> list[str]:
        """Return the tasks of a role that an arm answers."""
        if not ARMS[arm].per_task:
            return self.tasks[role]
        return [task for task in self.tasks[role] if task in self.comparison.dedicated]

    def pool(self, arm: ArmName, shots: Mapping[str, Shots]) -> Pooled | None:
        """Return an arm's mean score over the tasks in `shots`, each at its own number of shots."""
        seeds: list[Run | None] = []
        for asked in self.tests[arm]:
            tables = asked.tables if asked else {}
            seeds.append({t: tables[t][k] for t, k in shots.items() if k in tables.get(t, {})} or None)
        return pool_means(seeds)

    def tables_of(self, arm: ArmName) -> list[Mapping[str, Mapping[Shots, Table]] | None]:
        """Return an arm's scores by task and shots, a seed each."""
        return [asked.tables if asked else None for asked in self.tests[arm]]

    def differ(self, a: ArmName, b: ArmName, shots: Mapping[str, tuple[Shots, Shots]]) -> Pooled | None:
        """Return a - b on the tasks in `shots`: task -> the number of shots of a and of b."""
        return pool_differences(self.tables_of(a), self.tables_of(b), shots=shots)

    def shared_tasks(self, a: ArmName, b: ArmName, role: str) -> list[str]:
        """Return the tasks of a role that both arms answer."""
        return [task for task in self.tasks_of(a, role) if task in self.tasks_of(b, role)]

    @cached_property
    def chosen(self) -> dict[ArmName, Chosen]:
        """Arm -> with how many shots it is asked in the headline.

        A task with validation rows of its own takes the number with its best mean score over seeds, the fewest of
        equals. Any other takes the number that is best for the arm, or the next lower one that it was asked with.
        """
        validation = self.read("validation") if self.settings.validation_queries else {}
        return {arm.name: self._choose(arm, validation.get(arm.name, [])) for arm in self.comparison.arms}

    def _choose(self, arm: Arm, validation: Sequence[Asked | None]) -> Chosen:
        seeds = [asked.entries for asked in validation if asked is not None]
        curves = {task: _mean_curve([entries[task] for entries in seeds]) for task in (seeds[0] if seeds else ())}
        judged = judge_shots(list(curves.values()))
        best = max(judged, key=lambda one: one.score).shots if judged else self._usual_shots(arm)  # the first of equals
        by_task = {}
        for task, asked in self.asked_by_task.items():
            curve = curves.get(task)
            own = max(sort_shots(curve), key=lambda k: curve[k][0]) if curve else best
            by_task[task] = cap_shots(own, asked)
        return Chosen(best, by_task, [{"shots": one.shots, "score": one.score} for one in judged])

    def _usual_shots(self, arm: Arm) -> Shots:
        """Return the shots of an arm that has no validation score: the most that it was trained behind."""
        shots, most = self.comparison.shots, self.trained_shots(arm)
        filled = arm.name == "manyicl" and self.comparison.config.episodes.shots == FILL  # and so fill is not more
        if most is None or (filled and shots[-1] == FILL):
            return shots[-1]
        return cap_shots(most, shots)

    def trained_shots(self, arm: Arm) -> int | None:
        """Return the most shots that an answer was trained behind; None of the base, and where it differs by task."""
        if arm.name in ("zero-shot", "dedicated", "dedicated-tuned"):
            return 0
        if arm.name == "few-shot":
            return self.settings.few_shot_shots
        if not arm.trained or arm.per_task:
            return None
        runs = [RunFolder(self.comparison.place(WorkItem(arm.name, s, "train"))) for s in self.seeds]
        known = [read_note(str(run.model)).trained_shots for run in runs if run.model.is_dir()]
        return max((max(shots.values()) for shots in known if shots), default=None)

    @cached_property
    def asked_by_task(self) -> dict[str, list[Shots]]:
        """Task -> the numbers of shots, ascending, that every arm which has been asked of it was asked with."""
        shared: dict[str, set[Shots]] = {}
        for seeds in self.tests.values():
            for asked in [asked for asked in seeds if asked]:
                for task in asked.entries:
                    tables = set(asked.tables.get(task, ()))
                    shared[task] = shared.get(task, tables) & tables
        ordered = (task for names in self.tasks.values() for task in names if shared.get(task))
        return {task: sort_shots(shared[task]) for task in ordered}

    def shots_as(self, asked: AskedAs | Shots, arm: ArmName, tasks: Sequence[str]) -> dict[str, Shots]:
        """Return task -> how many shots an arm is asked with, without the tasks that it was not asked so.

        asked: 'chosen', 'zero', each task's own 'fewest' or 'most', or a number that is the same for all.
        """
        found: dict[str, Shots] = {}
        for task in [task for task in tasks if task in self.asked_by_task]:
            counts = self.asked_by_task[task]
            if asked == "chosen":
                found[task] = self.chosen[arm].by_task[task]
            elif asked == "fewest":
                found[task] = counts[0]
            elif asked == "most":
                found[task] = counts[-1]
            elif asked == "zero" and 0 in counts:
                found[task] = 0
            elif asked != "zero" and asked in counts:
                found[task] = asked
        return found

    def num_shots(self, task: str, shots: Shots) -> float:
        """Return how many shots a number of shots is for a task: of `fill` the mean over draws and seeds."""
        if shots != FILL:
            return shots
        cells = [
            cell["mean_shots"]
            for seeds in self.tests.values()
            for asked in seeds
            if asked and task in asked.entries
            for cell in asked.entries[task]["curve"]
            if cell["shots"] == FILL and cell["mean_shots"] is not None
        ]
        return float(np.mean(cells))


def _mean_curve(entries: Sequence[Mapping[str, Any]]) -> Scores:
    """Return a task's mean score and nats over seeds, at the numbers of shots that all seeds were asked with."""
    curves = [validation_scores(entry) for entry in entries]
    shared = sort_shots(set.intersection(*map(set, curves)))
    return {k: (float(np.mean([c[k][0] for c in curves])), float(np.mean([c[k][1] for c in curves]))) for k in shared}


def one_number(shots: Iterable[Shots]) -> Shots | None:
    """Return the number of shots that all tasks share; None if they differ."""
    distinct = set(shots)
    return distinct.pop() if len(distinct) == 1 else None


def runs_of(comparison: Grid, arm: Arm) -> Iterator[tuple[int, RunFolder, dict[str, Any], RunState]]:
    """Yield (seed, run, what its plan spends, its state) of every finished run of an arm."""
    for seed in comparison.settings.seeds:
        for task in comparison.models_of(arm) if arm.trained else []:
            cell = WorkItem(arm.name, seed, "train", task)
            if comparison.is_done(cell):
                folder = comparison.place(cell)
                plan = json.loads(plan_file(folder).read_bytes())
                run = RunFolder(folder)
                yield seed, run, plan, run.read_state()


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


def metrics_of(comparison: Grid) -> Iterator[tuple[ArmName, int, dict[str, Any]]]:
    """Yield (arm, seed, record) of the shared arms' metrics.jsonl, each record with the tokens processed until then."""
    for arm in [arm for arm in comparison.arms if not arm.per_task]:
        for seed, run, _, _ in runs_of(comparison, arm):
            records = run.metrics.read()
            steps = np.array([record["step"] for record in records])
            order = np.argsort(steps, kind="stable")
            totals = np.cumsum([records[place].get("tokens", 0) for place in order])
            for record in records:  # drift is kept before the log of its own step
                last = int(np.searchsorted(steps[order], record["step"], side="right")) - 1
                yield arm.name, seed, record | {"tokens": int(totals[last])}
