"""On a CUDA device: the kernels that attend queries after a prefix against the formula. Skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.models.attention import partial
from tests.conftest import tiny_model
from tests.support.runs import OPTIONS, attend_padded, lay_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TWO_LABELS = [[7, 2], [9, 2]]


def random_heads(num_tokens, *, heads, head_dim, dtype, num_segments=1):
    """Return (S, H, T, D) for each number of heads, as the projections lay them out."""
    torch.manual_seed(0)
    shapes = [(num_segments, num_tokens, n, head_dim) for n in heads]
    return [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes]


def check_part(part, wanted, *, dtype):
    """Check out and log-sum-exp against those of float32."""
    assert (part[0].shape, part[1].shape) == (wanted[0].shape, wanted[1].shape)
    assert (part[0].dtype, part[1].dtype) == (dtype, torch.float32)
    assert torch.allclose(part[0].float(), wanted[0], atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert torch.allclose(part[1], wanted[1], atol=CLOSE[dtype])


@HALF
@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("groups", [(4, 4), (4, 2), (9, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("options", [None, [[7, 8, 9]], TWO_LABELS, OPTIONS], ids=["none", "chain", "two", "tree"])
def test_varlen_attention_of_runs_is_the_formulas(options, groups, window, head_dim, dtype):
    layout = lay_out((1, 130, 17, 40), options, device="cuda")
    runs = layout.runs()
    heads = (groups[0], groups[1], groups[1])
    inputs = random_heads(int(runs.query_bounds_R[-1]), heads=heads, head_dim=head_dim, dtype=dtype)
    part = partial.attend_runs(*inputs, runs=runs, scaling=None, window=layout.own_window(window))
    check_part(part, attend_padded(*(x.float() for x in inputs), layout=layout, window=window), dtype=dtype)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("num_keys", [1, 7, 8, 200])
@pytest.mark.parametrize(("groups", "num_queries"), [((4, 4), 61), ((4, 2), 61), ((3, 3), 1), ((9, 3), 5)], ids=str)
def test_masked_attention_is_the_formulas(groups, num_queries, num_keys, dtype):
    """Of several segments whose queries see some keys each; one sees the first alone, one the last alone."""
    heads = (groups[0], groups[1], groups[1])
    query = random_heads(num_queries, heads=heads[:1], head_dim=64, dtype=dtype, num_segments=3)[0]
    key, value = random_heads(num_keys, heads=heads[1:], head_dim=64, dtype=dtype, num_segments=3)
    seen = torch.rand(3, num_queries, num_keys, device="cuda") < 0.5
    seen[..., 0] = True
    seen[1, 0, 1:], seen[2, 0], seen[2, 0, -1] = False, False, True
    part = partial.attend_part(query, key, value, scaling=0.2, bias=partial.as_bias(seen, dtype)[:, None])
    repeated = (partial.repeat_heads(x, groups[0]).float() for x in (key, value))
    bias = partial.as_bias(seen, torch.float32)[:, None]
    wanted = partial.attend_explicit(query.float(), *repeated, scaling=0.2, bias=bias, softcap=None)
    check_part(part, wanted, dtype=dtype)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("num_queries", [1, 5, partial.TILE_QUERIES, 700])
@pytest.mark.parametrize("groups", [(4, 4), (9, 3), (4, 1)], ids=str)
def test_all_queries_attend_a_prefix_as_the_formula_does(groups, num_queries, dtype):
    (query,) = random_heads(num_queries, heads=groups[:1], head_dim=64, dtype=dtype)
    buffers = torch.randn(2, 1, groups[1], 512, 64, device="cuda").to(dtype)
    key, value = (x[:, :, :333] for x in buffers)  # views of longer buffers, as a prefix has them
    part = partial.attend_all(query, key, value, scaling=0.1)
    repeated = (partial.repeat_heads(x, groups[0]).float() for x in (key, value))
    wanted = partial.attend_explicit(query.float(), *repeated, scaling=0.1, bias=None, softcap=None)
    check_part(part, wanted, dtype=dtype)


@pytest.mark.parametrize("options", [TWO_LABELS, OPTIONS], ids=["two", "tree"])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "qwen3"])
def test_runs_give_the_likelihoods_of_the_mask(name, options, monkeypatch):
    """Of a model's queries of many lengths after a prefix: in bfloat16 both ways, and in float32."""
    model = tiny_model(name).to("cuda", torch.bfloat16)
    rng = np.random.default_rng(0)
    before, *queries = (rng.integers(3, 390, n).astype(np.int32) for n in (60, 1, 6, 6, 24, 33))
    taken = []
    attend_runs = partial.attend_runs
    monkeypatch.setattr(
        "manyicl.models.attention.dispatch.attend_runs",
        lambda *a, **k: (taken.append(k["window"]), attend_runs(*a, **k))[1],
    )

    def score():
        return np.array(score_choices(model, encode_prefix(model, before), queries, [options] * len(queries)))

    by_runs, num_taken = score(), len(taken)
    monkeypatch.setattr("manyicl.inference.query_rows.MOST_KEY_COPIES", 0)
    by_mask = score()
    assert num_taken
    assert len(taken) == num_taken  # the second time none was taken
    model.float()
    in_float32 = score()
    assert np.abs(by_runs - in_float32).mean() < 2 * np.abs(by_mask - in_float32).mean() + 0.02
