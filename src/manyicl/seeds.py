"""Random streams: each has its purpose in its seed, so that no two of them are ever the same stream.

Two streams with one seed are one stream: when training and evaluation both seeded numpy with (seed, task, number), the
shots of an evaluation were the very episodes that the model had been trained on. The generators of `world` are the
only others; each is seeded with a text that names what it writes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np

# Whose episodes a plan draws.
PlanPurpose = Literal["training", "validation losses", "held-out table", "one-pass curve"]
# Why questions are asked: to report the answers, or to choose a number of shots or a learning rate by them.
AskPurpose = Literal["evaluation", "choice of settings"]
Purpose = Literal[PlanPurpose, AskPurpose, "packing", "exchanged labels"]

# Raised whenever a stream changes. Kept with runs and results, so that nothing begun before the change is gone on with
# after it: half of its shots would be others.
STREAMS = 2


def make_stream(purpose: Purpose, seed: int, *parts: str | int) -> np.random.Generator:
    """Return the generator of one purpose. parts: what sets its streams apart, such as a task's name and a draw."""
    return np.random.default_rng(make_seed(purpose, seed, *parts))


def make_seed(purpose: Purpose, seed: int, *parts: str | int) -> int:
    """Return 128 bits that only the same purpose, seed and parts have: a hash of them as JSON.

    numpy's own lists of numbers will not do: it takes [5] and [5, 0] for the same seed.
    """
    digest = hashlib.sha256(json.dumps([purpose, seed, *parts]).encode()).digest()
    return int.from_bytes(digest[:16], "big")
