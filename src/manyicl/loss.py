"""Cross-entropy on answer tokens, and its one normaliser.

This is the one place where a target is shifted: the logits of a target come from the position before it. Nothing is
ever passed as `labels=`, which Hugging Face's models shift themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyicl.batches import Batch

# Shape suffixes: N targets, A answers, V vocabulary.


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """What one row costs.

    loss: scalar, the weighted sum over targets, already divided by the global counts of the optimizer step.
    nll_A: nats of each answer, summed over its tokens, float32, detached.
    num_tokens_A: tokens of each answer. correct_A: whether every token of it is the most likely one (greedy match).
    """

    loss: Tensor
    nll_A: Tensor
    num_tokens_A: Tensor
    correct_A: Tensor


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits_NV of the targets of a row; no other position is projected onto the vocabulary.

    The model must be inside `attention.segment_attention`.
    """
    output = model(
        input_ids=batch.input_ids_1T,
        position_ids=batch.position_ids_1T,
        segments=batch.segments,
        logits_to_keep=batch.target_positions_N - 1,
        use_cache=False,
    )
    logits_NV: Tensor = output.logits[0]
    return logits_NV


def answer_loss(logits_NV: Tensor, batch: Batch) -> AnswerLoss:
    """Return the loss of a row from the logits of its targets; connected to the graph also without any target."""
    target_ids_N = batch.input_ids_1T[0, batch.target_positions_N]
    nll_N = functional.cross_entropy(logits_NV.float(), target_ids_N, reduction="none")
    loss = (nll_N * batch.target_weights_N).sum()
    num_answers = len(batch.answer_shots_A)
    detached_N = nll_N.detach()
    zeros_A = torch.zeros(num_answers, device=detached_N.device)
    wrong_N = (logits_NV.detach().argmax(dim=-1) != target_ids_N).float()
    return AnswerLoss(
        loss=loss,
        nll_A=zeros_A.index_add(0, batch.target_answers_N, detached_N),
        num_tokens_A=zeros_A.index_add(0, batch.target_answers_N, torch.ones_like(detached_N)),
        correct_A=zeros_A.index_add(0, batch.target_answers_N, wrong_N) == 0,
    )
