"""Score against number of shots, with intervals: the sweep of `evaluate`, and the one-pass curve of an episode."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manyicl.episodes import (
    BatchMaker,
    EpisodeSettings,
    Pack,
    TaskTokenizer,
    TokenizedTask,
    iter_episodes,
    lengths_of,
    query_ids,
)
from manyicl.errors import UserError
from manyicl.evaluation.points import Cell, DrawCell, Prediction, ShotCurve
from manyicl.evaluation.scoring import (
    MACRO_F1,
    best_score,
    chance_score,
    macro_f1,
    majority_answer,
    majority_score,
    other_metrics,
    score_others,
)
from manyicl.evaluation.shots import FILL, Shots, shots_order, sort_shots
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference import (
    can_share_prefix,
    choose_option,
    device_of,
    encode_prefix,
    generate_and_score,
    prefix_lengths,
    score_choices,
)
from manyicl.intervals import Table, score_interval
from manyicl.models import Prefix, float32_head, row_attention, row_loss
from manyicl.tasks import Example, Task, find_copies

Report = Callable[[str, int, int], None]  # (what, done, total)
CellAnswers = Mapping[tuple[int, Shots], Sequence[Prediction]]  # (draw, shots) -> the answer to every query


@dataclass(frozen=True, slots=True)
class _Told:
    """What the model says to one query: its answer, the reference's nats; see Prediction."""

    text: str
    nll: float
    cut: bool = False
    choice_nll: Mapping[str, float] | None = None


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
    answered: dict[tuple[int, Shots], Sequence[Prediction]] = {}
    for draw in range(sweep.num_draws):
        for shots, predictions in ask_draw(model, plan, draw=draw):
            answered[draw, shots] = predictions
            report(f"{plan.task.name}, {shots} shots", len(answered), len(plan.cells))
    return make_curve(plan, answered, trained_shots=trained_shots, shared=can_share_prefix(model))


def ask_draw(
    model: Any, plan: TaskSweep, *, draw: int, finished: Container[Shots] = ()
) -> Iterator[tuple[Shots, list[Prediction]]]:
    """Yield (shots, predictions) for each shot count of one draw that is not finished, ascending.

    The shots before a finished k are encoded in the steps of an uninterrupted sweep, so that rounding is the same.
    """
    wanted = [shots for shots in plan.shots_of(draw) if shots not in finished]
    if not wanted:
        return
    # Of the whole draw, also where less of it is wanted: the tensors are made once.
    room = int(prefix_lengths(plan.tokenized, plan.draws[draw])[plan.most_shots(draw)])
    prefix = encode_prefix(model, plan.tokenized.head_ids, room=room, count=plan.count)
    encoded = 0
    for shots in (shots for shots in plan.shots_of(draw) if shots_order(shots) <= shots_order(wanted[-1])):
        num_shots = plan.num_shots(draw, shots)
        ids = plan.prefix_ids(draw, start=encoded, stop=num_shots)
        prefix = encode_prefix(model, ids, after=prefix, room=room, count=plan.count)
        encoded = num_shots
        if shots in wanted:
            yield shots, _ask_queries(model, plan, prefix=prefix, draw=draw, shots=shots)


def _ask_queries(model: Any, plan: TaskSweep, *, prefix: Prefix, draw: int, shots: Shots) -> list[Prediction]:
    """Answer every query behind one prefix."""
    num_shots = plan.num_shots(draw, shots)
    chosen = [int(q) for q in plan.queries if plan.candidates[int(q)]]
    free = [int(q) for q in plan.queries if not plan.candidates[int(q)]]
    told = _choose(model, plan, prefix=prefix, shots=num_shots, queries=chosen)
    told |= _generate(model, plan, prefix=prefix, shots=num_shots, queries=free)
    predictions = []
    for query in (int(q) for q in plan.queries):
        one = told[query]
        example = plan.task.test[plan.tokenized.splits["test"].rows[query]]
        score = best_score(one.text, answers=example.answers, metric=plan.task.metric)
        predictions.append(
            Prediction(
                plan.task.name,
                draw,
                num_shots,
                example.id,
                one.text,
                example.answer,
                score=score,
                nll=one.nll,
                cut=one.cut,
                choice_nll=one.choice_nll,
                fill=shots == FILL,
                other_scores=score_others(
                    one.text, answers=example.answers, metric=plan.task.metric, family=plan.task.family
                ),
            )
        )
    return predictions


def _choose(model: Any, plan: TaskSweep, *, prefix: Prefix, shots: int, queries: Sequence[int]) -> dict[int, _Told]:
    """Return, for each query, the candidate that is likeliest as `sweep.by` says, and the reference's nats.

    A tie goes to the candidate that comes first. A candidate that the tokenizer cannot write is never chosen.
    """
    ids = [query_ids(plan.tokenized, split="test", index=query, after_shots=shots > 0) for query in queries]
    written = [plan.written[plan.candidates[query]] for query in queries]
    options = {id(pairs): [answer for _, answer in pairs] for pairs in written}
    nats = score_choices(model, prefix, ids, [options[id(pairs)] for pairs in written], count=plan.count)
    rows = plan.tokenized.splits["test"].rows
    told = {}
    for query, pairs, nats_O in zip(queries, written, nats, strict=True):
        choice_nll = dict(zip((text for text, _ in pairs), nats_O.tolist(), strict=True))
        text, _ = pairs[choose_option(nats_O, options[id(pairs)], by=plan.sweep.by)]
        told[query] = _Told(text, choice_nll[plan.task.test[rows[query]].answer], choice_nll=choice_nll)
    return told


def _generate(model: Any, plan: TaskSweep, *, prefix: Prefix, shots: int, queries: Sequence[int]) -> dict[int, _Told]:
    """Return each query's greedy answer, and its reference's nats."""
    if not queries:
        return {}
    test = plan.tokenized.splits["test"]
    asked = [query_ids(plan.tokenized, split="test", index=q, after_shots=shots > 0) for q in queries]
    references = [test.ids[test.answer_starts[q] : test.starts[q + 1]].tolist() for q in queries]
    answers, nats = generate_and_score(
        model,
        plan.tokenizer,
        prefix,
        list(zip(asked, references, strict=True)),
        max_new_tokens=plan.max_new_tokens,
        count=plan.count,
    )
    return {q: _Told(a.text, cost, cut=a.cut) for q, a, cost in zip(queries, answers, nats.tolist(), strict=True)}


def make_curve(
    plan: TaskSweep,
    answered: CellAnswers,
    *,
    trained_shots: int | None = None,
    shared: bool | None = None,
) -> ShotCurve:
    """Return the curve of a task from the answers of all its cells; one that is missing is null, never 0.

    shared: whether the queries of a draw shared its encoded shots; None if that is not known, as of a server.
    """
    audits = _audit_draws(plan)
    cells = []
    for shots in sort_shots(plan.sweep.shots):
        rows = {draw: answered[draw, shots] for draw in range(plan.sweep.num_draws) if answered.get((draw, shots))}
        most = max((plan.num_shots(draw, shots) for draw in rows), default=0 if shots == FILL else shots)
        extrapolated = trained_shots is not None and most > trained_shots
        if rows:
            draws = tuple(_draw_cell(audits[draw, shots], draw, row) for draw, row in rows.items())
            cells.append(_make_cell(plan, shots, rows, draws=draws, extrapolated=extrapolated))
        else:
            unscored = Cell(shots, None, None, None, None, 0, len(plan.wanted), None, why_not=plan.why_not(shots))
            cells.append(replace(unscored, extrapolated=extrapolated))
    return ShotCurve(
        task=plan.task.name,
        family=plan.task.family,
        metric=plan.task.metric,
        num_queries=len(plan.queries),
        num_draws=plan.sweep.num_draws,
        cells=tuple(cells),
        predictions=tuple(
            p for cell in sorted(answered, key=lambda cell: (shots_order(cell[1]), cell[0])) for p in answered[cell]
        ),
        sha256=plan.task.sha256,
        num_encoded_tokens=plan.num_encoded_tokens if shared else None,
        left_out=plan.left_out,
        plain_path=plan.plain_path() if shared is False else None,
    )


def _make_cell(
    plan: TaskSweep,
    shots: Shots,
    rows: Mapping[int, Sequence[Prediction]],
    *,
    draws: tuple[DrawCell, ...],
    extrapolated: bool,
) -> Cell:
    scores_DQ = np.array([[p.score for p in row] for row in rows.values()], dtype=np.float64)
    queries = tuple(p.query for p in next(iter(rows.values())))
    interval = score_interval([{plan.task.name: Table(scores_DQ, queries)}])
    low, high = interval.ends
    flat = [p for row in rows.values() for p in row]
    right = _right_answers(plan)
    scores = [one.score for one in draws] if len(draws) > 1 else []
    return Cell(
        shots=shots,
        score=interval.mean,
        low=low,
        high=high,
        nll=mean_nll(flat),
        num_scored=len(flat),
        num_unfit=plan.num_unfit,
        majority_score=majority_score(
            [right[p.query] for p in next(iter(rows.values()))],
            train_answers=[e.answer for e in plan.task.train],
            metric=plan.task.metric,
        ),
        chance_score=chance_of(plan),
        other_scores=_other_scores(plan, list(rows.values())),
        num_cut=sum(one.num_cut for one in draws),
        extrapolated=extrapolated,
        spread=float(np.std(scores, ddof=1)) if scores else None,
        worst_draw=min(scores, default=None),
        best_draw=max(scores, default=None),
        draws=draws,
        mean_shots=float(np.mean([one.num_shots for one in draws])),
    )


def chance_of(plan: TaskSweep) -> float | None:
    """Return what answering the queries by dice would score; None if an answer is open."""
    rows = plan.tokenized.splits["test"].rows
    examples = [plan.task.test[rows[q]] for q in plan.queries]
    return _chance(plan.task, examples)


def _chance(task: Task, examples: Sequence[Example]) -> float | None:
    choices, answers = [task.choices(example) for example in examples], [example.answers for example in examples]
    return chance_score(choices, test_answers=answers, metric=task.metric)


def _right_answers(plan: TaskSweep) -> dict[str, tuple[str, ...]]:
    """Return every right answer of each query, by its id."""
    rows = plan.tokenized.splits["test"].rows
    return {example.id: example.answers for example in (plan.task.test[rows[q]] for q in plan.queries)}


def mean_nll(predictions: Sequence[Prediction]) -> float | None:
    """Return the mean nats of the references; None where one is not known."""
    known = [p.nll for p in predictions if p.nll is not None]
    return float(np.mean(known)) if known and len(known) == len(predictions) else None


def _other_scores(plan: TaskSweep, rows: Sequence[Sequence[Prediction]]) -> dict[str, float]:
    """Return the means of the metrics that stand beside the task's own; macro-F1 is the mean of the draws' own."""
    flat = [p for row in rows for p in row]
    others = {
        metric: float(np.mean([(p.other_scores or {})[metric] for p in flat]))
        for metric in other_metrics(plan.task.metric, family=plan.task.family)
        if all(metric in (p.other_scores or {}) for p in flat)  # answers of an earlier version have none
    }
    if plan.task.metric == "accuracy" and plan.task.labels:
        per_draw = [macro_f1([p.prediction for p in row], answers=[p.answer for p in row]) for row in rows]
        others[MACRO_F1] = float(np.mean(per_draw))
    return others


def _draw_cell(audit: Mapping[str, Any], draw: int, row: Sequence[Prediction]) -> DrawCell:
    score = float(np.mean([p.score for p in row]))
    return DrawCell(draw=draw, score=score, num_cut=sum(p.cut for p in row), **audit)


def _audit_draws(plan: TaskSweep) -> dict[tuple[int, Shots], dict[str, Any]]:
    """Return, for each (draw, shots), what stands among the shots: the fields of DrawCell that need no answer."""
    train, test = plan.tokenized.splits["train"], plan.tokenized.splits["test"]
    shown = np.unique(np.concatenate([order[: plan.most_shots(draw)] for draw, order in enumerate(plan.draws)]))
    copies = find_copies(
        [plan.task.test[test.rows[q]].input for q in plan.queries],
        shots=[plan.task.train[train.rows[shot]].input for shot in shown],
    )
    audits = {}
    for draw, order in enumerate(plan.draws):
        most = plan.most_shots(draw)
        place = dict(zip(order[:most].tolist(), range(most), strict=True))  # shot -> how many stand before it
        places = [place.get(int(shot), most) for shot in shown]
        # The place of each query's first copy; it is among the first k shots where that is below k.
        exact = np.array([min((places[n] for n in found.exact), default=most) for found in copies])
        near = np.array([min((places[n] for n in found.near), default=most) for found in copies])
        examples = [plan.task.train[train.rows[shot]] for shot in order[:most]]
        for asked in plan.shots_of(draw):
            shots = plan.num_shots(draw, asked)
            labels = Counter(example.answer for example in examples[:shots]) if plan.task.labels else Counter()
            ids = "\n".join(example.id for example in examples[:shots])
            audits[draw, asked] = {
                "num_shots": shots,
                "shots_sha256": hashlib.sha256(ids.encode()).hexdigest(),
                "num_copies": int((exact < shots).sum()),
                "num_near_copies": int(((near < shots) & (exact >= shots)).sum()),
                "top_label_share": max(labels.values()) / shots if labels else None,
                "num_missing_labels": len(set(plan.task.labels) - set(labels)) if labels else None,
            }
    return audits


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
    lengths = lengths_of(tokenized, split=split)
    alone = lengths.num_head_tokens - lengths.num_between + lengths.lengths
    num_long = int((alone > token_budget).sum())
    if num_long == len(alone):
        raise UserError(
            f"task '{task.name}': none of its {num_long:,} {split} rows fits {token_budget:,} tokens (the shortest"
            f" needs {int(alone.min()):,}); raise --max-tokens, or leave the task out"
        )
    episodes = iter_episodes([lengths], settings=settings, seed=seed, purpose="one-pass curve")
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
        table = Table(np.array([hits]), tuple(map(str, range(len(hits)))))
        interval = score_interval([{task.name: table}])
        low, high = interval.ends
        examples = [source[rows[i]] for i in examples_by_shots[shots]]
        cells.append(
            Cell(
                shots=shots,
                score=interval.mean,
                low=low,
                high=high,
                nll=float(np.mean(nll_by_shots[shots])),
                num_scored=len(hits),
                num_unfit=0,
                majority_score=None if common is None else float(np.mean([e.answer == common for e in examples])),
                chance_score=_chance(task, examples),
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
        sha256=task.sha256,
        left_out={f"{split} rows too long to be asked": num_long} if num_long else {},
    )


def score_episode(model: Any, maker: BatchMaker, pack: Pack) -> tuple[list[float], list[bool]]:
    """Return the nats of every answer of a pack, and whether it is the greedy one, from one forward pass."""
    import torch

    batch = maker.make_batch([pack])
    text, longest = batch.input_ids_1T[0].numpy(), max(batch.segment_lengths)
    batch = batch.to(device_of(model))
    with torch.inference_mode(), row_attention(model, text, longest=longest), float32_head(model):
        scored = row_loss(model, batch)
    return scored.nll_A.double().tolist(), scored.correct_A.tolist()
