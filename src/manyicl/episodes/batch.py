"""Packs to tensors: one row per batch, each target with its weight, which does not depend on the number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from manyicl.episodes.plan import PLAIN_MIXING, EpisodeSettings, Mixing, Targets
from manyicl.episodes.segments import Segments, bounds_of, make_segments, power_of_two
from manyicl.episodes.tokenized import TokenizedEpisode, TokenizedTask, answer_lengths_of, join_examples, lengths_of

Normalization = Literal["answer", "token", "task"]

# Shape suffixes: T tokens of the row, N targets, A answers that are targets.


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How much of what a row has, which is known from the plan before the row is made."""

    segment_lengths: tuple[int, ...]
    """Tokens of each segment, padding included."""
    num_bounds: int
    """Of segments, those that padding repeats included."""
    num_targets: int
    num_answers: int
    """Answers that are targets."""

    @property
    def num_tokens(self) -> int:
        """Length of the row."""
        return sum(self.segment_lengths)


@dataclass(frozen=True, slots=True)
class Batch:
    """One row of whole episodes, ready for the model. Each segment of it is one episode."""

    input_ids_1T: Tensor
    """Token ids."""
    segment_ids_T: Tensor
    """Number of the segment that each token is in. The next three fields follow from it."""
    position_ids_1T: Tensor
    """Positions, which start at 0 in each segment."""
    segment_lengths: tuple[int, ...]
    """Tokens of each segment."""
    segment_bounds_S: Tensor
    """int32: where each segment begins, then the end of the row."""
    target_positions_N: Tensor
    """Position of each target token in the row. Its logits come from the position before."""
    target_weights_N: Tensor
    """Weight of each target's cross-entropy in the loss; it contains the divisors of the whole optimizer step."""
    target_answers_N: Tensor
    """Number of the answer, within the batch, that each target belongs to."""
    answer_shots_A: Tensor
    """Shots before each answer in its episode."""
    answer_tasks_A: Tensor
    """Task of each answer, as an index into the run's task names."""
    episodes: tuple[int, ...]
    """Indices in the plan of the row's episodes."""

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def num_tokens(self) -> int:
        """Length of the row, with the padding that `pad_row` may have added."""
        return self.input_ids_1T.shape[1]

    @property
    def counts(self) -> RowCounts:
        """How much the row has of what."""
        num_targets, num_answers = len(self.target_positions_N), len(self.answer_shots_A)
        return RowCounts(self.segment_lengths, len(self.segment_bounds_S), num_targets, num_answers)

    @property
    def segments(self) -> Segments:
        """The row's episodes in the form that attention takes."""
        return make_segments(self.segment_lengths, bounds_S=self.segment_bounds_S)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`. accelerate calls it: hence the name and arguments."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory. torch's DataLoader calls it."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, act: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with what `act` makes of each of its tensors."""
        made: dict[str, Any] = {name: act(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **made)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, slots=True)
class Divisors:
    """What the loss of one optimizer step is divided by, counted over all its packs, so over all ranks."""

    num_answers: int
    """Answers that are targets."""
    num_targets: int
    """Tokens of these answers, terminators included."""
    num_answers_by_task: Mapping[str, int]
    """Answers that are targets, for each task in the step."""


def targets_of(num_examples: int, targets: Targets) -> slice:
    """Return which of an episode's answers are targets, as a slice."""
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
    """Return the weight in the loss of each token of answers that are `num_tokens` long, by `normalization`.

    answer: each answer's mean token loss counts equally.     1 / (tokens of the answer * answers)
    token:  each token counts equally.                        1 / targets
    task:   the `answer` losses of tasks count equally.       1 / (tokens of the answer * answers of the task * tasks)
    """
    if normalization == "token":
        return np.full(len(num_tokens), 1.0 / divisors.num_targets)
    if normalization == "answer":
        return 1.0 / (num_tokens * divisors.num_answers)
    by_task = divisors.num_answers_by_task
    return 1.0 / (num_tokens * by_task[task] * len(by_task))


class BatchMaker:
    """Turns packs into batches. It holds what is fixed for a run."""

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
        """Return one row with all episodes of `packs`.

        divisors: of the optimizer step that the packs belong to; default: of these packs alone.
        """
        if divisors is None:
            divisors = count_divisors(packs, tasks=self.tasks, split=self.split, targets=self.targets)
        episodes = [episode for pack in packs for episode in pack.episodes]
        built = [
            join_examples(self.tasks[e.task], split=self.split, indices=e.examples, names=e.names, template=e.template)
            for e in episodes
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
    """Join tokenised episodes into a row, and mark their targets.

    weights: for each episode, the weight of each of its target answers' tokens. tasks: for each episode, the index of
    its task. episodes: their indices in the plan.
    """
    lengths = np.asarray([len(b.ids) for b in built], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    spans, shots = [], []
    for episode, offset in zip(built, offsets.tolist(), strict=True):
        chosen = targets_of(len(episode.spans), targets)
        spans.append(episode.spans[chosen] + offset)
        shots.append(np.arange(len(episode.spans))[chosen])
    spans_A2 = np.concatenate(spans)
    answer_lengths_A = spans_A2[:, 1] - spans_A2[:, 0]
    # The first range is for a row without targets, as benchmarks have.
    positions_N = np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in spans_A2)])
    segment_lengths = tuple(lengths.tolist())
    return Batch(
        input_ids_1T=torch.from_numpy(np.concatenate([b.ids for b in built]).astype(np.int64))[None],
        segment_ids_T=torch.from_numpy(np.repeat(np.arange(len(built)), lengths)),
        position_ids_1T=torch.from_numpy(np.arange(lengths.sum()) - np.repeat(offsets, lengths))[None],
        segment_lengths=segment_lengths,
        segment_bounds_S=torch.from_numpy(bounds_of(segment_lengths)),
        target_positions_N=torch.from_numpy(positions_N),
        target_weights_N=torch.from_numpy(np.repeat(np.concatenate(weights), answer_lengths_A).astype(np.float32)),
        target_answers_N=torch.from_numpy(np.repeat(np.arange(len(spans_A2)), answer_lengths_A)),
        answer_shots_A=torch.from_numpy(np.concatenate(shots)),
        answer_tasks_A=torch.from_numpy(np.repeat(np.asarray(tasks), [len(s) for s in spans])),
        episodes=episodes,
    )


def split_row(batch: Batch) -> list[Batch]:
    """Return each episode of a row as a row of its own, with the same targets, weights and tasks."""
    if len(batch.segment_lengths) == 1:
        return [batch]
    stops = np.cumsum(batch.segment_lengths)
    targets = np.concatenate([[0], np.searchsorted(batch.target_positions_N.cpu().numpy(), stops)])
    answers_N = batch.target_answers_N.cpu().numpy()
    rows = []
    for place, (stop, length) in enumerate(zip(stops.tolist(), batch.segment_lengths, strict=True)):
        tokens, chosen = slice(stop - length, stop), slice(*targets[place : place + 2].tolist())
        # An episode's answers are consecutive, and each has a token: so its first and last targets give the range.
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
    """Return the row padded at its end to a multiple of `multiple` tokens, so that kernels see few row lengths.

    The padding extends the last episode: with causal attention no target sees it, and it is not a target itself. For
    the same reason the number of segment bounds is padded to a power of two.
    """
    lengths, num_bounds = _pad_lengths(batch.segment_lengths, multiple=multiple)
    bounds_S = torch.from_numpy(bounds_of(lengths, num_bounds=num_bounds))
    return pad_tokens(batch, lengths=lengths, bounds_S=bounds_S)


def _pad_lengths(lengths: Sequence[int], *, multiple: int) -> tuple[tuple[int, ...], int]:
    """Return the lengths of a padded row's segments, and how many bounds it has."""
    *before, last = lengths
    return (*before, last + -sum(lengths) % multiple), power_of_two(len(lengths) + 1)


def pad_tokens(batch: Batch, *, lengths: tuple[int, ...], bounds_S: Tensor) -> Batch:
    """Return the row with segments of `lengths`: what they have more than the row is padding, in the last of them."""
    num_padding = sum(lengths) - batch.num_tokens
    return replace(
        batch,
        input_ids_1T=functional.pad(batch.input_ids_1T, (0, num_padding)),
        segment_ids_T=functional.pad(batch.segment_ids_T, (0, num_padding), value=len(lengths) - 1),
        position_ids_1T=functional.pad(batch.position_ids_1T, (0, num_padding)),  # 0 is valid in every model
        segment_lengths=lengths,
        segment_bounds_S=bounds_S,
    )


class PackDataset(Dataset[tuple[Pack, Divisors]]):
    """The packs of a whole run, in order, each with the divisors of its optimizer step.

    packs_per_step: over all ranks and micro-batches, so the run is the same for any number of ranks.
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
        mixing: Mixing = PLAIN_MIXING,
    ) -> None:
        lengths = [lengths_of(maker.tasks[name], split=maker.split) for name in maker.task_names]
        plan = iter_packs(lengths, settings=settings, pack_tokens=pack_tokens, seed=seed, mixing=mixing)
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
        """Return the same packs, in the order and with the padding in which a training run serves them.

        order: indices into the plan; it must only move packs within their optimizer step. row_multiple: `collate` pads
        rows to a multiple of this many tokens.
        """
        other = copy.copy(self)
        other._order, other._row_multiple = order, row_multiple
        return other

    def count_rows(self, *, packs_per_row: int) -> Iterator[RowCounts]:
        """Yield what each row of a run in one process has, in order, without making any; `collate` makes the same."""
        maker, multiple = self.maker, self._row_multiple
        for first in range(0, len(self), packs_per_row):
            packs = [self[index][0] for index in range(first, first + packs_per_row)]
            counted = count_divisors(packs, tasks=maker.tasks, split=maker.split, targets=maker.targets)
            lengths = tuple(episode.num_tokens for pack in packs for episode in pack.episodes)
            num_bounds = len(lengths) + 1
            if multiple > 1:
                lengths, num_bounds = _pad_lengths(lengths, multiple=multiple)
            yield RowCounts(lengths, num_bounds, counted.num_targets, counted.num_answers)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> tuple[Pack, Divisors]:
        return self.packs[self._order[index]], self.divisors[index // self.packs_per_step]

    def collate(self, items: Sequence[tuple[Pack, Divisors]]) -> Batch:
        """Return the packs of one micro-batch, all of one optimizer step, as one row."""
        batch = self.maker.make_batch([pack for pack, _ in items], divisors=items[0][1])
        return pad_row(batch, multiple=self._row_multiple) if self._row_multiple > 1 else batch
