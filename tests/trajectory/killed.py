"""Train in a process that kills itself with SIGKILL at a given moment: `killed.py RUN RECIPE KIND NUMBER`.

KIND batch: after the NUMBER-th micro-batch of this process. KIND save: inside the first save, at its NUMBER-th stage.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from manyicl.training import run as runs
from manyicl.training import trainer
from manyicl.training.recipe import load_recipe

# The stages of a save, in order: the model is written, then optimizer and schedule, then random states, then the
# whole folder is made durable; it bears no name yet.
STAGES = ("_save_optimizer_and_scheduler", "_save_rng_state", "sync_tree", "rename")


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_batches(number: int) -> None:
    seen = 0
    original = trainer.AnswerTrainer.training_step

    def counted(self, *arguments, **options):
        nonlocal seen
        result = original(self, *arguments, **options)
        seen += 1
        if seen == number:
            die()
        return result

    trainer.AnswerTrainer.training_step = counted


def die_in_save(stage: str) -> None:
    if stage == "sync_tree":
        trainer.sync_tree = die
    elif stage == "rename":
        Path.rename = die
    else:
        setattr(trainer.AnswerTrainer, stage, die)


def main() -> None:
    run, recipe, kind, number = sys.argv[1:]
    if kind == "batch":
        die_after_batches(int(number))
    elif kind == "save":
        die_in_save(STAGES[int(number)])
    folder = Path(run)
    runs.train(load_recipe(Path(recipe)), out=folder, resume=(folder / "config.toml").is_file())


if __name__ == "__main__":
    main()
