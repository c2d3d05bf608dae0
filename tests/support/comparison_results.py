"""Results of a comparison that no model gave: scores made up by a test, written as an evaluation writes its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from manyicl.comparison.answers import Findings
from manyicl.comparison.grid import Grid, WorkItem
from manyicl.comparison.settings import CompareConfig
from manyicl.evaluation.points import Prediction, ShotCurve, ShotPoint
from manyicl.evaluation.results import Evaluation
from manyicl.evaluation.shots import Shots
from manyicl.training.recipe import make_config
from tests.conftest import make_task

HELD_OUT = "animals"
# A comparison needs a task to train on; nothing is asked of this one.
TRAINED = "colours"

Score = Callable[[Shots, int, int, int], float]  # (shots, seed, draw, query) -> score
Curves = Sequence[ShotCurve]


def ask(
    score: Score,
    *,
    shots: Sequence[Shots],
    seed: int = 0,
    draws: int = 2,
    queries: int = 4,
    task: str = HELD_OUT,
    majority: float = 0.25,
    chance: float | None = None,
) -> Curves:
    """Return the curve of one task whose answers score `score(shots, seed, draw, query)`."""
    rows = [
        Prediction(task, d if k else 0, k, f"q{q}", prediction="x", answer="x", score=score(k, seed, d, q), nll=1.0)
        for k in shots
        for d in range(draws if k else 1)
        for q in range(queries)
    ]
    return [make_curve(rows, majority=majority, chance=chance)]


def make_curve(rows: Sequence[Prediction], *, majority: float = 0.25, chance: float | None = None) -> ShotCurve:
    """Return the curve of one task from its answers."""
    points = []
    for k in dict.fromkeys(row.shots for row in rows):
        scores = [row.score for row in rows if row.shots == k]
        points.append(
            ShotPoint(
                shots=k,
                score=sum(scores) / len(scores),
                low=None,
                high=None,
                nll=1.0,
                num_scored=len(scores),
                num_unfit=0,
                majority_score=majority,
                chance_score=chance,
            )
        )
    queries, draws = {row.query for row in rows}, {row.draw for row in rows}
    return ShotCurve(
        rows[0].task, "classification", "accuracy", len(queries), len(draws), tuple(points), predictions=tuple(rows)
    )


def make_findings(
    folder: Path,
    answers: Mapping[str, Sequence[Curves | None]],
    *,
    shots: Sequence[Shots] = (0, 1, 4),
    roles: Mapping[str, Sequence[str]] | None = None,
    **others: Mapping[str, Sequence[Curves | None]],
) -> Findings:
    """Return the findings of a comparison in `folder`, all its results given.

    answers: arm -> the curves of its test results, one list per seed; None if the result is missing. roles: role ->
    names of tasks. others: the same as `answers` for other kinds of work, such as validation.
    """
    roles = roles or {"trained": [TRAINED], "held-out": [HELD_OUT], "familiar": []}
    grid = Grid(folder, _make_recipe(folder, answers, shots, roles, has_validation="validation" in others))
    for kind, results in {"test": answers, **others}.items():
        for arm, seeds in results.items():
            for seed, curves in enumerate(seeds):
                if curves is not None:
                    path = grid.path_of(WorkItem(arm, seed, kind))
                    path.parent.mkdir(exist_ok=True)
                    Evaluation("made up", "sweep", seed=seed, max_tokens=512, curves=tuple(curves)).save(path)
    return Findings(grid)


def _make_recipe(
    folder: Path,
    answers: Mapping[str, Sequence[Curves | None]],
    shots: Sequence[Shots],
    roles: Mapping[str, Sequence[str]],
    *,
    has_validation: bool,
) -> CompareConfig:
    for name in [name for names in roles.values() for name in names]:
        _write_task(folder / "tasks", name)
    values = {
        "tasks": {"folder": str(folder / "tasks"), "names": list(roles["trained"])},
        "model": {"path": "seed"},
        "episodes": {"token_budget": 512},
        "train": {"num_steps": 1},
        "compare": {
            "arms": list(answers),
            "seeds": list(range(len(next(iter(answers.values()))))),
            "shots": list(shots),
            "few_shot_shots": 1,
            "held_out_tasks": list(roles["held-out"]),
            "familiar_tasks": list(roles["familiar"]),
            "validation_queries": 2 if has_validation else 0,
        },
    }
    return make_config(values, source="test", kind=CompareConfig)


def _write_task(folder: Path, name: str) -> None:
    task = make_task(name)
    rows = [
        {"input": example.input, "answer": example.answer, "split": split}
        for split in ("train", "validation", "test")
        for example in getattr(task, split)
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = {"family": task.family, "metric": task.metric, "labels": list(task.labels)}
    (folder / f"{name}.task.json").write_text(json.dumps(about), encoding="utf-8")


def level(base: float) -> Score:
    """Return scores that vary a little over seeds, draws and queries, around base."""
    return lambda k, seed, d, q: base + 0.01 * seed + 0.02 * ((d + q) % 2)
