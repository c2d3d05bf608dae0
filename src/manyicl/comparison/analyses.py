"""How the arms read their context, and what training made them forget: losses, flips, orders, examples, old tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from manyicl.comparison.answers import (
    ROLES,
    ArmAnswers,
    Findings,
    finished_runs,
    make_pooled,
    mean_known,
    pool_means,
    shared_shots,
)
from manyicl.comparison.grid import Grid, WorkKind
from manyicl.comparison.inputs import read_whole, redoable
from manyicl.comparison.schema import (
    ArmConfidence,
    DriftPoint,
    ExampleQuery,
    Flip,
    Forgetting,
    OrderSpread,
    ShotLoss,
    TaskChange,
    TextChange,
)
from manyicl.comparison.settings import ARMS, ArmName, Role
from manyicl.evaluation import Prediction, Shots, measure_confidence, sort_shots, window_table
from manyicl.intervals import Run, Table, mean_interval
from manyicl.tasks import flip_map


def list_shot_losses(grid: Grid) -> Iterator[ShotLoss]:
    """Yield the shared arms' training losses by the number of shots before an answer."""
    for arm, seed, record, shots, value in _logged(grid, "loss_by_shot/"):
        yield ShotLoss(
            arm=arm, seed=seed, step=record["step"], tokens=record["tokens"], shots=shots, nats_a_token=value
        )


def _logged(grid: Grid, prefix: str) -> Iterator[tuple[ArmName, int, dict[str, Any], str, float]]:
    """Yield (arm, seed, record, what comes after `prefix`, value) of each logged value whose name begins with it."""
    for arm, seed, record in _read_metrics(grid):
        for name, value in record.items():
            if name.startswith(prefix):
                yield arm, seed, record, name.removeprefix(prefix), value


def _read_metrics(grid: Grid) -> Iterator[tuple[ArmName, int, dict[str, Any]]]:
    """Yield (arm, seed, record) of the metrics.jsonl of the shared arms; `tokens` are those processed until then."""
    for arm in grid.settings.shared_arms:
        for run in finished_runs(grid, ARMS[arm]):
            records = run.folder.metrics.read()
            steps = np.array([record["step"] for record in records])
            order = np.argsort(steps, kind="stable")
            totals = np.cumsum([records[place].get("tokens", 0) for place in order])
            for record in records:  # drift is written before the log of its own step
                last = int(np.searchsorted(steps[order], record["step"], side="right")) - 1
                yield arm, run.seed, record | {"tokens": int(totals[last])}


@dataclass(frozen=True, slots=True)
class _Analysed:
    """The answers of one arm with one seed in an analysis."""

    seed: int
    answers: ArmAnswers
    shots: Mapping[str, Shots]
    """Task -> its most shots."""


def _analysed_arms(
    findings: Findings, kind: WorkKind, *, least: int
) -> Iterator[tuple[ArmName, Role, list[_Analysed]]]:
    """Yield (arm, role, its answers by seed) of an analysis.

    least: tasks whose answers all have fewer shots are left out, as the analysis means nothing for them.
    """
    for arm, seeds in findings.read(kind).items():
        for role in ROLES:
            found = []
            for seed, answers in zip(findings.seeds, seeds, strict=True):
                if answers is None:
                    continue
                enough = {p.task for p in answers.predictions if p.shots >= least}
                tasks = [task for task in findings.tasks[role] if task in answers.tables and task in enough]
                if tasks:
                    most = {task: sort_shots(answers.tables[task])[-1] for task in tasks}
                    found.append(_Analysed(seed, answers, most))
            if found:
                yield arm, role, found


def _plain_table(findings: Findings, arm: ArmName, *, seed: int, task: str, shots: Shots) -> Table | None:
    """Return what an arm scored after the unchanged shots; None if it was not scored there."""
    answers = findings.tests[arm][findings.seeds.index(seed)]
    return answers.tables.get(task, {}).get(shots) if answers else None


def list_flips(findings: Findings) -> Iterator[Flip]:
    """Yield how often an arm goes along with exchanged labels, and how often it keeps the true one."""
    for arm, role, seeds in _analysed_arms(findings, "flip", least=1):
        follows: list[Run | None] = []
        keeps: list[float] = []
        plain: list[float] = []
        for one in seeds:
            follows.append({task: one.answers.tables[task][k] for task, k in one.shots.items()})
            for task, k in one.shots.items():
                flipped = flip_map(findings.grid.tasks[task].labels, seed=one.seed)
                true_label = {new: old for old, new in flipped.items()}
                rows = [p for p in one.answers.predictions if p.task == task]
                keeps.append(float(np.mean([p.prediction == true_label[p.answer] for p in rows])))
                table = _plain_table(findings, arm, seed=one.seed, task=task, shots=k)
                if table is not None:
                    plain.append(float(table.scores.mean()))
        pooled = pool_means(follows)
        if pooled is not None:
            yield Flip(
                arm=arm,
                role=role,
                shots=shared_shots(k for one in seeds for k in one.shots.values()),
                tasks=pooled.num_tasks,
                follows=pooled.mean,
                low=pooled.low,
                high=pooled.high,
                seeds=pooled.seeds,
                keeps=float(np.mean(keeps)),
                plain=mean_known(plain),
            )


def list_orders(findings: Findings) -> Iterator[OrderSpread]:
    """Yield how far the order of the very same shots moves a score, beside how far other draws move it."""
    for arm, role, seeds in _analysed_arms(findings, "order", least=2):
        orders: list[float] = []
        draws: list[float] = []
        known: set[str] = set()
        for one in seeds:
            for task, k in one.shots.items():
                table = _plain_table(findings, arm, seed=one.seed, task=task, shots=k)
                if table is not None and len(table.scores) > 1:
                    orders.append(_spread(one.answers.tables[task][k]))
                    draws.append(_spread(table))
                    known.add(task)
        if orders:
            yield OrderSpread(
                arm=arm,
                role=role,
                shots=shared_shots(k for one in seeds for task, k in one.shots.items() if task in known),
                tasks=len(known),
                spread_of_orders=float(np.mean(orders)),
                spread_of_draws=float(np.mean(draws)),
            )


def _spread(table: Table) -> float:
    return float(table.scores.mean(axis=1).std(ddof=1))


def list_confidence(findings: Findings) -> Iterator[ArmConfidence]:
    """Yield whether each arm knows when it is right, by role, at each task's most shots.

    Answers of all tasks and seeds are pooled. Tasks whose answers have no confidence, as they are generated, have no
    part in it.
    """
    for arm, seeds in findings.tests.items():
        for role in ROLES:
            most = findings.pick_shots("most", arm, findings.tasks_of(arm, role))
            found = [
                p
                for answers in seeds
                if answers is not None
                for p in answers.predictions
                if p.confidence is not None and most.get(p.task) == p.asked
            ]
            measured = measure_confidence(found)
            if measured is not None:
                yield ArmConfidence(
                    arm=arm,
                    role=role,
                    tasks=len({p.task for p in found}),
                    score=float(np.mean([p.score for p in found])),
                    **asdict(measured),
                )


def list_examples(findings: Findings) -> Iterator[ExampleQuery]:
    """Yield a few queries per task with every arm's answer, first those on which the arms disagree most."""
    grid, num_examples = findings.grid, findings.settings.examples
    by_query: dict[str, dict[str, dict[ArmName, Prediction]]] = {}  # task -> query -> arm -> its answer
    for arm, seeds in findings.tests.items():
        chosen = findings.chosen[arm].by_task
        for p in seeds[0].predictions if seeds[0] and num_examples else []:
            if p.draw == 0 and p.asked == chosen.get(p.task) and p.task not in grid.roles.familiar:
                by_query.setdefault(p.task, {}).setdefault(p.query, {})[arm] = p
    for task, queries in sorted(by_query.items()):
        texts = {example.id: example for example in grid.tasks[task].test}
        disagreement = {query: float(np.std([p.score for p in arms.values()])) for query, arms in queries.items()}
        for query in sorted(queries, key=disagreement.__getitem__, reverse=True)[:num_examples]:
            arms = queries[query]
            yield ExampleQuery(
                task=task,
                family=grid.tasks[task].family,
                role=cast(Role, grid.roles.role_of(task)),
                input=texts[query].input,
                answer=texts[query].answer,
                shots={arm: p.shots for arm, p in arms.items()},
                predictions={arm: p.prediction for arm, p in arms.items()},
                scores={arm: p.score for arm, p in arms.items()},
            )


Texts = Mapping[tuple[ArmName, int], Sequence[Mapping[str, Any]]]  # (arm, seed) -> what each text file cost


def find_forgetting(findings: Findings) -> Forgetting:
    """Return what each arm that trains one model lost: on text, on untrained tasks, and on text during training."""
    grid = findings.grid
    items = [item for item in grid.work() if item.kind == "text" and grid.is_done(item)]
    texts = {(item.arm, item.seed): _read_text(grid.path_of(item)) for item in items}
    return Forgetting(
        window_tokens=findings.settings.text_window_tokens,
        bos=any(file["bos"] for files in texts.values() for file in files),
        text=tuple(_forgotten_text(findings, texts)),
        tasks=tuple(_forgotten_tasks(findings)),
        drift=tuple(_drift(grid, texts)),
    )


def _read_text(file: Path) -> Sequence[Mapping[str, Any]]:
    with redoable(file):
        texts: Sequence[Mapping[str, Any]] = read_whole(file, "texts")["texts"]
    return texts


def _forgotten_text(findings: Findings, texts: Texts) -> Iterator[TextChange]:
    for arm in findings.settings.shared_arms:
        pairs = {s: (texts["base", s], texts[arm, s]) for s in findings.seeds if {("base", s), (arm, s)} <= set(texts)}
        if not pairs:
            continue
        for place, file in enumerate(next(iter(pairs.values()))[0]):
            num_bytes_W = np.array(file["bytes"])
            lost: list[NDArray[np.float64]] = [
                np.array(after[place]["bits"]) - np.array(before[place]["bits"]) for before, after in pairs.values()
            ]
            before = float(np.sum(file["bits"]) / num_bytes_W.sum())
            by_seed = {
                seed: {file["file"]: window_table(one, num_bytes_W)} for seed, one in zip(pairs, lost, strict=True)
            }
            interval = mean_interval(list(by_seed.values()))
            pooled = make_pooled(interval, seeds=[by_seed.get(seed) for seed in findings.seeds])
            yield TextChange(
                arm=arm,
                file=file["file"],
                num_bytes=int(num_bytes_W.sum()),
                unknown_tokens=file["unknown_tokens"],
                before=before,
                after=before + pooled.mean,
                **pooled.as_difference,
            )


def _forgotten_tasks(findings: Findings) -> Iterator[TaskChange]:
    """Yield each arm minus the base on untrained tasks: those on which the base had a score to lose, and the others."""
    if "base" not in findings.tests:
        return
    untrained = [*findings.tasks["held-out"], *findings.tasks["familiar"]]
    fewest, most = (findings.pick_shots(how, "base", untrained) for how in ("fewest", "most"))
    ends: list[tuple[Literal["fewest", "most"], dict[str, Shots]]] = [("fewest", fewest)]
    if most != fewest:
        ends.append(("most", most))
    for asked, shots in ends:
        known = {task: k for task, k in shots.items() if _had_a_score(findings, task, k)}
        new = {task: k for task, k in shots.items() if task not in known}
        yield from _changes(findings, known, kind="forgetting", asked=asked)
        yield from _changes(findings, new, kind="transfer", asked=asked)


def _changes(
    findings: Findings,
    shots: Mapping[str, Shots],
    *,
    kind: Literal["forgetting", "transfer"],
    asked: Literal["fewest", "most"],
) -> Iterator[TaskChange]:
    """Yield each shared arm minus the base on the tasks in `shots`."""
    before = findings.pool("base", shots)
    for arm in findings.settings.shared_arms:
        pooled = findings.differ(arm, "base", {task: (k, k) for task, k in shots.items()})
        if pooled is None or before is None:
            continue
        yield TaskChange(
            arm=arm,
            kind=kind,
            asked=asked,
            shots=shared_shots(shots.values()),
            shots_by_task=dict(shots),
            tasks=tuple(shots),
            before=before.mean,
            after=before.mean + pooled.mean,
            **pooled.as_difference,
        )


def _had_a_score(findings: Findings, task: str, shots: Shots) -> bool:
    """Return whether the base beats the majority and chance by its interval: only such a score can be forgotten."""
    pooled = findings.pool("base", {task: shots})
    curves = [answers.curves[task] for answers in findings.tests["base"] if answers]
    points = [point for curve in curves for point in curve.points if point.shots == shots]
    majority, chance = ([p.majority_score for p in points], [p.chance_score for p in points])
    levels = [mean_known(scores) for scores in (majority, chance)]
    return pooled is not None and pooled.low is not None and pooled.low > max(level or 0.0 for level in levels)


def _drift(grid: Grid, texts: Texts) -> Iterator[DriftPoint]:
    """Yield bits per byte before training, and during it."""
    for arm in grid.settings.shared_arms:
        for seed in grid.settings.seeds:
            for file in texts.get(("base", seed), []) if (arm, seed) in texts else []:
                start = float(np.sum(file["bits"]) / np.sum(file["bytes"]))
                yield DriftPoint(arm=arm, seed=seed, step=0, tokens=0, file=file["file"], bits_per_byte=start)
    for arm, seed, record, name, value in _logged(grid, "drift/"):
        yield DriftPoint(
            arm=arm, seed=seed, step=record["step"], tokens=record["tokens"], file=name, bits_per_byte=value
        )
