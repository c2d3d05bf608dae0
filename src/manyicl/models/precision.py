"""Which precision a device computes in: bfloat16 if its hardware multiplies it, else float32.

A processor without bfloat16 units emulates them, which makes bf16 up to ten times slower than fp32: a 135M-parameter
model then writes 4 tokens per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

Precision = Literal["bf16", "fp32"]
PrecisionChoice = Literal["auto", "bf16", "fp32"]


def resolve_precision(choice: PrecisionChoice, *, device: torch.device | None = None) -> Precision:
    """Return `choice`, or for "auto" what `device` is fast in. device: None means the one that models are run on."""
    if choice != "auto":
        return choice
    return "bf16" if multiplies_bf16(device or default_device()) else "fp32"


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
