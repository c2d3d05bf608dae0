"""What a comparison will take, before any GPU minute: the training of every arm, its trials and all evaluations.

Training is counted from the packs that the arms will have with the first seed, and evaluation from its shots and
queries. So these are the tokens that will be spent; only the length of generated answers is not known in advance. Other
seeds are assumed to cost the same: they have other episodes and queries, but of the same tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from math import ceil
from operator import add
from typing import Any

import numpy as np

from manyicl.comparison.arms import Spent
from manyicl.comparison.grid import Grid, Sweeps, WorkItem, WorkKind, check_can_ask, note_unasked
from manyicl.comparison.settings import Arm, ArmName
from manyicl.episodes import BatchMaker, default_cache_dir, tokenize_task
from manyicl.errors import UserError
from manyicl.evaluation import Sweep, TaskSweep
from manyicl.inference import ROW_TOKENS
from manyicl.models import count_flops, find_slow_precision, load_config, resolve_precision
from manyicl.planning import (
    ASSUMED_UTILIZATION,
    Device,
    count_layer_passes,
    find_blockers,
    forecast_tasks,
    join_packs,
    list_refused,
    predict_recipe,
    predict_seconds,
)
from manyicl.tasks import Task
from manyicl.training import (
    MemoryPrediction,
    PacksChoice,
    Prepared,
    Row,
    RunConfig,
    largest_row,
    measure_footprint,
    plan_packs,
    plan_validation,
    tell_recomputed_graph,
    with_batch,
    with_precision,
)

# Kind of work -> its name in the table; that of a trial has "trials: " before it.
WORK: Mapping[WorkKind, str] = {
    "train": "training",
    "validation": "validation",
    "test": "test",
    "text": "text",
    "flip": "exchanged labels",
    "order": "orders of shots",
}
WHILE_TRAINING = "losses while training"
TRIALS = "trials: "
# The largest row of a run is looked for in this many of its first steps.
MEMORY_STEPS = 20


@dataclass(frozen=True, slots=True)
class Work:
    """An amount of work."""

    items: int = 0
    """Items of the grid: models that are trained, and evaluations."""
    tokens: int = 0
    """Tokens that go through the model."""
    plain_tokens: int = 0
    """The same if every query is a whole prompt, for a model that cannot share its encoded shots."""
    flops: int = 0
    """Model FLOPs."""
    seconds: float = 0.0
    """Predicted for one device; 0 if none is named."""

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(*map(add, astuple(self), astuple(other)))

    def times(self, number: int) -> Work:
        """Return `number` times the work."""
        return Work(*(number * part for part in astuple(self)))


@dataclass(frozen=True, slots=True)
class ArmForecast:
    """What one arm takes."""

    arm: ArmName
    title: str
    tokens: int
    """Tokens trained on with the first seed, all its models together, without trials."""
    work: dict[str, Work]
    """Kind of work -> how much of it, over all seeds."""
    memory: MemoryPrediction | None
    """The largest predicted peak of a training step; None for the base, and if it cannot be predicted."""
    joined: tuple[PacksChoice, ...] = ()
    """How many packs go through a device at once, of each model of the first seed; () if the recipe says how many."""

    @property
    def total(self) -> Work:
        """All its work."""
        return sum(self.work.values(), Work())

    @property
    def num_runs(self) -> tuple[int, int]:
        """How many models are trained for the seeds, and for trials."""
        return self.work.get("training", Work()).items, self.work.get(f"{TRIALS}training", Work()).items


@dataclass(frozen=True, slots=True)
class ComparisonForecast:
    """Everything that is known of a comparison before it begins."""

    seeds: tuple[int, ...]
    """The training seeds."""
    arms: tuple[ArmForecast, ...]
    """Each arm's work; () if a blocker keeps it from being counted."""
    device: Device | None
    """The accelerator that hours are predicted for; None if none was named."""
    num_devices: int
    """How many of them share the seeds."""
    blockers: tuple[str, ...] = ()
    """What would make the comparison fail or pointless, each a sentence that names its fix."""
    notes: tuple[str, ...] = ()
    """What could not be predicted, and why."""

    @property
    def work(self) -> dict[str, Work]:
        """Kind of work -> how much of it all arms have together."""
        total: dict[str, Work] = {}
        for arm in self.arms:
            for name, work in arm.work.items():
                total[name] = total.get(name, Work()) + work
        return total

    def hours(self, work: Work) -> float | None:
        """Return the predicted hours of some work on one device; None if no device is named."""
        if self.device is None:
            return None
        return work.seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""

        def describe(work: Work) -> dict[str, Any]:
            return {**asdict(work), "hours": self.hours(work)}

        arms = [
            {
                "arm": arm.arm,
                "title": arm.title,
                "tokens": arm.tokens,
                "work": {name: describe(work) for name, work in arm.work.items()},
                "total": describe(arm.total),
                "memory": None if arm.memory is None else asdict(arm.memory) | {"total_bytes": arm.memory.total_bytes},
                "joined": [asdict(choice) for choice in arm.joined],
            }
            for arm in self.arms
        ]
        return {
            "seeds": list(self.seeds),
            "arms": arms,
            "work": {name: describe(work) for name, work in self.work.items()},
            "total": describe(sum(self.work.values(), Work())),
            "device": None if self.device is None else asdict(self.device),
            "num_devices": self.num_devices,
            "assumed_utilization": ASSUMED_UTILIZATION,
            "blockers": list(self.blockers),
            "notes": list(self.notes),
        }


def forecast_comparison(grid: Grid, *, device: Device | None = None, num_devices: int = 1) -> ComparisonForecast:
    """Return what a comparison would take; only the tokenizer, the tasks and the texts are loaded.

    grid: its folder need not exist; finished work counts as if it were still to be done.

    Raises:
        UserError: the model's config or tokenizer cannot be read.
    """
    config = grid.config
    if config.model.precision == "auto":  # every accelerator of the table multiplies bfloat16 in hardware
        config = with_precision(config, resolve_precision("auto" if device is None else "bf16"))
    planned = Grid(grid.folder, config)
    seeds = config.compare.seeds
    try:
        forecaster = _Forecaster(planned, check_can_ask(planned), device=device)
        arms = tuple(forecaster.forecast_arm(arm) for arm in planned.arms)
    except UserError as error:
        return ComparisonForecast(seeds, (), device, num_devices, blockers=(str(error),))
    return ComparisonForecast(
        seeds,
        arms,
        device,
        num_devices,
        blockers=tuple(dict.fromkeys([*list_refused(config, device=device), *forecaster.blockers])),
        notes=tuple(dict.fromkeys(forecaster.notes)),
    )


class _Forecaster:
    """Counts what the items of a grid take; items that ask the same are counted once and remembered.

    sweeps: what the first seed's models are asked, as far as it is known.
    """

    def __init__(self, grid: Grid, sweeps: Sweeps, *, device: Device | None) -> None:
        self.grid, self.config, self.device = grid, grid.config, device
        self.blockers: list[str] = []
        slow = find_slow_precision(self.config.model.precision) if device is None else None
        notes = grid.matcher.list_notes(seeds=grid.settings.seeds)
        self.notes = [*([slow] if slow else []), *notes, *note_unasked(grid.shots, sweeps)]
        self.tokenizer = grid.writer
        self.model_config = load_config(self.config.model)
        self.num_layers = int(self.model_config.get_text_config().num_hidden_layers)
        self._sweeps = sweeps
        self._asked: dict[tuple[WorkKind, str], Work] = {}
        self._joined: dict[tuple[ArmName, int, str | None], PacksChoice] = {}

    def forecast_arm(self, arm: Arm) -> ArmForecast:
        """Return what one arm takes."""
        seeds = self.grid.settings.seeds
        work: dict[str, Work] = {}
        tokens = 0
        for item in self.grid.work():
            if (item.arm, item.seed) != (arm.name, seeds[0]):
                continue
            name = (TRIALS if item.rate is not None else "") + WORK[item.kind]
            times = len(seeds) if item.rate is None else 1
            for kind, one in self._count_item(item, name, times=times):
                work[kind] = work.get(kind, Work()) + one
            if item.kind == "train" and item.rate is None:
                tokens += self._match(item)[1].tokens
        memory = self._predict_memory(arm) if arm.trained else None
        joined = tuple(choice for (name, _, _), choice in self._joined.items() if name == arm.name)
        return ArmForecast(arm.name, arm.title, tokens, work, memory, joined=joined)

    def _match(self, item: WorkItem) -> tuple[RunConfig, Spent]:
        """Return the recipe of an item's model, with the packs that it joins on the device, and what it spends."""
        config, spent = self.grid.matcher.match(item.arm, seed=item.seed, task=item.task)
        if config.train.packs_per_batch != "auto":
            return config, spent
        key = item.arm, item.seed, item.task
        if key not in self._joined:
            self._joined[key] = join_packs(
                config,
                model_config=self.model_config,
                pack_flops=spent.flops / (config.train.num_steps * config.train.packs_per_step),
                row_of=self._largest_row,
                device=self.device,
            )
        return with_batch(config, self._joined[key].number), spent

    def _largest_row(self, config: RunConfig) -> Row:
        return largest_row(self._prepare(_shorten(config)).packs, config=config)

    def _count_item(self, item: WorkItem, name: str, *, times: int) -> Iterator[tuple[str, Work]]:
        """Yield (kind of work, how much) of an item that is done `times` times, once with each seed."""
        # The first seed's run is that of the trial of its rate: neither trained nor asked validation rows again.
        anew = times - (item.rate is None and bool(self.config.rates_of(item.arm)))
        if item.kind == "train":
            config, spent = self._match(item)
            passes = count_layer_passes(config, num_layers=self.num_layers)
            seconds = self._predict_seconds(spent.flops, layer_passes=passes)
            one = Work(0, spent.tokens, spent.tokens, spent.flops, seconds)
            yield name, replace(one.times(anew), items=times)
            yield WHILE_TRAINING, self._measure_losses(item, config).times(anew)
        elif item.kind == "text":
            yield name, self._texts.times(times)
        else:
            tasks, sweep = self.grid.sweep_of(item)
            one = sum((self._ask_task(item, task, sweep) for task in tasks), Work(1))
            yield name, replace(one.times(anew if item.kind == "validation" else times), items=times)

    def _measure_losses(self, item: WorkItem, config: RunConfig) -> Work:
        """Return the work of measuring a run: validation losses at its checkpoints, and now and then the texts."""
        tasks = {name: self.grid.matcher.tasks[name] for name in config.tasks.names}
        planned = plan_validation(
            BatchMaker(tasks, targets=config.episodes.targets, split="validation"),
            settings=config.episodes,
            num_tokens=config.train.validation_tokens,
            pack_tokens=config.pack_tokens,
            seed=config.seed,
        )
        lengths = [episode.num_tokens for pack in planned for episode in pack.episodes]
        losses = self._read_rows(lengths, num_rows=len(planned))
        num_steps = config.train.num_steps
        losses = losses.times(ceil(num_steps / config.train.checkpoint_every_steps))
        if item.task is not None:
            return losses
        times = ceil(num_steps / self.grid.settings.drift_steps(num_steps))
        return losses + replace(self._texts, items=0).times(times)

    @cached_property
    def _texts(self) -> Work:
        """The work of reading the windows of all texts once."""
        lengths = [len(ids) for text in self.grid.texts for ids in text.ids]
        whole = self._read_rows(lengths, num_rows=_count_rows(sum(lengths)), targets=sum(lengths))
        return replace(whole, items=1)

    def _read_rows(self, lengths: Sequence[int], *, num_rows: int, targets: int = 0) -> Work:
        """Return the work of sequences that go through the model once, in so many rows."""
        flops = self._count_forward(lengths, targets=targets)
        return Work(0, sum(lengths), sum(lengths), flops, self._predict_pass(flops, num_rows))

    def _predict_seconds(self, flops: int, *, layer_passes: int) -> float:
        """Return the seconds of some work on the device, 0 if there is none."""
        return 0.0 if self.device is None else predict_seconds(self.device, flops=flops, layer_passes=layer_passes)

    def _count_forward(self, lengths: Sequence[int], *, targets: int = 0, prefix_tokens: int = 0) -> int:
        shape = self.grid.matcher.shape
        return count_flops(shape, lengths, num_targets=targets, prefix_tokens=prefix_tokens, backward=False)

    def _ask_task(self, item: WorkItem, task: Task, sweep: Sweep) -> Work:
        """Return the work of asking one task; models of all arms are asked the same, and all of the first seed."""
        key = item.kind, task.name
        if key not in self._asked:
            known = self._sweeps.get(key)
            if known is None:
                tokenized = tokenize_task(task, tokenizer=self.tokenizer, cache_dir=default_cache_dir())
                known = TaskSweep(tokenized, tokenizer=self.tokenizer, sweep=sweep)
            self._asked[key] = count_sweep(known, forward=self._count_forward, predict=self._predict_pass)
        return self._asked[key]

    def _predict_pass(self, flops: int, num_passes: int) -> float:
        """Return the seconds of so many passes of rows, or steps of generated tokens, through all layers."""
        return self._predict_seconds(flops, layer_passes=num_passes * self.num_layers)

    def _predict_memory(self, arm: Arm) -> MemoryPrediction | None:
        """Return the largest peak of a training step among an arm's models, and note what prevents its training."""
        first, model = self.grid.settings.seeds[0], self.config.model
        rows = []
        for task in self.grid.models_of(arm):
            config, _ = self._match(WorkItem(arm.name, first, "train", task))
            if arm.name == self._checked_arm():
                prepared = self._prepare(config)
                self.blockers += find_blockers(prepared, forecast_tasks(prepared))
            rows.append((self._largest_row(config), config))
        row, config = max(rows, key=lambda pair: (pair[0].num_tokens, pair[0].num_targets))
        try:
            trust = model.trust_remote_code
            footprint = measure_footprint(self.model_config, row, lora=model.lora, trust_remote_code=trust)
        except UserError as error:
            self.notes.append(str(error))
            return None
        memory = predict_recipe(config, footprint, device=self.device)
        if self.device is not None and not memory.fits(self.device.memory_bytes):
            need, have = memory.total_bytes / 2**30, self.device.memory_bytes / 2**30
            # "auto" has tried all that recomputes layers.
            quantized = "model.quantize = 'nf4' with [model.lora]"
            fix = quantized if config.train.recompute == "auto" else "train.recompute = 'auto'"
            self.blockers.append(
                f"{arm.title}: a step needs {need:.1f} GiB, and the {self.device.name} has {have:.1f}; choose a larger"
                f" device, lower episodes.token_budget, or set {fix}"
            )
        elif self.device is not None and (refused := tell_recomputed_graph(config, memory.recompute)):
            self.blockers.append(f"{arm.title}: {refused}")
        return memory

    def _checked_arm(self) -> ArmName | None:
        """Return the arm whose episodes are checked for what makes training pointless: the one with most shots."""
        shared = self.config.compare.shared_arms
        return "manyicl" if "manyicl" in shared else next(iter(shared), None)

    def _prepare(self, config: RunConfig) -> Prepared:
        """Return a run prepared for training, without its validation, which nothing here reads."""
        tasks = {name: self.grid.matcher.tasks[name] for name in config.tasks.names}
        maker = BatchMaker(tasks, targets=config.episodes.targets, split="validation")
        tokenizer, packs = self.grid.tokenizer, plan_packs(config, tasks)
        return Prepared(config, tokenizer, self.tokenizer.frame, tasks, packs=packs, validation=(maker, []))


def _shorten(config: RunConfig) -> RunConfig:
    """Return the recipe with its first steps only, which suffice to know how large a row is."""
    num_steps = min(config.train.num_steps, MEMORY_STEPS)
    return config.model_copy(update={"train": config.train.model_copy(update={"num_steps": num_steps})})


def count_sweep(
    sweep: TaskSweep, *, forward: Callable[..., int], predict: Callable[[int, int], float] = lambda *_: 0.0
) -> Work:
    """Return the work of asking one task: each draw's shots once, and after them every query with its options.

    A generated answer is assumed to be as long as its reference.

    forward: returns the model FLOPs of rows after a prefix.
    predict: returns the seconds of so many FLOPs in so many passes.
    """
    # Of an open query, an answer of its reference's length is generated too; the last token is not processed again.
    lengths_Q = sweep.tokenized.splits["test"].answer_lengths[sweep.queries]
    is_open_Q = np.array([not sweep.candidates[query] for query in sweep.queries.tolist()], dtype=bool)
    generated_Q = np.where(is_open_Q, lengths_Q, 0)
    sizes = {shown: sweep.query_sizes(after_shots=shown) for shown in (False, True)}
    total = Work()
    for draw in range(sweep.settings.num_draws):
        if not sweep.shots_of(draw):
            continue
        encoded = sweep.prefix_tokens(draw, sweep.num_shared(sweep.most_shots(draw)))
        flops = forward([encoded])
        total += Work(0, encoded, 0, flops, predict(flops, _count_rows(encoded)))
        for shots in sweep.shots_of(draw):
            num_shots, own_Q = sweep.num_shots(draw, shots), sweep.own_tokens(draw, shots)
            before = sweep.prefix_tokens(draw, sweep.num_shared(num_shots))
            prompts_Q, whole_Q, rest_Q = sizes[num_shots > 0]
            asked_Q = rest_Q + generated_Q - is_open_Q
            flops = forward((own_Q + asked_Q).tolist(), targets=int(asked_Q.sum()), prefix_tokens=before)
            plain = int((prompts_Q * (before + own_Q) + whole_Q + generated_Q).sum())
            num_rows = _count_rows(int((own_Q + asked_Q).sum()))
            steps = int(generated_Q.max(initial=0))  # the queries of a row generate together
            seconds = predict(flops, num_rows * (1 + steps))
            total += Work(0, int((own_Q + asked_Q).sum()), plain, flops, seconds)
    return total


def _count_rows(num_tokens: int) -> int:
    return ceil(num_tokens / ROW_TOKENS["cuda"])
