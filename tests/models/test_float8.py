"""Bases in 8 bits: what a layer stores and computes, how it is trained, asked, merged and refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from manyicl.errors import UserError
from manyicl.inference.model import load_for_inference
from manyicl.inference.sharing import try_prefix
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import LoraSettings, ModelSettings, add_adapter, load_model, read_note
from manyicl.models.loss import row_loss
from manyicl.models.places import SEED_MODEL
from manyicl.models.precision import in_float32
from manyicl.models.quantization.float8 import (
    FLOAT8,
    FLOAT8_BYTES,
    Float8Linear,
    check_float8,
    round_rows,
    store_in_float8,
)
from manyicl.models.saving import merge_adapter
from manyicl.training.memory.choice import predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.memory.storage_meter import meter_step
from manyicl.training.recompute.layers import PARTITION_ONLY, Recompute, prepared_layers, unwidened_inputs
from manyicl.training.run import train
from tests.conftest import tiny_model, train_tokenizer
from tests.support.stopped_runs import assert_resumes
from tests.training.test_footprint import row_of
from tests.trajectory.setting import write_setting

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")

IDS = torch.arange(3, 60)[None]
CPU = torch.device("cpu")
# e4m3 has three bits after the leading one, so a number moves by a sixteenth of itself at most.
HALF_STEP = 1 / 16
KEPT = Recompute(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    train_tokenizer("bpe").save_pretrained(folder)
    return folder


def load(folder, *, precision="bf16", **settings):
    return load_model(ModelSettings(path=str(folder), precision=precision, quantize="float8", **settings)).eval()


def test_a_row_becomes_numbers_of_8_bits_times_a_scale_of_its_own():
    """Between 256 and 448 the numbers are 32 apart, between 128 and 256 they are 16 apart: 134.4 becomes 128."""
    numbers, scale = round_rows(torch.tensor([[1.0, -0.3, 0.0], [-8.96, 0.08, 4.48], [0.0, 0.0, 0.0]]))
    assert numbers.dtype == torch.float8_e4m3fn
    assert numbers.float().tolist() == [[448, -128, 0], [-448, 4, 224], [0, 0, 0]]
    assert scale[:2, 0].tolist() == pytest.approx([1 / 448, 0.02])


def test_no_row_is_rounded_to_what_is_no_number():
    torch.manual_seed(0)
    rows = torch.randn(2000, 64) * torch.logspace(-38, 30, 2000)[:, None]
    assert round_rows(rows)[0].float().isfinite().all()
    assert round_rows(rows.bfloat16())[0].float().isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_near_the_one_it_takes_the_place_of_forward_and_backward(bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 48, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    layer = Float8Linear(linear, dtype=torch.bfloat16)
    given, gradient = torch.randn(2, 37, 96, dtype=torch.bfloat16), torch.randn(2, 37, 48, dtype=torch.bfloat16)

    def run(part):
        x = given.clone().requires_grad_()
        out = part(x)
        out.backward(gradient)
        return out.detach().float(), x.grad.float()

    for ours, expected in zip(run(layer), run(linear), strict=True):
        assert ours.shape == expected.shape
        # Two operands, each moved by a random part of half a step.
        assert (ours - expected).norm() < HALF_STEP * expected.norm()


def test_the_gradient_is_that_of_the_weight_that_the_layer_stands_for():
    """One output feature far above the others: its scale must go to the gradient, not be lost."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=False).requires_grad_(False)
    linear.weight.data[3] *= 1000
    layer = Float8Linear(linear, dtype=torch.bfloat16)
    x = torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x).backward(torch.eye(16, dtype=torch.bfloat16)[:5])  # token n has the gradient of feature n alone
    assert torch.allclose(x.grad.float(), layer.unpack()[:5], rtol=2**-7)  # rounded to bfloat16, twice


def test_linear_layers_are_stored_and_head_embedding_and_norms_are_not(folder):
    model = load(folder)
    kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
    stored = {name.split(".")[-2] for name, dtype in kinds.items() if dtype == torch.uint8}
    assert stored == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {dtype for name, dtype in kinds.items() if name.split(".")[-2] not in stored} == {torch.bfloat16}


def test_the_weights_are_the_same_in_whatever_precision_the_base_is_loaded(folder):
    for ours, other in zip(load(folder).modules(), load(folder, precision="fp32").modules(), strict=True):
        if isinstance(ours, Float8Linear):
            assert torch.equal(ours.weight, other.weight)
            assert torch.equal(ours.scale, other.scale)


def test_in_float32_the_weights_that_it_stands_for_are_multiplied_unrounded_and_it_returns(folder):
    model, plain = load(folder), tiny_model("llama")
    for name, part in model.named_modules():
        if isinstance(part, Float8Linear):
            plain.get_submodule(name).weight.data = part.weight.view(FLOAT8).float() * part.scale
    plain.model.embed_tokens.weight.data = model.model.embed_tokens.weight.float()
    plain.lm_head.weight.data = model.lm_head.weight.float()
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad(), in_float32(model):
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)
        assert torch.allclose(load(folder, precision="fp32")(IDS).logits, tiny_model("llama")(IDS).logits, atol=1)
    assert layer.compute_dtype == torch.bfloat16


def test_the_bytes_of_a_weight_are_those_of_its_tensors():
    layer = Float8Linear(nn.Linear(512, 256), dtype=torch.bfloat16)
    assert layer.weight.nbytes + layer.scale.nbytes == pytest.approx(FLOAT8_BYTES * 512 * 256, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_shots_are_shared(folder, precision):
    assert try_prefix(load(folder, precision=precision), np.arange(3, 300, dtype=np.int32)) == ""


def adapted(kind):
    """The tiny model with its base in `kind`, inside an adapter whose two matrices are random, alike for each kind."""
    base = tiny_model("llama").to(torch.float32 if kind == "fp32" else torch.bfloat16)
    if kind == "float8":
        store_in_float8(base, dtype=torch.bfloat16, device=CPU)
    model = add_adapter(base, LoraSettings(rank=4)).train()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def gradients_of(kind, *, backend=None, recompute=KEPT):
    """The loss of a row and its adapters' gradients, as `manyicl train` has them. backend: that compiles layers."""
    model, autocast, batch = adapted(kind), kind != "fp32", row_of(120, num_answers=12)
    with (
        segment_attention(model, row_tokens=120),
        prepared_layers(model, recompute, compiled=backend is not None, backend=backend or "") as choice,
        unwidened_inputs(model, autocast=autocast),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = row_loss(model, batch).loss
        loss.backward()
        assert choice.is_kept is recompute.keep_attention
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_loss_and_gradients_are_near_those_of_float32():
    loss, truth = gradients_of("fp32")
    for kind, least in (("bf16", 0.99), ("float8", 0.93)):
        ours, found = gradients_of(kind)
        assert ours == pytest.approx(loss, rel=0.01)
        assert functional.cosine_similarity(found, truth, dim=0) > least
        assert found.norm() == pytest.approx(float(truth.norm()), rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
@pytest.mark.parametrize(
    ("backend", "recompute"),
    [
        (PARTITION_ONLY, KEPT),
        (PARTITION_ONLY, Recompute(3)),
        (PARTITION_ONLY, Recompute(3, keep_attention=False)),
        ("inductor", Recompute(1)),
    ],
    ids=str,
)
def test_compiled_layers_have_the_gradients_of_plain_ones(backend, recompute):
    """Compiled, bfloat16 results in between are rounded less, and some numbers of 8 bits fall to the other side."""
    loss, plain = gradients_of("float8")
    compiled_loss, compiled = gradients_of("float8", backend=backend, recompute=recompute)
    assert compiled_loss == pytest.approx(loss, rel=5e-3)
    assert functional.cosine_similarity(compiled, plain, dim=0) > 0.95


@pytest.mark.parametrize("keep_attention", [True, False])
def test_recomputed_layers_have_the_same_gradients_to_the_bit(keep_attention):
    found = [gradients_of("float8", recompute=Recompute(n, keep_attention=keep_attention))[1] for n in (0, 3)]
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_the_predicted_peak_is_what_real_tensors_take(recomputed):
    settings = ModelSettings(path=str(SEED_MODEL), precision="bf16", quantize="float8", lora=LoraSettings(rank=4))
    model = load_model(settings, trainable=True).train()
    footprint = measure_footprint(model.config, Row(400, 80, "bf16", quantize="float8"), lora=settings.lora)
    with segment_attention(model), prepared_layers(model, Recompute(recomputed), compiled=False):
        peaks = meter_step(model, row_of(400, num_answers=20), autocast=True)
    assert predict_memory(footprint, Recompute(recomputed)).activations_bytes == pytest.approx(max(peaks), rel=0.1)


def write_stored_setting(folder):
    config = write_setting(folder, lora=True, num_steps=4)
    return config.model_copy(
        update={"model": config.model.model_copy(update={"quantize": "float8", "precision": "bf16"})}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(write_stored_setting(folder), out=folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_an_adapter_is_asked_on_the_stored_base_that_it_was_trained_on(run):
    assert read_note(str(run)).quantize == "float8"

    def num_stored(**options):
        loaded = load_for_inference(str(run), precision="fp32", **options).model
        return sum(isinstance(part, Float8Linear) for part in loaded.modules())

    assert num_stored() == num_stored(quantize="float8") == 3 * 7
    assert num_stored(quantize="none") == 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(run, tmp_path):
    assert_resumes(write_stored_setting(tmp_path), out=tmp_path / "run", whole=run)


@pytest.mark.slow
def test_a_merge_folds_it_into_the_bases_own_weights_and_says_so(run, tmp_path):
    said = merge_adapter(str(run), tmp_path / "merged")
    assert said.endswith("trained on the base in float8, whose rounding it made up for: measure it again")
    assert read_note(str(tmp_path / "merged")).quantize is None


def refusal(**settings):
    with pytest.raises(UserError) as caught:
        load_model(ModelSettings(quantize="float8", **settings), trainable=True)
    return str(caught.value)


def test_what_cannot_be_stored_is_refused_with_the_reason(folder, tmp_path):
    lora = LoraSettings(rank=2)
    assert refusal(path=str(folder), precision="bf16") == (
        "model.quantize = 'float8': packed weights cannot be trained; train an adapter (model.lora) or leave it out"
    )
    assert refusal(path=str(folder), precision="fp32", lora=lora) == (
        "model.quantize = 'float8': its products are in bfloat16; set model.precision = 'bf16', or leave it out"
    )
    odd = copy.deepcopy(tiny_model("llama").config)
    odd.intermediate_size = 72
    type(tiny_model("llama"))(odd).save_pretrained(tmp_path)
    assert refusal(path=str(tmp_path), precision="bf16", lora=lora) == (
        "model.quantize = 'float8': model.layers.0.mlp.gate_proj is 72 x 32, and products in 8 bits need multiples of"
        " 16; leave it out"
    )


def test_a_gpu_without_products_in_8_bits_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError) as caught:
        check_float8(torch.device("cuda"))
    assert str(caught.value) == (
        "model.quantize = 'float8': NVIDIA A100 has no products in 8 bits (compute capability 8.0; 8.9 or more is"
        " needed); leave it out, or ask with quantize='none'"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(torch.device("cuda"))
