"""Which precision a device computes in (bfloat16 if its hardware multiplies it, else float32), and 4-bit weights.

A processor without bfloat16 units emulates them, which makes bf16 up to ten times slower than fp32: a 135M-parameter
model then writes 4 tokens per second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from manyicl.errors import UserError

Precision = Literal["bf16", "fp32"]
PrecisionChoice = Literal["auto", "bf16", "fp32"]
Quantization = Literal["nf4"]
QuantizationChoice = Literal["auto", "nf4", "none"]
# Bytes of a weight in NF4 with double quantisation: 4 bits, and for each block of 64 weights a scale of 8 bits, which
# are scaled in turn by one float32 for each 256 of them (Dettmers et al. 2023, arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Kernels for bfloat16 on CPUs are made per length of row, and each of two caches keeps 1,024 of half a MB. All layers
# of a model share a length, so that a few dozen are as fast.
_NUM_KERNELS = 64
_KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's own, and oneDNN's


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


def check_bitsandbytes(setting: str) -> None:
    """Refuse a setting that needs bitsandbytes where it is not installed.

    Raises:
        UserError: as said. It names the package and not the extra, which pip finds only if manyicl is on an index.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{setting}: bitsandbytes is not installed; pip install bitsandbytes")


def limit_kernel_caches() -> None:
    """Keep what a CPU computes with from growing with every new length of row, unless the environment has limits.

    The limits are variables of the process, which torch reads at its first product in bfloat16: call this before.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_NUM_KERNELS))


def loading_options(quantize: Quantization | None, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the options with which transformers stores a base's linear layers, but not its head, in 4 bits.

    quantize: None stores them as they are, which takes no options.
    dtype: of the products: each matrix is unpacked to it when it is needed. device: where the weights are packed, layer
    by layer as they are read.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if quantize is None:
        return {}
    check_bitsandbytes(f"model.quantize = '{quantize}'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting packed weights in the order that a CPU with bfloat16 units reads them fastest.

    It would do so when a layer first runs, and what is known by a hash of the weights would not be found again.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let `model` compute in float32 in the block; its own weights return afterwards, to the bit."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    # A layer of 4 bits says itself what it computes in.
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
