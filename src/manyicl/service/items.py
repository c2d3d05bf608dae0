"""The inputs of a request in ids, each with its choices and its limit, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from manyicl.episodes import TaskTokenizer
from manyicl.errors import UserError, refuse_tables
from manyicl.inference import AnswerSettings, write_answers, write_queries
from manyicl.service.refusals import InputTooLong
from manyicl.service.requests import Item
from manyicl.service.selection import Shots, TaskIds, count_fitting


def check_inputs(inputs: str | Iterable[str], *, most_chars: int) -> list[str]:
    """Return the inputs of a request as a list.

    Raises:
        InputTooLong: one has more than `most_chars` characters. UserError: there is none, or one is not a text.
    """
    refuse_tables("inputs", inputs)
    if not isinstance(inputs, Iterable):
        raise UserError(f"inputs={str(inputs)[:50]}: give a text, or a list of texts")
    texts = [inputs] if isinstance(inputs, str) else [str(text) if isinstance(text, str) else text for text in inputs]
    if not texts:
        raise UserError("inputs: is empty; give one input or more")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"input {number}: is empty, or not a text; give one")
        if len(text) > most_chars:
            raise InputTooLong(f"input {number}: has {len(text):,} characters, more than {most_chars:,}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"input {number}: holds half of a surrogate pair; write the whole character") from None
    return texts


def make_items(
    task: TaskIds,
    texts: Sequence[str],
    *,
    tokenizer: TaskTokenizer,
    options: Sequence[Sequence[str]] | None,
    shots: Shots,
    limit: int,
    answering: AnswerSettings,
    seeds: Sequence[int],
) -> list[Item]:
    """Return the inputs of a request as they wait for a pass.

    options: the candidate answers of each input; None, or none of them, for the task's labels.
    limit: most tokens of a generated answer.
    answering: how each is answered. seeds: of each, what decides its samples.

    Raises:
        InputTooLong: an input does not fit. UserError: an option that cannot be an answer, or a limit below 1.
    """
    if options is not None and not _are_lists_of_texts(options):
        raise UserError(f"options={options}: give a list of answers for each input, such as [['yes', 'no']]")
    if options is not None and len(options) != len(texts):
        raise UserError(f"options: there are {len(options)} for {len(texts)} inputs; give a list for each input")
    if limit < 1:
        raise UserError(f"max_new_tokens={limit}: an answer has one token or more")
    if len(seeds) != len(texts):
        raise UserError(f"seed: there are {len(seeds)} for {len(texts)} inputs; give one, or one for each input")
    items = []
    for place, ids in enumerate(write_queries(tokenizer, texts, after_shots=True)):
        own = options[place] if options is not None else ()
        choices = write_answers(tokenizer, own) if own else task.labels
        if lost := set(own) - {option for option, _ in choices}:
            names = ", ".join(map(repr, sorted(lost)))
            raise UserError(f"options of input {place + 1}: the model's tokenizer cannot write {names}; leave it out")
        most = max((len(answer) for _, answer in choices), default=limit)
        item = Item(place, texts[place], ids, choices, most, answering, seeds[place])
        try:
            count_fitting(task, shots, num_after=len(ids) + most)
        except InputTooLong as error:
            raise InputTooLong(f"input {place + 1}: {str(error).removeprefix('input: ')}") from None
        items.append(item)
    return items


def _are_lists_of_texts(options: object) -> bool:
    return isinstance(options, list | tuple) and all(
        isinstance(own, list | tuple) and all(isinstance(option, str) for option in own) for own in options
    )


def make_prompts(
    text: str, ids: Sequence[int], *, max_tokens: int, limit: int, answering: AnswerSettings, seeds: Sequence[int]
) -> list[Item]:
    """Return a prompt without a task as it waits for a pass: once for each seed.

    max_tokens: the model's window. limit: most tokens of a completion, fewer if the window ends before.

    Raises:
        InputTooLong: it leaves no room in the window. UserError: there are no seeds.
    """
    if not seeds:
        raise UserError("seed: is empty; give one, or several for as many completions")
    room = max_tokens - len(ids)
    if room < 1:
        raise InputTooLong(f"prompt: has {len(ids):,} tokens; the window is {max_tokens:,}; shorten it")
    query = np.asarray(ids, dtype=np.int32)
    return [
        Item(place, text, query, limit=min(limit, room), answering=answering, seed=seed)
        for place, seed in enumerate(seeds)
    ]
