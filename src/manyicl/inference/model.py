"""A model loaded for inference, with its tokenizer, template and limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyicl.episodes import (
    Frame,
    TaskTokenizer,
    TemplateSettings,
    TokenizedTask,
    check_lost_answers,
    default_cache_dir,
    tokenize_task,
)
from manyicl.errors import UserError, take_path, take_whole
from manyicl.inference.sharing import TRIAL_TOKENS, sharing_fault
from manyicl.models import (
    ModelSettings,
    PrecisionChoice,
    QuantizationChoice,
    check_vocabulary,
    check_window,
    device_of,
    join_projections,
    load_config,
    load_end_ids,
    load_model,
    load_tokenizer,
    max_tokens_of,
    read_note,
    refuse_unusable,
    resolve_precision,
    trial_ids,
)
from manyicl.tasks import Task


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model ready to answer, with its tokenizer in the template that it was trained with."""

    path: str
    """The checkpoint, adapter, run or hub name that it was loaded from."""
    model: Any
    """The weights, in eval mode on their device; None if a server has them."""
    tokenizer: TaskTokenizer
    """Writes tasks in the model's ids."""
    max_tokens: int
    """The longest sequence it may see."""
    trained_shots: dict[str, int]
    """Task name -> most shots that one of its answers was trained after; empty for a plain checkpoint."""
    compiled: bool = False
    """Whether pieces of it run compiled while it answers (`models.fused_pieces`)."""

    def __repr__(self) -> str:
        """Say what it is in one line: torch would list every layer."""
        device = "a server" if self.model is None else device_of(self.model)
        return f"InferenceModel({self.path!r}, {self.max_tokens:,} tokens, {device})"

    @property
    def on_cpu(self) -> bool:
        """Whether its weights are here, on a CPU."""
        return self.model is not None and device_of(self.model).type == "cpu"

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Let the model answer in the block: on a GPU by fewer kernels, and with its compiled pieces, if any."""
        from manyicl.models import fused_pieces, lean_pieces, plain_layers

        lean = self.model is not None and not self.on_cpu
        with (
            lean_pieces(self.model) if lean else nullcontext(),
            plain_layers() if lean and not self.compiled else nullcontext(),
            fused_pieces(self.model) if self.compiled else nullcontext(),
        ):
            yield


def load_for_inference(
    model: str | Path | ModelSettings,
    *,
    precision: PrecisionChoice = "auto",
    max_tokens: int | None = None,
    template: TemplateSettings | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    compiled: bool = False,
    frame: Frame | None = None,
    quantize: QuantizationChoice = "auto",
) -> InferenceModel:
    """Load a checkpoint, adapter or run, onto the GPU if there is one.

    model: its path, or the settings of a base whose config or revision a recipe changes.
    precision: "auto" is bf16 if the device multiplies it in hardware, else fp32.
    max_tokens: longest sequence. Default: the token budget it was trained with; of other models all they can see.
    template: default: the one that the model was trained with.
    weights: False if a server has them, and only tokenizer, template and limits are needed.
    compiled: compile pieces of the model, on a GPU; takes a minute, and pays if many queries follow long prefixes.
    frame: the text around examples in the chat style. Default: the one that the model was trained with, or else what
        its chat template writes today.
    quantize: how the base's linear layers are stored: "nf4", "float8", "none", or "auto", as they were when its adapter
        was trained; else as `model` says.

    Raises:
        UserError: it cannot be loaded or compiled, its tokens see those after them, or `max_tokens` is less than 1
            or more than it can see.
    """
    on_gpu = torch.cuda.is_available()
    if compiled:
        _check_compiled(on_gpu=on_gpu)
    given = model if isinstance(model, ModelSettings) else ModelSettings(path=str(take_path("model", model)))
    path, note = given.path, read_note(given.path)
    as_trained = note.quantize or given.quantize
    settings = given.model_copy(
        update={
            "precision": resolve_precision(precision),
            "quantize": as_trained if quantize == "auto" else None if quantize == "none" else quantize,
            "lora": None,
            "trust_remote_code": trust_remote_code or given.trust_remote_code,
        }
    )
    config = load_config(settings)
    if max_tokens is not None:
        max_tokens = take_whole("max_tokens", max_tokens)
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: needs at least 1")
        check_window(config, num_tokens=max_tokens, what="`max_tokens`")
    if frame is None and template in (None, note.template):
        frame = note.frame
    tokenizer = TaskTokenizer(
        load_tokenizer(settings), template or note.template, frame=frame, end_ids=load_end_ids(settings)
    )
    loaded = load_model(settings, device="cuda" if on_gpu else "cpu").eval() if weights else None
    if loaded is not None:
        if on_gpu and not compiled:  # compiled layers call each projection by itself
            join_projections(loaded)
        text = np.asarray(trial_ids(tokenizer.tokenizer, TRIAL_TOKENS), dtype=np.int32)
        if sharing_fault(loaded, text):
            refuse_unusable(loaded, text)  # processing every prompt as a whole would not help such a model
    return InferenceModel(
        path=path,
        model=loaded,
        tokenizer=tokenizer,
        max_tokens=max_tokens or min(max_tokens_of(config), note.token_budget or max_tokens_of(config)),
        trained_shots=note.trained_shots,
        compiled=compiled,
    )


def _check_compiled(*, on_gpu: bool) -> None:
    """Refuse to compile without a GPU or a compiler."""
    if not on_gpu:
        raise UserError("`compiled`: works on a GPU only, and there is none here; leave it out")
    from manyicl.models import check_compiler

    check_compiler("`compiled`")


def tokenize_for(task: Task, model: InferenceModel) -> TokenizedTask:
    """Return `task` in the model's ids.

    Raises:
        UserError: too many of its answers cannot be used.
    """
    tokenized = tokenize_task(task, tokenizer=model.tokenizer, cache_dir=default_cache_dir())
    fault = check_lost_answers(tokenized)
    if fault:
        raise UserError(fault)
    if model.model is not None:
        check_vocabulary(model.model.config, path=model.path, num_tokens=tokenized.num_ids)
    return tokenized


def trained_shots_of(model: InferenceModel, task: Task) -> int | None:
    """Return the most shots the model was trained with on `task`, of a new task those of any; None if it was not."""
    if not model.trained_shots:
        return None
    return model.trained_shots.get(task.name, max(model.trained_shots.values()))
