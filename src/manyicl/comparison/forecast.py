"""What a comparison will take, before any GPU minute: every arm's training, its trials and all that is asked.

Training is counted from the packs that the arms will have with the first seed, and asking from its shots and queries.
So the tokens are those that are spent afterwards; only the length of answers that a model writes freely is not known
before. Other seeds are taken to be alike: they have other episodes and queries, of the same tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.comparison.arms import Arm, ArmName
from manyicl.comparison.grid import Grid, What, WorkItem
from manyicl.episodes import BatchMaker, TaskTokenizer, default_cache_dir, query_ids, tokenize_task
from manyicl.errors import UserError
from manyicl.evaluation import Sweep, TaskSweep
from manyicl.inference import build_trie, prefix_lengths
from manyicl.models import check_window, count_flops, load_config, resolve_precision
from manyicl.planning import (
    ASSUMED_UTILIZATION,
    Device,
    MemoryPrediction,
    find_blockers,
    fits,
    forecast_tasks,
    largest_row,
    measure_footprint,
    predict_recipe,
)
from manyicl.tasks import Task
from manyicl.training import Prepared, RunConfig, plan_packs, plan_validation, with_precision

# What is done, as the table calls it; cells of trials have "trials: " before it.
WORK: Mapping[What, str] = {
    "train": "training",
    "validation": "validation",
    "test": "test",
    "text": "text",
    "flip": "exchanged labels",
    "order": "orders of shots",
}
WHILE_TRAINING = "losses while training"
TRIALS = "trials: "
# Steps of each run whose rows are looked at for the largest.
MEMORY_STEPS = 20


@dataclass(frozen=True, slots=True)
class Work:
    """Some work of a comparison: cells of its grid, tokens that go through the model, model FLOPs.

    plain_tokens: the tokens if every query is asked by its whole prompt, as of a model whose cache cannot be shared.
    """

    cells: int = 0
    tokens: int = 0
    plain_tokens: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(
            self.cells + other.cells,
            self.tokens + other.tokens,
            self.plain_tokens + other.plain_tokens,
            self.flops + other.flops,
        )

    def times(self, number: int) -> Work:
        """Return the same work so many times."""
        return Work(*(number * part for part in (self.cells, self.tokens, self.plain_tokens, self.flops)))


@dataclass(frozen=True, slots=True)
class ArmForecast:
    """What one arm takes. tokens: trained on with the first seed, all its models together, trials not counted.

    work: kind of work -> how much of it, over all seeds. memory: the largest predicted peak of a training step; None of
    the base, and if it cannot be predicted.
    """

    arm: ArmName
    title: str
    tokens: int
    work: dict[str, Work]
    memory: MemoryPrediction | None

    @property
    def total(self) -> Work:
        """All its work."""
        return sum(self.work.values(), Work())

    @property
    def num_runs(self) -> tuple[int, int]:
        """Models that are trained for the seeds, and for trials."""
        return tuple(self.work.get(name, Work()).cells for name in ("training", f"{TRIALS}training"))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ComparisonForecast:
    """Everything that is known of a comparison before it. blockers: each a sentence that names its fix."""

    seeds: tuple[int, ...]
    arms: tuple[ArmForecast, ...]
    device: Device | None
    num_devices: int
    blockers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        return work.flops / (self.device.peak_flops_per_s * ASSUMED_UTILIZATION) / 3600

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""

        def told(work: Work) -> dict[str, Any]:
            return {**asdict(work), "hours": self.hours(work)}

        arms = [
            {
                "arm": arm.arm,
                "title": arm.title,
                "tokens": arm.tokens,
                "work": {name: told(work) for name, work in arm.work.items()},
                "total": told(arm.total),
                "memory": None if arm.memory is None else asdict(arm.memory) | {"total_bytes": arm.memory.total_bytes},
            }
            for arm in self.arms
        ]
        return {
            "seeds": list(self.seeds),
            "arms": arms,
            "work": {name: told(work) for name, work in self.work.items()},
            "total": told(sum(self.work.values(), Work())),
            "device": None if self.device is None else asdict(self.device),
            "num_devices": self.num_devices,
            "assumed_utilization": ASSUMED_UTILIZATION,
            "blockers": list(self.blockers),
            "notes": list(self.notes),
        }


def forecast_comparison(comparison: Grid, *, device: Device | None = None, num_devices: int = 1) -> ComparisonForecast:
    """Return what a comparison would take; nothing is loaded but the tokenizer, the tasks and the texts.

    comparison: one whose folder need not exist; finished cells count as if they were to be done.

    Raises:
        UserError: the model's config or tokenizer cannot be read.
    """
    config = comparison.config
    if config.model.precision == "auto":  # every accelerator of the table multiplies bfloat16 in hardware
        config = with_precision(config, resolve_precision("auto" if device is None else "bf16"))
    planned = Grid(comparison.folder, config)
    seeds = config.compare.seeds
    try:
        check_window(load_config(config.model), num_tokens=planned.max_tokens, what="the longest sequence")
        forecaster = _Forecaster(planned, device=device)
        arms = tuple(forecaster.forecast_arm(arm) for arm in planned.arms)
    except UserError as error:
        return ComparisonForecast(seeds, (), device, num_devices, blockers=(str(error),))
    return ComparisonForecast(
        seeds,
        arms,
        device,
        num_devices,
        blockers=tuple(dict.fromkeys(forecaster.blockers)),
        notes=tuple(dict.fromkeys(forecaster.notes)),
    )


class _Forecaster:
    """Counts what the cells of a comparison take; cells that ask the same are counted once."""

    def __init__(self, comparison: Grid, *, device: Device | None) -> None:
        self.comparison, self.config, self.device = comparison, comparison.config, device
        self.blockers: list[str] = []
        self.notes: list[str] = []
        self.tokenizer = TaskTokenizer(comparison.tokenizer, self.config.template, frame=comparison.frame)
        self.model_config = load_config(self.config.model)
        self._asked: dict[tuple[int, What, str], Work] = {}

    def forecast_arm(self, arm: Arm) -> ArmForecast:
        """Return what one arm takes."""
        seeds = self.comparison.settings.seeds
        work: dict[str, Work] = {}
        tokens = 0
        for cell in self.comparison.cells():
            if (cell.arm, cell.seed) != (arm.name, seeds[0]):
                continue
            name = (TRIALS if cell.rate is not None else "") + WORK[cell.what]
            times = len(seeds) if cell.rate is None else 1
            for kind, one in self._count_cell(cell, name, times=times):
                work[kind] = work.get(kind, Work()) + one
            if cell.what == "train" and cell.rate is None:
                tokens += self.comparison.plan_unrated(cell)[1].tokens
        return ArmForecast(arm.name, arm.title, tokens, work, self._predict_memory(arm) if arm.trained else None)

    def _count_cell(self, cell: WorkItem, name: str, *, times: int) -> Iterator[tuple[str, Work]]:
        """Yield (kind of work, how much) of a cell that is done `times` times, once with each seed."""
        if cell.what == "train":
            config, spent = self.comparison.plan_unrated(cell)
            # The first seed's run is that of the trial of its rate, so it is not trained again.
            trained = times - (cell.rate is None and bool(self.comparison.rates_of(cell.arm)))
            one = Work(0, spent.tokens, spent.tokens, spent.flops)
            yield name, replace(one.times(trained), cells=times)
            yield WHILE_TRAINING, self._measure_losses(cell, config).times(trained)
        elif cell.what == "text":
            yield name, self._read_texts().times(times)
        else:
            tasks, options = self.comparison.sweep_of(cell)
            yield name, sum((self._ask_task(cell, task, options) for task in tasks), Work(1)).times(times)

    def _measure_losses(self, cell: WorkItem, config: RunConfig) -> Work:
        """Return what a run measures at its checkpoints: validation losses, and bits per byte of the texts."""
        tasks = {name: self.comparison.planner.tasks[name] for name in config.tasks.names}
        planned = plan_validation(
            BatchMaker(tasks, targets=config.episodes.targets, split="validation"),
            settings=config.episodes,
            num_tokens=config.train.validation_tokens,
            seed=config.seed,
        )
        lengths = [one.pack.num_tokens for one in planned]
        losses = Work(0, sum(lengths), sum(lengths), self._count_forward(lengths))
        if cell.task is None:
            losses += replace(self._read_texts(), cells=0)
        return losses.times(ceil(config.train.num_steps / config.train.checkpoint_every_steps))

    def _read_texts(self) -> Work:
        """Return what it takes to read the windows of all texts once."""
        lengths = [len(ids) for text in self.comparison.texts for ids in text.ids]
        return Work(1, sum(lengths), sum(lengths), self._count_forward(lengths, targets=sum(lengths)))

    def _count_forward(self, lengths: Sequence[int], *, targets: int = 0, prefix_tokens: int = 0) -> int:
        shape = self.comparison.planner.shape
        return count_flops(shape, lengths, num_targets=targets, prefix_tokens=prefix_tokens, backward=False)

    def _ask_task(self, cell: WorkItem, task: Task, options: Mapping[str, Any]) -> Work:
        """Return what asking one task takes in a cell; models of all arms are asked the same."""
        key = cell.seed, cell.what, task.name
        if key not in self._asked:
            self._asked[key] = self._count_sweep(cell, task, dict(options))
        return self._asked[key]

    def _count_sweep(self, cell: WorkItem, task: Task, options: dict[str, Any]) -> Work:
        tokenized = tokenize_task(task, tokenizer=self.tokenizer, cache_dir=default_cache_dir())
        sweep = Sweep(
            tuple(options["shots"]),
            num_draws=options["draws"],
            num_queries=options["queries"],
            seed=cell.seed,
            max_tokens=self.comparison.max_tokens,
            fixed_shots=options.get("fixed_shots"),
            most_only=options.get("most_only", False),
            max_new_tokens=options["max_new_tokens"],
            purpose=options.get("purpose", "evaluation"),
        )
        return count_sweep(TaskSweep(tokenized, tokenizer=self.tokenizer, sweep=sweep), forward=self._count_forward)

    def _predict_memory(self, arm: Arm) -> MemoryPrediction | None:
        """Return the largest peak of a training step among an arm's models, and note what stands in its way."""
        first, model = self.comparison.settings.seeds[0], self.config.model
        rows = []
        for task in self.comparison.models_of(arm):
            config, _ = self.comparison.plan_unrated(WorkItem(arm.name, first, "train", task))
            if arm.name == self._checked_arm():
                prepared = self._prepare(config)
                self.blockers += find_blockers(prepared, forecast_tasks(prepared))
            rows.append((largest_row(self._prepare(_shorten(config))), config))
        row, config = max(rows, key=lambda pair: (pair[0].num_tokens, pair[0].num_targets))
        try:
            trust = model.trust_remote_code
            footprint = measure_footprint(self.model_config, row, lora=model.lora, trust_remote_code=trust)
        except UserError as error:
            self.notes.append(str(error))
            return None
        memory = predict_recipe(config, footprint, device=self.device)
        if self.device is not None and not fits(memory, self.device):
            need, have = memory.total_bytes / 2**30, self.device.memory_bytes / 2**30
            self.blockers.append(
                f"{arm.title}: a step needs {need:.1f} GiB, and a {self.device.name} has {have:.1f}; choose a larger"
                " device, lower episodes.token_budget, or set train.checkpointed_layers = 'whole'"
            )
        return memory

    def _checked_arm(self) -> ArmName | None:
        """Return the arm whose whole plan is checked for what makes training useless: the one with most shots."""
        shared = self.comparison.planner.shared_arms
        return "manyicl" if "manyicl" in shared else next(iter(shared), None)

    def _prepare(self, config: RunConfig) -> Prepared:
        """Return a run as far as it can be planned; its validation is left out, which nothing here reads."""
        tasks = {name: self.comparison.planner.tasks[name] for name in config.tasks.names}
        maker = BatchMaker(tasks, targets=config.episodes.targets, split="validation")
        tokenizer, packs = self.comparison.tokenizer, plan_packs(config, tasks)
        return Prepared(config, tokenizer, self.tokenizer.frame, tasks, packs=packs, validation=(maker, []))


def _shorten(config: RunConfig) -> RunConfig:
    """Return the recipe with its first steps only: enough of them to know how large a row is."""
    num_steps = min(config.train.num_steps, MEMORY_STEPS)
    return config.model_copy(update={"train": config.train.model_copy(update={"num_steps": num_steps})})


def count_sweep(plan: TaskSweep, *, forward: Callable[..., int]) -> Work:
    """Return what asking one task takes: each draw's shots once, and behind them every query with its options.

    A free answer is taken to be as long as its reference. forward: model FLOPs of rows behind a prefix.
    """
    total, behind = Work(), {shown: _query_tokens(plan, after_shots=shown) for shown in (False, True)}
    for draw in range(plan.settings.num_draws):
        ends = prefix_lengths(plan.tokenized, plan.draws[draw])
        if not plan.shots_of(draw):
            continue
        encoded = int(ends[plan.most_shots(draw)])
        total += Work(0, encoded, 0, forward([encoded]))
        for shots in plan.shots_of(draw):
            before = int(ends[plan.num_shots(draw, shots)])
            rows, prompts, num_prompts = behind[plan.num_shots(draw, shots) > 0]
            flops = forward(rows.tolist(), targets=int(rows.sum()), prefix_tokens=before)
            total += Work(0, int(rows.sum()), num_prompts * before + prompts, flops)
    return total


def _query_tokens(plan: TaskSweep, *, after_shots: bool) -> tuple[NDArray[np.int64], int, int]:
    """Return the tokens of each query with its options as a trie, those of its whole prompts, and their number.

    On the plain path every option has a prompt of its own; an open query has one that is scored and one that is
    answered.
    """
    test = plan.tokenized.splits["test"]
    rows, prompt_tokens, num_prompts = [], 0, 0
    nodes: dict[tuple[str, ...], int] = {}
    for query in plan.queries.tolist():
        num_input = len(query_ids(plan.tokenized, split="test", index=query, after_shots=after_shots))
        known = plan.candidates[query]
        if known:
            options = [ids for _, ids in plan.written[known]]
            if known not in nodes:
                nodes[known] = len(build_trie(options).tokens_N)
            rows.append(num_input + nodes[known])
            prompt_tokens += sum(num_input + len(ids) for ids in options)
            num_prompts += len(options)
        else:
            num_answer = int(test.answer_lengths[query])
            rows.append(num_input + 2 * (num_answer - 1))  # the reference, and an answer of its length
            prompt_tokens += 2 * (num_input + num_answer)
            num_prompts += 2
    return np.array(rows, dtype=np.int64), prompt_tokens, num_prompts
