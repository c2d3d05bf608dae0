"""Cross-entropy on answer tokens, and its one normaliser.

This is the one place where a target is shifted: the logits of a target come from the position before it. Nothing is
ever passed as `labels=`, which Hugging Face's models shift themselves.

Many targets times a large vocabulary go through the head in chunks, whose logits are dropped and made again in the
backward pass. It is done in the head's own place, inside the model's forward, so that whatever wraps the model (an
adapter, DDP, FSDP2) finds the head used where it expects it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from manyicl.episodes import Batch, split_row
from manyicl.models.attention.dispatch import takes_segments
from manyicl.models.structure import inner_model, replaced

# Shape suffixes: N targets, A answers, V vocabulary, H hidden size.

# Logits that are held at once: with their float32 copies and gradients, about ten times as many bytes.
MOST_LOGITS = {"cuda": 1 << 27, "cpu": 1 << 25}
# Models whose forward does nothing behind the head but cap its logits, where their config says so.
PLAIN_HEADS = frozenset(
    {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"}
)


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """What one row costs."""

    loss: Tensor
    """Scalar: the weighted sum over targets, already divided by the global counts of the optimizer step."""
    nll_A: Tensor
    """Nats of each answer, summed over its tokens; float32, detached."""
    num_tokens_A: Tensor
    """Tokens of each answer."""
    correct_A: Tensor
    """Whether every token of an answer is the most likely one (greedy match)."""


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits_NV of the targets of a row; no other position is projected onto the vocabulary.

    Inside `attention.segment_attention` the row goes through the model at once; outside of it each episode goes alone,
    as the model's own forward takes it.
    """
    if not takes_segments(model):
        return torch.cat([_own_logits(model, part) for part in split_row(batch)])
    output = model(
        input_ids=batch.input_ids_1T,
        position_ids=batch.position_ids_1T,
        segments=batch.segments,
        logits_to_keep=batch.target_positions_N - 1,
        use_cache=False,
    )
    logits_NV: Tensor = output.logits[0]
    return logits_NV


def _own_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits_NV of the targets of one episode, by the model's own forward with nothing but its ids."""
    positions_N = batch.target_positions_N - 1
    known = inspect.signature(inner_model(model).forward).parameters
    if "logits_to_keep" in known:
        output = model(input_ids=batch.input_ids_1T, logits_to_keep=positions_N, use_cache=False)
        logits_NV: Tensor = output.logits[0]
        return logits_NV
    logits_1TV: Tensor = model(input_ids=batch.input_ids_1T, use_cache=False).logits
    return logits_1TV[0, positions_N]


def row_loss(model: nn.Module, batch: Batch, *, most_logits: int | None = None) -> AnswerLoss:
    """Return the loss of a row, in chunks of its targets where all their logits at once would be large.

    Inside `attention.segment_attention` the row goes through the model at once; outside of it each episode goes alone.
    most_logits: held at once; by default what suits the device.
    """
    inner = inner_model(model)
    if not takes_segments(model) and len(batch.segment_lengths) > 1:
        return _join([row_loss(model, part, most_logits=most_logits) for part in split_row(batch)])
    most_logits = most_logits or MOST_LOGITS["cuda" if batch.input_ids_1T.is_cuda else "cpu"]
    most = most_logits // inner.config.get_text_config().vocab_size
    if len(batch.target_positions_N) <= most or inner.config.model_type not in PLAIN_HEADS:
        with _own_gradient(inner):
            logits_NV = target_logits(model, batch)
        return answer_loss(logits_NV, batch)
    target_ids_N = batch.input_ids_1T[0, batch.target_positions_N]
    with _own_gradient(inner), _scoring_head(inner, target_ids_N, chunk=max(1, most)):
        scores_N2 = target_logits(model, batch)
    return _sum_answers(scores_N2[:, 0], scores_N2[:, 1].detach(), batch)


def _join(parts: Sequence[AnswerLoss]) -> AnswerLoss:
    """Return the loss of a row whose episodes were run one at a time."""
    return AnswerLoss(
        loss=torch.stack([part.loss for part in parts]).sum(),
        nll_A=torch.cat([part.nll_A for part in parts]),
        num_tokens_A=torch.cat([part.num_tokens_A for part in parts]),
        correct_A=torch.cat([part.correct_A for part in parts]),
    )


def answer_loss(logits_NV: Tensor, batch: Batch) -> AnswerLoss:
    """Return the loss of a row from the logits of its targets; connected to the graph also without any target."""
    target_ids_N = batch.input_ids_1T[0, batch.target_positions_N]
    nll_N = functional.cross_entropy(logits_NV.float(), target_ids_N, reduction="none")
    return _sum_answers(nll_N, (logits_NV.detach().argmax(dim=-1) != target_ids_N).float(), batch)


def _sum_answers(nll_N: Tensor, wrong_N: Tensor, batch: Batch) -> AnswerLoss:
    detached_N = nll_N.detach()
    zeros_A = torch.zeros(len(batch.answer_shots_A), device=detached_N.device)
    return AnswerLoss(
        loss=(nll_N * batch.target_weights_N).sum(),
        nll_A=zeros_A.index_add(0, batch.target_answers_N, detached_N),
        num_tokens_A=zeros_A.index_add(0, batch.target_answers_N, torch.ones_like(detached_N)),
        correct_A=zeros_A.index_add(0, batch.target_answers_N, wrong_N) == 0,
    )


class _Unshared(torch.autograd.Function):
    """A weight as it is; its gradient, which a product gives as a view, as a tensor that nothing else holds."""

    apply: Callable[[Tensor], Tensor]

    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:
        """Return the weight."""
        return weight.view_as(weight)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Return the gradient, in the storage that it has."""
        return gradient.new_empty(0).set_(gradient)  # type: ignore[call-overload, no-any-return]


@contextmanager
def _own_gradient(model: Any) -> Iterator[None]:
    """Let a trained head that is tied to the embedding hand over a gradient that the embedding's can be added to.

    Onto a view autograd does not add: it makes the sum a third matrix of the vocabulary's size. Only a plain head, and
    only without autocast, whose casts hand over a tensor of their own.
    """
    head: Any = model.get_output_embeddings()
    if not _is_tied(model, head):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(hidden.device.type)
        return functional.linear(hidden, head.weight if autocast else _Unshared.apply(head.weight))

    with replaced(head, "forward", forward):
        yield


def _is_tied(model: Any, head: Any) -> bool:
    """Return whether a plain head, that nothing else has changed, is trained as the embedding too."""
    kind: Any = type(head)
    if kind is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    return bool(head.weight is model.get_input_embeddings().weight and head.weight.requires_grad)


@contextmanager
def _scoring_head(model: Any, target_ids_N: Tensor, *, chunk: int) -> Iterator[None]:
    """Let the head return the scores of targets, (1, N, 2), in place of their logits: nats, and 1 where wrong."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    forward = partial(_score_targets, head.forward, target_ids_N=target_ids_N, chunk=chunk, cap=cap)
    uncapped = nullcontext() if cap is None else replaced(config, "final_logit_softcapping", None)
    with replaced(head, "forward", forward), uncapped:
        yield


def _score_targets(
    head: Callable[[Tensor], Tensor], hidden_1NH: Tensor, *, target_ids_N: Tensor, chunk: int, cap: float | None
) -> Tensor:
    parts = [
        checkpoint(_score_chunk, head, hidden, ids, cap, use_reentrant=False, preserve_rng_state=False)
        for hidden, ids in zip(hidden_1NH[0].split(chunk), target_ids_N.split(chunk), strict=True)
    ]
    return torch.cat(parts)[None]


def _score_chunk(head: Callable[[Tensor], Tensor], hidden_NH: Tensor, ids_N: Tensor, cap: float | None) -> Tensor:
    logits_NV = head(hidden_NH)
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    nll_N = functional.cross_entropy(logits_NV.float(), ids_N, reduction="none")
    wrong_N = (logits_NV.detach().argmax(dim=-1) != ids_N).float()
    return torch.stack([nll_N, wrong_N], dim=1)
