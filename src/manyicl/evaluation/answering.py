"""Put a sweep's queries to an engine, draw by draw, and score the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyicl.evaluation.points import Prediction
from manyicl.evaluation.scoring.answers import best_score, score_others
from manyicl.evaluation.shots import FILL, Shots, shots_order
from manyicl.evaluation.sweep import TaskSweep
from manyicl.inference import (
    CONTENT_FREE,
    Engine,
    generate_voted,
    sameness_of,
    score_content_free,
    score_references,
    weigh_all,
    write_queries,
)
from manyicl.models import EMPTY_PREFIX, Prefix

_Asked = Mapping[int, NDArray[np.int32]]  # query -> what the model gets after the shared shots


@dataclass(frozen=True, slots=True)
class PointAnswers:
    """The answers to all queries at one number of shots, in one draw."""

    predictions: Sequence[Prediction]
    """One per query that got an answer, in the order of the queries."""
    unanswered: Mapping[str, int] = field(default_factory=dict)
    """Reason -> queries that a server gave no answer to."""


class _Reply(NamedTuple):
    """What the engine says to one query; the fields are those of `Prediction`."""

    text: str
    nll: float | None
    cut: bool = False
    choice_nll: Mapping[str, float] | None = None
    confidence: float | None = None
    fault: str = ""


def answer_draw(
    engine: Engine,
    sweep: TaskSweep,
    *,
    draw: int,
    finished: Container[Shots] = (),
    on_answer: Callable[[Shots, int], None] = lambda shots, number: None,
) -> Iterator[tuple[Shots, PointAnswers]]:
    """Yield (shots, answers) for each number of shots of one draw that is not finished, ascending.

    The shots before a finished point are encoded in the steps of an uninterrupted sweep, so that rounding is the same.

    on_answer: called with the number of shots and how many more queries have their answer, by an engine whose answers
        come one by one.
    """
    wanted = [shots for shots in sweep.shots_of(draw) if shots not in finished]
    if not wanted:
        return
    # Room for the whole draw, even if less of it is wanted: the tensors are made once.
    room = sweep.prefix_tokens(draw, sweep.num_shared(sweep.most_shots(draw)))
    prefix, encoded, head = EMPTY_PREFIX, 0, sweep.tokenized.head_ids  # the head goes in with the first shots
    for shots in (shots for shots in sweep.shots_of(draw) if shots_order(shots) <= shots_order(wanted[-1])):
        num_shared = sweep.num_shared(sweep.num_shots(draw, shots))
        ids = np.concatenate([head, sweep.prefix_ids(draw, start=encoded, stop=num_shared)])
        prefix = engine.encode(ids, after=prefix, room=room)
        encoded, head = num_shared, head[:0]
        if shots in wanted:
            yield shots, _answer_point(engine, sweep, prefix, draw=draw, shots=shots, on_answer=on_answer)


def _answer_point(
    engine: Engine,
    sweep: TaskSweep,
    prefix: Prefix,
    *,
    draw: int,
    shots: Shots,
    on_answer: Callable[[Shots, int], None],
) -> PointAnswers:
    """Put every query to the engine after one prefix; known answers are scored, or generated without likelihoods."""
    asked = sweep.asked_ids(draw, shots)
    known = [query for query in asked if sweep.candidates[query] and engine.has_likelihoods]
    replies = _choose(engine, sweep, prefix, asked={query: asked[query] for query in known}, after_shots=shots != 0)
    replies |= _generate(
        engine,
        sweep,
        prefix,
        asked={query: ids for query, ids in asked.items() if query not in replies},
        on_answer=lambda number: on_answer(shots, number),
    )
    return PointAnswers(
        predictions=_predict(sweep, draw, shots, [replies[query] for query in asked]),
        unanswered=Counter(replies[query].fault for query in asked if replies[query].fault),
    )


def _choose(engine: Engine, sweep: TaskSweep, prefix: Prefix, *, asked: _Asked, after_shots: bool) -> dict[int, _Reply]:
    """Return for each query the candidate that the sweep's settings choose, and the nats of its reference.

    A tie goes to the candidate that comes first. A candidate that the tokenizer cannot write is never chosen.
    """
    if not asked:
        return {}
    written = [sweep.written[sweep.candidates[query]] for query in asked]
    # Queries with the same known answers share them as an object, which is read once.
    distinct = {id(pairs): pairs for pairs in written}
    texts = {key: [text for text, _ in pairs] for key, pairs in distinct.items()}
    options = {key: [answer for _, answer in pairs] for key, pairs in distinct.items()}
    nats = engine.score(prefix, list(asked.values()), [options[id(pairs)] for pairs in written])
    priors: Sequence[NDArray[np.float64]] | None = None
    if sweep.settings.answering.calibrate == "contextual":
        free = write_queries(sweep.tokenizer, CONTENT_FREE, after_shots=after_shots)
        priors = score_content_free(engine, prefix, [free] * len(asked), written)
    weighed = weigh_all(nats, written, normalize=sweep.settings.answering.normalize, free=priors)
    rows, replies = sweep.tokenized.splits["test"].rows, {}
    for query, pairs, nats_O, one in zip(asked, written, nats, weighed, strict=True):
        names = texts[id(pairs)]
        choice_nll = dict(zip(names, nats_O.tolist(), strict=True))
        nll = choice_nll[sweep.task.test[rows[query]].answer]
        replies[query] = _Reply(names[one.best], nll, choice_nll=choice_nll, confidence=one.confidence)
    return replies


def _generate(
    engine: Engine,
    sweep: TaskSweep,
    prefix: Prefix,
    *,
    asked: _Asked,
    on_answer: Callable[[int], None],
) -> dict[int, _Reply]:
    """Return each query's answer, and the nats of its reference if the engine knows them.

    A query with known answers, which a server writes out, gets as many tokens as the longest of them.
    """
    if not asked:
        return {}
    test = sweep.tokenized.splits["test"]
    limits = []
    for query in asked:
        known = [len(ids) for _, ids in sweep.written.get(sweep.candidates[query], ())]
        limits.append(max(known) if known else sweep.max_new_tokens)
    prompts = list(asked.values())
    references = [test.ids[test.answer_starts[q] : test.starts[q + 1]].tolist() for q in asked]
    settings = sweep.settings
    shares: Sequence[float | None] = [None] * len(asked)
    if settings.answering.is_plain:  # a greedy answer may begin as its reference does, which is run once for both
        answers = engine.generate(prefix, prompts, limits=limits, references=references, on_answer=on_answer)
    else:
        answers, shares = generate_voted(
            engine,
            prefix,
            prompts,
            limits=limits,
            decodings=[settings.answering.decodings(settings.seed)] * len(asked),
            is_same=sameness_of(sweep.task.metric),
        )
        if engine.has_likelihoods:
            answers = score_references(engine, prefix, prompts, answers, references=references)
    return {
        query: _Reply(one.text, one.reference_nll, cut=one.cut, confidence=share, fault=one.fault)
        for query, one, share in zip(asked, answers, shares, strict=True)
    }


def _predict(sweep: TaskSweep, draw: int, shots: Shots, replies: Sequence[_Reply]) -> list[Prediction]:
    """Return the scored answer to each query that has one, given the replies to all of them in their order."""
    task, num_shots = sweep.task, sweep.num_shots(draw, shots)

    @cache  # most replies to known answers are alike
    def score(text: str, answers: tuple[str, ...]) -> tuple[float, dict[str, float]]:
        others = score_others(text, answers=answers, metric=task.metric, family=task.family)
        return best_score(text, answers=answers, metric=task.metric), others

    predictions = []
    for example, query_id, reply in zip(sweep.examples, sweep.query_ids, replies, strict=True):
        if reply.fault:
            continue
        main, others = score(reply.text, example.answers)
        predictions.append(
            Prediction(
                task.name,
                draw,
                num_shots,
                query_id,
                reply.text,
                example.answer,
                score=main,
                nll=reply.nll,
                cut=reply.cut,
                choice_nll=reply.choice_nll,
                confidence=reply.confidence,
                fill=shots == FILL,
                other_scores=others,
            )
        )
    return predictions
