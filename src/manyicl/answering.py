"""Answer queries behind shots: choose among known answers by their likelihood, or generate greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from manyicl.prefix import device_of
from manyicl.tokens import TaskTokenizer

# Tokens of prompts that are generated behind at once; a small model's batch fits any machine, a large one's any GPU.
BATCH_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Generated:
    """A greedy answer. cut: it reached the limit before its terminator."""

    text: str
    cut: bool


@torch.inference_mode()
def generate_answers(
    model: Any, tokenizer: TaskTokenizer, prompts: Sequence[NDArray[np.int32]], *, max_new_tokens: int
) -> list[Generated]:
    """Return the greedy answer of each prompt (all its ids: head, shots and query), batched, to the terminator."""
    answers: list[Generated] = []
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    size = max(1, BATCH_TOKENS // longest) if longest else 1
    for start in range(0, len(prompts), size):
        answers += _generate_batch(model, tokenizer, prompts[start : start + size], max_new_tokens=max_new_tokens)
    return answers


def _generate_batch(
    model: Any, tokenizer: TaskTokenizer, prompts: Sequence[NDArray[np.int32]], *, max_new_tokens: int
) -> list[Generated]:
    eos_id = tokenizer.tokenizer.eos_token_id
    pad_id = eos_id if eos_id is not None else 0
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    device = device_of(model)
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    # transformers fills what we leave open from the checkpoint's own settings, and a repetition penalty among them
    # would forbid the very answers that the shots show.
    before, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        output = _generate_greedily(model, tokenizer, ids.to(device), mask.to(device), max_new_tokens=max_new_tokens)
    finally:
        inner.generation_config = before
    return [_read_answer(tokenizer, row.tolist(), eos_id) for row in output[:, width:].cpu()]


def _generate_greedily(
    model: Any, tokenizer: TaskTokenizer, ids: torch.Tensor, mask: torch.Tensor, *, max_new_tokens: int
) -> torch.Tensor:
    eos_id = tokenizer.tokenizer.eos_token_id
    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=eos_id if eos_id is not None else 0,
        ),
        stopping_criteria=StoppingCriteriaList([_TerminatorSeen(tokenizer, ids.shape[1])]),
    )
    return output


def _read_answer(tokenizer: TaskTokenizer, ids: list[int], eos_id: int | None) -> Generated:
    """Cut a generated row at the terminator; an end-of-text token that the terminator lacks ends it too."""
    text, ended = tokenizer.cut_answer(ids)
    if not ended and eos_id is not None and eos_id in ids:
        return Generated(text=tokenizer.decode(ids[: ids.index(eos_id)]), cut=False)
    return Generated(text=text, cut=not ended)


class _TerminatorSeen(StoppingCriteria):
    """Stops each row on its decoded text, so that a terminator merged into another token stops it too."""

    def __init__(self, tokenizer: TaskTokenizer, prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        texts = [self.tokenizer.cut_answer(row) for row in input_ids[:, self.prompt_tokens :].tolist()]
        return torch.tensor([ended for _, ended in texts], device=input_ids.device)
