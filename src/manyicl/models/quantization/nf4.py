"""Weights in 4 bits (NF4), stored and unpacked by bitsandbytes."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from manyicl.errors import UserError

# Bytes of a weight in NF4 with double quantisation: 4 bits, and for each block of 64 weights a scale of 8 bits, which
# are scaled in turn by one float32 for each 256 of them (Dettmers et al. 2023, arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# Weights of a row that share a scale.
BLOCK = 64


def check_bitsandbytes(setting: str) -> None:
    """Refuse a setting that needs bitsandbytes where it is not installed.

    Raises:
        UserError: as said. It names the package and not the extra, which pip finds only if manyicl is on an index.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{setting}: bitsandbytes is not installed; pip install bitsandbytes")


def nf4_options(*, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the options with which transformers stores a base's linear layers, but not its head, in 4 bits.

    dtype: of the products: each matrix is unpacked to it when it is needed. device: where the weights are packed, layer
    by layer as they are read.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
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


def warn_of_blocks(model: nn.Module) -> None:
    """Warn if this machine unpacks layers wrongly: on CPUs with AVX-512, if rows are not whole blocks.

    bitsandbytes 0.50 takes the scales of other blocks for them. On a GPU and on other CPUs they are right.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    for name, part in model.named_modules():
        if hasattr(part, "quant_state") and part.weight.device.type == "cpu" and part.in_features % BLOCK:
            warnings.warn(
                f"model.quantize = 'nf4': {name} has {part.in_features} input features, which is not a multiple of"
                f" {BLOCK}, so on this CPU its weights are unpacked with wrong scales; use a GPU, or leave it out",
                stacklevel=2,
            )
            return
