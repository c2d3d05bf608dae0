"""The decoder layers of a model in training: which are recomputed in the backward pass, and whether they are compiled.

A layer that is recomputed selectively keeps its input and what its attention kernel returned; all else that it needs
for its gradients is computed a second time. Attention is what grows with the square of the row: at 32k tokens it is a
third of a layer, at 128k two thirds, and its output is as large as the input. A layer that is recomputed in full keeps
its input alone, on the GPU or in the host's memory. Only as many layers are recomputed as memory requires, evenly
spread (`memory`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from manyicl.episodes import TokenizedEpisode, join_row
from manyicl.models import (
    decoder_layers,
    device_of,
    drops_attention,
    inner_model,
    isolation_fault,
    lean_pieces,
    replaced,
    row_attention,
    target_logits,
)
from manyicl.training.recompute.host_store import HostStore
from manyicl.training.recompute.tiles import Skipping, Tiles

# Tokens of the two rows that are measured.
MEASURED_TOKENS = (128, 256)
# Partitions forward and backward as inductor does but generates no kernels, so measuring takes seconds.
PARTITION_ONLY = "aot_eager_decomp_partition"
# What a compiled layer that is recomputed takes while it goes backward, in layers' worth of activations: more lives at
# once than uncompiled (1.3 by the footprint of a 7B shape). Selectively 2.4 as measured on an H200 at 32k and at 128k
# tokens; in full 2.1, on an H200 at 32k and an H100 at 96k tokens.
RECOMPUTED_WORK_COMPILED = 2.5
WHOLE_WORK_COMPILED = 2.1
# Variants of a layer that are compiled at most. Rows differ in the power of two above their longest segment, and the
# first layer in that its input needs no gradient; torch's own 8 are soon reached, and then it stops compiling.
MOST_VARIANTS = 64


@dataclass(frozen=True, slots=True)
class Recompute:
    """Which layers are recomputed in the backward pass: this many, evenly spread."""

    num_layers: int
    keep_attention: bool = True
    """They keep their attention's output (selective). Otherwise they are recomputed in full."""
    offload: bool = False
    """Their inputs wait for the backward pass in the host's memory; for layers that are recomputed in full."""
    tiles: bool = False
    """Their feed-forward parts run some tokens at a time (`tiles`); for layers that are recomputed in full."""


def spread(count: int, *, among: int) -> frozenset[int]:
    """Return `count` places among so many, evenly spread.

    >>> sorted(spread(3, among=12))
    [2, 6, 10]
    """
    return frozenset((2 * i + 1) * among // (2 * count) for i in range(count))


def measure_kept(model: nn.Module, *, autocast: bool = False, compiled: bool = False) -> float:
    """Return the bytes per token that a layer keeps for the backward pass, by two short rows.

    Their difference leaves out all that does not grow with the row. The model is run as it is, in training mode.
    autocast: as when products are in bfloat16 and weights in float32. compiled: as compiled layers keep it.
    """
    longest = max(MEASURED_TOKENS)
    isolation_fault(model, np.zeros(longest, dtype=np.int32), longest=longest)  # else its rows would be compiled for
    with prepared_layers(model, Recompute(0), compiled=compiled, backend=PARTITION_ONLY):
        short, long = (_kept_bytes(model, num_tokens=n, autocast=autocast) for n in MEASURED_TOKENS)
    return (long - short) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0]) / len(decoder_layers(model))


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


def cast_bytes(model: nn.Module) -> int:
    """Return the bytes of the bfloat16 copies that autocast keeps of the layers' float32 weights in a forward pass.

    Compiled layers keep none, and FSDP2's mixed precision gathers weights in bfloat16.
    """
    weights = [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim > 1]
    return sum(2 * p.numel() for p in weights if p.dtype == torch.float32)


def unwidened_inputs(model: nn.Module, *, autocast: bool) -> AbstractContextManager[None]:
    """Keep peft from casting what its float32 adapters read to float32, in the block, where autocast is on.

    The product is in bfloat16 there all the same, so that each adapter would cast twice and keep a copy of its own for
    the backward pass. The block must hold that too, since recomputation has to do what the forward pass did.
    """
    context: AbstractContextManager[None] = disable_input_dtype_casting(model, active=autocast)
    return context


@contextmanager
def prepared_layers(
    model: nn.Module, recompute: Recompute, *, compiled: bool, backend: str | None = "inductor"
) -> Iterator[AttentionChoice]:
    """Recompute layers in training, and run all of them compiled for the shapes they meet, in the block.

    Layers that are not compiled run their norms and rotary positions in fewer kernels (`lean_layers`).

    Yields whether recomputed layers keep their attention's output, as it turns out. backend: of torch.compile. What was
    compiled is dropped after the block, so that a process may have many runs: torch counts how often it compiles one
    function, and stops compiling at a limit without a warning.
    """
    layers = decoder_layers(model)
    chosen = spread(recompute.num_layers, among=len(layers)) if recompute.num_layers else frozenset()
    # With attention dropout a saved output and a recomputed layer would see different random masks, so attention is
    # recomputed too.
    choice = AttentionChoice(is_kept=recompute.keep_attention and not drops_attention(inner_model(model).config))
    store = HostStore(device_of(model), layers=sorted(chosen)) if recompute.offload else None
    skipping, backend = Skipping() if recompute.tiles else None, backend if compiled else None
    with ExitStack() as stack:
        if compiled:
            stack.callback(torch.compiler.reset)
        for number, layer in enumerate(layers):
            if compiled or number in chosen:
                how = choice if number in chosen else None
                if skipping is not None and number in chosen:
                    part: Any = layer.mlp
                    stack.enter_context(replaced(part, "forward", Tiles(part, skipping=skipping, backend=backend)))
                forward = _prepare(layer, recomputed=how, backend=backend, skipping=skipping)
                if store is not None and number in chosen:
                    forward = partial(_run_offloaded, store, number, forward)
                stack.enter_context(replaced(layer, "forward", forward))
        stack.enter_context(_compiling() if compiled else lean_pieces(model))
        yield choice


@dataclass(slots=True)
class AttentionChoice:
    """Whether recomputed layers keep their attention's output, of all layers, until one shows that it cannot."""

    is_kept: bool


def _prepare(
    layer: nn.Module, *, recomputed: AttentionChoice | None, backend: str | None, skipping: Skipping | None
) -> Callable[..., Any]:
    """Return a layer's forward.

    recomputed: in the backward pass, and how; None: not at all. backend: that compiles it; None: it is not compiled.
    skipping: leaves its feed-forward part out when it is recomputed; None: that runs again.
    """
    # Without what transformers wraps it in, which would recompute by its own rules.
    forward: Callable[..., Any] = getattr(type(layer).forward, "__wrapped__", type(layer).forward).__get__(layer)
    selective: Callable[..., Any] = partial(_recompute_selectively, forward)
    if backend is not None:
        forward = torch.compile(forward, dynamic=False, backend=backend)
        selective = torch.compile(selective, dynamic=False, backend=backend, fullgraph=True)
    if recomputed is None:
        return forward
    whole = partial(checkpoint, forward, use_reentrant=False)
    if skipping is not None:
        whole.keywords["context_fn"] = skipping.contexts
    return partial(_run, layer, forward, selective, whole, recomputed)


def _run(
    layer: nn.Module,
    forward: Callable[..., Any],
    selective: Callable[..., Any],
    whole: Callable[..., Any],
    choice: AttentionChoice,
    *args: Any,
    **options: Any,
) -> Any:
    """Run a layer forward, to be recomputed where there will be a backward pass."""
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    if choice.is_kept:
        try:
            return selective(*args, **options)
        except torch._dynamo.exc.Unsupported:
            # Attention that is not a single kernel is not compiled, and nothing around it would be. So what is compiled
            # is recomputed in full.
            choice.is_kept = False
    return whole(*args, **options)


def _run_offloaded(
    store: HostStore, number: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **options: Any
) -> Any:
    """Run a recomputed layer forward, with its input kept in `store`."""
    if not torch.is_grad_enabled():
        return forward(hidden, *args, **options)
    with store.keeping(number, hidden):
        return forward(hidden, *args, **options)


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
