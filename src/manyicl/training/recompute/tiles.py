"""The feed-forward part of a recomputed layer, some tokens at a time.

What a layer makes between its input and its output is largest in its feed-forward part: several tensors of the inner
width, 3.5 times the model's in Mistral 7B, of all tokens of the row. That part treats each token alone, so a tile of
tokens can go forward and backward before the next one begins, and the tensors of one tile are all there is. Nothing is
computed more often than if the layer is recomputed in full: when it runs forward once more, its feed-forward part is
left out, since only the sum behind it would read what it gives, and each tile runs once more right before it goes
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

# Tokens of a tile. So many keep a GPU at work in the products of a 7B: rows of 32,768 tokens are 1 to 2 % slower than
# without tiles, on a base in 4 bits 6 % (docs/performance.md).
TILE_TOKENS = 4096
# Layers whose last step adds what their feed-forward part, `mlp`, gives to what went into it.
KNOWN = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, GemmaDecoderLayer)


def tiles_fault(layers: list[nn.Module]) -> str:
    """Return why the feed-forward parts of these layers cannot run in tiles, "" if they can."""
    # By the function, which a class that FSDP makes of theirs inherits, and another one would have replaced.
    known = {kind.forward for kind in KNOWN}
    unknown = next((type(layer).__name__ for layer in layers if type(layer).forward not in known), "")
    return f"{unknown} is not known to add what its feed-forward part gives to what went into it" if unknown else ""


def tiles_help(layers: list[nn.Module], *, num_tokens: int) -> bool:
    """Return whether rows of up to so many tokens take less memory in tiles: they are more than one."""
    return num_tokens > TILE_TOKENS and not tiles_fault(layers)


class Tiles:
    """Takes the place of the forward of a layer's feed-forward part.

    skipping: whether a layer runs forward once more, for its gradients; shared by all layers of a model.
    backend: of torch.compile, which compiles a tile; None: it is not compiled.
    """

    def __init__(self, part: nn.Module, *, skipping: Skipping, backend: str | None) -> None:
        self.part, self.skipping = part, skipping
        forward: Callable[[Tensor], Tensor] = type(part).forward.__get__(part)
        self.run = forward if backend is None else torch.compile(forward, dynamic=False, backend=backend)
        self.dtype = torch.float32  # of the output of the last forward pass

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x_1TF: Tensor) -> Tensor:
        """Return what the feed-forward part gives for x (1, T, F), of the same shape."""
        if x_1TF.shape[1] <= TILE_TOKENS:
            return self.run(x_1TF)
        weights = [p for p in self.part.parameters() if p.requires_grad]
        out: Tensor = _InTiles.apply(self, x_1TF, *weights)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, or a tensor like it that holds nothing where nobody reads it."""
        if self.skipping.on:
            return torch.empty_like(x, dtype=self.dtype)
        out = torch.cat([self.run(tile) for tile in x.split(TILE_TOKENS, dim=1)], dim=1)
        self.dtype = out.dtype
        return out


class Skipping:
    """Whether feed-forward parts are left out now: when a layer runs forward once more, for its gradients."""

    on = False

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a layer's forward pass and of its recomputation, as `checkpoint` takes them."""
        return nullcontext(), self

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


class _InTiles(torch.autograd.Function):
    """The feed-forward part of a layer: only its input is kept for the backward pass."""

    apply: Any

    @staticmethod
    def forward(ctx: Any, tiles: Tiles, x: Tensor, *weights: Tensor) -> Tensor:
        """Return the output. weights: those that are trained, so that autograd asks for their gradients."""
        kind = x.device.type
        ctx.save_for_backward(x)
        ctx.tiles, ctx.weights = tiles, weights
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        ctx.random = random_state(x.device)
        return tiles.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the weights: each tile forward once more, then backward."""
        (x,) = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        of_weights: list[Tensor | None] = [None] * len(ctx.weights)
        with torch.random.fork_rng([x.device] if x.is_cuda else [], device_type=x.device.type):
            ctx.random()
            for start in range(0, x.shape[1], TILE_TOKENS):
                place = slice(start, start + TILE_TOKENS)
                tile = x[:, place].detach().requires_grad_(of_x is not None)
                with torch.enable_grad(), ctx.autocast:
                    out = ctx.tiles.run(tile)
                asked = [*([] if of_x is None else [tile]), *ctx.weights]
                found = list(torch.autograd.grad(out, asked, gradient[:, place]))
                if of_x is not None:
                    of_x[:, place] = found.pop(0)
                of_weights = [new if old is None else old.add_(new) for old, new in zip(of_weights, found, strict=True)]
        return None, of_x, *of_weights


def random_state(device: torch.device) -> Callable[[], None]:
    """Return a function that makes the random numbers of `device` those of now again, for adapters with dropout."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        return lambda: torch.cuda.set_rng_state(state, device)
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)
