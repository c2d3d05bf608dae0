"""Attention that keeps the episodes of a row apart, and attention to a shared prefix. No dense mask of a row.

It is registered with transformers under a name; the model's forward hands it `segments` (training) or a `layout`
(behind a prefix) as keyword arguments. No mask function is registered under that name on purpose: transformers then
builds no mask, and does not look for packed rows, which would cost a host-device synchronisation a forward.

Behind a prefix the attention of a row is done in parts that are merged by their log-sum-exp: all tokens of the row to
the prefix in one call (`partial.attend_all`); and each segment to itself, by varlen attention in half precision on a
GPU (`partial.Runs`), elsewhere all segments in one batch, padded.

Shapes: B batch (always 1), H query heads, G key-value heads, T row, S segments, L longest segment, P prefix, D head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyicl.episodes import Segments
from manyicl.models.attention.partial import (
    Part,
    Runs,
    as_bias,
    attend_all,
    attend_part,
    attend_runs,
    fold_heads,
    merge_parts,
    takes_flash,
)
from manyicl.models.attention.segments import attend_row_segments, kernel_order
from manyicl.models.structure import drops_attention, inner_model, switched

IMPLEMENTATION = "manyicl_segments"
# What merges the parts of a row's attention behind a prefix: the last; see `merging_by`. Of all threads, since a model
# may be asked in another one than the block was entered in.
_merges: list[Callable[[Sequence[Part]], Tensor]] = [merge_parts]
_has_one_config: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models of transformers


class KeyValueBuffer:
    """Keys and values of encoded tokens by layer, rotary positions applied; each token's are written once.

    num_tokens: tokens that are written in every layer. A buffer that is full is replaced by one twice as long.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.num_tokens = 0
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # (1, G, room, D) each

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write (1, G, n, D) behind the tokens that are there; they count once `num_tokens` is moved."""
        start, stop = self.num_tokens, self.num_tokens + keys.shape[2]
        if layer not in self.buffers or self.buffers[layer][0].shape[2] < stop:
            self.room = self.room if self.room >= stop else max(stop, 2 * self.num_tokens)
            grown = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (keys, values)]
            if start:
                for new, old in zip(grown, self.buffers[layer], strict=True):
                    new[:, :, :start] = old[:, :, :start]
            self.buffers[layer] = (grown[0], grown[1])
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[:, :, start:stop] = new


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Encoded tokens that queries stand behind: the first `num_tokens` of a store that later prefixes may share.

    store: None where the model's cache cannot be shared; then only the ids are kept.
    """

    ids: NDArray[np.int32]
    store: KeyValueBuffer | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.ids)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (1, G, P, D), without copying; never written to."""
        assert self.store is not None
        keys, values = self.store.buffers[layer]
        return keys[:, :, : self.num_tokens], values[:, :, : self.num_tokens]


EMPTY_PREFIX = Prefix(ids=np.zeros(0, dtype=np.int32))


class KeySink(Protocol):
    """Something that keeps the keys and values of a row, (1, G, T, D), such as a prefix's store."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep them."""


class OwnKeys(Protocol):
    """Keys and values that rows before this one left to its segments, one token a segment and row."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (1, G, S, D) and return all, (S, G, K, D)."""


@dataclass(frozen=True, slots=True, eq=False)
class RowLayout:
    """How the segments of one row follow a prefix; made once per row, read by every layer."""

    prefix: Prefix
    offsets_SL: Tensor
    """Position of each token after the prefix, padded."""
    max_offset: int
    """The largest of them."""
    key_offsets_SK: Tensor
    """The same of the segments' own keys: the row's, unless `own` has others."""
    seen: Callable[[], Tensor] | None = None
    """Returns which own keys a token sees, (S, L, K), if a kernel needs it; None: those up to itself."""
    runs: Callable[[], Runs | None] | None = None
    """Returns the same for varlen attention, which is taken where it can be; None: it would gain nothing."""
    places: tuple[Tensor, Tensor] | None = None
    """(index of each padded cell in the row (S * L,), cell of each token of the row (T,)); None: no padding."""
    sink: KeySink | None = None
    """Keeps the row's keys and values, to become a prefix."""
    own: OwnKeys | None = None
    """Keys and values of earlier rows of the same segments, as in generation."""
    biases: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    """What was added to scores, by kind and window: made by the first layer that needs it, used by the others."""

    def pad(self, row: Tensor) -> Tensor:
        """Return (1, H, T, D) as (S, H, L, D)."""
        num_segments, longest = self.offsets_SL.shape
        if num_segments == 1:  # never padded
            return row
        cells = row[0] if self.places is None else row[0].index_select(1, self.places[0])
        return cells.reshape(len(cells), num_segments, longest, -1).transpose(0, 1)

    def unpad(self, part: Part) -> Part:
        """Return out (S, H, L, D) and lse (S, H, L) as those of the row, (1, H, T, D) and (1, H, T)."""
        if len(self.offsets_SL) == 1:
            return part
        out, lse = (x.transpose(0, 1).flatten(1, 2) for x in part)
        if self.places is not None:
            out, lse = (x.index_select(1, self.places[1]) for x in (out, lse))
        return out[None], lse[None]

    def own_window(self, window: int | None) -> int | None:
        """Return the window as far as own keys are concerned; None: no token is so far from another."""
        return None if window is None or self.max_offset < window else window

    def own_bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores of own keys, (S or 1, 1, L, K); None: plainly causal."""
        if window is None and self.seen is None:
            return None
        if ("own", window) not in self.biases:
            queries, keys = self.offsets_SL[:, :, None], self.key_offsets_SK[:, None, :]
            seen = keys <= queries if self.seen is None else self.seen()
            if window is not None:
                seen = seen & (keys > queries - window)
            self.biases["own", window] = as_bias(seen, dtype)[:, None]
        return self.biases["own", window]

    def edge_bias(self, window: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores of the prefix's tokens [start, stop), (1, 1, T, stop - start)."""
        if ("edge", window) not in self.biases:
            offsets_T = self.offsets_SL.flatten()
            if self.places is not None:
                offsets_T = offsets_T[self.places[1]]
            keys = torch.arange(start, stop, device=offsets_T.device)
            seen = keys[None] > (offsets_T + self.prefix.num_tokens - window)[:, None]
            self.biases["edge", window] = as_bias(seen, dtype)[None, None]
        return self.biases["edge", window]


def attend_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    segments: Segments | None = None,
    layout: RowLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend each segment of a one-row batch to itself, causally, and to the layout's prefix.

    query: (1, H, T, D); key, value: (1, G, T, D). Returns (1, T, H, D), as transformers' attention functions do.
    """
    query, key, value = _in_one_dtype(query, key, value)
    one_of = (segments is None) != (layout is None)
    if s_aux is not None:
        raise RuntimeError("attention sinks are not known here")
    if not one_of or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError(
            f"attention '{IMPLEMENTATION}' takes one row, segments or a layout, and no attention mask;"
            " use it through manyicl.models.attention.dispatch.segment_attention only"
        )
    if layout is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        out = _attend_row(
            layer, query, key, value, layout=layout, scaling=scaling, window=sliding_window, softcap=softcap
        )
        return out.transpose(1, 2).contiguous(), None
    assert segments is not None
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "window": sliding_window, "softcap": softcap}
    return attend_row_segments(query, key, value, segments=segments, **options), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend_segments)


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return them in autocast's type, else in the values', as torch's own attention does under autocast.

    With float32 weights under bfloat16 autocast the projections give bfloat16, but the rotary step multiplies by
    float32 and returns float32, which the fast kernels do not take.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    if query.dtype == key.dtype == value.dtype == dtype:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def takes_segments(model: nn.Module) -> bool:
    """Return whether `model` attends by segments now, so that a row of several episodes can go through it."""
    inner = inner_model(model)
    return inner is not None and str(inner.config._attn_implementation).startswith("manyicl")


@contextmanager
def segment_attention(model: nn.Module, *, row_tokens: int = 0) -> Iterator[None]:
    """Let `model` (also inside peft's or DDP's wrapper) attend by segments; its own attention returns afterwards.

    row_tokens: of the rows that it is trained on, for which a kernel is chosen.
    """
    inner = inner_model(model)
    with attending_by(inner, IMPLEMENTATION), kernel_order(row_tokens=row_tokens, drops=drops_attention(inner.config)):
        yield


@contextmanager
def attending_by(inner: Any, name: str) -> Iterator[None]:
    """Let transformers' model `inner` attend by `name` in the block; blocks of several threads may overlap."""
    read, write = (lambda: inner.config._attn_implementation), partial(_set_attention, inner)
    with switched((id(inner), "attention"), name, read=read, write=write):
        yield


def _set_attention(inner: Any, name: str) -> None:
    """Let transformers' model `inner` attend by `name`; by itself it would look at every one of its modules each time.

    One config that all modules share is what most models have.
    """
    if inner.config._attn_implementation == name:
        return
    if inner not in _has_one_config:
        configs = {id(part.config) for part in inner.modules() if isinstance(part, PreTrainedModel)}
        _has_one_config[inner] = len(configs) == 1 and not inner.config.sub_configs
    if _has_one_config[inner] and inner._can_set_attn_implementation():
        inner.config._attn_implementation = name
    else:
        inner.set_attn_implementation(name)


@contextmanager
def merging_by(merge: Callable[[Sequence[Part]], Tensor]) -> Iterator[None]:
    """Merge the parts of attention behind a prefix by `merge` in the block, which must return what `merge_parts` does.

    A compiled merge is passed in this way, so that one which is not used cannot go unnoticed.
    """
    _merges.append(merge)
    try:
        yield
    finally:
        _merges.pop()


def current_merge() -> Callable[[Sequence[Part]], Tensor]:
    """Return what merges the parts of attention now."""
    return _merges[-1]


def _attend_row(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: RowLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend a row behind a prefix: (1, H, T, D)."""
    if layout.sink is not None:
        layout.sink.write(layer, key, value)
    within = layout.own_window(window)
    runs = layout.runs() if layout.runs is not None and takes_flash(query, value, softcap=softcap) else None
    if runs is not None:
        parts = [attend_runs(query, key, value, runs=runs, scaling=scaling, window=within)]
    else:
        parts = [_own_part(layer, query, key, value, layout=layout, scaling=scaling, window=within, softcap=softcap)]
    if layout.prefix.num_tokens:
        parts += _prefix_parts(layer, query, layout=layout, scaling=scaling, window=window, softcap=softcap)
    return current_merge()(parts)


def _own_part(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: RowLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Part:
    """Return the attention of every token of the row to its segment's own keys, all segments in one batch."""
    keys, values = (
        layout.own.extend(layer, key, value) if layout.own is not None else (layout.pad(key), layout.pad(value))
    )
    queries = layout.pad(query)
    single = queries.shape[2] == 1  # then a group's heads are as good as tokens: no key is repeated
    if single:
        queries = fold_heads(queries, key.shape[1])
    bias = layout.own_bias(window, query.dtype)
    causal = bias is None and not single
    out, lse = attend_part(queries, keys, values, scaling=scaling, causal=causal, bias=bias, softcap=softcap)
    if single:
        out, lse = (x.reshape(x.shape[0], query.shape[1], 1, *x.shape[3:]) for x in (out, lse))
    return layout.unpad((out, lse))


def _prefix_parts(
    layer: int, query: Tensor, *, layout: RowLayout, scaling: float | None, window: int | None, softcap: float | None
) -> list[Part]:
    """Return the attention of every token of the row to the prefix: to what all of them see, and to what some see."""
    keys, values = layout.prefix.layer(layer)
    num_tokens = layout.prefix.num_tokens
    # The token at offset o sees the prefix from num_tokens + o - window + 1 on.
    first, core = 0, 0
    if window is not None:
        first = min(num_tokens, max(0, num_tokens - window + 1))
        core = min(num_tokens, max(0, num_tokens - window + 1 + layout.max_offset))
    parts = []
    if core < num_tokens:
        parts.append(attend_all(query, keys[:, :, core:], values[:, :, core:], scaling=scaling, softcap=softcap))
    if first < core:
        assert window is not None
        bias = layout.edge_bias(window, first, core, query.dtype)
        edge = (x[:, :, first:core] for x in (keys, values))
        out, lse = attend_part(query, *edge, scaling=scaling, bias=bias, softcap=softcap)
        unseen = bias[..., -1].isneginf()  # the window of these tokens begins behind the edge
        parts.append((out.masked_fill(unseen[..., None], 0.0), lse.masked_fill(unseen, float("-inf"))))
    return parts
