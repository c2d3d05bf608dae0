"""What a training step's memory is made of, found by running the model's own code on tensors that hold nothing.

The forward pass, loss and backward pass of training run on torch's fake tensors, which have shapes, types and storages
but no contents, with every storage counted from its birth to its end. Two and three layers are run, each time with all
of them kept, recomputed selectively, in full, and in full in tiles: what a further layer adds is known from that, for a
model of any depth and size, in seconds. Attention is stood in for by what every fused kernel keeps (queries, keys,
values, output, log-sum-exp). Compiled layers keep less: the fraction is measured on one real layer of the model, with
short rows. `memory` predicts the peak from it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyicl.episodes import Batch, TokenizedEpisode, join_row
from manyicl.errors import UserError
from manyicl.models import (
    FLOAT8_BYTES,
    MOST_LOGITS,
    NF4_BYTES,
    LoraSettings,
    Quantization,
    WeightCounts,
    add_adapter,
    attend_segments,
    count_weights,
    decoder_layers,
    inner_model,
    store_in_float8,
)
from manyicl.training.memory.optimizers import OPTIMIZERS, Optim
from manyicl.training.memory.storage_meter import meter_step
from manyicl.training.recompute.layers import (
    RECOMPUTED_WORK_COMPILED,
    WHOLE_WORK_COMPILED,
    Recompute,
    cast_bytes,
    measure_kept,
    prepared_layers,
)
from manyicl.training.recompute.tiles import tiles_fault

# transformers picks attention by this name. H heads, T tokens, D head dimension.
STAND_IN = "manyicl_footprint"
# Units of FSDP2 that are whole at once: one at work, the next one's weights, and the last one's gradients.
GATHERED_UNITS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """The row that goes through the model at once."""

    num_tokens: int
    """Tokens, padding included."""
    num_targets: int
    precision: str
    """Of the products, as in `model.precision`."""
    compiled: bool = False
    """Whether layers are compiled."""
    quantize: Quantization | None = None
    """How the linear layers of a frozen base are stored, as in `model.quantize`."""
    optim: Optim = "adamw_torch_fused"
    """The optimizer, as in `train.optim`."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes beside the states at one moment, as a line in the number of layers."""

    kept: int
    """What a layer that is not recomputed adds."""
    recomputed: int
    """What one that is recomputed selectively adds: its input, and its attention's output."""
    whole: int
    """What one that is recomputed in full adds: its input."""
    work_kept: int
    """What else there is if the layer at hand is not recomputed."""
    work_recomputed: int
    """The same if it is recomputed selectively."""
    work_whole: int
    """The same if it is recomputed in full."""
    work_tiles: int
    """The same with its feed-forward part in tiles, if it can run in them."""

    def added_by(self, recompute: Recompute) -> tuple[int, int]:
        """Return what one of the recomputed layers adds, and what else there is if it is the layer at hand."""
        if recompute.keep_attention:
            return self.recomputed, self.work_recomputed
        return self.whole, self.work_tiles if recompute.tiles else self.work_whole


@dataclass(frozen=True, slots=True)
class Footprint:
    """What decides the peak of a model's training step. Made by `measure_footprint`, read by `memory.predict_memory`.

    States are those of one device: under FSDP2 its part of them.
    """

    num_layers: int
    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    head: Moment
    """When the head is at work."""
    layer: Moment
    """When a layer goes backward."""
    gathered_bytes: int = 0
    """Of FSDP2's units that are whole at once."""
    tiles_fault: str = ""
    """Why the feed-forward parts of its layers cannot run in tiles; "" if they can."""


def measure_footprint(
    config: Any,
    row: Row,
    *,
    lora: LoraSettings | None = None,
    trust_remote_code: bool = False,
    num_shards: int = 1,
) -> Footprint:
    """Return the footprint of training a model of `config` on rows such as `row`: 32k tokens of a 7B model in seconds.

    num_shards: GPUs that share weights, gradients and optimizer (FSDP2), and gather units of them for a moment.

    Raises:
        UserError: the model cannot be run without contents, or modules to adapt are not there.
    """
    weights = count_weights(config, lora=lora, trust_remote_code=trust_remote_code)
    kind: Any = type(config)
    content = config.to_json_string()
    try:
        runs = _run_shallow(kind, content, replace(row, compiled=False, optim="adamw_torch"), lora, trust_remote_code)
        one = _build_empty(config, 1, lora, row, trust_remote_code)
        fault = tiles_fault(decoder_layers(one))
        fraction, casts, gathered = 1.0, 0, 0
        if row.compiled:
            fraction = _fraction_kept_compiled(kind, content, row.precision, lora, trust_remote_code)
        if row.compiled or num_shards > 1:
            # A compiled layer casts its own weights, and again in the backward pass; FSDP2 gathers them in bfloat16.
            casts = cast_bytes(one) if row.precision == "bf16" else 0
            gathered = GATHERED_UNITS * _unit_bytes(one) if num_shards > 1 else 0
    except UserError:
        raise
    except Exception as error:  # whatever a model's code does with the contents that are not there
        name = config.get_text_config().model_type
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: its memory cannot be predicted, its code needs the contents of tensors: {told}"
        ) from error
    head, layer = (_fit_moment(runs, place) for place in (0, 1))
    if row.compiled or num_shards > 1:
        # Autocast's copies of the weights are what a recomputed layer holds until the head is done, and not beyond.
        head = replace(
            head,
            kept=round(fraction * (head.kept - casts)),
            recomputed=min(head.recomputed, layer.recomputed),
            whole=min(head.whole, layer.whole),
        )
        layer = replace(layer, kept=layer.kept - casts)
    if row.compiled:
        layer = _as_compiled(layer, fraction)
    states = count_states(weights, lora=lora, row=row)
    return Footprint(
        num_layers=int(config.get_text_config().num_hidden_layers),
        **{name: -(-num_bytes // num_shards) for name, num_bytes in states.items()},
        head=head,
        layer=layer,
        gathered_bytes=gathered,
        tiles_fault=fault,
    )


@lru_cache(maxsize=64)  # the arms of a comparison, and the changes that a plan tries, have rows in common
def _run_shallow(
    kind: type[PretrainedConfig], config: str, row: Row, lora: LoraSettings | None, trust_remote_code: bool
) -> dict[tuple[int, str], tuple[int, int]]:
    """Return the peaks (head, layers) of models of (two or three layers, each of the four ways).

    kind, config: the model's config, as its class and its JSON.
    """
    whole = kind.from_dict(json.loads(config))

    def run(num_layers: int, way: str) -> tuple[int, int]:
        model = _build_empty(whole, num_layers, lora, row, trust_remote_code)
        tiles = way == "tiles" and not tiles_fault(decoder_layers(model))
        kept, selective = way == "kept", way == "recomputed"
        return _run_empty(model, row, Recompute(0 if kept else num_layers, selective, tiles=tiles))

    return {(n, way): run(n, way) for n in (2, 3) for way in ("kept", "recomputed", "whole", "tiles")}


def _build_empty(
    config: Any, num_layers: int, lora: LoraSettings | None, row: Row, trust_remote_code: bool
) -> nn.Module:
    """Return a model of `config` with fewer layers, on the meta device, in the types that training has."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = list(kinds[:num_layers])
    text.num_hidden_layers = num_layers
    dtype = torch.float32 if lora is None or row.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shallow, dtype=dtype, trust_remote_code=trust_remote_code)
        if row.quantize == "float8":
            store_in_float8(model, dtype=dtype, device=torch.device("meta"))
        for module in model.modules() if row.quantize == "nf4" else ():
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                module.__class__ = _PackedLinear
        return add_adapter(model, lora) if lora is not None else model  # type: ignore[no-any-return]


class _PackedLinear(nn.Linear):
    """Takes the memory of a layer in 4 bits: its matrix is unpacked for each product, and peft copies the output."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product; its copy is what peft adds the adapter's output to."""
        product: Tensor = _UnpackedProduct.apply(input.to(self.weight.dtype), self.weight)
        return (product if self.bias is None else product + self.bias).clone()


class _UnpackedProduct(torch.autograd.Function):
    """A product with a matrix that is unpacked in both passes and not kept in between."""

    apply: Any

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return x times the transposed matrix."""
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        return gradient @ ctx.saved_tensors[0].clone(), None


def _run_empty(model: Any, row: Row, recompute: Recompute) -> tuple[int, int]:
    """Return the peaks (head, layers) of one step of a model on the meta device, on fake tensors."""
    model.train()
    inner_model(model).set_attn_implementation(STAND_IN)
    mode = FakeTensorMode()
    batch = _fake_batch(row, mode)
    with mode, prepared_layers(model, recompute, compiled=False):
        _fill_with_fakes(model)
        return meter_step(model, batch, autocast=row.precision == "bf16", most_logits=MOST_LOGITS["cuda"])


def _unit_bytes(model: Any) -> int:
    """Return the bytes of the largest unit that FSDP2 gathers: a layer, or an end of the model."""
    inner = inner_model(model)
    units = [*decoder_layers(model), inner.get_input_embeddings(), inner.get_output_embeddings()]
    sizes: list[int] = [sum(p.nbytes for p in unit.parameters()) for unit in units if unit is not None]
    return max(sizes)


def _fill_with_fakes(model: nn.Module) -> None:
    """Give the model's weights and buffers a place on the CPU; ties stay ties. Autocast does nothing on meta."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_weight = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


def _fake_batch(row: Row, mode: FakeTensorMode) -> Batch:
    """Return a row of one episode whose last `num_targets` tokens are its answer, in fake tensors."""
    span = np.array([[max(1, row.num_tokens - row.num_targets), row.num_tokens]])
    built = TokenizedEpisode(ids=np.zeros(row.num_tokens, dtype=np.int32), spans=span)
    batch = join_row([built], targets="all", weights=[np.ones(1)], tasks=[0], episodes=(0,))
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    fakes: dict[str, Any] = {k: mode.from_tensor(v) for k, v in tensors.items() if isinstance(v, Tensor)}
    return replace(batch, **fakes)


@torch.library.custom_op("manyicl::attention_footprint", mutates_args=())
def _attend_nothing(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return an output and a log-sum-exp that nothing is computed for; an operation, so that layers can keep them."""
    num_heads, num_tokens = query.shape[1:3]
    out = key.new_empty(1, num_tokens, num_heads, value.shape[-1])
    return out, query.new_empty(1, num_heads, num_tokens, dtype=torch.float32)


def _keep_all(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)  # what every fused kernel keeps for its backward pass


def _give_nothing(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


_attend_nothing.register_fake(_attend_nothing._init_fn)
_attend_nothing.register_autograd(_give_nothing, setup_context=_keep_all)


def _stand_in(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Take an attention function's place; scores that are capped have no fused kernel, so they are run as they are."""
    if softcap is not None:
        return attend_segments(module, query, key, value, attention_mask, softcap=softcap, **options)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    out: Tensor = _attend_nothing(query, key, value)[0]
    return out, None


ALL_ATTENTION_FUNCTIONS.register(STAND_IN, _stand_in)


def _fit_moment(runs: dict[tuple[int, str], tuple[int, int]], place: int) -> Moment:
    """Return the line through two and three layers, of each kind."""
    each = {way: runs[3, way][place] - runs[2, way][place] for _, way in runs}
    work = {f"work_{way}": runs[2, way][place] - 2 * num_bytes for way, num_bytes in each.items()}
    each.pop("tiles")  # as much as in full: the input
    return Moment(**each, **work)


@lru_cache(maxsize=8)  # a plan that does not fit tries many rows of one model
def _fraction_kept_compiled(
    kind: type[PretrainedConfig], config: str, precision: str, lora: LoraSettings | None, trust_remote_code: bool
) -> float:
    """Return the fraction that a compiled layer keeps of what it keeps uncompiled, by a real one on the CPU.

    kind, config: the model's config, as its class and its JSON.
    """
    row = Row(num_tokens=0, num_targets=0, precision=precision)
    model = _build_empty(kind.from_dict(json.loads(config)), 1, lora, row, trust_remote_code).to_empty(device="cpu")
    autocast = precision == "bf16"
    return measure_kept(model, autocast=autocast, compiled=True) / measure_kept(model, autocast=autocast)


def _as_compiled(moment: Moment, fraction: float) -> Moment:
    """Return the moment with layers that keep a fraction; a recomputed one takes more while it goes backward."""
    kept = round(fraction * moment.kept)
    work_whole = max(moment.work_whole, round(WHOLE_WORK_COMPILED * kept))
    return replace(
        moment,
        kept=kept,
        work_recomputed=max(moment.work_recomputed, round(RECOMPUTED_WORK_COMPILED * kept)),
        work_whole=work_whole,
        work_tiles=round(moment.work_tiles * work_whole / moment.work_whole),  # not measured: by the same ratio
    )


def count_states(weights: WeightCounts, *, lora: LoraSettings | None, row: Row) -> dict[str, int]:
    """Return the bytes that stay between steps: a trained weight is float32, and so is its gradient.

    weights: with `lora`, its adapter's may be missing; then the base alone is counted.
    """
    size = 2 if lora is not None and row.precision == "bf16" else 4
    trained = weights.base if lora is None else weights.adapters
    packed = weights.matrices if row.quantize else 0
    kept, looked_up = OPTIMIZERS[row.optim], weights.embedding if lora is None else 0
    each = FLOAT8_BYTES if row.quantize == "float8" else NF4_BYTES
    return {
        "weights_bytes": size * (weights.base - packed) + round(each * packed),
        "adapters_bytes": 4 * weights.adapters,
        "gradients_bytes": 4 * trained,
        "optimizer_bytes": round(kept.bytes_per_weight * (trained - looked_up) + kept.bytes_per_embedding * looked_up),
    }
