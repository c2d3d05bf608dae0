"""Score against number of shots, with intervals: the sweep of `evaluate`, and the one-pass curve of an episode."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from manyicl.episodes import BatchMaker, EpisodeSettings, Pack, TokenizedTask, iter_episodes, lengths_of
from manyicl.errors import UserError
from manyicl.evaluation.answering import PointAnswers
from manyicl.evaluation.points import DrawPoint, Prediction, ShotCurve, ShotPoint
from manyicl.evaluation.scoring.answers import (
    MACRO_F1,
    chance_score,
    macro_f1,
    majority_answer,
    majority_score,
    other_metrics,
)
from manyicl.evaluation.scoring.confidence import measure_confidence
from manyicl.evaluation.shots import FILL, Shots, sort_shots
from manyicl.evaluation.sweep import LONG_TEST, TaskSweep
from manyicl.inference import check_finite
from manyicl.intervals import Table, score_interval
from manyicl.models import device_of, float32_head, row_attention, row_loss
from manyicl.tasks import Example, Task, find_copies

OnProgress = Callable[[str, int, int], None]  # (what is under way, done, total)
SweepAnswers = Mapping[tuple[int, Shots], PointAnswers]  # by (draw, shots)


def make_curve(
    sweep: TaskSweep, answers: SweepAnswers, *, trained_shots: int | None = None, shared: bool | None = None
) -> ShotCurve:
    """Return the curve of a task from the answers at all its points; a point without answers is null, never 0.

    A point at which a query has no answer has no score either: those that were answered are not a fair part of all.

    trained_shots: most shots that an answer of this task was trained after; larger k are marked as extrapolated.
    shared: whether the queries of a draw shared its encoded shots; None if that is not known, as of a server.
    """
    audits, levels = _audit_draws(sweep), _levels(sweep)
    points: list[ShotPoint] = []
    predictions: list[Prediction] = []
    for shots in sort_shots(sweep.settings.shots):
        given = {draw: answers[draw, shots] for draw in range(sweep.settings.num_draws) if (draw, shots) in answers}
        unanswered = sum((Counter(one.unanswered) for one in given.values()), Counter[str]())
        rows = {} if unanswered else {draw: one.predictions for draw, one in given.items() if one.predictions}
        most = max((sweep.num_shots(draw, shots) for draw in rows), default=0 if shots == FILL else shots)
        extrapolated = trained_shots is not None and most > trained_shots
        if rows:
            draws = tuple(_draw_point(audits[draw, shots], draw, row) for draw, row in rows.items())
            point = _make_point(sweep, shots, list(rows.values()), draws=draws, levels=levels)
            predictions += [p for row in rows.values() for p in row]
        elif unanswered:
            point = _incomplete_point(shots, list(given.values()), unanswered, levels=levels)
        else:
            point = ShotPoint(shots, None, None, None, None, 0, len(sweep.wanted), None, why_not=sweep.why_not(shots))
        points.append(replace(point, extrapolated=extrapolated))
    return ShotCurve(
        task=sweep.task.name,
        family=sweep.task.family,
        metric=sweep.task.metric,
        num_queries=len(sweep.queries),
        num_draws=sweep.settings.num_draws,
        points=tuple(points),
        predictions=tuple(predictions),
        sha256=sweep.task.sha256,
        template=sweep.task.template if sweep.task.templates else None,
        num_encoded_tokens=sweep.num_encoded_tokens if shared else None,
        left_out=sweep.left_out,
        plain_path=sweep.plain_path() if shared is False else None,
    )


def _levels(sweep: TaskSweep) -> dict[str, Any]:
    """Return the fields of a point that its queries alone decide, which are the same at every number of shots."""
    task = sweep.task
    train = [example.answer for example in task.train]
    answers = [example.answers for example in sweep.examples]
    return {
        "num_unfit": sweep.num_unfit,
        "majority_score": majority_score(answers, train_answers=train, metric=task.metric),
        "chance_score": _chance(task, sweep.examples),
    }


def _chance(task: Task, examples: Sequence[Example]) -> float | None:
    choices, answers = [task.choices(example) for example in examples], [example.answers for example in examples]
    return chance_score(choices, test_answers=answers, metric=task.metric)


def _incomplete_point(
    shots: Shots, given: Sequence[PointAnswers], unanswered: Mapping[str, int], *, levels: dict[str, Any]
) -> ShotPoint:
    """Return a point without a score, with the counts of what a server answered and did not answer."""
    predictions = [p for one in given for p in one.predictions]
    return ShotPoint(
        shots=shots,
        score=None,
        low=None,
        high=None,
        nll=None,
        num_scored=len(predictions),
        num_cut=sum(p.cut for p in predictions),
        unanswered=dict(sorted(unanswered.items())),
        **levels,
    )


def _make_point(
    sweep: TaskSweep,
    shots: Shots,
    rows: Sequence[Sequence[Prediction]],
    *,
    draws: tuple[DrawPoint, ...],
    levels: dict[str, Any],
) -> ShotPoint:
    """Return a point from the answers of its draws."""
    scores_DQ = np.array([[p.score for p in row] for row in rows], dtype=np.float64)
    interval = score_interval([{sweep.task.name: Table(scores_DQ, tuple(p.query for p in rows[0]))}])
    low, high = interval.ends
    flat = [p for row in rows for p in row]
    scores = [one.score for one in draws] if len(draws) > 1 else []
    return ShotPoint(
        shots=shots,
        score=interval.mean,
        low=low,
        high=high,
        nll=mean_nll(flat),
        num_scored=len(flat),
        other_scores=_other_scores(sweep, rows),
        num_cut=sum(one.num_cut for one in draws),
        spread=float(np.std(scores, ddof=1)) if scores else None,
        worst_draw=min(scores, default=None),
        best_draw=max(scores, default=None),
        draws=draws,
        mean_shots=float(np.mean([one.num_shots for one in draws])),
        confidence=measure_confidence(flat),
        **levels,
    )


def mean_nll(predictions: Sequence[Prediction]) -> float | None:
    """Return the mean nats of the references; None if one is not known."""
    known = [p.nll for p in predictions if p.nll is not None]
    return float(np.mean(known)) if known and len(known) == len(predictions) else None


def _other_scores(sweep: TaskSweep, rows: Sequence[Sequence[Prediction]]) -> dict[str, float]:
    """Return the means of the metrics beside the task's own; macro-F1 is the mean of the draws' own."""
    flat = [p for row in rows for p in row]
    others = {
        metric: float(np.mean([(p.other_scores or {})[metric] for p in flat]))
        for metric in other_metrics(sweep.task.metric, family=sweep.task.family)
        if all(metric in (p.other_scores or {}) for p in flat)  # answers of an earlier version have none
    }
    if sweep.task.metric == "accuracy" and sweep.task.labels:
        per_draw = [macro_f1([p.prediction for p in row], answers=[p.answer for p in row]) for row in rows]
        others[MACRO_F1] = float(np.mean(per_draw))
    return others


def _draw_point(audit: Mapping[str, Any], draw: int, row: Sequence[Prediction]) -> DrawPoint:
    score = float(np.mean([p.score for p in row]))
    return DrawPoint(draw=draw, score=score, num_cut=sum(p.cut for p in row), **audit)


def _audit_draws(sweep: TaskSweep) -> dict[tuple[int, Shots], dict[str, Any]]:
    """Return, for each (draw, shots), an audit of its shots: the fields of DrawPoint that need no answer."""
    train = sweep.tokenized.splits["train"]
    queries = sweep.queries.tolist()
    with_own = queries if sweep.settings.choose == "nearest" else []
    own = {(point, query): sweep.nearest_shots(*point, query) for point in sweep.points for query in with_own}
    shown = sorted(
        {shot for draw, order in enumerate(sweep.draws) for shot in order[: sweep.most_shots(draw)].tolist()}
        | {shot for nearest in own.values() for shot in nearest}
    )
    copies = find_copies(
        [example.input for example in sweep.examples],
        shots=[sweep.task.train[train.rows[shot]].input for shot in shown],
    )
    copied = [(query, found) for query, found in zip(queries, copies, strict=True) if found.exact or found.near]
    audits = {}
    for draw, order in enumerate(sweep.draws):
        most = sweep.most_shots(draw)
        place = dict(zip(order[:most].tolist(), range(most), strict=True))  # shot -> how many stand before it
        examples = [sweep.task.train[train.rows[shot]] for shot in order[:most]]
        example_ids = [example.id for example in examples]
        for point in sweep.shots_of(draw):
            shots = sweep.num_shots(draw, point)
            shared = sweep.num_shared(shots)
            num_copies = num_near = 0
            for query, found in copied:
                nearest = own.get(((draw, point), query), ())
                exact, near = (
                    any(place.get(shown[n], most) < shared or shown[n] in nearest for n in matches)
                    for matches in (found.exact, found.near)
                )
                num_copies += exact
                num_near += near and not exact
            # Each query's nearest shots have labels of their own, so a draw has no share of a label then.
            is_counted = sweep.task.labels and shared == shots
            labels = Counter(example.answer for example in examples[:shots]) if is_counted else Counter()
            ids = "\n".join(example_ids[:shots])
            if shared < shots:
                ids += f"\nthe last {shots - shared} are the nearest"
            audits[draw, point] = {
                "num_shots": shots,
                "shots_sha256": hashlib.sha256(ids.encode()).hexdigest(),
                "num_copies": num_copies,
                "num_near_copies": num_near,
                "top_label_share": max(labels.values()) / shots if labels else None,
                "num_missing_labels": len(set(sweep.task.labels) - set(labels)) if labels else None,
            }
    return audits


@dataclass(slots=True)
class _Reached:
    """The different test rows that stood at one place of an episode."""

    nll: list[float] = field(default_factory=list)
    """Nats of each answer."""
    matched: list[float] = field(default_factory=list)
    """1.0 for each answer that is the greedy one, else 0.0."""
    rows: set[int] = field(default_factory=set)
    """Their numbers in the test split."""


def score_one_pass(
    model: Any,
    tokenized: TokenizedTask,
    *,
    num_episodes: int,
    token_budget: int,
    seed: int = 0,
    trained_shots: int | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> ShotCurve:
    """Return loss and greedy exact match at every k, from one forward pass over each episode of test rows.

    Teacher-forced: an answer is matched if every token of it is the likeliest one, which is exactly when greedy
    generation would give it. If the test rows are used up before `num_episodes` are, the next episodes have them in
    another order. A row that has stood at a place before is not counted there again: it would only seem to be more
    evidence. Intervals are over the different rows of a place.

    Raises:
        UserError: no test row fits, or a likelihood is not finite.
    """
    task = tokenized.task
    if not len(tokenized.splits["test"]):
        raise UserError(f"task '{task.name}': has no test rows, so no one-pass curve; give some rows that split")
    lengths = lengths_of(tokenized, split="test")
    num_long = int((lengths.alone > token_budget).sum())
    if num_long == len(lengths.alone):
        raise UserError(
            f"task '{task.name}': none of its {num_long:,} test rows fits {token_budget:,} tokens (the shortest"
            f" needs {int(lengths.alone.min()):,}); raise `max_tokens`, or leave the task out"
        )
    settings = EpisodeSettings(token_budget=token_budget)
    episodes = iter_episodes([lengths], settings=settings, seed=seed, purpose="one-pass curve")
    maker = BatchMaker({task.name: tokenized}, split="test")
    rows = tokenized.splits["test"].rows
    reached: dict[int, _Reached] = {}
    for number in range(num_episodes):
        episode = next(episodes)
        nll, matched = score_episode(model, maker, Pack(index=number, episodes=(episode,)))
        for shots, (cost, hit) in enumerate(zip(nll, matched, strict=True)):
            place, row = reached.setdefault(shots, _Reached()), int(rows[episode.examples[shots]])
            if row not in place.rows:
                place.rows.add(row)
                place.nll.append(cost)
                place.matched.append(float(hit))
        on_progress(task.name, number + 1, num_episodes)
    examples = [task.test[row] for row in rows]
    common = majority_answer([e.answer for e in task.train])
    # Of all rows, not of a place's: a place has few of them, and others than the next place.
    majority = None if common is None else float(np.mean([e.answer == common for e in examples]))
    chance = _chance(task, examples)
    points = [
        replace(
            _one_pass_point(task, shots, place),
            majority_score=majority,
            chance_score=chance,
            extrapolated=trained_shots is not None and shots > trained_shots,
        )
        for shots, place in sorted(reached.items())
    ]
    return ShotCurve(
        task=task.name,
        family=task.family,
        metric="greedy_exact_match",
        num_queries=points[0].num_scored,
        num_draws=points[0].num_scored,
        points=tuple(points),
        sha256=task.sha256,
        template=task.template if task.templates else None,
        left_out={LONG_TEST: num_long} if num_long else {},
    )


def _one_pass_point(task: Task, shots: int, reached: _Reached) -> ShotPoint:
    """Return the point of the rows that stood after `shots` others, without majority and chance."""
    queries = tuple(map(str, range(len(reached.matched))))
    interval = score_interval([{task.name: Table(np.array([reached.matched]), queries)}])
    low, high = interval.ends
    return ShotPoint(
        shots=shots,
        score=interval.mean,
        low=low,
        high=high,
        nll=float(np.mean(reached.nll)),
        num_scored=len(reached.matched),
        num_unfit=0,
        majority_score=None,
    )


def score_episode(model: Any, maker: BatchMaker, pack: Pack) -> tuple[list[float], list[bool]]:
    """Return the nats of every answer of a pack, and whether it is the greedy one, from one forward pass.

    Raises:
        UserError: a likelihood that is not finite.
    """
    import torch

    batch = maker.make_batch([pack])
    text, longest = batch.input_ids_1T[0].numpy(), max(batch.segment_lengths)
    batch = batch.to(device_of(model))
    with torch.inference_mode(), row_attention(model, text, longest=longest), float32_head(model):
        scored = row_loss(model, batch)
    nll_A = scored.nll_A.double().cpu().numpy()
    check_finite([nll_A])
    return nll_A.tolist(), scored.correct_A.tolist()
