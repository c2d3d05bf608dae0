"""Does a recipe's training step fit a device, what would make it fit, and how many packs do its rows join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from manyicl.models import WeightCounts
from manyicl.planning.devices import Device
from manyicl.training import (
    USABLE_FRACTION,
    Footprint,
    MemoryPrediction,
    PacksChoice,
    Recompute,
    Row,
    RunConfig,
    count_states,
    fewest_recomputed,
    make_config,
    measure_footprint,
    predict_memory,
    resolve_packs,
    resolve_recompute,
)

# An episode of fewer tokens holds hardly any shots; rather another device.
FEWEST_BUDGET_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Change:
    """What to change in a recipe, and what a step takes then."""

    overrides: tuple[str, ...]
    """`key=value`, as `load_recipe` and the command line take them."""
    total_bytes: int
    """The predicted peak with the change."""


def predict_recipe(config: RunConfig, footprint: Footprint, *, device: Device | None) -> MemoryPrediction:
    """Return the peak of the recipe's step as it stands.

    With `train.recompute = "auto"` it is what training chooses on `device`; without a device none, as on a CPU.

    Raises:
        UserError: as `resolve_recompute`.
    """
    setting, fault = config.train.recompute, footprint.tiles_fault
    recompute = resolve_recompute(setting, num_layers=footprint.num_layers, tiles_fault=fault)
    if recompute is None and device is not None:
        recompute = fewest_recomputed(footprint, free_bytes=device.memory_bytes)
    return predict_memory(footprint, recompute or Recompute(0))


def join_packs(
    config: RunConfig,
    *,
    model_config: Any,
    pack_flops: float | None,
    row_of: Callable[[RunConfig], Row],
    device: Device | None,
    num_devices: int = 1,
) -> PacksChoice:
    """Return how many packs go through a device at once if the recipe leaves it to the device, as training chooses it.

    pack_flops, row_of: as `resolve_packs` takes them.
    """
    if device is None:
        return PacksChoice(1, "no device is named, and a CPU gains nothing from more")
    free = device.memory_bytes
    return resolve_packs(
        config, model_config=model_config, pack_flops=pack_flops, row_of=row_of, free_bytes=free, num_ranks=num_devices
    )


def suggest_changes(
    config: RunConfig, model_config: Any, *, row: Row, device: Device, weights: WeightCounts
) -> Change | None:
    """Return the gentlest change that fits `device`, or None if none does.

    row: the recipe's largest. Each attempt is measured.
    """
    own = measure_footprint(model_config, row, lora=config.model.lora, trust_remote_code=config.model.trust_remote_code)
    for overrides, changed in _iter_changes(config, tiles=not own.tiles_fault):
        num_tokens = row.num_tokens * changed.row_tokens // config.row_tokens
        num_targets = max(1, row.num_targets * num_tokens // row.num_tokens)
        model = changed.model
        smaller = replace(
            row, num_tokens=num_tokens, num_targets=num_targets, precision=model.precision, quantize=model.quantize
        )
        states = count_states(replace(weights, adapter=0, adapter_head=0), lora=model.lora, row=smaller)
        if sum(states.values()) > USABLE_FRACTION * device.memory_bytes:
            continue  # what stays between steps alone does not fit
        footprint = measure_footprint(model_config, smaller, lora=model.lora, trust_remote_code=model.trust_remote_code)
        prediction = predict_recipe(changed, footprint, device=device)
        if prediction.fits(device.memory_bytes):
            return Change(overrides=overrides, total_bytes=prediction.total_bytes)
    return None


def _iter_changes(config: RunConfig, *, tiles: bool) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Yield (overrides, changed config), ever harsher: what costs time, then what changes the run.

    Each change of the run is tried with all that saves memory at the cost of time, gentlest first: it may make enough
    room by itself. tiles: whether feed-forward parts can run in them.
    """
    own = config.train.recompute
    last = ["tiled"] if tiles else []
    more: dict[Any, list[Any]] = {"auto": [], "full": ["offload", *last], "offload": last, "tiled": []}
    settings = [own, *more.get(own, ["auto"])]
    for changes in _iter_run_changes(config):
        for setting in settings:
            recompute = {} if setting == own else {"train.recompute": (setting, setting)}
            chosen: dict[str, tuple[str, Any]] = {**recompute, **changes}
            if not chosen:
                continue
            # Where layers are recomputed or the base is in fewer bits, a graph that is asked for is refused.
            if config.train.cuda_graph is True and (setting != "none" or "model.quantize" in chosen):
                chosen["train.cuda_graph"] = ("auto", "auto")
            values = config.model_dump()
            for name, (_, value) in chosen.items():
                section, entry = name.split(".")
                values[section][entry] = value
            overrides = tuple(f"{name}={written}" for name, (written, _) in chosen.items())
            yield overrides, make_config(values, source="plan")


def _iter_run_changes(config: RunConfig) -> Iterator[dict[str, tuple[str, Any]]]:
    """Yield key -> (as it is written, value), beginning with none; each keeps those before it."""
    chosen: dict[str, tuple[str, Any]] = {}

    def change(key: str, value: Any, written: str) -> dict[str, tuple[str, Any]]:
        chosen[key] = (written, value)
        return chosen

    yield chosen
    if config.train.packs_at_once > 1:
        yield change("train.packs_per_batch", 1, "1")
    if config.model.precision == "fp32":
        yield change("model.precision", "bf16", "bf16")
    if config.model.lora is None:
        lora: dict[str, Any] = {}
        yield change("model.lora", lora, "{}")
    if config.model.quantize != "nf4":
        yield change("model.quantize", "nf4", "nf4")
    budget = config.episodes.token_budget
    if config.pack_tokens > budget:
        yield change("train.pack_tokens", budget, str(budget))
    while (budget := budget // 2) >= FEWEST_BUDGET_TOKENS:
        if config.train.pack_tokens is not None:
            chosen["train.pack_tokens"] = (str(budget), budget)
        yield change("episodes.token_budget", budget, str(budget))
