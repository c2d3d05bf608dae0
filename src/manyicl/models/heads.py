"""The last product of a model, from hidden states to logits, in float32 where its weights are in fewer bits.

In bfloat16 a logit of 18 is rounded to a multiple of 1/8, so that several answers often share first place, and a nat is
off by as much. Hidden states and weights are taken as they are; their product is not rounded to fewer bits. Only the
positions that are scored should go through the head, because float32 logits take twice the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyicl.models.structure import inner_model, replaced

# Weights that are in float32 at once, on devices that cannot multiply two bfloat16 matrices into a float32 one.
MOST_WEIGHTS = 1 << 24


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """Let `model` return float32 logits in the block, from a product that was never rounded to fewer bits.

    What a class does with its logits afterwards (a cap, a scale) is done in float32 then. A head that is not a plain
    linear layer, alone or below an adapter, stays as it is, and its logits keep their dtype.
    """
    head = _plain_head(model)
    with nullcontext() if head is None else replaced(head, "forward", partial(_float32_product, head)):
        yield


def _plain_head(model: Any) -> Any:
    """Return the linear layer that makes the logits, None if it is of another kind or something has changed it."""
    inner = inner_model(model)
    head: Any = None if inner is None else inner.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # below an adapter of peft, whose own share is added to the product
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        return None
    changed = vars(head).get("forward")  # another thread's block may be open, whose product is this one's
    return head if changed is None or getattr(changed, "func", None) is _float32_product else None


def _float32_product(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return hidden (..., H) times the head's weight (V, H) transposed, (..., V), in float32."""
    weight, bias = head.weight, head.bias
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float32:
            return functional.linear(hidden.float(), weight, bias)
        if hidden.is_cuda and hidden.dtype == weight.dtype:
            flat = torch.mm(hidden.reshape(-1, hidden.shape[-1]), weight.T, out_dtype=torch.float32)
            logits = flat.view(*hidden.shape[:-1], -1)
        else:
            rows = max(1, MOST_WEIGHTS // weight.shape[1])
            parts = [functional.linear(hidden.float(), part.float()) for part in weight.split(rows)]
            logits = torch.cat(parts, dim=-1)
        return logits if bias is None else logits + bias.float()
