"""Can queries share a model's encoded shots? Its config may rule it out; else a trial on ordinary text decides.

Does the model give the same logits after an encoded prefix as by its own forward? The trial asks two questions, because
low precision hides errors and shows rounding. In float32, where rounding is 1e-6: is it the same function? In the
model's own precision: does it round no worse than the model's own kernels? Both look at a short prefix, and at one
longer than the model's window or chunk. The second question is not answered by a fixed fraction of the logits' size: on
some tokens bfloat16 itself is mostly rounding, for every kernel. It is skipped on a CPU that only emulates bfloat16,
where it would take minutes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyicl.errors import is_out_of_memory
from manyicl.inference.budget import usable_memory
from manyicl.inference.query_rows import Query, lay_out_row, run_row, write_keys
from manyicl.models import (
    KeyValueBuffer,
    Prefix,
    caps_scores,
    count_parameters,
    in_float32,
    inner_model,
    logit_difference,
    longest_boundary,
    multiplies_bf16,
    own_attention,
    rope_by_length,
    segment_attention,
)

# Tokens of the short prefix, of the two queries behind it, and of the long prefix beyond the window.
PREFIX_TOKENS, QUERY_TOKENS, BEYOND_TOKENS = 48, (12, 9), 32
# A longer prefix is not tried: the model's own forward would need gigabytes for its scores.
LONGEST_PREFIX = 9000
# Text that the trial of a model needs; less is repeated.
TRIAL_TOKENS = PREFIX_TOKENS + sum(QUERY_TOKENS) + 1024
# Mean differences, in standard deviations of the logits. In float32 real models differ by 1e-6 to 1e-4.
MOST_IN_FLOAT32 = 2e-3
# In low precision the error may be so many times that of the model's own kernels, and rounding up to this is no error.
SPREADS, ROUNDING = 3.0, 0.05
# On a CPU, whose free memory is not used, larger models than this are not copied to float32.
MOST_CPU_WEIGHTS = 2_000_000_000
# Of a GPU's memory that may be counted on, such a copy may take so much.
COPY_FRACTION = 0.7

_faults: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # '' if there is none


def sharing_fault(model: nn.Module, text: NDArray[np.int32] | None = None) -> str:
    """Return why queries cannot share a prefix of `model`; "" if they can. Each model is tried once, with one warning.

    text: `TRIAL_TOKENS` tokens of ordinary text, which the trial of a real model should have.
    """
    inner = inner_model(model)
    if inner is None:
        return "is not a model of transformers"
    if inner not in _faults:
        _faults[inner] = _config_fault(inner) or try_prefix(model, text)
        if _faults[inner]:
            warnings.warn(
                f"{type(inner).__name__} {_faults[inner]}: shots are encoded anew for every query (plain path)",
                stacklevel=2,
            )
    return _faults[inner]


def _config_fault(inner: Any) -> str:
    """Return why the class or its config rules sharing out; "" if they do not."""
    if getattr(inner, "_is_stateful", False):
        return "keeps a state besides keys and values"
    if not inner._can_set_attn_implementation():
        return "does not take its attention from outside"
    if kind := rope_by_length(inner.config):
        return f"turns its positions by the length of the whole sequence (rope_type '{kind}')"
    return ""


def try_prefix(model: nn.Module, text: NDArray[np.int32] | None) -> str:
    """Return what goes wrong after a shared prefix of `model`; "" if nothing does.

    text: ordinary text in the model's own tokens; None: ids drawn from the whole vocabulary.

    Raises:
        RuntimeError: even the trial does not fit the device's memory.
    """
    inner = inner_model(model)
    vocab_size = int(inner.config.get_text_config().vocab_size)
    # A tokenizer may know ids that the model does not; they are refused when they would be used.
    text = None if text is None else text[text < vocab_size]
    if text is None or not len(text):
        text = np.random.default_rng(0).integers(0, vocab_size, TRIAL_TOKENS).astype(np.int32)
    lengths = [PREFIX_TOKENS]
    boundary = longest_boundary(inner.config) + BEYOND_TOKENS
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None) or LONGEST_PREFIX
    if BEYOND_TOKENS < boundary <= min(LONGEST_PREFIX, int(positions) - sum(QUERY_TOKENS)):
        lengths.append(boundary)
    try:
        for length in lengths:
            fault = _try_length(model, inner, np.resize(text, length + sum(QUERY_TOKENS)))
            if fault:
                return fault
    except Exception as error:  # whatever a class does with keyword arguments that it does not expect
        if is_out_of_memory(error):
            raise
        return f"fails behind a prefix ({' '.join(str(error).split())[:120]})"
    return ""


@torch.inference_mode()
def _try_length(model: nn.Module, inner: Any, ids: NDArray[np.int32]) -> str:
    """Return the fault after one prefix: all of `ids` except the queries at its end."""
    before = ids[: -sum(QUERY_TOKENS)]
    queries = [part.copy() for part in np.split(ids[len(before) :], [QUERY_TOKENS[0]])]
    weight = next(model.parameters())
    truth_NV = None
    if weight.dtype == torch.float32 or _has_room_for_float32(model):
        with in_float32(model):
            # The eager attention is the one that knows caps and sinks.
            truth_NV = _own_logits(model, before, queries, attention="eager")
            fault = _describe(_mean(_shared_logits(model, before, queries), truth_NV), most=MOST_IN_FLOAT32)
        if fault or weight.dtype == torch.float32 or not multiplies_bf16(weight.device):
            return fault
    shared_NV = _shared_logits(model, before, queries)
    own_NV = _own_logits(model, before, queries, attention="eager")
    others = [own_NV]
    if not caps_scores(inner.config):
        with suppress(ValueError, ImportError):  # a class may have no other
            others.append(_own_logits(model, before, queries, attention="sdpa"))
    if truth_NV is not None:
        spread = max(_mean(other_NV, truth_NV) for other_NV in others)
        return _describe(_mean(shared_NV, truth_NV), most=SPREADS * spread + ROUNDING, spread=spread)
    spread = _mean(others[-1], own_NV)
    return _describe(_mean(shared_NV, own_NV), most=SPREADS * spread + ROUNDING, spread=spread)


def _mean(logits_NV: Tensor, reference_NV: Tensor) -> float:
    return float(logit_difference(logits_NV, reference_NV).mean())


def _describe(difference: float, *, most: float, spread: float | None = None) -> str:
    # If the model's own logits are not finite the difference is 0; they are reported when they are used.
    if difference <= most:
        return ""
    rounding = "" if spread is None else f", by its own kernels {spread:.2g}"
    moved = f"its logits move by {difference:.2g} of their size{rounding}"
    return f"gives other likelihoods behind a shared prefix ({moved})"


def _shared_logits(model: nn.Module, before: NDArray[np.int32], queries: Sequence[NDArray[np.int32]]) -> Tensor:
    """Return the logits (N, V) of the queries' tokens after the encoded prefix `before`."""
    device = next(model.parameters()).device
    with segment_attention(model):
        store = KeyValueBuffer(len(before))
        write_keys(model, before, after=Prefix(before[:0], store))
        store.num_tokens = len(before)
        row = lay_out_row([Query(query, None) for query in queries], prefix=Prefix(before, store), device=device)
        ids, positions = (torch.from_numpy(x).to(device) for x in row[:2])
        return run_row(model, ids, positions, layout=row[2], keep=len(row[0]))


def _own_logits(
    model: nn.Module, before: NDArray[np.int32], queries: Sequence[NDArray[np.int32]], *, attention: str
) -> Tensor:
    """Return the same logits by the model's own forward of each whole prompt."""
    device = next(model.parameters()).device
    logits = []
    with own_attention(model, attention):
        for query in queries:
            ids = torch.from_numpy(np.concatenate([before, query]).astype(np.int64))[None].to(device)
            output: Any = model(input_ids=ids, use_cache=False, logits_to_keep=len(query))
            logits.append(output.logits[0, -len(query) :])
    return torch.cat(logits)


def _has_room_for_float32(model: nn.Module) -> bool:
    """Return whether a float32 copy of the weights fits beside them."""
    num_bytes = 4 * count_parameters(model)
    device = next(model.parameters()).device
    if device.type == "cuda":
        return num_bytes < COPY_FRACTION * usable_memory(device)
    return num_bytes < 4 * MOST_CPU_WEIGHTS
