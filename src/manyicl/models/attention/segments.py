"""Attention of each segment of a row to itself, causally, by the fastest exact kernel; no mask as large as the row.

CUDA in half precision: a row of one segment by torch's plain causal attention (FlashAttention 3 on Hopper where it is
installed, else cuDNN's kernel; flash elsewhere), any other by its varlen attention, which is flash and reads the
segments' bounds on the device. Elsewhere segment by segment: fused
where nothing but causality limits what is seen, else a block of queries at a time to the keys that they see, since a
sliding window's mask would grow with the square of the row and no fused kernel of torch caps scores (Gemma 2).

Shapes: H query heads, G key-value heads, T row, L segment, M queries of a block, N keys, D head.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from manyicl.episodes import Segments
from manyicl.models.attention.flash import flash_attention_3, flash_implementation, is_worthwhile
from manyicl.models.attention.partial import is_flash_size, repeat_heads

# Queries that are masked at once.
BLOCK_QUERIES = 1024
# torch 2.11 takes grouped heads by itself.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
# How often each kernel was taken for the rows of a run; in compiled layers, how often a layer was compiled with it.
_taken: Counter[str] = Counter()
_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def kernel_order(*, row_tokens: int = 0, drops: bool = False) -> Iterator[None]:
    """Prefer the fastest kernel in the block, on Hopper and later: another flash than torch's own, else cuDNN's.

    row_tokens: of the rows that are attended; where they are long, FlashAttention 3 is put in place if it is there.
    drops: attention drops weights, which another flash does not. Backward passes belong into the block too.
    """
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9):
        yield
        return
    _let_torch_set_its_order()
    with flash_attention_3() if is_worthwhile(row_tokens) and not drops else nullcontext():
        best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        if flash_implementation() is not None:
            best = best[:1] if drops else best[::-1]
        with sdpa_kernel([*best, *_OTHERS], set_priority=True), _compiled_for(best[0]):
            yield


@contextmanager
def _compiled_for(best: SDPBackend) -> Iterator[None]:
    """Keep what is compiled in the block apart from what was for another kernel.

    torch's caches on disk keep the kernel that was chosen, and know a layer by its code alone: a layer compiled for
    cuDNN's would run it for ever after. Which flash stands behind torch's flash operation is not compiled in.
    """
    tag = "-".join(part for part in (torch.compiler.config.cache_key_tag, best.name) if part)
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        yield


@lru_cache(maxsize=1)
def _let_torch_set_its_order() -> None:
    """Have torch choose a kernel once: its first choice in a process puts its own order over one that was asked for."""
    nothing = torch.zeros(1, 1, 8, 8, device="cuda", dtype=torch.bfloat16)
    functional.scaled_dot_product_attention(nothing, nothing, nothing)


def attend_row_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Segments,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend (1, H, T, D) to (1, G, T, D): (1, T, H, D). window: the tokens that one sees, itself included."""
    if window is not None and window >= segments.longest:
        window = None
    if segments.is_one and window is None and softcap is None:
        _note_kernel(f"one episode per row, {query.dtype}")
        return _attend_causal(query, key, value, dropout=dropout, scaling=scaling).transpose(1, 2).contiguous()
    obstacle = _varlen_obstacle(query, dropout=dropout, softcap=softcap)
    if not obstacle:
        _note_kernel(f"varlen, {query.dtype}")
        return _attend_varlen(query, key, value, segments=segments, scaling=scaling, window=window)
    _note_kernel(f"segment by segment ({obstacle}), {query.dtype}")
    out: Tensor = _attend_each(
        query, key, value, segments=segments, dropout=dropout, scaling=scaling, window=window, softcap=softcap
    )
    return out


def _varlen_obstacle(query: Tensor, *, dropout: float, softcap: float | None) -> str:
    """Return why torch's varlen attention cannot take these queries, '' if it can."""
    if not query.is_cuda:
        return "not on a GPU"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "not in half precision"
    if softcap is not None:
        return "scores are capped"
    if dropout:
        return "attention drops weights"
    return "" if is_flash_size(query.shape[-1]) else f"heads of {query.shape[-1]}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # traced, a count would be compiled in
def _note_kernel(name: str) -> None:
    _taken[name.replace("torch.", "")] += 1


def kernels_taken() -> dict[str, int]:
    """Return how often each kernel was taken since `forget_kernels`, the most frequent first."""
    return dict(_taken.most_common())


def forget_kernels() -> None:
    """Begin to count kernels anew."""
    _taken.clear()


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Attend all segments by torch's varlen attention, whose window counts the keys to the left of a token."""
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments.bounds_S,
        segments.bounds_S,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **_GROUPED,
    )
    assert isinstance(out, Tensor)
    return out[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew for each row's lengths
def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Segments,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend one segment after the other."""
    outputs = []
    for q, k, v in zip(*(x.split(segments.lengths, dim=2) for x in (query, key, value)), strict=True):
        if softcap is None and (window is None or q.shape[2] <= window):
            outputs.append(_attend_causal(q, k, v, dropout=dropout, scaling=scaling))
        else:
            outputs += _attend_blocks(q, k, v, dropout=dropout, scaling=scaling, window=window, softcap=softcap)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_causal(query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float | None) -> Tensor:
    """Attend a segment to itself: (1, H, L, D)."""
    if query.is_cuda and query.dtype == torch.float32:  # its kernel for float32 knows no groups
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Attend a segment to itself, some queries at a time: [(1, H, M, D)]. Capped scores are made again in backward."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    outputs = []
    for start in range(0, query.shape[2], BLOCK_QUERIES):
        stop = min(query.shape[2], start + BLOCK_QUERIES)
        first = 0 if window is None else max(0, start - window + 1)
        q, k, v = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        seen = visible_keys(stop - start, num_before=start - first, window=window, device=query.device)
        if softcap is None:
            outputs.append(
                functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)
            )
            continue
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = checkpoint(_attend_capped, q, k, v, seen, scale, softcap, dropout, use_reentrant=False)
        assert isinstance(out, Tensor)
        outputs.append(out)
    return outputs


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float, dropout: float
) -> Tensor:
    scores = query @ key.transpose(2, 3) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf"))
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, p=dropout) @ value


def visible_keys(num_queries: int, *, num_before: int, window: int | None, device: torch.device) -> Tensor:
    """Return (M, N) bools: which of `num_before` keys and the queries' own each query sees; it sees `window` at most.

    >>> visible_keys(2, num_before=2, window=2, device=torch.device("cpu")).int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    at = torch.arange(num_before + num_queries, device=device)
    queries = at[num_before:, None]
    visible = at[None] <= queries
    return visible if window is None else visible & (at[None] > queries - window)
