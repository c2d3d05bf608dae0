"""Models that ship with the package: the seed model of the generated world, and an adapter on a real base."""

from __future__ import annotations

import os
from pathlib import Path

from manyicl.episodes import TemplateSettings

# Weights, tokenizer, card and training curve; made by scripts/train_seed.py.
SEED_MODEL = Path(__file__).parent / "seed_model"
# Plain prose of our own, which the seed model never read; to measure forgetting on.
NEUTRAL_TEXT = Path(__file__).parent / "neutral.txt"
# How the world's tasks are asked; no text that the seed model read looks like it.
TEMPLATE = TemplateSettings(input="{input} ->\n")

# The file in a base's folder that `make bases` writes last: where the weights come from, and their hash.
BASE_SOURCE = "SOURCE.json"
# An adapter on SmolLM2-135M-Instruct, trained by ManyICL; made by scripts/smollm2_many.py.
SMOLLM2_MANY = Path(__file__).parent / "smollm2_many"


def bases_folder() -> Path:
    """Return the folder that holds the real pretrained models of `make bases`."""
    if named := os.environ.get("MANYICL_BASES"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "manyicl" / "bases"


def find_built_base() -> Path | None:
    """Return the folder of SmolLM2-135M-Instruct that `make bases` has built; None if it has not."""
    folder = bases_folder() / "smollm2-135m"
    return folder if (folder / BASE_SOURCE).is_file() else None
