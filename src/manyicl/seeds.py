"""Random streams: each has its purpose in its seed, so that no two purposes share a stream.

Two streams with one seed are one stream. When training and evaluation both seeded numpy with (seed, task, number), the
shots of an evaluation were the very episodes that the model had been trained on. Only the generators of `demo` are
seeded elsewhere, each with a text that names what it writes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np

# What a plan of episodes is drawn for.
PlanPurpose = Literal["training", "validation losses", "held-out table", "one-pass curve"]
# Why a model is evaluated: to report its answers, or to choose a number of shots or a learning rate by them.
AskPurpose = Literal["evaluation", "choice of settings"]
Purpose = Literal[PlanPurpose, AskPurpose, "packing", "exchanged labels", "samples", "choices"]

# The version of all streams, raised whenever one changes. Runs and results keep it, so that work begun before a change
# is not resumed after it: half of its shots would be others.
STREAMS = 2


def make_stream(purpose: Purpose, seed: int, *parts: str | int) -> np.random.Generator:
    """Return the generator of one purpose.

    parts: tell the streams of that purpose apart, such as a task's name and the number of a draw.
    """
    return np.random.default_rng(make_seed(purpose, seed, *parts))


def make_seed(purpose: Purpose, seed: int, *parts: str | int) -> int:
    """Return a 128-bit seed: a hash of purpose, seed and parts as JSON.

    Not a list of numbers, which numpy also takes as a seed: to it, [5] and [5, 0] are the same.
    """
    digest = hashlib.sha256(json.dumps([purpose, seed, *parts]).encode()).digest()
    return int.from_bytes(digest[:16], "big")
