"""Evaluate in a process that kills itself with SIGKILL: `killed_evaluation.py OUT MODEL TASKS KIND NUMBER`.

KIND kept: after the NUMBER-th cell of this process is kept. KIND rename: when the NUMBER-th cell is written and not yet
renamed. KIND removed: when NUMBER parts of the finished evaluation are removed. It prints how many cells it asked.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.unfinished import Unfinished
from manyicl.tasks.task import load_tasks

asked = 0


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_cells(kind: str, number: int) -> None:
    original = Unfinished.write

    def write(self, predictions):
        global asked  # noqa: PLW0603
        asked += 1
        if asked == number and kind == "rename":
            Path.replace = die
        original(self, predictions)
        if asked == number and kind == "kept":
            die()

    Unfinished.write = write


def die_in_removal(number: int) -> None:
    original, seen = Path.unlink, 0

    def unlink(self, missing_ok=False):
        nonlocal seen
        original(self, missing_ok=missing_ok)
        # What the kill before left half-written is removed too, in the folder's own order; it does not count.
        seen += self.parent.name.endswith(".parts") and self.suffix == ".parquet"
        if seen == number:
            die()

    Path.unlink = unlink


if __name__ == "__main__":
    out, model, tasks, kind, number = sys.argv[1:]
    count_cells(kind, int(number))
    if kind == "removed":
        die_in_removal(int(number))
    evaluate(model, load_tasks(tasks), shots=(0, 2), draws=2, queries=4, out=out)
    print("asked", asked)
