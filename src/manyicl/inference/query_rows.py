"""Lay out queries in one row after a prefix, each with the trie of its options, and run the model on such a row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyicl.inference.tries import AnswerTrie
from manyicl.models import KeySink, Prefix, RowLayout, Runs, float32_head

# Most logits that are in float32 at once: little memory on a GPU; on a CPU what its cache holds (twice as fast).
MOST_FLOATS = {"cuda": 1 << 24, "cpu": 1 << 19}
# Where the runs of a row have more keys than so many times its tokens, a mask costs less than copying them.
MOST_KEY_COPIES = 4


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
    own_S, nodes_S = _count_tokens(queries)
    lengths_S = own_S + nodes_S
    longest, offsets_T = int(lengths_S.max()), ranges(np.zeros_like(lengths_S), lengths_S)
    is_node_T = offsets_T >= np.repeat(own_S, lengths_S)
    depths = [trie.depths_N for _, trie in queries if trie is not None]
    offsets_T[is_node_T] = np.concatenate([np.zeros(0, np.int64), *depths]) + np.repeat(own_S - 1, nodes_S)
    # Padding comes after its segment, so that no token sees it.
    offsets_SL = np.tile(np.arange(longest), (len(queries), 1))
    filled_SL = offsets_SL < lengths_S[:, None]
    offsets_SL[filled_SL] = offsets_T
    places = None
    if not filled_SL.all():
        places_SL = np.zeros_like(offsets_SL)
        places_SL[filled_SL] = np.arange(len(offsets_T))
        places = (
            torch.from_numpy(places_SL.ravel()).to(device),
            torch.from_numpy(np.flatnonzero(filled_SL)).to(device),
        )
    branches = not all(trie.is_chain for trie in distinct_tries(queries))
    placed = torch.from_numpy(offsets_SL).to(device)
    layout = RowLayout(
        prefix=prefix,
        offsets_SL=placed,
        max_offset=int(offsets_T.max()),
        key_offsets_SK=placed,
        seen=(lambda: torch.from_numpy(_seen_in_tries(queries, longest)).to(device)) if branches else None,
        runs=cache(lambda: find_runs(queries, device=device)) if branches or places is not None else None,
        places=places,
        sink=sink,
    )
    ids = [part for query, trie in queries for part in ((query,) if trie is None else (query, trie.tokens_N))]
    return np.concatenate(ids).astype(np.int64), offsets_T + prefix.num_tokens, layout


def _count_tokens(queries: Sequence[Query]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many tokens each query has (S,), and how many nodes its trie (S,)."""
    return (
        np.array([len(query) for query, _ in queries], dtype=np.int64),
        np.array([0 if trie is None else len(trie.tokens_N) for _, trie in queries], dtype=np.int64),
    )


def distinct_tries(queries: Sequence[Query]) -> list[AnswerTrie]:
    """Return the tries of the queries, one that several share once."""
    return list({id(trie): trie for _, trie in queries if trie is not None}.values())


def find_runs(queries: Sequence[Query], *, device: torch.device) -> Runs | None:
    """Return the runs of the queries' row; None if its keys would be copied more than `MOST_KEY_COPIES` times."""
    # Those of each trie are found once: D different tries, P runs of them. A query without a trie is one run.
    runs_of = {id(None): [(np.zeros(0, dtype=np.int64), 0)]}
    runs_of |= {id(trie): trie.runs() for trie in distinct_tries(queries)}
    place_of = {key: place for place, key in enumerate(runs_of)}
    trie_S = np.array([place_of[id(trie)] for _, trie in queries])
    num_runs_D = np.array([len(runs) for runs in runs_of.values()])
    paths = [path for runs in runs_of.values() for path, _ in runs]
    path_P, new_P = np.array([len(path) for path in paths]), np.array([n for runs in runs_of.values() for _, n in runs])

    num_runs_S = num_runs_D[trie_S]
    run_R = ranges((np.cumsum(num_runs_D) - num_runs_D)[trie_S], num_runs_S)  # which of the P
    own_S, nodes_S = _count_tokens(queries)
    starts_S = np.cumsum(own_S + nodes_S) - own_S - nodes_S
    own_R, path_R, queries_R = np.repeat(own_S, num_runs_S), path_P[run_R], new_P[run_R]
    queries_R[np.cumsum(num_runs_S) - num_runs_S] += own_S
    keys_R = own_R + path_R
    if keys_R.sum() > MOST_KEY_COPIES * queries_R.sum():
        return None

    def bound(counts_R: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int32)).to(device)

    query_bounds_R, key_bounds_R, places = bound(queries_R), None, None
    if len(run_R) > len(queries):
        places_K = ranges(np.repeat(starts_S, num_runs_S), keys_R)
        is_node_K = ranges(np.zeros_like(keys_R), keys_R) >= np.repeat(own_R, keys_R)
        nodes_K = np.concatenate(paths)[ranges((np.cumsum(path_P) - path_P)[run_R], path_R)]
        places_K[is_node_K] = np.repeat(np.repeat(starts_S, num_runs_S) + own_R, path_R) + nodes_K
        places, key_bounds_R = torch.from_numpy(places_K).to(device), bound(keys_R)
    return Runs(
        query_bounds_R=query_bounds_R,
        key_bounds_R=query_bounds_R if key_bounds_R is None else key_bounds_R,
        key_places_K=places,
        most_queries=int(queries_R.max()),
        most_keys=int(keys_R.max()),
    )


def ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ..., as many as its size, for each start; joined.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


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
    own_S, nodes_S = _count_tokens(queries)
    return ranges(np.cumsum(own_S + nodes_S) - nodes_S - 1, 1 + nodes_S)


def read_edges(logits_NV: Tensor, tries: Sequence[AnswerTrie]) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return log-probabilities and greedy hits of every edge (E,) of each trie; logits of the row's `kept_tokens`."""
    num_kept_Q = np.array([1 + len(trie.tokens_N) for trie in tries])
    num_edges_Q = np.array([len(trie.edge_tokens_E) for trie in tries])
    rows = np.concatenate([trie.edge_parents_E for trie in tries])  # -1 is the root, the first that is kept of a query
    rows += np.repeat(np.cumsum(num_kept_Q) - num_kept_Q + 1, num_edges_Q)
    tokens = np.concatenate([trie.edge_tokens_E for trie in tries])
    rows_E, tokens_E = (torch.from_numpy(x).to(logits_NV.device) for x in (rows, tokens))
    logprobs, hits = (x.cpu().numpy() for x in edge_logprobs(logits_NV, rows_E, tokens_E))
    logprobs, bounds = logprobs.astype(np.float64), np.concatenate([[0], np.cumsum(num_edges_Q)])
    return [(logprobs[start:stop], hits[start:stop]) for start, stop in pairwise(bounds.tolist())]


def edge_logprobs(logits_NV: Tensor, rows_E: Tensor, tokens_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return (E,) each: log-probability of `tokens_E` in the logits' rows `rows_E`, and whether it is the likeliest.

    The float32 copy of the logits is made a few rows at a time.
    """
    size = max(1, MOST_FLOATS["cuda" if logits_NV.is_cuda else "cpu"] // logits_NV.shape[1])
    sums_N = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in logits_NV.split(size)])
    best_N = torch.cat([chunk.argmax(dim=-1) for chunk in logits_NV.split(size)])
    return logits_NV[rows_E, tokens_E].float() - sums_N[rows_E], best_N[rows_E] == tokens_E
