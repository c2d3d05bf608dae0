"""Does the work of a comparison: trains models, evaluates them on tasks and texts; several processes may share it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from rich.console import Console

from manyicl.comparison.answers import Trials
from manyicl.comparison.arms import Spent
from manyicl.comparison.grid import SWEEP_KINDS, Grid, WorkItem, WorkKind, plan_file
from manyicl.comparison.inputs import read_whole, redoable
from manyicl.comparison.settings import ARMS, CompareSettings
from manyicl.console import Pace, reporting, tell_seconds
from manyicl.errors import NonFiniteError, UserError
from manyicl.evaluation import Evaluation, drift_every, evaluate_sweep, window_bits
from manyicl.files import write_atomically
from manyicl.inference import InferenceModel, load_for_inference, part_of_gpu, sharing_gpu
from manyicl.locks import claiming
from manyicl.planning import tell_overlaps
from manyicl.seeds import STREAMS
from manyicl.training import GpuShare, RunConfig, RunFolder, absolute_paths, check_recipe, find_changes, train

# Seconds between two looks at work that another process does.
POLL_S = 2.0


def check_seeds(settings: CompareSettings, seeds: Sequence[int] | None) -> None:
    """Refuse seeds that are not the comparison's.

    Raises:
        UserError: naming the first of them.
    """
    for seed in seeds or ():
        if seed not in settings.seeds:
            raise UserError(f"seed={seed}: is none of this comparison's {list(settings.seeds)}; give one of them")


def refuse_ranks() -> None:
    """Refuse to run as one of several ranks: each file of a comparison is written by one process.

    Raises:
        UserError: with what to do instead.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UserError(
            f"{ranks} processes of a launch: a comparison starts its own; call it once, with --processes {ranks}, not"
            " under accelerate launch"
        )


def run_comparison(
    grid: Grid, shared_by: int | None = None, *, seeds: Sequence[int] | None = None, console: Console
) -> None:
    """Do the missing work: all of it, or that of some seeds and the trials of learning rates.

    Several processes may work on one comparison, each on seeds of its own or all on the same: each leaves the others
    what they are doing, and waits for it if nothing else can be done. Trials belong to all.

    shared_by: so many processes share this one's GPU, and each takes an equal part of it. None: nobody has said, and
        each counts on what is free over those at work.

    Raises:
        UserError: an item cannot be done (those before it are kept), all rates of an arm diverged, or an earlier
            version asked the finished ones after other shots.
    """
    items = grid.work_of_seeds(seeds)
    for item in [item for item in items if item.kind == "train" and item.rate is None]:
        Trials(grid).refuse_all_diverged(item.arm, item.task)  # now, and not after the trials of other arms
    is_training = any(item.kind == "train" and not grid.is_done(item) for item in items)
    # A process that is alone matches every seed in any case; one of several would do so while the GPU waits.
    counted = grid.settings.seeds if shared_by is None else grid.settings.seeds[:1]
    notes = grid.matcher.list_notes(seeds=counted) if is_training else []
    if is_training:
        check_recipe(grid.config)
    for line in [*tell_overlaps(grid.inputs.overlaps or {}), *notes]:
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    titles = {item: f"[{number}/{len(items)}] {item.title}" for number, item in enumerate(items, start=1)}
    if not all(map(grid.is_done, items)):
        _refuse_other_streams(grid)
    worker, printed = Worker(grid, console, shared_by=shared_by), set[str]()
    with part_of_gpu(shared_by):
        while waits := _do_unclaimed(worker, items, titles=titles):
            for line in [line for process, line in waits.items() if process not in printed]:
                console.print(line, soft_wrap=True, highlight=False)
            printed.update(waits)
            worker.drop_model()  # those that are waited for may need its memory
            time.sleep(POLL_S)


def _do_unclaimed(worker: Worker, items: Sequence[WorkItem], *, titles: Mapping[WorkItem, str]) -> dict[str, str]:
    """Do all missing work that can be done and nobody else does.

    Returns each model that another process works on, with that process, and a line about it.
    """
    grid, waits = worker.grid, dict[str, str]()
    for item in items:
        if grid.is_done(item) or not all(map(grid.is_done, _needs_of(grid, item))):
            continue
        with claiming(grid.claim_file(item)) as holder:
            if holder is not None:
                process = holder.partition(" (since ")[0]  # the time is of one item
                waits[f"{process}: {item.model_title}"] = f"waiting for {holder}: {item.model_title}"
            elif not grid.is_done(item):  # another process may have done it just before the claim
                worker.do_timed(item, titles)
    return waits


def _needs_of(grid: Grid, item: WorkItem) -> list[WorkItem]:
    """Return what must be done before an item: the trials of its rate before a training, and that before the rest."""
    arm = ARMS[item.arm]
    if item.kind != "train":
        return [replace(item, kind="train")] if arm.trained else []
    rates = grid.config.rates_of(item.arm) if item.rate is None else ()
    return [trial for rate in rates for trial in Trials(grid).items(item.arm, rate, item.task)]


def _refuse_other_streams(grid: Grid) -> None:
    """Refuse to add answers to those of an earlier version: it drew other shots, so they would not be pairs."""
    for item in grid.work():
        path = grid.path_of(item)
        is_result = item.kind in SWEEP_KINDS and path.is_file()
        if not is_result:
            continue
        with redoable(path):
            streams = read_whole(path).get("streams")
        if streams != STREAMS:
            raise UserError(
                f"resume={grid.folder}: {path.relative_to(grid.folder)} was asked by another version of"
                " manyicl, which draws other shots; go on with that version, or start a new comparison"
            )


class Worker:
    """Does one item after the other, and keeps the model of the last one, which the next one often needs too."""

    def __init__(self, grid: Grid, console: Console, *, shared_by: int | None = None) -> None:
        self.grid, self.console, self.shared_by = grid, console, shared_by
        self.pace = Pace()
        self._loaded: tuple[tuple[object, ...], InferenceModel] | None = None

    def gpu_share(self) -> GpuShare:
        """Return what this process may count on of the GPU memory that it can have."""
        if self.shared_by is None:
            return GpuShare(self.grid.gpu_share())
        return GpuShare(is_part=self.shared_by > 1)

    def do_timed(self, item: WorkItem, titles: Mapping[WorkItem, str]) -> None:
        """Do one item, and print how long it took and how long the missing ones of `titles` will take."""
        started = time.monotonic()
        with sharing_gpu(lambda: self.gpu_share().fraction):
            diverged = self._do(item, titles[item])
        seconds = time.monotonic() - started
        if not diverged:  # one that did took less time than those that are left
            self.pace.add(item.pace_key, seconds)
        missing = [other.pace_key for other in titles if not self.grid.is_done(other)]
        seconds_left = self.pace.left(missing)  # None if there was only a trial that diverged
        about = "" if seconds_left is None else f", about {tell_seconds(seconds_left / self.grid.count_claims())}"
        left = f"; {len(missing)} left{about}" if missing else ""
        left += f"; diverged ({diverged}), so this rate counts as the worst" if diverged else ""
        self.console.print(f"{titles[item]}: done in {tell_seconds(seconds)}{left}", soft_wrap=True, highlight=False)
        if diverged:
            Trials(self.grid).refuse_all_diverged(item.arm, item.task)

    def _do(self, item: WorkItem, title: str) -> str:
        """Do one item; return what was not finite if it is of a trial that diverged, else ""."""
        try:
            DO[item.kind](self, item, title)
        except NonFiniteError as error:
            if item.rate is None:
                raise
            diverged = str(error).partition("; ")[0]  # without its advice: another rate is the fix
        else:
            return ""
        self.grid.keep_diverged(item, diverged)
        self.drop_model()
        return diverged

    def load_model(self, item: WorkItem) -> InferenceModel:
        """Return the model of an item, in the comparison's template and length."""
        if self._loaded is None or self._loaded[0] != item.model:
            self.drop_model()  # or two models would be in memory for a moment
            config = self.grid.config
            is_base = not ARMS[item.arm].trained
            model = load_for_inference(
                config.model if is_base else str(self.grid.path_of(replace(item, kind="train"))),
                precision=config.model.precision,
                max_tokens=config.max_tokens,
                template=config.template,
                trust_remote_code=config.model.trust_remote_code,
                frame=self.grid.frame,
            )
            self._loaded = item.model, model
        return self._loaded[1]

    def drop_model(self) -> None:
        """Free the memory of the model that the last item used."""
        self._loaded = None
        torch.cuda.empty_cache()  # does nothing without a GPU


def _train(worker: Worker, item: WorkItem, title: str) -> None:
    """Train a model, or continue; its checkpoints are removed once it is finished."""
    grid = worker.grid
    worker.drop_model()  # training needs its memory
    config, spent = recipe_of(grid, item)
    folder = grid.path_of(item)
    plan = json.dumps(asdict(spent) | {"learning_rate": config.train.learning_rate}, indent=1)
    write_atomically(plan_file(folder), plan + "\n")
    if _take_trial(grid, item, config):
        return
    texts = grid.texts if item.task is None else []
    drift = drift_every(texts, steps=grid.settings.drift_steps(config.train.num_steps))
    run = RunFolder(folder)
    resume = run.is_started
    if folder.exists() and not resume:
        shutil.rmtree(folder)  # a kill before the run began leaves nothing that can be continued
    train(
        config,
        out=folder,
        resume=resume,
        console=worker.console,
        title=title,
        callbacks=drift,
        frame=grid.frame,
        tasks=grid.matcher.tasks,
        gpu_share=worker.gpu_share(),
    )
    run.checkpoints.remove()
    torch.cuda.empty_cache()


def recipe_of(grid: Grid, item: WorkItem) -> tuple[RunConfig, Spent]:
    """Return the recipe of the run that an item's model comes from, and what it spends."""
    config, spent = grid.matcher.match(item.arm, seed=item.seed, task=item.task)
    rate = item.rate or Trials(grid).chosen_rate(item.arm, item.task)
    return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})}), spent


def _take_trial(grid: Grid, item: WorkItem, config: RunConfig) -> bool:
    """Copy the run of a finished trial that had the same recipe, if there is one; return whether there was."""
    rate = config.train.learning_rate
    folder, first = grid.path_of(item), grid.settings.seeds[0]
    if item.rate is not None or item.seed != first or rate not in grid.config.rates_of(item.arm):
        return False
    trial = RunFolder(grid.path_of(replace(item, rate=rate)))
    if folder.exists() or not (trial.is_finished and trial.model.is_dir()):
        return False
    if find_changes(trial.read_config(), absolute_paths(config)):
        return False
    # A kill while files are copied must not leave a folder that looks finished.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(trial.path, partial, ignore=shutil.ignore_patterns(trial.checkpoints.path.name))
    partial.rename(folder)
    return True


def _take_answers_of_trial(grid: Grid, item: WorkItem) -> bool:
    """Copy the validation answers of a trial whose run became this model, if there is one; return whether there was."""
    if item.kind != "validation" or item.rate is not None or not ARMS[item.arm].trained:
        return False
    run = RunFolder(grid.path_of(replace(item, kind="train")))
    trial = replace(item, rate=run.read_config().train.learning_rate)
    of_trial = RunFolder(grid.path_of(replace(trial, kind="train"))).state_file
    if not of_trial.is_file() or of_trial.read_bytes() != run.state_file.read_bytes():
        return False  # another seed's, or trained anew since
    if not grid.is_done(trial):
        return False
    replace(Evaluation.load(grid.path_of(trial)), model=str(run.path)).save(grid.path_of(item))
    return True


def _read_texts(worker: Worker, item: WorkItem, title: str) -> None:  # noqa: ARG001
    """Write what the windows of each neutral text cost a model, in bits."""
    model = worker.load_model(item)
    texts = [
        {
            "file": text.file,
            "bits": window_bits(model.model, text).tolist(),
            "bytes": text.num_bytes_W.tolist(),
            "bos": text.has_bos,
            "unknown_tokens": text.num_unknown,
        }
        for text in worker.grid.texts
    ]
    write_atomically(worker.grid.path_of(item), json.dumps({"texts": texts}) + "\n")


def _ask(worker: Worker, item: WorkItem, title: str) -> None:
    """Ask a model the tasks of an item, and write the result with its predictions."""
    if _take_answers_of_trial(worker.grid, item):
        return
    tasks, sweep = worker.grid.sweep_of(item)
    with reporting(worker.console) as report:
        evaluate_sweep(
            worker.load_model(item),
            tasks,
            sweep,
            allow_empty=True,  # none of the validation rows may fit, say
            out=worker.grid.path_of(item),
            on_progress=lambda what, done, total: report(f"{title} ({what})", done, total),
        )


DO: Mapping[WorkKind, Callable[[Worker, WorkItem, str], None]] = {
    "train": _train,
    "validation": _ask,
    "test": _ask,
    "text": _read_texts,
    "flip": _ask,
    "order": _ask,
}
