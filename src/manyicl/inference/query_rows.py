"""Queries laid out in one row behind a prefix, each with the trie of its options, and the model run on such a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyicl.inference.tries import AnswerTrie
from manyicl.models import KeySink, Prefix, RowLayout, float32_head

# A query's ids, and the trie that follows them; none: only its own tokens are run.
Asked = tuple[NDArray[np.int32], AnswerTrie | None]
# Logits that are in float32 at once: little enough memory on a GPU, and on a CPU what its cache holds (twice as fast).
MOST_FLOATS = {"cuda": 1 << 24, "cpu": 1 << 19}


def lay_out_row(
    asked: Sequence[Asked], *, prefix: Prefix, device: torch.device, sink: KeySink | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], RowLayout]:
    """Return ids (T,), positions (T,) and the layout of a row: each query, then the nodes of its trie."""
    ids, offsets = [], []
    for query, trie in asked:
        ids.append(query if trie is None else np.concatenate([query, trie.tokens_N]))
        own = np.arange(len(query))
        offsets.append(own if trie is None else np.concatenate([own, len(query) - 1 + trie.depths_N]))
    lengths = np.array([len(part) for part in ids])
    longest = int(lengths.max())
    offsets_SL = np.zeros((len(asked), longest), dtype=np.int64)
    cells = np.arange(longest)[None] < lengths[:, None]
    offsets_SL[cells] = np.concatenate(offsets)
    places = None
    if not cells.all():
        places_SL = np.where(cells, np.cumsum(cells).reshape(cells.shape) - 1, 0)
        places = (
            torch.from_numpy(places_SL.ravel()).to(device),
            torch.from_numpy(np.flatnonzero(cells)).to(device),
        )
    seen = None
    if not all(trie is None or trie.is_chain for _, trie in asked):
        seen = torch.from_numpy(_seen_in_tries(asked, longest)).to(device)
    offsets_T = np.concatenate(offsets).astype(np.int64)
    # Padding stands behind its segment, so that no token sees it.
    offsets_SL[~cells] = np.broadcast_to(np.arange(longest), cells.shape)[~cells]
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


def _seen_in_tries(asked: Sequence[Asked], longest: int) -> NDArray[np.bool_]:
    """Return (S, L, L): a token sees its query up to itself, a node the whole query and its own way from there."""
    seen = np.zeros((len(asked), longest, longest), dtype=bool)
    seen[:] = np.eye(longest, dtype=bool)
    triangle = np.tri(longest, dtype=bool)
    ways: dict[int, NDArray[np.bool_]] = {}
    for block, (query, trie) in zip(seen, asked, strict=True):
        start = len(query)
        block[:start, :start] = triangle[:start, :start]
        if trie is not None:
            stop = start + len(trie.tokens_N)
            if id(trie) not in ways:
                ways[id(trie)] = trie.ancestors()
            block[start:stop, :start] = True
            block[start:stop, start:stop] = ways[id(trie)]
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
    """Write the keys and values of `ids`, which stand behind `after`, into its store."""
    device = next(model.parameters()).device
    row = lay_out_row([(ids, None)], prefix=after, device=device, sink=after.store)
    run_row(model, *(torch.from_numpy(x).to(device) for x in row[:2]), layout=row[2], keep=1)


def kept_tokens(asked: Sequence[Asked]) -> NDArray[np.int64]:
    """Return which tokens of a row's layout need logits: each query's last, the root of its trie, then its nodes."""
    kept, start = [], 0
    for query, trie in asked:
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
