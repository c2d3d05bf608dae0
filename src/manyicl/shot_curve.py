"""Score against number of shots, with intervals: the sweep of `evaluate`, and the one-pass curve of an episode.

Shots come from a task's train split, queries from its test split. In one draw the shots for k are the first k of the
shots for any larger k, so a sweep encodes its shots once. One set of queries serves every k and every draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.answering import generate_answers
from manyicl.attention import EMPTY_PREFIX, Prefix, segment_attention
from manyicl.batches import BatchMaker, lengths_of
from manyicl.episodes import EpisodeSettings, iter_episodes
from manyicl.errors import UserError
from manyicl.intervals import Interval, mean_interval, t_interval
from manyicl.loss import answer_loss, target_logits
from manyicl.packing import Pack
from manyicl.prefix import device_of, encode_prefix, score_answers
from manyicl.scoring import macro_f1, majority_answer, majority_score, other_metrics, score_answer
from manyicl.tokens import TaskTokenizer, TokenizedTask, join_examples, query_ids

DEFAULT_SHOTS = (0, 1, 4, 16, 64)
# A k is asked only where at least this share of the queries fits behind it; else it would be scored on short ones.
MIN_FIT_SHARE = 0.9
# A free answer may take this many tokens at the most, or the longest of the task's train answers where that is less.
MAX_ANSWER_TOKENS = 256

Report = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a shot curve; scores and nats are None where nothing was scored, never 0.

    nll: mean nats of the reference answer, terminator included. num_unfit: queries that do not fit behind the largest
    k that is asked, so at no k. num_cut: generations that reached the limit. extrapolated: more shots than trained.
    unanswered: reason -> queries that a server gave no answer to; such a cell has no score.
    """

    shots: int
    score: float | None
    low: float | None
    high: float | None
    nll: float | None
    num_scored: int
    num_unfit: int
    majority_score: float | None
    other_scores: Mapping[str, float] = field(default_factory=dict)
    num_cut: int = 0
    extrapolated: bool = False
    unanswered: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered query; a row of the predictions file. nll: None where a server answered, which tells none."""

    task: str
    draw: int
    shots: int
    query: str
    prediction: str
    answer: str
    score: float
    nll: float | None


@dataclass(frozen=True, slots=True)
class ShotCurve:
    """The curve of one task, and the predictions behind it."""

    task: str
    family: str
    metric: str
    num_queries: int
    num_draws: int
    cells: tuple[Cell, ...]
    predictions: tuple[Prediction, ...] = ()


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked of every task: shot counts, draws of shots, queries, the seed, and the longest sequence."""

    shots: tuple[int, ...] = DEFAULT_SHOTS
    num_draws: int = 5
    num_queries: int = 200
    seed: int = 0
    max_tokens: int = 2048


class TaskSweep:
    """One task's sweep: which queries and shots, fixed before anything is asked."""

    def __init__(self, tokenized: TokenizedTask, *, tokenizer: TaskTokenizer, sweep: Sweep) -> None:
        self.tokenized, self.tokenizer, self.sweep = tokenized, tokenizer, sweep
        self.task = tokenized.task
        train, test = tokenized.splits["train"], tokenized.splits["test"]
        name_seed = zlib.crc32(self.task.name.encode())
        order = np.random.default_rng([sweep.seed, name_seed]).permutation(len(test))
        self.wanted: NDArray[np.int64] = order[: sweep.num_queries]
        self.draws = [
            np.random.default_rng([sweep.seed, name_seed, draw]).permutation(len(train))
            for draw in range(sweep.num_draws)
        ]
        self.candidates = self._candidates()
        self.written = {known: self._write_candidates(known) for known in set(self.candidates.values())}
        train_answers = train.answer_lengths
        self.max_new_tokens = min(
            MAX_ANSWER_TOKENS, int(train_answers.max()) if len(train_answers) else MAX_ANSWER_TOKENS
        )
        self.asked_shots, self.queries = self._fix_queries()
        self.num_unfit = len(self.wanted) - len(self.queries)

    def _candidates(self) -> dict[int, tuple[str, ...]]:
        """Return the known answers of each wanted query; empty where it is to be generated."""
        rows = self.tokenized.splits["test"].rows
        return {int(q): self.task.choices(self.task.test[rows[q]]) for q in self.wanted}

    def _write_candidates(self, known: tuple[str, ...]) -> list[tuple[str, list[int]]]:
        """Return the ids of a set of known answers, once for all queries; one that cannot be written is left out."""
        encoded = zip(known, self.tokenizer.encode_answers(known), strict=True)
        return [(text, ids) for text, ids in encoded if not isinstance(ids, str)]

    def _fix_queries(self) -> tuple[tuple[int, ...], NDArray[np.int64]]:
        """Return the shot counts that can be asked, and the queries that fit at the largest of them in every draw."""
        needs = np.array([self._num_query_tokens(int(q)) for q in self.wanted], dtype=np.int64)
        asked: list[int] = []
        queries = self.wanted[:0]
        for shots in sorted(set(self.sweep.shots)):
            if shots > len(self.tokenized.splits["train"]) or not len(self.wanted):
                continue
            longest = max(self._num_prefix_tokens(draw, shots) for draw in range(self.sweep.num_draws))
            fits = needs + longest <= self.sweep.max_tokens
            if fits.mean() >= MIN_FIT_SHARE:
                asked.append(shots)
                queries = self.wanted[fits]
        return tuple(asked), queries

    def _num_prefix_tokens(self, draw: int, shots: int) -> int:
        lengths = self.tokenized.splits["train"].lengths[self.draws[draw][:shots]]
        return len(self.tokenized.head_ids) + int(lengths.sum())

    def _num_query_tokens(self, query: int) -> int:
        test = self.tokenized.splits["test"]
        reference = int(test.answer_lengths[query])
        if self.candidates[query]:
            longest = max((len(ids) for _, ids in self.written[self.candidates[query]]), default=0)
        else:
            longest = self.max_new_tokens
        return int(test.lengths[query]) - reference + max(reference, longest)

    def prefix_ids(self, draw: int, *, start: int, stop: int) -> NDArray[np.int32]:
        """Return what must be encoded to go from `start` shots (0: nothing yet but the head) to `stop` shots."""
        whole = join_examples(self.tokenized, split="train", indices=self.draws[draw][:stop].astype(np.int32))
        encoded = int(whole.spans[start - 1, 1]) if start else len(self.tokenized.head_ids)
        return whole.ids[encoded:]


def evaluate_task(
    model: Any,
    tokenized: TokenizedTask,
    *,
    tokenizer: TaskTokenizer,
    sweep: Sweep,
    trained_shots: int | None = None,
    report: Report = lambda what, done, total: None,
) -> ShotCurve:
    """Return the shot curve of one task.

    trained_shots: most shots that an answer of this task was trained behind; larger k are marked as extrapolated.
    """
    plan = TaskSweep(tokenized, tokenizer=tokenizer, sweep=sweep)
    task = tokenized.task
    answered: dict[int, list[list[Prediction]]] = {}
    num_cut = dict.fromkeys(plan.asked_shots, 0)
    total = sum(1 if shots == 0 else sweep.num_draws for shots in plan.asked_shots)
    done = 0
    for draw in range(sweep.num_draws):
        prefix = encode_prefix(model, tokenized.head_ids)
        encoded = 0
        for shots in plan.asked_shots:
            if shots == 0 and draw > 0:
                continue  # without shots all draws are one
            prefix = encode_prefix(model, plan.prefix_ids(draw, start=encoded, stop=shots), after=prefix)
            encoded = shots
            predictions, cut = _ask_queries(model, plan, prefix=prefix, draw=draw, shots=shots)
            answered.setdefault(shots, []).append(predictions)
            num_cut[shots] += cut
            done += 1
            report(f"{task.name}, {shots} shots", done, total)
    cells = tuple(
        make_cell(plan, shots, answered.get(shots, []), num_cut=num_cut.get(shots, 0), trained_shots=trained_shots)
        for shots in sorted(set(sweep.shots))
    )
    return ShotCurve(
        task=task.name,
        family=task.family,
        metric=task.metric,
        num_queries=len(plan.queries),
        num_draws=sweep.num_draws,
        cells=cells,
        predictions=tuple(p for draws in answered.values() for row in draws for p in row),
    )


def _ask_queries(model: Any, plan: TaskSweep, *, prefix: Prefix, draw: int, shots: int) -> tuple[list[Prediction], int]:
    """Answer every query behind one prefix; return the predictions and how many generations were cut."""
    chosen = {int(q) for q in plan.queries if plan.candidates[int(q)]}
    told = _choose(model, plan, prefix=prefix, shots=shots, queries=[int(q) for q in plan.queries if int(q) in chosen])
    free = [int(q) for q in plan.queries if int(q) not in chosen]
    generated, num_cut = _generate(model, plan, prefix=prefix, draw=draw, shots=shots, queries=free)
    told |= generated
    predictions = []
    for query in (int(q) for q in plan.queries):
        text, nll = told[query]
        example = plan.task.test[plan.tokenized.splits["test"].rows[query]]
        score = score_answer(text, answer=example.answer, metric=plan.task.metric)
        predictions.append(
            Prediction(plan.task.name, draw, shots, example.id, text, example.answer, score=score, nll=nll)
        )
    return predictions, num_cut


def _choose(
    model: Any, plan: TaskSweep, *, prefix: Prefix, shots: int, queries: Sequence[int]
) -> dict[int, tuple[str, float]]:
    """Return, for each query, the candidate whose whole answer is likeliest, and the reference's nats.

    A tie goes to the candidate that comes first. A candidate that the tokenizer cannot write is never chosen.
    """
    asked, owners = [], []
    for query in queries:
        ids = query_ids(plan.tokenized, split="test", index=query, after_shots=shots > 0)
        for text, answer in plan.written[plan.candidates[query]]:
            asked.append((ids, answer))
            owners.append((query, text))
    nll, _ = score_answers(model, prefix, asked)
    costs: dict[int, dict[str, float]] = {}
    for (query, text), cost in zip(owners, nll.tolist(), strict=True):
        costs.setdefault(query, {})[text] = cost
    rows = plan.tokenized.splits["test"].rows
    return {
        query: (min(options, key=options.__getitem__), options[plan.task.test[rows[query]].answer])
        for query, options in costs.items()
    }


def _generate(
    model: Any, plan: TaskSweep, *, prefix: Prefix, draw: int, shots: int, queries: Sequence[int]
) -> tuple[dict[int, tuple[str, float]], int]:
    """Return each query's greedy answer and its reference's nats, and how many answers were cut."""
    if not queries:
        return {}, 0
    test = plan.tokenized.splits["test"]
    asked = [query_ids(plan.tokenized, split="test", index=q, after_shots=shots > 0) for q in queries]
    references = [test.ids[test.answer_starts[q] : test.starts[q + 1]].tolist() for q in queries]
    nll, _ = score_answers(model, prefix, list(zip(asked, references, strict=True)))
    before = join_examples(plan.tokenized, split="train", indices=plan.draws[draw][:shots].astype(np.int32)).ids
    prompts = [np.concatenate([before, ids]) for ids in asked]
    answers = generate_answers(model, plan.tokenizer, prompts, max_new_tokens=plan.max_new_tokens)
    told = {q: (a.text, cost) for q, a, cost in zip(queries, answers, nll.tolist(), strict=True)}
    return told, sum(answer.cut for answer in answers)


def make_cell(
    plan: TaskSweep, shots: int, draws: Sequence[Sequence[Prediction]], *, num_cut: int, trained_shots: int | None
) -> Cell:
    """Return the point of the curve at `shots` from the rows of its draws; one without a score where there is none."""
    extrapolated = trained_shots is not None and shots > trained_shots
    if not draws or not draws[0]:
        return Cell(shots, None, None, None, None, 0, len(plan.wanted), None, extrapolated=extrapolated)
    scores_DQ = np.array([[p.score for p in row] for row in draws])
    interval = mean_interval(scores_DQ, seed=plan.sweep.seed)
    low, high = score_bounds(interval, num_independent=scores_DQ.shape[1])
    flat = [p for row in draws for p in row]
    others = {
        metric: float(np.mean([score_answer(p.prediction, answer=p.answer, metric=metric) for p in flat]))
        for metric in other_metrics(plan.task.metric, family=plan.task.family)
    }
    if plan.task.metric == "accuracy" and plan.task.labels:
        per_draw = [macro_f1([p.prediction for p in row], answers=[p.answer for p in row]) for row in draws]
        others["macro_f1"] = float(np.mean(per_draw))
    return Cell(
        shots=shots,
        score=interval.mean,
        low=low,
        high=high,
        nll=mean_nll(flat),
        num_scored=len(flat),
        num_unfit=plan.num_unfit,
        majority_score=majority_score(
            [p.answer for p in draws[0]],
            train_answers=[e.answer for e in plan.task.train],
            metric=plan.task.metric,
        ),
        other_scores=others,
        num_cut=num_cut,
        extrapolated=extrapolated,
    )


def mean_nll(predictions: Sequence[Prediction]) -> float | None:
    """Return the mean nats of the references; None where one is not known."""
    known = [p.nll for p in predictions if p.nll is not None]
    return float(np.mean(known)) if known and len(known) == len(predictions) else None


def score_bounds(interval: Interval, *, num_independent: int) -> tuple[float | None, float | None]:
    """Return an interval's ends within what a score can be; (None, None) where a single value gives none.

    Scores that are all 0 or all 1 show no variance, but not certainty: then the far end is Clopper and Pearson's (1934)
    for `num_independent` queries or episodes, 1 - 0.025 ** (1 / n) away.
    """
    if np.isnan(interval.low):
        return None, None
    reach = 1 - 0.025 ** (1 / num_independent)
    if interval.low == interval.high == 0.0:
        return 0.0, reach
    if interval.low == interval.high == 1.0:
        return 1 - reach, 1.0
    return max(0.0, interval.low), min(1.0, interval.high)


def score_one_pass(
    model: Any,
    tokenized: TokenizedTask,
    *,
    num_episodes: int,
    token_budget: int,
    seed: int = 0,
    split: str = "test",
    trained_shots: int | None = None,
    report: Report = lambda what, done, total: None,
) -> ShotCurve:
    """Return loss and greedy exact match at every k, from one forward pass over each episode of held-out rows.

    Teacher-forced: an answer counts as matched where every token of it is the likeliest one, which is where greedy
    generation gives it exactly. Intervals are over episodes.

    Raises:
        UserError: the split has no example that fits.
    """
    task = tokenized.task
    settings = EpisodeSettings(token_budget=token_budget)
    if not len(tokenized.splits[split]):
        raise UserError(f"task '{task.name}': has no {split} rows, so no one-pass curve; give some rows that split")
    episodes = iter_episodes([lengths_of(tokenized, split=split)], settings=settings, seed=seed)
    maker = BatchMaker({task.name: tokenized}, split=split)
    nll_by_shots: dict[int, list[float]] = {}
    match_by_shots: dict[int, list[float]] = {}
    examples_by_shots: dict[int, list[int]] = {}
    for number in range(num_episodes):
        episode = next(episodes)
        if episode.epoch > 0:
            break  # the rows are used up, and the same rows again would only seem to be more evidence
        nll, matched = score_episode(model, maker, Pack(index=number, episodes=(episode,)))
        for shots, (cost, hit) in enumerate(zip(nll, matched, strict=True)):
            nll_by_shots.setdefault(shots, []).append(cost)
            match_by_shots.setdefault(shots, []).append(float(hit))
            examples_by_shots.setdefault(shots, []).append(int(episode.examples[shots]))
        report(task.name, number + 1, num_episodes)
    rows = tokenized.splits[split].rows
    common = majority_answer([e.answer for e in task.train])
    source = getattr(task, split)
    cells = []
    for shots, hits in sorted(match_by_shots.items()):
        interval = t_interval(np.array(hits))
        low, high = score_bounds(interval, num_independent=len(hits))
        answers = [source[rows[i]].answer for i in examples_by_shots[shots]]
        cells.append(
            Cell(
                shots=shots,
                score=interval.mean,
                low=low,
                high=high,
                nll=float(np.mean(nll_by_shots[shots])),
                num_scored=len(hits),
                num_unfit=0,
                majority_score=None if common is None else float(np.mean([a == common for a in answers])),
                extrapolated=trained_shots is not None and shots > trained_shots,
            )
        )
    return ShotCurve(
        task=task.name,
        family=task.family,
        metric="greedy_exact_match",
        num_queries=len(match_by_shots.get(0, ())),
        num_draws=len(match_by_shots.get(0, ())),
        cells=tuple(cells),
    )


def score_episode(model: Any, maker: BatchMaker, pack: Pack) -> tuple[list[float], list[bool]]:
    """Return the nats of every answer of a pack, and whether it is the greedy one, from one forward pass."""
    import torch

    batch = maker.make_batch([pack]).to(device_of(model))
    with torch.inference_mode(), segment_attention(model):
        scored = answer_loss(target_logits(model, batch, prefix=EMPTY_PREFIX), batch)
    return scored.nll_A.double().tolist(), scored.correct_A.tolist()
