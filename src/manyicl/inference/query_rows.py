"""Lay out queries in one row after a prefix, each with the trie of its options, and run the model on such a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyicl.inference.tries import AnswerTrie
from manyicl.models import KeySink, Prefix, RowLayout, float32_head

# Most logits that are in float32 at once: little memory on a GPU; on a CPU what its cache holds (twice as fast).
MOST_FLOATS = {"cuda": 1 << 24, "cpu": 1 << 19}


class Query(NamedTuple):
    """One query as it is laid out in a row."""

    ids: NDArray[np.int32]
    """Its tokens, at least one."""
    trie: AnswerTrie | None
    """Its options, which follow the tokens; None: only the tokens are run."""


def lay_out_row(
    queries: Sequence[Query], *, prefix: Prefix, device: torch.device, sink: KeySink | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], RowLayout]:
    """Return ids (T,), positions (T,) and the layout of a row: each query, then the nodes of its trie."""
    ids, offsets = [], []
    for query, trie in queries:
        ids.append(query if trie is None else np.concatenate([query, trie.tokens_N]))
        own = np.arange(len(query))
        offsets.append(own if trie is None else np.concatenate([own, len(query) - 1 + trie.depths_N]))
    lengths = np.array([len(part) for part in ids])
    longest = int(lengths.max())
    offsets_SL = np.zeros((len(queries), longest), dtype=np.int64)
    filled_SL = np.arange(longest)[None] < lengths[:, None]
    offsets_SL[filled_SL] = np.concatenate(offsets)
    places = None
    if not filled_SL.all():
        places_SL = np.where(filled_SL, np.cumsum(filled_SL).reshape(filled_SL.shape) - 1, 0)
        places = (
            torch.from_numpy(places_SL.ravel()).to(device),
            torch.from_numpy(np.flatnonzero(filled_SL)).to(device),
        )
    seen = None
    if not all(trie is None or trie.is_chain for _, trie in queries):
        seen = torch.from_numpy(_seen_in_tries(queries, longest)).to(device)
    offsets_T = np.concatenate(offsets).astype(np.int64)
    # Padding comes after its segment, so that no token sees it.
    offsets_SL[~filled_SL] = np.broadcast_to(np.arange(longest), filled_SL.shape)[~filled_SL]
    placed = torch.from_numpy(offsets_SL).to(device)
    layout = RowLayout(
        prefix=prefix,
        offsets_SL=placed,
        max_offset=int(offsets_T.max()),
        key_offsets_SK=placed,
        seen_SLK=seen,
        places=places,
        sink=sink,
    )
    return np.concatenate(ids).astype(np.int64), offsets_T + prefix.num_tokens, layout


def _seen_in_tries(queries: Sequence[Query], longest: int) -> NDArray[np.bool_]:
    """Return (S, L, L): a token sees its query up to itself; a node sees the whole query and its own ancestors."""
    seen = np.zeros((len(queries), longest, longest), dtype=bool)
    seen[:] = np.eye(longest, dtype=bool)
    triangle = np.tri(longest, dtype=bool)
    ancestors: dict[int, NDArray[np.bool_]] = {}
    for block, (query, trie) in zip(seen, queries, strict=True):
        start = len(query)
        block[:start, :start] = triangle[:start, :start]
        if trie is not None:
            stop = start + len(trie.tokens_N)
            if id(trie) not in ancestors:
                ancestors[id(trie)] = trie.ancestors()
            block[start:stop, :start] = True
            block[start:stop, start:stop] = ancestors[id(trie)]
    return seen


def run_row(model: nn.Module, ids: Tensor, positions: Tensor, *, layout: RowLayout, keep: Tensor | int) -> Tensor:
    """Return the logits (N, V), in float32 (see `float32_head`), of the tokens `keep` of a row; ids and positions (T,).

    keep: indices into the row, or how many of its last tokens. Must be inside `attention.segment_attention`.
    """
    with float32_head(model):
        output: Any = model(
            input_ids=ids[None], position_ids=positions[None], layout=layout, logits_to_keep=keep, use_cache=False
        )
    logits_NV: Tensor = output.logits[0]
    return logits_NV


def write_keys(model: nn.Module, ids: NDArray[np.int32], *, after: Prefix) -> None:
    """Write the keys and values of `ids`, which follow `after`, into its store."""
    device = next(model.parameters()).device
    row = lay_out_row([Query(ids, None)], prefix=after, device=device, sink=after.store)
    run_row(model, *(torch.from_numpy(x).to(device) for x in row[:2]), layout=row[2], keep=1)


def kept_tokens(queries: Sequence[Query]) -> NDArray[np.int64]:
    """Return which tokens of a row's layout need logits: each query's last, the root of its trie, then its nodes."""
    kept, start = [], 0
    for query, trie in queries:
        num_nodes = 0 if trie is None else len(trie.tokens_N)
        kept.append(start + len(query) - 1 + np.arange(1 + num_nodes))
        start += len(query) + num_nodes
    return np.concatenate(kept)


def read_edges(logits_NV: Tensor, tries: Sequence[AnswerTrie]) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return log-probabilities and greedy hits of every edge (E,) of each trie; logits of the row's `kept_tokens`."""
    roots = np.cumsum([0, *(1 + len(trie.tokens_N) for trie in tries)])[:-1]
    rows = np.concatenate([root + 1 + trie.edge_parents_E for root, trie in zip(roots, tries, strict=True)])
    tokens = np.concatenate([trie.edge_tokens_E for trie in tries])
    rows_E, tokens_E = (torch.from_numpy(x).to(logits_NV.device) for x in (rows, tokens))
    logprobs, hits = (x.cpu().numpy() for x in edge_logprobs(logits_NV, rows_E, tokens_E))
    stops = np.cumsum([len(trie.edge_tokens_E) for trie in tries])[:-1]
    return list(zip(np.split(logprobs.astype(np.float64), stops), np.split(hits, stops), strict=True))


def edge_logprobs(logits_NV: Tensor, rows_E: Tensor, tokens_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return (E,) each: log-probability of `tokens_E` in the logits' rows `rows_E`, and whether it is the likeliest.

    The float32 copy of the logits is made a few rows at a time.
    """
    size = max(1, MOST_FLOATS["cuda" if logits_NV.is_cuda else "cpu"] // logits_NV.shape[1])
    sums_N = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in logits_NV.split(size)])
    best_N = torch.cat([chunk.argmax(dim=-1) for chunk in logits_NV.split(size)])
    return logits_NV[rows_E, tokens_E].float() - sums_N[rows_E], best_N[rows_E] == tokens_E
