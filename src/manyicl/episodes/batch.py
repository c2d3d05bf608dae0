"""Packs to tensors: one row a batch, every target with its weight, the same for any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from manyicl.episodes.packing import Pack, iter_packs
from manyicl.episodes.plan import EpisodeSettings, Targets, TaskLengths
from manyicl.episodes.segments import Segments, bounds_of, make_segments, power_of_two
from manyicl.episodes.tokenized import TokenizedEpisode, TokenizedTask, answer_lengths_of, join_examples

Normalization = Literal["answer", "token", "task"]

# Shape suffixes: T tokens of the row, N targets, A answers that are targets.


@dataclass(frozen=True, slots=True)
class Batch:
    """One row of whole episodes on its way through the model.

    segment_ids_T is the only record of where an episode lies; position_ids_1T, segment_lengths and segment_bounds_S are
    derived from it.
    target_positions_N: where each target token stands in the row (its logits come from the position before).
    target_weights_N: what its cross-entropy counts in the loss; the global divisors are already in it.
    target_answers_N: which answer of the batch it belongs to. answer_shots_A: shots before that answer in its episode.
    answer_tasks_A: index into the run's task names. episodes: the plan's indices of the row's episodes.
    """

    input_ids_1T: Tensor
    segment_ids_T: Tensor
    position_ids_1T: Tensor
    segment_lengths: tuple[int, ...]
    segment_bounds_S: Tensor
    target_positions_N: Tensor
    target_weights_N: Tensor
    target_answers_N: Tensor
    answer_shots_A: Tensor
    answer_tasks_A: Tensor
    episodes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def num_tokens(self) -> int:
        """The row's length: its processed tokens, and the padding where `pad_row` has added some."""
        return self.input_ids_1T.shape[1]

    @property
    def segments(self) -> Segments:
        """Where its episodes lie, for attention."""
        return make_segments(self.segment_lengths, bounds_S=self.segment_bounds_S)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device` (the name and arguments that accelerate calls)."""
        moved: dict[str, Any] = {k: v.to(device, non_blocking=non_blocking) for k, v in self._tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in self._tensors().items()}
        return replace(self, **pinned)

    def _tensors(self) -> dict[str, Tensor]:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, slots=True)
class Divisors:
    """What the weights of one optimizer step are divided by; counted over all its packs, so over all ranks."""

    num_answers: int
    num_targets: int
    num_answers_by_task: Mapping[str, int]


def targets_of(num_examples: int, targets: Targets) -> slice:
    """Return which of an episode's answers are targets."""
    return slice(0 if targets == "all" else num_examples - 1, num_examples)


def count_divisors(
    packs: Sequence[Pack], *, tasks: Mapping[str, TokenizedTask], split: str, targets: Targets
) -> Divisors:
    """Count the answers and targets of the packs of one optimizer step."""
    num_targets, by_task = 0, dict.fromkeys((e.task for pack in packs for e in pack.episodes), 0)
    for pack in packs:
        for episode in pack.episodes:
            chosen = episode.examples[targets_of(len(episode.examples), targets)]
            lengths = answer_lengths_of(tasks[episode.task], split=split, indices=chosen, names=episode.names)
            num_targets += int(lengths.sum())
            by_task[episode.task] += len(chosen)
    return Divisors(num_answers=sum(by_task.values()), num_targets=num_targets, num_answers_by_task=by_task)


def answer_weight(
    num_tokens: NDArray[np.int64], *, task: str, divisors: Divisors, normalization: Normalization
) -> NDArray[np.float64]:
    """Return the weight of each target token of answers that are `num_tokens` long.

    answer: each answer's mean token loss counts once.      1 / (tokens of the answer * answers)
    token:  each token counts once.                         1 / targets
    task:   mean over the tasks of their `answer` loss.     1 / (tokens of the answer * answers of the task * tasks)
    """
    if normalization == "token":
        return np.full(len(num_tokens), 1.0 / divisors.num_targets)
    if normalization == "answer":
        return 1.0 / (num_tokens * divisors.num_answers)
    by_task = divisors.num_answers_by_task
    return 1.0 / (num_tokens * by_task[task] * len(by_task))


class BatchMaker:
    """Turns packs into batches: what is fixed for a run is given once."""

    def __init__(
        self,
        tasks: Mapping[str, TokenizedTask],
        *,
        targets: Targets = "all",
        normalization: Normalization = "answer",
        split: str = "train",
    ) -> None:
        self.tasks = tasks
        self.task_names = tuple(sorted(tasks))
        self.targets = targets
        self.normalization = normalization
        self.split = split

    def make_batch(self, packs: Sequence[Pack], *, divisors: Divisors | None = None) -> Batch:
        """Return one row with all episodes of `packs`; without `divisors` the row is normalised by itself."""
        if divisors is None:
            divisors = count_divisors(packs, tasks=self.tasks, split=self.split, targets=self.targets)
        episodes = [episode for pack in packs for episode in pack.episodes]
        built = [
            join_examples(self.tasks[e.task], split=self.split, indices=e.examples, names=e.names) for e in episodes
        ]
        weights = [
            answer_weight(self._answer_tokens(b), task=e.task, divisors=divisors, normalization=self.normalization)
            for e, b in zip(episodes, built, strict=True)
        ]
        tasks = [self.task_names.index(e.task) for e in episodes]
        return join_row(
            built, targets=self.targets, weights=weights, tasks=tasks, episodes=tuple(e.index for e in episodes)
        )

    def _answer_tokens(self, built: TokenizedEpisode) -> NDArray[np.int64]:
        spans = built.spans[targets_of(len(built.spans), self.targets)]
        return spans[:, 1] - spans[:, 0]


def join_row(
    built: Sequence[TokenizedEpisode],
    *,
    targets: Targets,
    weights: Sequence[NDArray[np.float64]],
    tasks: Sequence[int],
    episodes: tuple[int, ...],
) -> Batch:
    """Lay tokenised episodes behind one another in a row, and mark their targets."""
    lengths = np.asarray([len(b.ids) for b in built], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    spans, shots = [], []
    for episode, offset in zip(built, offsets.tolist(), strict=True):
        chosen = targets_of(len(episode.spans), targets)
        spans.append(episode.spans[chosen] + offset)
        shots.append(np.arange(len(episode.spans))[chosen])
    spans_A2 = np.concatenate(spans)
    answer_lengths_A = spans_A2[:, 1] - spans_A2[:, 0]
    segment_ids_T = np.repeat(np.arange(len(built)), lengths)
    segment_lengths = segment_lengths_of(segment_ids_T)
    return Batch(
        input_ids_1T=torch.from_numpy(np.concatenate([b.ids for b in built]).astype(np.int64))[None],
        segment_ids_T=torch.from_numpy(segment_ids_T),
        position_ids_1T=torch.from_numpy(positions_of(segment_ids_T))[None],
        segment_lengths=segment_lengths,
        segment_bounds_S=torch.from_numpy(bounds_of(segment_lengths)),
        target_positions_N=torch.from_numpy(_ranges(spans_A2[:, 0], answer_lengths_A)),
        target_weights_N=torch.from_numpy(np.repeat(np.concatenate(weights), answer_lengths_A).astype(np.float32)),
        target_answers_N=torch.from_numpy(np.repeat(np.arange(len(spans_A2)), answer_lengths_A)),
        answer_shots_A=torch.from_numpy(np.concatenate(shots)),
        answer_tasks_A=torch.from_numpy(np.repeat(np.asarray(tasks), [len(s) for s in spans])),
        episodes=episodes,
    )


def split_row(batch: Batch) -> list[Batch]:
    """Return the episodes of a row, each as a row of its own: with the same targets, weights and tasks."""
    if len(batch.segment_lengths) == 1:
        return [batch]
    stops = np.cumsum(batch.segment_lengths)
    targets = np.concatenate([[0], np.searchsorted(batch.target_positions_N.cpu().numpy(), stops)])
    answers_N = batch.target_answers_N.cpu().numpy()
    rows = []
    for place, (stop, length) in enumerate(zip(stops.tolist(), batch.segment_lengths, strict=True)):
        tokens, chosen = slice(stop - length, stop), slice(*targets[place : place + 2].tolist())
        # Every answer has a token, and the answers of an episode follow one another.
        first, last = (int(answers_N[i]) for i in (chosen.start, chosen.stop - 1))
        answers = slice(first, last + 1)
        rows.append(
            Batch(
                input_ids_1T=batch.input_ids_1T[:, tokens],
                segment_ids_T=torch.zeros_like(batch.segment_ids_T[tokens]),
                position_ids_1T=batch.position_ids_1T[:, tokens],
                segment_lengths=(length,),
                segment_bounds_S=batch.segment_bounds_S.new_tensor([0, length]),
                target_positions_N=batch.target_positions_N[chosen] - (stop - length),
                target_weights_N=batch.target_weights_N[chosen],
                target_answers_N=batch.target_answers_N[chosen] - first,
                answer_shots_A=batch.answer_shots_A[answers],
                answer_tasks_A=batch.answer_tasks_A[answers],
                episodes=batch.episodes[place : place + 1],
            )
        )
    return rows


def pad_row(batch: Batch, *, multiple: int) -> Batch:
    """Return the row with padding at its end, up to a multiple of so many tokens: kernels are made for few lengths.

    The padding goes on the last episode, so causal attention shows it to no target, and it is none itself. The number
    of bounds becomes a power of two for the same reason.
    """
    num_padding = -batch.num_tokens % multiple
    *before, last = batch.segment_lengths
    lengths = (*before, last + num_padding)
    bounds = bounds_of(lengths, num_bounds=power_of_two(len(lengths) + 1))
    return replace(
        batch,
        input_ids_1T=functional.pad(batch.input_ids_1T, (0, num_padding)),
        segment_ids_T=functional.pad(batch.segment_ids_T, (0, num_padding), value=len(lengths) - 1),
        position_ids_1T=functional.pad(batch.position_ids_1T, (0, num_padding)),  # 0: one that every model knows
        segment_lengths=lengths,
        segment_bounds_S=torch.from_numpy(bounds),
    )


def positions_of(segment_ids_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return positions that start at 0 in each segment.

    >>> positions_of(np.array([0, 0, 0, 1, 1])).tolist()
    [0, 1, 2, 0, 1]
    """
    lengths = np.bincount(segment_ids_T)
    return _ranges(np.zeros(len(lengths), dtype=np.int64), lengths)


def segment_lengths_of(segment_ids_T: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the tokens of each segment in order."""
    return tuple(int(n) for n in np.bincount(segment_ids_T))


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ... for each start, joined."""
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ranges: NDArray[np.int64] = np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(starts - before, lengths)
    return ranges


def lengths_of(tokenized: TokenizedTask, *, split: str = "train") -> TaskLengths:
    """Return what the plan of episodes needs to know of a tokenised task."""
    return TaskLengths(
        name=tokenized.task.name,
        num_head_tokens=len(tokenized.head_ids),
        num_between=tokenized.num_between,
        lengths=tokenized.splits[split].lengths,
        labels=tokenized.names.lengths(split) if tokenized.names else None,
    )


class PackDataset(Dataset[tuple[Pack, Divisors]]):
    """The packs of a whole run, in order, each with the divisors of the optimizer step that it belongs to.

    packs_per_step counts over all ranks and micro-batches, so the run is the same for any world size.
    """

    def __init__(
        self,
        maker: BatchMaker,
        *,
        settings: EpisodeSettings,
        pack_tokens: int,
        packs_per_step: int,
        num_steps: int,
        seed: int,
    ) -> None:
        lengths = [lengths_of(maker.tasks[name], split=maker.split) for name in maker.task_names]
        plan = iter_packs(lengths, settings=settings, pack_tokens=pack_tokens, seed=seed)
        self.packs = list(islice(plan, packs_per_step * num_steps))
        self.divisors = [
            count_divisors(
                self.packs[start : start + packs_per_step], tasks=maker.tasks, split=maker.split, targets=maker.targets
            )
            for start in range(0, len(self.packs), packs_per_step)
        ]
        self.settings = settings
        self.packs_per_step = packs_per_step
        self.maker = maker
        self._order: Sequence[int] = range(len(self.packs))
        self._row_multiple = 1

    def arranged(self, *, order: Sequence[int], row_multiple: int) -> PackDataset:
        """Return the same packs as one training run serves them.

        order: the index of each pack in the plan, in the order of the batches; packs stay in their optimizer step.
        row_multiple: `collate` pads rows to a multiple of so many tokens.
        """
        other = copy.copy(self)
        other._order, other._row_multiple = order, row_multiple
        return other

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> tuple[Pack, Divisors]:
        return self.packs[self._order[index]], self.divisors[index // self.packs_per_step]

    def collate(self, items: Sequence[tuple[Pack, Divisors]]) -> Batch:
        """Join the packs of one micro-batch, all of one optimizer step, into one row."""
        batch = self.maker.make_batch([pack for pack, _ in items], divisors=items[0][1])
        return pad_row(batch, multiple=self._row_multiple) if self._row_multiple > 1 else batch
