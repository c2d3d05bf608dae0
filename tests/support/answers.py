"""Models made in memory, and the shortest ways to their answers and curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from manyicl.episodes.tokenized import TokenizedTask
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.evaluation.answering import PointAnswers, answer_draw
from manyicl.evaluation.curves import make_curve
from manyicl.evaluation.points import ShotCurve
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.answering.generation import Generated, generate_after
from manyicl.inference.engine import Engine, choose_engine
from manyicl.inference.model import InferenceModel
from manyicl.inference.prefix import EMPTY_PREFIX, score_choices
from manyicl.models.attention.dispatch import Prefix


def engine_of(model: Any, tokenizer: TaskTokenizer) -> Engine:
    """Return the engine of a model in memory."""
    return choose_engine(InferenceModel("tiny", model, tokenizer, max_tokens=10_000, trained_shots={}))


def curve_of(
    model: Any, tokenized: TokenizedTask, *, tokenizer: TaskTokenizer, sweep: Sweep, trained_shots: int | None = None
) -> ShotCurve:
    """Return the shot curve of one task in the ids of `tokenizer`."""
    engine = engine_of(model, tokenizer)
    task_sweep = TaskSweep(tokenized, tokenizer=tokenizer, sweep=sweep)
    answers: dict[Any, PointAnswers] = {}
    for draw in range(sweep.num_draws):
        for shots, one in answer_draw(engine, task_sweep, draw=draw):
            answers[draw, shots] = one
    return make_curve(task_sweep, answers, trained_shots=trained_shots, shared=not engine.sharing_fault)


def answer_prompts(model: Any, tokenizer: TaskTokenizer, prompts: Any, *, max_new_tokens: int) -> list[Generated]:
    """Return the greedy answer of each prompt, given as all its ids."""
    return generate_after(model, tokenizer, EMPTY_PREFIX, prompts, max_new_tokens=max_new_tokens)


def answer_nats(
    model: nn.Module, prefix: Prefix, pairs: Sequence[tuple[NDArray[np.int32], Sequence[int]]]
) -> NDArray[np.float64]:
    """Return the nats of each (query ids, answer ids) after `prefix`."""
    nats = score_choices(model, prefix, [query for query, _ in pairs], [[answer] for _, answer in pairs])
    return np.array([nats_O[0] for nats_O in nats])
