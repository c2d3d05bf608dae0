"""What a sweep asks: its shot counts, draws and queries, fixed before anything is asked.

Shots come from a task's train split, queries from its test split. In one draw the shots for k are the first k of the
shots for any larger k, so a sweep encodes its shots once. One set of queries serves every k and every draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError
from manyicl.prefix import EngineCount
from manyicl.tokens import TaskTokenizer, TokenizedTask, join_examples

DEFAULT_SHOTS = (0, 1, 4, 16, 64)
# A k is asked only where at least this share of the queries fits behind it; else it would be scored on short ones.
MIN_FIT_SHARE = 0.9
# A free answer may take this many tokens at the most, or the longest of the task's train answers where that is less.
MAX_ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked of every task: shot counts, draws of shots, queries, the seed, and the longest sequence.

    by: a known answer is chosen by the sum of its tokens' nats, or by their mean. fixed_shots: all draws hold the same
    first so many shots, those of draw 0, each in an order of its own, and behind them the rest as draw 0 has it; from
    that number of shots on, only order tells the draws apart.
    """

    shots: tuple[int, ...] = DEFAULT_SHOTS
    num_draws: int = 5
    num_queries: int = 200
    seed: int = 0
    max_tokens: int = 2048
    by: Literal["sum", "mean"] = "sum"
    fixed_shots: int | None = None


def draw_shots(tokenized: TokenizedTask, *, seed: int, draw: int) -> NDArray[np.int64]:
    """Return one draw: all train examples in a random order, of which any first k are its k shots."""
    rng = np.random.default_rng([seed, _name_seed(tokenized), draw])
    return rng.permutation(len(tokenized.splits["train"]))


def reorder_shots(first: NDArray[np.int64], *, num_fixed: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Return draw 0 with its first `num_fixed` shots in another random order; the rest stays as it is."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(first[:num_fixed]), first[num_fixed:]])


def prefix_lengths(tokenized: TokenizedTask, draw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of the head and the first k shots of a draw, for k = 0 to all of them."""
    lengths = tokenized.splits["train"].lengths[draw]
    return len(tokenized.head_ids) + np.concatenate([[0], np.cumsum(lengths)])


def most_answer_tokens(tokenized: TokenizedTask, written: Sequence[tuple[str, Sequence[int]]] | None) -> int:
    """Return the most tokens an answer may take: the longest to choose from, or the limit where it is generated.

    written: the known answers in ids, None for an open answer.
    """
    if written is not None:
        return max((len(ids) for _, ids in written), default=0)
    lengths = tokenized.splits["train"].answer_lengths
    return min(MAX_ANSWER_TOKENS, int(lengths.max())) if len(lengths) else MAX_ANSWER_TOKENS


def write_answers(tokenizer: TaskTokenizer, known: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return the ids of known answers, in their order; one that cannot be written is left out."""
    encoded = zip(known, tokenizer.encode_answers(known), strict=True)
    return [(text, ids) for text, ids in encoded if not isinstance(ids, str)]


def refuse_empty(plans: Sequence[TaskSweep]) -> None:
    """Refuse a sweep that asks nothing of any task.

    Raises:
        UserError: with the fewest shots that were to be asked.
    """
    if plans and not any(plan.cells for plan in plans):
        sweep, most = plans[0].sweep, max(len(plan.tokenized.splits["train"]) for plan in plans)
        raise UserError(
            f"nothing can be asked: behind {min(sweep.shots)} shots no task has room for its queries in"
            f" {sweep.max_tokens:,} tokens, or so many train rows (at most {most:,}); ask fewer, or raise --max-tokens"
        )


def _name_seed(tokenized: TokenizedTask) -> int:
    return zlib.crc32(tokenized.task.name.encode())


class TaskSweep:
    """One task's sweep: which queries and shots, fixed before anything is asked.

    count: what this process has put through the model for it.
    """

    def __init__(self, tokenized: TokenizedTask, *, tokenizer: TaskTokenizer, sweep: Sweep) -> None:
        self.tokenized, self.tokenizer, self.sweep = tokenized, tokenizer, sweep
        self.task = tokenized.task
        order = np.random.default_rng([sweep.seed, _name_seed(tokenized)]).permutation(len(tokenized.splits["test"]))
        self.wanted: NDArray[np.int64] = order[: sweep.num_queries]
        self.draws = [self._draw(draw) for draw in range(sweep.num_draws)]
        self.candidates = self._candidates()
        self.written = {known: write_answers(tokenizer, known) for known in set(self.candidates.values())}
        self.max_new_tokens = most_answer_tokens(tokenized, None)
        self.asked_shots, self.queries = self._fix_queries()
        self.num_unfit = len(self.wanted) - len(self.queries)
        self.count = EngineCount()

    @property
    def about(self) -> dict[str, Any]:
        """What a result's entry of the task says of it before any answer is known."""
        return {
            "task": self.task.name,
            "sha256": self.task.sha256,
            "shots": sorted(set(self.sweep.shots)),
            "num_queries": len(self.queries),
            "num_draws": self.sweep.num_draws,
        }

    @property
    def query_ids(self) -> list[str]:
        """The ids of the queries, in the order in which they are asked."""
        rows = self.tokenized.splits["test"].rows
        return [self.task.test[rows[q]].id for q in self.queries]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(draw, shots) of every cell that is asked; without shots all draws are one, the first."""
        return [(draw, shots) for draw in range(self.sweep.num_draws) for shots in self.shots_of(draw)]

    def shots_of(self, draw: int) -> tuple[int, ...]:
        """Return the shot counts that are asked in one draw, ascending."""
        return tuple(shots for shots in self.asked_shots if shots or draw == 0)

    @property
    def num_encoded_tokens(self) -> int:
        """The tokens of heads and shots that the whole sweep encodes, each draw once up to its largest k.

        Of the plan, not of `count`: neither a resumed sweep nor one shared out over ranks changes it.
        """
        lasts = [(draw, max(self.shots_of(draw), default=None)) for draw in range(self.sweep.num_draws)]
        return sum(
            int(prefix_lengths(self.tokenized, self.draws[draw])[most]) for draw, most in lasts if most is not None
        )

    def _draw(self, draw: int) -> NDArray[np.int64]:
        fixed, seed = self.sweep.fixed_shots, self.sweep.seed
        first = draw_shots(self.tokenized, seed=seed, draw=draw if fixed is None else 0)
        if fixed is None or draw == 0:
            return first
        return reorder_shots(first, num_fixed=fixed, seed=[seed, _name_seed(self.tokenized), draw])

    def _candidates(self) -> dict[int, tuple[str, ...]]:
        """Return the known answers of each wanted query; empty where it is to be generated."""
        rows = self.tokenized.splits["test"].rows
        return {int(q): self.task.choices(self.task.test[rows[q]]) for q in self.wanted}

    def _fix_queries(self) -> tuple[tuple[int, ...], NDArray[np.int64]]:
        """Return the shot counts that can be asked, and the queries that fit at the largest of them in every draw."""
        needs = np.array([self._num_query_tokens(int(q)) for q in self.wanted], dtype=np.int64)
        longest = np.max([prefix_lengths(self.tokenized, draw) for draw in self.draws], axis=0)
        asked: list[int] = []
        queries = self.wanted[:0]
        for shots in sorted(set(self.sweep.shots)):
            if shots >= len(longest) or not len(self.wanted):
                continue
            fits = needs + longest[shots] <= self.sweep.max_tokens
            if fits.mean() >= MIN_FIT_SHARE:
                asked.append(shots)
                queries = self.wanted[fits]
        return tuple(asked), queries

    def _num_query_tokens(self, query: int) -> int:
        test = self.tokenized.splits["test"]
        reference = int(test.answer_lengths[query])
        known = self.candidates[query]
        longest = most_answer_tokens(self.tokenized, self.written[known]) if known else self.max_new_tokens
        return int(test.lengths[query]) - reference + max(reference, longest)

    def prefix_ids(self, draw: int, *, start: int, stop: int) -> NDArray[np.int32]:
        """Return what must be encoded to go from `start` shots (0: nothing yet but the head) to `stop` shots."""
        whole = join_examples(self.tokenized, split="train", indices=self.draws[draw][:stop].astype(np.int32))
        encoded = int(whole.spans[start - 1, 1]) if start else len(self.tokenized.head_ids)
        return whole.ids[encoded:]
