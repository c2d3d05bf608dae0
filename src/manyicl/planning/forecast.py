"""What a recipe will do, before any GPU minute: what is trained, is it sound, what does it take, what is in its way?

Blockers are what would make the run useless or impossible; each is a sentence that names its fix.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
import torch

from manyicl.episodes import (
    Episode,
    Pack,
    TaskTokenizer,
    TokenizedTask,
    join_examples,
    query_ids,
    targets_of,
)
from manyicl.errors import UserError, list_some
from manyicl.models import (
    WeightCounts,
    find_slow_precision,
    load_config,
    max_tokens_of,
    resolve_precision,
    shape_model,
)
from manyicl.planning.devices import ASSUMED_UTILIZATION, Device, predict_seconds
from manyicl.planning.fit import Change, join_packs, predict_recipe, suggest_changes
from manyicl.planning.notes import note_settings
from manyicl.training import (
    USABLE_FRACTION,
    MemoryPrediction,
    Optim,
    PacksChoice,
    Prepared,
    RunConfig,
    bucket_name,
    count_dropped,
    count_plan,
    count_step_flops,
    count_targets,
    find_refused,
    find_unshared,
    largest_row,
    measure_footprint,
    prepare_run,
    tell_recomputed_graph,
    used_rows,
    with_batch,
    with_precision,
)

# Answers are counted by how many shots stand before them: the first index of each bucket.
SHOT_EDGES = (0, 1, 4, 16, 64, 256)
# Episodes a task whose queries are tokenised anew, as inference would.
CHECKED_EPISODES = 4
# Beyond so many, an answer is more likely remembered than read off its shots.
MANY_EPOCHS = 50


@dataclass(frozen=True, slots=True)
class TaskForecast:
    """One task in the run; counts of episodes, tokens and answers are over the whole plan."""

    name: str
    family: str
    num_episodes: int
    num_tokens: int
    num_answers: int
    """Answers that are targets."""
    num_targets: int
    """Tokens of those answers."""
    epochs: float
    """Tokens of its examples in the plan, divided by those in the train rows that are used."""
    most_shots: int
    """Most shots that an answer is trained after."""
    answers_by_shots: dict[str, int]
    """Bucket of SHOT_EDGES -> answers that are targets."""
    dropped: dict[str, int]
    """Reason -> rows of all splits that are not used."""
    num_train: int
    """Train rows."""
    num_fitting: int
    """Train rows that are not too long, up to `tasks.max_rows`."""
    num_seen: int
    """Train rows that some episode holds."""
    num_unterminated: int
    """Train answers that do not end in the terminator."""
    num_checked: int
    """Queries that were tokenised anew, as inference does."""
    num_torn: int
    """Checked queries whose ids are not an exact prefix of the trained ones."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything that is known of a run before it."""

    tasks: tuple[TaskForecast, ...]
    plan: dict[str, Any]
    """Totals, as `count_plan` returns them."""
    num_steps: int
    longest_tokens: int
    """Tokens of the longest episode."""
    known_positions: int | None
    """The longest sequence that the model can use; None if its config does not say."""
    weights: WeightCounts | None
    flops: int | None
    """Model FLOPs of all steps, validation left out; None if a layer's cost is not known."""
    memory: MemoryPrediction | None
    """The peak of a step; None if it cannot be predicted, and `notes` say why."""
    device: Device | None
    num_devices: int
    change: Change | None
    """The gentlest change that makes a step fit; None if it fits, or nothing does."""
    blockers: tuple[str, ...]
    """What would make the run useless or impossible, each with its fix."""
    notes: tuple[str, ...]
    """What is seldom meant to be so."""
    optim: Optim = "adamw_torch_fused"
    """The optimizer."""
    joined: PacksChoice | None = None
    """How many packs go through a device at once, if the recipe leaves it to the device; else None."""
    layer_passes: int = 0
    """Passes of rows through layers in all steps; a backward pass counts twice."""

    @property
    def hours(self) -> float | None:
        """Predicted hours of training on the device; without loading, validation and evaluation."""
        if self.flops is None or self.device is None:
            return None
        seconds = predict_seconds(self.device, flops=self.flops, layer_passes=self.layer_passes)
        return seconds / self.num_devices / 3600

    @property
    def waits(self) -> bool:
        """Whether the device is predicted to wait for its host, which starts its kernels."""
        if self.flops is None or self.device is None:
            return False
        without = predict_seconds(self.device, flops=self.flops)
        return predict_seconds(self.device, flops=self.flops, layer_passes=self.layer_passes) > without

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        content = asdict(self)
        if self.memory is not None:
            content["memory"]["total_bytes"] = self.memory.total_bytes
        return {**content, "hours": self.hours, "assumed_utilization": ASSUMED_UTILIZATION}


def forecast_run(config: RunConfig, *, device: Device | None = None, num_devices: int = 1) -> Forecast:
    """Return what training as `config` says would do; nothing is loaded but the tokenizer and the tasks.

    Raises:
        UserError: the model's config or tokenizer cannot be read.
    """
    # Every accelerator of the table multiplies bfloat16 in hardware; without one, it is for this machine.
    if config.model.precision == "auto":
        config = with_precision(config, resolve_precision("auto" if device is None else "bf16"))
    model_config = load_config(config.model)
    try:
        prepared = prepare_run(config)
    except UserError as error:
        return _impossible(str(error), device=device, num_devices=num_devices)
    tasks = forecast_tasks(prepared)
    slow = find_slow_precision(config.model.precision) if device is None else None
    notes = [slow] if slow else []
    blockers = [*find_blockers(prepared, tasks), *list_refused(config, device=device, num_devices=num_devices)]
    shape = memory = change = None
    trust, flops = config.model.trust_remote_code, None
    try:
        shape = shape_model(model_config, lora=config.model.lora, trust_remote_code=trust)
        flops = sum(count_step_flops(prepared.packs, shape))
    except UserError as error:
        notes.append(str(error))
    joined = None
    if config.train.packs_per_batch == "auto":
        joined = join_packs(
            config,
            model_config=model_config,
            pack_flops=None if flops is None else flops / len(prepared.packs),
            row_of=lambda resolved: largest_row(prepared.packs, config=resolved),
            device=device,
            num_devices=num_devices,
        )
        config = with_batch(config, joined.number)
    row = largest_row(prepared.packs, config=config)
    try:
        if shape is not None:
            footprint = measure_footprint(model_config, row, lora=config.model.lora, trust_remote_code=trust)
            memory = predict_recipe(config, footprint, device=device)
    except UserError as error:
        notes.append(str(error))
    if shape and memory and device and not memory.fits(device.memory_bytes):
        change = suggest_changes(config, model_config, row=row, device=device, weights=shape.weights)
        blockers.append(_tell_misfit(memory, device, change))
    elif memory and device and (refused := tell_recomputed_graph(config, memory.recompute)):
        blockers.append(refused)
    notes += [*_note_tasks(config, tasks), *note_settings(config, model_config, [task.num_episodes for task in tasks])]
    return Forecast(
        tasks=tasks,
        plan=count_plan(prepared.packs, pack_tokens=config.pack_tokens),
        num_steps=config.train.num_steps,
        longest_tokens=max(episode.num_tokens for episode in _episodes(prepared.packs.packs)),
        known_positions=_known_positions(model_config),
        weights=shape.weights if shape else None,
        flops=flops,
        memory=memory,
        device=device,
        num_devices=num_devices,
        change=change,
        blockers=tuple(blockers),
        notes=tuple(notes),
        optim=config.train.optim,
        joined=joined,
        layer_passes=count_layer_passes(config, num_layers=model_config.get_text_config().num_hidden_layers),
    )


def list_refused(config: RunConfig, *, device: Device | None, num_devices: int = 1) -> Iterable[str]:
    """Yield which settings training refuses on the devices; without a device, on this machine."""
    if config.model.quantize == "float8" and device is not None and not device.has_float8:
        yield f"model.quantize = 'float8': the {device.name} has no products in 8 bits; leave it out"
    if unshared := find_unshared(config.train, num_ranks=num_devices):
        yield unshared
    has_gpu = device is not None or torch.cuda.is_available()
    for fault in find_refused(config, has_gpu=has_gpu, num_ranks=num_devices):
        yield fault if has_gpu else f"{fault}, or name the device that will train"


def count_layer_passes(config: RunConfig, *, num_layers: int) -> int:
    """Return how often a row goes through a layer in a run: forward once, backward as long as twice, and recomputed."""
    train = config.train
    num_rows = train.num_steps * ceil(train.packs_per_step / train.packs_at_once)
    recomputed = 0 if train.recompute in ("auto", "none") else num_layers
    if isinstance(train.recompute, int):
        recomputed = min(train.recompute, num_layers)
    return num_rows * (3 * num_layers + recomputed)


def forecast_tasks(prepared: Prepared) -> tuple[TaskForecast, ...]:
    """Return what the plan holds of each task, and whether its answers and queries are written as they must be."""
    tokenizer = TaskTokenizer(prepared.tokenizer, prepared.config.template, frame=prepared.frame)
    by_task: dict[str, list[Episode]] = {name: [] for name in prepared.tasks}
    for episode in _episodes(prepared.packs.packs):
        by_task[episode.task].append(episode)
    return tuple(
        _forecast_task(task, by_task[name], config=prepared.config, tokenizer=tokenizer)
        for name, task in prepared.tasks.items()
    )


def _forecast_task(
    task: TokenizedTask, episodes: Sequence[Episode], *, config: RunConfig, tokenizer: TaskTokenizer
) -> TaskForecast:
    train = task.splits["train"]
    used = used_rows(task, config)
    buckets = Counter[int]()
    num_targets = seen_tokens = 0
    seen = np.zeros(len(train), dtype=bool)
    for episode in episodes:
        chosen = targets_of(len(episode.examples), config.episodes.targets)
        buckets.update(bisect_right(SHOT_EDGES, k) - 1 for k in range(len(episode.examples))[chosen])
        num_targets += count_targets(task, episode, targets=config.episodes.targets)
        seen_tokens += int(train.lengths[episode.examples].sum())
        seen[episode.examples] = True
    checked = [
        is_exact
        for episode in islice(episodes, CHECKED_EPISODES)
        for is_exact in are_exact_prefixes(
            task,
            episode,
            queries=sorted({0, len(episode.examples) // 2, len(episode.examples) - 1}),
            tokenizer=tokenizer,
        )
    ]
    return TaskForecast(
        name=task.task.name,
        family=task.task.family,
        num_episodes=len(episodes),
        num_tokens=sum(episode.num_tokens for episode in episodes),
        num_answers=buckets.total(),
        num_targets=num_targets,
        epochs=seen_tokens / max(1, int(train.lengths[used].sum())),
        most_shots=max((len(episode.examples) - 1 for episode in episodes), default=0),
        answers_by_shots={
            bucket_name(index, buckets=SHOT_EDGES): buckets[index] for index in range(len(SHOT_EDGES)) if buckets[index]
        },
        dropped=count_dropped(task, config),
        num_train=len(train),
        num_fitting=len(used),
        num_seen=int(seen.sum()),
        num_unterminated=count_unterminated(task, tokenizer=tokenizer),
        num_checked=len(checked),
        num_torn=checked.count(False),
    )


def count_unterminated(task: TokenizedTask, *, tokenizer: TaskTokenizer) -> int:
    """Return how many train answers do not end in the terminator's ids, which are trained as the answer's last."""
    train, ids = task.splits["train"], np.asarray(tokenizer.terminator_ids, dtype=np.int32)
    long_enough = train.answer_lengths > len(ids)
    ends = train.starts[1:][long_enough]
    tails = train.ids[ends[:, None] - np.arange(len(ids), 0, -1)] if len(ends) else np.zeros((0, len(ids)))
    return len(train) - int((tails == ids).all(axis=1).sum())


def are_exact_prefixes(
    task: TokenizedTask, episode: Episode, *, queries: Sequence[int], tokenizer: TaskTokenizer
) -> list[bool]:
    """Return for each query whether what inference feeds to ask it is a prefix of what training sees.

    Inference is gone through from the text: shots and queries are tokenised anew, once, not read from the cache. An
    episode whose labels bear other names is in no file, so it is read from the cache alone.

    queries: places in the episode.
    """
    join = partial(join_examples, task, split="train", names=episode.names, template=episode.template)
    trained, written = join(indices=episode.examples), None
    if episode.names is None:
        rows = task.splits["train"].rows[episode.examples[: max(queries) + 1]]
        written, _ = tokenizer.tokenize_examples(
            [task.task.train[row].in_template(episode.template + 1) for row in rows]
        )
    found = []
    for query in queries:
        index, shots = int(episode.examples[query]), join(indices=episode.examples[:query]).ids
        asked = query_ids(task, split="train", index=index, after_shots=query > 0, template=episode.template)
        seen = trained.ids[: int(trained.spans[query, 0])]
        is_exact = np.array_equal(np.concatenate([shots, asked]), seen)
        if written is not None:
            anew = written.ids[task.num_between : written.answer_starts[query]]
            is_exact = is_exact and np.array_equal(np.concatenate([tokenizer.head_ids(task.task), anew]), seen)
        found.append(is_exact)
    return found


def _episodes(packs: Iterable[Pack]) -> Iterable[Episode]:
    return (episode for pack in packs for episode in pack.episodes)


def _known_positions(model_config: Any) -> int | None:
    try:
        return max_tokens_of(model_config)
    except UserError:
        return None


def _impossible(why: str, *, device: Device | None, num_devices: int) -> Forecast:
    return Forecast((), {}, 0, 0, None, None, None, None, device, num_devices, None, (why,), ())


def find_blockers(prepared: Prepared, tasks: Sequence[TaskForecast]) -> Iterable[str]:
    """Yield what would make the run useless."""
    config = prepared.config
    same = [task.name for task in tasks if len({row.answer for row in prepared.tasks[task.name].task.train}) == 1]
    if same:
        yield (
            f"{_name_tasks(same, among=tasks)}: every train row has the same answer, so there is nothing to learn;"
            " leave out of tasks.names"
        )
    endless = [f"{task.name} {task.num_unterminated:,}" for task in tasks if task.num_unterminated]
    if endless:
        yield (
            f"train answers of {_tell_share(endless, among=tasks)} do not end in the terminator, so answers would not"
            " stop; remove the cache of tokenised tasks (MANYICL_CACHE)"
        )
    torn = [f"{task.name} {task.num_torn} of {task.num_checked}" for task in tasks if task.num_torn]
    if torn:
        yield (
            f"checked queries of {_tell_share(torn, among=tasks)} are not fed as they were trained; remove the cache of"
            " tokenised tasks (MANYICL_CACHE), or choose another tokenizer"
        )
    unreached = [task.name for task in tasks if not task.num_episodes]
    if unreached:
        yield (
            f"{_name_tasks(unreached, among=tasks)}: in no episode of the run, with train.num_steps ="
            f" {config.train.num_steps:,}; raise that or train.packs_per_step, or leave out of tasks.names"
        )
    if config.episodes.shots != 0 and all(task.most_shots == 0 for task in tasks):
        yield (
            f"episodes.token_budget = {config.episodes.token_budget}: no episode holds two examples, so no answer would"
            " be trained after a shot; raise it, or set episodes.shots = 0 if that is what you want"
        )


def _note_tasks(config: RunConfig, tasks: Sequence[TaskForecast]) -> Iterable[str]:
    """Yield what training on a task may well be, but is seldom meant to be."""
    unseen = [task for task in tasks if 0 < task.num_seen < task.num_fitting]
    if unseen:
        unseen.sort(key=lambda task: task.num_seen / task.num_fitting)
        told = [f"{task.name} {task.num_fitting - task.num_seen:,} of {task.num_fitting:,}" for task in unseen]
        yield (f"train rows of {_tell_share(told, among=tasks)} are in no episode of the run; more steps would see all")
    often = [task for task in tasks if task.epochs > MANY_EPOCHS]
    if often:
        often.sort(key=lambda task: -task.epochs)
        told = [f"{task.name} {task.num_train:,} rows, {task.epochs:,.0f} times" for task in often]
        yield (
            f"train rows of {_tell_share(told, among=tasks)} are seen over {MANY_EPOCHS} times each; fewer steps or"
            " more rows would be gentler"
        )
    alone = [task.name for task in tasks if task.num_episodes and not task.most_shots]
    if alone and config.episodes.shots != 0:
        yield f"{_name_tasks(alone, among=tasks)}: no episode holds two examples; raise episodes.token_budget"


def _name_tasks(names: Sequence[str], *, among: Sequence[TaskForecast]) -> str:
    """Return the one task, or how many tasks they are and the first of them."""
    return f"task '{names[0]}'" if len(names) == 1 else _tell_share(names, among=among, mark=", ")


def _tell_share(told: Sequence[str], *, among: Sequence[TaskForecast], mark: str = "; ") -> str:
    """Return how many of the tasks `told` describes, and the first of them."""
    return f"{len(told):,} of {len(among):,} tasks ({list_some(told, mark=mark)})"


def _tell_misfit(memory: MemoryPrediction, device: Device, change: Change | None) -> str:
    need, have = memory.total_bytes / 2**30, device.memory_bytes / 2**30
    usable = f"the {device.name} has {have:.1f}, of which {USABLE_FRACTION * have:.1f} are counted on"
    fix = f"{' '.join(change.overrides)} needs {change.total_bytes / 2**30:.1f}" if change else "choose a larger device"
    return f"a step needs {need:.1f} GiB, and {usable}; {fix}"
