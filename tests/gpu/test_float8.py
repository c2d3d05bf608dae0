"""Products in 8 bits on a GPU against what the CPU makes of the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyicl.models.quantization.float8 import FEWEST_CAPABILITY, Float8Linear

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


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "turned"])
@pytest.mark.parametrize("num_tokens", [1, 37, 256])
def test_a_layer_computes_on_a_gpu_what_it_does_on_a_cpu(num_tokens, turned, compiled):
    """turned: input and gradient come in the strides that a transposed view has."""
    torch.manual_seed(0)
    layer = Float8Linear(nn.Linear(512, 384, bias=False, dtype=torch.bfloat16), dtype=torch.bfloat16)
    x, gradient = (torch.randn(num_tokens, size, dtype=torch.bfloat16) for size in (512, 384))
    expected, exact = run(layer, x, gradient), run_exactly(layer, x, gradient)
    if turned:
        x, gradient = (part.t().contiguous().t() for part in (x, gradient))
    layer = layer.cuda()
    found = run(torch.compile(layer, dynamic=False) if compiled else layer, x.cuda(), gradient.cuda())
    for ours, theirs, truth in zip(found, expected, exact, strict=True):
        assert (ours - truth).norm() < 1.05 * (theirs - truth).norm()
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
