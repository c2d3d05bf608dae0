"""How much memory a training step takes, and so which layers are recomputed and how many packs a row joins.

The one predictor: `manyicl plan` uses it for the device that is named, training for the one that it runs on.
`footprint` measures the parts of a prediction. Memory may be at its peak when the head is at work (all layers are
forward; logits of targets and their gradients), when a kept layer goes backward, or when a recomputed one goes forward
once more and then backward. Not counted: the device's own context, and what an allocator loses between tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from manyicl.episodes import power_of_two
from manyicl.errors import UserError
from manyicl.inference import process_memory
from manyicl.models import LoraSettings, decoder_layers, device_of, inner_model
from manyicl.training.memory.footprint import Footprint, Row, measure_footprint
from manyicl.training.memory.host import free_host_memory
from manyicl.training.recipe import RecomputeSetting, RunConfig, with_batch
from manyicl.training.recompute.host_store import INPUTS_AT_ONCE
from manyicl.training.recompute.layers import Recompute, spread
from manyicl.training.recompute.tiles import tiles_fault

# Of free memory, what is counted on: allocators lose some between tensors, and libraries take workspaces.
USABLE_FRACTION = 0.92
# Model FLOPs, forward and backward, of a pass that keeps a GPU at work; with fewer it waits for its host, which starts
# the kernels. Packs are joined until a row has so many. On an H200 a 7B shape gains 1.8 times from 6e13 to 1.2e14, and
# 3 % from there to 2.3e14; a 1B shape still gains 15 % from 3.4e13 to 6.8e13 (docs/performance.md).
FEWEST_PASS_FLOPS = 1e14
# Of joined packs: beyond it rows gain nothing, and their logits and their segments' bounds would take memory.
MOST_JOINED_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class GpuShare:
    """What a process may count on of the GPU memory that it can have."""

    fraction: float = 1.0
    """So much of it for a row of joined packs; the rest is for others, who see it free as well."""
    is_part: bool = False
    """Whether it is a part of the GPU by itself, beside other processes at work. They wait for each other's kernels one
    at a time, so that long rows are worth more than layers that need not be recomputed (docs/log.md)."""


WHOLE_GPU = GpuShare()


@dataclass(frozen=True, slots=True)
class PacksChoice:
    """How many packs go through a rank at once."""

    number: int
    reason: str
    """Why so many, in words."""


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Bytes on one device at the peak of a step, by part; the parts add up to `total_bytes`."""

    weights_bytes: int
    """Of the base."""
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """What the optimizer keeps."""
    gathered_bytes: int
    """Of units that are whole at once although weights are sharded; 0 without FSDP2."""
    layers_bytes: int
    """Activations of layers that are not recomputed."""
    recomputed_bytes: int
    """What recomputed layers keep: their inputs, unless they are in the host's memory, and, if they keep it, their
    attention's outputs."""
    work_bytes: int
    """What exists beside them only for a moment."""
    moment: str
    """Which moment: 'head' (logits of targets and their gradients), 'layer' (a layer that was kept goes backward) or
    'recompute' (a recomputed one does, forward first)."""
    recompute: Recompute
    host_bytes: int = 0
    """Of the host's memory, for the inputs of recomputed layers; torch rounds each up to a power of two."""

    @property
    def states_bytes(self) -> int:
        """What stays between steps."""
        return self.weights_bytes + self.adapters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def activations_bytes(self) -> int:
        """What a forward and backward pass needs beside it."""
        return self.layers_bytes + self.recomputed_bytes + self.work_bytes

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return self.states_bytes + self.gathered_bytes + self.activations_bytes

    def fits(self, memory_bytes: int) -> bool:
        """Return whether a step fits what can be used of a device's memory."""
        return self.total_bytes <= USABLE_FRACTION * memory_bytes


def predict_memory(footprint: Footprint, recompute: Recompute) -> MemoryPrediction:
    """Return the peak of a step with layers recomputed, spread as training spreads them."""
    num_layers, head, layer = footprint.num_layers, footprint.head, footprint.layer
    chosen = spread(recompute.num_layers, among=num_layers) if recompute.num_layers else frozenset()
    in_host = max(0, len(chosen) - INPUTS_AT_ONCE) if recompute.offload else 0
    # Bytes of (layers kept, what recomputed ones keep, work) at each moment.
    each, work = head.added_by(recompute)
    work = work if num_layers - 1 in chosen else head.work_kept
    saved = len(chosen) * each - in_host * layer.whole
    moments = [("head", ((num_layers - len(chosen)) * head.kept, saved, work))]
    each, work_again = layer.added_by(recompute)
    for place in range(num_layers):  # its turn to go backward: what later layers kept is gone
        inputs = len([number for number in chosen if number <= place])
        kept = place + 1 - inputs
        on_device = min(inputs, INPUTS_AT_ONCE) if recompute.offload else inputs
        name, work = ("recompute", work_again) if place in chosen else ("layer", layer.work_kept)
        moments.append((name, (kept * layer.kept, on_device * each, work)))
    moment, (kept, inputs, work) = max(moments, key=lambda item: sum(item[1]))
    return MemoryPrediction(
        weights_bytes=footprint.weights_bytes,
        adapters_bytes=footprint.adapters_bytes,
        gradients_bytes=footprint.gradients_bytes,
        optimizer_bytes=footprint.optimizer_bytes,
        gathered_bytes=footprint.gathered_bytes,
        layers_bytes=kept,
        recomputed_bytes=inputs,
        work_bytes=work,
        moment=moment,
        # Attention whose weights are dropped or whose scores are capped leaves no output that could be kept.
        recompute=replace(recompute, keep_attention=recompute.keep_attention and layer.recomputed > layer.whole),
        host_bytes=len(chosen) * power_of_two(layer.whole) if recompute.offload else 0,
    )


def fewest_recomputed(footprint: Footprint, *, free_bytes: int, host_bytes: int | None = None) -> Recompute:
    """Return the fewest layers to recompute so that a step fits.

    If even all selectively do not fit, all are recomputed in full; if that does not fit either, from inputs in the
    host's memory, and then in tiles, if they help and the host has room; if nothing fits, what takes the least.

    free_bytes: of the device before the weights are on it. host_bytes: of the host's memory that is free; None if it is
    not known, and is not looked at.
    """
    for num_layers in range(footprint.num_layers + 1):
        chosen = Recompute(num_layers)
        if predict_memory(footprint, chosen).fits(free_bytes):
            return chosen
    whole = Recompute(footprint.num_layers, keep_attention=False)
    offload = replace(whole, offload=True)
    ways = [whole, offload, *([] if footprint.tiles_fault else [replace(offload, tiles=True)])]
    predicted = {way: predict_memory(footprint, way) for way in ways}
    possible = [way for way in ways if _has_room(predicted[way].host_bytes, host_bytes)]
    least = min(possible, key=lambda way: predicted[way].total_bytes)
    return next((way for way in possible if predicted[way].fits(free_bytes)), least)


def _has_room(num_bytes: int, host_bytes: int | None) -> bool:
    """Return whether the host's free memory holds so many bytes; if it is not known, it does."""
    return host_bytes is None or num_bytes <= USABLE_FRACTION * host_bytes


def _tell_shortage(footprint: Footprint, chosen: Recompute, *, free_bytes: int, host_bytes: int | None) -> str:
    """Return that a step does not fit with what 'auto' has chosen, in numbers; '' if it does."""
    memory = predict_memory(footprint, chosen)
    if memory.fits(free_bytes):
        return ""
    offload = Recompute(footprint.num_layers, keep_attention=False, offload=True)
    wanted, told = predict_memory(footprint, offload).host_bytes, ""
    if host_bytes is not None and not _has_room(wanted, host_bytes):
        told = f"; inputs of layers need {_gib(wanted)} of the host's memory, of which {_gib(host_bytes)} are free"
    return (
        f"train.recompute = 'auto': a step is predicted to take {_gib(memory.total_bytes)} with all layers recomputed,"
        f" and {_gib(int(USABLE_FRACTION * free_bytes))} of the GPU's memory can be counted on{told}; `manyicl plan`"
        " with the device's name tells what would fit"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def resolve_recompute(setting: RecomputeSetting, *, num_layers: int, tiles_fault: str = "") -> Recompute | None:
    """Return what a setting says of a model with so many layers; None for "auto", which is for the device to say.

    tiles_fault: why its feed-forward parts cannot run in tiles.

    Raises:
        UserError: more layers than the model has, or tiles that it cannot run in.

    >>> resolve_recompute("full", num_layers=32)
    Recompute(num_layers=32, keep_attention=False, offload=False, tiles=False)
    """
    if isinstance(setting, int):
        if setting > num_layers:
            raise UserError(
                f"train.recompute = {setting}: the model has {num_layers} layers; set at most that, or 'selective'"
            )
        return Recompute(setting)
    if setting == "auto":
        return None
    if setting == "none":
        return Recompute(0)
    tiles = setting == "tiled"
    if tiles and tiles_fault:
        raise UserError(f"train.recompute = 'tiled': {tiles_fault}; set 'offload'")
    return Recompute(num_layers, setting == "selective", offload=setting in ("offload", "tiled"), tiles=tiles)


def choose_recompute(
    model: nn.Module,
    setting: RecomputeSetting,
    *,
    row: Row,
    lora: LoraSettings | None = None,
    trust_remote_code: bool = False,
    num_shards: int = 1,
    free_bytes: int | None = None,
) -> Recompute:
    """Return which layers are recomputed; "auto" is what `fewest_recomputed` finds on a GPU, and none on a CPU.

    It warns if a step is predicted not to fit.

    row: the largest that is trained on. lora: of the adapter that the model is in. num_shards: GPUs that FSDP2 will
    shard the model over. free_bytes: of the device before the model is on it; None reads it from the GPU that the model
    is on, without a wrapper that shards it.

    Raises:
        UserError: as `resolve_recompute`.
    """
    layers = decoder_layers(model)
    chosen = resolve_recompute(setting, num_layers=len(layers), tiles_fault=tiles_fault(layers))
    if chosen is not None:
        return chosen
    device = device_of(model)
    if free_bytes is None and device.type == "cuda":
        free_bytes = free_memory(device)
    if free_bytes is None or not layers:
        return Recompute(0)
    try:
        config = inner_model(model).config
        footprint = measure_footprint(
            config, row, lora=lora, trust_remote_code=trust_remote_code, num_shards=num_shards
        )
    except UserError as error:
        warnings.warn(f"{error}; so all layers are recomputed: set train.recompute to change that", stacklevel=2)
        return Recompute(len(layers), keep_attention=False)
    host_bytes = free_host_memory()
    chosen = fewest_recomputed(footprint, free_bytes=free_bytes, host_bytes=host_bytes)
    if shortage := _tell_shortage(footprint, chosen, free_bytes=free_bytes, host_bytes=host_bytes):
        warnings.warn(shortage, stacklevel=2)
    return chosen


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can have, those that it holds by now included."""
    torch.cuda.empty_cache()
    return process_memory(device)


def choose_packs(num_packs: int, *, pack_tokens: int, pack_flops: float, fits: Callable[[int], bool]) -> PacksChoice:
    """Return how many packs a row joins: as few as keep a GPU at work, or as many as there is room for.

    num_packs: of a rank in one optimizer step; what is chosen divides it. pack_tokens: of the longest pack. pack_flops:
    of a pass of one pack. fits: whether a row of so many packs fits the device, asked of more than one alone.

    >>> choose_packs(8, pack_tokens=4096, pack_flops=3e13, fits=lambda number: True).number  # 1.2e14 in a pass of four
    4
    >>> choose_packs(8, pack_tokens=4096, pack_flops=3e13, fits=lambda number: number < 4).number
    2
    """
    counts = [n for n in range(1, num_packs + 1) if num_packs % n == 0]
    short = [n for n in counts if n == 1 or n * pack_tokens <= MOST_JOINED_TOKENS]
    enough = next((n for n in short if n * pack_flops >= FEWEST_PASS_FLOPS), short[-1])
    number = next(n for n in reversed(short) if n <= enough and (n == 1 or fits(n)))
    if number < enough:
        return PacksChoice(number, "more would not fit the memory")
    if number * pack_flops >= FEWEST_PASS_FLOPS:
        return PacksChoice(number, f"a pass has {number * pack_flops:.2g} FLOPs, which keep a GPU at work")
    if number < counts[-1]:
        return PacksChoice(number, f"a row has {MOST_JOINED_TOKENS:,} tokens at most")
    return PacksChoice(number, "all that a step has for a rank")


def resolve_packs(
    config: RunConfig,
    *,
    model_config: object,
    pack_flops: float | None,
    row_of: Callable[[RunConfig], Row],
    free_bytes: int | None,
    num_ranks: int = 1,
    num_shards: int = 1,
    gpu_share: GpuShare = WHOLE_GPU,
) -> PacksChoice:
    """Return how many packs go through a rank at once if the recipe leaves it to the device.

    A row of several packs must fit with no more recomputed layers than a row of one needs, or with those that the
    recipe fixes; beside other processes with all layers recomputed. pack_flops: of a pass of one pack, on average; None
    if they are not known. row_of: returns the largest row of a recipe whose number is resolved. free_bytes: of a GPU
    before the model is on it; None on a CPU. num_shards: as `choose_recompute` takes it.
    """
    if free_bytes is None:
        return PacksChoice(1, "a CPU gains nothing from more")
    if pack_flops is None:
        return PacksChoice(1, "the model's FLOPs are not known")
    per_rank, rest = divmod(config.train.packs_per_step, num_ranks)
    if rest:
        return PacksChoice(1, f"{num_ranks} ranks cannot share the {config.train.packs_per_step} packs of a step")

    @cache
    def measure(number: int) -> Footprint:
        model, row = config.model, row_of(with_batch(config, number))
        trust = model.trust_remote_code
        return measure_footprint(model_config, row, lora=model.lora, trust_remote_code=trust, num_shards=num_shards)

    def fits(number: int) -> bool:
        one = measure(1)
        fixed = resolve_recompute(config.train.recompute, num_layers=one.num_layers, tiles_fault=one.tiles_fault)
        most = Recompute(one.num_layers, keep_attention=False) if gpu_share.is_part else None
        recompute = fixed or most or fewest_recomputed(one, free_bytes=free_bytes)
        return predict_memory(measure(number), recompute).fits(int(gpu_share.fraction * free_bytes))

    try:
        return choose_packs(per_rank, pack_tokens=config.pack_tokens, pack_flops=pack_flops, fits=fits)
    except UserError as error:
        return PacksChoice(1, f"the memory of more is not known: {error}")
