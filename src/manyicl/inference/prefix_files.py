"""Encoded prefixes on disk: safetensors files that record what they were encoded with."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from manyicl.errors import UserError
from manyicl.files import writing_atomically
from manyicl.models import KeyValueBuffer, Prefix, device_of, hash_weights, inner_model

# Entries of a config that say where it came from, not what it computes.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What a prefix depends on of its model, each part as a hash; `dtype` as its name."""

    config: str
    weights: str
    adapter: str
    dtype: str


@dataclass(frozen=True, slots=True)
class PrefixKey(ModelKey):
    """What a prefix depends on, each part as a hash; `dtype` as its name."""

    token_ids: str

    @property
    def digest(self) -> str:
        """One hash of all parts: a file name for a cache of prefixes."""
        return _hash(json.dumps(asdict(self), sort_keys=True).encode())


def model_key(model: nn.Module) -> ModelKey:
    """Return what prefixes of `model` depend on besides their ids.

    It reads all weights (models.hash_weights): a merged adapter, another revision or one more training step change it.
    """
    inner = inner_model(model)
    adapter = [hash_weights(model, named=lambda name: "lora_" in name), *_adapter_settings(model)]
    config = {key: value for key, value in inner.config.to_dict().items() if key not in _ORIGIN}
    return ModelKey(
        config=_hash(json.dumps(config, sort_keys=True, default=str).encode()),
        weights=hash_weights(model, named=lambda name: "lora_" not in name),
        adapter=_hash("\n".join(adapter).encode()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def prefix_key(model: nn.Module, ids: NDArray[np.int32], *, known: ModelKey | None = None) -> PrefixKey:
    """Return the key of the prefix `ids` of `model`.

    known: the model's own key, if it has been made and the model has not changed since: all weights are read for it.
    """
    token_ids = _hash(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
    return PrefixKey(**asdict(known or model_key(model)), token_ids=token_ids)


def save_prefix(path: Path, prefix: Prefix, *, model: nn.Module, known: ModelKey | None = None) -> None:
    """Write an encoded prefix whole or not at all. known: as in `prefix_key`.

    Raises:
        ValueError: nothing is encoded, because the prefix is empty or the model's cache cannot be shared.
    """
    if prefix.store is None:
        raise ValueError("a prefix without encoded tokens cannot be saved")
    tensors: dict[str, Tensor] = {"token_ids": torch.from_numpy(prefix.ids.astype(np.int32))}
    for layer in prefix.store.buffers:
        for name, x in zip(("keys", "values"), prefix.layer(layer), strict=True):
            tensors[f"{layer}.{name}"] = x.cpu().contiguous()
    about = {**asdict(prefix_key(model, prefix.ids, known=known)), "checksum": _sum_tensors(tensors)}
    with writing_atomically(path) as partial:
        save_file(tensors, partial, metadata=about)


def load_prefix(path: Path, *, model: nn.Module, ids: NDArray[np.int32], known: ModelKey | None = None) -> Prefix:
    """Return the prefix `ids` of `model` from a file, on the model's device. known: as in `prefix_key`.

    Raises:
        UserError: the file cannot be read, or was encoded with something else; it says with what.
    """
    wanted = asdict(prefix_key(model, ids, known=known))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = file.metadata() or {}
            missing = [part.name for part in fields(PrefixKey) if part.name not in found]
            if missing:
                raise UserError(f"{path}: is not a saved prefix (it does not say its {missing[0]}); encode it anew")
            other = [name for name in wanted if found[name] != wanted[name]]
            if other:
                raise UserError(f"{path}: was encoded with other {_and(other)} than asked for; encode it anew")
            prefix = _read_prefix(file, np.asarray(ids, dtype=np.int32), device=device_of(model), path=path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a saved prefix ({error}); encode it anew") from error
    return prefix


def _read_prefix(file: Any, ids: NDArray[np.int32], *, device: torch.device, path: Path) -> Prefix:
    store = KeyValueBuffer(len(ids))
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    if file.metadata().get("checksum", "") not in ("", _sum_tensors(tensors)):  # earlier versions wrote none
        raise UserError(f"{path}: is damaged (its checksum differs); encode it anew")
    layers = sorted({int(name.split(".")[0]) for name in tensors if name != "token_ids"})
    for layer in layers:
        keys, values = (tensors[f"{layer}.{name}"].to(device) for name in ("keys", "values"))
        store.buffers[layer] = (keys, values)
    store.num_tokens = len(ids)
    return Prefix(ids=ids, store=store)


def _adapter_settings(model: nn.Module) -> list[str]:
    """Return what decides how an adapter's weights count: scales, which is active, whether it is merged or off."""
    parts = []
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            state = [sorted(scaling.items()), *(getattr(module, key, None) for key in ("active_adapters", "merged"))]
            parts.append(f"{name} {state} {getattr(module, 'disable_adapters', None)}")
    return parts


def _sum_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of names and contents: a disk that loses a bit must not change an answer."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _and(names: list[str]) -> str:
    return " and ".join(name.replace("_", " ") for name in names)
