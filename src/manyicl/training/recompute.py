"""The decoder layers of a model in training: which are recomputed in the backward pass, and whether they are compiled.

A recomputed layer keeps its input and what its attention kernel gave; all else that it needs for its gradients is
computed a second time. Attention is what grows with the square of the row: at 32k tokens it is a third of a layer, at
128k two thirds, and its output is as large as the input. Only as many layers are recomputed as memory asks, evenly
spread; where all of them are not enough, their attention is recomputed too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from manyicl.episodes import TokenizedEpisode, join_row
from manyicl.errors import UserError
from manyicl.models import (
    MOST_LOGITS,
    caps_scores,
    decoder_layers,
    drops_attention,
    head_dims,
    inner_model,
    layer_values,
    lean_pieces,
    row_attention,
    target_logits,
)

# "auto": as many as memory asks; "all"; "whole": all, and their attention too; or that many.
CheckpointedLayers = int | Literal["auto", "all", "whole"]
# Of the memory that is free before the first step; the rest is for what the allocator loses to fragments.
FREE_SHARE = 0.9
# Tokens of the two rows that are measured.
MEASURED_TOKENS = (128, 256)
# What a compiled layer keeps, this decides as inductor does (the same partition); without a kernel it takes seconds.
PARTITION_ONLY = "aot_eager_decomp_partition"
# What a layer that is recomputed takes up while it goes backward, in layers; compiled, more lives at once. Of a 7B
# shape: 1.3 by its footprint, and 2.4 as measured on an H200 at 32k and at 128k tokens; recomputed as a whole 2.1, on
# an H200 at 32k and an H100 at 96k tokens.
RECOMPUTED_WORK = 1.3
RECOMPUTED_WORK_COMPILED = 2.5
WHOLE_WORK_COMPILED = 2.1
# Variants of a layer that are compiled at most. Rows differ in the power of two above their longest segment, and the
# first layer in that its input needs no gradient; torch's own 8 are soon reached, and then it stops compiling.
MOST_VARIANTS = 64
# A logit in the model's precision, its float32 copy, and the gradients of both.
LOGIT_BYTES = 12
# Units of FSDP2 that are whole at once: one at work, the next one's weights, and the last one's gradients.
GATHERED_UNITS = 3
# Of a trained weight: a float32 gradient and AdamW's two moments.
TRAINED_BYTES = 12


@dataclass(frozen=True, slots=True)
class ActivationCost:
    """What a model keeps for its backward pass, a token.

    layer_bytes: of one layer. input_bytes: of its input. attention_bytes: of its attention's output, which a recomputed
    layer keeps too. work_bytes: what such a layer takes up beside that while it goes backward.
    """

    layer_bytes: float
    input_bytes: float
    attention_bytes: float
    work_bytes: float


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """Which layers are recomputed in the backward pass: so many, evenly spread.

    keeps_attention: they keep their attention's output. Without it they are recomputed as a whole.
    """

    num_layers: int
    keeps_attention: bool = True


def spread(count: int, *, among: int) -> frozenset[int]:
    """Return `count` places among so many, evenly spread.

    >>> sorted(spread(3, among=12))
    [2, 6, 10]
    """
    return frozenset((2 * i + 1) * among // (2 * count) for i in range(count))


def measure_activations(model: nn.Module, *, autocast: bool = False, compiled: bool = False) -> ActivationCost:
    """Return what a token costs, by what the layers keep of two short rows: their difference leaves out all else.

    The model is run as it stands, in training mode. autocast: as when products are in bfloat16 and weights in float32.
    compiled: as compiled layers keep it, which is less.
    """
    with prepared_layers(model, Checkpointed(0), compiled=compiled, backend=PARTITION_ONLY):
        short, long = (_kept_bytes(model, num_tokens=n, autocast=autocast) for n in MEASURED_TOKENS)
    layer_bytes = (long - short) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0]) / len(decoder_layers(model))
    return ActivationCost(
        layer_bytes=layer_bytes,
        input_bytes=_input_bytes(model),
        attention_bytes=_attention_bytes(model, autocast=autocast),
        work_bytes=layer_bytes * (RECOMPUTED_WORK_COMPILED if compiled else RECOMPUTED_WORK),
    )


def _input_bytes(model: nn.Module) -> float:
    """Return what a layer's input takes up of a token."""
    return float(next(model.parameters()).element_size() * inner_model(model).config.get_text_config().hidden_size)


def _attention_bytes(model: nn.Module, *, autocast: bool) -> float:
    """Return what a recomputed layer keeps of its attention, a token: output and log-sum-exp of each head.

    Nothing is kept where its scores are capped (they have no kernel) or dropped.
    """
    config = inner_model(model).config.get_text_config()
    if caps_scores(config) or drops_attention(model):
        return 0.0
    size = 2 if autocast else next(model.parameters()).element_size()
    heads, dims = layer_values(config, "num_attention_heads", default=1), head_dims(config)
    return float(max(head * (size * dim + 4) for head, dim in zip(heads, dims, strict=True)))


def _kept_bytes(model: nn.Module, *, num_tokens: int, autocast: bool) -> int:
    """Return the bytes that all layers keep for the backward pass of one row, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    device = next(model.parameters()).device
    ids = np.zeros(num_tokens, dtype=np.int32)
    episode = TokenizedEpisode(ids=ids, spans=np.array([[num_tokens - 1, num_tokens]]))
    batch = join_row([episode], targets="all", weights=[np.ones(1)], tasks=[0], episodes=(0,)).to(device)
    hooks: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that held its own output would never be freed

    def enter(*_: Any) -> None:
        hooks.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        hooks[-1].__enter__()

    def leave(*_: Any) -> None:
        hooks.pop().__exit__()

    layers, training = decoder_layers(model), model.training
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    model.train()
    try:
        with (
            row_attention(model, ids, longest=num_tokens),
            unwidened_inputs(model, autocast=autocast),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        ):
            logits_NV = target_logits(model, batch)  # holds all that was kept, so that no storage is counted twice
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    del logits_NV
    return sum(kept.values())


def fewest_checkpointed(cost: ActivationCost, *, num_layers: int, num_tokens: int, free_bytes: float) -> Checkpointed:
    """Return how few layers are to be recomputed so that a row of `num_tokens` fits `free_bytes`.

    Where all of them do not fit, they are recomputed as a whole.

    >>> cost = ActivationCost(layer_bytes=10.0, input_bytes=0.5, attention_bytes=0.5, work_bytes=10.0)
    >>> [fewest_checkpointed(cost, num_layers=4, num_tokens=2, free_bytes=b).num_layers for b in (80, 70, 60, 10)]
    [0, 2, 3, 4]
    >>> [fewest_checkpointed(cost, num_layers=4, num_tokens=2, free_bytes=b).keeps_attention for b in (30, 26)]
    [True, False]
    """
    for count in range(num_layers + 1):
        chosen = Checkpointed(count)
        if activation_bytes(cost, chosen, num_layers=num_layers, num_tokens=num_tokens) <= free_bytes:
            return chosen
    return Checkpointed(num_layers, keeps_attention=False)


def activation_bytes(cost: ActivationCost, chosen: Checkpointed, *, num_layers: int, num_tokens: int) -> float:
    """Return what the layers hold at the peak of a backward pass.

    That is what recomputed layers keep, all of the others, and the work of one that is being recomputed.
    """
    recomputed = cost.input_bytes + (cost.attention_bytes if chosen.keeps_attention else 0.0)
    kept = chosen.num_layers * recomputed + (num_layers - chosen.num_layers) * cost.layer_bytes
    return num_tokens * (kept + (cost.work_bytes if chosen.num_layers else 0.0))


def choose_checkpointed(
    model: nn.Module,
    setting: CheckpointedLayers,
    *,
    row_tokens: int,
    autocast: bool = False,
    compiled: bool = False,
    num_shards: int = 1,
) -> Checkpointed:
    """Return which layers are recomputed; "auto" asks a GPU for its free memory, and is none on a CPU.

    row_tokens: of the longest row. The model must be on its device, without a wrapper that shards it. num_shards: of
    FSDP2, which will shard it.

    Raises:
        UserError: more layers than the model has.
    """
    layers = decoder_layers(model)
    if isinstance(setting, int):
        if setting > len(layers):
            raise UserError(
                f"train.checkpointed_layers = {setting}: the model has {len(layers)} layers; say that at most, or 'all'"
            )
        return Checkpointed(setting)
    if setting != "auto":
        return Checkpointed(len(layers), keeps_attention=setting == "all")
    device = next(model.parameters()).device
    if device.type != "cuda" or not layers:
        return Checkpointed(0)
    cost = measure_activations(model, autocast=autocast, compiled=compiled)
    torch.cuda.empty_cache()
    free_bytes = torch.cuda.mem_get_info(device)[0]
    if autocast and not compiled and num_shards == 1:
        free_bytes -= cast_bytes(model)
    room = activation_room(model, free_bytes=free_bytes, num_shards=num_shards)
    return fewest_checkpointed(cost, num_layers=len(layers), num_tokens=row_tokens, free_bytes=room)


def cast_bytes(model: nn.Module) -> int:
    """Return the bytes of the bfloat16 copies that autocast keeps of the layers' float32 weights in a forward pass.

    Compiled layers keep none, and FSDP2's mixed precision gathers weights in bfloat16.
    """
    weights = [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim > 1]
    return sum(2 * p.numel() for p in weights if p.dtype == torch.float32)


def activation_room(model: nn.Module, *, free_bytes: int, num_shards: int = 1) -> float:
    """Return what activations may take up where `free_bytes` are free with the whole model loaded.

    num_shards: GPUs that will share weights, gradients and optimizer (FSDP2), and gather units of them for a moment.
    """
    room: float = free_bytes - MOST_LOGITS["cuda"] * LOGIT_BYTES
    room -= TRAINED_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad) / num_shards
    if num_shards > 1:
        room += sum(p.nbytes for p in model.parameters()) * (1 - 1 / num_shards)
        inner = inner_model(model)
        units = [*decoder_layers(model), inner.get_input_embeddings(), inner.get_output_embeddings()]
        room -= GATHERED_UNITS * max(sum(p.nbytes for p in unit.parameters()) for unit in units if unit is not None)
    return max(0.0, FREE_SHARE * room)


def unwidened_inputs(model: nn.Module, *, autocast: bool) -> AbstractContextManager[None]:
    """Keep peft from casting what its float32 adapters read to float32, in the block, where autocast is on.

    The product is in bfloat16 there all the same, so that each adapter would cast twice and keep a copy of its own for
    the backward pass. The block must hold that too, since recomputation has to do what the forward pass did.
    """
    context: AbstractContextManager[None] = disable_input_dtype_casting(model, active=autocast)
    return context


@contextmanager
def prepared_layers(
    model: nn.Module, checkpointed: Checkpointed, *, compiled: bool, backend: str = "inductor"
) -> Iterator[AttentionChoice]:
    """Recompute layers in training, and run all of them compiled for the shapes they meet, in the block.

    Layers that are not compiled run their norms and rotary positions in fewer kernels (`lean_layers`).

    Yields whether recomputed layers keep their attention's output, as it turns out. backend: of torch.compile. What was
    compiled is dropped after the block, so that a process may have many runs: torch counts how often it compiles one
    function, and stops compiling at a limit without a warning.
    """
    layers = decoder_layers(model)
    chosen = spread(checkpointed.num_layers, among=len(layers)) if checkpointed.num_layers else frozenset()
    before = [vars(layer).get("forward") for layer in layers]
    # Kept, attention that drops weights would not draw again, and what draws behind it would draw otherwise.
    choice = AttentionChoice(keeps_attention=checkpointed.keeps_attention and not drops_attention(model))
    try:
        for number, layer in enumerate(layers):
            if compiled or number in chosen:
                how = choice if number in chosen else None
                layer.forward = _prepare(layer, recomputed=how, backend=backend if compiled else None)
        with _compiling() if compiled else lean_pieces(model):
            yield choice
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward
        if compiled:
            torch.compiler.reset()


@dataclass(slots=True)
class AttentionChoice:
    """Whether recomputed layers keep their attention's output, of all layers, until one shows that it cannot."""

    keeps_attention: bool


def _prepare(layer: nn.Module, *, recomputed: AttentionChoice | None, backend: str | None) -> Callable[..., Any]:
    """Return a layer's forward.

    recomputed: in the backward pass, and how; None: not at all. backend: that compiles it; None: it is not compiled.
    """
    # Without what transformers wraps it in, which would recompute by its own rules.
    forward: Callable[..., Any] = getattr(type(layer).forward, "__wrapped__", type(layer).forward).__get__(layer)
    selective: Callable[..., Any] = partial(_recompute_selectively, forward)
    if backend is not None:
        forward = torch.compile(forward, dynamic=False, backend=backend)
        selective = torch.compile(selective, dynamic=False, backend=backend, fullgraph=True)
    return forward if recomputed is None else partial(_run, layer, forward, selective, recomputed)


def _run(
    layer: nn.Module,
    forward: Callable[..., Any],
    selective: Callable[..., Any],
    choice: AttentionChoice,
    *args: Any,
    **options: Any,
) -> Any:
    """Run a layer forward, to be recomputed where there will be a backward pass."""
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    if choice.keeps_attention:
        try:
            return selective(*args, **options)
        except torch._dynamo.exc.Unsupported:
            # Attention that is no single kernel is not compiled, and nothing around it would be. So what is compiled
            # is recomputed as a whole.
            choice.keeps_attention = False
    return checkpoint(forward, *args, use_reentrant=False, **options)


def _recompute_selectively(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_attention_kept, **options)


def _attention_kept() -> Any:
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Keep what attention kernels return, of whatever backend (aten's names, varlen attention's, the footprint's)."""
    is_attention = any(name in str(operation) for name in ("attention", "attn"))
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _compiling() -> Iterator[None]:
    """Let torch compile enough variants, and keep it from warning each user of operations in place.

    Such an operation would be recomputed wrongly, uncompiled too; the families that are tested have none. What is
    compiled is a layer, so DDP can send gradients between layers as it is; torch's splitting of graphs is for whole
    models, and would cut each layer at DDP's first bucket.
    """
    warner = logging.getLogger("torch._higher_order_ops.wrap")
    level = warner.level
    warner.setLevel(logging.ERROR)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS, optimize_ddp=False):
            yield
    finally:
        warner.setLevel(level)
