"""Pieces of a model between its matrix products, compiled while it answers queries on a GPU.

Behind a long prefix nearly all time goes into products, which run at the device's rate; what stands between them reads
and writes the whole row several times. Compiled, each piece reads and writes it once. The formulas are the models' own;
in bfloat16 the last digits may differ, because fewer results in between are rounded.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from manyicl.errors import UserError
from manyicl.models.attention.dispatch import merging_by
from manyicl.models.attention.partial import Part, merge_parts
from manyicl.models.structure import inner_model, replaced

# Modules of transformers whose norm, gate and rotary positions are those below -> how its classes' names begin.
FAMILIES = {modeling_llama: "Llama", modeling_mistral: "Mistral", modeling_qwen3: "Qwen3"}
# merge: of the parts of attention behind a prefix. norm, rotary, gate: of each layer.
PIECES = ("merge", "norm", "rotary", "gate")


def merged_for_projection(parts: Sequence[Part]) -> Tensor:
    """Return the merged parts, (B, H, M, D), laid out as the projection behind attention reads them."""
    return merge_parts(parts).transpose(1, 2).contiguous().transpose(1, 2)


def rotated_by_head(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    """Return the turned queries and keys, laid out head by head, so that folding heads copies nothing."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half: Callable[[Tensor], Tensor] = modeling_mistral.rotate_half
    return tuple((x * cos + half(x) * sin).contiguous() for x in (q, k))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return what the last product of a layer reads."""
    return functional.silu(gate) * up


def normed(self: Any, x: Tensor) -> Tensor:
    """Return the norm of a row by torch's own kernel, which needs no compiling."""
    return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@contextmanager
def fused_pieces(model: nn.Module, names: Sequence[str] = PIECES, *, backend: str = "inductor") -> Iterator[None]:
    """Ask `model` (also inside peft's wrapper) with the named pieces compiled, in the block.

    A model of a class that is not known here is left as it is, with a warning that names the pieces; so is its gate
    where it has another activation. Classes are changed, not the one model: others of its class are asked alike in the
    block. Sizes are dynamic, since rows of a sweep differ. backend: of torch.compile.
    """
    inner = inner_model(model)
    modeling = sys.modules[type(inner).__module__]
    usable = [name for name in names if _fault(inner, modeling, name) == ""]
    left = [name for name in names if name not in usable]
    if left:
        warnings.warn(
            f"{type(inner).__name__}: {', '.join(left)} run uncompiled ({_fault(inner, modeling, left[0])})",
            stacklevel=3,
        )

    def compiled(function: Callable[..., Any]) -> Any:
        return torch.compile(function, dynamic=True, backend=backend)

    with ExitStack() as stack:
        for name in usable:
            if name == "merge":
                stack.enter_context(merging_by(compiled(merged_for_projection)))
            else:
                stack.enter_context(replaced(*_replacement(modeling, name, compiled)))
        yield


def _fault(inner: Any, modeling: Any, name: str) -> str:
    """Return why a piece cannot be used, '' where it can."""
    if modeling not in FAMILIES:
        return f"known are {', '.join(FAMILIES.values())}"
    activation = inner.config.hidden_act
    return "" if name != "gate" or activation in ("silu", "swish") else f"its activation is {activation}"


def _replacement(modeling: Any, name: str, compiled: Callable[[Callable[..., Any]], Any]) -> tuple[Any, str, Any]:
    """Return what is replaced, and by what: (module or class, attribute, function)."""
    family = FAMILIES[modeling]
    if name == "norm":
        return getattr(modeling, f"{family}RMSNorm"), "forward", normed
    if name == "rotary":
        return modeling, "apply_rotary_pos_emb", compiled(rotated_by_head)
    gate = compiled(gated)

    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))

    return getattr(modeling, f"{family}MLP"), "forward", forward


def check_compiler(asked_by: str = "train.compile = true") -> None:
    """Refuse to compile without a C++ compiler. asked_by: the option, for the error.

    Raises:
        UserError: saying what to install.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((named,) if named else ("g++", "clang++"))):
        raise UserError(f"{asked_by}: needs a C++ compiler, and there is no g++ or clang++; install one")
