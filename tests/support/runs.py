"""Rows of queries with the options that follow them, and their attention to themselves by the formula, run by run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manyicl.inference.query_rows import Query, lay_out_row
from manyicl.inference.tries import build_trie
from manyicl.models.attention.dispatch import EMPTY_PREFIX, RowLayout
from manyicl.models.attention.partial import Part, Runs, as_bias, attend_explicit, repeat_heads
from manyicl.models.attention.segments import visible_keys

OPTIONS = [[7, 8, 9], [7, 8], [7, 11, 12, 2], [13, 2], [7, 8]]  # share beginnings, begin one another, repeat


def lay_out(lengths, options=OPTIONS, *, device: str = "cpu") -> RowLayout:
    """Return the layout of queries of so many tokens, each with `options`; None: without."""
    trie = None if options is None else build_trie(options)
    queries = [Query(np.full(length, 5, dtype=np.int32), trie) for length in lengths]
    return lay_out_row(queries, prefix=EMPTY_PREFIX, device=torch.device(device))[2]


def attend_run_by_run(
    query: Tensor, key: Tensor, value: Tensor, *, runs: Runs, window: int | None, scaling: float | None = None
) -> Part:
    """Return out (1, H, T, D) and lse (1, H, T) of every run's tokens."""
    parts = []
    key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    bounds, key_bounds = runs.query_bounds_R.tolist(), runs.key_bounds_R.tolist()
    places = torch.arange(key.shape[2]) if runs.key_places_K is None else runs.key_places_K
    for run in range(len(bounds) - 1):
        q = query[:, :, bounds[run] : bounds[run + 1]]
        own = places[key_bounds[run] : key_bounds[run + 1]]
        seen = visible_keys(q.shape[2], num_before=len(own) - q.shape[2], window=window, device=q.device)
        bias = as_bias(seen, q.dtype)[None, None]
        parts.append(attend_explicit(q, key[:, :, own], value[:, :, own], scaling=scaling, bias=bias, softcap=None))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def attend_padded(query: Tensor, key: Tensor, value: Tensor, *, layout: RowLayout, window: int | None) -> Part:
    """Return the same by one mask of all segments, padded."""
    q, k, v = (layout.pad(x) for x in (query, key, value))
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    bias = layout.own_bias(layout.own_window(window), q.dtype)
    if bias is None:
        bias = as_bias(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(), q.dtype)[
            None, None
        ]
    return layout.unpad(attend_explicit(q, k, v, scaling=None, bias=bias, softcap=None))
