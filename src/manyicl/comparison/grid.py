"""A comparison as a grid of work: arm x seed x kind of work, each item one file or one run.

An item's file is written whole or not at all. So a comparison that was killed at any point goes on with the items whose
files are missing. docs/comparison-format.md describes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from manyicl.comparison.arms import ArmMatcher
from manyicl.comparison.inputs import (
    INPUTS_FILE,
    RECIPE,
    Inputs,
    hash_inputs,
    keep_frame,
    read_frame,
    read_inputs,
    read_recipe,
    refuse_other_inputs,
    refuse_other_tasks,
    take_places,
    write_inputs,
)
from manyicl.comparison.settings import (
    ARMS,
    Arm,
    ArmName,
    CompareConfig,
    CompareSettings,
    Roles,
    absolute_texts,
    check_splits,
    choose_roles,
    choose_tasks,
    refuse_ignored,
)
from manyicl.console import tell_rate
from manyicl.episodes import Frame, TaskTokenizer, default_cache_dir, tokenize_task
from manyicl.errors import UserError, suggest
from manyicl.evaluation import (
    FILL,
    Shots,
    Sweep,
    TaskSweep,
    TextWindows,
    read_windows,
    shots_order,
    sort_shots,
)
from manyicl.files import find_others, write_atomically
from manyicl.locks import LOCK, sole_writer
from manyicl.models import RUN_PLAN, check_causal, check_window, load_config, load_tokenizer, resolve_precision
from manyicl.planning import find_overlaps
from manyicl.tasks import Task, ask_validation, flip_labels, load_task, name_sources
from manyicl.training import RunFolder, check_recipe, dump_config, find_changes, tokenize_all, with_precision

WorkKind = Literal["train", "validation", "test", "text", "flip", "order"]
# Kinds of work that ask tasks, and so leave a result with predictions.
SWEEP_KINDS: tuple[WorkKind, ...] = ("validation", "test", "flip", "order")
# (Kind of work, task) -> what is asked of it.
Sweeps = dict[tuple[WorkKind, str], TaskSweep]
# Exchanged labels and orders of shots need fewer draws than scores do.
MOST_ANALYSIS_DRAWS = 3


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One piece of work: a model that is trained, or one kind of evaluation of it."""

    arm: ArmName
    seed: int
    """The training seed."""
    kind: WorkKind
    """Whether a model is trained, or how it is evaluated."""
    task: str | None = None
    """The only task of the model; None if the arm trains one model on all tasks."""
    rate: float | None = None
    """The learning rate that a trial tries; None if this is not a trial."""

    @property
    def model(self) -> tuple[ArmName, int, str | None, float | None]:
        """The model that it trains or evaluates."""
        return self.arm, self.seed, self.task, self.rate

    @property
    def pace_key(self) -> str:
        """The same for items that take about as long: equal work, on one task's model or on all tasks."""
        return f"{self.kind}, {'one task' if self.task is not None else 'all tasks'}"

    @property
    def model_title(self) -> str:
        """The model in words."""
        tried = f", learning rate {tell_rate(self.rate)}" if self.rate is not None else ""
        alone = f", {self.task}" if self.task is not None else ""
        return f"seed {self.seed}, {ARMS[self.arm].title}{alone}{tried}"

    @property
    def title(self) -> str:
        """Its name in progress lines."""
        return f"{self.model_title}: {self.kind}"


class Grid:
    """The work of one comparison and the files that it leaves; `recipe.toml` in its folder decides everything.

    The folder need not exist yet: `open_comparison` makes it.
    """

    def __init__(self, folder: Path, config: CompareConfig) -> None:
        self.folder, self.config = folder, config

    @property
    def settings(self) -> CompareSettings:
        """The section [compare]."""
        return self.config.compare

    @property
    def arms(self) -> list[Arm]:
        """The arms, in the order of the tables."""
        return [ARMS[name] for name in self.settings.arms]

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """All tasks that have a role, by name; no other task of the folder is read.

        Raises:
            UserError: a task is faulty, absent from the folder, or has two roles.
        """
        known = name_sources(self.config.tasks.folder)
        chosen = [*choose_tasks(self.config, list(known)), *self.settings.held_out_tasks, *self.settings.familiar_tasks]
        for name in [name for name in chosen if name not in known]:
            raise UserError(f"{self.config.tasks.folder}: no task '{name}'{suggest(name, known)}")
        return {name: load_task(known[name]) for name in sorted(set(chosen))}

    @cached_property
    def roles(self) -> Roles:
        """Which tasks are trained, held out, familiar, evaluated, or have a model of their own."""
        return choose_roles(self.config, self.tasks)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.config.model)

    @cached_property
    def frame(self) -> Frame | None:
        """The text around examples in the chat style, None in the plain one.

        It is the one of the day on which the comparison began: a chat template may write the date, and all arms must be
        trained and evaluated with the same text.
        """
        if self.config.template.style == "plain":
            return None
        return read_frame(self.folder) or TaskTokenizer(self.tokenizer, self.config.template).frame

    @cached_property
    def writer(self) -> TaskTokenizer:
        """Writes examples as the recipe's template says; one for all, because to hash a vocabulary takes seconds."""
        return TaskTokenizer(self.tokenizer, self.config.template, frame=self.frame)

    @cached_property
    def matcher(self) -> ArmMatcher:
        """Gives each arm the recipe of its run."""
        chosen = [self.tasks[name] for name in self.roles.trained]
        return ArmMatcher(self.config, tokenize_all(chosen, self.config, self.writer))

    @cached_property
    def texts(self) -> list[TextWindows]:
        """The neutral text that forgetting is measured on.

        Raises:
            UserError: a file cannot be read, or a window is longer than the model can see.
        """
        num_tokens = self.settings.text_window_tokens
        if self.settings.text_files:
            check_window(load_config(self.config.model), num_tokens=num_tokens, what="compare.text_window_tokens")
        return [
            read_windows(Path(file), self.tokenizer, window_tokens=num_tokens, num_windows=self.settings.text_windows)
            for file in self.settings.text_files
        ]

    @cached_property
    def inputs(self) -> Inputs:
        """Hashes of the tasks and texts as they were when the comparison began."""
        return read_inputs(self.folder) or self.hash_inputs()

    def hash_inputs(self) -> Inputs:
        """Return the hashes of the tasks, the texts and the base as they are now."""
        return hash_inputs(self.tasks, self.settings.text_files, model=self.config.model.path)

    @property
    def shots(self) -> list[Shots]:
        """The numbers of shots that every arm is evaluated with, ascending.

        The number that an arm is trained with is one of them, or it would never be seen as it was trained.
        """
        own = [shots for arm, shots in self.settings.fixed_shots.items() if arm in self.settings.arms]
        return sort_shots({*self.settings.shots, *own})

    def models_of(self, arm: Arm) -> Sequence[str | None]:
        """Return the tasks that an arm has a model for; [None] if one model has all."""
        return self.roles.dedicated if arm.per_task else [None]

    def work(self) -> list[WorkItem]:
        """Return all work, in the order in which it is done: trials of learning rates first."""
        trials = [item for arm in self.arms if arm.trained for item in self._trials_of(arm)]
        return trials + [item for seed in self.settings.seeds for arm in self.arms for item in self._work_of(arm, seed)]

    def _trials_of(self, arm: Arm) -> Iterator[WorkItem]:
        for rate in self.config.rates_of(arm.name):
            for task in self.models_of(arm):
                yield WorkItem(arm.name, self.settings.seeds[0], "train", task, rate)
                yield WorkItem(arm.name, self.settings.seeds[0], "validation", task, rate)

    def _work_of(self, arm: Arm, seed: int) -> Iterator[WorkItem]:
        settings = self.settings
        # A model of one task is not analysed: the analyses compare models that have all tasks.
        wanted: dict[WorkKind, bool] = {
            "train": arm.trained,
            "validation": settings.validation_queries > 0,
            "test": True,
            "text": bool(settings.text_files) and not arm.per_task,
            "flip": settings.flips and not arm.per_task,
            "order": settings.orders and not arm.per_task and shots_order(self.shots[-1]) > 1,
        }
        for task in self.models_of(arm):
            for kind, is_wanted in wanted.items():
                if is_wanted:
                    yield WorkItem(arm.name, seed, kind, task)

    def path_of(self, item: WorkItem) -> Path:
        """Return the file that an item leaves; of a training its run's folder."""
        root = f"seed-{item.seed}" if item.rate is None else f"trials/{item.rate:g}"
        stem = self.folder / root / item.arm
        stem = stem if item.task is None else stem / item.task
        return stem if item.kind == "train" else stem.with_name(f"{stem.name}.{item.kind}.json")

    def is_done(self, item: WorkItem) -> bool:
        """Return whether an item is finished; of a trial that diverged no more is to be done."""
        path = self.path_of(item)
        has_ended = RunFolder(path).is_finished if item.kind == "train" else path.is_file()
        return has_ended or self.has_diverged(item)

    def has_diverged(self, item: WorkItem) -> bool:
        """Return whether an item is of a trial whose loss, or likelihoods when it was asked, were not finite."""
        if item.rate is None:
            return False
        run = RunFolder(self.path_of(replace(item, kind="train")))
        return run.state_file.is_file() and run.read_state().diverged is not None

    def keep_diverged(self, item: WorkItem, what: str) -> None:
        """Note in the run of a trial that it diverged, and remove what only going on with it would need.

        what: what was not finite.
        """
        run = RunFolder(self.path_of(replace(item, kind="train")))
        run.update_state(diverged=what)
        run.checkpoints.remove()

    def work_of_seeds(self, seeds: Sequence[int] | None) -> list[WorkItem]:
        """Return the work of some seeds, or of all if None, and the trials of learning rates, which belong to all."""
        return [item for item in self.work() if seeds is None or item.seed in seeds or item.rate is not None]

    def missing_models(self, seeds: Sequence[int] | None = None) -> set[object]:
        """Return the models that have work left, of some seeds and all trials, or of all."""
        return {item.model for item in self.work_of_seeds(seeds) if not self.is_done(item)}

    def claim_file(self, item: WorkItem) -> Path:
        """Return the lock file of the process that does an item."""
        return self.folder / ".claims" / f"{'-'.join(self.path_of(item).relative_to(self.folder).parts)}.lock"

    def count_claims(self) -> int:
        """Return how many items processes are doing now, at least 1; one that was killed may still be counted."""
        return max(1, len(list((self.folder / ".claims").glob("*.lock"))))

    def gpu_share(self) -> float:
        """Return the fraction of a GPU's free memory that is for each process at work, since all see the same free."""
        return 1 / self.count_claims()

    def sweep_of(self, item: WorkItem) -> tuple[list[Task], Sweep]:
        """Return the tasks that an item asks, and with which shots, draws and queries."""
        settings = self.settings
        sweep = Sweep(
            tuple(self.shots),
            num_draws=settings.draws,
            num_queries=settings.queries,
            seed=item.seed,
            max_tokens=self.config.max_tokens,
            answering=settings.answering,
            choose=settings.choose,
            num_nearest=settings.num_nearest,
        )
        if item.kind == "validation":
            names = self.roles.asked_trained if item.task is None else [item.task]
            tasks = [ask_validation(self.tasks[name]) for name in names if self.tasks[name].validation]
            # Another purpose draws other shots: a choice must not know the luck of the draws that are reported.
            return tasks, replace(sweep, num_queries=settings.validation_queries, purpose="choice of settings")
        tasks = [self.tasks[name] for name in (self.roles.asked if item.task is None else [item.task])]
        if item.kind == "flip":
            flipped = [flip_labels(task, seed=item.seed) for task in tasks if len(task.labels) > 1]
            return flipped, replace(sweep, num_draws=min(settings.draws, MOST_ANALYSIS_DRAWS), most_only=True)
        if item.kind == "order":
            draws = max(2, min(settings.draws, MOST_ANALYSIS_DRAWS))  # one order has no spread
            return tasks, replace(sweep, num_draws=draws, most_only=True, fixed_shots="most")
        return tasks, sweep


def plan_file(run: Path) -> Path:
    """Return the file that keeps what a run spends, beside the run's folder."""
    return run.with_name(f"{run.name}{RUN_PLAN}")


def open_comparison(folder: Path, config: CompareConfig | None, *, overrides: Sequence[str] = ()) -> Grid:
    """Return the comparison in `folder`: a new one with this recipe, or the one that is there.

    config: None continues the one that is there; if it is given and one is there, the two must be the same.
    overrides: `KEY=VALUE`, without a config: where the same tasks, base and texts lie now. They are kept.

    Raises:
        UserError: there is none to continue, or another one; its tasks, texts or weights have changed since it began,
            or have gone; an override changes something else; or another process is starting one there.
    """
    with nullcontext() if config is None else sole_writer(folder):
        if (folder / RECIPE).is_file():
            return _continue_in(folder, config, overrides=overrides)
        if config is None:
            raise UserError(f"{folder}: holds no comparison ({RECIPE}); start one with a recipe and out={folder}")
        return _begin_in(folder, config)


def _continue_in(folder: Path, config: CompareConfig | None, *, overrides: Sequence[str]) -> Grid:
    grid = Grid(folder, read_recipe(folder, overrides=overrides))
    if config is not None and config.model.precision == "auto":
        # It began with a precision of its own, which stays the same on any machine.
        config = with_precision(config, resolve_precision(grid.config.model.precision))
    if config is not None and (changes := find_changes(grid.config, absolute_texts(config))):
        held = f"holds a comparison with another {', '.join(changes)}"
        raise UserError(f"out={folder}: {held}; go on with that one by resume={folder}, or name another")
    now = grid.hash_inputs()
    refuse_other_inputs(folder, now, task_folder=grid.config.tasks.folder, model=grid.config.model.path)
    refuse_other_tasks(folder, grid.roles.asked)
    began = read_inputs(folder)
    if began is None or began.overlaps is None:  # an earlier version began it
        write_inputs(folder, replace(began or now, overlaps=find_overlaps(grid.tasks, trained=grid.roles.trained)))
    keep_frame(folder, grid.frame)
    if overrides:
        take_places(folder, grid.config)
    return grid


def _begin_in(folder: Path, config: CompareConfig) -> Grid:
    # The demo's tasks may be there already, and what a kill leaves just before the recipe is written.
    ours = ("tasks", INPUTS_FILE, LOCK)
    taken = find_others(folder, ours) if folder.exists() else []
    if taken:
        raise UserError(f"out={folder}: is not empty ({taken[0].name}); name a new folder")
    # All arms and seeds share one precision, also if they are trained on different machines.
    config = with_precision(config, resolve_precision(config.model.precision))
    check_recipe(config)
    grid = Grid(folder, absolute_texts(config))
    _ = grid.texts  # like a fault in the tasks, one in the texts is reported before the folder is made
    check_can_ask(grid)
    write_inputs(folder, replace(grid.hash_inputs(), overlaps=find_overlaps(grid.tasks, trained=grid.roles.trained)))
    write_atomically(folder / RECIPE, dump_config(grid.config))
    keep_frame(folder, grid.frame)
    return grid


def check_can_ask(grid: Grid) -> Sweeps:
    """Refuse a comparison whose models could not be asked once they are trained.

    Returns what the first seed's models are asked on test rows and, if rates are tried, on validation rows.

    Raises:
        UserError: sequences are longer than the model can see, a task lacks rows or has none that fits, the shots of an
            arm fit no episode, no task can be asked with any number of shots, or a setting would do nothing.
    """
    config, roles = grid.config, grid.roles
    limit = "episodes.token_budget" if config.compare.max_tokens is None else "compare.max_tokens"
    model_config = load_config(config.model)
    check_causal(model_config, settings=config.model)
    check_window(model_config, num_tokens=config.max_tokens, what=limit)
    refuse_ignored(config)
    check_splits(config, roles, grid.tasks)
    if "few-shot" in config.compare.arms:
        grid.matcher.refuse_unfit_shots()
    fits = f"fits {limit} = {config.max_tokens:,}"
    sweeps = _plan_sweeps(grid, "test")
    for sweep in [sweep for sweep in sweeps.values() if not len(sweep.wanted)]:
        raise UserError(f"task '{sweep.task.name}': no test row {fits}; raise it, or leave the task out")
    tried = [arm for arm in grid.arms if arm.trained and config.rates_of(arm.name)]
    sweeps |= _plan_sweeps(grid, "validation") if tried else {}
    known = {name for (kind, name), sweep in sweeps.items() if kind == "validation" and sweep.points}
    for arm in tried:
        names = roles.dedicated if arm.per_task else roles.asked_trained
        lost = [name for name in names if name not in known]
        if lost and (arm.tuned or len(lost) == len(names)):
            raise UserError(
                f"task '{lost[0]}': no validation row {fits} with its shots, so no rate of {arm.title} can be"
                " chosen; raise it, lower compare.shots, or name no compare.learning_rates"
            )
    tests = [sweep for (kind, _), sweep in sweeps.items() if kind == "test"]
    if not any(sweep.points for sweep in tests):
        fewest, first = grid.shots[0], tests[0]
        raise UserError(
            f"compare.shots = {grid.shots}: no task can be asked with any of them (task '{first.task.name}' with"
            f" {fewest}: {first.why_not(fewest)}); lower them, raise {limit}, or give the tasks rows that fit"
        )
    return sweeps


def note_unasked(shots: Sequence[Shots], sweeps: Sweeps) -> list[str]:
    """Return a line per number of shots that no task is asked with, and why the first task is not."""
    tests = [sweep for (kind, _), sweep in sweeps.items() if kind == "test"]
    return [
        f"compare.shots: no task is asked with {k:,} shots; task '{tests[0].task.name}': {tests[0].why_not(k)}"
        for k in shots
        if k != FILL and not any(k in sweep.asked_shots for sweep in tests)
    ]


def _plan_sweeps(grid: Grid, kind: WorkKind) -> Sweeps:
    tasks, sweep = grid.sweep_of(WorkItem(grid.arms[0].name, grid.settings.seeds[0], kind))
    known = [tokenize_task(task, tokenizer=grid.writer, cache_dir=default_cache_dir()) for task in tasks]
    return {(kind, one.task.name): TaskSweep(one, tokenizer=grid.writer, sweep=sweep) for one in known}
