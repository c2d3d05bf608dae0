"""Trained models written in Hugging Face layout, and adapters merged into their base."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from manyicl.errors import UserError
from manyicl.files import write_atomically
from manyicl.locks import new_folder
from manyicl.models.loading import (
    MODEL_NOTE,
    ModelNote,
    ModelSettings,
    fold_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_note,
)
from manyicl.models.places import locate_model


def save_model(model: Any, tokenizer: Any, folder: Path, *, note: ModelNote) -> None:
    """Write weights (safetensors), config, tokenizer and note, so that Hugging Face's classes load them.

    An adapter's folder has a config.json only where `model.config` of its recipe changed the base's: the changes must
    not be lost. Then AutoModelForCausalLM does not take it for an adapter any more, and peft loads it wrongly; merge it
    for them.
    """
    model.save_pretrained(folder, safe_serialization=True)
    save_beside_weights(model, tokenizer, folder, note=note)


def save_beside_weights(model: Any, tokenizer: Any, folder: Path, *, note: ModelNote) -> None:
    """Write tokenizer, note and, of an adapter on a changed base, its config; weights get the note's permissions."""
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    if inner is not model and getattr(inner, "has_changed_config", False):
        config = copy.deepcopy(inner.config)
        if note.quantize and hasattr(config, "quantization_config"):  # it was packed when it was loaded
            del config.quantization_config
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomically(folder / MODEL_NOTE, note.model_dump_json(indent=2) + "\n")
    # safetensors 0.8 makes files that only their owner can read, so that no other user's server would load the model.
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / MODEL_NOTE).stat().st_mode)


def merge_adapter(path: str, out: Path, *, trust_remote_code: bool = False) -> str:
    """Fold the adapter at `path` (a run or a folder) into its base, save a plain model in `out`, and say what was done.

    Products are summed in float32 and the weights saved in the type that the base's config names. A head that shares
    its weights with the embedding gets weights of its own if the adapter is on one of the two. An adapter that was
    trained on a base in 4 bits is folded into the base's own weights, which are not quite those it was trained on.

    Raises:
        UserError: there is no adapter, or `out` exists.
    """
    source = Path(locate_model(path))
    if not source.is_dir():
        raise UserError(f"{path}: no such folder; give a run, or the folder of an adapter")
    if not any((source / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise UserError(f"{path}: holds neither an adapter nor a model; give a run, or the folder of an adapter")
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{path}: has no adapter to merge; its model is whole already")
    if out.exists():
        raise UserError(f"out={out}: exists already; name a new folder")
    settings = ModelSettings(path=str(source), precision="fp32", trust_remote_code=trust_remote_code)
    dtype = getattr(load_config(settings), "dtype", None) or torch.float32
    with new_folder(out) as partial:
        model, was_untied = fold_adapter(load_model(settings))
        model.to(dtype)
        note = read_note(path)
        save_model(model, load_tokenizer(settings), partial, note=note.model_copy(update={"quantize": None}))
    untied = ", with a head of its own: the base's shares its weights with the embedding" if was_untied else ""
    packed = (
        f"; the adapter was trained on the base in {note.quantize}, whose rounding it made up for: measure it again"
        if note.quantize
        else ""
    )
    return f"{out}: a plain model in {str(dtype).removeprefix('torch.')}, as its base{untied}{packed}"


def hash_weights(model: nn.Module, *, named: Callable[[str], bool] = lambda _: True) -> str:
    """Return a hash of the weights whose name `named` takes: names, shapes, types, and the sum of each row's bits.

    Integer sums come out alike in any order, so on every device; they need one pass over the weights and no copy.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not named(name):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            rows = tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1).contiguous()
            size = rows.element_size()
            if size * int(rows.storage_offset()) % 8:
                rows = rows.clone()  # else it could not be read eight bytes at once, which is fast
            width = math.gcd(8, size * rows.shape[1])
            bits = rows.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
            digest.update(bits.sum(dim=1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()
