"""Encode shots once, score many queries behind them.

The prefix's keys and values are read-only tensors of ours (no Hugging Face cache, which copies itself at each update);
queries are segments of one row that see the prefix and themselves, at positions that continue from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manyicl.attention import EMPTY_PREFIX, LayerCache, Prefix, segment_attention
from manyicl.batches import Batch, join_row
from manyicl.errors import UserError
from manyicl.loss import answer_loss, target_logits
from manyicl.tokens import TokenizedEpisode

# Tokens of queries that go through the model in one row.
ROW_TOKENS = 8192


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    return next(model.parameters()).device


@torch.inference_mode()
def encode_prefix(model: nn.Module, ids: NDArray[np.int32], *, after: Prefix = EMPTY_PREFIX) -> Prefix:
    """Return the prefix `after` followed by `ids`, encoding only `ids`; no ids give `after` itself."""
    if not len(ids):
        return after
    captured: LayerCache = {}
    ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(device_of(model))
    positions_1T = torch.arange(after.num_tokens, after.num_tokens + len(ids), device=ids_1T.device)[None]
    with segment_attention(model):
        model(
            input_ids=ids_1T,
            position_ids=positions_1T,
            segment_lengths=(len(ids),),
            prefix=after.layers,
            captured=captured,
            logits_to_keep=1,
            use_cache=False,
        )
    if after.layers:
        captured = {
            layer: (
                torch.cat([after.layers[layer][0], keys], dim=2),
                torch.cat([after.layers[layer][1], values], dim=2),
            )
            for layer, (keys, values) in captured.items()
        }
    return Prefix(layers=captured, num_tokens=after.num_tokens + len(ids))


@torch.inference_mode()
def score_answers(
    model: nn.Module, prefix: Prefix, asked: Sequence[tuple[NDArray[np.int32], Sequence[int]]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return, for each (query ids, answer ids) behind `prefix`, the answer's nats and whether it is the greedy one.

    Query ids must not be empty: the first token of an answer is predicted from the last of its query.

    Raises:
        UserError: a likelihood that is not finite.
    """
    nll, greedy = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    for chunk in _rows(asked):
        batch = _continuation_row(chunk).to(device_of(model))
        with segment_attention(model):
            scored = answer_loss(target_logits(model, batch, prefix=prefix), batch)
        nll.append(scored.nll_A.double().cpu().numpy())
        greedy.append(scored.correct_A.cpu().numpy())
    whole = np.concatenate(nll)
    if not np.isfinite(whole).all():
        raise UserError(
            f"the model gives {int((~np.isfinite(whole)).sum())} of {len(whole)} answers no finite likelihood; it is"
            " broken, or needs --precision fp32"
        )
    return whole, np.concatenate(greedy)


def _rows(
    asked: Sequence[tuple[NDArray[np.int32], Sequence[int]]],
) -> Iterator[list[tuple[NDArray[np.int32], Sequence[int]]]]:
    row: list[tuple[NDArray[np.int32], Sequence[int]]] = []
    num_tokens = 0
    for query, answer in asked:
        length = len(query) + len(answer)
        if row and num_tokens + length > ROW_TOKENS:
            yield row
            row, num_tokens = [], 0
        row.append((query, answer))
        num_tokens += length
    if row:
        yield row


def _continuation_row(asked: Sequence[tuple[NDArray[np.int32], Sequence[int]]]) -> Batch:
    built = [
        TokenizedEpisode(
            ids=np.concatenate([query, np.asarray(answer, dtype=np.int32)]),
            spans=np.array([[len(query), len(query) + len(answer)]], dtype=np.int64),
        )
        for query, answer in asked
    ]
    numbers = tuple(range(len(built)))
    return join_row(built, targets="all", weights=[np.ones(1)] * len(built), tasks=[0] * len(built), episodes=numbers)
