"""The predicted peak against what a CUDA allocator says."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from manyicl.episodes.batch import join_row
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import LoraSettings, ModelSettings, add_adapter, load_model
from manyicl.models.loss import row_loss
from manyicl.training.memory.choice import predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.recompute.layers import Recompute, prepared_layers, unwidened_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=32768,
)


def measure_peak(model, checkpointed, *, num_tokens, num_targets):
    """The allocator's peak over a forward and backward pass of one row."""
    span = np.array([[num_tokens - num_targets, num_tokens]])
    built = TokenizedEpisode(ids=np.full(num_tokens, 5, dtype=np.int32), spans=span)
    batch = join_row([built], targets="all", weights=[np.ones(1)], tasks=[0], episodes=(0,)).to("cuda")
    for _ in range(2):  # the second pass finds the gradients there
        torch.cuda.reset_peak_memory_stats()
        layers = prepared_layers(model, checkpointed, compiled=False)
        with segment_attention(model, row_tokens=num_tokens), layers, unwidened_inputs(model, autocast=True):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = row_loss(model, batch).loss
            loss.backward()
        del loss
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    "checkpointed",
    [
        *map(Recompute, (0, 5, 8)),
        Recompute(8, keep_attention=False),
        Recompute(8, keep_attention=False, offload=True),
        Recompute(8, keep_attention=False, offload=True, tiles=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("lora", [None, LoraSettings()], ids=["full", "lora"])
@pytest.mark.parametrize("num_tokens", [4096, 16384])
def test_the_predicted_peak_is_what_the_allocator_reports(num_tokens, lora, checkpointed):
    num_targets = num_tokens // 10
    gc.collect()
    others = torch.cuda.memory_allocated()  # what earlier tests have left
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32 if lora is None else torch.bfloat16)
        model = model.train() if lora is None else add_adapter(model, lora).train()
    footprint = measure_footprint(CONFIG, Row(num_tokens, num_targets, "bf16"), lora=lora)
    prediction = predict_memory(footprint, checkpointed)
    measured = measure_peak(model, checkpointed, num_tokens=num_tokens, num_targets=num_targets) - others
    predicted = prediction.total_bytes - prediction.optimizer_bytes  # there is no optimizer here
    print(f"{num_tokens} tokens, measured {measured / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f}")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointed", [*map(Recompute, (0, 8)), Recompute(8, keep_attention=False)], ids=str)
@pytest.mark.parametrize("quantize", ["nf4", "float8"])
def test_the_predicted_peak_on_a_base_in_fewer_bits_is_what_the_allocator_reports(tmp_path, quantize, checkpointed):
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    num_tokens, num_targets = 16384, 1638
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(tmp_path)
    lora = LoraSettings()
    settings = ModelSettings(path=str(tmp_path), precision="bf16", quantize=quantize, lora=lora)
    model = load_model(settings, trainable=True, device="cuda").train()
    row = Row(num_tokens, num_targets, "bf16", quantize=quantize)
    prediction = predict_memory(measure_footprint(CONFIG, row, lora=lora), checkpointed)
    measured = measure_peak(model, checkpointed, num_tokens=num_tokens, num_targets=num_targets)
    assert prediction.total_bytes - prediction.optimizer_bytes == pytest.approx(measured, rel=0.1)
