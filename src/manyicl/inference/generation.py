"""Answer queries behind shots by greedy generation: many at once behind one prefix, or whole prompts one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from manyicl.episodes import TaskTokenizer
from manyicl.inference.budget import plan_memory, run_rows
from manyicl.inference.prefix import EngineCount, check_finite, device_of, encode_prefix, score_answers
from manyicl.inference.query_rows import Asked, kept_tokens, lay_out_row, read_edges, run_row
from manyicl.inference.sharing import can_share_prefix
from manyicl.inference.tries import build_trie
from manyicl.models import Prefix, RowLayout, float32_head, inner_model, segment_attention

# Tokens of prompts that transformers generates behind at once; a small model's batch fits any machine.
BATCH_TOKENS = 16384
# Rows that have ended are dropped once they are this share of a batch: each time the others' keys are copied.
ENDED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Generated:
    """A greedy answer. cut: it reached the limit before its terminator."""

    text: str
    cut: bool


@torch.inference_mode()
def generate_answers(
    model: Any, tokenizer: TaskTokenizer, prompts: Sequence[NDArray[np.int32]], *, max_new_tokens: int
) -> list[Generated]:
    """Return the greedy answer of each prompt (all its ids: head, shots and query), batched, to the terminator.

    What the prompts share from their beginning is encoded once.

    Raises:
        UserError: memory runs out.
    """
    if not prompts:
        return []
    num_shared = _shared_length(prompts)
    if not can_share_prefix(model):
        num_shared = 0
    prefix = encode_prefix(model, np.asarray(prompts[0][:num_shared], dtype=np.int32))
    rests = [prompt[num_shared:] for prompt in prompts]
    return generate_behind(model, tokenizer, prefix, rests, max_new_tokens=max_new_tokens)


@torch.inference_mode()
def generate_behind(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    *,
    max_new_tokens: int,
    count: EngineCount | None = None,
) -> list[Generated]:
    """Return the greedy answer of each query behind `prefix`, up to where it ends (`cut_answer`) or the limit.

    Raises:
        UserError: memory runs out.
    """
    if not can_share_prefix(model):
        answers = dict(_generate_plainly(model, tokenizer, prefix, queries, max_new_tokens=max_new_tokens))
        if count is not None:
            count.num_prefix_tokens += prefix.num_tokens * len(queries)
            count.num_query_tokens += sum(len(query) for query in queries)
        return [answers[place] for place in range(len(queries))]
    asked = [(np.asarray(query, dtype=np.int32), None) for query in queries]
    return _answer_rows(model, tokenizer, prefix, asked, max_new_tokens=max_new_tokens, count=count)[0]


def generate_and_score(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    asked: Sequence[tuple[NDArray[np.int32], Sequence[int]]],
    *,
    max_new_tokens: int,
    count: EngineCount | None = None,
) -> tuple[list[Generated], NDArray[np.float64]]:
    """Return, for each (query ids, reference ids), what `generate_behind` answers and the nats of the reference.

    The query is encoded once for both, where the prefix can be shared.

    Raises:
        UserError: a likelihood that is not finite, or memory runs out.
        ValueError: a query or a reference without ids.
    """
    if not can_share_prefix(model):
        queries = [query for query, _ in asked]
        nats, _ = score_answers(model, prefix, asked, count=count)
        answers = generate_behind(model, tokenizer, prefix, queries, max_new_tokens=max_new_tokens, count=count)
        return answers, nats
    if not all(len(query) for query, _ in asked):
        raise ValueError("a query has no ids; the first token of an answer is predicted from its last")
    behind = [(np.asarray(query, dtype=np.int32), build_trie([reference])) for query, reference in asked]
    answers, nats = _answer_rows(model, tokenizer, prefix, behind, max_new_tokens=max_new_tokens, count=count)
    check_finite([nats])
    return answers, nats


@torch.inference_mode()
def _answer_rows(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
    count: EngineCount | None,
) -> tuple[list[Generated], NDArray[np.float64]]:
    """Return each query's greedy answer, and the nats (Q,) of its reference, 0 where there is none."""
    answers: dict[int, Generated] = {}
    nats = np.zeros(len(asked))
    plan = plan_memory(model)
    num_nodes = [0 if trie is None else len(trie.tokens_N) for _, trie in asked]
    lengths = [len(query) + num for (query, _), num in zip(asked, num_nodes, strict=True)]

    def share(place: int) -> float:
        num_keys = lengths[place] + max_new_tokens
        return plan.share(num_tokens=lengths[place], num_logits=1 + num_nodes[place], num_keys=num_keys)

    def run(row: list[int]) -> None:
        told, row_nats, num_drafted = _decode_batch(
            model, tokenizer, prefix, [asked[p] for p in row], max_new_tokens=max_new_tokens
        )
        answers.update(zip(row, (_read_answer(tokenizer, ids) for ids in told), strict=True))
        nats[row] = row_nats
        if count is not None:
            # The last token of an answer is never run, and those that its reference began with were run as such.
            num_steps = [max(0, len(ids) - 1 - num) for ids, num in zip(told, num_drafted, strict=True)]
            count.num_query_tokens += sum(lengths[p] for p in row) + sum(num_steps)

    with segment_attention(model):
        run_rows(sorted(range(len(asked)), key=lengths.__getitem__), share=share, run=run)
    return [answers[place] for place in range(len(asked))], nats


class _QueryKeys:
    """Each query's own keys and values, (B, G, C, D) a layer, written once a token; C: most tokens it may have.

    Behind a query may stand its reference; `begin` says how much of that is its answer too.
    """

    def __init__(self, layout: RowLayout, *, most_new: int) -> None:
        self.layout = layout
        self.room = layout.offsets_SL.shape[1] + most_new
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths_B, self.longest = layout.offsets_SL[:, 0], 0

    def begin(self, lengths: NDArray[np.int64]) -> None:
        """Say how many tokens of each query count from now on; what stands behind them is written over."""
        self.lengths_B, self.longest = torch.from_numpy(lengths).to(self.lengths_B.device), int(lengths.max())

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep the queries' own tokens, from the row that they are all in."""
        padded = (self.layout.pad(keys), self.layout.pad(values))
        # Zeros, because a score of what was never written must not be NaN before it is masked.
        made = [x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in padded]
        for buffer, x in zip(made, padded, strict=True):
            buffer[:, :, : x.shape[2]] = x
        self.buffers[layer] = (made[0], made[1])

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token a query; return all up to the longest query's."""
        rows = torch.arange(len(self.lengths_B), device=keys.device)
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[rows, :, self.lengths_B] = new[0].transpose(0, 1)
        stop = self.longest + 1
        return self.buffers[layer][0][:, :, :stop], self.buffers[layer][1][:, :, :stop]

    def step_layout(self) -> RowLayout:
        """Return the layout of a row that adds one token to each query."""
        keys_K = torch.arange(self.longest + 1, device=self.lengths_B.device)
        return RowLayout(
            prefix=self.layout.prefix,
            offsets_SL=self.lengths_B[:, None],
            max_offset=self.longest,
            key_offsets_SK=keys_K[None],
            seen_SLK=keys_K <= self.lengths_B[:, None, None],
            own=self,
        )

    def advance(self) -> None:
        """Count the token that `extend` has added in every layer."""
        self.lengths_B, self.longest = self.lengths_B + 1, self.longest + 1

    def keep(self, rows: Tensor) -> None:
        """Drop all queries but `rows`."""
        self.lengths_B = self.lengths_B[rows]
        self.buffers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.buffers.items()}


def _decode_batch(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
) -> tuple[list[list[int]], NDArray[np.float64], list[int]]:
    """Return each query's greedy ids up to where it ended, its reference's nats, and how many ids the reference gave.

    As far as the reference behind a query is what greedy decoding says, its tokens need not be run again.
    """
    device = device_of(model)
    *row, layout = lay_out_row(asked, prefix=prefix, device=device)
    ids, positions, kept = (torch.from_numpy(x).to(device) for x in (*row, kept_tokens(asked)))
    keys = _QueryKeys(layout, most_new=max_new_tokens)
    logits_NV = run_row(model, ids, positions, layout=replace(layout, sink=keys), keep=kept)
    nats, drafts = np.zeros(len(asked)), [_Draft() for _ in asked]
    tries = [trie for _, trie in asked if trie is not None]
    if tries:  # of all or of none
        edges = read_edges(logits_NV, tries)
        nats = -np.array([logprobs_E.sum() for logprobs_E, _ in edges])
        drafts = [
            _draft_answer(tokenizer, trie.edge_tokens_E.tolist(), hits_E, max_new_tokens=max_new_tokens)
            for trie, (_, hits_E) in zip(tries, edges, strict=True)
        ]
    num_kept = np.array([1 if trie is None else 1 + len(trie.tokens_N) for _, trie in asked])
    num_drafted = np.array([draft.num_run for draft in drafts])
    keys.begin(np.array([len(query) for query, _ in asked]) + num_drafted)
    logits_BV = logits_NV[torch.from_numpy(np.cumsum(num_kept) - num_kept + num_drafted).to(device)]
    told = _decode_greedily(model, tokenizer, keys, logits_BV, drafts=drafts, max_new_tokens=max_new_tokens)
    return told, nats, num_drafted.tolist()


@dataclass(frozen=True, slots=True)
class _Draft:
    """How a greedy answer begins, as its reference told. num_run: ids of the reference that further ones stand behind.

    ended: the answer is whole. Else its next id is read off the logits behind `num_run` ids, and `ids` are those.
    """

    ids: tuple[int, ...] = ()
    num_run: int = 0
    ended: bool = False


def _draft_answer(
    tokenizer: TaskTokenizer, reference: Sequence[int], hits_E: NDArray[np.bool_], *, max_new_tokens: int
) -> _Draft:
    """Return how the answer begins; hits_E: which ids of the reference are the likeliest ones."""
    num_hits = int(np.cumprod(hits_E).sum())
    for num in range(1, min(num_hits, max_new_tokens) + 1):
        if num == max_new_tokens or tokenizer.has_ended(reference[:num]):
            return _Draft(tuple(reference[:num]), num_run=num - 1, ended=True)
    # The last id of a reference is never run; where greedy decoding says it too, it is read off the logits again.
    num_run = min(num_hits, len(reference) - 1)
    return _Draft(tuple(reference[:num_run]), num_run=num_run)


def _decode_greedily(
    model: Any,
    tokenizer: TaskTokenizer,
    keys: _QueryKeys,
    logits_BV: Tensor,
    *,
    drafts: Sequence[_Draft],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the greedy ids of each query, its draft's first; logits: of the last token that `keys` counts."""
    device, num_prefix = logits_BV.device, keys.layout.prefix.num_tokens
    told = [list(draft.ids) for draft in drafts]
    rows, ended = list(range(len(drafts))), [draft.ended for draft in drafts]
    while True:
        next_B = logits_BV.argmax(dim=-1)
        for row, token in zip(rows, next_B.tolist(), strict=True):
            if not ended[row]:
                told[row].append(token)
                ended[row] = len(told[row]) == max_new_tokens or tokenizer.has_ended(told[row])
        alive = [place for place, row in enumerate(rows) if not ended[row]]
        if not alive:
            return told
        if len(alive) <= (1 - ENDED_SHARE) * len(rows):
            kept = torch.tensor(alive, device=device)
            keys.keep(kept)
            next_B, rows = next_B[kept], [rows[place] for place in alive]
        positions_B = num_prefix + keys.lengths_B
        logits_BV = run_row(model, next_B, positions_B, layout=keys.step_layout(), keep=len(rows))
        keys.advance()


def _shared_length(prompts: Sequence[NDArray[np.int32]]) -> int:
    """Return how many ids all prompts begin with alike, leaving each at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    alike = np.ones(shortest, dtype=bool)
    for prompt in prompts:
        alike &= prompt[:shortest] == prompts[0][:shortest]
    return int(np.cumprod(alike).sum())


def _generate_plainly(
    model: Any,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    *,
    max_new_tokens: int,
) -> list[tuple[int, Generated]]:
    """Return (place, answer) by transformers' own generate(), of whole prompts; those of one length together.

    Equal lengths, because not every model with a state of its own knows what padding is.
    """
    answers: list[tuple[int, Generated]] = []
    by_length: dict[int, list[int]] = {}
    for place, query in enumerate(queries):
        by_length.setdefault(len(query), []).append(place)

    def run(row: list[int]) -> None:
        ids = np.stack([np.concatenate([prefix.ids, queries[place]]) for place in row]).astype(np.int64)
        output = _generate_batch(model, tokenizer, torch.from_numpy(ids), max_new_tokens=max_new_tokens)
        answers.extend(zip(row, (_read_answer(tokenizer, told) for told in output), strict=True))

    for length, places in by_length.items():
        size = (prefix.num_tokens + length + max_new_tokens) / BATCH_TOKENS
        run_rows(places, share=lambda _, size=size: size, run=run)  # type: ignore[misc]
    return answers


def _generate_batch(model: Any, tokenizer: TaskTokenizer, ids: Tensor, *, max_new_tokens: int) -> list[list[int]]:
    """Return the new ids of each row, by transformers."""
    ids = ids.to(device_of(model))
    inner = inner_model(model)
    # transformers fills what we leave open from the checkpoint's own settings, and a repetition penalty among them
    # would forbid the very answers that the shots show.
    before, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        with float32_head(model):
            output: Tensor = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(tokenizer.end_ids) or None,
                    pad_token_id=tokenizer.end_ids[0] if tokenizer.end_ids else 0,
                ),
                stopping_criteria=StoppingCriteriaList([_TerminatorSeen(tokenizer, ids.shape[1])]),
            )
    finally:
        inner.generation_config = before
    told: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return told


def _read_answer(tokenizer: TaskTokenizer, ids: list[int]) -> Generated:
    text, ended = tokenizer.cut_answer(ids)
    return Generated(text=text, cut=not ended)


class _TerminatorSeen(StoppingCriteria):
    """Stops each row on its decoded text, so that a terminator merged into another token stops it too."""

    def __init__(self, tokenizer: TaskTokenizer, prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        rows = input_ids[:, self.prompt_tokens :].tolist()
        return torch.tensor([self.tokenizer.cut_answer(row)[1] for row in rows], device=input_ids.device)
