"""Which train examples stand before a query: draws of shots, how many tokens they take, and answers written in ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer, TokenizedTask
from manyicl.seeds import AskPurpose, make_stream

LONG_TRAIN = "train rows too long to be shots"
# Default limit of a generated answer: as many tokens as the task's longest train answer has, and at most this many.
MAX_ANSWER_TOKENS = 256


def draw_shots(
    tokenized: TokenizedTask,
    *,
    seed: int,
    draw: int,
    purpose: AskPurpose = "evaluation",
    most_tokens: int | None = None,
) -> NDArray[np.int64]:
    """Return one draw: the train examples in a random order; its first k are its k shots, for any k.

    most_tokens: longer examples are left out; the order of the others stays the same.
    """
    rng = make_stream(purpose, seed, "shots", tokenized.task.name, draw)
    order = rng.permutation(len(tokenized.splits["train"]))
    return order if most_tokens is None else order[tokenized.splits["train"].lengths[order] <= most_tokens]


def reorder_shots(first: NDArray[np.int64], *, num_fixed: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return draw 0 with its first `num_fixed` shots in another random order; the rest stays as it is."""
    return np.concatenate([rng.permutation(first[:num_fixed]), first[num_fixed:]])


def prefix_lengths(tokenized: TokenizedTask, draw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of the head and the first k shots of a draw, for k = 0 to all of them."""
    lengths = tokenized.splits["train"].lengths[draw]
    return len(tokenized.head_ids) + np.concatenate([[0], np.cumsum(lengths)])


def most_answer_tokens(
    tokenized: TokenizedTask, written: Sequence[tuple[str, Sequence[int]]] | None, *, limit: int | None = None
) -> int:
    """Return the most tokens an answer may take: the longest known answer, or the limit of a generated one.

    written: the known answers with their ids; None for an open answer.
    limit: of a generated answer. Default: the longest train answer, at most `MAX_ANSWER_TOKENS`.
    """
    if written is not None:
        return max((len(ids) for _, ids in written), default=0)
    if limit is not None:
        return limit
    lengths = tokenized.splits["train"].answer_lengths
    return min(MAX_ANSWER_TOKENS, int(lengths.max())) if len(lengths) else MAX_ANSWER_TOKENS


def write_answers(tokenizer: TaskTokenizer, known: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return known answers with their ids, in order; one that the tokenizer cannot write is left out."""
    encoded = zip(known, tokenizer.encode_answers(known), strict=True)
    return [(text, ids) for text, ids in encoded if not isinstance(ids, str)]
