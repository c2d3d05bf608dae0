"""Does a recipe's training step fit a device, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from manyicl.models import WeightCounts
from manyicl.planning.devices import Device
from manyicl.planning.footprint import (
    USABLE_SHARE,
    Footprint,
    MemoryPrediction,
    Row,
    choose_checkpointed_layers,
    measure_footprint,
    predict_memory,
)
from manyicl.training import Checkpointed, RunConfig, make_config

# An episode of fewer tokens holds hardly any shots; rather another device.
FEWEST_BUDGET_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Change:
    """What to change in a recipe (`key=value`, as on the command line), and what a step takes up then."""

    overrides: tuple[str, ...]
    total_bytes: int


def fits(prediction: MemoryPrediction, device: Device) -> bool:
    """Return whether a step fits what can be used of the device."""
    return prediction.total_bytes <= USABLE_SHARE * device.memory_bytes


def predict_recipe(config: RunConfig, footprint: Footprint, *, device: Device | None) -> MemoryPrediction:
    """Return the peak of the recipe's step as it stands.

    Of `train.checkpointed_layers = "auto"`, on `device`: as few layers as fit it; on none in particular, all.
    """
    setting = config.train.checkpointed_layers
    if setting == "auto" and device is not None:
        return predict_memory(footprint, choose_checkpointed_layers(footprint, free_bytes=device.memory_bytes))
    num_layers = min(setting, footprint.num_layers) if isinstance(setting, int) else footprint.num_layers
    return predict_memory(footprint, Checkpointed(num_layers, keeps_attention=setting != "whole"))


def suggest_changes(
    config: RunConfig, model_config: Any, *, row: Row, device: Device, weights: WeightCounts
) -> Change | None:
    """Return the gentlest change that fits `device`, None where none does.

    row: the recipe's largest. Each attempt keeps the changes of those before it; each is measured.
    """
    for overrides, changed in _iter_changes(config):
        num_tokens = row.num_tokens * changed.row_tokens // config.row_tokens
        num_targets = max(1, row.num_targets * num_tokens // row.num_tokens)
        smaller = replace(row, num_tokens=num_tokens, num_targets=num_targets, precision=changed.model.precision)
        if _least_bytes(changed, weights) > USABLE_SHARE * device.memory_bytes:
            continue  # the states alone do not fit
        footprint = measure_footprint(
            model_config, smaller, lora=changed.model.lora, trust_remote_code=changed.model.trust_remote_code
        )
        prediction = predict_recipe(changed, footprint, device=device)
        if fits(prediction, device):
            return Change(overrides=overrides, total_bytes=prediction.total_bytes)
    return None


def _least_bytes(config: RunConfig, weights: WeightCounts) -> int:
    """Return what a model takes up before any token goes through it."""
    if config.model.lora is None:
        return 16 * weights.base
    return (2 if config.model.precision == "bf16" else 4) * weights.base


def _iter_changes(config: RunConfig) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Yield (overrides, changed config), ever harsher: what costs time, then what changes the run."""
    chosen: dict[str, tuple[str, Any]] = {}

    def change(key: str, value: Any, written: str) -> tuple[tuple[str, ...], RunConfig]:
        chosen[key] = (written, value)
        values = config.model_dump()
        for name, (_, setting) in chosen.items():
            section, entry = name.split(".")
            values[section][entry] = setting
        return tuple(f"{name}={text}" for name, (text, _) in chosen.items()), make_config(values, source="plan")

    if config.train.checkpointed_layers not in ("auto", "whole"):
        yield change("train.checkpointed_layers", "auto", "auto")
    if config.train.packs_per_batch > 1:
        yield change("train.packs_per_batch", 1, "1")
    if config.model.precision == "fp32":
        yield change("model.precision", "bf16", "bf16")
    if config.model.lora is None:
        lora: dict[str, Any] = {}
        yield change("model.lora", lora, "{}")
    budget = config.episodes.token_budget // 2
    while budget >= FEWEST_BUDGET_TOKENS:
        if config.train.pack_tokens is not None:
            packed = max(budget, config.train.pack_tokens * budget // config.episodes.token_budget)
            chosen["train.pack_tokens"] = (str(packed), packed)
        yield change("episodes.token_budget", budget, str(budget))
        budget //= 2
