"""The seed model: a small pretrained language model of the world that ships with the package."""

from __future__ import annotations

from pathlib import Path

from manyicl.episodes import TemplateSettings

# Weights, tokenizer, card and training curve; made by scripts/train_seed.py.
SEED_MODEL = Path(__file__).parent / "seed_model"
# Plain prose of our own, which the seed model never read; to measure forgetting on.
NEUTRAL_TEXT = Path(__file__).parent / "neutral.txt"
# How the world's tasks are asked; no text that the seed model read looks like it.
TEMPLATE = TemplateSettings(input="{input} ->\n")
