"""Adapters of one input as one product: which are joined, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from manyicl.attention import segment_attention
from manyicl.joined_adapters import join_before
from manyicl.layers import Checkpointed, prepared_layers, unwidened_inputs
from manyicl.loss import row_loss
from tests.conftest import assert_same_gradients, tiny_model
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


class Projections(nn.Module):
    """Two projections of one input, or of two, with what may stand between them."""

    def __init__(self, between=None, *, second=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(32, 8, bias=False)
        self.lora_A = nn.ModuleDict({name: nn.Linear(32, 2, bias=name == "shifted") for name in ("k", "q", "shifted")})
        self.lora_A["k"].to(second)
        self.between = between or (lambda x: None)

    def forward(self, x, y):
        first = self.lora_A["q"](x)
        self.between(x)
        return first, self.lora_A["k"](x), self.lora_A["q"](y), self.base(x), self.base(x), self.lora_A["shifted"](x)


def run_compiled(model, *inputs):
    """Return what a model gives when compiled, and how many linear maps it had then."""
    torch._dynamo.reset()
    recorder = Recorder()
    outputs = torch.compile(model, backend=join_before(recorder), fullgraph=True)(*(x.clone() for x in inputs))
    return outputs, recorder.counts


def assert_alike(model, num_products):
    inputs = torch.randn(5, 32), torch.randn(5, 32)
    outputs, counts = run_compiled(model, *inputs)
    assert counts == [num_products]
    for compiled, plain in zip(outputs, model(*(x.clone() for x in inputs)), strict=True):
        assert torch.allclose(compiled, plain, rtol=1e-4, atol=1e-5)
        assert compiled.requires_grad == plain.requires_grad


def test_adapters_of_one_input_are_joined_and_no_other_products():
    assert_alike(Projections(), 5)  # two of six in one


def by_method(x):
    x.add_(1)


def by_operator(x):
    x += 1


def by_place(x):
    x[0] = 1


def by_option(x):
    functional.relu(x, inplace=True)


def by_operation(x):
    torch.ops.aten.add_.Tensor(x, 1)


@pytest.mark.parametrize("between", [by_method, by_operator, by_place, by_option, by_operation])
def test_a_graph_that_changes_a_tensor_in_place_stays_as_it_is(between):
    assert_alike(Projections(between), 6)


def test_a_graph_that_switches_gradients_or_autocast_stays_as_it_is():
    class Switched(Projections):
        def forward(self, x, y):
            with torch.no_grad():
                first = self.lora_A["q"](x)
            return first, self.lora_A["k"](x), y

    class Lowered(Projections):
        def forward(self, x, y):
            with torch.autocast("cpu", torch.bfloat16):
                first = self.lora_A["q"](x)
            return first, self.lora_A["k"](x), y

    assert_alike(Switched(), 2)
    assert_alike(Lowered(), 2)


def test_adapters_of_two_types_are_not_joined():
    inputs = torch.randn(5, 32), torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert run_compiled(Projections(), *inputs)[1] == [5]
        assert run_compiled(Projections(second=torch.bfloat16), *inputs)[1] == [6]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
@pytest.mark.parametrize(
    "checkpointed", [Checkpointed(0), Checkpointed(3), Checkpointed(3, keeps_attention=False)], ids=str
)
@pytest.mark.parametrize(
    ("dropout", "precision", "num_products"), [(0.0, "fp32", 18), (0.3, "fp32", 21), (0.0, "bf16", 18)]
)
def test_a_layer_with_joined_adapters_has_the_gradients_of_a_plain_one(checkpointed, dropout, precision, num_products):
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Seven projections with two products each beside them, of which five read two inputs if no dropout comes before.
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    autocast = precision == "bf16"
    base = tiny_model("llama").to(torch.bfloat16 if autocast else torch.float32)
    model = get_peft_model(base, config).train()
    recorder, gradients = Recorder("aot_eager"), []
    for compiled in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        layers = prepared_layers(model, checkpointed, compiled=compiled, backend=recorder)
        with segment_attention(model), layers, unwidened_inputs(model, autocast=autocast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = row_loss(model, row([random_episode(EPISODE, seed=1)])).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(recorder.counts) == {num_products}
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        difference = (gradients[1][name] - expected).norm() / expected.norm()
        assert difference < (0.05 if autocast else 1e-4), name


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_ddps_buckets_do_not_cut_a_layer(one_rank):
    torch._dynamo.reset()
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config).train()
    recorder, gradients = Recorder("aot_eager"), []
    for whole in (model, DistributedDataParallel(model, bucket_cap_mb=0.001)):  # some hundred bytes a bucket
        model.zero_grad()
        with (
            segment_attention(model),
            prepared_layers(model, Checkpointed(0), compiled=whole is not model, backend=recorder),
        ):
            row_loss(whole, row([random_episode(EPISODE, seed=1)])).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert set(recorder.counts) == {18}
    assert_same_gradients(*gradients)
