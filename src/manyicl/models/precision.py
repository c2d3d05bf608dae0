"""Which precision a device computes in: bfloat16 if its hardware multiplies it, else float32.

A processor without bfloat16 units emulates them, which makes bf16 up to ten times slower than fp32: a 135M-parameter
model then writes 4 tokens per second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from manyicl.errors import UserError, suggest

Precision = Literal["bf16", "fp32"]
PrecisionChoice = Literal["auto", "bf16", "fp32"]
Quantization = Literal["nf4", "float8"]
QuantizationChoice = Literal["auto", "nf4", "float8", "none"]
# Kernels for bfloat16 on CPUs are made per length of row, and each of two caches keeps 1,024 of half a MB. All layers
# of a model share a length, so that a few dozen are as fast.
_NUM_KERNELS = 64
_KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's own, and oneDNN's


def resolve_precision(choice: PrecisionChoice, *, device: torch.device | None = None) -> Precision:
    """Return `choice`, or for "auto" what `device` is fast in. device: None means the one that models are run on.

    Raises:
        UserError: there is no such precision.
    """
    if choice not in get_args(PrecisionChoice):
        raise UserError(f"precision={choice}: is unknown{suggest(choice, get_args(PrecisionChoice))}")
    if choice != "auto":
        return choice
    return "bf16" if multiplies_bf16(device or default_device()) else "fp32"


def find_slow_precision(precision: PrecisionChoice, *, device: torch.device | None = None) -> str | None:
    """Return in a line that a CPU emulates bfloat16, None if it does not. device: as in `resolve_precision`."""
    device = device or default_device()
    if precision != "bf16" or device.type != "cpu" or multiplies_bf16(device):
        return None
    return "precision bf16: this CPU has no units for it, and emulates it up to ten times slower; choose fp32, or auto"


def default_device() -> torch.device:
    """Return the device that models are run on here: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the hardware of `device` has units for bfloat16 products."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return has_bf16_units(torch.cpu.get_capabilities())
    return False


def has_bf16_units(capabilities: Mapping[str, Any]) -> bool:
    """Return whether a CPU has them, from torch's report of it: AVX-512 BF16 or AMX on x86, BF16 on Arm.

    >>> has_bf16_units({"avx2": True, "avx512_bf16": False})
    False
    """
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def limit_kernel_caches() -> None:
    """Keep what a CPU computes with from growing with every new length of row, unless the environment has limits.

    The limits are variables of the process, which torch reads at its first product in bfloat16: call this before.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_NUM_KERNELS))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let `model` compute in float32 in the block; its own weights return afterwards, to the bit."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    # A layer of 4 or 8 bits says itself what it computes in.
    layers: list[Any] = [part for part in model.modules() if isinstance(vars(part).get("compute_dtype"), torch.dtype)]
    dtypes = [layer.compute_dtype for layer in layers]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for layer, dtype in zip(layers, dtypes, strict=True):
            layer.compute_dtype = dtype
