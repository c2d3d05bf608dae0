"""Accelerators by name: memory and bfloat16 peak, as their makers' datasheets say."""

from __future__ import annotations

from dataclasses import dataclass

from manyicl.errors import UserError, suggest

# An assumption, not a promise: model FLOPs over the datasheet's peak. Measured on one H200 with a 7B model, LoRA, all
# layers recomputed, 8k and 32k tokens: 0.31 and 0.36.
ASSUMED_UTILIZATION = 0.3
# In about so many seconds the host starts the kernels of one layer for one pass of a row, and a small model's GPU waits
# for that. A backward pass counts twice. Measured on an H200: SmolLM2-135M, 30 layers, trains a row of 4,096 tokens in
# 90 ms, uncompiled; as a CUDA graph in 27 to 30, which this does not count on (docs/performance.md).
LAYER_PASS_S = 1e-3


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator as its maker's datasheet describes it."""

    name: str
    memory_bytes: int
    """From the datasheet's decimal gigabytes; a card may have up to 6 % more."""
    peak_flops_per_s: float
    """bfloat16, dense, with float32 accumulation."""
    has_float8: bool = True
    """Whether it has units for products in 8 bits, as cards from Ada and Hopper on."""


def _device(name: str, gigabytes: int, teraflops: float, *, has_float8: bool = True) -> tuple[str, Device]:
    return name, Device(name, gigabytes * 10**9, peak_flops_per_s=teraflops * 1e12, has_float8=has_float8)


DEVICES = dict(
    (
        _device("h200", 141, 989.5),  # NVIDIA H200 datasheet: 1,979 with sparsity, SXM
        _device("h100", 80, 989.5),  # NVIDIA H100 datasheet: 1,979 with sparsity, SXM5
        _device("h100-pcie", 80, 756.5),  # NVIDIA H100 datasheet: 1,513 with sparsity, PCIe
        _device("a100-80", 80, 312, has_float8=False),  # NVIDIA A100 80GB datasheet: 312, 624 with sparsity
        _device("a100-40", 40, 312, has_float8=False),  # NVIDIA A100 40GB datasheet: 312, 624 with sparsity
        _device("l40s", 48, 362),  # NVIDIA L40S datasheet: 362.05, 733 with sparsity
        _device("a6000", 48, 154.8, has_float8=False),  # NVIDIA GA102 whitepaper, RTX A6000: 154.8, 309.7 with sparsity
        _device("l4", 24, 121),  # NVIDIA L4 datasheet: 242 with sparsity
        _device("4090", 24, 165.2),  # NVIDIA Ada whitepaper, RTX 4090: 165.2, 330.4 with sparsity
        _device("3090", 24, 71, has_float8=False),  # NVIDIA GA102 whitepaper, RTX 3090: 71, 142 with sparsity
    )
)


def predict_seconds(device: Device, *, flops: int, layer_passes: int = 0) -> float:
    """Return the seconds that some work takes on a device: its arithmetic, or starting its kernels if that is longer.

    layer_passes: forward passes of rows, or steps of generated tokens, times layers.
    """
    return max(flops / (device.peak_flops_per_s * ASSUMED_UTILIZATION), layer_passes * LAYER_PASS_S)


def find_device(name: str) -> Device:
    """Return the device called `name`, in any case.

    Raises:
        UserError: it is not in the table.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        raise UserError(f"device={name}: is not known{suggest(name.lower(), DEVICES)}")
    return device
