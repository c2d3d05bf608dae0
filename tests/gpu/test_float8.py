"""Products in 8 bits on a GPU against what the CPU makes of the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyicl.models.quantization.float8 import (
    FEWEST_CAPABILITY,
    FLOAT8,
    LARGEST,
    Float8Linear,
    multiply_rows,
    round_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < FEWEST_CAPABILITY,
        reason="needs a GPU with products in 8 bits",
    ),
]


def run(layer, x, gradient):
    """Output and gradient of the input, on the CPU."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        out = layer(x)
    out.backward(gradient)
    return [out.detach().float().cpu(), x.grad.float().cpu()]


def run_exactly(layer, x, gradient):
    """The same without rounding what comes to 8 bits, in float32."""
    weight = layer.unpack()
    return [x.float() @ weight.t(), gradient.float() @ weight]


def gradients_when_fused(layer, gradient):
    """Gradients of the input by kernels that multiply by the scales and divide at once, without bfloat16 between.

    A compiler may find the rows' own scales before (from what is rounded to bfloat16) or after that.
    """
    scaled = gradient.float() * layer.scale.view(1, -1)
    turned, ones = layer.weight.t().contiguous(), layer.scale.new_ones(layer.in_features, 1)
    _, scales = round_rows(scaled.bfloat16())
    found = [round_rows(scaled), ((scaled / scales).clamp(-LARGEST, LARGEST).to(FLOAT8), scales)]
    return [multiply_rows(*rows, turned, ones).float() for rows in found]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "turned"])
@pytest.mark.parametrize("num_tokens", [1, 37, 256])
def test_a_layer_computes_on_a_gpu_what_it_does_on_a_cpu(num_tokens, turned, compiled):
    """turned: input and gradient come in the strides that a transposed view has."""
    torch.manual_seed(0)
    layer = Float8Linear(nn.Linear(512, 384, bias=False, dtype=torch.bfloat16), dtype=torch.bfloat16)
    x, gradient = (torch.randn(num_tokens, size, dtype=torch.bfloat16) for size in (512, 384))
    (output, rounded), exact = run(layer, x, gradient), run_exactly(layer, x, gradient)
    # What lies between 1.1 and 1.4 % of a gradient is whether it was rounded to bfloat16 on its way to 8 bits.
    expected = [[output], [rounded, *gradients_when_fused(layer, gradient)] if compiled else [rounded]]
    if turned:
        x, gradient = (part.t().contiguous().t() for part in (x, gradient))
    layer = layer.cuda()
    found = run(torch.compile(layer, dynamic=False) if compiled else layer, x.cuda(), gradient.cuda())
    for ours, either, truth in zip(found, expected, exact, strict=True):
        assert (ours - truth).norm() < 1.05 * (either[0] - truth).norm()
        assert any((ours - theirs).norm() < 0.01 * theirs.norm() for theirs in either)
