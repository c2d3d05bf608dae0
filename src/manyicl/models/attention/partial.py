"""Attention to a part of the keys, with its log-sum-exp, so that parts can be merged into the whole exactly.

Shapes: B segments, H heads, M queries, N keys, D head size. A kernel returns out (B, H, M, D) and lse (B, H, M), the
log of the sum of the exponentials of a query's scores, natural, in float32. `bias` is added to the scores: 0 where a
key is seen, -inf where it is not, of the queries' dtype; (B or 1, 1, M, N). R runs of a row of T tokens, K keys of all
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyicl.models.attention.flash import flash_implementation

Part = tuple[Tensor, Tensor]  # out, lse

# Scores that the explicit formula holds at once.
MOST_SCORES = 1 << 25
# cuDNN's kernel is the fastest on Hopper, but builds a plan for every new shape: only worth it for so many scores a
# head. Row lengths are rounded up to `PLAN_ROWS`, so that most rows of a sweep share one plan.
PLAN_SCORES = 1 << 28
PLAN_ROWS = 1024
# Head sizes that this machine's cuDNN has refused.
_without_plan: set[int] = set()
# So many queries fill a tile of flash attention by themselves; fewer share it with those of the heads beside them.
TILE_QUERIES = 128
# Fused kernels want the rows of a bias to begin at multiples of so many numbers.
BIAS_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """The tokens of a row in runs; each run sees its own keys, of which its tokens are the last, causally.

    This is what varlen attention takes: no padding and no mask. A node of a trie that does not follow the token before
    it begins a run, whose keys are the tokens of its query, the nodes above it and those of the run.
    """

    query_bounds_R: Tensor
    """Where the runs begin in the row, and its end, (R + 1,), int32."""
    key_bounds_R: Tensor
    """Where the keys of each run begin among the keys of all, and their end, (R + 1,), int32."""
    key_places_K: Tensor | None
    """Which token of the row each key is of; None: the keys are the row's tokens, in order."""
    most_queries: int
    """Tokens of the longest run."""
    most_keys: int
    """Keys of the run that has most."""


def attend_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Part:
    """Attend `query` to `key` by the fastest kernel that is exact here.

    key, value: (B, G, N, D), of as many heads as the queries or of a part of them, each for so many queries' heads.
    causal: query m sees the keys up to m; only without `bias`.
    """
    plain = softcap is None and key.shape == value.shape
    if bias is None and takes_flash(query, value, softcap=softcap):
        return _attend_half(query, key, value, scaling=scaling, causal=causal)
    key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    if plain and query.device.type == "cpu":
        if bias is not None:
            bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(query, key, value, 0.0, causal, attn_mask=bias, scale=scaling)
        return out, lse
    if plain and query.device.type == "cuda" and query.shape[-1] % 8 == 0:
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse, *_ = op(query, key, value, bias, True, 0.0, causal, scale=scaling)
        return out, lse[:, :, : query.shape[2]]  # it pads the log-sum-exp
    if causal:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        bias = as_bias(seen, query.dtype)[None, None]
    return attend_explicit(query, key, value, scaling=scaling, bias=bias, softcap=softcap)


def takes_flash(query: Tensor, value: Tensor, *, softcap: float | None) -> bool:
    """Return whether torch's flash attention serves such queries and values, where nothing needs a bias."""
    return (
        softcap is None
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and is_flash_size(query.shape[-1])
    )


def is_flash_size(head_dim: int) -> bool:
    """Return whether torch's flash attention takes heads of this size.

    >>> [size for size in (4, 64, 100, 256, 264) if is_flash_size(size)]
    [64, 256]
    """
    return head_dim % 8 == 0 and head_dim <= 256


def attend_all(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, softcap: float | None = None
) -> Part:
    """Attend each query to all keys: (B, H, M, D) to (B, G, N, D), without a bias.

    The heads that share keys become further queries, so that the keys are read once and never repeated. Flash attention
    repeats none by itself, and many queries fill its tiles, so there they stay as they are, which copies nothing.
    """
    num_segments, num_heads, num_queries, _ = query.shape
    num_folded = num_heads // key.shape[1] * num_queries
    fills = num_queries >= TILE_QUERIES and takes_flash(query, value, softcap=softcap)
    if fills and not _is_planned(query, num_queries=num_folded, num_keys=key.shape[2]):
        return _attend_flash(query, key, value, scaling=scaling, causal=False)
    folded = fold_heads(query, key.shape[1])
    out, lse = attend_part(folded, key, value, scaling=scaling, softcap=softcap)
    return out.reshape(num_segments, num_heads, num_queries, -1), lse.reshape(num_segments, num_heads, num_queries)


def fold_heads(query: Tensor, num_groups: int) -> Tensor:
    """Return (S, H, L, D) as (S, G, H / G * L, D): the query heads that share keys become further queries."""
    num_segments, _, _, head_dim = query.shape
    return query.reshape(num_segments, num_groups, -1, head_dim)


def attend_runs(
    query: Tensor, key: Tensor, value: Tensor, *, runs: Runs, scaling: float | None, window: int | None
) -> Part:
    """Attend each run of a row to its keys: (1, H, T, D) to (1, G, T, D), where `takes_flash` says that it can be done.

    window: the keys that a token sees, itself included; those of a run are tokens that follow each other.
    """
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    if runs.key_places_K is not None:
        rows[1:] = [x.index_select(0, runs.key_places_K) for x in rows[1:]]
    out_THD, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        *rows,
        runs.query_bounds_R,
        runs.key_bounds_R,
        runs.most_queries,
        runs.most_keys,
        0.0,
        window is None,
        False,
        scale=scaling,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return out_THD.transpose(0, 1)[None], lse_HT[None]


def _attend_half(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, causal: bool) -> Part:
    """Attend in bf16 or fp16 on CUDA. Keys of fewer heads than the queries have are for causal attention only."""
    num_rows = query.shape[2]
    if not causal and _is_planned(query, num_queries=num_rows, num_keys=key.shape[2]):
        missing = -num_rows % PLAN_ROWS
        padded = torch.nn.functional.pad(query, (0, 0, 0, missing)) if missing else query  # by nothing it still copies
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        try:
            out, lse, *_ = op(padded, key, value, None, True, 0.0, False, False, scale=scaling)
            return out[:, :, :num_rows], lse.reshape(padded.shape[:3])[:, :, :num_rows]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no plan for these shapes in its version: flash attention serves all of them
            _without_plan.add(query.shape[-1])
    return _attend_flash(query, key, value, scaling=scaling, causal=causal)


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, causal: bool) -> Part:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = op(query, key, value, 0.0, causal, False, scale=scaling)
    return out, lse[:, :, : query.shape[2]]


def _is_planned(query: Tensor, *, num_queries: int, num_keys: int) -> bool:
    """Return whether cuDNN's kernel serves so many queries of a head, and pays; it does not beside a newer flash."""
    return (
        num_queries * num_keys >= PLAN_SCORES
        and flash_implementation() is None
        and query.shape[-1] <= 128
        and query.shape[-1] not in _without_plan
        and torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(query.device)[0] >= 9
    )


def attend_explicit(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, bias: Tensor | None, softcap: float | None
) -> Part:
    """Attend by the formula, a few queries at a time: softcap * tanh(score / softcap), as Gemma 2 caps its scores."""
    dtype, scale = query.dtype, query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()  # half products are slow there
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[2], -1)
    num_rows = max(1, MOST_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    outs, sums = [], []
    for start in range(0, query.shape[2], num_rows):
        scores = (query[:, :, start : start + num_rows] @ key.transpose(2, 3)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, :, start : start + num_rows]
        lse = scores.logsumexp(dim=-1)
        outs.append((scores - lse[..., None]).exp().to(query.dtype) @ value)
        sums.append(lse)
    return torch.cat(outs, dim=2).to(dtype), torch.cat(sums, dim=2)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `seen`, else -inf; rows begin where fused kernels can read them."""
    num_keys = seen.shape[-1]
    width = -(-num_keys // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    rows = torch.zeros(*seen.shape[:-1], width, dtype=dtype, device=seen.device)
    return rows[..., :num_keys].masked_fill_(~seen, float("-inf"))


def merge_parts(parts: Sequence[Part]) -> Tensor:
    """Return the attention to the keys of all parts together, (B, H, M, D); the first part's lse must be finite.

    The share of a part is its exp(lse) over the sum of all; in float32.
    """
    out, lse = parts[0]
    if len(parts) == 1:
        return out
    dtype, out = out.dtype, out.float()
    for place, (other, other_lse) in enumerate(parts[1:], start=2):
        out = torch.lerp(out, other.float(), torch.sigmoid(other_lse - lse)[..., None])
        if place < len(parts):
            lse = torch.logaddexp(lse, other_lse)
    return out.to(dtype)


def repeat_heads(keys: Tensor, num_heads: int) -> Tensor:
    """Return (S, G, K, D) as (S, H, K, D): the keys of a group, once for each of its query heads."""
    return keys.repeat_interleave(num_heads // keys.shape[1], dim=1) if keys.shape[1] < num_heads else keys
