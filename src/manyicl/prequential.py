"""The prequential score of a run: what its answers cost in the first pass over the rows, each before it is trained on.

Every answer of that pass is predicted from rows before it alone, by the shots of its episode and by the updates made so
far, so it judges settings with no row kept from training (Dawid 1984; for fine-tuning on shots: arXiv 2512.19879).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manyicl.batches import PackDataset
from manyicl.metrics import MetricsLog
from manyicl.packing import Pack


def count_unseen_steps(packs: PackDataset) -> int:
    """Return how many optimizer steps there are before the first one that has an example for the second time."""
    for step in range(len(packs.divisors)):
        row: Sequence[Pack] = packs.packs[step * packs.packs_per_step : (step + 1) * packs.packs_per_step]
        if any(episode.epoch for pack in row for episode in pack.episodes):
            return step
    return len(packs.divisors)


def prequential_loss(run: Path, *, unseen_steps: int) -> float | None:
    """Return the mean training loss of a run's first `unseen_steps` steps, answers counting alike.

    None with fewer than two logged intervals in them: the first step's loss is the untrained model's, whatever the
    settings are.
    """
    logged = [record for record in MetricsLog(run / "metrics.jsonl").read() if "loss" in record]
    unseen = [record for record in logged if record["step"] <= unseen_steps]
    if len(unseen) < 2:
        return None
    return float(np.average([one["loss"] for one in unseen], weights=[one["answers"] for one in unseen]))
