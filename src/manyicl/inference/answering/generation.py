"""Generate answers to queries, many at once after one encoded prefix; greedily if nothing else is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyicl.episodes import TaskTokenizer
from manyicl.inference.answering.decoding import GREEDY, Sampler, cut_at
from manyicl.inference.answering.settings import Decoding
from manyicl.inference.budget import row_budget, run_rows
from manyicl.inference.prefix import EngineCount, check_finite
from manyicl.inference.query_rows import Query, kept_tokens, lay_out_row, read_edges, run_row
from manyicl.inference.tries import build_trie
from manyicl.models import Prefix, RowLayout, device_of, segment_attention

# Called with a query's place and the ids of its answer so far, after each; False ends the answer there.
OnIds = Callable[[int, Sequence[int]], bool]
# Ended rows are dropped once they are this fraction of a batch, because dropping copies the keys of the others.
ENDED_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated answer."""

    text: str
    """Up to where it ends, without the terminator."""
    cut: bool
    """Whether it reached the limit before its terminator."""
    reference_nll: float | None = None
    """Nats of the reference given with the query; None without one, and if no likelihoods are known."""
    fault: str = ""
    """Why a server gave no answer, as it is counted; the text is empty then."""
    num_tokens: int | None = field(default=None, compare=False)
    """Tokens that were generated, the one that ended it included; None if a server did not say."""

    def with_reference(self, nll: float) -> Generated:
        """Return the answer with the nats of its query's reference."""
        return replace(self, reference_nll=nll)


@torch.inference_mode()
def generate_after(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    *,
    max_new_tokens: int,
    decodings: Sequence[Decoding] | None = None,
    count: EngineCount | None = None,
    on_ids: OnIds | None = None,
) -> list[Generated]:
    """Return the answer of each query after `prefix`, up to where it ends (`cut_answer`, stop texts) or the limit.

    decodings: how each answer is generated. Default: all greedily.

    Raises:
        UserError: memory runs out.
    """
    laid_out = [Query(np.asarray(query, dtype=np.int32), None) for query in queries]
    answers, _ = _answer_rows(
        model,
        tokenizer,
        prefix,
        laid_out,
        max_new_tokens=max_new_tokens,
        decodings=decodings,
        count=count,
        on_ids=on_ids,
    )
    return answers


def generate_and_score(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    pairs: Sequence[tuple[NDArray[np.int32], Sequence[int]]],
    *,
    max_new_tokens: int,
    count: EngineCount | None = None,
) -> tuple[list[Generated], NDArray[np.float64]]:
    """Return for each (query ids, reference ids) the answer that `generate_after` gives, and the reference's nats.

    The query is encoded once for both.

    Raises:
        UserError: a likelihood that is not finite, or memory runs out.
        ValueError: a query or a reference without ids.
    """
    if not all(len(query) for query, _ in pairs):
        raise ValueError("a query has no ids; the first token of an answer is predicted from its last")
    laid_out = [Query(np.asarray(query, dtype=np.int32), build_trie([reference])) for query, reference in pairs]
    answers, nats = _answer_rows(model, tokenizer, prefix, laid_out, max_new_tokens=max_new_tokens, count=count)
    check_finite([nats])
    return answers, nats


@torch.inference_mode()
def _answer_rows(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    queries: Sequence[Query],
    *,
    max_new_tokens: int,
    count: EngineCount | None,
    decodings: Sequence[Decoding] | None = None,
    on_ids: OnIds | None = None,
) -> tuple[list[Generated], NDArray[np.float64]]:
    """Return each query's answer, and the nats (Q,) of its reference, 0 without one."""
    how = decodings or [GREEDY] * len(queries)
    answers: dict[int, Generated] = {}
    nats = np.zeros(len(queries))
    budget = row_budget(model)
    num_nodes = [0 if trie is None else len(trie.tokens_N) for _, trie in queries]
    lengths = [len(query) + num for (query, _), num in zip(queries, num_nodes, strict=True)]

    def fraction(place: int) -> float:
        num_keys = lengths[place] + max_new_tokens
        return budget.fraction(num_tokens=lengths[place], num_logits=1 + num_nodes[place], num_keys=num_keys)

    def run(row: list[int]) -> None:
        decoded, row_nats, num_drafted = _decode_batch(
            model,
            tokenizer,
            prefix,
            [queries[p] for p in row],
            max_new_tokens=max_new_tokens,
            decodings=[how[p] for p in row],
            on_ids=None if on_ids is None else lambda place, ids: on_ids(row[place], ids),
        )
        texts = (read_answer(tokenizer, ids, how[p].stop) for p, ids in zip(row, decoded, strict=True))
        answers.update(zip(row, texts, strict=True))
        nats[row] = row_nats
        if count is not None:
            # The last token of an answer is never run; those that its reference begins with ran as part of that.
            num_steps = [max(0, len(ids) - 1 - num) for ids, num in zip(decoded, num_drafted, strict=True)]
            count.num_query_tokens += sum(lengths[p] for p in row) + sum(num_steps)

    with segment_attention(model):
        run_rows(sorted(range(len(queries)), key=lengths.__getitem__), fraction=fraction, run=run)
    return [answers[place] for place in range(len(queries))], nats


class _QueryKeys:
    """Each query's own keys and values, (B, G, C, D) per layer, written once per token; C: most tokens of a query.

    A query may be followed by its reference; `begin` says how much of that is part of its answer too.
    """

    def __init__(self, layout: RowLayout, *, most_new: int) -> None:
        self.layout = layout
        self.room = layout.offsets_SL.shape[1] + most_new
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths_B, self.longest = layout.offsets_SL[:, 0], 0

    def begin(self, lengths: NDArray[np.int64]) -> None:
        """Set how many tokens of each query count from now on; those after them are overwritten."""
        self.lengths_B, self.longest = torch.from_numpy(lengths).to(self.lengths_B.device), int(lengths.max())

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep the queries' own tokens, from the row that holds them all."""
        padded = (self.layout.pad(keys), self.layout.pad(values))
        # Zeros: the score of a key that was never written must not be NaN before it is masked.
        made = [x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in padded]
        for buffer, x in zip(made, padded, strict=True):
            buffer[:, :, : x.shape[2]] = x
        self.buffers[layer] = (made[0], made[1])

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to each query; return the tokens of all, up to the longest query's."""
        rows = torch.arange(len(self.lengths_B), device=keys.device)
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[rows, :, self.lengths_B] = new[0].transpose(0, 1)
        stop = self.longest + 1
        return self.buffers[layer][0][:, :, :stop], self.buffers[layer][1][:, :, :stop]

    def step_layout(self) -> RowLayout:
        """Return the layout of a row that adds one token to each query."""
        keys_K = torch.arange(self.longest + 1, device=self.lengths_B.device)
        seen_SLK = keys_K <= self.lengths_B[:, None, None]
        return RowLayout(
            prefix=self.layout.prefix,
            offsets_SL=self.lengths_B[:, None],
            max_offset=self.longest,
            key_offsets_SK=keys_K[None],
            seen=lambda: seen_SLK,
            own=self,
        )

    def advance(self) -> None:
        """Count the token that `extend` has added in every layer."""
        self.lengths_B, self.longest = self.lengths_B + 1, self.longest + 1

    def keep(self, rows: Tensor) -> None:
        """Drop all queries but `rows`."""
        self.lengths_B = self.lengths_B[rows]
        for layer, (keys, values) in self.buffers.items():  # one after the other, or all would be there twice
            self.buffers[layer] = (keys[rows], values[rows])


def _decode_batch(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    queries: Sequence[Query],
    *,
    max_new_tokens: int,
    decodings: Sequence[Decoding],
    on_ids: OnIds | None = None,
) -> tuple[list[list[int]], NDArray[np.float64], list[int]]:
    """Return each query's ids up to where its answer ended, its reference's nats, and how many ids the reference gave.

    As far as a reference agrees with greedy decoding, its tokens are not run again. Only greedy answers without stop
    texts may have references.
    """
    device = device_of(model)
    *row, layout = lay_out_row(queries, prefix=prefix, device=device)
    ids, positions, kept = (torch.from_numpy(x).to(device) for x in (*row, kept_tokens(queries)))
    keys = _QueryKeys(layout, most_new=max_new_tokens)
    logits_NV = run_row(model, ids, positions, layout=replace(layout, sink=keys), keep=kept)
    nats, drafts = np.zeros(len(queries)), [_Draft() for _ in queries]
    tries = [trie for _, trie in queries if trie is not None]
    if tries:  # every query has one, or none has
        edges = read_edges(logits_NV, tries)
        nats = -np.array([logprobs_E.sum() for logprobs_E, _ in edges])
        drafts = [
            _draft_answer(tokenizer, trie.edge_tokens_E.tolist(), hits_E, max_new_tokens=max_new_tokens)
            for trie, (_, hits_E) in zip(tries, edges, strict=True)
        ]
    num_kept = np.array([1 if trie is None else 1 + len(trie.tokens_N) for _, trie in queries])
    num_drafted = np.array([draft.num_run for draft in drafts])
    keys.begin(np.array([len(query) for query, _ in queries]) + num_drafted)
    logits_BV = logits_NV[torch.from_numpy(np.cumsum(num_kept) - num_kept + num_drafted).to(device)]
    sampler = Sampler(decodings, [np.concatenate([prefix.ids, query]).astype(np.int32) for query, _ in queries])
    decoded = _decode_rows(
        model, tokenizer, keys, logits_BV, drafts=drafts, sampler=sampler, max_new_tokens=max_new_tokens, on_ids=on_ids
    )
    return decoded, nats, num_drafted.tolist()


@dataclass(frozen=True, slots=True)
class _Draft:
    """How a greedy answer begins, as far as its reference agrees with it."""

    ids: tuple[int, ...] = ()
    """The beginning."""
    num_run: int = 0
    """Ids of the reference whose keys later tokens see."""
    ended: bool = False
    """Whether the answer is complete. If not, its next id is read off the logits after `ids`."""


def _draft_answer(
    tokenizer: TaskTokenizer, reference: Sequence[int], hits_E: NDArray[np.bool_], *, max_new_tokens: int
) -> _Draft:
    """Return how the answer begins; hits_E: which ids of the reference are the likeliest ones."""
    num_hits = int(np.cumprod(hits_E).sum())
    for num in range(1, min(num_hits, max_new_tokens) + 1):
        if num == max_new_tokens or tokenizer.has_ended(reference[:num]):
            return _Draft(tuple(reference[:num]), num_run=num - 1, ended=True)
    # The last id of a reference is never run; if greedy decoding gives it too, it is read off the logits again.
    num_run = min(num_hits, len(reference) - 1)
    return _Draft(tuple(reference[:num_run]), num_run=num_run)


def _decode_rows(
    model: Any,
    tokenizer: TaskTokenizer,
    keys: _QueryKeys,
    logits_BV: Tensor,
    *,
    drafts: Sequence[_Draft],
    sampler: Sampler,
    max_new_tokens: int,
    on_ids: OnIds | None = None,
) -> list[list[int]]:
    """Return the ids of each query's answer, its draft's first; logits: of the last token that `keys` counts."""
    device, num_prefix = logits_BV.device, keys.layout.prefix.num_tokens
    decoded = [list(draft.ids) for draft in drafts]
    rows, ended = list(range(len(drafts))), [draft.ended for draft in drafts]
    while True:
        next_B = sampler.choose(logits_BV, rows)
        for row, token in zip(rows, next_B.tolist(), strict=True):
            if not ended[row]:
                decoded[row].append(token)
                ended[row] = len(decoded[row]) == max_new_tokens or has_ended(
                    tokenizer, decoded[row], sampler.decodings[row].stop
                )
                if on_ids is not None and not on_ids(row, decoded[row]):
                    ended[row] = True
        alive = [place for place, row in enumerate(rows) if not ended[row]]
        if not alive:
            return decoded
        if len(alive) <= (1 - ENDED_FRACTION) * len(rows):
            kept = torch.tensor(alive, device=device)
            keys.keep(kept)
            next_B, rows = next_B[kept], [rows[place] for place in alive]
        positions_B = num_prefix + keys.lengths_B
        logits_BV = run_row(model, next_B, positions_B, layout=keys.step_layout(), keep=len(rows))
        keys.advance()


def has_ended(tokenizer: TaskTokenizer, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Return whether the last of the generated `ids` ends the answer, or completes a stop text."""
    return tokenizer.has_ended(ids) or (bool(stop) and cut_at(tokenizer.decode(ids), stop)[1])


def read_answer(tokenizer: TaskTokenizer, ids: list[int], stop: Sequence[str] = ()) -> Generated:
    """Return the answer that generated ids are, up to where it ends."""
    text, ended = tokenizer.cut_answer(ids)
    text, stopped = cut_at(text, stop)
    return Generated(text=text, cut=not (ended or stopped), num_tokens=len(ids))
