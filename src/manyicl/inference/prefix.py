"""Encode shots once, and score many queries after them.

The keys and values of a prefix are read-only tensors of ours (a Hugging Face cache copies itself at each update).
Queries are segments of one row that see the prefix and themselves, at positions that continue from it. The options of a
query follow it as a token trie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manyicl.errors import NonFiniteError
from manyicl.inference.budget import row_budget, run_chunks, run_rows
from manyicl.inference.query_rows import Query, kept_tokens, lay_out_row, read_edges, run_row, write_keys
from manyicl.inference.tries import AnswerTrie, build_trie
from manyicl.models import EMPTY_PREFIX, KeyValueBuffer, Prefix, device_of, segment_attention

# A long prefix is encoded so many tokens at a time: no slower, and sliding windows need a mask of a chunk only.
CHUNK_TOKENS = 4096
# The trie of a query's options, and of its edges (E,) the log-probability and whether each is the likeliest.
_Scored = tuple[AnswerTrie, NDArray[np.float64], NDArray[np.bool_]]


@dataclass(slots=True)
class EngineCount:
    """The tokens that went through the model."""

    num_prefix_tokens: int = 0
    """Of prefixes, each time they were encoded."""
    num_query_tokens: int = 0
    """Of queries, their options and answers."""


@torch.inference_mode()
def encode_prefix(
    model: nn.Module,
    ids: NDArray[np.int32],
    *,
    after: Prefix = EMPTY_PREFIX,
    room: int = 0,
    count: EngineCount | None = None,
) -> Prefix:
    """Return the prefix `after` followed by `ids`, encoding only `ids`; no ids give `after` itself.

    The longest of several prefixes that extend each other shares its tensors with the others; one that is extended a
    second time is copied first.

    room: tokens of the longest prefix to come, so that the tensors are made once.

    Raises:
        UserError: memory runs out.
    """
    if not len(ids):
        return after
    whole = np.concatenate([after.ids, ids]).astype(np.int32)
    store = after.store
    if store is None or store.num_tokens > after.num_tokens:
        store = _copy_store(after, room=max(room, len(whole)))

    def encode(start: int, stop: int) -> None:
        write_keys(model, whole[start:stop], after=Prefix(whole[:start], store))
        store.num_tokens = stop
        if count is not None:
            count.num_prefix_tokens += stop - start

    with segment_attention(model):
        run_chunks(after.num_tokens, len(whole), most=CHUNK_TOKENS, run=encode)
    return Prefix(ids=whole, store=store)


def _copy_store(prefix: Prefix, *, room: int) -> KeyValueBuffer:
    """Return a store with room for more that starts with `prefix`."""
    store = KeyValueBuffer(room)
    if prefix.store is not None:
        for layer in prefix.store.buffers:
            store.write(layer, *prefix.layer(layer))
        store.num_tokens = prefix.num_tokens
    return store


def score_choices(
    model: nn.Module,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    count: EngineCount | None = None,
) -> list[NDArray[np.float64]]:
    """Return the nats of every option of every query after `prefix`: one array (O,) per query.

    Equal options have the same nats to the bit. `weigh_choices` picks one.

    options: for each query the ids of its options, terminators included; an object shared by queries is read once.

    Raises:
        UserError: a likelihood that is not finite, or memory runs out.
        ValueError: a query without ids or options, or an option without ids.
    """
    return _sum_options(_score_edges(model, prefix, queries, options, count=count))


def score_greedily(
    model: nn.Module,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    count: EngineCount | None = None,
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return for each query the nats (O,) of its options, as `score_choices`, and which of them are greedy (O,).

    An option is greedy if each of its tokens is the likeliest one after those before it.

    Raises:
        UserError, ValueError: as `score_choices`.
    """
    scored = _score_edges(model, prefix, queries, options, count=count)
    greedy = [trie.all_on_paths(hits_E) for trie, _, hits_E in scored]
    return list(zip(_sum_options(scored), greedy, strict=True))


@torch.inference_mode()
def _score_edges(
    model: nn.Module,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    count: EngineCount | None,
) -> list[_Scored]:
    """Return for each query its trie, and of every edge (E,) the log-probability and whether it is the likeliest."""
    if not all(len(query) for query in queries):
        raise ValueError("a query has no ids; the first token of an answer is predicted from its last")
    distinct = {id(group): group for group in options}
    built = {key: build_trie(group) for key, group in distinct.items()}
    tries = [built[id(group)] for group in options]
    laid_out = [Query(np.asarray(query, np.int32), trie) for query, trie in zip(queries, tries, strict=True)]
    found: dict[int, _Scored] = {}
    budget = row_budget(model)
    lengths = [len(query) + len(trie.tokens_N) for query, trie in zip(queries, tries, strict=True)]

    def fraction(place: int) -> float:
        return budget.fraction(num_tokens=lengths[place], num_logits=1 + len(tries[place].tokens_N))

    def run(row: list[int]) -> None:
        scored = _score_row(model, prefix, [laid_out[place] for place in row])
        for place, (logprobs_E, hits_E) in zip(row, scored, strict=True):
            found[place] = tries[place], logprobs_E, hits_E
            if count is not None:
                count.num_query_tokens += lengths[place]

    # Neighbours of one length, so that little is padded.
    order = sorted(range(len(queries)), key=lengths.__getitem__)
    with segment_attention(model):
        run_rows(order, fraction=fraction, run=run)
    return [found[place] for place in range(len(queries))]


def _score_row(
    model: nn.Module, prefix: Prefix, queries: Sequence[Query]
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return of every edge (E,) of the row's tries the log-probability, and whether it is the likeliest."""
    device = device_of(model)
    *row, layout = lay_out_row(queries, prefix=prefix, device=device)
    ids, positions, kept = (torch.from_numpy(x).to(device) for x in (*row, kept_tokens(queries)))
    logits_NV = run_row(model, ids, positions, layout=layout, keep=kept)
    return read_edges(logits_NV, [trie for _, trie in queries if trie is not None])


def _sum_options(scored: Sequence[_Scored]) -> list[NDArray[np.float64]]:
    """Return the nats (O,) of each query's options, all of them finite."""
    alike: dict[int, list[int]] = {}  # queries that share a trie are summed together
    for place, (trie, _, _) in enumerate(scored):
        alike.setdefault(id(trie), []).append(place)
    nats: dict[int, NDArray[np.float64]] = {}
    for places in alike.values():
        trie = scored[places[0]][0]
        logprobs_QE = np.concatenate([scored[place][1] for place in places]).reshape(len(places), -1)
        nats.update(zip(places, -trie.sum_paths(logprobs_QE), strict=True))
    whole = [nats[place] for place in range(len(scored))]
    check_finite(whole)
    return whole


def check_finite(nats: Sequence[NDArray[np.float64]]) -> None:
    """Raise a NonFiniteError if a likelihood is not finite."""
    whole = np.concatenate([np.zeros(0), *nats])
    if not np.isfinite(whole).all():
        raise NonFiniteError(
            f"the model gives {int((~np.isfinite(whole)).sum())} of {len(whole)} answers no finite likelihood; it is"
            " broken, or needs `precision` fp32"
        )
