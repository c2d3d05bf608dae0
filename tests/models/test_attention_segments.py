"""Attention of each segment to itself against the formula with a dense mask: windows, groups, caps, blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyicl.episodes.batch import join_row
from manyicl.episodes.segments import bounds_of, make_segments
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.models.attention import segments as segment_kernels
from manyicl.models.attention.dispatch import segment_attention, takes_segments
from manyicl.models.attention.segments import attend_row_segments, forget_kernels, kernels_taken
from manyicl.models.isolation import own_attention
from manyicl.models.loss import target_logits
from tests.conftest import tiny_model


def attend_densely(query, key, value, *, lengths, window, softcap):
    """Return what the formula gives with one mask of the row: (1, T, H, D)."""
    heads, total = query.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(total)
    seen = (segment[:, None] == segment) & (at <= at[:, None])
    if window is not None:
        seen &= at > at[:, None] - window
    scores = query @ key.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("lengths", [(40,), (7, 16, 1, 16)])
def test_output_and_gradients_are_the_formulas(lengths, window, softcap, monkeypatch):
    monkeypatch.setattr(segment_kernels, "BLOCK_QUERIES", 6)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(1, 40, 4, 8)
    segments = make_segments(lengths, bounds_S=torch.from_numpy(bounds_of(lengths)))
    ours = attend_row_segments(
        query, key, value, segments=segments, dropout=0.0, scaling=0.3, window=window, softcap=softcap
    )
    dense = attend_densely(query, key, value, lengths=lengths, window=window, softcap=softcap)
    assert torch.allclose(ours, dense, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(x, (query, key, value), grad) for x in (ours, dense)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_no_mask_of_a_window_is_as_large_as_the_row(monkeypatch):
    made = []
    original = segment_kernels.visible_keys

    def counted(*args, **options):
        made.append(original(*args, **options).numel())
        return original(*args, **options)

    monkeypatch.setattr(segment_kernels, "visible_keys", counted)
    query = torch.randn(1, 1, 5000, 8)
    segments = make_segments((5000,), bounds_S=torch.tensor([0, 5000], dtype=torch.int32))
    attend_row_segments(query, query, query, segments=segments, dropout=0.0, scaling=None, window=100, softcap=None)
    assert len(made) == 5
    assert max(made) == 1024 * (1024 + 99)


def test_float32_weights_under_autocast_attend_in_its_type():
    """The rotary step returns float32 there, which the fast kernels of a GPU do not take (issue 16)."""
    model = tiny_model("llama")
    episodes = [TokenizedEpisode(np.arange(3, 3 + n, dtype=np.int32), np.array([[n - 2, n]])) for n in (9, 14)]
    weights = [np.ones(1) for _ in episodes]
    row = join_row(episodes, targets="all", weights=weights, tasks=[0, 0], episodes=(0, 1))
    forget_kernels()
    with segment_attention(model), torch.autocast("cpu", torch.bfloat16):
        target_logits(model, row)
    assert kernels_taken() == {"segment by segment (not on a GPU), bfloat16": 3}  # once per layer
    forget_kernels()
    with segment_attention(model):
        target_logits(model, row)
    assert kernels_taken() == {"segment by segment (not on a GPU), float32": 3}


def test_blocks_of_two_threads_may_overlap():
    model = tiny_model("llama")
    own = model.config._attn_implementation
    first, second = segment_attention(model), segment_attention(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert takes_segments(model)  # the second block is not over
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == own


def test_a_block_that_ends_gives_back_what_was_there_when_it_began():
    """The blocks were counted, so after the inner one the model went on by segments."""
    model = tiny_model("llama")
    with segment_attention(model), own_attention(model, "eager"):
        with segment_attention(model):
            pass
        assert model.config._attn_implementation == "eager"


def test_a_block_in_one_of_the_models_own_attention_in_another_block():
    model = tiny_model("llama")
    with segment_attention(model), own_attention(model, "eager"), segment_attention(model):
        assert takes_segments(model)
    assert not takes_segments(model)
