"""Norms and rotary positions in fewer kernels: the same losses and gradients, and fewer operations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.models.lean_layers import join_projections, lean_pieces, plain_layers
from manyicl.training.recompute.layers import Recompute, prepared_layers
from tests.conftest import tiny_model

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# A layer with a window and one without, which turn by angles of their own.
GEMMA3 = partial(Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=16)
KINDS = [
    pytest.param(LlamaForCausalLM, LlamaConfig, id="llama"),
    pytest.param(GemmaForCausalLM, GemmaConfig, id="gemma"),
    pytest.param(Gemma2ForCausalLM, Gemma2Config, id="gemma2"),
    pytest.param(Gemma3ForCausalLM, GEMMA3, id="gemma3"),
]
NEEDS_CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


class Operations(TorchDispatchMode):
    """Counts what is not a mere view."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def make_model(kind, config, device="cpu"):
    torch.manual_seed(0)
    model = kind(config(**SHAPE)).to(device)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a weight that is left out
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.train()


def loss_and_gradients(model, *, autocast=False):
    ids = torch.arange(40, device=model.device)[None] % 61
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("autocast", "most"), [(False, 1e-5), (True, 0.05)], ids=["fp32", "autocast"])
@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_losses_and_gradients_are_the_models_own(kind, config, device, autocast, most):
    model = make_model(kind, config, device)
    expected_loss, expected = loss_and_gradients(model)
    own = loss_and_gradients(model, autocast=autocast)[1]
    with lean_pieces(model):
        loss, gradients = loss_and_gradients(model, autocast=autocast)
    assert float(loss) == pytest.approx(float(expected_loss), rel=most)
    for name, gradient in gradients.items():
        distance = (gradient - expected[name]).norm() / expected[name].norm()
        assert distance <= most, name
        # In bfloat16 it is no further from float32 than the model's own code is, but for chance.
        if autocast:
            assert distance <= 1.5 * (own[name] - expected[name]).norm() / expected[name].norm(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_answers_have_the_models_own_logits(kind, config, device, dtype, most):
    model = make_model(kind, config, device).to(dtype).eval()
    ids = torch.arange(40, device=device)[None] % 61
    with torch.inference_mode():
        own = model(ids, use_cache=False).logits
        with lean_pieces(model), Operations() as lean:
            logits = model(ids, use_cache=False).logits
        with Operations() as usual:
            model(ids, use_cache=False)
    assert (logits - own).norm() <= most * own.norm()
    assert lean.number < usual.number


@pytest.mark.parametrize("device", DEVICES)
def test_passes_of_several_threads_turn_each_by_their_own_angles(device):
    """Two threads kept their sines in one place, and a thread took what the other had just put there."""
    model = make_model(Gemma3ForCausalLM, GEMMA3, device).eval()
    rows = [torch.arange(n, device=device)[None] % 61 for n in (5, 17, 40, 33)]

    @torch.inference_mode()
    def read(row):
        return model(row, use_cache=False).logits

    with lean_pieces(model):
        alone = [read(row) for row in rows]
        with ThreadPoolExecutor(len(rows)) as pool:
            found = list(pool.map(read, rows * 50))
    for logits, expected in zip(found, alone * 50, strict=True):
        torch.testing.assert_close(logits, expected)


def test_a_layer_that_is_recomputed_gives_the_same_gradients():
    model = make_model(LlamaForCausalLM, LlamaConfig)
    expected_loss, expected = loss_and_gradients(model)
    with prepared_layers(model, Recompute(2), compiled=False):
        loss, gradients = loss_and_gradients(model)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_there_are_fewer_operations_and_the_model_is_left_as_it_was():
    model = make_model(LlamaForCausalLM, LlamaConfig)
    with Operations() as own:
        before = loss_and_gradients(model, autocast=True)[0]
    with lean_pieces(model), Operations() as lean:
        loss_and_gradients(model, autocast=True)
    # On a CPU the norm is still made of single operations.
    assert lean.number < 0.85 * own.number
    assert loss_and_gradients(model, autocast=True)[0] == before


def test_a_model_that_is_not_known_is_left_as_it_is():
    model = make_model(Qwen3ForCausalLM, Qwen3Config)
    own = loss_and_gradients(model)[0]
    with lean_pieces(model):
        assert loss_and_gradients(model)[0] == own


def count_calls(model, run):
    """Return what `run` returns, and how many modules it called."""
    calls = []

    def note(module, *_):
        calls.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        return run(), len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-sliding"])
def test_plain_layers_give_the_same_likelihoods_and_call_fewer_modules(name, lora):
    model = tiny_model(name)
    if lora:
        config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config).eval()
    ids = np.random.default_rng(0).integers(3, 390, 60).astype(np.int32)
    queries, options = [ids[:1], ids[:7], ids[9:33]], [[5, 6], [5, 8, 9]]

    def ask():
        return np.array(score_choices(model, encode_prefix(model, ids), queries, [options] * 3))

    with lean_pieces(model):
        own, usual = count_calls(model, ask)
        with plain_layers():
            nats, fewer = count_calls(model, ask)
        again, left = count_calls(model, ask)
    assert np.array_equal(nats, own)
    assert np.array_equal(again, own)
    assert fewer < (0.75 if lora else 0.3) * usual
    assert left == usual


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-sliding"])
def test_projections_that_lie_side_by_side_are_one_product_and_give_the_same_likelihoods(name, device):
    model = tiny_model(name).to(device)
    ids = np.random.default_rng(0).integers(3, 390, 60).astype(np.int32)
    queries, options = [ids[:1], ids[:7], ids[9:33]], [[5, 6], [5, 8, 9]]

    def ask():
        with Operations() as counted:
            nats = np.array(score_choices(model, encode_prefix(model, ids), queries, [options] * 3))
        return nats, counted.number

    numbers = {key: value.clone() for key, value in model.state_dict().items()}
    with lean_pieces(model), plain_layers():
        own, usual = ask()
    join_projections(model)
    with lean_pieces(model), plain_layers():
        nats, fewer = ask()
    # Two passes of two layers: at least three products and a copy of queries and keys less in each.
    assert fewer <= usual - 16
    np.testing.assert_allclose(nats, own, atol=1e-5)
    assert all(torch.equal(value, numbers[key]) for key, value in model.state_dict().items())


def test_projections_that_were_moved_apart_again_are_read_where_they_are():
    model = tiny_model("llama")
    join_projections(model)
    ids = np.random.default_rng(0).integers(3, 390, 60).astype(np.int32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = 2 * weight.data
    with lean_pieces(model):
        expected = encode_prefix(model, ids).layer(1)[0]
        with plain_layers():
            keys = encode_prefix(model, ids).layer(1)[0]
    assert torch.equal(keys, expected)


def test_a_model_whose_projections_lie_side_by_side_is_saved_like_any_other(tmp_path):
    model = tiny_model("llama")
    numbers = {key: value.clone() for key, value in model.state_dict().items()}
    join_projections(model)
    model.save_pretrained(tmp_path)
    saved = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == numbers.keys()
    assert all(torch.equal(value, numbers[key]) for key, value in saved.items())


def test_projections_with_biases_and_those_of_adapters_stay_where_they_are():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    model = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    join_projections(model)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before


def test_plain_layers_leave_training_and_what_hooks_into_a_part_alone():
    model = make_model(LlamaForCausalLM, LlamaConfig)
    own, expected = loss_and_gradients(model)
    seen = []
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    ids = np.arange(3, 33, dtype=np.int32)
    with lean_pieces(model), plain_layers():
        encode_prefix(model.eval(), ids)
    assert seen == [1]
    handle.remove()
    model.train()
    with plain_layers():
        loss, gradients = loss_and_gradients(model)
    assert loss == own
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
