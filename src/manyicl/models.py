"""Load and save a causal language model, its tokenizer and its adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from manyicl.errors import UserError, suggest
from manyicl.files import write_atomically
from manyicl.templates import TemplateSettings

# Beside the weights: how examples were written in training, so that whoever asks writes them alike.
MODEL_NOTE = "manyicl.json"


class LoraSettings(BaseModel):
    """A low-rank adapter (peft) on a frozen base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: Annotated[int, Field(gt=0)] = Field(16, description="rank of each adapter")
    alpha: Annotated[int, Field(gt=0)] = Field(32, description="scale; the adapter counts alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout before the adapter")
    modules: str | tuple[str, ...] = Field("all-linear", description="which linear layers; the head never")


class ModelSettings(BaseModel):
    """Which model is fine-tuned, and how it is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a folder in Hugging Face layout, a run, or a name on the hub")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of the products; trained weights stay fp32, a frozen base is stored in this precision"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="changes to the model's own config.json, such as RoPE; recorded with the run"
    )
    lora: LoraSettings | None = Field(None, description="train an adapter instead of all weights")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class ModelNote(BaseModel):
    """What a saved model says of how it was trained. trained_shots: task -> most shots an answer was trained behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: TemplateSettings = TemplateSettings()
    trained_shots: dict[str, int] = Field(default_factory=dict)


def locate_model(path: str) -> str:
    """Return the model folder of a run, or `path` itself."""
    folder = Path(path).expanduser()
    if (folder / "run.json").is_file():
        if not (folder / "model").is_dir():
            raise UserError(f"{path}: this run has not finished, so it has no model; go on with --resume {path}")
        return str(folder / "model")
    if folder.is_dir():
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such folder; give a folder in Hugging Face layout, a run, or a name on the hub")
    return path


def read_note(path: str) -> ModelNote:
    """Return what the model at `path` says of its training; defaults where it says nothing."""
    file = Path(locate_model(path)) / MODEL_NOTE
    return ModelNote.model_validate_json(file.read_text()) if file.is_file() else ModelNote()


def load_tokenizer(settings: ModelSettings) -> Any:
    """Return the tokenizer of a model, adapter or run."""
    with _one_line_errors(settings.path, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            locate_model(settings.path), revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )


def load_config(settings: ModelSettings) -> Any:
    """Return the model's config with the changes of `settings.config` made.

    Raises:
        UserError: no such model, or a change to an entry that its config does not have.
    """
    source = locate_model(settings.path)
    with _one_line_errors(settings.path, "config"):
        config = AutoConfig.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    known = config.to_dict()
    for name, value in settings.config.items():
        if name not in known:
            raise UserError(f"model.config.{name}: {config.model_type} has no such entry{suggest(name, known)}")
        old = known[name]
        # TOML has no null: 'none' switches an entry off.
        new = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        setattr(config, name, None if new == "none" else new)
    return config


def load_model(settings: ModelSettings, *, trainable: bool = False) -> Any:
    """Return the model on the CPU; with `trainable`, ready for full fine-tuning or inside a fresh adapter.

    A full model to train is loaded in float32 (small updates vanish in bfloat16; autocast makes the products fast);
    everything else is in `settings.precision`.
    """
    from peft import PeftModel

    precision = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    dtype = torch.float32 if trainable and settings.lora is None else precision
    source = locate_model(settings.path)
    adapter = Path(source) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else source
    with _one_line_errors(settings.path, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            locate_model(base),
            config=load_config(settings),
            revision=settings.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
        )
        if adapter.is_file():
            model = PeftModel.from_pretrained(model, source)
    if adapter.is_file() and trainable:
        model = model.merge_and_unload()
    return _add_adapter(model, settings.lora) if trainable and settings.lora else model


def _add_adapter(model: Any, settings: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    modules = settings.modules if isinstance(settings.modules, str) else list(settings.modules)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.modules = {settings.modules!r}: {_first_line(error)}") from error


def check_window(config: Any, *, num_tokens: int, what: str) -> None:
    """Refuse sequences longer than the model can use.

    Raises:
        UserError: `num_tokens` exceeds the maximum positions, or the window where every layer's attention slides.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        raise UserError(
            f"{what} = {num_tokens}: the model knows {limit} positions (max_position_embeddings); lower it, or extend"
            " the positions on purpose with model.config.max_position_embeddings and model.config.rope_parameters"
        )
    window = model_window(config)
    if window is not None and num_tokens > window:
        raise UserError(
            f"{what} = {num_tokens}: every layer of the model sees only the last {window} tokens (sliding_window), and"
            f" such models collapse beyond it; set it to at most {window}, or model.config.sliding_window = 'none'"
        )


def model_window(config: Any) -> int | None:
    """Return the sliding window where every layer has one, else None (some layer sees everything)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds and "full_attention" in kinds):
        return None
    return int(window)


def max_tokens_of(config: Any) -> int:
    """Return the longest sequence that the model can use."""
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), model_window(config)]
    return min(int(limit) for limit in limits if limit)


def save_model(model: Any, tokenizer: Any, folder: Path, *, note: ModelNote) -> None:
    """Write weights (safetensors), config, tokenizer and note, so that Hugging Face's classes load them."""
    model.save_pretrained(folder, safe_serialization=True)
    # An adapter's folder gets the base's config too: changed positions must not be lost when it is loaded.
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    inner.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomically(folder / MODEL_NOTE, note.model_dump_json(indent=2) + "\n")


def merge_adapter(path: str, out: Path) -> None:
    """Fold the adapter at `path` (a run or a folder) into its base and save a plain model in `out`.

    Raises:
        UserError: there is no adapter, or `out` exists.
    """
    source = Path(locate_model(path))
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{path}: has no adapter to merge; its model is whole already")
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    settings = ModelSettings(path=str(source), precision="fp32")
    model = load_model(settings).merge_and_unload()
    partial = out.with_name(f".{out.name}.partial")
    save_model(model, load_tokenizer(settings), partial, note=read_note(path))
    partial.rename(out)


@contextmanager
def _one_line_errors(path: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a wrong path or name into one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{path}: cannot load its {what}: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
