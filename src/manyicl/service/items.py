"""The inputs of a request in ids, each with its choices and its limit, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence

from manyicl.episodes import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference import AnswerSettings, write_answers, write_queries
from manyicl.service.refusals import InputTooLong
from manyicl.service.requests import Item
from manyicl.service.selection import Shots, TaskIds, count_fitting


def make_items(
    task: TaskIds,
    texts: Sequence[str],
    *,
    tokenizer: TaskTokenizer,
    options: Sequence[Sequence[str]] | None,
    shots: Shots,
    limit: int,
    answering: AnswerSettings,
    seed: int,
) -> list[Item]:
    """Return the inputs of a request as they wait for a pass.

    options: the candidate answers of each input; None, or none of them, for the task's labels.
    limit: most tokens of a generated answer.
    answering, seed: how each is answered, and what decides its samples.

    Raises:
        InputTooLong: an input does not fit. UserError: options that no answer can be, or a limit below 1.
    """
    if options is not None and len(options) != len(texts):
        raise UserError(f"options: there are {len(options)} for {len(texts)} inputs; give a list for each input")
    if limit < 1:
        raise UserError(f"max_new_tokens={limit}: an answer has one token or more")
    items = []
    for place, ids in enumerate(write_queries(tokenizer, texts, after_shots=True)):
        choices = write_answers(tokenizer, options[place]) if options is not None and options[place] else task.labels
        if options is not None and options[place] and not choices:
            raise UserError(f"options of input {place + 1}: the model's tokenizer can write none of them")
        most = max((len(answer) for _, answer in choices), default=limit)
        item = Item(place, texts[place], ids, choices, most, answering, seed)
        try:
            count_fitting(task, shots, num_after=len(ids) + most)
        except InputTooLong as error:
            raise InputTooLong(f"input {place + 1}: {str(error).removeprefix('input: ')}") from None
        items.append(item)
    return items
