"""Adapters of one input as one product: which are joined, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional

from manyicl.attention import segment_attention
from manyicl.joined_adapters import join_before
from manyicl.layers import Checkpointed, prepared_layers
from manyicl.loss import row_loss
from tests.conftest import tiny_model
from tests.parity.test_loss_parity import EPISODE, random_episode, row


class Recorder:
    """A backend that notes how many linear maps each graph has."""

    def __init__(self, backend="eager") -> None:
        self.backend = lookup_backend(backend)
        self.counts: list[int] = []

    def __call__(self, graph, inputs):
        parts = [part.graph for part in graph.modules() if isinstance(part, fx.GraphModule)]
        self.counts.append(sum(node.target is functional.linear for part in parts for node in part.nodes))
        return self.backend(graph, inputs)


def run_compiled(function, *inputs):
    """Return what a function gives when compiled, and how many linear maps it had then."""
    torch._dynamo.reset()
    recorder = Recorder()
    outputs = torch.compile(function, backend=join_before(recorder), fullgraph=True)(*inputs)
    return outputs, recorder.counts


def test_narrow_products_of_one_input_are_joined_and_no_others():
    def six(x, y, a, b, c, wide, bias):
        linear = functional.linear
        return linear(x, a), linear(x, b), linear(y, c), linear(x, wide), linear(x, wide), linear(x, c, bias)

    torch.manual_seed(0)
    # Narrow: a sixteenth of the 32 features that are read, two at most.
    x, y, a, b, c, wide, bias = (torch.randn(*s) for s in ((5, 32), (5, 32), (2, 32), (1, 32), (2, 32), (3, 32), (2,)))
    outputs, counts = run_compiled(six, x, y, a, b, c, wide, bias)
    assert counts == [5]  # a and b in one
    for joined, plain in zip(outputs, six(x, y, a, b, c, wide, bias), strict=True):
        assert torch.allclose(joined, plain, rtol=1e-5, atol=1e-6)


def test_none_are_joined_where_weights_differ_in_type_or_the_graph_sets_its_own_precision():
    def two(x, a, b):
        return functional.linear(x, a), functional.linear(x, b)

    def two_under_autocast(x, a, b):
        with torch.autocast("cpu", torch.bfloat16):
            return two(x, a, b)

    x, a = torch.ones(5, 32), torch.ones(2, 32)
    assert run_compiled(two_under_autocast, x, a, a.clone())[1] == [2]
    with torch.autocast("cpu", torch.bfloat16):
        assert run_compiled(two, x, a, a.clone())[1] == [1]
        assert run_compiled(two, x, a, a.bfloat16())[1] == [2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
@pytest.mark.parametrize(
    "checkpointed", [Checkpointed(0), Checkpointed(3), Checkpointed(3, keeps_attention=False)], ids=str
)
@pytest.mark.parametrize(("dropout", "num_products"), [(0.0, 18), (0.3, 21)])
def test_a_layer_with_joined_adapters_has_the_gradients_of_a_plain_one(checkpointed, dropout, num_products):
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Seven projections with two products each beside them, of which five read two inputs if no dropout comes before.
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    model = get_peft_model(tiny_model("llama"), config).train()
    recorder, gradients = Recorder("aot_eager"), []
    for compiled in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        layers = prepared_layers(model, checkpointed, compiled=compiled, backend=recorder)
        with segment_attention(model), layers:
            row_loss(model, row([random_episode(EPISODE, seed=1)])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(recorder.counts) == {num_products}
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-4, atol=1e-6), name
