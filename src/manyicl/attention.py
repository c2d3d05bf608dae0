"""Attention that keeps the episodes of a row apart, and attention behind a shared prefix. No dense mask of a row.

It is registered with transformers under a name; the model's forward hands it `segment_lengths` (and a prefix) as
keyword arguments. No mask function is registered under that name on purpose: transformers then builds no mask, and
does not look for packed rows, which would cost a host-device synchronisation a forward.

Shapes: B batch (always 1), H query heads, G key-value heads, T row, L segment, P prefix, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "manyicl_segments"

# layer -> (keys, values), each (1, G, P, D), rotary positions already applied; never written to after encoding.
LayerCache = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of `num_tokens` encoded tokens, by layer."""

    layers: LayerCache
    num_tokens: int


EMPTY_PREFIX = Prefix(layers={}, num_tokens=0)


def attend_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    prefix: LayerCache | None = None,
    captured: LayerCache | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend each segment of a one-row batch to itself, causally, and to `prefix` in full.

    query: (1, H, T, D); key, value: (1, G, T, D). segment_lengths sum to T. captured: filled with this layer's keys
    and values, to become a prefix. Returns (1, T, H, D), as transformers' attention functions do.
    """
    if segment_lengths is None or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError(
            f"attention '{IMPLEMENTATION}' takes one row, segment_lengths and no attention mask;"
            " use it through manyicl.attention.segment_attention only"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    if captured is not None:
        captured[layer] = (key.detach(), value.detach())
    past = prefix[layer] if prefix else None
    options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    outputs = []
    for q, k, v in zip(*(x.split(segment_lengths, dim=2) for x in (query, key, value)), strict=True):
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # noqa: PLW2901
        outputs.append(_attend_one(q, k, v, **options))  # type: ignore[arg-type]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend_segments)


@contextmanager
def segment_attention(model: nn.Module) -> Iterator[None]:
    """Let `model` (also inside peft's or DDP's wrapper) attend by segments; its own attention returns afterwards."""
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    before = inner.config._attn_implementation
    inner.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend L queries to the last L of P + L keys causally and to the P before in full: (1, H, L, D)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    plain = num_keys == num_queries and (sliding_window is None or num_keys <= sliding_window)
    if plain and softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=num_queries > 1, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    visible = _visible_keys(num_queries, num_keys, sliding_window=sliding_window, device=query.device)
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling
        )
    # Gemma 2 caps its scores, which no fused kernel of torch does.
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~visible, float("-inf"))
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, p=dropout) @ value


def _visible_keys(num_queries: int, num_keys: int, *, sliding_window: int | None, device: torch.device) -> Tensor:
    """Return (L, P + L) bools: key j is seen by the query at position i when i - window < j <= i."""
    query_at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_at = torch.arange(num_keys, device=device)[None, :]
    visible = key_at <= query_at
    return visible if sliding_window is None else visible & (key_at > query_at - sliding_window)
