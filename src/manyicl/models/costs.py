"""What training and asking cost in weights and FLOPs, from a model's config alone: nothing is loaded.

Model FLOPs are what the computation needs, not what is done again: a forward pass takes 2 for each weight that a token
is multiplied with, its backward pass twice that, or as much as the forward if the weight is frozen. So a token costs
6 N, or 4 N plus 6 N' for an adapter of N' weights. The head is multiplied with targets alone. Attention
takes two products forward and four backward over the pairs of tokens that see each other; grouped heads save weights,
not pairs. A recomputed forward (checkpointing) does not count, nor do norms, activations and the softmax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from manyicl.errors import UserError
from manyicl.models.loading import LoraSettings, add_adapter
from manyicl.models.structure import experts_per_token, head_dims, layer_windows


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """How many weights a model has, by what is done with them."""

    embedding: int
    """Looked up, not multiplied."""
    head: int
    """From hidden state to vocabulary; if `tied`, these are the embedding's weights."""
    tied: bool
    matrices: int
    """Multiplied with every token; of a mixture of experts, all experts."""
    active: int
    """Those of `matrices` that one token meets."""
    vectors: int
    """Norms and biases."""
    adapter: int = 0
    """LoRA's own."""
    adapter_head: int = 0
    """LoRA's own on the head, if it was named."""

    @property
    def base(self) -> int:
        """Weights of the model itself."""
        return self.embedding + (0 if self.tied else self.head) + self.matrices + self.vectors

    @property
    def adapters(self) -> int:
        """Weights of all adapters."""
        return self.adapter + self.adapter_head

    @property
    def trained(self) -> int:
        """Weights that have a gradient: the adapters', or all."""
        return self.adapters or self.base

    @property
    def total(self) -> int:
        """Weights of the model and its adapters."""
        return self.base + self.adapters


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides the FLOPs of a model."""

    weights: WeightCounts
    num_heads: int
    """Query heads of a layer."""
    head_dims: tuple[int, ...]
    """Of each layer."""
    windows: tuple[int | None, ...]
    """Of each layer, how many tokens one token sees; None: all before it."""


def shape_model(config: Any, *, lora: LoraSettings | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of a model, with `lora` of one inside a fresh adapter.

    Raises:
        UserError: layers without attention, or whose attention is not known here; modules to adapt that the model does
            not have.
    """
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise UserError(f"{text.model_type}: what layers without attention cost is not known here")
    return ModelShape(
        weights=count_weights(config, lora=lora, trust_remote_code=trust_remote_code),
        num_heads=int(text.num_attention_heads),
        head_dims=head_dims(config),
        windows=layer_windows(config),
    )


def count_weights(config: Any, *, lora: LoraSettings | None = None, trust_remote_code: bool = False) -> WeightCounts:
    """Return the weights of a model of `config`, counted on torch's meta device, which holds none.

    Raises:
        UserError: modules to adapt that the model does not have.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        matrices = active = vectors = 0
        for parameter in model.parameters():
            if id(parameter) in lookups or parameter is head.weight:
                continue
            size = parameter.numel()
            if parameter.ndim < 2:
                vectors += size
            else:
                matrices += size
                # All experts of a layer stand in one tensor of three dimensions.
                active += size if parameter.ndim == 2 else size * experts_per_token(config) // len(parameter)
        looked_up = sum(p.numel() for p in model.parameters() if id(p) in lookups)
        tied = head.weight is embedding.weight
        num_head = int(head.weight.numel())
        adapter = adapter_head = 0
        if lora is not None:
            model = add_adapter(model, lora)
            inside_head = {id(p) for p in model.get_output_embeddings().parameters()}
            trained = [p for p in model.parameters() if p.requires_grad]
            adapter_head = sum(p.numel() for p in trained if id(p) in inside_head)
            adapter = sum(p.numel() for p in trained) - adapter_head
    return WeightCounts(looked_up, num_head, tied, matrices, active, vectors, adapter, adapter_head)


def count_flops(
    shape: ModelShape,
    segment_lengths: Sequence[int],
    *,
    num_targets: int,
    prefix_tokens: int = 0,
    backward: bool = True,
) -> int:
    """Return the model FLOPs of one forward and backward pass over a row.

    segment_lengths: tokens of each segment of the row; segments do not see each other. num_targets: positions whose
    logits are made. prefix_tokens: encoded tokens that every segment stands behind. backward: False counts the forward
    pass alone, as in asking.

    >>> weights = WeightCounts(embedding=80, head=80, tied=False, matrices=100, active=100, vectors=7)
    >>> shape = ModelShape(weights, num_heads=2, head_dims=(4,), windows=(None,))
    >>> count_flops(shape, [3], num_targets=1)  # 6 * (3 * 100 + 1 * 80) + 12 * 2 heads * 4 * 6 pairs
    2856
    """
    weights, num_tokens = shape.weights, sum(segment_lengths)
    base = num_tokens * weights.active + num_targets * weights.head
    own = num_tokens * weights.adapter + num_targets * weights.adapter_head
    attention = 0
    for dim in set(shape.head_dims):
        windows = [window for own, window in zip(shape.head_dims, shape.windows, strict=True) if own == dim]
        pairs = count_pairs(windows, segment_lengths, prefix_tokens=prefix_tokens)
        attention += 4 * shape.num_heads * dim * pairs
    if not backward:
        return 2 * (base + own) + attention
    return (4 if weights.adapters else 6) * base + 6 * own + 3 * attention


def count_pairs(windows: Sequence[int | None], segment_lengths: Sequence[int], *, prefix_tokens: int = 0) -> int:
    """Return the pairs (token, token it sees), itself included, summed over layers and segments.

    >>> count_pairs([None, 2], [4, 1])  # 1 + 2 + 3 + 4 and 1; 1 + 2 + 2 + 2 and 1
    19
    """
    return sum(
        num_layers * num_segments * (_seen(prefix_tokens + length, window) - _seen(prefix_tokens, window))
        for window, num_layers in Counter(windows).items()
        for length, num_segments in Counter(segment_lengths).items()
    )


def _seen(num_tokens: int, window: int | None) -> int:
    """Return how many tokens the first `num_tokens` of a sequence see, in sum."""
    full = num_tokens if window is None else min(num_tokens, window)
    return full * (full + 1) // 2 + (num_tokens - full) * full
