"""What a model's config says of its layers: head dimensions, windows and chunks, for every config class.

The one place that reads them. Some classes give each layer its own value, and refuse to be asked for a common one.
"""

from __future__ import annotations

from typing import Any

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
    sources = [layers[i] for i in range(num_layers)] if own else [text] * num_layers
    values = [getattr(source, name, None) for source in sources]
    return tuple(value if isinstance(value, int) and value else default for value in values)


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
