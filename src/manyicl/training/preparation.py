"""A recipe -> tokenized tasks, the plan of packs, and what it drops."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from manyicl.episodes import (
    BEYOND_CAP,
    TOO_LONG,
    BatchMaker,
    Episode,
    EpisodeSettings,
    Frame,
    Pack,
    PackDataset,
    TaskTokenizer,
    TokenizedTask,
    answer_lengths_of,
    cap_rows,
    check_lost_answers,
    default_cache_dir,
    iter_episodes,
    lengths_of,
    pack_lengths,
    targets_of,
    tokenize_task,
    with_names,
    with_wordings,
)
from manyicl.errors import UserError, suggest
from manyicl.models import (
    ModelShape,
    check_causal,
    check_trainable,
    check_vocabulary,
    check_window,
    count_flops,
    load_config,
    load_tokenizer,
    shape_model,
)
from manyicl.seeds import STREAMS
from manyicl.tasks import Task, load_tasks
from manyicl.training.memory.choice import resolve_recompute
from manyicl.training.memory.footprint import Row
from manyicl.training.recipe import RunConfig

# Most lengths of rows that a GPU meets: cuDNN plans for each length, and padding to one of these costs 1.6 % at most.
ROW_LENGTHS = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is known before the weights are loaded."""

    config: RunConfig
    tokenizer: Any
    """Of the base, as transformers loads it."""
    frame: Frame
    """The text that examples are written in."""
    tasks: dict[str, TokenizedTask]
    """By name."""
    packs: PackDataset
    """Of the whole run."""
    validation: tuple[BatchMaker, list[Pack]]
    """What makes batches of validation rows, and the rows, each of whole episodes of any tasks."""


def prepare_run(
    config: RunConfig, *, frame: Frame | None = None, tasks: Mapping[str, TokenizedTask] | None = None
) -> Prepared:
    """Read, check and tokenise the tasks, and plan every pack.

    frame: of the chat style, the text that a run was started with; None renders the chat template now.
    tasks: the recipe's tasks by name, and perhaps others, as `tokenize_all` returned them for the same template and
    frame; None reads their files.

    Raises:
        UserError: anything that would make the run useless or impossible.
    """
    model_config = load_config(config.model)
    check_causal(model_config, settings=config.model)
    check_trainable(model_config, settings=config.model)
    check_window(model_config, num_tokens=config.episodes.token_budget, what="episodes.token_budget")
    resolve_recompute(config.train.recompute, num_layers=model_config.get_text_config().num_hidden_layers)
    tokenizer = load_tokenizer(config.model)
    writer = TaskTokenizer(tokenizer, config.template, frame=frame)
    if tasks is None:
        chosen = tokenize_tasks(config, writer)
    else:
        chosen = {name: tasks[name] for name in sorted(config.tasks.names or tasks)}
    for name, task in chosen.items():
        check_vocabulary(model_config, path=config.model.path, num_tokens=task.num_ids)
        if not len(task.splits["train"]):
            raise UserError(f"task '{name}': has no train rows; leave it out of tasks.names, or give it some")
        if len(task.splits["train"]) == 1 and config.episodes.shots != 0:
            raise UserError(
                f"task '{name}': has one train row, and no other to stand before it; give it more, leave it out of"
                " tasks.names, or train without shots (episodes.shots = 0)"
            )
    check_weights(config, list(chosen))
    packs = plan_packs(config, chosen)
    validation_maker = BatchMaker(chosen, targets=config.episodes.targets, split="validation")
    planned = plan_validation(
        validation_maker,
        settings=config.episodes,
        num_tokens=config.train.validation_tokens,
        pack_tokens=config.pack_tokens,
        seed=config.seed,
    )
    return Prepared(config, tokenizer, writer.frame, chosen, packs=packs, validation=(validation_maker, planned))


def plan_packs(config: RunConfig, tasks: Mapping[str, TokenizedTask]) -> PackDataset:
    """Return the packs of the whole run."""
    return PackDataset(
        BatchMaker(tasks, targets=config.episodes.targets, normalization=config.train.normalization),
        settings=config.episodes,
        pack_tokens=config.pack_tokens,
        packs_per_step=config.train.packs_per_step,
        num_steps=config.train.num_steps,
        seed=config.seed,
        mixing=config.tasks.mixing,
    )


def check_weights(config: RunConfig, names: Sequence[str]) -> None:
    """Refuse weights of tasks that are not trained. names: of those that are.

    Raises:
        UserError: naming the task.
    """
    for name in config.tasks.weights:
        if name not in names:
            raise UserError(f"tasks.weights: task '{name}' is not trained{suggest(name, names)}")


def tokenize_tasks(config: RunConfig, tokenizer: TaskTokenizer) -> dict[str, TokenizedTask]:
    """Return the recipe's tasks in ids, by name.

    Raises:
        UserError: a fault in the task files, or too many answers that cannot be used.
    """
    return tokenize_all(load_tasks(config.tasks.folder, names=config.tasks.names or None), config, tokenizer)


def tokenize_all(tasks: Sequence[Task], config: RunConfig, tokenizer: TaskTokenizer) -> dict[str, TokenizedTask]:
    """Return `tasks` in ids, by name, ready for the recipe's episodes.

    Raises:
        UserError: too many answers of a task cannot be used.
    """
    cache_dir, done = default_cache_dir(), {}
    for task in tasks:
        tokenized = tokenize_task(task, tokenizer=tokenizer, cache_dir=cache_dir)
        tokenized = with_wordings(tokenized, tokenizer=tokenizer, cache_dir=cache_dir)
        done[task.name] = with_names(tokenized, tokenizer=tokenizer) if config.episodes.rename_share else tokenized
    for one in done.values():
        if fault := check_lost_answers(one):
            raise UserError(fault)
    return done


def hash_plan(packs: PackDataset) -> str:
    """Return a hash of the packs in their order: tasks, epochs, examples, label names and templates of their episodes.

    The version of the random streams is in it: they draw more than the packs, such as the validation episodes.
    """
    digest = hashlib.sha256(f"streams {STREAMS}\n".encode())
    for pack in packs.packs:
        for episode in pack.episodes:
            names = None if episode.names is None else episode.names.tolist()
            line = f"{pack.index} {episode.task} {episode.epoch} {episode.examples.tolist()} {names}"
            # Only of a further template: so a plan without them has the same hash as in earlier versions.
            line += f" template {episode.template}" if episode.template else ""
            digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def count_dropped(tokenized: TokenizedTask, config: RunConfig) -> dict[str, int]:
    """Return how many rows of all splits are not used, by reason: with the usable ones they add up to those read."""
    counts = Counter(tokenized.task.dropped)
    for split in tokenized.splits:
        counts.update(tokenized.dropped[split])
        counts[TOO_LONG] += int((lengths_of(tokenized, split=split).alone > config.episodes.token_budget).sum())
    if config.tasks.max_rows is not None:
        counts[BEYOND_CAP] += len(fitting_rows(tokenized, config)) - len(used_rows(tokenized, config))
    return {reason: number for reason, number in counts.items() if number}


def fitting_rows(tokenized: TokenizedTask, config: RunConfig) -> NDArray[np.int32]:
    """Return the train examples that fit an episode, as indices."""
    alone = lengths_of(tokenized, split="train").alone
    return np.flatnonzero(alone <= config.episodes.token_budget).astype(np.int32)


def used_rows(tokenized: TokenizedTask, config: RunConfig) -> NDArray[np.int32]:
    """Return the train examples that episodes are made of, as indices: those that fit, up to `tasks.max_rows`."""
    rows, cap = fitting_rows(tokenized, config), config.tasks.max_rows
    return cap_rows(rows, task=tokenized.task.name, max_rows=cap, seed=config.seed)


def count_plan(packs: PackDataset, *, pack_tokens: int) -> dict[str, Any]:
    """Return the plan's totals. fill: processed tokens over the capacity of the packs.

    renamed_episodes is there only if some are wanted, and templates only if a task has several: task -> template ->
    episodes that it writes.
    """
    num_tokens = sum(pack.num_tokens for pack in packs.packs)
    by_task: Counter[str] = Counter()
    episodes = [episode for pack in packs.packs for episode in pack.episodes]
    for episode in episodes:
        by_task[episode.task] += episode.num_tokens
    renamed = {"renamed_episodes": sum(e.names is not None for e in episodes)} if packs.settings.rename_share else {}
    templates = {name: task.task.templates for name, task in packs.maker.tasks.items() if task.wordings}
    used = Counter((episode.task, episode.template) for episode in episodes)
    written = {
        name: {text: used[name, number] for number, text in enumerate(texts)} for name, texts in templates.items()
    }
    return {
        "packs": len(packs.packs),
        "episodes": len(episodes),
        **renamed,
        **({"templates": written} if written else {}),
        "answers": sum(d.num_answers for d in packs.divisors),
        "targets": sum(d.num_targets for d in packs.divisors),
        "tokens": num_tokens,
        "tokens_by_task": dict(by_task),
        "fill": num_tokens / (pack_tokens * len(packs.packs)),
    }


def most_shots(packs: PackDataset) -> dict[str, int]:
    """Return task -> the most shots that an answer is trained after."""
    most: dict[str, int] = {}
    for episode in (episode for pack in packs.packs for episode in pack.episodes):
        most[episode.task] = max(most.get(episode.task, 0), len(episode.examples) - 1)
    return most


def plan_validation(
    maker: BatchMaker, *, settings: EpisodeSettings, num_tokens: int, pack_tokens: int, seed: int
) -> list[Pack]:
    """Return about `num_tokens` of episodes of each task's validation rows, none renamed; at most one pass.

    pack_tokens: the most tokens of a pack; the episodes are the same for any. They are joined because a GPU would wait
    for the kernels of each short row to be started.
    """
    drawn: list[Episode] = []
    for name in maker.task_names:
        lengths = lengths_of(maker.tasks[name], split=maker.split)
        if not num_tokens or not (lengths.alone <= settings.token_budget).any():
            continue
        spent = 0
        plan = iter_episodes([lengths], settings=settings.without_renaming(), seed=seed, purpose="validation losses")
        for episode in plan:
            if episode.epoch > 0 or spent >= num_tokens:
                break
            drawn.append(episode)
            spent += episode.num_tokens
    bins = pack_lengths([episode.num_tokens for episode in drawn], pack_tokens=pack_tokens)
    return [Pack(index, episodes=tuple(drawn[place] for place in places)) for index, places in enumerate(bins)]


def share_rows(planned: Sequence[Pack], *, rank: int, num_ranks: int) -> list[tuple[Pack, bool]]:
    """Return the rows of one rank, and whether each counts: the last is repeated so that all ranks have as many.

    If weights are sharded, every forward pass needs all ranks, and a rank without a row would leave the others waiting.
    """
    num_rows = -(-len(planned) // num_ranks)
    places = range(rank, num_rows * num_ranks, num_ranks)
    return [(planned[min(place, len(planned) - 1)], place < len(planned)) for place in places]


def row_multiple(row_tokens: int, *, device: torch.device, compiled: bool) -> int:
    """Return what rows are padded to a multiple of: compiled layers are made for one length, cuDNN's plans for few."""
    if compiled:
        return row_tokens
    return max(1, row_tokens // ROW_LENGTHS) if device.type == "cuda" else 1


def largest_row(packs: PackDataset, *, config: RunConfig) -> Row:
    """Return a row with the most tokens and the most targets that can go through a GPU at once, padding included.

    Any packs of a step may be joined in a row: `balance_steps` decides which, by the number of ranks.
    """
    most_tokens = most_targets = 0
    tasks, size = packs.maker.tasks, config.train.packs_at_once
    for first in range(0, len(packs), packs.packs_per_step):
        step = packs.packs[first : first + packs.packs_per_step]
        targets = [
            sum(count_targets(tasks[e.task], e, targets=config.episodes.targets) for e in pack.episodes)
            for pack in step
        ]
        most_tokens = max(most_tokens, sum(sorted(pack.num_tokens for pack in step)[-size:]))
        most_targets = max(most_targets, sum(sorted(targets)[-size:]))
    multiple = row_multiple(config.row_tokens, device=torch.device("cuda"), compiled=config.train.compile)
    return Row(
        num_tokens=most_tokens + -most_tokens % multiple,
        num_targets=most_targets,
        precision=config.model.precision,
        compiled=config.train.compile,
        quantize=config.model.quantize,
        optim=config.train.optim,
    )


def count_targets(task: TokenizedTask, episode: Episode, *, targets: Literal["all", "last"]) -> int:
    """Return the tokens of an episode that the loss is taken on."""
    chosen = episode.examples[targets_of(len(episode.examples), targets)]
    return int(answer_lengths_of(task, split="train", indices=chosen, names=episode.names).sum())


def count_step_flops(packs: PackDataset, shape: ModelShape) -> list[int]:
    """Return the model FLOPs of each optimizer step. FLOPs add up, so all packs of a step may be counted as one row."""
    size = packs.packs_per_step
    return [
        count_flops(
            shape,
            [e.num_tokens for pack in packs.packs[step * size : (step + 1) * size] for e in pack.episodes],
            num_targets=divisors.num_targets,
        )
        for step, divisors in enumerate(packs.divisors)
    ]


def find_shape(config: RunConfig) -> ModelShape | None:
    """Return what the model's FLOPs are counted from; None where a layer's are not known."""
    try:
        trust = config.model.trust_remote_code
        return shape_model(load_config(config.model), lora=config.model.lora, trust_remote_code=trust)
    except UserError:
        return None
