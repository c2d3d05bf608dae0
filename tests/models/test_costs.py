"""Weights and FLOPs: against numbers known by hand, real models, torch's own counter and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaConfig, LlamaConfig, MistralConfig, MixtralConfig, PretrainedConfig

from manyicl.episodes.batch import join_row
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.errors import UserError
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.costs import count_flops, count_pairs, count_weights, shape_model
from manyicl.models.loading import LoraSettings, add_adapter
from manyicl.models.loss import answer_loss, target_logits
from manyicl.models.structure import experts_per_token, layer_windows
from tests.conftest import COMMON, CONFIGS, tiny_model

RANK_4 = LoraSettings(rank=4, alpha=8)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
GEMMA_7B = GemmaConfig()  # transformers' defaults are its numbers
MISTRAL_7B = MistralConfig(sliding_window=None)


@pytest.mark.parametrize(
    ("config", "published"),
    [(MISTRAL_7B, 7_241_732_096), (LLAMA_3_8B, 8_030_261_248), (GEMMA_7B, 8_537_680_896)],
    ids=["mistral-7b", "llama-3-8b", "gemma-7b"],
)
def test_the_weights_of_the_paper_s_models_are_as_many_as_published(config, published):
    assert count_weights(config).base == published


def test_the_weights_of_a_small_model_by_hand():
    weights = count_weights(CONFIGS["llama"]())
    assert weights.embedding == weights.head == 400 * 32
    assert not weights.tied
    # Three layers: queries and outputs 32 x 32, keys and values 32 x 16, and three matrices of 32 x 64.
    assert weights.matrices == weights.active == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert weights.vectors == (2 * 3 + 1) * 32
    assert weights.trained == weights.base == 25600 + 27648 + 224
    adapted = count_weights(CONFIGS["llama"](), lora=RANK_4)
    # Rank times (in + out) of each matrix.
    assert adapted.adapter == 4 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert adapted.trained == adapted.adapter
    assert adapted.base == weights.base


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_model_that_is_trained(name, lora):
    model = tiny_model(name)
    model = model if lora is None else add_adapter(model, lora)
    weights = count_weights(CONFIGS[name](), lora=lora)
    assert weights.total == sum(p.numel() for p in model.parameters())
    assert weights.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_an_adapter_of_the_head_is_counted_apart():
    weights = count_weights(CONFIGS["llama"](), lora=LoraSettings(rank=4, modules=("q_proj", "lm_head")))
    assert (weights.adapter, weights.adapter_head) == (3 * 4 * (32 + 32), 4 * (32 + 400))


def test_a_token_meets_itsexperts_per_token_only():
    config = MixtralConfig(**{**COMMON, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None})
    weights = count_weights(config)
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 8 * 32, 3 * 32 * 64
    assert weights.matrices == 3 * (attention + router + 8 * expert)
    assert weights.active == 3 * (attention + router + 2 * expert)


def row_of(lengths, *, num_targets):
    """Return a row of segments; the last `num_targets` tokens of each are its answer."""
    rng = np.random.default_rng(0)
    built = [
        TokenizedEpisode(ids=rng.integers(3, 400, n).astype(np.int32), spans=np.array([[n - num_targets, n]]))
        for n in lengths
    ]
    weights = [np.full(1, 1.0)] * len(built)
    episodes = tuple(range(len(built)))
    return join_row(built, targets="all", weights=weights, tasks=[0] * len(built), episodes=episodes)


def trainable(name, lora):
    model = tiny_model(name).train()
    if lora is None:
        return model
    # Counts 4 N in every layer: without it the first one's input, a frozen embedding, would need no gradient.
    model.enable_input_require_grads()
    return add_adapter(model, lora)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_what_torch_counts_forward_and_backward(name, lora):
    model, batch = trainable(name, lora), row_of([48], num_targets=5)
    inner = model if lora is None else model.get_base_model()
    inner.set_attn_implementation("eager")  # plain products, which torch's counter knows
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=batch.input_ids_1T, logits_to_keep=batch.target_positions_N - 1, use_cache=False)
        answer_loss(out.logits[0], batch).loss.backward()
    shape = shape_model(CONFIGS[name](), lora=lora)
    # Plain products compute every pair, seen or not: 48 x 48 in each of three layers, 4 heads of 8.
    unseen = 12 * 4 * 8 * (3 * 48 * 48 - count_pairs(shape.windows, [48]))
    assert count_flops(shape, [48], num_targets=5) == counter.get_total_flops() - unseen


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_a_row_of_segments_costs_what_our_own_forward_does(name, lora):
    model, batch = trainable(name, lora), row_of([30, 7, 11], num_targets=3)
    with segment_attention(model), FlopCounterMode(display=False) as counter:
        answer_loss(target_logits(model, batch), batch).loss.backward()
    shape = shape_model(CONFIGS[name](), lora=lora)
    # torch's counter knows no fused attention on a CPU: what it sees is everything else.
    attention = 12 * 4 * 8 * 3 * sum(n * (n + 1) // 2 for n in (30, 7, 11))
    assert count_flops(shape, [30, 7, 11], num_targets=9) - attention == counter.get_total_flops()


@pytest.mark.slow
def test_flops_of_a_7b_model_by_hand():
    full, lora = shape_model(MISTRAL_7B), shape_model(MISTRAL_7B, lora=LoraSettings(rank=16))
    body, head, adapter = 6_979_321_856, 131_072_000, 41_943_040
    # Half of 8192 x 8193 pairs, 32 layers, 32 heads of 128.
    attention = 12 * 32 * 128 * 32 * (8192 * 8193 // 2)
    assert full.weights.active == body
    assert full.weights.head == head
    assert count_flops(full, [8192], num_targets=800) == 6 * (8192 * body + 800 * head) + attention
    expected = 4 * (8192 * body + 800 * head) + 6 * 8192 * adapter + attention
    assert count_flops(lora, [8192], num_targets=800) == expected
    # Two segments of half the length: half the attention, up to the diagonal.
    assert count_flops(full, [4096] * 2, num_targets=800) == pytest.approx(
        6 * (8192 * body + 800 * head) + attention / 2, rel=1e-5
    )
    assert count_flops(full, [8192], num_targets=800, backward=False) * 3 == count_flops(full, [8192], num_targets=800)


def test_asking_behind_a_prefix_costs_the_queries_alone():
    shape = shape_model(CONFIGS["llama"]())
    whole = count_flops(shape, [100], num_targets=0, backward=False)
    prefix = count_flops(shape, [90], num_targets=0, backward=False)
    assert count_flops(shape, [10], num_targets=0, prefix_tokens=90, backward=False) == whole - prefix


@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    prefix=st.integers(0, 20),
)
def test_pairs_are_those_of_a_mask(windows, lengths, prefix):
    expected = sum(
        1
        for window in windows
        for length in lengths
        for query in range(prefix, prefix + length)
        for key in range(query + 1)
        if window is None or key > query - window
    )
    assert count_pairs(windows, lengths, prefix_tokens=prefix) == expected


def test_windows_by_layer():
    assert layer_windows(CONFIGS["llama"]()) == (None, None, None)
    assert layer_windows(CONFIGS["mistral-sliding"]()) == (16, 16, 16)
    assert layer_windows(CONFIGS["gemma3"]()) == (16, 16, None)
    unknown = CONFIGS["qwen3"]()
    unknown.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(UserError, match="kind 'linear_attention' costs is not known"):
        layer_windows(unknown)


def test_experts_without_a_number_to_choose_are_an_error_not_a_guess():
    with pytest.raises(UserError, match="num_experts_per_tok"):
        experts_per_token(PretrainedConfig(model_type="mixture"))


def test_counting_leaves_the_default_device_alone():
    count_weights(CONFIGS["llama"]())
    assert torch.zeros(1).device.type == "cpu"
