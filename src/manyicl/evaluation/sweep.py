"""A sweep: the numbers of shots, draws and queries of each task, fixed before any query is answered.

Shots come from a task's train split, queries from its test split. In one draw the shots for k are the first k of the
shots for any larger k, so a sweep encodes its shots once. One set of queries serves every k and every draw. If shots
are chosen as the nearest, the last `num_nearest` of the k are each query's own, and only those before are shared.

Rows that are too long take no part: a test row that does not fit even without shots is never a query, and a train row
that leaves no room for the queries is never a shot, as training leaves out rows that fit no episode. Both are counted.

The number of shots `fill` is as many as fit; it may differ between draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer, TokenizedTask, input_segments, join_examples
from manyicl.errors import UserError, list_some
from manyicl.evaluation.points import PlainPath
from manyicl.evaluation.shots import FILL, Shots, record_choice, shots_order, sort_shots
from manyicl.inference import (
    DEFAULT_ANSWERS,
    LONG_TRAIN,
    NUM_NEAREST,
    AnswerSettings,
    ShotPolicy,
    build_trie,
    check_choice,
    choose_own_shots,
    draw_shots,
    index_examples,
    most_answer_tokens,
    prefix_lengths,
    reorder_shots,
    write_answers,
)
from manyicl.seeds import AskPurpose, make_stream
from manyicl.tasks import Example

DEFAULT_SHOTS: tuple[Shots, ...] = (0, 1, 4, 16, 64)
# A k is asked only if at least this fraction of the queries fits after it; else it would be scored on short ones.
MIN_FIT_FRACTION = 0.9
# Room is kept for the longest query, but not for the longest tenth if they need more than this part of the sequence.
MAX_QUERY_FRACTION = 0.25
LONG_TEST = "test rows too long to be asked"
NO_TEST_ROWS = "it has no test rows"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked of every task."""

    shots: tuple[Shots, ...] = DEFAULT_SHOTS
    """Numbers of shots, and `fill` for as many as fit."""
    num_draws: int = 5
    """Random draws of shots."""
    num_queries: int = 200
    """Test rows, the same at every number of shots and in every draw."""
    seed: int = 0
    """Decides which shots and queries are drawn."""
    max_tokens: int = 2048
    """The longest sequence."""
    fixed_shots: int | Literal["most"] | None = None
    """All draws hold the same first so many shots, those of draw 0, each in an order of its own, and after them the
    rest as draw 0 has it: from that number on, draws differ in order alone. "most": each task's own largest number."""
    most_only: bool = False
    """Only the largest number of shots that a task can be asked with is asked."""
    purpose: AskPurpose = "evaluation"
    """What the answers are for. Settings such as learning rates are chosen with other draws than those that are
    reported; otherwise the choice would profit from their luck."""
    answering: AnswerSettings = DEFAULT_ANSWERS
    """How a query is answered."""
    choose: ShotPolicy = "random"
    """How shots are chosen: at "random"; "balanced", labels taking turns; or "nearest", where the last `num_nearest`
    shots are those most like the query (BM25), the most similar one last, after shared random ones."""
    num_nearest: int = NUM_NEAREST
    """Most shots of a query's own, if the nearest are chosen."""

    @property
    def choice(self) -> dict[str, Any]:
        """How shots are chosen, as results keep it: empty if at random, as results of earlier versions are."""
        return record_choice(self.choose, self.num_nearest)


def check_sweep(sweep: Sweep) -> None:
    """Refuse a sweep that asks nothing, or whose settings contradict each other.

    Raises:
        UserError: naming the setting.
    """
    limit, fixed = sweep.answering.max_new_tokens, sweep.fixed_shots
    check_choice(sweep.choose, sweep.num_nearest, calibrate=sweep.answering.calibrate)
    if limit is not None and limit >= sweep.max_tokens:
        raise UserError(
            f"max_new_tokens={limit}: an answer must leave room for its input in {sweep.max_tokens:,} tokens"
        )
    is_wrong = any(k != FILL and (not isinstance(k, int) or k < 0) for k in sweep.shots)
    if not sweep.shots or is_wrong or sweep.num_draws < 1 or sweep.num_queries < 1:
        raise UserError(
            f"shots={list(sweep.shots)}, draws={sweep.num_draws}, queries={sweep.num_queries}: need shots from 0, and"
            " at least 1"
        )
    if fixed is None:
        return
    if sweep.num_draws < 2 or (
        fixed != "most" and (not isinstance(fixed, int) or fixed < 2 or fixed not in sweep.shots)
    ):
        raise UserError(
            f"fixed_shots = {fixed}: needs one of the shot counts {sort_shots(sweep.shots)} from 2, and at least"
            f" 2 draws; there are {sweep.num_draws}"
        )


def tokens_kept_for_query(needs: NDArray[np.int64], *, max_tokens: int) -> int:
    """Return the tokens that shots leave free for a query and its answer; 0 if there are no queries.

    The longest of the queries decides, except that the longest tenth are ignored if they need more than
    `MAX_QUERY_FRACTION` of the sequence: one long query must not cost all others their shots.
    """
    if not len(needs):
        return 0
    usual = np.quantile(needs, MIN_FIT_FRACTION, method="inverted_cdf")
    return int(needs[needs <= max(usual, MAX_QUERY_FRACTION * max_tokens)].max())


def refuse_empty(sweeps: Sequence[TaskSweep]) -> None:
    """Refuse to ask nothing of any task.

    Raises:
        UserError: with the reason for each task, at the smallest number of shots.
    """
    if sweeps and not any(sweep.points for sweep in sweeps):
        fewest = sort_shots(sweeps[0].settings.shots)[0]
        reasons = (f"task '{sweep.task.name}' at {fewest} shots: {sweep.why_not(fewest)}" for sweep in sweeps)
        fix = "add rows that fit, lower `shots`, or raise `max_tokens`"
        if all(sweep.why_not(fewest) == NO_TEST_ROWS for sweep in sweeps):
            fix = "give some rows the split 'test', or name no splits"
        raise UserError(f"nothing can be asked: {list_some(reasons, mark='; ')}; {fix}")


class TaskSweep:
    """One task's sweep: which queries and shots, fixed before anything is asked.

    settings: the sweep, which is the same for all tasks.
    queries: indices into the test split, the same at every point.
    draws: for each draw, indices into the train split in the order of the shots.
    asked_shots: the numbers of shots that can be asked, ascending.
    num_filling: for each draw how many shots `fill` is; empty if it is not wanted.
    candidates: query -> its known answers; empty if it is open.
    written: known answers -> those that the tokenizer can write, with their ids.
    """

    def __init__(self, tokenized: TokenizedTask, *, tokenizer: TaskTokenizer, sweep: Sweep) -> None:
        self.tokenized, self.tokenizer, self.settings = tokenized, tokenizer, sweep
        self.task = tokenized.task
        self.candidates: dict[int, tuple[str, ...]] = {}
        self.written: dict[tuple[str, ...], list[tuple[str, list[int]]]] = {}
        self._most_tokens: dict[tuple[str, ...], int] = {}  # of an answer among known ones
        self._needs: dict[int, int] = {}
        self._ranked: dict[int, list[int]] = {}
        self._nearest: dict[tuple[int, int, int], list[int]] = {}
        self.max_new_tokens = most_answer_tokens(tokenized, None, limit=sweep.answering.max_new_tokens)
        rng = make_stream(sweep.purpose, sweep.seed, "queries", self.task.name)
        order = rng.permutation(len(tokenized.splits["test"]))
        self.wanted, needs, self.num_long_queries = self._choose_queries(order)
        room = sweep.max_tokens - len(tokenized.head_ids) - tokens_kept_for_query(needs, max_tokens=sweep.max_tokens)
        self.num_long_shots = int((tokenized.splits["train"].lengths > room).sum())
        self.draws = [self._draw(draw, most_tokens=room) for draw in range(sweep.num_draws)]
        self.asked_shots, self.queries, self.num_filling = self._fix_queries(needs)
        if sweep.most_only:
            self.asked_shots = self.asked_shots[-1:]
        if sweep.fixed_shots == "most":
            num_fixed = self.num_shared(self.most_shots(0))
            self.draws = [self._reorder(first, draw=d, num_fixed=num_fixed) for d, first in enumerate(self.draws)]
        self.num_unfit = len(self.wanted) - len(self.queries)

    @property
    def about(self) -> dict[str, Any]:
        """What a result's entry of the task holds before any answer is known."""
        return {
            "task": self.task.name,
            "sha256": self.task.sha256,
            "shots": sort_shots(self.settings.shots),
            "num_queries": len(self.queries),
            "num_draws": self.settings.num_draws,
        }

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> rows that take no part because of their length; a reason without rows is absent."""
        counts = {LONG_TRAIN: self.num_long_shots, LONG_TEST: self.num_long_queries}
        return {reason: count for reason, count in counts.items() if count}

    def why_not(self, shots: Shots) -> str:
        """Return why the task is not asked with so many shots; "" if it is."""
        num_test, num_train = (len(self.tokenized.splits[split]) for split in ("test", "train"))
        within = f"{self.settings.max_tokens:,} tokens"
        if shots in self.asked_shots:
            return ""
        if not num_test:
            return NO_TEST_ROWS
        if not len(self.wanted):
            return f"none of its {num_test:,} test rows fits {within}"
        if self.settings.most_only and shots_order(shots) < shots_order(
            max(self.asked_shots, key=shots_order, default=0)
        ):
            return "only the most shots that fit are asked"
        if shots == FILL:
            return (
                f"none of its {num_train:,} train rows is short enough for {within}"
                if num_train
                else "it has no train rows"
            )
        if shots > num_train:
            return f"it has only {num_train:,} train row{'s' * (num_train != 1)}"
        num_short = num_train - self.num_long_shots
        if shots > num_short:
            return f"only {num_short:,} of its {num_train:,} train rows are short enough for {within}"
        return f"they do not fit {within}"

    @cached_property
    def examples(self) -> list[Example]:
        """The test rows of the queries, in the order in which they are asked."""
        return [self.task.test[row] for row in self.tokenized.splits["test"].rows[self.queries].tolist()]

    @cached_property
    def query_ids(self) -> list[str]:
        """The ids of the queries, in the order in which they are asked."""
        return [example.id for example in self.examples]

    @property
    def points(self) -> list[tuple[int, Shots]]:
        """(draw, shots) of every point that is asked; at 0 shots only the first draw, as all are alike."""
        return [(draw, shots) for draw in range(self.settings.num_draws) for shots in self.shots_of(draw)]

    def shots_of(self, draw: int) -> tuple[Shots, ...]:
        """Return the shot counts that are asked in one draw, ascending."""
        return tuple(shots for shots in self.asked_shots if shots or draw == 0)

    def num_shots(self, draw: int, shots: Shots) -> int:
        """Return how many shots a draw has at the point `shots`."""
        return self.num_filling[draw] if shots == FILL else shots

    def most_shots(self, draw: int) -> int:
        """Return the most shots that are asked in a draw; 0 if nothing is."""
        return max((self.num_shots(draw, shots) for shots in self.shots_of(draw)), default=0)

    def num_shared(self, num_shots: int) -> int:
        """Return how many of `num_shots` shots all queries of a draw have in common."""
        return max(0, num_shots - self.settings.num_nearest) if self.settings.choose == "nearest" else num_shots

    def nearest_shots(self, draw: int, shots: Shots, query: int) -> list[int]:
        """Return the query's own shots at a point, as indices into the train split, in their order."""
        num_shots = self.num_shots(draw, shots)
        num_shared = self.num_shared(num_shots)
        if num_shared == num_shots:
            return []
        key = draw, num_shots, query
        if key not in self._nearest:
            order = self.draws[draw]
            self._nearest[key] = choose_own_shots(
                self._rank(query),
                free=order[num_shared:],
                lengths=self.tokenized.splits["train"].lengths,
                count=num_shots - num_shared,
                room=self.settings.max_tokens - self.prefix_tokens(draw, num_shared) - self._needs[query],
            )
        return self._nearest[key]

    def _rank(self, query: int) -> list[int]:
        """Return the train rows by their likeness to a query."""
        if query not in self._ranked:
            self._ranked[query] = self._index(self.task.test[self.tokenized.splits["test"].rows[query]])
        return self._ranked[query]

    @cached_property
    def _index(self) -> Callable[[Example], list[int]]:
        return index_examples([self.task.train[row] for row in self.tokenized.splits["train"].rows])

    def own_tokens(self, draw: int, shots: Shots) -> NDArray[np.int64]:
        """Return the tokens of each query's own shots at a point, (Q,)."""
        lengths = self.tokenized.splits["train"].lengths
        is_first = not self.num_shared(self.num_shots(draw, shots))
        owns = [self.nearest_shots(draw, shots, query) for query in self.queries.tolist()]
        between = self.tokenized.num_between if is_first else 0
        return np.array([int(lengths[own].sum()) - between * bool(own) for own in owns], dtype=np.int64)

    def asked_ids(self, draw: int, shots: Shots) -> dict[int, NDArray[np.int32]]:
        """Return what the model gets of each query after the shared shots of a point: its own shots, and its input."""
        num_shots, queries = self.num_shots(draw, shots), self.queries.tolist()
        num_shared = self.num_shared(num_shots)
        inputs = input_segments(self.tokenized, split="test", indices=self.queries, after_shots=num_shots > 0)
        asked = dict(zip(queries, inputs, strict=True))
        if num_shared == num_shots:
            return asked
        train = self.tokenized.splits["train"]
        for query in queries:
            pieces = [train.ids[train.starts[i] : train.starts[i + 1]] for i in self.nearest_shots(draw, shots, query)]
            if not num_shared:
                pieces[0] = pieces[0][self.tokenized.num_between :]
            asked[query] = np.concatenate([*pieces, asked[query]]).astype(np.int32)
        return asked

    def prefix_tokens(self, draw: int, num_shared: int) -> int:
        """Return the tokens of the head and a draw's first `num_shared` shots."""
        return int(prefix_lengths(self.tokenized, self.draws[draw])[num_shared])

    @property
    def num_encoded_tokens(self) -> int:
        """The tokens of heads and shared shots that the whole sweep encodes, each draw once up to its largest k.

        As planned: the same for a resumed sweep, and for one that several processes divide.
        """
        draws = [draw for draw in range(self.settings.num_draws) if self.shots_of(draw)]
        return sum(self.prefix_tokens(draw, self.num_shared(self.most_shots(draw))) for draw in draws)

    def plain_path(self) -> PlainPath:
        """Return the tokens of the whole sweep on whole prompts, and with a shared prefix; see `PlainPath`."""
        processed, shared = 0, self.num_encoded_tokens
        sizes = {after: self.query_sizes(after_shots=after) for after in (False, True)}
        for draw, shots in self.points:
            num_shots, own_Q = self.num_shots(draw, shots), self.own_tokens(draw, shots)
            before_Q = self.prefix_tokens(draw, self.num_shared(num_shots)) + own_Q
            prompts_Q, whole_Q, rest_Q = sizes[num_shots > 0]
            processed += int((prompts_Q * before_Q + whole_Q).sum())
            shared += int((own_Q + rest_Q).sum())
        return PlainPath(processed, shared)

    def query_sizes(self, *, after_shots: bool) -> NDArray[np.int64]:
        """Return (3, Q): each query's whole prompts, its tokens in all of them, and those after a shared prefix.

        Shots are not counted. An option has a prompt of its own; an open query has one to generate from, and another
        with its reference at its end. Tokens of generated answers are not counted.
        """
        sizes = []
        num_nodes: dict[tuple[str, ...], int] = {}
        asked = input_segments(self.tokenized, split="test", indices=self.queries, after_shots=after_shots)
        for query, num_asked in zip(self.queries.tolist(), map(len, asked), strict=True):
            known = self.candidates[query]
            options = [ids for _, ids in self.written[known]]
            if options:
                if known not in num_nodes:
                    num_nodes[known] = len(build_trie(options).tokens_N)
                whole = len(options) * num_asked + sum(map(len, options))
                sizes.append((len(options), whole, num_asked + num_nodes[known]))
            else:
                num_answer = int(self.tokenized.splits["test"].answer_lengths[query])
                # After a prefix, the last token of a reference is only predicted.
                sizes.append((2, 2 * num_asked + num_answer, num_asked + num_answer - 1))
        return np.array(sizes, dtype=np.int64).reshape(-1, 3).T

    def _draw(self, draw: int, *, most_tokens: int) -> NDArray[np.int64]:
        fixed, seed, purpose = self.settings.fixed_shots, self.settings.seed, self.settings.purpose
        place = draw if fixed is None else 0
        choose = self.settings.choose
        first = draw_shots(
            self.tokenized, seed=seed, draw=place, purpose=purpose, most_tokens=most_tokens, choose=choose
        )
        if fixed is None or fixed == "most" or draw == 0:  # "most" is known only after all draws
            return first
        return self._reorder(first, draw=draw, num_fixed=self.num_shared(fixed))

    def _reorder(self, first: NDArray[np.int64], *, draw: int, num_fixed: int) -> NDArray[np.int64]:
        rng = make_stream(self.settings.purpose, self.settings.seed, "order of shots", self.task.name, draw)
        return reorder_shots(first, num_fixed=num_fixed, rng=rng) if draw else first

    def _choose_queries(self, order: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return the first test rows of `order` that fit without shots, the tokens each needs, and how many do not fit.

        A row that does not fit with its own answer is counted wherever it stands; one that has no room for the longest
        answer it may be given only if it comes before the last query.
        """
        test, room = self.tokenized.splits["test"], self.settings.max_tokens - len(self.tokenized.head_ids)
        fits = test.lengths[order] <= room
        num_long = int((~fits).sum())
        inputs, references = (test.lengths - test.answer_lengths).tolist(), test.answer_lengths.tolist()
        task, rows = self.task, test.rows.tolist()
        queries: list[int] = []
        needs: list[int] = []
        for query in order[fits].tolist():
            if len(queries) == self.settings.num_queries:
                break
            known = self.candidates[query] = task.choices(task.test[rows[query]])
            need = inputs[query] + max(references[query], self._most_answer_tokens(known))
            self._needs[query] = need
            if need <= room:
                queries.append(query)
                needs.append(need)
            else:
                num_long += 1
        return np.array(queries, dtype=np.int64), np.array(needs, dtype=np.int64), num_long

    def _fix_queries(self, needs: NDArray[np.int64]) -> tuple[tuple[Shots, ...], NDArray[np.int64], list[int]]:
        """Return the shot counts that can be asked, the queries that fit at the largest of them in every draw, and how
        many shots fill each draw.

        What fills a draw leaves room for the queries that the largest of the other counts leaves; hence it is never
        fewer shots than these are.
        """
        lengths = [prefix_lengths(self.tokenized, draw) for draw in self.draws]
        longest = np.max(lengths, axis=0)
        fitting_shots: list[Shots] = []
        fits = np.ones(len(needs), dtype=bool)
        for shots in self.settings.shots if len(needs) else ():
            if shots == FILL or shots >= len(longest):
                continue
            fitting = needs + longest[shots] <= self.settings.max_tokens
            if fitting.mean() >= MIN_FIT_FRACTION:
                fitting_shots.append(shots)
                fits &= fitting
        filling: list[int] = []
        if FILL in self.settings.shots and len(needs):
            kept = min(int(needs[fits].max()), tokens_kept_for_query(needs, max_tokens=self.settings.max_tokens))
            room = self.settings.max_tokens - kept
            filling = [int(np.searchsorted(ends, room, side="right")) - 1 for ends in lengths]
            if any(filling):
                fitting_shots.append(FILL)
                fits &= needs <= kept
        queries = self.wanted[fits] if fitting_shots else self.wanted[:0]
        return tuple(sort_shots(fitting_shots)), queries, filling

    def _most_answer_tokens(self, known: tuple[str, ...]) -> int:
        """Return the tokens of the longest answer that a query may get, and write its known answers, if any."""
        if known not in self._most_tokens:
            pairs = self.written[known] = write_answers(self.tokenizer, known)
            self._most_tokens[known] = most_answer_tokens(self.tokenized, pairs) if known else self.max_new_tokens
        return self._most_tokens[known]

    def prefix_ids(self, draw: int, *, start: int, stop: int) -> NDArray[np.int32]:
        """Return what must be encoded to go from `start` shots (0: nothing yet but the head) to `stop` shots."""
        whole = join_examples(self.tokenized, split="train", indices=self.draws[draw][:stop].astype(np.int32))
        encoded = int(whole.spans[start - 1, 1]) if start else len(self.tokenized.head_ids)
        return whole.ids[encoded:]
