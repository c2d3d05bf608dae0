"""Answer single inputs of a task after shots of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer, TokenizedTask, join_examples
from manyicl.errors import UserError
from manyicl.inference.drawing import LONG_TRAIN, draw_shots, most_answer_tokens, prefix_lengths, write_answers
from manyicl.inference.engine import Engine, choose_engine
from manyicl.inference.model import InferenceModel, tokenize_for
from manyicl.inference.prefix import choose_option
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
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> train rows that could not be shots."""


def ask(
    model: InferenceModel,
    task: Task,
    inputs: Sequence[str],
    *,
    shots: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Answer each input after the same shots, from one draw.

    A train row that leaves no room for the longest input cannot be a shot; `Answer.left_out` counts such rows.

    shots: how many. Default: as many as fit.
    max_new_tokens: limit of a generated answer; default as in `evaluate`. An answer that reached it is marked as cut.

    Raises:
        UserError: an empty input, fewer train rows than `shots`, or an input that does not fit after the shots.
    """
    if shots is not None and shots < 0:
        raise UserError(f"shots={shots}: shots count from 0")
    for number, text in enumerate(inputs, start=1):
        if not text.strip():
            raise UserError(f"line {number}: is empty; give one input a line")
    tokenized = tokenize_for(task, model)
    written = write_answers(model.tokenizer, task.labels)
    longest = most_answer_tokens(tokenized, written if task.labels else None, limit=max_new_tokens)
    between, after = model.tokenizer.between_ids, model.tokenizer.before_answer_ids
    queries = [np.asarray(between + ids + after, dtype=np.int32) for ids in model.tokenizer.encode_inputs(inputs)]
    room = model.max_tokens - longest - max(len(q) for q in queries)
    order = draw_shots(tokenized, seed=seed, draw=0, most_tokens=room - len(tokenized.head_ids))
    num_long = len(tokenized.splits["train"]) - len(order)
    fitting = int(np.searchsorted(prefix_lengths(tokenized, order), room, side="right")) - 1
    if fitting < (shots or 0):  # -1 if not even the head fits
        place = int(np.argmax([len(q) for q in queries])) + 1
        raise UserError(
            _describe_no_room(tokenized, num_fitting=fitting, shots=shots, line=place, max_tokens=model.max_tokens)
        )
    num_shots = fitting if shots is None else shots
    before = join_examples(tokenized, split="train", indices=order[:num_shots].astype(np.int32)).ids
    if not num_shots:
        queries = [query[tokenized.num_between :] for query in queries]
    with choose_engine(model) as engine:
        answers = _answer_queries(
            engine, model.tokenizer, task, list(inputs), queries=queries, before=before, limit=longest
        )
    left_out = {LONG_TRAIN: num_long} if num_long else {}
    return [replace(answer, shots=num_shots, left_out=left_out) for answer in answers]


def _describe_no_room(
    tokenized: TokenizedTask, *, num_fitting: int, shots: int | None, line: int, max_tokens: int
) -> str:
    """Return why an input does not fit after so many shots, and what to do."""
    num_train = len(tokenized.splits["train"])
    if shots is not None and shots > num_train:
        return f"shots={shots}: task '{tokenized.task.name}' has only {num_train} train rows; lower `shots`"
    wanted = f", not {shots}" if shots is not None else ""
    return (
        f"line {line}: the longest input leaves room for {max(num_fitting, 0)} shots in {max_tokens} tokens{wanted};"
        " shorten it, or lower `shots`"
    )


def _answer_queries(
    engine: Engine,
    tokenizer: TaskTokenizer,
    task: Task,
    inputs: Sequence[str],
    *,
    queries: Sequence[NDArray[np.int32]],
    before: NDArray[np.int32],
    limit: int,
) -> list[Answer]:
    """Return the answers after the prefix `before`: the likeliest of the task's labels, or generated ones."""
    prefix = engine.encode(before)
    if task.labels:
        pairs = write_answers(tokenizer, task.labels)
        options = [ids for _, ids in pairs]
        nats = engine.score(prefix, queries, [options] * len(queries))
        best = [choose_option(nats_O, options) for nats_O in nats]
        return [
            Answer(text, pairs[place][0], nll=float(nats_O[place]), shots=0, cut=False)
            for text, place, nats_O in zip(inputs, best, nats, strict=True)
        ]
    generated = engine.generate(prefix, queries, limits=[limit] * len(queries))
    encoded = tokenizer.encode_answers([g.text for g in generated])
    # An answer that was cut, or whose text no ids give back, has no likelihood as a whole answer.
    whole = {n: ids for n, ids in enumerate(encoded) if not generated[n].cut and not isinstance(ids, str)}
    nats = engine.score(prefix, [queries[n] for n in whole], [[ids] for ids in whole.values()])
    nll = {n: float(nats_O[0]) for n, nats_O in zip(whole, nats, strict=True)}
    return [
        Answer(text, one.text, nll=nll.get(n), shots=0, cut=one.cut)
        for n, (text, one) in enumerate(zip(inputs, generated, strict=True))
    ]
