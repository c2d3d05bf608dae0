"""What a model is made of, read from its config and its modules: the one place that does.

Configs: head dimensions, windows and chunks, how many tokens fit, for every config class. Some classes give each layer
its own value, and refuse to be asked for a common one. Modules: the model inside its wrappers, its decoder layers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from manyicl.errors import UserError

_ABSENT = object()
# Place -> what was there before any block of `switched`, under None, then what each block that is open writes.
_switched: dict[Hashable, dict[object, Any]] = {}
_switching = threading.Lock()

# Under which names the classes of transformers keep the length of a window or a chunk.
BOUNDARIES = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


def head_dims(config: Any) -> tuple[int, ...]:
    """Return the dimension of an attention head in each layer."""
    text = config.get_text_config()
    num_heads = layer_values(config, "num_attention_heads", default=1)
    own = layer_values(config, "head_dim", default=0)
    return tuple(dim or int(text.hidden_size) // heads for dim, heads in zip(own, num_heads, strict=True))


def key_heads(config: Any) -> tuple[int, ...]:
    """Return the number of key-value heads in each layer."""
    groups = layer_values(config, "num_key_value_heads", default=0)
    heads = layer_values(config, "num_attention_heads", default=1)
    return tuple(group or head for group, head in zip(groups, heads, strict=True))


def layer_values(config: Any, name: str, *, default: int) -> tuple[int, ...]:
    """Return an entry of the config for each layer; `default` if it is absent, null or not a number."""
    text = config.get_text_config()
    num_layers = int(text.num_hidden_layers)
    layers = getattr(text, "per_layer_config", None) or {}
    own = name in (getattr(text, "per_layer_attributes", None) or ())
    # An attribute of a config takes a microsecond, so one that all layers share is read once.
    values = [getattr(source, name, None) for source in ([layers[i] for i in range(num_layers)] if own else [text])]
    known = tuple(value if isinstance(value, int) and value else default for value in values)
    return known if own else known * num_layers


def boundaries(config: Any) -> list[int]:
    """Return the lengths at which the model may begin to treat a sequence differently: windows, chunks, and positions
    beyond which rotary angles are stretched.

    >>> from transformers import Gemma3TextConfig, LlamaConfig
    >>> boundaries(Gemma3TextConfig(sliding_window=512)), boundaries(LlamaConfig())
    ([512], [])
    """
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in BOUNDARIES]
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        found.append(part.get("original_max_position_embeddings"))
    kinds = getattr(text, "layer_types", None)
    if kinds and not any("full" not in kind for kind in kinds):
        found = found[len(BOUNDARIES) :]  # no layer has a window, whatever length one would have
    return sorted({int(value) for value in found if isinstance(value, (int, float)) and value > 0})


def rope_by_length(config: Any) -> str:
    """Return the rope_type whose rotary angles depend on the length of the whole sequence, '' if there is none.

    >>> from transformers import LlamaConfig
    >>> rope_by_length(LlamaConfig())
    ''
    >>> rope_by_length(LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
    'dynamic'
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return next((str(kind) for kind in kinds if kind in ("dynamic", "longrope")), "")


def longest_boundary(config: Any) -> int:
    """Return the largest of `boundaries`; 0 if there is none."""
    return max(boundaries(config), default=0)


def common_window(config: Any) -> int | None:
    """Return the sliding window if every layer has one, else None (some layer sees everything)."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not window or (kinds and set(kinds) - {"sliding_attention"}):
        return None
    return int(window)


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Return how many tokens (itself included) one sees in each layer; None: all before it.

    A chunk counts as a window of its length, which is too many pairs beyond the first chunk, by up to two times.

    Raises:
        UserError: a layer that does something else.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (window,) * int(text.num_hidden_layers)
    chunk = getattr(text, "attention_chunk_size", None) or None
    known = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
    for kind in kinds:
        if kind not in known:
            raise UserError(
                f"{text.model_type}: what a layer of kind '{kind}' costs is not known here; use a model whose layers"
                f" are all of {', '.join(known)}"
            )
    return tuple(known[kind] for kind in kinds)


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the weights of a model are stored in; shared weights are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def experts_per_token(config: Any) -> int:
    """Return how many experts of a layer one token goes through.

    Raises:
        UserError: the config does not say.
    """
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    if chosen is None:
        raise UserError(
            f"{text.model_type}: does not say how many experts a token meets (num_experts_per_tok), so its"
            " cost is not known; use another model"
        )
    return int(chosen)


def caps_scores(config: Any) -> bool:
    """Return whether attention's scores are capped, which only the eager attention of transformers does."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def drops_attention(config: Any) -> bool:
    """Return whether attention drops weights in training."""
    return bool(getattr(config.get_text_config(), "attention_dropout", 0.0))


def check_window(config: Any, *, num_tokens: int, what: str) -> None:
    """Refuse sequences longer than the model can use.

    Raises:
        UserError: `num_tokens` exceeds the maximum positions, or the window where every layer's attention slides.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        raise UserError(
            f"{what} = {num_tokens}: the model knows {limit} positions (max_position_embeddings); lower it, or extend"
            " the positions on purpose with model.config.max_position_embeddings and model.config.rope_parameters"
        )
    window = common_window(config)
    if window is not None and num_tokens > window:
        raise UserError(
            f"{what} = {num_tokens}: every layer of the model sees only the last {window} tokens (sliding_window), and"
            f" such models collapse beyond it; set it to at most {window}, or model.config.sliding_window = 'none'"
        )


def check_vocabulary(config: Any, *, path: str, num_tokens: int) -> None:
    """Refuse ids that the model has no embedding for, which would end deep inside of it.

    Raises:
        UserError: `num_tokens`, one more than the largest id in use, exceeds the rows of the embedding.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and num_tokens > rows:
        raise UserError(
            f"{path}: its tokenizer writes token {num_tokens - 1:,}, but the model has only {rows:,}; use the tokenizer"
            " that belongs to it, or give the model more rows (resize_token_embeddings) and save it"
        )


def max_tokens_of(config: Any) -> int:
    """Return the longest sequence that the model can use.

    Raises:
        UserError: its config does not say.
    """
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), common_window(config)]
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise UserError(f"`max_tokens`: a {config.model_type} model does not say how long a sequence may be; say it")
    return min(known)


def inner_model(model: nn.Module) -> Any:
    """Return transformers' model inside whatever wraps it (peft, DDP, FSDP), or itself; None if there is none."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


@contextmanager
def switched(key: Hashable, value: Any, *, read: Callable[[], Any], write: Callable[[Any], None]) -> Iterator[None]:
    """Write a value in the block; what was there before returns afterwards.

    Blocks of several threads may overlap: the value is that of the block which was entered last of those that are
    left, and what was there before all of them returns after the last.

    key: the place that is written. read: returns what is there. write: puts a value there.
    """
    block = object()
    with _switching:
        values = _switched.setdefault(key, {None: read()})
        values[block] = value
        write(value)
    try:
        yield
    finally:
        with _switching:
            del values[block]
            write(next(reversed(values.values())))
            if len(values) == 1:
                del _switched[key]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module, class or object another attribute in the block, as `switched` does."""

    def write(value: Any) -> None:
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)

    with switched((id(owner), name), value, read=lambda: vars(owner).get(name, _ABSENT), write=write):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    return next(model.parameters()).device


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model in order: the longest list of modules in it that transformers can recompute."""
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
    known = [found for found in lists if found and all(isinstance(x, GradientCheckpointingLayer) for x in found)]
    return max(known, key=len, default=[])


def check_modules(model: nn.Module, modules: str | Sequence[str]) -> None:
    """Refuse layers to adapt that the model does not have; peft passes over a wrong name beside a right one.

    modules: names of layers, or a regular expression that fits the whole name of some.

    Raises:
        UserError: naming what is wrong, and the model's linear layers.
    """
    names = [name for name, _ in model.named_modules()]
    if isinstance(modules, str):
        try:
            lost = [] if any(re.fullmatch(modules, name) for name in names) else [modules]
        except re.error as error:
            raise UserError(
                f"model.lora.modules = {modules!r}: is not a regular expression ({error}); correct it"
            ) from error
        told = "fits no layer's whole name, such as model.layers.0.self_attn.q_proj"
    else:
        lost = [own for own in modules if not any(f".{name}".endswith(f".{own}") for name in names)]
        told = "is not the name of a layer"
    if lost:
        # Not nn.Linear: GPT-2's are of a class of their own.
        leaves = ((name, getattr(part, "weight", None)) for name, part in model.named_modules())
        known = {name.rpartition(".")[2] for name, weight in leaves if weight is not None and weight.ndim == 2}
        raise UserError(
            f"model.lora.modules: {lost[0]!r} {told}; use 'all-linear', or some of {', '.join(sorted(known))}"
        )
