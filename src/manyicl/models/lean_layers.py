"""Norms and rotary positions of a model in fewer kernels, for training and asking on a GPU without torch.compile.

A small model on a GPU does not wait for the GPU but for Python, which starts each kernel: a step of a model with 30
layers starts about 4,000, and more than half of them in norms, rotary positions and the casts of autocast around them.
A norm written in torch operations starts 6 kernels forward and about 14 backward, and under autocast each projection
that reads its output casts it anew. Here the norm is torch's own kernel, its output is cast once, and queries and keys
are turned together. The formulas are the models' own; in bfloat16 fewer results in between are rounded.

Where gradients are off, a layer also runs as one function (`plain_layers`): a call of a module takes Python as long as
starting a kernel, and a layer has a dozen of them. The projections that read the same input are one product there if
their weights lie side by side (`join_projections`).

Shapes: T tokens, H query heads, G key-value heads, D head dimension, F features.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from manyicl.models.attention.dispatch import attend_segments
from manyicl.models.structure import inner_model, replaced

# The norms whose formula is that of `_Norm`, those that multiply by 1 + weight, and the modules whose rotary positions
# are those of `_Rotary`.
NORMS = (modeling_llama.LlamaRMSNorm, modeling_mistral.MistralRMSNorm, modeling_qwen2.Qwen2RMSNorm)
GEMMA_NORMS = (modeling_gemma.GemmaRMSNorm, modeling_gemma2.Gemma2RMSNorm, modeling_gemma3.Gemma3RMSNorm)
MODELINGS = (
    modeling_llama,
    modeling_mistral,
    modeling_qwen2,
    modeling_gemma,
    modeling_gemma2,
    modeling_gemma3,
)
# The layers whose formula is that of `_PlainLayer`.
PLAIN = (modeling_llama.LlamaDecoderLayer, modeling_mistral.MistralDecoderLayer)
# Most bytes of weights that are laid side by side: larger products keep a GPU at work while Python starts the next one.
JOINED_BYTES = 1 << 24


@contextmanager
def lean_pieces(model: nn.Module) -> Iterator[None]:
    """Run the norms and the rotary positions of `model` in fewer kernels, in the block; backward passes belong into it.

    A model of a class that is not known here is left as it is. Classes of norms and the rotary function of the model's
    module are replaced, not parts of the one model, of which there are many: others are run alike in the block.
    """
    modeling: Any = sys.modules.get(type(inner_model(model)).__module__)
    with ExitStack() as stack:
        for kind in NORMS:
            stack.enter_context(replaced(kind, "forward", _lean_norm(kind.forward)))
        for gemma in GEMMA_NORMS:
            stack.enter_context(replaced(gemma, "forward", _gemma_norm))
        if modeling in MODELINGS:
            turn = _Turn(modeling.apply_rotary_pos_emb, num_kinds=2 if modeling is modeling_gemma3 else 1)
            stack.enter_context(replaced(modeling, "apply_rotary_pos_emb", turn))
        yield


@contextmanager
def plain_layers() -> Iterator[None]:
    """Run each decoder layer as one function where rows are asked, in the block; results stay the same to the bit,
    or, after `join_projections`, to what a product of another shape may round otherwise.

    It belongs inside `lean_pieces`, whose norms it takes. As there, classes are changed. Layers of other classes are
    left as they are; so are parts that may be more than torch's own, such as those of an adapter.
    """
    with ExitStack() as stack:
        for kind in PLAIN:
            stack.enter_context(replaced(kind, "forward", _plain_forward(kind)))
        yield


def join_projections(model: nn.Module) -> None:
    """Lay the weights of projections that read the same input side by side in memory, so that one product does them.

    Queries, keys and values are one, and so are the gate and what it multiplies. Each weight keeps its numbers and
    becomes a view of the rows that it has of the joint one. Only for layers that `plain_layers` knows, up to
    `JOINED_BYTES`. Not for a model that is trained: a CUDA graph keeps the addresses of its weights.
    """
    for layer in model.modules():
        if type(layer) in PLAIN:
            for parts in _readers_of(layer):
                _lay_side_by_side(parts)


def _readers_of(layer: Any) -> tuple[list[Any], list[Any]]:
    """Return the projections that read a layer's first norm, and those that read its second."""
    inside, mlp = layer.self_attn._modules, layer.mlp._modules
    return [inside[name] for name in ("q_proj", "k_proj", "v_proj")], [mlp[name] for name in ("gate_proj", "up_proj")]


def _is_product(part: Any) -> bool:
    return type(part) is nn.Linear and part.bias is None


def _lay_side_by_side(parts: Sequence[Any]) -> None:
    if not all(map(_is_product, parts)):
        return
    weights = [part.weight for part in parts]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1 or sum(w.nbytes for w in weights) > JOINED_BYTES:
        return
    with torch.inference_mode(False), torch.no_grad():
        joint = torch.cat([weight.data for weight in weights])
        for weight, rows in zip(weights, joint.split([len(weight) for weight in weights]), strict=True):
            weight.data = rows


def _joint_weight(parts: Sequence[Any]) -> Tensor | None:
    """Return the weights of projections as one; None if they lie apart, or a part may be more than a product."""
    if any(_is_changed(part) or not _is_product(part) for part in parts):
        return None
    weights = [part.weight.detach() for part in parts]
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        same_storage = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and weight.is_contiguous() and weight.dtype == first.dtype and weight.data_ptr() == end):
            return None
        end += weight.nbytes
    joint: Tensor = first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))
    return joint


def _plain_forward(kind: Any) -> Callable[..., Tensor]:
    """Return what takes the place of the forward of a class of layers, and of that alone."""
    own, known = kind.forward, dict[nn.Module, _PlainLayer]()

    def forward(layer: nn.Module, hidden_1TF: Tensor, **given: Any) -> Tensor:
        is_row = given.get("layout") is not None and given.get("past_key_values") is None
        if not is_row or torch.is_grad_enabled() or type(layer) is not kind:
            out: Tensor = own(layer, hidden_1TF, **given)
            return out
        if layer not in known:
            known[layer] = _PlainLayer(layer)
        return known[layer](hidden_1TF, **given)

    return forward


class _PlainLayer:
    """A layer of Llama or Mistral, its parts by their functions: its formula is that of transformers' own forward."""

    def __init__(self, layer: Any) -> None:
        # Not by attributes, for which a module looks in three places.
        parts, self.attention = layer._modules, layer.self_attn
        self.modeling: Any = sys.modules[type(layer).__module__]
        has_window = self.modeling is modeling_mistral
        self.options: dict[str, Any] = {
            "scaling": self.attention.scaling,
            "sliding_window": self.attention.config.sliding_window if has_window else None,
        }
        mlp, readers = parts["mlp"]._modules, _readers_of(layer)
        self.norms = _function_of(parts["input_layernorm"]), _function_of(parts["post_attention_layernorm"])
        self.inputs, (self.gate, self.up) = ([_function_of(part) for part in parts] for parts in readers)
        self.joint_inputs, self.joint_gate = map(_joint_weight, readers)
        self.output = _function_of(self.attention._modules["o_proj"])
        self.act, self.down = _function_of(mlp["act_fn"]), _function_of(mlp["down_proj"])

    def __call__(
        self,
        hidden_1TF: Tensor,
        *,
        layout: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        attention, row = self.attention, hidden_1TF.shape[:-1]
        q, k, v = self._project(self.norms[0](hidden_1TF), position_embeddings)
        attended = attend_segments(attention, q, k, v, attention_mask, layout=layout, **self.options)[0]
        hidden_1TF = hidden_1TF + self.output(attended.reshape(*row, -1))
        x = self.norms[1](hidden_1TF)
        if self.joint_gate is None:
            gate, up = self.gate(x), self.up(x)
        else:
            gate, up = nn.functional.linear(x, self.joint_gate).chunk(2, dim=-1)
        out: Tensor = hidden_1TF + self.down(self.act(gate) * up)
        return out

    def _project(self, x_1TF: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (1, H, T, D) and keys (1, G, T, D), turned, and values."""
        heads, turn = (*x_1TF.shape[:-1], -1, self.attention.head_dim), self.modeling.apply_rotary_pos_emb
        if self.joint_inputs is None or not isinstance(turn, _Turn):
            q, k, v = (project(x_1TF).view(heads).transpose(1, 2) for project in self.inputs)
            return *turn(q, k, *cos_sin), v
        all_1TND = nn.functional.linear(x_1TF, self.joint_inputs).view(heads)
        num_keys = self.attention.config.num_key_value_heads
        turned, v = all_1TND.split([all_1TND.shape[2] - num_keys, num_keys], dim=2)
        return *turn.side_by_side(turned, *cos_sin, num_keys=num_keys), v.transpose(1, 2)


def _is_changed(part: Any) -> bool:
    """Return whether a module's call does more than the forward of its class."""
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def _function_of(part: Any) -> Any:
    """Return what computes the same as a part without the call of a module, or the part if that may be more."""
    if _is_changed(part):
        return part
    if type(part) is nn.Linear:
        return partial(nn.functional.linear, weight=part.weight, bias=part.bias)
    return part.forward if type(part) in (*NORMS, SiLUActivation) else part


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the type that autocast gives to the products on the tensor's device, None if it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _lean_norm(own: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return what takes the place of `own`, the forward of a class of norms.

    What reads a norm's output are projections, which autocast would cast it for.
    """

    def forward(norm: Any, x_1TF: Tensor) -> Tensor:
        if x_1TF.dtype != norm.weight.dtype:
            return own(norm, x_1TF)
        return _normed(x_1TF, norm.weight, norm.variance_epsilon, _autocast_dtype(x_1TF) or x_1TF.dtype)

    return forward


def _gemma_norm(norm: Any, x: Tensor) -> Tensor:
    """Take the place of the forward of a norm of Gemma, x (..., F): in float32, times 1 + weight, then in x's dtype."""
    dtype, weight = x.dtype, 1 + norm.weight.float()
    # Heads of queries and keys come transposed.
    x = x.contiguous() if dtype == torch.float32 else x.to(torch.float32, memory_format=torch.contiguous_format)
    return _normed(x, weight, norm.eps, dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of x (..., F), computed in its own dtype, in `dtype`."""
    if torch.is_grad_enabled():  # a function with a backward pass costs Python three times the kernel's start
        out: Tensor = _Norm.apply(x, weight, eps, dtype)
        return out
    if _autocast_dtype(x) is None:
        return torch.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return _norm_of(x, weight, eps)[0].to(dtype)


def _norm_of(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x (..., F), in its dtype, and what x was multiplied by (..., 1)."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        out, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    return out, rstd


class _Norm(torch.autograd.Function):
    """Root mean square norm, x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    apply: Any

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Return the norm in `dtype`."""
        out, rstd = _norm_of(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight."""
        x, weight, rstd = ctx.saved_tensors
        gradient, needed = gradient.to(x.dtype), list(ctx.needs_input_grad[:2])
        if x.is_cuda:
            own = torch.ops.aten._fused_rms_norm_backward(gradient.contiguous(), x, [x.shape[-1]], rstd, weight, needed)
            return *(part if need else None for part, need in zip(own, needed, strict=True)), None, None
        normed = x.float() * rstd
        gradient = gradient.float()
        of_weight = (gradient * normed).flatten(0, -2).sum(dim=0).to(weight.dtype) if needed[1] else None
        gradient = gradient * weight
        mean = (gradient * normed).mean(dim=-1, keepdim=True)
        return (rstd * (gradient - normed * mean)).to(x.dtype), of_weight, None, None


class _Turn:
    """Takes the place of a modeling module's `apply_rotary_pos_emb`; `own` is that.

    num_kinds: kinds of layers that have angles of their own, such as those with a window.
    """

    def __init__(self, own: Any, *, num_kinds: int) -> None:
        self.own = own
        # Of the last forward pass: a sine, that with the sign it counts with, and that turned round for the gradient.
        self.sines: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=num_kinds)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if unsqueeze_dim != 1 or q.ndim != 4 or q.dtype != k.dtype or cos.shape[-1] != q.shape[-1]:
            return self.own(q, k, cos, sin, unsqueeze_dim)
        dtype = _autocast_dtype(q) or torch.result_type(q, cos)
        if not torch.is_grad_enabled():
            return _turn_both(q, k, cos.unsqueeze(2), self._sines(sin)[1], dtype)
        return _Rotary.apply(q, k, cos.unsqueeze(2), *self._sines(sin)[1:], dtype)

    def side_by_side(self, heads_1TND: Tensor, cos: Tensor, sin: Tensor, *, num_keys: int) -> tuple[Tensor, Tensor]:
        """Return queries (1, H, T, D) and keys (1, G, T, D), which lie side by side, turned; without gradients."""
        dtype = _autocast_dtype(heads_1TND) or torch.result_type(heads_1TND, cos)
        num_queries = heads_1TND.shape[2] - num_keys
        return _turn_heads(heads_1TND, cos.unsqueeze(2), self._sines(sin)[1], dtype, num_queries=num_queries)

    def _sines(self, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for known in tuple(self.sines):  # every layer of a kind is given the same; another thread may append its own
            if known[0] is sin:
                return known
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(2)
        sines = (sin, signed, signed.roll(half, dims=-1))
        self.sines.append(sines)
        return sines


class _Rotary(torch.autograd.Function):
    """Queries (1, H, T, D) and keys (1, G, T, D), each turned by its position: x * cos + rotate_half(x) * sin."""

    apply: Any

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, signed: Tensor, turned: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return both in `dtype`, as views of one tensor (1, T, H + G, D)."""
        ctx.save_for_backward(cos, turned)
        ctx.num_heads, ctx.dtype = q.shape[1], q.dtype
        return _turn_both(q, k, cos, signed, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries and keys: turned back."""
        cos, turned = ctx.saved_tensors
        return *_turn_both(of_q, of_k, cos, turned, ctx.dtype), None, None, None, None


def _turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    both = torch.cat([q.transpose(1, 2), k.transpose(1, 2)], dim=2)
    return _turn_heads(both, cos, sin, dtype, num_queries=q.shape[1])


def _turn_heads(
    both: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, num_queries: int
) -> tuple[Tensor, Tensor]:
    """Turn the heads of queries and keys, (1, T, H + G, D); return them as (1, H, T, D) and (1, G, T, D)."""
    rolled = both.roll(both.shape[-1] // 2, dims=-1)
    both = torch.addcmul(both * cos, rolled, sin).to(dtype).transpose(1, 2)
    return both[:, :num_queries], both[:, num_queries:]
