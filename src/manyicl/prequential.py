"""The prequential score: one pass over rows that a model was not trained on, each row then a shot of the next.

So every answer is predicted from rows before it alone, and all of them count (Dawid 1984; for models fine-tuned on
shots: arXiv 2512.19879). A trial of settings trains on one half of the train rows and is scored on the other; the model
that is kept trains on both, so that choosing costs it no row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manyicl.evaluation import AskedModel, one_pass_curve
from manyicl.files import write_atomically
from manyicl.tasks import Task


def write_halves(folder: Path, tasks: Sequence[Task]) -> None:
    """Write task files whose train rows are every other train row of the tasks, and whose test rows are the rest.

    As of any task, some of those train rows are set aside for validation when it is loaded.
    """
    for task in tasks:
        rows = [
            {"input": example.input, "answer": example.answer, "split": "test" if number % 2 else "train"}
            | ({"options": list(example.options)} if example.options else {})
            for number, example in enumerate(task.train)
        ]
        settings: dict[str, str | list[str]] = {
            "family": task.family,
            "metric": task.metric,
            "instruction": task.instruction,
        }
        if task.labels:
            settings["labels"] = list(task.labels)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{task.name}.task.json", json.dumps(settings, indent=1) + "\n")
        write_atomically(folder / f"{task.name}.jsonl", lines)


def prequential_nats(asked: AskedModel, tasks: Sequence[Task], *, seed: int) -> dict[str, float]:
    """Return the mean nats of an answer of each task's test rows, in episodes as long as the model can be asked."""
    most = max(len(task.test) for task in tasks)
    curves = one_pass_curve(asked, tasks, episodes=most, seed=seed).curves
    return {
        curve.task: float(
            np.average([cell.nll for cell in curve.cells], weights=[cell.num_scored for cell in curve.cells])
        )
        for curve in curves
    }
