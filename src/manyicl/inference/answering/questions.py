"""Answer single inputs of a task after shots of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer, TokenizedTask, join_examples
from manyicl.errors import UserError, check_kind, refuse_tables, take_whole
from manyicl.inference.answering.choices import CONTENT_FREE, score_content_free, weigh_choices
from manyicl.inference.answering.generation import OnIds
from manyicl.inference.answering.settings import (
    DEFAULT_ANSWERS,
    AnswerSettings,
    check_min_confidence,
    is_unsure,
)
from manyicl.inference.answering.voting import IsSame, generate_voted, sameness_of
from manyicl.inference.drawing import (
    LONG_TRAIN,
    NUM_NEAREST,
    InputIndex,
    ShotPolicy,
    check_choice,
    choose_own_shots,
    draw_shots,
    most_answer_tokens,
    prefix_lengths,
    write_answers,
)
from manyicl.inference.engine import Engine, choose_engine
from manyicl.inference.model import InferenceModel, tokenize_for
from manyicl.models import Prefix
from manyicl.tasks import Task


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one input."""

    input: str
    """The input as it was given."""
    answer: str
    """A known answer of the task, or what the model generated."""
    nll: float | None
    """Nats of the answer with its terminator; None if it was cut."""
    shots: int
    """How many shots stood before the input."""
    cut: bool
    """Whether a generated answer reached its limit."""
    confidence: float | None = None
    """Probability of the answer among the known ones, or the share of samples that gave it; else None."""
    unsure: bool = False
    """Whether the confidence is below the one that was wanted, so that the answer should not be used."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> train rows that could not be shots."""


def _list_inputs(inputs: Iterable[str]) -> list[str]:
    """Return the inputs; raise a UserError for one text or a table in place of a list, or a member that is no text."""
    if isinstance(inputs, str):
        raise UserError(f"inputs={inputs!r}: is one text; give a list of inputs, such as [{inputs!r}]")
    refuse_tables("inputs", inputs)
    if not isinstance(inputs, Iterable):
        raise UserError(f"inputs={str(inputs)[:50]}: give a list of texts")
    texts = list(inputs)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"input {number}: {text!r} is not a text; give a list of texts")
        if not text.strip():
            raise UserError(f"input {number}: is empty; give a text, or leave it out")
    return [str(text) for text in texts]  # numpy has texts of a class of its own


@dataclass(frozen=True, slots=True)
class Questions:
    """Inputs of a task with the shots that are shown before each, as `answer_questions` takes them."""

    inputs: tuple[str, ...]
    shots: int
    """How many stand before each input."""
    left_out: Mapping[str, int]
    """Reason -> train rows that could not be shots."""
    task: Task
    before: NDArray[np.int32]
    """Ids of the head and of the shots that all inputs share."""
    queries: tuple[NDArray[np.int32], ...]
    """Ids that follow, for each input: its own shots, then the input."""
    choices: tuple[tuple[str, Sequence[int]], ...]
    """The known answers with their ids; () if answers are generated."""
    limit: int
    """Most tokens of an answer."""


def ask(
    model: InferenceModel,
    task: Task,
    inputs: Iterable[str],
    *,
    shots: int | None = None,
    seed: int = 0,
    answering: AnswerSettings = DEFAULT_ANSWERS,
    min_confidence: float | None = None,
    choose: ShotPolicy = "random",
    num_nearest: int = NUM_NEAREST,
) -> list[Answer]:
    """Answer each input after the same shots, from one draw; or after the same and some that are most like it.

    A train row that leaves no room for the longest input cannot be a shot; `Answer.left_out` counts such rows.

    inputs: texts: a list, an iterator, a column of a table. The answers have their order.
    shots: how many. Default: as many as fit.
    answering: how an input is answered. A generated answer that reached its limit is marked as cut.
    min_confidence: answers with less confidence are marked as unsure. Default: none is.
    choose: how shots are chosen: at "random"; "balanced", labels taking turns; or "nearest", the last `num_nearest` of
        them those most like the input (BM25), the most similar one last.
    num_nearest: most shots of an input's own, if the nearest are chosen.

    Raises:
        UserError: an empty input, fewer train rows than `shots`, an input that does not fit after the shots, nearest
            shots of a task with embeddings, or a `min_confidence` for answers that have no confidence.
    """
    check_kind("model", model, InferenceModel)
    check_kind("task", task, Task)
    check_kind("answering", answering, AnswerSettings)
    check_min_confidence(min_confidence, has_confidence=bool(task.labels) or answering.samples > 1)
    questions = pose_questions(
        model, task, inputs, shots=shots, seed=seed, answering=answering, choose=choose, num_nearest=num_nearest
    )
    return answer_questions(model, questions, seed=seed, answering=answering, min_confidence=min_confidence)


def pose_questions(
    model: InferenceModel,
    task: Task,
    inputs: Iterable[str],
    *,
    shots: int | None,
    seed: int,
    answering: AnswerSettings,
    choose: ShotPolicy,
    num_nearest: int,
) -> Questions:
    """Choose the shots of inputs, without the model's answers. The parameters are those of `ask`.

    Raises:
        UserError: as `ask`.
    """
    check_choice(choose, num_nearest, calibrate=answering.calibrate)
    if shots is not None:
        shots = take_whole("shots", shots, least=0, advice=", or leave it out for as many as fit")
    seed, num_nearest = take_whole("seed", seed), take_whole("num_nearest", num_nearest)
    inputs = _list_inputs(inputs)
    tokenized = tokenize_for(task, model)
    written = write_answers(model.tokenizer, task.labels) if task.labels else ()
    longest = most_answer_tokens(tokenized, written or None, limit=answering.max_new_tokens)
    queries = write_queries(model.tokenizer, inputs, after_shots=True)
    room = model.max_tokens - longest - max((len(q) for q in queries), default=0)
    order = draw_shots(tokenized, seed=seed, draw=0, most_tokens=room - len(tokenized.head_ids), choose=choose)
    num_long = len(tokenized.splits["train"]) - len(order)
    fitting = int(np.searchsorted(prefix_lengths(tokenized, order), room, side="right")) - 1
    if fitting < (shots or 0):  # -1 if not even the head fits
        number = 1 + max(range(len(queries)), key=lambda n: len(queries[n]), default=0)
        raise UserError(
            _describe_no_room(tokenized, num_fitting=fitting, shots=shots, number=number, max_tokens=model.max_tokens)
        )
    num_shots = fitting if shots is None else shots
    num_shared = max(0, num_shots - num_nearest) if choose == "nearest" else num_shots
    before = join_examples(tokenized, split="train", indices=order[:num_shared].astype(np.int32)).ids
    if num_shared < num_shots:
        rooms = [model.max_tokens - longest - len(query) - len(before) for query in queries]
        own = _own_shots(tokenized, inputs, rooms, free=order[num_shared:], count=num_shots - num_shared)
        queries = [np.concatenate([ids, query]) for ids, query in zip(own, queries, strict=True)]
    if not num_shared:
        queries = [query[tokenized.num_between :] for query in queries]
    left_out = {LONG_TRAIN: num_long} if num_long else {}
    return Questions(
        tuple(inputs), num_shots, left_out, task, before, tuple(queries), choices=tuple(written), limit=longest
    )


def answer_questions(
    model: InferenceModel,
    questions: Questions,
    *,
    seed: int,
    answering: AnswerSettings,
    min_confidence: float | None,
) -> list[Answer]:
    """Return the model's answers. The parameters are those of `ask`.

    Raises:
        UserError: as `ask`.
    """
    count = len(questions.inputs)
    if not count:
        return []
    with choose_engine(model) as engine:
        answers = answer_queries(
            engine,
            model.tokenizer,
            engine.encode(questions.before),
            questions.queries,
            choices=[questions.choices] * count,
            limits=[questions.limit] * count,
            answering=[answering] * count,
            seeds=[seed] * count,
            is_same=sameness_of(questions.task.metric),
            free=[write_queries(model.tokenizer, CONTENT_FREE, after_shots=questions.shots > 0)] * count,
        )
    return [
        Answer(
            text,
            one.text,
            nll=one.nll,
            shots=questions.shots,
            cut=one.cut,
            confidence=one.confidence,
            unsure=is_unsure(one.confidence, min_confidence),
            left_out=questions.left_out,
        )
        for text, one in zip(questions.inputs, answers, strict=True)
    ]


def _own_shots(
    tokenized: TokenizedTask, inputs: Sequence[str], rooms: Sequence[int], *, free: NDArray[np.int64], count: int
) -> list[NDArray[np.int32]]:
    """Return the ids of each input's own shots: `count` of the train rows `free`, the most similar one last.

    rooms: most tokens of them, for each input.

    Raises:
        UserError: the rows have embeddings, or bm25s is not installed.
    """
    train = tokenized.splits["train"]
    rows = [tokenized.task.train[row] for row in train.rows]
    if any(row.embedding for row in rows):
        raise UserError(
            f"choose=nearest: the rows of task '{tokenized.task.name}' are compared by their embeddings, and an input"
            ' that is asked has none; choose random or balanced shots, or remove "embedding" from "columns" of its'
            " task.json"
        )
    index = InputIndex([row.input for row in rows])
    own = []
    for text, room in zip(inputs, rooms, strict=True):
        chosen = choose_own_shots(index.rank(text), free=free, lengths=train.lengths, count=count, room=room)
        own.append(np.concatenate([train.ids[train.starts[place] : train.starts[place + 1]] for place in chosen]))
    return own


def _describe_no_room(
    tokenized: TokenizedTask, *, num_fitting: int, shots: int | None, number: int, max_tokens: int
) -> str:
    """Return why an input does not fit after so many shots, and what to do."""
    num_train = len(tokenized.splits["train"])
    if shots is not None and shots > num_train:
        return f"shots={shots}: task '{tokenized.task.name}' has only {num_train} train rows; lower `shots`"
    if num_fitting < 0:
        return (
            f"input {number}: has no room for its answer in {max_tokens} tokens, even without shots; shorten it, or"
            " raise `max_tokens`"
        )
    return (
        f"input {number}: is the longest, and leaves room for {num_fitting} shots in {max_tokens} tokens, not {shots};"
        " shorten it, or lower `shots`"
    )


def write_queries(tokenizer: TaskTokenizer, inputs: Sequence[str], *, after_shots: bool) -> list[NDArray[np.int32]]:
    """Return the ids of each input as a query: what the model gets after the shots, or after the head, to answer it."""
    between, after = tokenizer.between_ids if after_shots else [], tokenizer.before_answer_ids
    return [np.asarray(between + ids + after, dtype=np.int32) for ids in tokenizer.encode_inputs(inputs)]


@dataclass(frozen=True, slots=True)
class Answered:
    """What an engine answers to one query."""

    text: str
    nll: float | None
    """Nats of the answer with its terminator; None if it is not known."""
    cut: bool = False
    """Whether a generated answer reached its limit."""
    choice_nll: Mapping[str, float] | None = None
    """Nats of each known answer; None for a generated answer."""
    probabilities: Mapping[str, float] | None = None
    """Of each known answer; they sum to 1. None for a generated answer."""
    confidence: float | None = None
    """The probability of the answer; of a generated one the share of samples that gave it, None if it has only one."""
    num_tokens: int = 0
    """Tokens of the answer with its terminator."""
    fault: str = ""
    """Why a server gave no answer."""


def answer_queries(
    engine: Engine,
    tokenizer: TaskTokenizer,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    *,
    choices: Sequence[Sequence[tuple[str, Sequence[int]]]],
    limits: Sequence[int],
    answering: Sequence[AnswerSettings] | None = None,
    seeds: Sequence[int] | None = None,
    is_same: IsSame | None = None,
    free: Sequence[Sequence[NDArray[np.int32]]] | None = None,
    on_ids: OnIds | None = None,
) -> list[Answered]:
    """Return the answers after `prefix`: for each query the best of its choices, or a generated one.

    choices: the known answers of each query with their ids; () for an open answer. An engine without likelihoods
        generates all answers.
    limits: most tokens of each generated answer.
    answering: how each query is answered; its `max_new_tokens` is not looked at, `limits` say it. Default: as usual.
    seeds: decide what is sampled, for each query. Default: 0.
    free: for each query the ids of inputs without content in its place, for those that are calibrated by them.
    is_same: whether two samples are one vote. Default: their texts are equal.
    on_ids: as in `Engine.generate`; the place is that among all queries. Of several samples it is called for each.

    Raises:
        UserError: memory runs out, a likelihood is not finite, or a server refuses.
    """
    how = answering or [DEFAULT_ANSWERS] * len(queries)
    known = [n for n, pairs in enumerate(choices) if pairs and engine.has_likelihoods]
    answers = dict(zip(known, _choose(engine, prefix, queries, choices, known, how, free), strict=True))
    places = [n for n in range(len(queries)) if n not in answers]
    if not places:
        return [answers[n] for n in range(len(queries))]
    generated, shares = generate_voted(
        engine,
        prefix,
        [queries[n] for n in places],
        limits=[limits[n] for n in places],
        decodings=[how[n].decodings(0 if seeds is None else seeds[n]) for n in places],
        is_same=is_same or sameness_of(""),
        on_ids=None if on_ids is None else lambda n, ids: on_ids(places[n], ids),
    )
    encoded = tokenizer.encode_answers([one.text for one in generated])
    # An answer that was cut, or whose text no ids give back, has no likelihood as a whole answer.
    whole = {
        n: ids
        for n, one, ids in zip(places, generated, encoded, strict=True)
        if engine.has_likelihoods and not (one.cut or one.fault or isinstance(ids, str))
    }
    nats = engine.score(prefix, [queries[n] for n in whole], [[ids] for ids in whole.values()]) if whole else []
    nll = {n: float(nats_O[0]) for n, nats_O in zip(whole, nats, strict=True)}
    for n, one, ids, share in zip(places, generated, encoded, shares, strict=True):
        num_tokens = one.num_tokens or (0 if isinstance(ids, str) else len(ids))
        answers[n] = Answered(
            one.text, nll.get(n), cut=one.cut, confidence=share, num_tokens=num_tokens, fault=one.fault
        )
    return [answers[n] for n in range(len(queries))]


def _choose(
    engine: Engine,
    prefix: Prefix,
    queries: Sequence[NDArray[np.int32]],
    choices: Sequence[Sequence[tuple[str, Sequence[int]]]],
    places: Sequence[int],
    how: Sequence[AnswerSettings],
    free: Sequence[Sequence[NDArray[np.int32]]] | None,
) -> list[Answered]:
    """Return the best choice of the queries at `places`; queries with the same choices share one trie of them."""
    options = {id(choices[n]): [ids for _, ids in choices[n]] for n in places}
    nats = (
        engine.score(prefix, [queries[n] for n in places], [options[id(choices[n])] for n in places]) if places else []
    )
    calibrated = [n for n in places if how[n].calibrate == "contextual"]
    priors: dict[int, NDArray[np.float64]] = {}
    if calibrated:
        if free is None:
            raise ValueError("contextual calibration needs `free`, the inputs without content")
        found = score_content_free(engine, prefix, [free[n] for n in calibrated], [choices[n] for n in calibrated])
        priors = dict(zip(calibrated, found, strict=True))
    answers = []
    for n, nats_O in zip(places, nats, strict=True):
        weighed = weigh_choices(nats_O, choices[n], normalize=how[n].normalize, free_SO=priors.get(n))
        text, ids = choices[n][weighed.best]
        texts = [choice for choice, _ in choices[n]]
        answers.append(
            Answered(
                text,
                float(nats_O[weighed.best]),
                choice_nll=dict(zip(texts, nats_O.tolist(), strict=True)),
                probabilities=dict(zip(texts, weighed.probabilities_O.tolist(), strict=True)),
                confidence=weighed.confidence,
                num_tokens=len(ids),
            )
        )
    return answers
