"""Can queries share a model's keys and values? And the plain path of one that cannot: every prompt as a whole."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manyicl.inference.budget import MemoryPlan, plan_memory, run_rows
from manyicl.inference.prefix_trial import try_prefix
from manyicl.inference.query_rows import edge_logprobs
from manyicl.models import float32_head, inner_model

_faults: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # '' where there is none


def can_share_prefix(model: nn.Module) -> bool:
    """Return whether queries can be asked behind one encoded prefix of `model`; if not, the plain path is taken."""
    return not sharing_fault(model)


def sharing_fault(model: nn.Module, text: NDArray[np.int32] | None = None) -> str:
    """Return why queries cannot share a prefix of `model`, '' if they can. Each model is tried once, with one warning.

    text: `prefix_trial.TRIAL_TOKENS` tokens of ordinary text, which the trial of a real model should have.
    """
    inner = inner_model(model)
    if inner is None:
        return "is no model of transformers"
    if inner not in _faults:
        _faults[inner] = _config_fault(inner) or try_prefix(model, text)
        if _faults[inner]:
            warnings.warn(
                f"{type(inner).__name__} {_faults[inner]}: shots are encoded anew for every query (plain path)",
                stacklevel=2,
            )
    return _faults[inner]


def _config_fault(inner: Any) -> str:
    """Return what the class and its config say against sharing."""
    if getattr(inner, "_is_stateful", False):
        return "keeps a state besides keys and values"
    if not inner._can_set_attn_implementation():
        return "does not take its attention from outside"
    rope = getattr(inner.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")] + [r.get("rope_type") for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind in ("dynamic", "longrope"):
            return f"turns its positions by the length of the whole sequence (rope_type '{kind}')"
    return ""


def score_whole_prompts(
    model: nn.Module,
    before: NDArray[np.int32],
    queries: Sequence[NDArray[np.int32]],
    options: Sequence[Sequence[Sequence[int]]],
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.bool_]]]:
    """Return, for each query, the nats of each option and whether it is the greedy one, by one prompt an option.

    Prompts of one length share a forward pass, so that nothing is padded.
    """
    plan = plan_memory(model)
    nats = [np.zeros(len(group)) for group in options]
    greedy = [np.zeros(len(group), dtype=bool) for group in options]
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for q, group in enumerate(options):
        for o, option in enumerate(group):
            places.setdefault((len(before) + len(queries[q]) + len(option), len(option)), []).append((q, o))

    for (length, num_answer), members in places.items():

        def run(row: list[tuple[int, int]], num_answer: int = num_answer) -> None:
            ids = np.stack([np.concatenate([before, queries[q], options[q][o]]) for q, o in row])
            logprobs, best = _score_batch(model, ids, num_answer=num_answer)
            for place, (q, o) in enumerate(row):
                nats[q][o], greedy[q][o] = -logprobs[place].sum(), best[place].all()

        size = _prompt_share(plan, length)
        run_rows(members, share=lambda _, size=size: size, run=run)  # type: ignore[misc]
    return nats, greedy


def _prompt_share(plan: MemoryPlan, length: int) -> float:
    return plan.share(num_tokens=length, num_logits=length)


@torch.inference_mode()
def _score_batch(
    model: nn.Module, ids: NDArray[np.int32], *, num_answer: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (B, A) each: log-probability of the last `num_answer` ids of each row, and whether it is the likeliest."""
    ids_BT = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)
    scored = num_answer + 1  # the token before the answer, and all of the answer but for its last
    known = inspect.signature(inner_model(model).forward).parameters
    keep = {"logits_to_keep": scored} if "logits_to_keep" in known else {}
    with float32_head(model):
        output: Any = model(input_ids=ids_BT, use_cache=False, **keep)
    logits = output.logits[:, -scored:-1].flatten(0, 1)
    targets = ids_BT[:, -num_answer:].flatten()
    logprobs, best = edge_logprobs(logits, torch.arange(len(targets), device=targets.device), targets)
    shape = (len(ids), num_answer)
    return logprobs.double().cpu().numpy().reshape(shape), best.cpu().numpy().reshape(shape)
