"""Which examples stand together: the plan of episodes, made from token lengths alone.

An Episode is x1,y1, ..., xK,yK: distinct examples of one task in random order. In each epoch of a task a seeded
permutation of its examples is cut into consecutive episodes, so every example is seen once an epoch, in new company.
The mixture interleaves the tasks. Nothing here depends on the number of ranks, workers or restarts.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manyicl.episodes.renaming import LabelLengths, RenameTo, check_names, draw_names
from manyicl.errors import UserError
from manyicl.seeds import PlanPurpose, make_stream

TOO_LONG = "longer than token_budget"

EpisodeShots = Literal["fill"] | int | tuple[int, int]
Targets = Literal["all", "last"]
Mixture = Literal["proportional", "uniform"]


class EpisodeSettings(BaseModel):
    """How episodes are drawn, and which of their answers are targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_budget: Annotated[int, Field(gt=0)] = Field(2048, description="most tokens an episode may use")
    shots: EpisodeShots = Field(
        "fill",
        description="'fill' the budget, a number (0: one example a sequence), or a range [low, high] drawn"
        " log-uniformly; the query is not counted",
    )
    targets: Targets = Field("all", description="every answer is a target (ManyICL), or the last one alone (MetaICL)")
    mixture: Mixture = Field(
        "proportional", description="share of the tokens a task gets: by its size, or the same for every task"
    )
    rename_share: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the episodes of classification and nli tasks with fixed labels in which these bear other"
        " names, the same throughout an episode; of episodes with two examples or more",
    )
    rename_to: RenameTo = Field(
        "words", description="what labels are renamed to: the task's own 'permuted', or random 'words'"
    )

    @model_validator(mode="before")
    @classmethod
    def _drops_gone_settings(cls, values: Any) -> Any:
        """Take the recipes of earlier versions, whose resolved copies in run folders name every setting."""
        if not isinstance(values, dict) or "stratified" not in values:
            return values
        if values["stratified"] is not False:
            warnings.warn(
                "episodes.stratified of earlier versions is gone and left out: classes are drawn at random",
                stacklevel=2,
            )
        return {key: value for key, value in values.items() if key != "stratified"}

    @field_validator("shots")
    @classmethod
    def _is_a_count_or_range(cls, value: str | int | tuple[int, int]) -> str | int | tuple[int, int]:
        low, high = (0, 0) if isinstance(value, str) else (value, value) if isinstance(value, int) else value
        if low < 0 or high < low:
            raise ValueError(f"needs 'fill', a number from 0, or a range [low, high]; got {value}")
        return value

    @property
    def needs_labels(self) -> bool:
        """Whether the plan has to know which label each example has."""
        return self.rename_share > 0

    def without_renaming(self) -> EpisodeSettings:
        """Return the same draw with no label renamed, which is how everything is measured."""
        return self.model_copy(update={"rename_share": 0.0})


@dataclass(frozen=True, slots=True)
class TaskLengths:
    """All that the plan knows of a task: num_head_tokens, num_between (saved by the first example), lengths (N,).

    labels: None where none can be renamed, or nothing asks for it.
    """

    name: str
    num_head_tokens: int
    num_between: int
    lengths: NDArray[np.int64]
    labels: LabelLengths | None = None

    @property
    def alone(self) -> NDArray[np.int64]:
        """Tokens of an episode of one example, for each example, (N,)."""
        return self.num_head_tokens - self.num_between + self.lengths


@dataclass(frozen=True, slots=True)
class Episode:
    """One training sequence before it becomes ids.

    index: its place in the plan. epoch: which pass over the task it belongs to.
    examples: int32 (K,), indices into the task's tokenised train examples, in order. num_tokens: its length.
    names: int32, for each of the task's labels the name that it bears here, as an index into LabelNames; None where
    the labels bear their own.
    """

    index: int
    task: str
    epoch: int
    examples: NDArray[np.int32]
    num_tokens: int
    names: NDArray[np.int32] | None = None


def drop_long_examples(tasks: Sequence[TaskLengths], *, token_budget: int) -> dict[str, NDArray[np.int32]]:
    """Return, for each task, the indices of the examples that fit an episode of their own.

    Raises:
        UserError: a task has none.
    """
    fitting = {}
    for task in tasks:
        fitting[task.name] = np.flatnonzero(task.alone <= token_budget).astype(np.int32)
        if not len(fitting[task.name]):
            raise UserError(
                f"task '{task.name}': no train example fits episodes.token_budget = {token_budget}"
                f" (the shortest needs {min(task.alone.tolist(), default=0)}); raise the budget or leave the task out"
            )
    return fitting


def iter_episodes(
    tasks: Sequence[TaskLengths], *, settings: EpisodeSettings, seed: int, purpose: PlanPurpose = "training"
) -> Iterator[Episode]:
    """Yield the endless plan of episodes of all `tasks`, tasks interleaved by their share of the tokens.

    The next episode is of the task that is furthest behind its share, so each task keeps its share to within one
    episode at any moment. A seeded head start of less than one episode decides who comes first. Plans of different
    purposes are drawn independently of each other.

    Raises:
        UserError: a task has no example that fits the budget, or more labels than there are words to rename them to.
    """
    fitting = drop_long_examples(tasks, token_budget=settings.token_budget)
    streams: dict[str, Iterator[Episode]] = {}
    progress: dict[str, Callable[[Episode], float]] = {}
    queue: list[tuple[float, str]] = []
    for task in tasks:
        if task.labels is not None and settings.rename_share:
            check_names(task.labels, task=task.name, to=settings.rename_to)
        stream = _iter_task_episodes(task, fitting[task.name], settings=settings, seed=seed, purpose=purpose)
        first = next(stream)
        streams[task.name] = chain([first], stream)
        progress[task.name] = _measure_progress(task, fitting[task.name], mixture=settings.mixture)
        head_start = float(make_stream(purpose, seed, "head start", task.name).random())
        queue.append((head_start * progress[task.name](first), task.name))
    heapq.heapify(queue)
    index = 0
    while True:
        spent, name = heapq.heappop(queue)
        episode = next(streams[name])
        heapq.heappush(queue, (spent + progress[name](episode), name))
        yield replace(episode, index=index)
        index += 1


def plan_episode(task: TaskLengths, *, settings: EpisodeSettings, seed: int = 0, number: int = 0) -> Episode:
    """Return the `number`-th episode of one task alone."""
    episodes = iter_episodes([task], settings=settings, seed=seed)
    for _ in range(number):
        next(episodes)
    return next(episodes)


def _measure_progress(task: TaskLengths, fitting: NDArray[np.int32], *, mixture: Mixture) -> Callable[[Episode], float]:
    """Return how far an episode brings its task: in tokens if uniform, in epochs if proportional.

    An epoch is measured without the heads: they are written once an episode, and tasks differ in both, yet all are to
    finish their epochs together. It is measured in the examples' own answers, whatever they are renamed to.
    """
    if mixture == "uniform":
        return lambda episode: float(episode.num_tokens)
    size = float(task.lengths[fitting].sum())
    return lambda episode: int(task.lengths[episode.examples].sum()) / size


def _iter_task_episodes(
    task: TaskLengths, fitting: NDArray[np.int32], *, settings: EpisodeSettings, seed: int, purpose: PlanPurpose
) -> Iterator[Episode]:
    """Yield the episodes of one task, epoch after epoch, numbered in the epoch; the last of an epoch may be short."""
    most_fitting = _count_most_fitting(task, fitting, settings=settings)
    epoch = 0
    while True:
        rng = make_stream(purpose, seed, "order", task.name, epoch)
        order = rng.permutation(fitting)
        number = start = 0
        while start < len(order):
            most = min(most_fitting, _draw_num_examples(settings.shots, rng))
            # A stream of its own: neither the order of examples nor any other episode depends on it.
            renaming = make_stream(purpose, seed, "renaming", task.name, epoch, number)
            names = _draw_renaming(task, settings=settings, rng=renaming)
            nexts = order[start : start + most]
            episode = _cut_episode(task, nexts, names=names, epoch=epoch, token_budget=settings.token_budget)
            # Alone, an example has no shot that could tell its new name; and it may fit under its own label only.
            if episode.names is not None and len(episode.examples) < 2:
                episode = _cut_episode(task, nexts, names=None, epoch=epoch, token_budget=settings.token_budget)
            start += len(episode.examples)
            yield replace(episode, index=number)
            number += 1
        epoch += 1


def _cut_episode(
    task: TaskLengths, nexts: NDArray[np.int32], *, names: NDArray[np.int32] | None, epoch: int, token_budget: int
) -> Episode:
    """Return the episode of as many of the next examples as fit the budget, none where the first does not."""
    num_head_tokens, lengths = task.num_head_tokens, task.lengths[nexts]
    if names is not None:
        assert task.labels is not None
        own = task.labels.label_of[nexts]
        num_head_tokens = task.labels.num_head_tokens
        lengths = lengths - task.labels.name_tokens[own] + task.labels.name_tokens[names[own]]
    ends = num_head_tokens - task.num_between + np.cumsum(lengths)
    num_examples = int(np.searchsorted(ends, token_budget, side="right"))
    num_tokens = int(ends[num_examples - 1]) if num_examples else 0
    return Episode(
        index=0, task=task.name, epoch=epoch, examples=nexts[:num_examples], num_tokens=num_tokens, names=names
    )


def _count_most_fitting(task: TaskLengths, fitting: NDArray[np.int32], *, settings: EpisodeSettings) -> int:
    """Return a number of examples that no episode of the task passes, so that no more need to be looked at."""
    shortest = task.lengths[fitting]
    num_head_tokens = task.num_head_tokens
    if task.labels is not None and settings.rename_share:
        own = task.labels.name_tokens[task.labels.label_of[fitting]]
        shortest = shortest - own + np.minimum(own, task.labels.name_tokens.min())
        num_head_tokens = min(num_head_tokens, task.labels.num_head_tokens)
    ends = num_head_tokens - task.num_between + np.cumsum(np.sort(shortest))
    return int(np.searchsorted(ends, settings.token_budget, side="right"))


def _draw_renaming(
    task: TaskLengths, *, settings: EpisodeSettings, rng: np.random.Generator
) -> NDArray[np.int32] | None:
    """Return the names that the labels bear in one episode; None where it is not renamed."""
    if task.labels is None or not settings.rename_share:
        return None
    return draw_names(task.labels, to=settings.rename_to, rng=rng) if rng.random() < settings.rename_share else None


def _draw_num_examples(shots: EpisodeShots, rng: np.random.Generator) -> int:
    if isinstance(shots, str):
        return 2**31
    if isinstance(shots, int):
        return shots + 1
    # Log-uniform over the number of examples, which unlike the number of shots is never zero.
    low, high = shots[0] + 1, shots[1] + 1
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
