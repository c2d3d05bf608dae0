"""How the arms of a comparison read their context: losses by shot index, flipped labels, orders, and examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from manyicl.arms import ArmName
from manyicl.cells import Prediction
from manyicl.comparison import Comparison, What
from manyicl.findings import ROLES, Asked, Findings, mean_known, metrics_of, pooled_json
from manyicl.intervals import Run, Table
from manyicl.pooling import pool_means
from manyicl.tasks import flip_map


def list_shot_losses(comparison: Comparison) -> Iterator[dict[str, Any]]:
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
    for arm, role, seeds in _asked_by_role(findings, "flip"):
        follows: list[Run | None] = []
        keeps, plain, num_shots = [], [], max(findings.settings.shots)
        for seed, asked, tasks in seeds:
            follows.append({task: asked.tables[task][num_shots] for task in tasks} or None)
            for task in tasks:
                back = {new: old for old, new in flip_map(findings.comparison.tasks[task].labels, seed=seed).items()}
                rows = [p for p in asked.predictions if p.task == task]
                keeps.append(float(np.mean([p.prediction == back[p.answer] for p in rows])))
                test = findings.tests[arm][findings.seeds.index(seed)]
                table = test.tables.get(task, {}).get(num_shots) if test else None
                plain += [] if table is None else [float(table.scores.mean())]
        pooled = pool_means(follows)
        if pooled is not None:
            yield {
                "arm": arm,
                "role": role,
                "shots": num_shots,
                "tasks": pooled.num_tasks,
                **pooled_json(pooled, mean="follows"),
                "keeps": float(np.mean(keeps)),
                "plain": mean_known(plain),
            }


def _asked_by_role(findings: Findings, what: What) -> Iterator[tuple[ArmName, str, list[tuple[int, Asked, list[str]]]]]:
    """Yield (arm, role, [(seed, answers, tasks that were asked)]) of an analysis at the most shots."""
    most = max(findings.settings.shots)
    for arm, answers in findings.read(what).items():
        for role in ROLES:
            seeds = []
            for seed, asked in zip(findings.seeds, answers, strict=True):
                tasks = [task for task in findings.tasks[role] if asked and most in asked.tables.get(task, {})]
                seeds += [(seed, asked, tasks)] if asked and tasks else []
            if seeds:
                yield arm, role, seeds


def list_orders(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield how far the order of the very same shots moves a score, beside how far other draws move it."""
    most = max(findings.settings.shots)
    for arm, role, seeds in _asked_by_role(findings, "order"):
        orders, draws = [], []
        for seed, asked, tasks in seeds:
            test = findings.tests[arm][findings.seeds.index(seed)]
            for task in tasks:
                table = test.tables.get(task, {}).get(most) if test else None
                if table is not None and len(table.scores) > 1:
                    orders.append(_spread(asked.tables[task][most]))
                    draws.append(_spread(table))
        if orders:
            yield {
                "arm": arm,
                "role": role,
                "shots": most,
                "tasks": len(seeds[0][2]),
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
        k = findings.chosen[arm][0]
        for p in seeds[0].predictions if seeds[0] and comparison.settings.examples else []:
            if p.draw == 0 and p.shots == k and p.task not in comparison.familiar:
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
