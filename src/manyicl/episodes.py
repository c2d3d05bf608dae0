"""Which examples stand together: the plan of episodes, made from token lengths alone.

An Episode is x1,y1, ..., xK,yK: distinct examples of one task in random order. In each epoch of a task a seeded
permutation of its examples is cut into consecutive episodes, so every example is seen once an epoch, in new company.
The mixture interleaves the tasks. Nothing here depends on the number of ranks, workers or restarts.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from manyicl.errors import UserError

TOO_LONG = "longer than token_budget"


class EpisodeSettings(BaseModel):
    """How episodes are drawn, and which of their answers are targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_budget: Annotated[int, Field(gt=0)] = Field(2048, description="most tokens an episode may use")
    shots: Literal["fill"] | int | tuple[int, int] = Field(
        "fill",
        description="'fill' the budget, a number (0: one example a sequence), or a range [low, high] drawn"
        " log-uniformly; the query is not counted",
    )
    targets: Literal["all", "last"] = Field(
        "all", description="every answer is a target (ManyICL), or the last one alone (MetaICL)"
    )
    mixture: Literal["proportional", "uniform"] = Field(
        "proportional", description="share of the tokens a task gets: by its size, or the same for every task"
    )

    @field_validator("shots")
    @classmethod
    def _is_a_count_or_range(cls, value: str | int | tuple[int, int]) -> str | int | tuple[int, int]:
        low, high = (0, 0) if isinstance(value, str) else (value, value) if isinstance(value, int) else value
        if low < 0 or high < low:
            raise ValueError(f"needs 'fill', a number from 0, or a range [low, high]; got {value}")
        return value


@dataclass(frozen=True, slots=True)
class TaskLengths:
    """All that the plan knows of a task: num_head_tokens, num_between (saved by the first example), lengths (N,)."""

    name: str
    num_head_tokens: int
    num_between: int
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Episode:
    """One training sequence before it becomes ids.

    index: its place in the plan. epoch: which pass over the task it belongs to.
    examples: int32 (K,), indices into the task's tokenised train examples, in order. num_tokens: its length.
    """

    index: int
    task: str
    epoch: int
    examples: NDArray[np.int32]
    num_tokens: int


def fits_any(task: TaskLengths, *, token_budget: int) -> bool:
    """Return whether at least one example fits an episode of its own."""
    return bool((task.num_head_tokens - task.num_between + task.lengths <= token_budget).any())


def drop_long_examples(tasks: Sequence[TaskLengths], *, token_budget: int) -> dict[str, NDArray[np.int32]]:
    """Return, for each task, the indices of the examples that fit an episode of their own.

    Raises:
        UserError: a task has none.
    """
    fitting = {}
    for task in tasks:
        alone = task.num_head_tokens - task.num_between + task.lengths
        fitting[task.name] = np.flatnonzero(alone <= token_budget).astype(np.int32)
        if not len(fitting[task.name]):
            shortest = int(alone.min()) if len(alone) else 0
            raise UserError(
                f"task '{task.name}': no train example fits episodes.token_budget = {token_budget}"
                f" (the shortest needs {shortest}); raise the budget or leave the task out"
            )
    return fitting


def iter_episodes(tasks: Sequence[TaskLengths], *, settings: EpisodeSettings, seed: int) -> Iterator[Episode]:
    """Yield the endless plan of episodes of all `tasks`, tasks interleaved by their share of the tokens.

    The next episode is of the task that is furthest behind its share, so each task keeps its share to within one
    episode at any moment. A seeded head start of less than one episode decides who comes first.

    Raises:
        UserError: a task has no example that fits the budget.
    """
    fitting = drop_long_examples(tasks, token_budget=settings.token_budget)
    streams: dict[str, Iterator[tuple[int, NDArray[np.int32], int]]] = {}
    progress: dict[str, Callable[[int], float]] = {}
    queue: list[tuple[float, str]] = []
    for task in tasks:
        stream = _iter_task_episodes(task, fitting[task.name], settings=settings, seed=seed)
        first = next(stream)
        streams[task.name] = chain([first], stream)
        progress[task.name] = _measure_progress(task, fitting[task.name], mixture=settings.mixture)
        head_start = float(np.random.default_rng([seed, _name_seed(task.name)]).random())
        queue.append((head_start * progress[task.name](first[2]), task.name))
    heapq.heapify(queue)
    index = 0
    while True:
        spent, name = heapq.heappop(queue)
        epoch, examples, num_tokens = next(streams[name])
        heapq.heappush(queue, (spent + progress[name](num_tokens), name))
        yield Episode(index=index, task=name, epoch=epoch, examples=examples, num_tokens=num_tokens)
        index += 1


def plan_episode(task: TaskLengths, *, settings: EpisodeSettings, seed: int = 0, number: int = 0) -> Episode:
    """Return the `number`-th episode of one task alone."""
    episodes = iter_episodes([task], settings=settings, seed=seed)
    for _ in range(number):
        next(episodes)
    return next(episodes)


def _name_seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _measure_progress(
    task: TaskLengths, fitting: NDArray[np.int32], *, mixture: Literal["proportional", "uniform"]
) -> Callable[[int], float]:
    """Return how far an episode of some length brings its task: in tokens if uniform, in epochs if proportional.

    An epoch is measured without the heads: they are written once an episode, and tasks differ in both, yet all are to
    finish their epochs together.
    """
    if mixture == "uniform":
        return float
    size = float(task.lengths[fitting].sum())
    head = task.num_head_tokens - task.num_between
    return lambda num_tokens: (num_tokens - head) / size


def _iter_task_episodes(
    task: TaskLengths, fitting: NDArray[np.int32], *, settings: EpisodeSettings, seed: int
) -> Iterator[tuple[int, NDArray[np.int32], int]]:
    """Yield (epoch, examples, num_tokens) of one task, epoch after epoch; the last of an epoch may be short."""
    room = settings.token_budget - task.num_head_tokens + task.num_between
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, _name_seed(task.name), epoch])
        order = rng.permutation(fitting)
        ends = np.cumsum(task.lengths[order])
        start = 0
        while start < len(order):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + room, side="right"))
            stop = min(stop, start + _draw_num_examples(settings.shots, rng))
            num_tokens = int(ends[stop - 1]) - before + task.num_head_tokens - task.num_between
            yield epoch, order[start:stop], num_tokens
            start = stop
        epoch += 1


def _draw_num_examples(shots: Literal["fill"] | int | tuple[int, int], rng: np.random.Generator) -> int:
    if isinstance(shots, str):
        return 2**31
    if isinstance(shots, int):
        return shots + 1
    # Log-uniform over the number of examples, which unlike the number of shots is never zero.
    low, high = shots[0] + 1, shots[1] + 1
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
