"""The plan of episodes: which examples go together in which order. It is made from token lengths alone.

An Episode is x1,y1, ..., xK,yK: distinct examples of one task in random order. In each epoch of a task, a seeded
permutation of its examples is cut into consecutive episodes, so every example is seen once per epoch, each time among
others. The mixture interleaves the tasks. Nothing here depends on the number of ranks, workers or restarts.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manyicl.episodes.renaming import LabelLengths, RenameTo, check_names, draw_names
from manyicl.errors import UserError
from manyicl.seeds import PlanPurpose, make_stream

TOO_LONG = "longer than token_budget"
BEYOND_CAP = "beyond tasks.max_rows"

EpisodeShots = Literal["fill"] | int | tuple[int, int]
Targets = Literal["all", "last"]
Mixture = Literal["proportional", "uniform"]


class EpisodeSettings(BaseModel):
    """How episodes are drawn, and which of their answers are targets."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    token_budget: Annotated[int, Field(gt=0)] = 2048
    """Most tokens that an episode may have. On Gemma 3 270M 4,096 to 8,192 were a little better than 32,768 at 2.6
    million tokens of training. At 10.3 million 32,768 was 2.0 points [0.5, 3.6] better than 4,096 on new tasks after
    many shots, by one of 150 labels, and 3.6 [1.4, 5.9] worse after 16 (docs/results.md, "Long episodes, four times
    as many")."""
    shots: EpisodeShots = "fill"
    """'fill' the budget, a number (0: one example per sequence), or a range [low, high] from which the number of
    examples is drawn log-uniformly; the query is not counted. [4, 256] instead of 'fill' cost 1.6 points [0.4, 2.8] on
    new tasks after many shots (docs/results.md, "Which default?")."""
    targets: Targets = "all"
    """Answers that the loss is taken on: 'all' of an episode (ManyICL), or only the 'last' (MetaICL)."""
    mixture: Mixture = "uniform"
    """Fraction of the tokens that each task gets: the same ('uniform'), or 'proportional' to its size, which cost 1.7
    points [0.1, 3.3] on new tasks after 16 shots and 0.5 [-0.8, 1.8] after many (docs/results.md, "Which default?")."""
    rename_share: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    """Fraction of the episodes of classification and nli tasks with fixed labels in which each label has another name,
    the same throughout the episode; only episodes of two examples or more. On new tasks after many shots half of them
    cost 1.8 points [0.2, 3.4] in training all weights (docs/results.md, "Which default?") and gained 3.7 [1.7, 5.6] in
    the packaged adapter's ("The packaged adapter")."""
    rename_to: RenameTo = "words"
    """New names of labels: the task's own labels 'permuted', or random 'words'."""

    @model_validator(mode="before")
    @classmethod
    def _drops_gone_settings(cls, values: Any) -> Any:
        """Accept recipes of earlier versions; the resolved recipes in their run folders name every setting."""
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

    def without_renaming(self) -> EpisodeSettings:
        """Return the same settings without renamed labels, as every measurement uses them."""
        return self.model_copy(update={"rename_share": 0.0})


@dataclass(frozen=True, slots=True)
class Mixing:
    """How the tokens of a run are divided among its tasks, beside `EpisodeSettings.mixture`.

    Task i gets the fraction w_i n_i^(1/T) / sum_j w_j n_j^(1/T) of the tokens, where n_i is its size in tokens (with a
    uniform mixture 1), w_i its weight and T the temperature, as in mT5 (arXiv 2010.11934).
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    """Task -> w_i, over 0; 1 for the others."""
    temperature: float = 1.0
    """T, over 0: 1 is proportional to the size, more is closer to uniform."""
    max_rows: int | None = None
    """Most train examples of a task that are used, drawn at random and the same in all epochs; None: all."""


PLAIN_MIXING = Mixing()


@dataclass(frozen=True, slots=True)
class TaskLengths:
    """What the plan needs to know of a task: no text, only lengths."""

    name: str
    num_head_tokens: int
    """Tokens before the first example: BOS, the chat template's opening, the instruction."""
    num_between: int
    """Tokens between an answer and the next input. They are counted in `lengths`, but the first example has none."""
    lengths: NDArray[np.int64]
    """(N,), tokens of each example: between, input segment, answer and terminator."""
    labels: LabelLengths | None = None
    """None if the recipe renames no labels, or the task has none to rename."""
    wordings: tuple[NDArray[np.int64], ...] = ()
    """The same as `lengths`, (N,) each, for every further template of the task; () if there is one."""

    @property
    def alone(self) -> NDArray[np.int64]:
        """(N,), tokens of an episode that holds this example alone, in the template that makes it longest."""
        longest: NDArray[np.int64] = np.maximum.reduce([self.lengths, *self.wordings])
        return self.num_head_tokens - self.num_between + longest

    def lengths_in(self, template: int) -> NDArray[np.int64]:
        """(N,), tokens of each example in one of the task's templates, from 0."""
        return self.wordings[template - 1] if template else self.lengths


@dataclass(frozen=True, slots=True)
class Episode:
    """One training sequence, before it becomes ids."""

    index: int
    """Its place in the plan."""
    task: str
    """The task's name."""
    epoch: int
    """The pass over the task's examples that it belongs to, from 0."""
    examples: NDArray[np.int32]
    """(K,), indices into the task's tokenised examples, in order."""
    num_tokens: int
    """Its length."""
    names: NDArray[np.int32] | None = None
    """In a renamed episode: the name of each of the task's labels, as an index into LabelNames. Else None."""
    template: int = 0
    """Which of the task's templates writes its inputs, from 0."""


def find_usable(tasks: Sequence[TaskLengths], *, token_budget: int) -> dict[str, NDArray[np.int32]]:
    """Return for each task the indices of the examples that fit an episode of their own.

    Raises:
        UserError: a task has no such example.
    """
    usable = {}
    for task in tasks:
        usable[task.name] = np.flatnonzero(task.alone <= token_budget).astype(np.int32)
        if not len(usable[task.name]):
            raise UserError(
                f"task '{task.name}': no train example fits episodes.token_budget = {token_budget}"
                f" (the shortest needs {min(task.alone.tolist(), default=0)}); raise the budget or leave the task out"
            )
    return usable


def cap_rows(
    usable: NDArray[np.int32], *, task: str, max_rows: int | None, seed: int, purpose: PlanPurpose = "training"
) -> NDArray[np.int32]:
    """Return the indices of at most `max_rows` of the usable examples of a task, drawn at random, in their order."""
    if max_rows is None or len(usable) <= max_rows:
        return usable
    return np.sort(make_stream(purpose, seed, "rows", task).permutation(usable)[:max_rows])


def iter_episodes(
    tasks: Sequence[TaskLengths],
    *,
    settings: EpisodeSettings,
    seed: int,
    purpose: PlanPurpose = "training",
    mixing: Mixing = PLAIN_MIXING,
) -> Iterator[Episode]:
    """Yield the endless plan of episodes of all `tasks`, interleaved so that each gets its part of the tokens.

    The next episode is always of the task that is furthest behind (stride scheduling), so at any moment each task has
    its part to within one episode. A seeded head start of less than one episode decides which task comes first. Plans
    for different purposes are drawn independently.

    Raises:
        UserError: a task has no example that fits the budget, or has more labels than there are words to rename them.
    """
    usable = {
        name: cap_rows(rows, task=name, max_rows=mixing.max_rows, seed=seed, purpose=purpose)
        for name, rows in find_usable(tasks, token_budget=settings.token_budget).items()
    }
    streams: dict[str, Iterator[Episode]] = {}
    progress: dict[str, Callable[[Episode], float]] = {}
    queue: list[tuple[float, str]] = []
    for task in tasks:
        if task.labels is not None and settings.rename_share:
            check_names(task.labels, task=task.name, to=settings.rename_to)
        stream = _iter_task_episodes(task, usable[task.name], settings=settings, seed=seed, purpose=purpose)
        first = next(stream)
        streams[task.name] = chain([first], stream)
        progress[task.name] = _measure_progress(task, usable[task.name], mixture=settings.mixture, mixing=mixing)
        head_start = float(make_stream(purpose, seed, "head start", task.name).random())
        queue.append((head_start * progress[task.name](first), task.name))
    heapq.heapify(queue)
    index = 0
    while True:
        done, name = heapq.heappop(queue)
        episode = next(streams[name])
        heapq.heappush(queue, (done + progress[name](episode), name))
        yield replace(episode, index=index)
        index += 1


def _measure_progress(
    task: TaskLengths, usable: NDArray[np.int32], *, mixture: Mixture, mixing: Mixing
) -> Callable[[Episode], float]:
    """Return a function that measures how far an episode advances its task: its tokens over the task's fraction.

    Without weights and temperature that is in tokens if the mixture is uniform, else in epochs. Epochs are measured
    without heads: these are written once per episode, and tasks differ in both, yet all should finish an epoch
    together. For the same reason renamed answers count with their own lengths.
    """
    weight = mixing.weights.get(task.name, 1.0)
    if mixture == "uniform":
        return lambda episode: episode.num_tokens / weight
    size = weight * float(task.lengths[usable].sum()) ** (1 / mixing.temperature)
    return lambda episode: int(task.lengths[episode.examples].sum()) / size


def _iter_task_episodes(
    task: TaskLengths, usable: NDArray[np.int32], *, settings: EpisodeSettings, seed: int, purpose: PlanPurpose
) -> Iterator[Episode]:
    """Yield the episodes of one task, epoch after epoch. index: within its epoch, whose last episode may be short."""
    most_that_fit = _count_most_that_fit(task, usable, settings=settings)
    epoch = 0
    while True:
        rng = make_stream(purpose, seed, "order", task.name, epoch)
        order = rng.permutation(usable)
        number = start = 0
        while start < len(order):
            most = min(most_that_fit, _draw_num_examples(settings.shots, rng))
            place = (seed, task.name, epoch, number)
            names = _draw_renaming(task, place, settings=settings, purpose=purpose)
            template = _draw_template(task, place, purpose=purpose)
            nexts = order[start : start + most]
            cut = partial(_cut_episode, task, nexts, index=number, epoch=epoch, token_budget=settings.token_budget)
            episode = cut(names=names, template=template)
            # No shot would show the new name of a single example; and a single one may fit only under its own label.
            if episode.names is not None and len(episode.examples) < 2:
                episode = cut(names=None, template=template)
            start += len(episode.examples)
            yield episode
            number += 1
        epoch += 1


def _cut_episode(
    task: TaskLengths,
    nexts: NDArray[np.int32],
    *,
    names: NDArray[np.int32] | None,
    template: int,
    index: int,
    epoch: int,
    token_budget: int,
) -> Episode:
    """Return the episode of as many of the next examples as fit the budget, of none if the first does not fit."""
    num_head_tokens, lengths = task.num_head_tokens, task.lengths_in(template)[nexts]
    if names is not None:
        assert task.labels is not None
        own = task.labels.label_of[nexts]
        num_head_tokens = task.labels.num_head_tokens
        lengths = lengths - task.labels.name_tokens[own] + task.labels.name_tokens[names[own]]
    ends = num_head_tokens - task.num_between + np.cumsum(lengths)
    num_examples = int(np.searchsorted(ends, token_budget, side="right"))
    num_tokens = int(ends[num_examples - 1]) if num_examples else 0
    return Episode(
        index=index,
        task=task.name,
        epoch=epoch,
        examples=nexts[:num_examples],
        num_tokens=num_tokens,
        names=names,
        template=template,
    )


def _count_most_that_fit(task: TaskLengths, usable: NDArray[np.int32], *, settings: EpisodeSettings) -> int:
    """Return an upper bound of an episode's number of examples, so that no more need to be looked at."""
    shortest = np.minimum.reduce([task.lengths, *task.wordings])[usable]
    num_head_tokens = task.num_head_tokens
    if task.labels is not None and settings.rename_share:
        own = task.labels.name_tokens[task.labels.label_of[usable]]
        shortest = shortest - own + np.minimum(own, task.labels.name_tokens.min())
        num_head_tokens = min(num_head_tokens, task.labels.num_head_tokens)
    ends = num_head_tokens - task.num_between + np.cumsum(np.sort(shortest))
    return int(np.searchsorted(ends, settings.token_budget, side="right"))


def _draw_renaming(
    task: TaskLengths, place: tuple[int, str, int, int], *, settings: EpisodeSettings, purpose: PlanPurpose
) -> NDArray[np.int32] | None:
    """Return the names of the labels in one episode; None if it is not renamed.

    place: (seed, task, epoch, number) of the episode, which has a stream of its own, so that renaming changes neither
        the order nor any other episode. Most recipes rename nothing, and then no stream is made: it takes 20 us.
    """
    if task.labels is None or not settings.rename_share:
        return None
    rng = make_stream(purpose, place[0], "renaming", *place[1:])
    return draw_names(task.labels, to=settings.rename_to, rng=rng) if rng.random() < settings.rename_share else None


def _draw_template(task: TaskLengths, place: tuple[int, str, int, int], *, purpose: PlanPurpose) -> int:
    """Return which of the task's templates writes one episode; its stream is its own, as that of renaming is."""
    if not task.wordings:
        return 0
    return int(make_stream(purpose, place[0], "template", *place[1:]).integers(len(task.wordings) + 1))


def _draw_num_examples(shots: EpisodeShots, rng: np.random.Generator) -> int:
    if isinstance(shots, str):
        return 2**31
    if isinstance(shots, int):
        return shots + 1
    # Log-uniform over the number of examples, which is never 0, unlike the number of shots.
    low, high = shots[0] + 1, shots[1] + 1
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
