"""What every arm answered, read from results: means and differences over seeds and tasks, and rates that did best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from manyicl.comparison.grid import Grid, WorkItem, WorkKind, plan_file
from manyicl.comparison.inputs import read_result, read_whole, redoable
from manyicl.comparison.schema import AskedAs, ChosenShots, Seeds, ShotsScore, count_seeds
from manyicl.comparison.settings import ARMS, Arm, ArmName, Role
from manyicl.console import tell_rate
from manyicl.errors import UserError
from manyicl.evaluation import FILL, Prediction, ShotCurve, Shots, cap_shots, sort_shots, tell_asked_with
from manyicl.intervals import MIN_SEEDS, Interval, Run, Table, difference_interval, score_interval
from manyicl.models import read_note
from manyicl.training import RunFolder, RunState

ROLES: tuple[Role, ...] = ("trained", "held-out")
Tables = Mapping[str, Mapping[Shots, Table]]  # task -> shots -> scores
Scores = Mapping[Shots, tuple[float, float]]  # shots -> score and nats of one task


@dataclass(frozen=True, slots=True)
class Pooled:
    """A mean over seeds and tasks with its interval (docs/intervals.md)."""

    mean: float
    """A score, or a difference of scores."""
    low: float | None
    """The lower end of the 95 % interval; None if a single value gives none."""
    high: float | None
    seeds: Seeds
    """Each seed's own mean, None if it is missing."""
    num_tasks: int
    """How many tasks are in it; each counts the same."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval has one sign."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def num_seeds(self) -> int:
        """How many seeds have a value."""
        return count_seeds(self.seeds)

    @property
    def has_enough_seeds(self) -> bool:
        """Whether its interval speaks of other seeds than these too."""
        return self.num_seeds >= MIN_SEEDS

    @property
    def as_score(self) -> dict[str, Any]:
        """Its fields in an entry of scores, whose interval lies between 0 and 1."""
        low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (self.low, self.high))
        return {"score": self.mean, "low": low, "high": high, "seeds": self.seeds}

    @property
    def as_difference(self) -> dict[str, Any]:
        """Its fields in an entry of differences."""
        return {"difference": self.mean, "low": self.low, "high": self.high, "seeds": self.seeds}


def tabulate(predictions: Sequence[Prediction]) -> dict[str, dict[Shots, Table]]:
    """Return the scores of predictions by task and number of shots, draws and queries each in order.

    Raises:
        UserError: the draws of a table were not asked the same queries.
    """
    rows: dict[tuple[str, Shots], dict[int, dict[str, float]]] = {}
    for p in predictions:
        rows.setdefault((p.task, p.asked), {}).setdefault(p.draw, {})[p.query] = p.score
    tables: dict[str, dict[Shots, Table]] = {}
    for (task, shots), draws in rows.items():
        queries = sorted(next(iter(draws.values())))
        if any(sorted(scores) != queries for scores in draws.values()):
            raise UserError(
                f"task '{task}': its draws {tell_asked_with(shots)} were asked other queries; evaluate it again"
            )
        scores_DQ = np.array([[draws[d][q] for q in queries] for d in sorted(draws)], dtype=np.float64)
        tables.setdefault(task, {})[shots] = Table(scores_DQ, tuple(queries))
    return tables


def pool_means(seeds: Sequence[Run | None]) -> Pooled | None:
    """Return the mean over seeds of the mean over tasks; None if no seed has been asked.

    seeds: for each seed the tables of its tasks, or None if its results are missing.
    """
    known = [run for run in seeds if run]
    return make_pooled(score_interval(known), seeds=seeds) if known else None


def make_pooled(interval: Interval, *, seeds: Sequence[Run | None]) -> Pooled:
    """Return an interval with the seeds' own means."""
    means = tuple(float(np.mean([table.scores.mean() for table in run.values()])) if run else None for run in seeds)
    low, high = interval.ends
    return Pooled(interval.mean, low, high, means, num_tasks=next((len(run) for run in seeds if run), 0))


def pool_differences(
    a: Sequence[Tables | None], b: Sequence[Tables | None], *, shots: Mapping[str, tuple[Shots, Shots]]
) -> Pooled | None:
    """Return a - b on the tasks, paired by seed and query; None if no seed has both.

    shots: task -> the number of shots of a and of b on it. Without shots all draws are one and the same, which is then
    compared with each draw of the other side.

    Raises:
        UserError: the two were asked other queries, or other numbers of draws.
    """
    seeds: list[Run | None] = []
    for one, other in zip(a, b, strict=True):
        if one is None or other is None:
            seeds.append(None)
            continue
        pairs = {task: (one.get(task, {}).get(k), other.get(task, {}).get(m)) for task, (k, m) in shots.items()}
        known = {t: _subtract(x, y) for t, (x, y) in pairs.items() if x is not None and y is not None}
        seeds.append(known or None)
    runs = [run for run in seeds if run]
    return make_pooled(difference_interval(runs), seeds=seeds) if runs else None


def _subtract(a: Table, b: Table) -> Table:
    unlike_draws = len(a.scores) != len(b.scores) and 1 not in (len(a.scores), len(b.scores))
    if a.queries != b.queries or unlike_draws:
        what = "draws" if unlike_draws else "queries"
        raise UserError(f"two arms were asked other {what}; remove the result of one, and go on with `resume`")
    return Table(a.scores - b.scores, a.queries)  # a single row is broadcast


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def shared_shots(shots: Iterable[Shots]) -> Shots | None:
    """Return the number of shots that all tasks share; None if they differ."""
    distinct = set(shots)
    return distinct.pop() if len(distinct) == 1 else None


@dataclass(frozen=True, slots=True)
class ArmAnswers:
    """The answers of one arm with one seed, of all its models together."""

    curves: Mapping[str, ShotCurve]
    """Task -> its shot curve."""
    predictions: Sequence[Prediction]
    """All answers, one per query, draw and number of shots."""
    tables: Tables
    """The scores of the predictions."""

    @classmethod
    def read(cls, paths: Sequence[Path]) -> ArmAnswers:
        """Return the answers in the result files of the arm's models."""
        results = [read_result(path) for path in paths]
        predictions = [p for result in results for p in result.predictions]
        curves = {curve.task: curve for result in results for curve in result.curves}
        return cls(curves, predictions, tabulate(predictions))


class Findings:
    """The answers of a comparison so far, and with how many shots each arm and task is evaluated."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.settings = grid.settings
        self.seeds = self.settings.seeds
        roles = grid.roles
        self.tasks = {"trained": roles.asked_trained, "held-out": roles.held_out, "familiar": roles.familiar}

    @cached_property
    def tests(self) -> dict[ArmName, list[ArmAnswers | None]]:
        """Arm -> its answers to the test rows, one per seed."""
        return self.read("test")

    def read(self, kind: WorkKind) -> dict[ArmName, list[ArmAnswers | None]]:
        """Return arm -> its answers in one kind of work, one per seed; None if a result is missing."""
        return {arm.name: [self._read_arm(arm, seed, kind) for seed in self.seeds] for arm in self.grid.arms}

    def _read_arm(self, arm: Arm, seed: int, kind: WorkKind) -> ArmAnswers | None:
        items = [WorkItem(arm.name, seed, kind, task) for task in self.grid.models_of(arm)]
        if not all(map(self.grid.is_done, items)):
            return None
        return ArmAnswers.read([self.grid.path_of(item) for item in items])

    def tasks_of(self, arm: ArmName, role: str) -> list[str]:
        """Return the tasks of a role that an arm answers."""
        has_all = not ARMS[arm].per_task
        return [task for task in self.tasks[role] if has_all or task in self.grid.roles.dedicated]

    def shared_tasks(self, a: ArmName, b: ArmName, role: str) -> list[str]:
        """Return the tasks of a role that both arms answer."""
        return [task for task in self.tasks_of(a, role) if task in self.tasks_of(b, role)]

    def pool(self, arm: ArmName, shots: Mapping[str, Shots]) -> Pooled | None:
        """Return an arm's mean score over the tasks in `shots`, each at its own number of shots."""
        seeds: list[Run | None] = []
        for answers in self.tests[arm]:
            tables = answers.tables if answers else {}
            seeds.append({t: tables[t][k] for t, k in shots.items() if k in tables.get(t, {})} or None)
        return pool_means(seeds)

    def tables_of(self, arm: ArmName) -> list[Tables | None]:
        """Return an arm's scores by task and shots, one per seed."""
        return [answers.tables if answers else None for answers in self.tests[arm]]

    def differ(self, a: ArmName, b: ArmName, shots: Mapping[str, tuple[Shots, Shots]]) -> Pooled | None:
        """Return a - b on the tasks in `shots`: task -> the number of shots of a and of b."""
        return pool_differences(self.tables_of(a), self.tables_of(b), shots=shots)

    @cached_property
    def chosen(self) -> dict[ArmName, ChosenShots]:
        """Arm -> with how many shots it is evaluated in the headline.

        A task with validation rows of its own takes the number with its best mean score over seeds, the fewest of
        equals. Any other takes the number that is best for the arm, or the next lower one that it was asked with.
        """
        validation = self.read("validation") if self.settings.validation_queries else {}
        return {arm.name: self._choose(arm, validation.get(arm.name, [])) for arm in self.grid.arms}

    def _choose(self, arm: Arm, validation: Sequence[ArmAnswers | None]) -> ChosenShots:
        seeds = [answers.curves for answers in validation if answers is not None]
        curves = {task: _mean_scores([curves[task] for curves in seeds]) for task in (seeds[0] if seeds else ())}
        judged = judge_shots(list(curves.values()))
        best = max(judged, key=lambda one: one.score).shots if judged else self._usual_shots(arm)  # the first of equals
        by_task = {}
        for task, counts in self.shots_by_task.items():
            curve = curves.get(task)
            own = max(sort_shots(curve), key=lambda k: curve[k][0]) if curve else best
            by_task[task] = cap_shots(own, counts)
        scores = tuple(ShotsScore(shots=one.shots, score=one.score) for one in judged)
        return ChosenShots(arm=arm.name, shots=best, by_task=by_task, scores=scores)

    def _usual_shots(self, arm: Arm) -> Shots:
        """Return the shots of an arm that has no validation score: the most that it was trained with."""
        shots, most = self.grid.shots, self.trained_shots(arm)
        # An arm whose training episodes were filled is not asked with more shots than that by `fill`.
        is_filled = arm.name == "manyicl" and self.grid.config.episodes.shots == FILL
        if most is None or (is_filled and shots[-1] == FILL):
            return shots[-1]
        return cap_shots(most, shots)

    def trained_shots(self, arm: Arm) -> int | None:
        """Return the most shots that an answer was trained after; None for the base, and if it differs by task."""
        if arm.name in ("zero-shot", "dedicated", "dedicated-tuned"):
            return 0
        if not arm.trained or arm.per_task:
            return None
        known = [run.most_shots for run in finished_runs(self.grid, arm)]
        # Fewer than the arm's own number, if no episode had room for so many.
        own = self.settings.fixed_shots.get(arm.name)
        return max((max(shots.values()) for shots in known if shots), default=own)

    @cached_property
    def shots_by_task(self) -> dict[str, list[Shots]]:
        """Task -> the numbers of shots, ascending, that every arm which has answered it was asked with."""
        shared: dict[str, set[Shots]] = {}
        for seeds in self.tests.values():
            for answers in [answers for answers in seeds if answers]:
                for task in answers.curves:
                    counts = set(answers.tables.get(task, ()))
                    shared[task] = shared.get(task, counts) & counts
        ordered = (task for names in self.tasks.values() for task in names if shared.get(task))
        return {task: sort_shots(shared[task]) for task in ordered}

    def pick_shots(self, how: AskedAs | Shots, arm: ArmName, tasks: Sequence[str]) -> dict[str, Shots]:
        """Return task -> a number of shots, without the tasks that were not asked with it.

        how: "chosen", "zero", each task's own "fewest" or "most", or a number that is the same for all.
        """
        known = {task: self.shots_by_task[task] for task in tasks if task in self.shots_by_task}
        if how == "chosen":
            return {task: self.chosen[arm].by_task[task] for task in known}
        if how in ("fewest", "most"):
            return {task: counts[0 if how == "fewest" else -1] for task, counts in known.items()}
        wanted = 0 if how == "zero" else how
        return {task: wanted for task, counts in known.items() if wanted in counts}

    def num_shots(self, task: str, shots: Shots) -> float:
        """Return how many shots a number of shots is for a task; `fill` is the mean over draws and seeds."""
        if shots != FILL:
            return shots
        means = [
            point.mean_shots
            for seeds in self.tests.values()
            for answers in seeds
            if answers and task in answers.curves
            for point in answers.curves[task].points
            if point.shots == FILL and point.mean_shots is not None
        ]
        return float(np.mean(means))


def _mean_scores(curves: Sequence[ShotCurve]) -> Scores:
    """Return a task's mean score and nats over seeds, at the numbers of shots that all seeds were asked with."""
    seeds = [scores_of(curve) for curve in curves]
    shared = sort_shots(set.intersection(*map(set, seeds)))
    return {k: (float(np.mean([s[k][0] for s in seeds])), float(np.mean([s[k][1] for s in seeds]))) for k in shared}


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """One run of an arm that is finished."""

    seed: int
    folder: RunFolder
    plan: Mapping[str, Any]
    """What its packs spend, and its learning rate."""
    state: RunState
    """What its run.json says."""

    @property
    def most_shots(self) -> Mapping[str, int]:
        """Task -> the most shots that an answer was trained after; {} if nothing that is left says it."""
        kept: Mapping[str, int] | None = self.plan.get("most_shots")  # an earlier version did not keep them
        if kept is None and self.folder.model.is_dir():
            kept = read_note(str(self.folder.model)).trained_shots
        return kept or {}


def finished_runs(grid: Grid, arm: Arm) -> Iterator[FinishedRun]:
    """Yield every finished run of an arm."""
    for seed in grid.settings.seeds:
        for task in grid.models_of(arm) if arm.trained else []:
            item = WorkItem(arm.name, seed, "train", task)
            if grid.is_done(item):
                folder = RunFolder(grid.path_of(item))
                with redoable(folder.path):
                    plan = read_whole(plan_file(folder.path), "learning_rate")
                yield FinishedRun(seed, folder, plan, folder.read_state())


@dataclass(frozen=True, slots=True)
class Judged:
    """How good an arm is at one number of shots on validation rows, as a mean over tasks."""

    shots: Shots
    score: float
    """The mean score."""
    nll: float
    """Nats per answer."""


def judge_trial(curves: Sequence[ShotCurve]) -> Judged | None:
    """Return the number of shots with a trial's best mean score, ties broken by nats; None if nothing was asked.

    curves: those of its tasks on validation rows.
    """
    judged = judge_shots([scores_of(curve) for curve in curves])
    return max(judged, key=lambda one: (one.score, -one.nll), default=None)


def judge_shots(curves: Sequence[Scores]) -> list[Judged]:
    """Return how good an arm is at every number of shots that any of its tasks was asked with, ascending.

    A task that was not asked with that many shots counts with the most that it was asked with up to then (or with its
    fewest). So every mean is over all tasks, and one with few rows takes no number of shots from the others.
    """
    curves = [curve for curve in curves if curve]
    judged = []
    for k in sort_shots(shots for curve in curves for shots in curve):
        known = [curve[cap_shots(k, curve)] for curve in curves]
        score, nll = (sum(pair[place] for pair in known) / len(known) for place in (0, 1))
        judged.append(Judged(k, score, nll))
    return judged


def scores_of(curve: ShotCurve) -> Scores:
    """Return the score and the nats at every number of shots that a task was asked with."""
    return {p.shots: (p.score, p.nll) for p in curve.points if p.score is not None and p.nll is not None}


@dataclass(frozen=True, slots=True)
class Trials:
    """The learning rates that were tried, and which of them did best."""

    grid: Grid

    def chosen_rate(self, arm: ArmName, task: str | None = None) -> float:
        """Return an arm's learning rate: a fixed one, or the one whose trial did best on validation rows.

        task: the task of the model, if each model of the arm has a rate of its own.

        Raises:
            UserError: all rates diverged, or no validation row of a trial could be asked.
        """
        rates = self.grid.config.rates_of(arm)
        if not rates:
            return self.grid.config.fixed_rate(arm)
        self.refuse_all_diverged(arm, task)
        judged = {rate: self.judge(arm, rate, task) for rate in rates if not self.has_diverged(arm, rate, task)}
        known = {rate: one for rate, one in judged.items() if one is not None}
        if len(known) < len(judged):
            raise UserError(
                f"compare.learning_rates: no validation row could be asked of {_tell_whose(arm, task)}, so no rate can"
                " be chosen; give the trained tasks more rows, raise compare.max_tokens, or name no rates"
            )
        return max(known, key=lambda rate: (known[rate].score, -known[rate].nll))

    def refuse_all_diverged(self, arm: ArmName, task: str | None = None) -> None:
        """Refuse to go on if all rates of an arm diverged: none is left to choose.

        Raises:
            UserError: with the rates.
        """
        rates = self.grid.config.rates_of(arm)
        if rates and all(self.has_diverged(arm, rate, task) for rate in rates):
            key = f"compare.arm_rates.{arm}" if arm in self.grid.settings.arm_rates else "compare.learning_rates"
            raise UserError(
                f"{key} = [{', '.join(map(tell_rate, rates))}]: {_tell_whose(arm, task)} diverged at each of them (a"
                f" loss that is not finite), so no rate can be chosen; start a new comparison with lower {key}"
            )

    def has_diverged(self, arm: ArmName, rate: float, task: str | None = None) -> bool:
        """Return whether a trial diverged: any model of it did."""
        return any(map(self.grid.has_diverged, self.items(arm, rate, task)))

    def judge(self, arm: ArmName, rate: float, task: str | None = None) -> Judged | None:
        """Return how good a trial is; None if it diverged, or was not asked anything."""
        return None if self.has_diverged(arm, rate, task) else judge_trial(self.read(arm, rate, task))

    def items(self, arm: ArmName, rate: float, task: str | None = None) -> list[WorkItem]:
        """Return the validation work that a trial is judged by, one item per model; of a tuned arm `task`'s alone."""
        models = [task] if ARMS[arm].tuned and task is not None else self.grid.models_of(ARMS[arm])
        return [WorkItem(arm, self.grid.settings.seeds[0], "validation", model, rate) for model in models]

    def read(self, arm: ArmName, rate: float, task: str | None = None) -> list[ShotCurve]:
        """Return the curves of a trial's validation results."""
        paths = [self.grid.path_of(item) for item in self.items(arm, rate, task)]
        return [curve for path in paths for curve in read_result(path).curves]


def _tell_whose(arm: ArmName, task: str | None) -> str:
    """Return the model of an arm in words, with its task if the arm is tuned for each."""
    return f"{ARMS[arm].title}, task '{task}'" if ARMS[arm].tuned else ARMS[arm].title
