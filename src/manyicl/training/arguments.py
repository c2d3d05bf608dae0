"""A recipe's settings as transformers' Trainer takes them, and which of them a machine cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments

from manyicl.errors import UserError, suggest
from manyicl.models import check_bitsandbytes
from manyicl.training.graph import find_known_obstacle, tell_refused_graph
from manyicl.training.memory.optimizers import OPTIMIZERS
from manyicl.training.ranks import find_unshared
from manyicl.training.recipe import RunConfig, TrainSettings


def training_arguments(
    settings: TrainSettings, *, folder: Path, precision: str, seed: int, validated: bool, num_ranks: int
) -> TrainingArguments:
    """Return transformers' arguments for `settings` on `num_ranks` ranks.

    folder: where checkpoints go.

    Raises:
        UserError: the packs of a step cannot be shared out evenly, or the optimizer's package is not installed.
    """
    if OPTIMIZERS[settings.optim].needs_bitsandbytes:
        check_bitsandbytes(f"train.optim = '{settings.optim}'")
    if unshared := find_unshared(settings, num_ranks=num_ranks):
        raise UserError(unshared)
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.packs_at_once,
        gradient_accumulation_steps=settings.packs_per_step // (settings.packs_at_once * num_ranks),
        learning_rate=settings.learning_rate,
        optim=settings.optim,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        lr_scheduler_kwargs=_schedule_options(settings),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=on_cpu,
        seed=seed,
        data_seed=seed,
        logging_steps=settings.log_every_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every_steps,
        eval_strategy="steps" if validated else "no",
        eval_steps=settings.checkpoint_every_steps,
        metric_for_best_model="loss" if validated else None,
        greater_is_better=False,
        report_to=list(settings.report_to),
        run_name=folder.parent.name,
        project="manyicl",
        trackio_static_space_id=False,  # a run stays on this machine; TRACKIO_SPACE_ID sends it to a Space
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=not on_cpu,
        # A blocking copy would wait for the GPU at every micro-batch.
        accelerator_config={"non_blocking": not on_cpu},
        ddp_find_unused_parameters=False,
        # Buffers are constants here. Broadcasting them at each forward pass would need as many passes on all ranks,
        # which they do not have if episodes go through the model one at a time.
        ddp_broadcast_buffers=False,
        average_tokens_across_devices=False,
    )


def _schedule_options(settings: TrainSettings) -> dict[str, int]:
    """Return what the schedule needs beside the warm-up."""
    if settings.schedule != "warmup_stable_decay":
        return {}
    most = settings.num_steps - settings.warmup_steps
    return {"num_decay_steps": max(1, min(round(settings.decay_share * settings.num_steps), most))}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers' Trainer does not know, or whose package is not installed.

    Raises:
        UserError: as said.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"train.report_to: no tracker '{name}'{suggest(name, INTEGRATION_TO_CALLBACK)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(f"train.report_to: {name} is not installed; pip install {name}") from error


def find_refused(config: RunConfig, *, has_gpu: bool, num_ranks: int = 1) -> Iterator[str]:
    """Yield what a machine cannot do of a recipe, each with its fix, as far as it is known before a model is loaded.

    Raises:
        UserError: the model's config has to be read, and cannot.
    """
    train = config.train
    if train.recompute in ("offload", "tiled") and not has_gpu:
        yield f"train.recompute = '{train.recompute}': needs a GPU, whose memory it saves; set 'full' or 'auto'"
    if train.cuda_graph is True and (obstacle := find_known_obstacle(config, has_gpu=has_gpu, num_ranks=num_ranks)):
        yield tell_refused_graph(obstacle)


def check_recipe(config: RunConfig, *, num_ranks: int = 1) -> None:
    """Refuse a recipe that cannot be trained on this machine, before a task is read or anything is written.

    Raises:
        UserError: the first of `find_refused`, or what it raises.
    """
    for fault in find_refused(config, has_gpu=torch.cuda.is_available(), num_ranks=num_ranks):
        raise UserError(fault)
