"""Evaluate on several ranks of which one fails at its first cell: `failing_rank.py RANK MODEL TASKS`.

Each rank prints how many cells it asked.
"""

from __future__ import annotations

import os
import sys
import time

from manyicl.cli import app
from manyicl.errors import UserError
from manyicl.evaluation import loop

asked = 0


def fail_on(rank: str) -> None:
    original = loop.answer_draw

    def answer_draw(*arguments, **options):
        global asked  # noqa: PLW0603
        for cell in original(*arguments, **options):
            if os.environ["RANK"] == rank:
                raise UserError(f"rank {rank} has met something")
            asked += 1
            time.sleep(1)  # so that the other has failed when this one looks
            yield cell

    loop.answer_draw = answer_draw


if __name__ == "__main__":
    rank, model, tasks = sys.argv[1:]
    fail_on(rank)
    sys.argv = ["manyicl", "eval", model, "--tasks", tasks, "--shots", "0,1,2", "--draws", "4", "--queries", "3"]
    try:
        app.main()
    finally:
        print(f"asked {asked}\n", end="")
