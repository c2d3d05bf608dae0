"""Validation rows of a run: packed once, shared by the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyicl.episodes import BatchMaker, EpisodeSettings, Pack, fits_any, iter_episodes, lengths_of

# Lengths of rows that a GPU meets, at most: each costs cuDNN a plan, and padding to one of them 1.6 % at most.
ROW_LENGTHS = 64


@dataclass(frozen=True, slots=True)
class ValidationPack:
    """One validation episode of one task, alone in its row."""

    task: str
    pack: Pack


def plan_validation(
    maker: BatchMaker, *, settings: EpisodeSettings, num_tokens: int, seed: int
) -> list[ValidationPack]:
    """Return about `num_tokens` of episodes of each task's validation rows, none renamed; at most one pass."""
    planned = []
    for name in maker.task_names:
        lengths = lengths_of(maker.tasks[name], split=maker.split)
        if not num_tokens or not fits_any(lengths, token_budget=settings.token_budget):
            continue
        spent = 0
        plan = iter_episodes(
            [lengths], settings=settings.without_augmentation(), seed=seed, purpose="validation losses"
        )
        for episode in plan:
            if episode.epoch > 0 or spent >= num_tokens:
                break
            planned.append(ValidationPack(task=name, pack=Pack(index=episode.index, episodes=(episode,))))
            spent += episode.num_tokens
    return planned


def share_rows(planned: Sequence[ValidationPack], *, rank: int, num_ranks: int) -> list[tuple[ValidationPack, bool]]:
    """Return the rows of one rank, and whether each counts: the last is repeated so that all ranks have as many.

    Where weights are sharded each forward pass is everyone's, and a rank without a row would leave the others waiting.
    """
    num_rows = -(-len(planned) // num_ranks)
    places = range(rank, num_rows * num_ranks, num_ranks)
    return [(planned[min(place, len(planned) - 1)], place < len(planned)) for place in places]
