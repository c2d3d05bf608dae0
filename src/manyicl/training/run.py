"""Fine-tune as a recipe says, into the folder of a run; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from manyicl.console import progress_bar
from manyicl.distributed import SharedError, leave_at_exit
from manyicl.episodes import Episode, Frame, TokenizedTask
from manyicl.errors import UserError, check_list, is_out_of_memory, take_path
from manyicl.files import default_folder
from manyicl.locks import sole_writer
from manyicl.models import (
    MODEL_FILES,
    TRIAL_TOKENS,
    ModelNote,
    ModelSettings,
    check_machine,
    flash_implementation,
    forget_kernels,
    isolation_fault,
    kernels_taken,
    load_model,
    save_beside_weights,
    trial_ids,
)
from manyicl.training.arguments import check_recipe, check_trackers, training_arguments
from manyicl.training.held_out import (
    HeldOutRow,
    answers_only_losses,
    draw_held_out,
    episode_losses,
    held_out_rows,
    rows_to_json,
)
from manyicl.training.memory.choice import WHOLE_GPU, GpuShare, PacksChoice
from manyicl.training.metrics import BarCallback, MetricsLog, PeakMemory
from manyicl.training.preparation import (
    Prepared,
    count_step_flops,
    find_shape,
    largest_row,
    most_shots,
    prepare_run,
    row_multiple,
)
from manyicl.training.ranks import FIXED, balance_steps, check_launch, refuse_data_parallel, share_packs, uses_fsdp
from manyicl.training.recipe import RunConfig, absolute_paths, load_recipe, with_batch
from manyicl.training.run_folder import (
    TRAINER_STATE,
    Run,
    RunFolder,
    RunState,
    read_best_step,
    refuse_damaged,
    refuse_other_sharding,
)
from manyicl.training.trainer import AnswerTrainer, LastStepCallback


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
    gpu_share: GpuShare = WHOLE_GPU,
) -> Run:
    """Fine-tune as a recipe says, into a new run directory; with `resume`, go on in the one that a kill left at `out`.

    A recipe to resume with may differ from the run's in the settings of `CHANGEABLE`, and in its paths if the same
    files lie in the new place. No other process may write to the run until this returns. title: what the progress
    bar calls it. callbacks: more of transformers' callbacks for the Trainer, made with the run's metrics.jsonl.
    on_prepared is called on the main process once the plan is made, before any weight is loaded.
    frame: of the chat style, the text around examples; None renders the chat template now. A run that is resumed keeps
    the one that it was started with, today's date of then included.
    console: where progress is printed. None: standard error; `rich.console.Console(quiet=True)`: nowhere.
    tasks: as `prepare_run` takes them, so that many runs on the same tasks read them once; None reads their files.
    gpu_share: what it may count on, if other processes use its GPU too.

    Raises:
        UserError: a fault in the recipe, the tasks or the model; overrides of a RunConfig; an `out` that exists
            (without `resume`); with `resume`, tasks or weights that are not those that the run was started on; another
            process at work on the run; a GPU that runs out of memory.
    """
    check_list("overrides", overrides)
    if isinstance(recipe, RunConfig) and overrides:
        raise UserError(f"overrides={list(overrides)}: are for a recipe that is read from a file; change the RunConfig")
    # Pass `cpu=` explicitly: otherwise accelerate ignores CPU launches and every process believes it is alone.
    # Ranks may wait long for the main process, which alone tokenises and measures what is held out.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    folder = _agree_on_folder(recipe, out)
    if resume and not folder.is_started:
        raise UserError(
            f"resume={folder}: no run was started there (no {folder.config_file.name}); name the folder of a run"
        )
    with _sole_writer_of_launch(folder.path, state):
        config = recipe if isinstance(recipe, RunConfig) else load_recipe(Path(recipe), overrides=overrides)
        # Its paths are absolute, so that the run can go on from any folder.
        config = folder.open(absolute_paths(config), resume=resume)
        known_packs = _read_packs(folder) if resume else None  # before config.toml is written anew
        return _train_in(
            folder,
            config,
            state=state,
            resume=resume,
            console=console or Console(stderr=True),
            title=title,
            callbacks=callbacks,
            on_prepared=on_prepared,
            frame=(folder.read_state().frame if resume else None) or frame,
            tasks=tasks,
            known_packs=known_packs,
            gpu_share=gpu_share,
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
    folder: RunFolder,
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
    known_packs: PacksChoice | None,
    gpu_share: GpuShare,
) -> Run:
    """Do what `train` says in a folder that only this launch writes to."""
    _check_settings(config, state)
    console.quiet = console.quiet or not state.is_main_process
    with state.main_process_first():
        prepared = prepare_run(config, frame=frame, tasks=tasks)
    make_arguments = partial(
        training_arguments,
        folder=folder.checkpoints.path,
        precision=config.model.precision,
        seed=config.seed,
        validated=bool(prepared.validation[1]),
        num_ranks=state.num_processes,
    )
    # What cannot be trained is refused before a weight is loaded; how many packs are joined is known after that.
    args = make_arguments((with_batch(config, 1) if config.train.packs_per_batch == "auto" else config).train)
    check_machine(config.model, trainable=True, device=args.device)
    if resume:
        folder.refuse_other_data(prepared)
    if state.is_main_process:
        on_prepared(prepared)
        folder.start(prepared)
    transformers_logging.disable_progress_bar()  # one bar is enough
    set_seed(config.seed)
    with _enough_memory("loading the model", fix="try model.precision = 'bf16' with model.lora, or shard it over GPUs"):
        model = load_model(config.model, trainable=True, device=args.device)
    with _enough_memory("trying the model on rows of several episodes", fix="lower episodes.token_budget"):
        fault = _try_rows(folder, model, prepared, is_main=state.is_main_process)
    chosen = share_packs(prepared, device=args.device, fault=fault, known=known_packs, gpu_share=gpu_share)
    prepared = replace(prepared, config=with_batch(config, chosen.number))
    args = make_arguments(prepared.config.train)
    if state.is_main_process:
        folder.update_state(packs_per_batch=chosen.number, packs_reason=chosen.reason)
    held_out = draw_held_out(
        prepared.tasks,
        num_episodes=config.held_out.episodes,
        token_budget=config.episodes.token_budget,
        seed=config.seed,
    )
    with _enough_memory("measuring held-out losses", fix="start anew with a lower episodes.token_budget"):
        before = _open_held_out(folder, model, prepared, held_out) if state.is_main_process else {}
    started = time.monotonic()
    with progress_bar(console, total=config.train.num_steps) as bar:
        more = (BarCallback(bar, title), *callbacks(folder.metrics))
        _train_model(model, prepared, args=args, folder=folder, callbacks=more)
    rows: list[HeldOutRow] = []
    if state.is_main_process:
        _finish_model(folder, model, prepared)
        with _enough_memory("measuring held-out losses", fix="the model is whole; go on with `resume`"):
            rows = _close_held_out(folder, prepared, held_out, before=before)
        seconds = round(time.monotonic() - started, 1)  # of this process, so not of what ran before a kill
        folder.update_state(finished=True, last_process_s=seconds, held_out=rows_to_json(rows))
    state.wait_for_everyone()
    leave_at_exit()
    return Run(folder=folder.path, model=folder.model, held_out=tuple(rows), is_main_process=state.is_main_process)


def _check_settings(config: RunConfig, state: PartialState) -> None:
    """Refuse what this launch or this machine cannot do, before a task or a weight is read."""
    check_launch(os.environ, optim=config.train.optim)
    check_trackers(config.train.report_to)
    check_recipe(config, num_ranks=state.num_processes)
    refuse_data_parallel(torch.cuda.device_count(), num_ranks=state.num_processes, command=("manyicl", *sys.argv[1:]))


def _read_packs(folder: RunFolder) -> PacksChoice | None:
    """Return how many packs a run that left it to the device joined; None if it has not chosen, or did not leave it."""
    state = folder.read_state()
    if load_recipe(folder.config_file).train.packs_per_batch != "auto" or state.packs_per_batch is None:
        return None
    # A process that was killed between a change of the setting and its choice leaves the number that was fixed before.
    if state.packs_reason == FIXED:
        return None
    return PacksChoice(state.packs_per_batch, state.packs_reason or "")


def _try_rows(folder: RunFolder, model: Any, prepared: Prepared, *, is_main: bool) -> str:
    """Return why episodes must go through the model one at a time, '' if they need not, and keep it in run.json."""
    text = trial_ids(prepared.tokenizer, TRIAL_TOKENS)
    fault = isolation_fault(model, text, longest=prepared.config.episodes.token_budget)
    if is_main:
        rows = {"episodes": "alone" if fault else "together", "reason": fault}
        folder.update_state(rows=rows)
    return fault


@contextmanager
def _enough_memory(what: str, *, fix: str) -> Iterator[None]:
    """Turn a GPU's lack of memory in the block into one line. what: what the block does."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # as `AnswerTrainer.train_packs` does
        raise UserError(f"the GPU is out of memory, {what}; free it from other programs, or {fix}") from error


def _agree_on_folder(recipe: str | Path | RunConfig, out: str | Path | None) -> RunFolder:
    """Return the run's folder, the main process's on all ranks: its default name holds the time."""
    stem = "run" if isinstance(recipe, RunConfig) else Path(take_path("recipe", recipe)).stem
    names = [str(take_path("out", out) if out is not None else default_folder(stem))]
    broadcast_object_list(names)
    return RunFolder(names[0])


def _train_model(
    model: Any, prepared: Prepared, *, args: Any, folder: RunFolder, callbacks: Sequence[TrainerCallback]
) -> None:
    checkpoints = folder.checkpoints.all()
    step, checkpoint = checkpoints[-1] if checkpoints else (0, None)
    if checkpoint is not None:
        refuse_damaged(checkpoint)
    patience = prepared.config.train.early_stopping_patience
    has_ended = checkpoint is not None and patience is not None and _count_worse(checkpoint) >= patience
    if step >= prepared.config.train.num_steps or has_ended:
        return  # killed after the last checkpoint, before the model was written
    if checkpoint is not None:
        refuse_other_sharding(checkpoint, sharded=uses_fsdp(os.environ))
    if PartialState().is_main_process:
        folder.metrics.cut_after(step)
    config = prepared.config
    packs, shape = prepared.packs, find_shape(config)
    num_ranks = PartialState().num_processes
    order = balance_steps(packs, shape=shape, num_ranks=num_ranks, packs_per_batch=config.train.packs_at_once)
    multiple = row_multiple(config.row_tokens, device=args.device, compiled=config.train.compile)
    trainer = AnswerTrainer(
        model,
        args=args,
        recipe=config,
        packs=packs.arranged(order=order, row_multiple=multiple),
        row=largest_row(packs, config=config),
        step_flops=count_step_flops(packs, shape) if shape is not None else (),
        validation=prepared.validation,
        metrics=folder.metrics,
        callbacks=[LastStepCallback(), *([PatienceCallback(patience)] if patience else []), *callbacks],
    )
    trainer.add_callback(_UsageCallback(folder, trainer))
    try:
        trainer.train_packs(checkpoint)
    finally:
        trainer.remove_callback(_UsageCallback)  # each holds the other: weights and optimizer would outlive this


class PatienceCallback(EarlyStoppingCallback):
    """Ends training after so many validations without a better loss; a run that is resumed goes on counting."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Read how many there were before the checkpoint."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is not None:
            self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Count, and keep the count in the state, which each checkpoint has."""
        trainers_own: Any = super()
        trainers_own.on_evaluate(args, state, control, metrics, **kwargs)
        state.stateful_callbacks[type(self).__name__] = self.state()


def _count_worse(checkpoint: Path) -> int:
    """Return how many validations in a row had no better loss when the checkpoint was written."""
    callbacks = json.loads((checkpoint / TRAINER_STATE).read_bytes()).get("stateful_callbacks") or {}
    kept = callbacks.get(PatienceCallback.__name__)
    return 0 if kept is None else int(kept["attributes"]["early_stopping_patience_counter"])


class _UsageCallback(TrainerCallback):
    """Keeps in run.json what training has taken so far, over all processes of a run that was killed and resumed.

    Each process counts from the start of its training up to its last logged step; validation and checkpoints are in it.
    How it went about it is the last process's.
    """

    def __init__(self, folder: RunFolder, trainer: AnswerTrainer) -> None:
        self.folder = folder
        self.trainer = trainer
        self.started = time.monotonic()
        self.peak = PeakMemory(trainer.args.device)
        self.before: RunState | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Read what earlier processes took."""
        self.before = self.folder.read_state()
        forget_kernels()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Add what this one took."""
        if not state.is_world_process_zero:
            return
        assert self.before is not None
        peaks = [peak for peak in (self.before.peak_bytes, self.peak.read()) if peak is not None]
        recompute = self.trainer.recompute
        self.folder.update_state(
            wall_s=round((self.before.wall_s or 0.0) + time.monotonic() - self.started, 3),
            peak_bytes=max(peaks, default=None),
            recomputed_layers=recompute.num_layers,
            attention_recomputed=recompute.num_layers > 0 and not self.trainer.attention.is_kept,
            inputs_in_host=recompute.offload,
            feed_forward_in_tiles=recompute.tiles,
            cuda_graph=self.trainer.graph is not None,
            cuda_graph_reason=self.trainer.graph_reason,
            flash_attention=flash_implementation(),
            attention_kernels=kernels_taken(),
        )


def _finish_model(folder: RunFolder, model: Any, prepared: Prepared) -> None:
    """Make `model/` of the best checkpoint, or of the last, as the recipe says."""
    if folder.model.is_dir():
        return
    step, checkpoint = folder.checkpoints.all()[-1]
    best = read_best_step(checkpoint)
    if prepared.config.train.keep == "best" and best is not None:
        step, checkpoint = best, folder.checkpoints.at(best)
        refuse_damaged(checkpoint)
    note = ModelNote(
        template=prepared.config.template,
        trained_shots=most_shots(prepared.packs),
        token_budget=prepared.config.episodes.token_budget,
        frame=prepared.frame if prepared.config.template.style == "chat" else None,
        quantize=prepared.config.model.quantize,
    )
    # The live model may be sharded over ranks, so the weights are the checkpoint's own files; it gives the config.
    with folder.writing_model() as partial:
        for pattern in ("*.safetensors*", "*.py", *MODEL_FILES):  # *.py: a model's own code
            for file in checkpoint.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        save_beside_weights(model, prepared.tokenizer, partial, note=note)
    ended = folder.checkpoints.all()[-1][0]
    stopped = {"stopped_step": ended} if ended < prepared.config.train.num_steps else {}
    folder.update_state(model_step=step, **stopped)


def _open_held_out(
    folder: RunFolder, model: Any, prepared: Prepared, episodes: dict[str, list[Episode]]
) -> dict[str, list[float]]:
    path, fix = prepared.config.model.path, "it is broken, or needs model.precision = 'fp32'"
    return folder.take_losses_before(lambda: episode_losses(model.eval(), prepared.tasks, episodes, name=path, fix=fix))


def _close_held_out(
    folder: RunFolder, prepared: Prepared, episodes: dict[str, list[Episode]], *, before: dict[str, list[float]]
) -> list[HeldOutRow]:
    if not any(episodes.values()):
        return []
    model = prepared.config.model
    settings = ModelSettings(
        path=str(folder.model),
        precision="fp32" if model.lora is None else model.precision,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
    )
    final = load_model(settings, device="cuda" if torch.cuda.is_available() else "cpu").eval()
    fix = "the last update spoilt it; start a new run with a lower train.learning_rate, or model.precision = 'fp32'"
    return held_out_rows(
        prepared.tasks,
        episodes,
        before=before,
        after=episode_losses(final, prepared.tasks, episodes, name=str(folder.model), fix=fix),
        answers_only=answers_only_losses(prepared.tasks, episodes),
    )
