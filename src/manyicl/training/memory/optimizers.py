"""The optimizers that a recipe may name, and what each keeps between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adafactor",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer keeps between steps."""

    words: str
    """The same in words."""
    bytes_per_weight: float
    """Of each trained weight."""
    bytes_per_embedding: float
    """Of each trained weight of an embedding: the Trainer has bitsandbytes keep 32 bits of it."""
    needs_bitsandbytes: bool = True


# 8 bits have a float32 scale per 256 values. Adafactor keeps a row and a column of each matrix: under 0.01 bytes per
# weight of a large matrix, 0.25 of an adapter of rank 16. Tensors of fewer than 4,096 values, which bitsandbytes keeps
# in 32 bits, are not counted as such.
OPTIMIZERS: Mapping[Optim, Optimizer] = {
    "adamw_torch_fused": Optimizer("AdamW's two moments", 8, 8, needs_bitsandbytes=False),
    "adamw_torch": Optimizer("AdamW's two moments", 8, 8, needs_bitsandbytes=False),
    "adafactor": Optimizer("Adafactor's rows and columns", 0.25, 0.25, needs_bitsandbytes=False),
    "adamw_8bit": Optimizer("AdamW's two moments, 8 bits", 2 + 8 / 256, 8),
    "paged_adamw_8bit": Optimizer("AdamW's two moments, 8 bits; may move to the host", 2 + 8 / 256, 8),
    "paged_adamw_32bit": Optimizer("AdamW's two moments; may move to the host", 8, 8),
    "lion_8bit": Optimizer("Lion's moment, 8 bits", 1 + 4 / 256, 4),
    "lion_32bit": Optimizer("Lion's moment", 4, 4),
}
