"""How the next token of a generated answer is chosen: the likeliest, or one sampled from a stream of its own.

Legend: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyicl.inference.answering.settings import Decoding
from manyicl.seeds import make_stream

GREEDY = Decoding()


class Sampler:
    """Chooses the next tokens of answers that are generated together.

    What is sampled depends on the answer's own seed, prompt and number alone: each has a stream of its own, which gives
    one number per token. So other answers of a batch change nothing.

    prompts: all ids before each answer.
    """

    def __init__(self, decodings: Sequence[Decoding], prompts: Sequence[NDArray[np.int32]]) -> None:
        self.decodings = decodings
        self._streams = {
            place: make_stream("samples", one.seed, hashlib.sha256(prompt.tobytes()).hexdigest(), one.sample)
            for place, (one, prompt) in enumerate(zip(decodings, prompts, strict=True))
            if one.temperature > 0
        }

    def choose(self, logits_BV: Tensor, places: Sequence[int]) -> Tensor:
        """Return the next token (B,) of the answers at `places`, whose logits are the rows."""
        next_B = logits_BV.argmax(dim=-1)
        for row, place in enumerate(places):
            if place in self._streams:
                one = self.decodings[place]
                probabilities_V = sampled_probabilities(logits_BV[row], temperature=one.temperature, top_p=one.top_p)
                next_B[row] = pick_token(probabilities_V, self._streams[place].random())
        return next_B


def sampled_probabilities(logits_V: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Return the probabilities (V,) that a token is sampled with, in float64; they sum to 1.

    Top-p keeps the smallest set of the likeliest tokens whose probabilities sum to at least `top_p`, and those that are
    just as likely as the last of them.
    """
    probabilities_V = torch.softmax(logits_V.double() / temperature, dim=-1)
    if top_p < 1:
        sorted_V = probabilities_V.sort(descending=True).values
        num_kept = int((sorted_V.cumsum(dim=-1) < top_p).sum()) + 1
        least = sorted_V[min(num_kept, len(sorted_V)) - 1]
        probabilities_V = torch.where(probabilities_V >= least, probabilities_V, 0.0)
    return probabilities_V / probabilities_V.sum()


def pick_token(probabilities_V: Tensor, number: float) -> Tensor:
    """Return the token whose part of the unit interval holds `number`, from 0 to 1.

    Tokens are laid out in the order of the vocabulary, not of their probabilities: rounding, which differs between
    batches, can exchange equally likely ones there.
    """
    ends_V = probabilities_V.cumsum(dim=-1)
    place = torch.searchsorted(ends_V, torch.as_tensor(number * float(ends_V[-1]), device=ends_V.device), right=True)
    last = probabilities_V.nonzero()[-1, 0]  # a token without probability is never chosen
    return torch.minimum(place, last)


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first of `stops`, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
