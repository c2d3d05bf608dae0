"""Loss per answer on test rows: of the model before and after training, and of one that knows only the answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from manyicl.episodes import (
    BatchMaker,
    Episode,
    EpisodeSettings,
    Pack,
    TokenizedTask,
    iter_episodes,
    lengths_of,
)
from manyicl.errors import NonFiniteError
from manyicl.intervals import Interval, t_interval
from manyicl.models import device_of, float32_head, row_attention, row_loss

Losses = dict[str, list[float]]  # task -> mean nats per answer of each episode


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One task's line of the table, in nats per answer; differences are paired over episodes."""

    task: str
    family: str
    num_episodes: int
    num_answers: int
    before: float
    """Of the model before training."""
    answers_only: float
    """Of a baseline that knows the train answers and no input."""
    after: float
    """Of the run's model."""
    after_minus_before: Interval
    after_minus_answers_only: Interval


def draw_held_out(
    tasks: Mapping[str, TokenizedTask], *, num_episodes: int, token_budget: int, seed: int
) -> dict[str, list[Episode]]:
    """Return `num_episodes` episodes of each task's test rows, filled to `token_budget`; fewer where rows run out."""
    settings = EpisodeSettings(token_budget=token_budget)
    drawn = {}
    for name, task in tasks.items():
        lengths = lengths_of(task, split="test")
        if (lengths.alone <= token_budget).any():
            plan = iter_episodes([lengths], settings=settings, seed=seed, purpose="held-out table")
            drawn[name] = [episode for episode in islice(plan, num_episodes) if episode.epoch == 0]
    return drawn


@torch.inference_mode()
def episode_losses(
    model: Any, tasks: Mapping[str, TokenizedTask], episodes: Mapping[str, Sequence[Episode]], *, name: str, fix: str
) -> Losses:
    """Return each episode's mean nats per answer, terminators included, from one forward pass each.

    Raises:
        NonFiniteError: a loss is not finite, so the model is broken; it is called `name`, and `fix` says what to do.
    """
    maker = BatchMaker(tasks, split="test")
    losses: Losses = {}
    every = [episode for drawn in episodes.values() for episode in drawn]
    if not every:
        return {task: [] for task in episodes}
    longest = max(every, key=lambda episode: episode.num_tokens)
    text = maker.make_batch([Pack(index=0, episodes=(longest,))]).input_ids_1T[0].numpy()
    with row_attention(model, text, longest=longest.num_tokens), float32_head(model):
        for task, drawn in episodes.items():
            losses[task] = []
            for episode in drawn:
                batch = maker.make_batch([Pack(index=0, episodes=(episode,))]).to(device_of(model))
                scored = row_loss(model, batch)
                losses[task].append(float(scored.nll_A.double().mean()))
    broken = sum(not math.isfinite(loss) for drawn in losses.values() for loss in drawn)
    if broken:
        raise NonFiniteError(f"{name}: gives {broken} of {len(every)} held-out episodes no finite loss; {fix}")
    return losses


def answers_only_losses(tasks: Mapping[str, TokenizedTask], episodes: Mapping[str, Sequence[Episode]]) -> Losses:
    """Return the same of a baseline that has seen the train answers and no input.

    Where labels are fixed it gives each whole answer its share of the train answers; else it is a unigram over the
    tokens of train answers. Both add one to every count, so nothing has probability zero.
    """
    losses = {}
    for name, drawn in episodes.items():
        task = tasks[name]
        costs = _label_costs(task) if task.task.labels else _unigram_costs(task)
        losses[name] = [float(costs[episode.examples].mean()) for episode in drawn]
    return losses


def _label_costs(task: TokenizedTask) -> NDArray[np.float64]:
    counts = Counter(task.task.train[row].answer for row in task.splits["train"].rows)
    total = sum(counts.values()) + len(task.task.labels)
    return np.array([-np.log((counts[task.task.test[row].answer] + 1) / total) for row in task.splits["test"].rows])


def _unigram_costs(task: TokenizedTask) -> NDArray[np.float64]:
    train, test = task.splits["train"], task.splits["test"]
    answers = [train.ids[a:b] for a, b in zip(train.answer_starts, train.starts[1:], strict=True)]
    size = int(max(train.ids.max(), test.ids.max())) + 1
    counts = np.bincount(np.concatenate(answers), minlength=size) + 1.0
    cost = -np.log(counts / counts.sum())
    return np.array([cost[test.ids[a:b]].sum() for a, b in zip(test.answer_starts, test.starts[1:], strict=True)])


def held_out_rows(
    tasks: Mapping[str, TokenizedTask],
    episodes: Mapping[str, Sequence[Episode]],
    *,
    before: Losses,
    after: Losses,
    answers_only: Losses,
) -> list[HeldOutRow]:
    """Return the table, one row a task that has test episodes."""
    rows = []
    for name, drawn in episodes.items():
        old, new, baseline = (np.array(losses[name]) for losses in (before, after, answers_only))
        rows.append(
            HeldOutRow(
                task=name,
                family=tasks[name].task.family,
                num_episodes=len(drawn),
                num_answers=sum(len(episode.examples) for episode in drawn),
                before=float(old.mean()),
                answers_only=float(baseline.mean()),
                after=float(new.mean()),
                after_minus_before=t_interval(new - old),
                after_minus_answers_only=t_interval(new - baseline),
            )
        )
    return rows


def mean_of_tasks(intervals: Sequence[Interval], *, num_episodes: Sequence[int]) -> Interval:
    """Return the mean over tasks with a 95 % interval for these tasks (only episodes vary, not the choice of tasks).

    The standard errors are read back from the tasks' own t intervals.
    """
    mean = float(np.mean([i.mean for i in intervals]))
    known = [(i, n) for i, n in zip(intervals, num_episodes, strict=True) if n > 1]
    if len(known) < len(intervals):
        return Interval(mean, float("nan"), float("nan"))
    errors = [(i.high - i.mean) / stats.t.ppf(0.975, n - 1) for i, n in known]
    half = float(np.sqrt(np.sum(np.square(errors))) / len(known) * stats.t.ppf(0.975, sum(n - 1 for _, n in known)))
    return Interval(mean, mean - half, mean + half)


def rows_to_json(rows: Sequence[HeldOutRow]) -> list[dict[str, Any]]:
    """Return the table as plain values; an interval that one episode cannot give is null."""

    def without_nan(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nan(item) for key, item in value.items()}
        return None if isinstance(value, float) and np.isnan(value) else value

    return [without_nan(asdict(row)) for row in rows]
