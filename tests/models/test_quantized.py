"""Bases in 4 bits: what is packed, what it computes, how it is trained, asked, merged and refused."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manyicl.errors import UserError
from manyicl.inference.model import load_for_inference
from manyicl.inference.sharing import try_prefix
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import LoraSettings, ModelNote, ModelSettings, load_model, read_note
from manyicl.models.places import SEED_MODEL
from manyicl.models.precision import in_float32
from manyicl.models.quantization.nf4 import NF4_BYTES
from manyicl.models.saving import merge_adapter, save_model
from manyicl.training.memory.choice import predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.memory.storage_meter import meter_step
from manyicl.training.recompute.layers import Recompute, prepared_layers
from manyicl.training.run import train
from tests.conftest import tiny_model, train_tokenizer
from tests.support.stopped_runs import assert_resumes
from tests.training.test_footprint import row_of
from tests.trajectory.setting import write_setting

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*on this CPU its weights are unpacked with wrong scales:UserWarning"),
]

IDS = torch.arange(3, 60)[None]
# The numbers that 4 bits stand for, times the largest of a block (Dettmers et al. 2023, appendix E), to three digits.
LEVELS = [-1, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.080, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    train_tokenizer("bpe").save_pretrained(folder)
    return folder


def load(folder, **settings):
    return load_model(ModelSettings(path=str(folder), precision="fp32", **settings)).eval()


def unpacked(model):
    """The plain model with the weights that the packed one stands for."""
    plain = AutoModelForCausalLM.from_config(tiny_model("llama").config, dtype=torch.float32)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32  # else each weight would be rounded once more
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
    rest = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({**rest, **weights})
    return plain.eval()


def test_linear_layers_are_packed_and_head_embedding_and_norms_are_not(folder):
    model = load(folder, quantize="nf4")
    kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
    packed = {name.split(".")[-2] for name, dtype in kinds.items() if dtype == torch.uint8}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {dtype for name, dtype in kinds.items() if name.split(".")[-2] not in packed} == {torch.float32}


def test_a_packed_weight_is_one_of_sixteen_levels_of_its_block(folder):
    weight = unpacked(load(folder, quantize="nf4")).model.layers[0].mlp.down_proj.weight.detach()
    own = load(folder).model.layers[0].mlp.down_proj.weight.detach()
    assert own.shape == (32, 64)  # each row is a block
    for block, of_own in zip(weight.reshape(-1, 64), own.reshape(-1, 64), strict=True):
        scaled, own_scaled = block / block.abs().max(), of_own / of_own.abs().max()
        assert all(min(abs(value - level) for level in LEVELS) < 0.01 for value in scaled.tolist())
        assert (scaled - own_scaled).abs().max() < 0.16  # half of the widest step
        # The scales are rounded too, to 8 bits of the largest among them.
        assert (block.abs().max() - of_own.abs().max()).abs() < 0.05 * own.abs().max()


@pytest.mark.parametrize(("capability", "is_warned_of"), [("AVX512", True), ("AVX2", False)])
def test_rows_that_a_cpu_unpacks_wrongly_are_warned_of(folder, monkeypatch, capability, is_warned_of):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder, quantize="nf4")
    told = [str(one.message) for one in caught if "wrong scales" in str(one.message)]
    assert len(told) == is_warned_of
    assert all("model.layers.0.self_attn.q_proj has 32 input features" in one for one in told)


def test_its_logits_are_those_of_the_weights_that_it_stands_for(folder):
    model = load(folder, quantize="nf4")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, unpacked(model)(IDS).logits, atol=1e-4)
        assert (model(IDS).logits - load(folder)(IDS).logits).abs().max() > 0.01


def test_the_predicted_bytes_are_those_of_the_packed_tensors():
    """The seed model's matrices have whole blocks of 64 weights, and 256 of them."""
    model = load(SEED_MODEL, quantize="nf4")
    weights = [part.weight for part in model.modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    scales = [(w.quant_state.absmax, w.quant_state.state2.absmax) for w in weights]
    held = sum(tensor.nbytes for pair in scales for tensor in pair) + sum(weight.nbytes for weight in weights)
    count = 2 * sum(weight.numel() for weight in weights)
    assert held == pytest.approx(NF4_BYTES * count, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_the_predicted_peak_is_what_real_tensors_take(recomputed):
    settings = ModelSettings(path=str(SEED_MODEL), precision="fp32", quantize="nf4", lora=LoraSettings(rank=4))
    model = load_model(settings, trainable=True).train()
    footprint = measure_footprint(model.config, Row(400, 80, "fp32", quantize="nf4"), lora=settings.lora)
    with segment_attention(model), prepared_layers(model, Recompute(recomputed), compiled=False):
        peaks = meter_step(model, row_of(400, num_answers=20), autocast=False)
    assert predict_memory(footprint, Recompute(recomputed)).activations_bytes == pytest.approx(max(peaks), rel=0.1)


def test_in_float32_its_layers_compute_in_float32_too_and_return(folder):
    model = load_model(ModelSettings(path=str(folder), precision="bf16", quantize="nf4")).eval()
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad(), in_float32(model):
        assert layer.compute_dtype == torch.float32
        assert torch.allclose(model(IDS).logits, unpacked(model)(IDS).logits, atol=1e-3)
    assert layer.compute_dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_shots_are_shared(folder, precision):
    model = load_model(ModelSettings(path=str(folder), precision=precision, quantize="nf4")).eval()
    assert try_prefix(model, np.arange(3, 300, dtype=np.int32)) == ""


def write_packed_setting(folder):
    config = write_setting(folder, lora=True, num_steps=4)
    return config.model_copy(update={"model": config.model.model_copy(update={"quantize": "nf4"})})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(write_packed_setting(folder), out=folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_an_adapter_is_asked_on_the_packed_base_that_it_was_trained_on(run):
    assert read_note(str(run)).quantize == "nf4"

    def num_packed(**options):
        loaded = load_for_inference(str(run), precision="fp32", **options).model
        return sum(isinstance(part, bitsandbytes.nn.Linear4bit) for part in loaded.modules())

    assert num_packed() == num_packed(quantize="nf4") == 3 * 7
    assert num_packed(quantize="none") == 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(run, tmp_path):
    assert_resumes(write_packed_setting(tmp_path), out=tmp_path / "run", whole=run)


@pytest.mark.slow
def test_a_merge_folds_it_into_the_bases_own_weights_and_says_so(run, tmp_path):
    said = merge_adapter(str(run), tmp_path / "merged")
    assert said.endswith("the adapter was trained on the base in nf4, whose rounding it made up for: measure it again")
    merged = load(tmp_path / "merged")
    own = load_for_inference(str(run), precision="fp32", quantize="none").model
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, own(IDS).logits, atol=1e-4)
    assert read_note(str(tmp_path / "merged")).quantize is None


@pytest.mark.slow
def test_a_run_whose_recipe_changed_the_packed_bases_config_is_asked_and_merged(tmp_path):
    config = write_packed_setting(tmp_path / "setting")
    changed = config.model.model_copy(update={"config": {"max_position_embeddings": 256}})
    train(config.model_copy(update={"model": changed}), out=tmp_path / "run")
    saved = tmp_path / "run" / "model" / "config.json"
    assert "quantization_config" not in json.loads(saved.read_text())
    own = load_for_inference(str(tmp_path / "run"), precision="fp32").model
    assert own.get_base_model().config.max_position_embeddings == 256
    # An early version saved how the base was packed.
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "quantization_config": packed}))
    again = load_for_inference(str(tmp_path / "run"), precision="fp32").model
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, own(IDS).logits)
    merge_adapter(str(tmp_path / "run"), tmp_path / "merged")
    assert load(tmp_path / "merged").config.max_position_embeddings == 256


def test_an_adapter_on_a_checkpoint_in_4_bits_whose_config_was_changed_still_knows_it_as_one(folder, tmp_path):
    packed = tmp_path / "packed"
    load(folder, quantize="nf4").save_pretrained(packed)
    settings = {"config": {"max_position_embeddings": 256}, "lora": LoraSettings(rank=2)}
    own = load_model(ModelSettings(path=str(packed), precision="fp32", **settings), trainable=True).eval()
    save_model(own, train_tokenizer("bpe"), tmp_path / "adapter", note=ModelNote())
    again = load(tmp_path / "adapter")
    assert again.get_base_model().config.max_position_embeddings == 256
    weights = dict(own.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in again.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.float32, torch.uint8}


def refusal(**settings):
    with pytest.raises(UserError) as caught:
        load_model(ModelSettings(precision="fp32", quantize="nf4", **settings), trainable=True)
    return str(caught.value)


def test_what_cannot_be_packed_is_refused_with_the_reason(folder, tmp_path, monkeypatch):
    lora = LoraSettings(rank=2)
    assert refusal(path=str(folder)) == (
        "model.quantize = 'nf4': packed weights cannot be trained; train an adapter (model.lora) or leave it out"
    )
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    assert "experts cannot be packed, and most weights of gpt_oss are" in refusal(path=str(tmp_path), lora=lora)
    load(folder, quantize="nf4").save_pretrained(tmp_path / "packed")
    assert "is quantised already, by bitsandbytes" in refusal(path=str(tmp_path / "packed"), lora=lora)
    monkeypatch.setattr("manyicl.models.quantization.nf4.find_spec", lambda name: None)
    told = "model.quantize = 'nf4': bitsandbytes is not installed; pip install bitsandbytes"
    assert refusal(path=str(folder), lora=lora) == told
