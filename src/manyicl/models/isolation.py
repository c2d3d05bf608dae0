"""Does a model keep the episodes of a row apart? A trial before rows go through it, and the slow path if it does not.

`segment_attention` keeps episodes apart in the attention of a model. A model may mix tokens elsewhere (a convolution, a
recurrent state, attention of its own, positions that depend on the length of the row), or may need what that attention
does not know (sinks, chunks). The trial compares rows of several episodes with the model's own forward of each episode.
A model that fails runs each episode alone, by its own attention: `loss.row_loss` does that outside `segment_attention`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyicl.episodes import Batch, TokenizedEpisode, join_row
from manyicl.errors import UserError, is_out_of_memory
from manyicl.models.attention.dispatch import attending_by, segment_attention, takes_segments
from manyicl.models.loss import target_logits
from manyicl.models.structure import caps_scores, device_of, inner_model, longest_boundary
from manyicl.models.trials import logit_difference

# Tokens of the two short episodes of the trial, and of the long one if the model has no window, chunk or the like.
QUERY_TOKENS, NEIGHBOUR_TOKENS, LONG_TOKENS = 48, 40, 512
FEWEST_TOKENS = 8
# Tokens of text that a trial needs; a longer episode repeats them.
TRIAL_TOKENS = QUERY_TOKENS + NEIGHBOUR_TOKENS + LONG_TOKENS
# Positions of a long episode that are compared: its last.
COMPARED_TOKENS = 32
# A difference that is rounding in any case, in standard deviations of a position's logits. Models that are right differ
# by less than 1e-5 in float32 with small weights drawn at random, real ones by less than 1e-4.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
# In low precision: as many times the spread between two of the model's own kernels.
SPREADS = 4.0


# Model -> why its episodes go alone ('' if a row of several is right), and the tokens of the longest one tried.
_verdicts: WeakKeyDictionary[nn.Module, tuple[str, int]] = WeakKeyDictionary()


def isolation_fault(model: nn.Module, ids: NDArray[np.int32] | Sequence[int], *, longest: int) -> str:
    """Return why the episodes of a row must go through `model` one at a time, '' if they need not.

    A model is tried once, and again for longer episodes if it has a window or chunk between the two lengths; a model
    that fails is warned of. ids: ordinary text of the model's tokenizer, repeated if it is too short. longest: tokens
    of the longest episode that will be run.

    Raises:
        UserError: the model cannot run even one episode alone, or its tokens see the tokens after them.
    """
    inner = inner_model(model)
    if inner is None:
        raise UserError(f"{type(model).__name__}: is not a model of transformers, which training needs")
    longest = _trial_length(inner.config, longest)
    fault, covered = _verdicts.get(inner, ("", 0))
    if fault or covered >= longest:
        return fault
    fault = _try_model(model, inner, np.asarray(ids, dtype=np.int32), longest=longest)
    _verdicts[inner] = fault, longest
    if fault:
        warnings.warn(
            f"{type(inner).__name__} {fault}: each episode goes through the model alone, which is slower",
            stacklevel=2,
        )
    return fault


@contextmanager
def row_attention(
    model: nn.Module, ids: NDArray[np.int32] | Sequence[int], *, longest: int, row_tokens: int = 0
) -> Iterator[None]:
    """Let rows of several episodes go through `model` such that no episode sees another.

    By `segment_attention` if the model passes the trial, else each episode alone by the model's own attention. The
    arguments are those of `isolation_fault`, and of `segment_attention`.

    Raises:
        UserError: as `isolation_fault`.
    """
    if isolation_fault(model, ids, longest=longest):
        with own_attention(model):
            yield
    else:
        with segment_attention(model, row_tokens=row_tokens):
            yield


@contextmanager
def own_attention(model: nn.Module, name: str = "") -> Iterator[None]:
    """Let `model` use an attention of transformers that does all its config asks for: `name`, or the one it has.

    Only the eager one knows a cap on attention's scores.
    """
    inner = inner_model(model)
    before = inner.config._attn_implementation
    if not name and caps_scores(inner.config):
        name = "eager"
    if not name or name == before or not inner._can_set_attn_implementation():
        yield
        return
    with attending_by(inner, name):
        yield


def _trial_length(config: Any, longest: int) -> int:
    """Return the tokens of the trial's long episode: beyond any window or chunk, as far as episodes go."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or longest
    beyond = longest_boundary(config) + COMPARED_TOKENS if longest_boundary(config) else LONG_TOKENS
    return max(FEWEST_TOKENS, min(longest, int(positions), max(LONG_TOKENS, beyond)))


def _try_model(model: nn.Module, inner: Any, ids: NDArray[np.int32], *, longest: int) -> str:
    """Return the fault that the trial finds, ''  if none; the model is left as it was."""
    num_query, num_near = min(QUERY_TOKENS, longest), min(NEIGHBOUR_TOKENS, longest)
    ids = np.resize(ids, num_query + num_near + longest)
    query, near, long = np.split(ids, [num_query, num_query + num_near])
    device = device_of(model)
    short, other, far = (_row(parts).to(device) for parts in ([near, query], [near[::-1].copy(), query], [long, query]))
    was_training = model.training
    model.eval()
    # Not inference_mode: a model may keep what it computes here, such as rotary frequencies, for training.
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            with own_attention(model):
                _refuse_unusable(model, inner, near, query)
                near_NV, query_NV = target_logits(model, short).split([_num_compared(near), _num_compared(query)])
                long_NV = target_logits(model, _row([long]).to(device))
            if not inner._can_set_attn_implementation():
                return "does not take its attention from outside"
            most = _most_difference(model, short, torch.cat([near_NV, query_NV]))
            with segment_attention(model):
                if not takes_segments(model):
                    return "does not take its attention from outside"
                rows = [target_logits(model, row) for row in (short, other, far)]
            return _judge(rows, own=(near_NV, query_NV, long_NV), most=most)
    except UserError:
        raise
    except Exception as error:  # whatever a class does with an attention or arguments that it does not expect
        if is_out_of_memory(error):
            raise
        return f"fails on a row of several episodes ({_shorten(error)})"
    finally:
        model.train(was_training)


def _judge(rows: Sequence[Tensor], *, own: tuple[Tensor, Tensor, Tensor], most: float) -> str:
    """Return what the rows (near, query), (other text, query) and (long, query) show against the episodes alone."""
    near_NV, query_NV, long_NV = own
    num = len(query_NV)
    alone = float(logit_difference(rows[0][:-num], near_NV).max())
    long = float(logit_difference(rows[2][:-num], long_NV).max())
    behind = max(float(logit_difference(row[-num:], query_NV).max()) for row in (rows[0], rows[2]))
    changed = float(logit_difference(rows[1][-num:], rows[0][-num:]).max())
    told = "of the logits' standard deviation"
    if max(alone, long) > most:
        return f"gives other logits by the attention for rows than by its own ({max(alone, long):.2g} {told})"
    # Rows of the same lengths are computed alike, so that hardly any rounding differs.
    if changed > most / SPREADS:
        return f"does not keep the episodes of a row apart (another neighbour moves logits by {changed:.2g} {told})"
    if behind > most:
        return f"gives other logits behind another episode than alone ({behind:.2g} {told})"
    return ""


def _most_difference(model: nn.Module, row: Batch, own_NV: Tensor) -> float:
    """Return the largest difference that is rounding: in low precision, what two of the model's own kernels show."""
    most = ROUNDING.get(own_NV.dtype, 0.05)
    if own_NV.dtype == torch.float32:
        return most
    inner = inner_model(model)
    other = "sdpa" if inner.config._attn_implementation == "eager" else "eager"
    if caps_scores(inner.config):
        return most  # only one of its kernels is right
    try:
        with own_attention(model, other):
            spread = logit_difference(target_logits(model, row), own_NV).max()
    except (ValueError, ImportError):  # it has no other
        return most
    return max(most, SPREADS * float(spread))


@torch.no_grad()
def refuse_unusable(model: nn.Module, ids: NDArray[np.int32]) -> None:
    """Refuse a model whose own forward fails on ordinary text `ids`, or in which a token sees those after it.

    Raises:
        UserError: it is such a model.
    """
    inner = inner_model(model)
    ids = ids[ids < int(inner.config.get_text_config().vocab_size)]  # a tokenizer may know ids that the model has not
    first, second = np.split(np.resize(ids, QUERY_TOKENS + NEIGHBOUR_TOKENS).astype(np.int32), [QUERY_TOKENS])
    with own_attention(model):
        _refuse_unusable(model, inner, first, second)


def _refuse_unusable(model: nn.Module, inner: Any, first: NDArray[np.int32], second: NDArray[np.int32]) -> None:
    """Refuse a model whose own forward fails on one episode, or in which a token sees those after it."""
    device = device_of(model)
    kind = inner.config.model_type
    try:
        alone_NV = target_logits(model, _row([first]).to(device))
        whole_NV = target_logits(model, _row([np.concatenate([first, second])], compared=len(first) - 1).to(device))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"model.path: a {kind} model cannot be trained or measured here: its own forward pass fails on"
            f" {len(first)} tokens of text ({_shorten(error)}); use another model"
        ) from error
    num = min(len(alone_NV), len(whole_NV))
    moved = float(logit_difference(whole_NV[:num], alone_NV[:num]).max())
    if moved > (SPREADS * ROUNDING[torch.float32] if alone_NV.dtype == torch.float32 else 0.25):
        raise UserError(
            f"model.path: a token of this {kind} model sees the tokens after it (they move its logits by {moved:.2g} of"
            " their standard deviation), so it cannot predict the next one; use a causal language model"
        )


def _row(parts: Sequence[NDArray[np.int32]], *, compared: int = 0) -> Batch:
    """Return episodes of plain text in a row; their targets are the tokens compared.

    compared: the first so many of each episode but for its first; 0: its last `COMPARED_TOKENS`, or all if it is short.
    """
    built = []
    for ids in parts:
        span = (1, 1 + compared) if compared else (len(ids) - _num_compared(ids), len(ids))
        built.append(TokenizedEpisode(ids, np.array([span], dtype=np.int64)))
    weights = [np.ones(1) for _ in built]
    return join_row(built, targets="all", weights=weights, tasks=[0] * len(built), episodes=tuple(range(len(built))))


def _num_compared(ids: NDArray[np.int32]) -> int:
    return len(ids) - 1 if len(ids) <= QUERY_TOKENS else COMPARED_TOKENS


def _shorten(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
