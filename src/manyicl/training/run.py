"""A run is one directory: resolved config, versions, data hashes, metrics, checkpoints, and the model it ends with.

config.toml    every setting, resolved; `--resume` goes on from it, and writes what was changed of `CHANGEABLE`
run.json       versions, git commit, hashes of data and plan, counts, the held-out table; `finished` once it is
metrics.jsonl  one JSON object a line: training losses, losses by shot index, validation losses by task
checkpoints/   whole checkpoints only: the last and the best
model/         Hugging Face layout with tokenizer; loads with nothing of ours
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from manyicl.console import progress_bar
from manyicl.distributed import SharedError, leave_at_exit
from manyicl.episodes import Episode, Frame, TokenizedTask
from manyicl.errors import UserError
from manyicl.files import default_folder, sync_tree, write_atomically
from manyicl.locks import LOCK, sole_writer
from manyicl.models import (
    MODEL_FILES,
    TRIAL_TOKENS,
    ModelNote,
    ModelSettings,
    ModelShape,
    flash_implementation,
    forget_kernels,
    isolation_fault,
    kernels_taken,
    load_config,
    load_model,
    resolve_precision,
    save_beside_weights,
    shape_model,
    trial_ids,
)
from manyicl.training.fsdp import check_launch
from manyicl.training.held_out import (
    HeldOutRow,
    answers_only_losses,
    draw_held_out,
    episode_losses,
    held_out_rows,
    rows_to_json,
)
from manyicl.training.metrics import BarCallback, MetricsLog
from manyicl.training.preparation import Prepared, prepare_run
from manyicl.training.recipe import RunConfig, absolute_paths, dump_config, load_recipe, with_precision
from manyicl.training.run_folder import (
    CHANGEABLE,
    MOVABLE,
    Run,
    describe_run,
    find_changes,
    is_finished,
    read_frame,
    read_json,
    to_json,
)
from manyicl.training.throughput import PeakMemory, share_out
from manyicl.training.trainer import (
    AnswerTrainer,
    LastStepCallback,
    list_checkpoints,
    refuse_data_parallel,
    train_packs,
    training_arguments,
)


def train(
    recipe: str | Path | RunConfig,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    console: Console | None = None,
    title: str = "train",
    callbacks: Callable[[MetricsLog], Sequence[TrainerCallback]] = lambda metrics: (),
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    frame: Frame | None = None,
    tasks: Mapping[str, TokenizedTask] | None = None,
) -> Run:
    """Fine-tune as a recipe says, into a new run directory; with `resume`, go on in the one that a kill left at `out`.

    A recipe to resume with may differ from the run's in the settings of `CHANGEABLE`, and in those of `MOVABLE` if the
    same files lie in the new place. No other process may write to the run until this returns. title: what the progress
    bar calls it. callbacks: more of transformers' callbacks for the Trainer, made with the run's metrics.jsonl.
    on_prepared is called on the main process once the plan is made, before any weight is loaded.
    frame: of the chat style, the text around examples; None renders the chat template now. A run that is resumed keeps
    the one that it was started with, today's date of then included.
    tasks: as `prepare_run` takes them, so that many runs on the same tasks read them once; None reads their files.

    Raises:
        UserError: a fault in the recipe, the tasks or the model; an `out` that exists (without `resume`); with
            `resume`, tasks or weights that are not those that the run was started on; another process at work on the
            run; a GPU that runs out of memory.
    """
    # Told so, accelerate joins a CPU launch's processes too; else each would take itself for the only one.
    # Ranks may wait long for the main process, which alone tokenises and measures what is held out.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    folder = _agree_on_folder(recipe, out)
    if resume and not (folder / "config.toml").is_file():
        raise UserError(f"--resume {folder}: no run was started there (no config.toml); name the folder of a run")
    with _sole_writer_of_launch(folder, state):
        folder, config = _open_run(recipe, out=folder, overrides=overrides, resume=resume)
        return _train_in(
            folder,
            config,
            state=state,
            resume=resume,
            console=console or Console(stderr=True),
            title=title,
            callbacks=callbacks,
            on_prepared=on_prepared,
            frame=(read_frame(folder) if resume else None) or frame,
            tasks=tasks,
        )


@contextmanager
def _sole_writer_of_launch(folder: Path, state: PartialState) -> Iterator[None]:
    """Hold the lock of `folder` on the main process; if it cannot be had, all processes raise the same error."""
    with ExitStack() as stack:
        faults = [""]
        if state.is_main_process:
            try:
                stack.enter_context(sole_writer(folder))
            except UserError as error:
                faults = [str(error)]
        broadcast_object_list(faults)
        if faults[0]:
            raise SharedError(faults[0])
        yield


def _train_in(
    folder: Path,
    config: RunConfig,
    *,
    state: PartialState,
    resume: bool,
    console: Console,
    title: str,
    callbacks: Callable[[MetricsLog], Sequence[TrainerCallback]],
    on_prepared: Callable[[Prepared], None],
    frame: Frame | None,
    tasks: Mapping[str, TokenizedTask] | None,
) -> Run:
    """Do what `train` says in a folder that only this launch writes to."""
    check_launch(os.environ)
    refuse_data_parallel(torch.cuda.device_count(), num_ranks=state.num_processes, command=("manyicl", *sys.argv[1:]))
    console.quiet = console.quiet or not state.is_main_process
    with state.main_process_first():
        prepared = prepare_run(config, frame=frame, tasks=tasks)
    args = training_arguments(
        config.train,
        folder=folder,
        precision=config.model.precision,
        seed=config.seed,
        validated=bool(prepared.validation[1]),
        num_ranks=state.num_processes,
    )
    if resume:
        _refuse_other_data(folder, prepared)
    if state.is_main_process:
        on_prepared(prepared)
        _start_folder(folder, prepared)
    transformers_logging.disable_progress_bar()  # one bar is enough
    set_seed(config.seed)
    with _enough_memory("loading the model", fix="try model.precision = 'bf16' with model.lora, or shard it over GPUs"):
        model = load_model(config.model, trainable=True).to(args.device)
    with _enough_memory("trying the model on rows of several episodes", fix="lower episodes.token_budget"):
        _try_rows(folder, model, prepared, is_main=state.is_main_process)
    held_out = _held_out_episodes(prepared)
    with _enough_memory("measuring held-out losses", fix="start anew with a lower episodes.token_budget"):
        before = _losses_before(folder, model, prepared, held_out) if state.is_main_process else {}
    started = time.monotonic()
    with progress_bar(console, total=config.train.num_steps) as bar:
        more = (BarCallback(bar, title), *callbacks(MetricsLog(folder / "metrics.jsonl")))
        _train_model(model, prepared, args=args, folder=folder, callbacks=more)
    rows: list[HeldOutRow] = []
    if state.is_main_process:
        _finish_model(folder, model, prepared)
        with _enough_memory("measuring held-out losses", fix="the model is whole; go on with --resume"):
            rows = _close_held_out(folder, prepared, held_out, before=before)
        _close_run(folder, rows, seconds=time.monotonic() - started)
    state.wait_for_everyone()
    leave_at_exit()
    return Run(folder=folder, model=folder / "model", held_out=tuple(rows), is_main_process=state.is_main_process)


def _try_rows(folder: Path, model: Any, prepared: Prepared, *, is_main: bool) -> None:
    """Find out whether rows of several episodes may go through the model, and keep the answer in run.json."""
    text = trial_ids(prepared.tokenizer, TRIAL_TOKENS)
    fault = isolation_fault(model, text, longest=prepared.config.episodes.token_budget)
    if is_main:
        rows = {"episodes": "alone" if fault else "together", "reason": fault}
        write_atomically(folder / "run.json", to_json({**read_json(folder / "run.json"), "rows": rows}))


@contextmanager
def _enough_memory(what: str, *, fix: str) -> Iterator[None]:
    """Tell in one line where a GPU runs out of memory in the block, which is `what`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU is out of memory, {what}; free it from other programs, or {fix}") from error


def _open_run(
    recipe: str | Path | RunConfig, *, out: Path, overrides: Sequence[str], resume: bool
) -> tuple[Path, RunConfig]:
    """Return the run's folder and its config, its paths absolute so that it can go on from anywhere."""
    folder = out
    config = absolute_paths(recipe if isinstance(recipe, RunConfig) else load_recipe(Path(recipe), overrides=overrides))
    started = (folder / "config.toml").is_file()
    # Compared as settings, not as text: a run started before a setting was added has its default.
    there = load_recipe(folder / "config.toml") if resume else None
    if config.model.precision == "auto":  # a run goes on in the precision that it was started in, on any machine
        config = with_precision(config, resolve_precision("auto" if there is None else there.model.precision))
    changes: dict[str, Any] = find_changes(there, config) if there is not None else {}
    others = [key for key in changes if key.removeprefix("train.") not in CHANGEABLE and key not in MOVABLE]
    if others:
        raise UserError(
            f"--resume {folder}: {', '.join(others)} would be another than in the run's config.toml; leave it out to"
            f" go on (only train.{', train.'.join(CHANGEABLE)} may change), or start a new run"
        )
    if resume:
        _refuse_moved(folder, config)
    elif any(path.name != LOCK for path in folder.iterdir()):
        fix = f"go on with --resume {folder}, or name another" if started else "name another"
        raise UserError(f"--out {folder}: is not empty; {fix}")
    return folder, config


def _refuse_moved(folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run whose tasks or base have gone, as they do when a project is moved.

    Raises:
        UserError: naming what has gone, and how to say where it is now.
    """
    places = {"tasks.folder": Path(config.tasks.folder), "model.path": Path(config.model.path)}
    gone = {key: path for key, path in places.items() if path.is_absolute() and not path.exists()}
    if gone:
        told = " and ".join(f"{key} = {path}" for key, path in gone.items())
        raise UserError(
            f"--resume {folder}: {told} is not there any more; if it was moved, say where it is now: manyicl train"
            f" --resume {folder} {' '.join(f'{key}=PATH' for key in gone)}"
        )


def _agree_on_folder(recipe: str | Path | RunConfig, out: str | Path | None) -> Path:
    """Return the run's folder, the main process's on all ranks: its default name holds the time."""
    stem = "run" if isinstance(recipe, RunConfig) else Path(recipe).stem
    names = [str(out if out is not None else default_folder(stem))]
    broadcast_object_list(names)
    return Path(names[0])


def _refuse_other_data(folder: Path, prepared: Prepared) -> None:
    """Refuse to go on with tasks that changed since the run was started: its packs would be others.

    Raises:
        UserError: naming the first task that differs.
    """
    before, now = read_json(folder / "run.json"), describe_run(prepared)
    for name, entry in now["tasks"].items():
        if before["tasks"].get(name, {}).get("sha256") != entry["sha256"]:
            raise UserError(
                f"--resume {folder}: task '{name}' is not what it was when the run was started; put its files back, or"
                " start a new run"
            )
    if before.get("weights", now["weights"]) != now["weights"]:  # runs of earlier versions do not say
        raise UserError(
            f"--resume {folder}: model.path = {now['model']} holds other weights than the run was started on; put them"
            " back, or name the folder that they were moved to"
        )
    if before["plan"] != now["plan"]:
        raise UserError(
            f"--resume {folder}: it was started with another tokenizer or version of manyicl, and its plan of packs"
            " would be another now; go on with those, or start a new run"
        )


def _start_folder(folder: Path, prepared: Prepared) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for leftover in (folder / "checkpoints").glob(".saving-*"):
        shutil.rmtree(leftover)
    resolved = folder / "config.toml"
    if not resolved.exists():
        write_atomically(folder / "run.json", to_json(describe_run(prepared)))
        write_atomically(resolved, dump_config(prepared.config))
        return
    changes = find_changes(load_recipe(resolved), prepared.config)
    if changes and not is_finished(folder):
        step = max((step for step, _ in list_checkpoints(folder / "checkpoints")), default=0)
        content = read_json(folder / "run.json")
        content["changes"] = [*content.get("changes", []), {"after_step": step, **changes}]
        write_atomically(folder / "run.json", to_json(content))
        write_atomically(resolved, dump_config(prepared.config))


def _train_model(
    model: Any, prepared: Prepared, *, args: Any, folder: Path, callbacks: Sequence[TrainerCallback]
) -> None:
    checkpoints = list_checkpoints(folder / "checkpoints")
    step, checkpoint = checkpoints[-1] if checkpoints else (0, None)
    if step >= prepared.config.train.num_steps:
        return  # killed after the last checkpoint, before the model was written
    if checkpoint is not None:
        _refuse_damaged(checkpoint)
    metrics = MetricsLog(folder / "metrics.jsonl")
    if PartialState().is_main_process:
        metrics.cut_after(step)
    config = prepared.config
    share_out(
        prepared.packs,
        shape=_find_shape(config),
        num_ranks=PartialState().num_processes,
        packs_per_batch=config.train.packs_per_batch,
    )
    trainer = AnswerTrainer(
        model,
        args=args,
        packs=prepared.packs,
        validation=prepared.validation,
        metrics=metrics,
        callbacks=[LastStepCallback(), *callbacks],
    )
    trainer.add_callback(_UsageCallback(folder, trainer))
    train_packs(trainer, settings=config.train, row_tokens=config.row_tokens, checkpoint=checkpoint)


def _refuse_damaged(checkpoint: Path) -> None:
    """Refuse a checkpoint of which a file is cut short or empty, before anything is loaded from it.

    Raises:
        UserError: naming the file, and how to go on without the checkpoint.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path):  # what torch.save writes; its directory stands at the end
                    pass
            elif path.suffix == ".json":
                read_json(path)
        except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
            raise UserError(
                f"{path}: is damaged ({error}); remove {checkpoint} and go on from the checkpoint before it, or"
                f" from the start: manyicl train --resume {checkpoint.parents[1]}"
            ) from error


def _find_shape(config: RunConfig) -> ModelShape | None:
    """Return what the model's FLOPs are counted from; None where a layer's are not known."""
    try:
        trust = config.model.trust_remote_code
        return shape_model(load_config(config.model), lora=config.model.lora, trust_remote_code=trust)
    except UserError:
        return None


class _UsageCallback(TrainerCallback):
    """Keeps in run.json what training has taken so far, over all processes of a run that was killed and resumed.

    Each process counts from the start of its training up to its last logged step; validation and checkpoints are in it.
    How it went about it is the last process's.
    """

    def __init__(self, folder: Path, trainer: AnswerTrainer) -> None:
        self.path = folder / "run.json"
        self.trainer = trainer
        self.started = time.monotonic()
        self.peak = PeakMemory(trainer.args.device)
        self.before: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Read what earlier processes took."""
        self.before = read_json(self.path)
        forget_kernels()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Add what this one took."""
        if not state.is_world_process_zero:
            return
        seconds = self.before.get("wall_s", 0.0) + time.monotonic() - self.started
        peaks = [peak for peak in (self.before.get("peak_bytes"), self.peak.read()) if peak is not None]
        num_layers = self.trainer.checkpointed.num_layers
        taken = {
            "wall_s": round(seconds, 3),
            "peak_bytes": max(peaks, default=None),
            "checkpointed_layers": num_layers,
            "attention_recomputed": num_layers > 0 and not self.trainer.attention.keeps_attention,
            "flash_attention": flash_implementation(),
            "attention_kernels": kernels_taken(),
        }
        write_atomically(self.path, to_json({**read_json(self.path), **taken}))


def _finish_model(folder: Path, model: Any, prepared: Prepared) -> None:
    """Make `model/` of the best checkpoint, or of the last, as the recipe says."""
    if (folder / "model").is_dir():
        return
    step, checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    best = state["best_global_step"]
    if prepared.config.train.keep == "best" and best:
        step, checkpoint = best, folder / "checkpoints" / f"checkpoint-{best}"
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    note = ModelNote(
        template=prepared.config.template,
        trained_shots=_trained_shots(prepared),
        token_budget=prepared.config.episodes.token_budget,
        frame=prepared.frame if prepared.config.template.style == "chat" else None,
    )
    # The live model may be sharded over ranks, so the weights are the checkpoint's own files; it gives the config.
    partial.mkdir()
    for pattern in ("*.safetensors*", *MODEL_FILES):
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, partial / file.name)
    save_beside_weights(model, prepared.tokenizer, partial, note=note)
    sync_tree(partial)
    partial.rename(folder / "model")
    write_atomically(folder / "run.json", to_json({**read_json(folder / "run.json"), "model_step": step}))


def _trained_shots(prepared: Prepared) -> dict[str, int]:
    most: dict[str, int] = {}
    for pack in prepared.packs.packs:
        for episode in pack.episodes:
            most[episode.task] = max(most.get(episode.task, 0), len(episode.examples) - 1)
    return most


def _held_out_episodes(prepared: Prepared) -> dict[str, list[Episode]]:
    config = prepared.config
    return draw_held_out(
        prepared.tasks,
        num_episodes=config.held_out.episodes,
        token_budget=config.episodes.token_budget,
        seed=config.seed,
    )


def _losses_before(
    folder: Path, model: Any, prepared: Prepared, episodes: dict[str, list[Episode]]
) -> dict[str, list[float]]:
    """Return the untrained model's held-out losses, measured once a run (a resumed run has no untrained model)."""
    path = folder / "held_out_before.json"
    if not path.exists():
        write_atomically(path, to_json(episode_losses(model.eval(), prepared.tasks, episodes)))
    losses: dict[str, list[float]] = read_json(path)
    return losses


def _close_held_out(
    folder: Path, prepared: Prepared, episodes: dict[str, list[Episode]], *, before: dict[str, list[float]]
) -> list[HeldOutRow]:
    if not any(episodes.values()):
        return []
    precision = "fp32" if prepared.config.model.lora is None else prepared.config.model.precision
    final = load_model(ModelSettings(path=str(folder / "model"), precision=precision)).eval()
    final.to("cuda" if torch.cuda.is_available() else "cpu")
    return held_out_rows(
        prepared.tasks,
        episodes,
        before=before,
        after=episode_losses(final, prepared.tasks, episodes),
        answers_only=answers_only_losses(prepared.tasks, episodes),
    )


def _close_run(folder: Path, rows: Sequence[HeldOutRow], *, seconds: float) -> None:
    """Mark the run as finished. seconds: of this process, so not of what ran before a kill."""
    content = read_json(folder / "run.json")
    content |= {"finished": True, "last_process_s": round(seconds, 1), "held_out": rows_to_json(rows)}
    write_atomically(folder / "run.json", to_json(content))
