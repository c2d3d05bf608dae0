"""How the arms of a comparison read their context: losses by shot index, flipped labels, orders, and examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from manyicl.comparison.arms import ArmName
from manyicl.comparison.findings import ROLES, Asked, Findings, mean_known, metrics_of, one_number, pooled_json
from manyicl.comparison.grid import Grid, What
from manyicl.comparison.pooling import pool_means
from manyicl.evaluation import Prediction, Shots, sort_shots
from manyicl.intervals import Run, Table
from manyicl.tasks import flip_map


def list_shot_losses(comparison: Grid) -> Iterator[dict[str, Any]]:
    """Yield the shared arms' training losses by the number of shots before an answer."""
    for arm, seed, record in metrics_of(comparison):
        for name in [key for key in record if key.startswith("loss_by_shot/")]:
            yield {
                "arm": arm,
                "seed": seed,
                "step": record["step"],
                "tokens": record["tokens"],
                "shots": name.removeprefix("loss_by_shot/"),
                "nats_a_token": record[name],
            }


def list_flips(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield how often an arm goes along with exchanged labels, and how often it stays with the true one."""
    for arm, role, seeds in _asked_by_role(findings, "flip", least=1):
        follows: list[Run | None] = []
        keeps, plain = [], []
        for seed, asked, tasks in seeds:
            follows.append({task: asked.tables[task][k] for task, k in tasks.items()})
            for task, k in tasks.items():
                back = {new: old for old, new in flip_map(findings.comparison.tasks[task].labels, seed=seed).items()}
                rows = [p for p in asked.predictions if p.task == task]
                keeps.append(float(np.mean([p.prediction == back[p.answer] for p in rows])))
                table = _plain_table(findings, arm, seed=seed, task=task, shots=k)
                plain += [] if table is None else [float(table.scores.mean())]
        pooled = pool_means(follows)
        if pooled is not None:
            yield {
                "arm": arm,
                "role": role,
                "shots": one_number(k for _, _, tasks in seeds for k in tasks.values()),
                "tasks": pooled.num_tasks,
                **pooled_json(pooled, mean="follows"),
                "keeps": float(np.mean(keeps)),
                "plain": mean_known(plain),
            }


def _asked_by_role(
    findings: Findings, what: What, *, least: int
) -> Iterator[tuple[ArmName, str, list[tuple[int, Asked, dict[str, Shots]]]]]:
    """Yield (arm, role, [(seed, answers, task -> its most shots)]) of an analysis; tasks with fewer than `least` shots
    tell nothing of them."""
    for arm, answers in findings.read(what).items():
        for role in ROLES:
            seeds = []
            for seed, asked in zip(findings.seeds, answers, strict=True):
                most = {
                    task: sort_shots(asked.tables[task])[-1]
                    for task in (findings.tasks[role] if asked else [])
                    if asked and task in asked.tables
                }
                told = {p.task for p in (asked.predictions if asked else ()) if p.shots >= least}
                mine = {task: k for task, k in most.items() if task in told}
                seeds += [(seed, asked, mine)] if asked and mine else []
            if seeds:
                yield arm, role, seeds


def _plain_table(findings: Findings, arm: ArmName, *, seed: int, task: str, shots: Shots) -> Table | None:
    """Return what an arm scored after the unchanged shots; None if it was not scored there."""
    asked = findings.tests[arm][findings.seeds.index(seed)]
    return asked.tables.get(task, {}).get(shots) if asked else None


def list_orders(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield how far the order of the very same shots moves a score, beside how far other draws move it."""
    for arm, role, seeds in _asked_by_role(findings, "order", least=2):
        orders, draws, known = [], [], set()
        for seed, asked, tasks in seeds:
            for task, k in tasks.items():
                table = _plain_table(findings, arm, seed=seed, task=task, shots=k)
                if table is not None and len(table.scores) > 1:
                    orders.append(_spread(asked.tables[task][k]))
                    draws.append(_spread(table))
                    known.add(task)
        if orders:
            yield {
                "arm": arm,
                "role": role,
                "shots": one_number(k for _, _, tasks in seeds for task, k in tasks.items() if task in known),
                "tasks": len(known),
                "spread_of_orders": float(np.mean(orders)),
                "spread_of_draws": float(np.mean(draws)),
            }


def _spread(table: Table) -> float:
    return float(table.scores.mean(axis=1).std(ddof=1))


def list_examples(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield a few queries a task with every arm's answer, those first on which the arms disagree most."""
    comparison = findings.comparison
    answers: dict[str, dict[str, dict[ArmName, Prediction]]] = {}  # task -> query -> arm -> its answer
    for arm, seeds in findings.tests.items():
        chosen = findings.chosen[arm].by_task
        for p in seeds[0].predictions if seeds[0] and comparison.settings.examples else []:
            if p.draw == 0 and p.asked == chosen.get(p.task) and p.task not in comparison.familiar:
                answers.setdefault(p.task, {}).setdefault(p.query, {})[arm] = p
    for task, queries in sorted(answers.items()):
        texts = {example.id: example for example in comparison.tasks[task].test}
        order: Callable[[str], float] = lambda query: -float(np.std([p.score for p in queries[query].values()]))  # noqa: E731, B023
        for query in sorted(queries, key=order)[: comparison.settings.examples]:
            told = queries[query]
            yield {
                "task": task,
                "family": comparison.tasks[task].family,
                "role": comparison.role_of(task),
                "input": texts[query].input,
                "answer": texts[query].answer,
                "shots": {arm: p.shots for arm, p in told.items()},
                "predictions": {arm: p.prediction for arm, p in told.items()},
                "scores": {arm: p.score for arm, p in told.items()},
            }
