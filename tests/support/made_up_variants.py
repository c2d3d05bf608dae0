"""Folders of comparisons with made-up answers of ManyICL, and neither tasks nor models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyicl.comparison.settings import CompareConfig
from manyicl.evaluation.points import DrawPoint, Prediction, ShotCurve, ShotPoint
from manyicl.evaluation.results import Evaluation
from manyicl.evaluation.shots import FILL, Shots
from manyicl.training.recipe import dump_config, make_config

Scores = dict[Shots, list[float]]  # shots -> the score of each query, the same in both draws


def write_variant(
    folder: Path, results: list[dict[str, Scores] | None], *, fill: int = 31, sha256: str = "rows", **sections: Any
) -> None:
    """Write the recipe of a comparison and its test results, one per seed; None if the seed is unfinished.

    The files that the recipe names are nowhere. fill: how many shots fit. sections: of the recipe.
    """
    values = {
        "tasks": {"folder": str(folder / "nowhere"), "names": ["colours"]},
        "model": {"path": str(folder / "nowhere")},
        "train": {"num_steps": 1},
        "compare": {"arms": ["manyicl"], "seeds": list(range(len(results))), "held_out_tasks": ["animals"]},
        **sections,
    }
    config = make_config(values, source="test", kind=CompareConfig)
    for seed, tasks in enumerate(results):
        (folder / f"seed-{seed}").mkdir(parents=True)
        if tasks is not None:
            curves = tuple(make_curve(task, scores, fill=fill, sha256=sha256) for task, scores in tasks.items())
            result = Evaluation("made up", "sweep", seed=seed, max_tokens=512, curves=curves)
            result.save(folder / f"seed-{seed}" / "manyicl.test.json")
    (folder / "recipe.toml").write_text(dump_config(config), encoding="utf-8")


def make_curve(task: str, scores: Scores, *, fill: int, sha256: str) -> ShotCurve:
    points, rows = [], []
    for k, row in scores.items():
        count, mean = fill if k == FILL else k, sum(row) / len(row)
        drawn = tuple(
            DrawPoint(d, mean, f"{d}: {count}", 0, 0, None, num_missing_labels=None, num_cut=0, num_shots=count)
            for d in range(2)
        )
        points.append(ShotPoint(k, mean, None, None, 1.0, 2 * len(row), 0, majority_score=None, draws=drawn))
        rows += [
            Prediction(task, d, count, f"q{q}", "x", "x", score=score, nll=1.0, fill=k == FILL)
            for d in range(2)
            for q, score in enumerate(row)
        ]
    return ShotCurve(task, "any", "accuracy", 4, 2, tuple(points), tuple(rows), sha256=sha256)
