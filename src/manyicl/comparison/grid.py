"""A comparison as a grid of cells: arm x seed x what is done. Each is one file or one run, whole or absent.

Killed at any point, the same call goes on with the cells that are missing. docs/comparison-format.md has the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from manyicl.comparison.arms import ARMS, TUNED_RATES, Arm, ArmName, ArmPlanner, CompareConfig, Spent, choose_tasks
from manyicl.comparison.inputs import INPUTS_FILE, Inputs, hash_inputs, read_inputs, refuse_other_inputs, write_inputs
from manyicl.console import Pace, reporting, tell_seconds
from manyicl.episodes import Frame, TaskTokenizer, TokenizedTask
from manyicl.errors import UserError, suggest
from manyicl.evaluation import (
    Shots,
    TextWindows,
    cap_shots,
    drift_every,
    evaluate,
    read_windows,
    shots_order,
    sort_shots,
    window_bits,
)
from manyicl.files import write_atomically
from manyicl.inference import InferenceModel, load_for_inference
from manyicl.locks import LOCK, claiming, sole_writer
from manyicl.models import check_window, load_config, load_tokenizer, resolve_precision
from manyicl.planning import Overlap, find_overlaps, tell_overlaps
from manyicl.seeds import STREAMS
from manyicl.tasks import Task, ask_validation, flip_labels, load_tasks
from manyicl.training import (
    RunConfig,
    RunFolder,
    absolute_paths,
    dump_config,
    find_changes,
    load_recipe,
    tokenize_all,
    train,
    with_precision,
)

What = Literal["train", "validation", "test", "text", "flip", "order"]
TRIAL_WHATS: tuple[What, ...] = ("train", "validation")
RECIPE = "recipe.toml"
FRAME_FILE = "frame.json"
# Flips and orders are told by fewer draws than scores.
MOST_ANALYSIS_DRAWS = 3
# Seconds between two looks at work that another process does.
POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One piece of work. task: None where an arm's one model has all tasks. rate: the learning rate of a trial."""

    arm: ArmName
    seed: int
    what: What
    task: str | None = None
    rate: float | None = None

    @property
    def model(self) -> tuple[ArmName, int, str | None, float | None]:
        """The model that it trains or asks. All cells of a model are done by one process, one after the other."""
        return self.arm, self.seed, self.task, self.rate

    def tell_model(self) -> str:
        """Return its model in words."""
        tried = f", learning rate {self.rate:g}" if self.rate is not None else ""
        alone = f", {self.task}" if self.task is not None else ""
        return f"seed {self.seed}, {ARMS[self.arm].title}{alone}{tried}"

    @property
    def kind(self) -> str:
        """What takes about as long: the same work, for one task's model or for all."""
        return f"{self.what}, {'one task' if self.task is not None else 'all tasks'}"

    def title(self) -> str:
        """Return what progress calls it."""
        return f"{self.tell_model()}: {self.what}"


class Grid:
    """One comparison in its folder; everything that decides it is in `recipe.toml` there.

    Raises:
        UserError: a fault in the recipe or the tasks.
    """

    def __init__(self, folder: Path, config: CompareConfig) -> None:
        self.folder, self.config = folder, config
        self.settings = config.compare

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """All tasks, trained and held out, by name."""
        every = load_tasks(self.config.tasks.folder)
        trained = choose_tasks(self.config, [task.name for task in every])
        known = {task.name: task for task in every}
        for name in (*trained, *self.held_out, *self.familiar):
            if name not in known:
                raise UserError(f"{self.config.tasks.folder}: no task '{name}'{suggest(name, known)}")
        return {name: known[name] for name in sorted({*trained, *self.held_out, *self.familiar})}

    @property
    def held_out(self) -> list[str]:
        """Tasks that no arm is trained on, sorted."""
        return sorted(self.settings.held_out_tasks)

    @property
    def familiar(self) -> list[str]:
        """Tasks that the base is known to do, sorted; no arm is trained on them."""
        return sorted(self.settings.familiar_tasks)

    @property
    def trained(self) -> list[str]:
        """Tasks that the arms are trained on, sorted."""
        return sorted({*self.tasks} - {*self.held_out, *self.familiar})

    def role_of(self, task: str) -> str:
        """Return a task's role: trained, held-out or familiar."""
        return "held-out" if task in self.held_out else "familiar" if task in self.familiar else "trained"

    @cached_property
    def dedicated(self) -> list[str]:
        """Tasks that get a model of their own."""
        return sorted(self.settings.dedicated_tasks or self.trained)

    @cached_property
    def asked_trained(self) -> list[str]:
        """Trained tasks that are asked: those with a dedicated model, and others, the families in turn."""
        most = self.settings.asked_tasks or len(self.trained)
        has_dedicated = any(ARMS[arm].per_task for arm in self.settings.arms)
        chosen = list(self.dedicated) if has_dedicated else []
        by_family: dict[str, list[str]] = {}
        for name in self.trained:
            if name not in chosen:
                by_family.setdefault(self.tasks[name].family, []).append(name)
        turns = [name for turn in zip_longest(*by_family.values()) for name in turn if name is not None]
        return sorted([*chosen, *turns[: max(0, most - len(chosen))]])

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.config.model)

    @cached_property
    def frame(self) -> Frame | None:
        """The text around examples in the chat style, None in the plain one.

        It is that of the day on which the comparison began: a chat template may write the date, and all arms must be
        trained on and asked with the same text.
        """
        if self.config.template.style == "plain":
            return None
        file = self.folder / FRAME_FILE
        if file.is_file():
            return Frame(**json.loads(file.read_bytes()))
        return TaskTokenizer(self.tokenizer, self.config.template).frame

    def keep_frame(self) -> None:
        """Write the frame into the comparison's folder, unless it is there or the style is plain."""
        if self.frame is not None and not (self.folder / FRAME_FILE).is_file():
            write_atomically(self.folder / FRAME_FILE, json.dumps(asdict(self.frame), indent=1) + "\n")

    @cached_property
    def planner(self) -> ArmPlanner:
        """What gives each arm its run's recipe."""
        chosen = [self.tasks[name] for name in self.trained]
        writer = TaskTokenizer(self.tokenizer, self.config.template, frame=self.frame)
        tokenized: dict[str, TokenizedTask] = tokenize_all(chosen, self.config, writer)
        return ArmPlanner(self.config, tokenized)

    @cached_property
    def texts(self) -> list[TextWindows]:
        """The neutral text that forgetting is measured on.

        Raises:
            UserError: a file cannot be read, or a window is longer than the model can see.
        """
        if self.settings.text_files:
            num_tokens = self.settings.text_window_tokens
            check_window(load_config(self.config.model), num_tokens=num_tokens, what="compare.text_window_tokens")
        return [
            read_windows(
                Path(file),
                self.tokenizer,
                window_tokens=self.settings.text_window_tokens,
                num_windows=self.settings.text_windows,
            )
            for file in self.settings.text_files
        ]

    @cached_property
    def inputs(self) -> Inputs:
        """Hashes of the tasks and texts as they were when the comparison began."""
        return read_inputs(self.folder) or hash_inputs(self.tasks, self.settings.text_files)

    def find_overlaps(self) -> dict[str, Overlap]:
        """Return what each held-out or familiar task shares with the train rows of the trained ones; takes a while."""
        return find_overlaps(self.tasks, trained=self.trained)

    @property
    def shots(self) -> list[Shots]:
        """The numbers of shots that every arm is asked with, ascending; that of the few-shot arm's training is one."""
        own = [self.settings.few_shot_shots] if "few-shot" in self.settings.arms else []
        return sort_shots([*self.settings.shots, *own])

    @property
    def max_tokens(self) -> int:
        """The longest sequence of a question."""
        return self.settings.max_tokens or self.config.episodes.token_budget

    def cells(self) -> list[WorkItem]:
        """Return every cell of the comparison, in the order in which they are done."""
        trials = [
            WorkItem(arm.name, self.settings.seeds[0], what, task, rate)
            for arm in self.arms
            if arm.trained
            for rate in self.rates_of(arm.name)
            for task in self.models_of(arm)
            for what in TRIAL_WHATS
        ]
        return [
            *trials,
            *(cell for seed in self.settings.seeds for arm in self.arms for cell in self._cells_of(arm, seed)),
        ]

    @property
    def arms(self) -> list[Arm]:
        """The arms, in the order of the tables."""
        return [ARMS[name] for name in self.settings.arms]

    def models_of(self, arm: Arm) -> Sequence[str | None]:
        """Return the tasks that an arm has a model for; [None] where one model has all."""
        return self.dedicated if arm.per_task else [None]

    def _cells_of(self, arm: Arm, seed: int) -> Iterator[WorkItem]:
        whats: list[What] = ["train"] if arm.trained else []
        whats += ["validation"] if self.settings.validation_queries else []
        whats += ["test"]
        if not arm.per_task:
            whats += ["text"] if self.settings.text_files else []
            whats += ["flip"] if self.settings.flips else []
            whats += ["order"] if self.settings.orders and shots_order(self.shots[-1]) > 1 else []
        for task in self.models_of(arm):
            for what in whats:
                yield WorkItem(arm.name, seed, what, task)

    def place(self, cell: WorkItem) -> Path:
        """Return the file of a cell; of a training cell its run's folder."""
        root = f"seed-{cell.seed}" if cell.rate is None else f"trials/{cell.rate:g}"
        stem = self.folder / root / cell.arm
        stem = stem if cell.task is None else stem / cell.task
        return stem if cell.what == "train" else stem.with_name(f"{stem.name}.{cell.what}.json")

    def sweep_of(self, cell: WorkItem) -> tuple[list[Task], dict[str, Any]]:
        """Return the tasks that a cell asks, and its shots, draws and queries as `evaluate` takes them."""
        settings, tasks = self.settings, [self.tasks[name] for name in self._asked_in(cell)]
        options: dict[str, Any] = {"shots": self.shots, "draws": settings.draws, "queries": settings.queries}
        options["max_new_tokens"] = settings.max_new_tokens
        if cell.what == "validation":
            tasks = [ask_validation(task) for task in tasks if task.validation]
            options |= {"queries": settings.validation_queries, "purpose": "choice of settings"}
        elif cell.what == "flip":
            tasks = [flip_labels(task, seed=cell.seed) for task in tasks if len(task.labels) > 1]
            options |= {"draws": min(settings.draws, MOST_ANALYSIS_DRAWS), "most_only": True}
        elif cell.what == "order":
            options |= {"draws": max(2, min(settings.draws, MOST_ANALYSIS_DRAWS)), "most_only": True}
            options |= {"fixed_shots": "most"}
        return tasks, options

    def _asked_in(self, cell: WorkItem) -> list[str]:
        if cell.task is not None:
            return [cell.task]
        if cell.what == "validation":
            return self.asked_trained
        return sorted([*self.asked_trained, *self.held_out, *self.familiar])

    def claim_file(self, cell: WorkItem) -> Path:
        """Return the lock file of the process that does a cell, one for all cells of a model."""
        parts = self.place(replace(cell, what="train")).relative_to(self.folder).parts
        return self.folder / ".claims" / f"{'-'.join(parts)}.lock"

    def is_done(self, cell: WorkItem) -> bool:
        """Return whether a cell is finished."""
        place = self.place(cell)
        return RunFolder(place).is_finished if cell.what == "train" else place.is_file()

    def plan_run(self, cell: WorkItem) -> tuple[RunConfig, Spent]:
        """Return the recipe of the run that a cell's model comes from, and what it spends."""
        config, spent = self.plan_unrated(cell)
        rate = cell.rate or self.chosen_rate(cell.arm, cell.task)
        train = config.train.model_copy(update={"learning_rate": rate})
        return config.model_copy(update={"train": train}), spent

    def plan_unrated(self, cell: WorkItem) -> tuple[RunConfig, Spent]:
        """Return the same at the recipe's own learning rate, which needs no finished trials."""
        if cell.task is None:
            return self.planner.plan_arm(cell.arm, seed=cell.seed)
        return self.planner.plan_dedicated(cell.arm, cell.task, seed=cell.seed)

    def rates_of(self, arm: ArmName) -> tuple[float, ...]:
        """Return the learning rates that are tried for an arm; none if it is trained at the recipe's own."""
        rates = self.settings.learning_rates
        if ARMS[arm].tuned and not rates:
            return tuple(float(f"{factor * self.config.train.learning_rate:.3g}") for factor in TUNED_RATES)
        return rates

    def chosen_rate(self, arm: ArmName, task: str | None = None) -> float:
        """Return an arm's learning rate: the one whose trial did best on validation rows (`judge_trial`).

        task: of a tuned arm, whose models each have a rate of their own, the task of the model.

        Raises:
            UserError: a trial was not asked anything.
        """
        rates = self.rates_of(arm)
        if not rates:
            return self.config.train.learning_rate
        judged = {rate: judge_trial(self.read_validation(arm, rate, task)) for rate in rates}
        known = {rate: one for rate, one in judged.items() if one is not None}
        if len(known) < len(rates):
            whose = f"{ARMS[arm].title}, task '{task}'" if ARMS[arm].tuned else ARMS[arm].title
            raise UserError(
                f"compare.learning_rates: no validation row could be asked of {whose}, so no rate can be"
                " chosen; give the trained tasks more rows, raise compare.max_tokens, or name no rates"
            )
        return max(known, key=lambda rate: (known[rate].score, -known[rate].nll))

    def trial_cells(self, arm: ArmName, rate: float, task: str | None = None) -> list[WorkItem]:
        """Return the cells that an arm's trial of a rate is judged by, one a model; of a tuned arm `task`'s alone."""
        models = [task] if ARMS[arm].tuned and task is not None else self.models_of(ARMS[arm])
        return [WorkItem(arm, self.settings.seeds[0], "validation", model, rate) for model in models]

    def read_validation(self, arm: ArmName, rate: float, task: str | None = None) -> list[Mapping[str, Any]]:
        """Return the tasks of a trial's validation results."""
        cells = self.trial_cells(arm, rate, task)
        return [task for cell in cells for task in json.loads(self.place(cell).read_bytes())["tasks"]]


def plan_file(run: Path) -> Path:
    """Return where what a run's plan spends is kept."""
    return run.with_name(f"{run.name}.plan.json")


@dataclass(frozen=True, slots=True)
class Judged:
    """How good an arm is at one number of shots on validation rows: mean score and mean nats per answer over tasks."""

    shots: Shots
    score: float
    nll: float


Scores = Mapping[Shots, tuple[float, float]]  # shots -> score and nats of one task


def judge_trial(tasks: Sequence[Mapping[str, Any]]) -> Judged | None:
    """Return what a trial is judged by: its best mean score over shot counts, ties by nats; None if nothing was asked.

    tasks: the entries of its validation results.
    """
    judged = judge_shots([validation_scores(task) for task in tasks])
    return max(judged, key=lambda one: (one.score, -one.nll), default=None)


def judge_shots(curves: Sequence[Scores]) -> list[Judged]:
    """Return how good an arm is on its tasks at every number of shots that any of them was asked with, ascending.

    A task that was not asked with so many shots counts with the most that it was asked with up to then (or with its
    fewest), so that every mean is over all tasks: one with few rows takes no shot count from the others.
    """
    curves = [curve for curve in curves if curve]
    judged = []
    for k in sort_shots(shots for curve in curves for shots in curve):
        cells = [curve[cap_shots(k, curve)] for curve in curves]
        score, nll = (sum(cell[place] for cell in cells) / len(cells) for place in (0, 1))
        judged.append(Judged(k, score, nll))
    return judged


def validation_scores(task: Mapping[str, Any]) -> Scores:
    """Return the score and the nats at every number of shots that a result's task was asked with."""
    return {c["shots"]: (c["score"], c["nll"]) for c in task["curve"] if c["score"] is not None}


def open_comparison(folder: Path, config: CompareConfig | None) -> Grid:
    """Return the comparison in `folder`, started with `config`, or gone on with.

    Raises:
        UserError: there is none to go on with, or another one; or its tasks or texts have changed since it began; or
            another process is starting one there.
    """
    if config is None:
        return _open_in(folder, None)
    with sole_writer(folder):
        return _open_in(folder, config)


def _open_in(folder: Path, config: CompareConfig | None) -> Grid:
    kept = folder / RECIPE
    if kept.is_file():
        comparison = Grid(folder, load_recipe(kept, kind=CompareConfig))
        if config is not None and config.model.precision == "auto":  # what it began with, on any machine
            config = with_precision(config, resolve_precision(comparison.config.model.precision))
        if config is not None and dump_config(absolute_texts(config)) != dump_config(comparison.config):
            raise UserError(f"--out {folder}: holds another comparison; go on with --resume {folder}, or name another")
        now = hash_inputs(comparison.tasks, comparison.settings.text_files)
        refuse_other_inputs(folder, now, task_folder=comparison.config.tasks.folder)
        began = read_inputs(folder)
        if began is None or began.overlaps is None:  # an earlier version began it
            write_inputs(folder, replace(began or now, overlaps=comparison.find_overlaps()))
        comparison.keep_frame()
        return comparison
    if config is None:
        raise UserError(f"{folder}: holds no comparison ({RECIPE}); start one: manyicl compare RECIPE --out {folder}")
    ours = ("tasks", INPUTS_FILE, LOCK)  # the demo's tasks; and what a kill leaves just before the recipe is written
    taken = [path for path in folder.iterdir() if path.name not in ours] if folder.exists() else []
    if taken:
        raise UserError(f"--out {folder}: is not empty ({taken[0].name}); name a new folder")
    # All arms and seeds share one precision, also if they are trained on different machines.
    config = with_precision(config, resolve_precision(config.model.precision))
    comparison = Grid(folder, absolute_texts(config))
    _ = comparison.texts  # a fault in them, as in the tasks, is told before the folder is made
    for name in (*comparison.asked_trained, *comparison.held_out, *comparison.familiar):
        if not comparison.tasks[name].test:
            raise UserError(f"task '{name}': has no test rows, so no arm can be asked; give it some, or leave it out")
    for name in comparison.dedicated if any(arm.tuned for arm in comparison.arms) else []:
        if not comparison.tasks[name].validation:
            raise UserError(
                f"task '{name}': has no validation rows, which dedicated-tuned chooses its rate and steps by; give it"
                " more train rows, or leave it out of compare.dedicated_tasks"
            )
    inputs = hash_inputs(comparison.tasks, comparison.settings.text_files)
    write_inputs(folder, replace(inputs, overlaps=comparison.find_overlaps()))
    write_atomically(kept, dump_config(comparison.config))
    comparison.keep_frame()
    return comparison


def absolute_texts(config: CompareConfig) -> CompareConfig:
    """Return the recipe with all its paths absolute, so that it can go on from anywhere."""
    config = absolute_paths(config)
    files = tuple(str(Path(file).expanduser().resolve()) for file in config.compare.text_files)
    return config.model_copy(update={"compare": config.compare.model_copy(update={"text_files": files})})


def check_seeds(comparison: Grid, seeds: Sequence[int] | None) -> None:
    """Refuse seeds that are not the comparison's.

    Raises:
        UserError: naming the first of them.
    """
    for seed in seeds or ():
        if seed not in comparison.settings.seeds:
            raise UserError(
                f"--seed {seed}: is none of this comparison's {list(comparison.settings.seeds)}; give one of them"
            )


def refuse_ranks() -> None:
    """Refuse to run as one of several ranks: cells are files, and each is one process's.

    Raises:
        UserError: with what to do instead.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UserError(
            f"{ranks} processes: a comparison is shared out by seeds; start `manyicl compare --resume DIR --seed N`"
            " once a GPU (CUDA_VISIBLE_DEVICES=N), not accelerate launch"
        )


def run_comparison(comparison: Grid, *, seeds: Sequence[int] | None = None, console: Console) -> None:
    """Do the missing cells: all of them, or the trials of learning rates and the cells of some seeds.

    Several processes may work on one comparison, each on seeds of its own or all on the same: what one of them is
    doing, the others leave to it, and wait for it if nothing else is left. Trials belong to all.

    Raises:
        UserError: a cell cannot be done (those before it are kept), or an earlier version asked the finished ones
            behind other shots.
    """
    cells = [cell for cell in comparison.cells() if seeds is None or cell.seed in seeds or cell.rate is not None]
    for line in tell_overlaps(comparison.inputs.overlaps or {}):
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    titles = {cell: f"[{number}/{len(cells)}] {cell.title()}" for number, cell in enumerate(cells, start=1)}
    if not all(map(comparison.is_done, cells)):
        _refuse_other_streams(comparison)
    worker = _Worker(comparison, console)
    # The rates that the other cells are trained with are known once every trial is done.
    for part in ([cell for cell in cells if cell.rate is not None], [cell for cell in cells if cell.rate is None]):
        told: set[str] = set()
        while others := _do_free(worker, part, titles=titles):
            for line in [line for line in others if line not in told]:
                console.print(line, soft_wrap=True, highlight=False)
            told.update(others)
            time.sleep(POLL_S)


def _do_free(worker: _Worker, cells: Sequence[WorkItem], *, titles: Mapping[WorkItem, str]) -> list[str]:
    """Do the missing cells of every model that no other process works on; return a line for each that one does."""
    comparison, waits = worker.comparison, []
    for _, group in groupby(cells, key=lambda cell: cell.model):
        missing = [cell for cell in group if not comparison.is_done(cell)]
        if not missing:
            continue
        with claiming(comparison.claim_file(missing[0])) as holder:
            if holder is not None:
                waits.append(f"waiting for {holder}: {missing[0].tell_model()}")
                continue
            for cell in missing:
                if not comparison.is_done(cell):  # another process may just have done it
                    worker.do_timed(cell, titles)
    return waits


def _refuse_other_streams(comparison: Grid) -> None:
    """Refuse to add cells to those of an earlier version: it drew other shots, so their answers would not be pairs."""
    for cell in comparison.cells():
        place = comparison.place(cell)
        is_sweep = cell.what in ("validation", "test", "flip", "order") and place.is_file()
        if is_sweep and json.loads(place.read_bytes()).get("streams") != STREAMS:
            raise UserError(
                f"--resume {comparison.folder}: {place.relative_to(comparison.folder)} was asked by another version of"
                " manyicl, which draws other shots; go on with that version, or start a new comparison"
            )


class _Worker:
    """Does cells; keeps the model that the last one asked."""

    def __init__(self, comparison: Grid, console: Console) -> None:
        self.comparison, self.console = comparison, console
        self.pace = Pace()
        self._asked: tuple[tuple[Any, ...], InferenceModel] | None = None

    def do_timed(self, cell: WorkItem, titles: Mapping[WorkItem, str]) -> None:
        """Do one cell, and print how long it took and how long the missing ones of `titles` will take."""
        started = time.monotonic()
        self.do(cell, titles[cell])
        seconds = time.monotonic() - started
        self.pace.add(cell.kind, seconds)
        missing = [other.kind for other in titles if not self.comparison.is_done(other)]
        left = f"; {len(missing)} cells left, about {tell_seconds(self.pace.left(missing) or 0.0)}" if missing else ""
        self.console.print(f"{titles[cell]}: done in {tell_seconds(seconds)}{left}", soft_wrap=True, highlight=False)

    def do(self, cell: WorkItem, title: str) -> None:
        """Do one cell."""
        comparison = self.comparison
        if cell.what == "train":
            self._asked = None  # its memory is needed
            self._train(cell, title)
            return
        asked = self._ask_model(cell)
        out = comparison.place(cell)
        if cell.what == "text":
            bits = [{"file": text.file, "bits": window_bits(asked.model, text).tolist()} for text in comparison.texts]
            texts = [
                one | {"bytes": text.num_bytes_W.tolist(), "bos": text.has_bos, "unknown_tokens": text.num_unknown}
                for one, text in zip(bits, comparison.texts, strict=True)
            ]
            write_atomically(out, json.dumps({"texts": texts}) + "\n")
            return
        tasks, options = comparison.sweep_of(cell)
        with _titled(self.console, title) as report:
            # A cell may be empty: of validation rows, say, none of which fits.
            evaluate(asked, tasks, seed=cell.seed, out=out, on_progress=report, allow_empty=True, **options)

    def _ask_model(self, cell: WorkItem) -> InferenceModel:
        """Return the model of a cell, in the comparison's template and length."""
        if self._asked is None or self._asked[0] != cell.model:
            self._asked = None
            config = self.comparison.config
            trained = WorkItem(cell.arm, cell.seed, "train", cell.task, cell.rate)
            is_base = not ARMS[cell.arm].trained
            asked = load_for_inference(
                config.model if is_base else str(self.comparison.place(trained)),
                precision=config.model.precision,
                max_tokens=self.comparison.max_tokens,
                template=config.template,
                trust_remote_code=config.model.trust_remote_code,
                frame=self.comparison.frame,
            )
            self._asked = cell.model, asked
        return self._asked[1]

    def _train(self, cell: WorkItem, title: str) -> None:
        """Train a model, or go on; its checkpoints go once it is whole."""
        comparison = self.comparison
        config, spent = comparison.plan_run(cell)
        folder = comparison.place(cell)
        plan = json.dumps(asdict(spent) | {"learning_rate": config.train.learning_rate}, indent=1)
        write_atomically(plan_file(folder), plan + "\n")
        if self._take_trial(cell, config):
            return
        drift = drift_every(comparison.texts if cell.task is None else [], steps=config.train.checkpoint_every_steps)
        run = RunFolder(folder)
        resume = run.is_started
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # a kill before the run began leaves nothing of worth
        train(
            config,
            out=folder,
            resume=resume,
            console=self.console,
            title=title,
            callbacks=drift,
            frame=comparison.frame,
            tasks=comparison.planner.tasks,
        )
        run.checkpoints.remove()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _take_trial(self, cell: WorkItem, config: RunConfig) -> bool:
        """Copy the run of a finished trial that had the same recipe, if there is one; return whether there was."""
        comparison, rate = self.comparison, config.train.learning_rate
        folder, first = comparison.place(cell), comparison.settings.seeds[0]
        if cell.rate is not None or cell.seed != first or rate not in comparison.rates_of(cell.arm):
            return False
        trial = comparison.place(replace(cell, rate=rate))
        if folder.exists() or not RunFolder(trial).is_finished:
            return False
        if find_changes(RunFolder(trial).read_config(), absolute_paths(config)):
            return False
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trial, partial, ignore=shutil.ignore_patterns(RunFolder(trial).checkpoints.path.name))
        partial.rename(folder)
        return True


@contextmanager
def _titled(console: Console, title: str) -> Iterator[Callable[[str, int, int], None]]:
    with reporting(console) as report:
        yield lambda what, done, total: report(f"{title} ({what})", done, total)
