"""What the trials of a model use: ordinary text in its own tokens, and how far two results of it lie apart.

Ordinary text, because token ids picked by number are control tokens in real vocabularies, on which a model in bfloat16
computes mostly rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyicl.models.places import NEUTRAL_TEXT

# Shape suffixes: N positions, V vocabulary.


def trial_ids(tokenizer: Any, num_tokens: int, *, first_paragraph: int = 0) -> list[int]:
    """Return `num_tokens` ids of plain English prose, without special tokens.

    Paragraphs are taken in order and begin again when the text is used up. first_paragraph: the one to start with, so
    that two trials, or two episodes of one trial, can have different texts.

    Raises:
        ValueError: the tokenizer turns prose into no tokens at all.

    >>> from manyicl.models.loading import ModelSettings, load_tokenizer
    >>> tokenizer = load_tokenizer(ModelSettings(path="seed"))
    >>> tokenizer.decode(trial_ids(tokenizer, 15))
    'A river rarely begins as anything grand.'
    """
    paragraphs = [part.strip() for part in NEUTRAL_TEXT.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    ids: list[int] = []
    place = first_paragraph
    while len(ids) < num_tokens:
        if not ids and place >= first_paragraph + len(paragraphs):
            raise ValueError(f"{type(tokenizer).__name__} turns English prose into no tokens")
        new = tokenizer(paragraphs[place % len(paragraphs)] + "\n\n", add_special_tokens=False, verbose=False)
        ids += new["input_ids"]
        place += 1
    return ids[:num_tokens]


def logit_difference(logits_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """Return how far the logits of each position lie from the reference's, (N,), in float32.

    That is the root mean square difference over the vocabulary, divided by the standard deviation of the reference's
    logits at that position: 0 for equal logits, about 1.4 for unrelated ones. A constant added to all logits of a
    position changes no likelihood, and so counts as no difference. Where only the reference is finite,
    the difference is infinite; where the reference itself is not finite there is nothing to compare, and it is 0.

    >>> logits_NV = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 3.0]])
    >>> [round(x, 2) for x in logit_difference(logits_NV, torch.tensor([[1.0, 2.0, 3.0]] * 2)).tolist()]
    [0.0, 1.73]
    """
    logits_NV, reference_NV = (x.float() - x.float().mean(dim=-1, keepdim=True) for x in (logits_NV, reference_NV))
    scale_N = reference_NV.std(dim=-1, correction=0)
    difference_N = (logits_NV - reference_NV).square().mean(dim=-1).sqrt() / scale_N.clamp_min(1e-30)
    difference_N = torch.where(difference_N.isfinite(), difference_N, torch.inf)
    return torch.where(scale_N.isfinite(), difference_N, 0.0)
