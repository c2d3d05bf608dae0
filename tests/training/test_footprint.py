"""Predicted memory against what real tensors take, in the code that trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from manyicl.episodes.batch import join_row
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.errors import UserError
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import LoraSettings, add_adapter
from manyicl.models.loss import answer_loss, target_logits
from manyicl.training.memory import choice
from manyicl.training.memory.choice import choose_recompute, fewest_recomputed, predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.memory.storage_meter import StorageMeter, meter_step
from manyicl.training.recompute import tiles
from manyicl.training.recompute.layers import Recompute, measure_kept, prepared_layers
from tests.conftest import COMMON, CONFIGS, tiny_model

RANK_4 = LoraSettings(rank=4, alpha=8)
NUM_LAYERS = 6
WHOLE = Recompute(NUM_LAYERS, keep_attention=False)
DEEP = {**COMMON, "num_hidden_layers": NUM_LAYERS}


def row_of(num_tokens, *, num_answers):
    """Return a row of one episode with answers of four tokens."""
    stops = np.linspace(num_tokens / num_answers, num_tokens, num_answers).astype(int)
    ids = np.random.default_rng(0).integers(3, 400, num_tokens).astype(np.int32)
    built = [TokenizedEpisode(ids=ids, spans=np.stack([stops - 4, stops], axis=1))]
    return join_row(built, targets="all", weights=[np.full(num_answers, 0.1)], tasks=[0], episodes=(0,))


def deep_model(name, *, lora):
    """Return a real model of six layers."""
    config = CONFIGS[name]()
    config.num_hidden_layers = NUM_LAYERS
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [*config.layer_types, *config.layer_types]
    model = type(tiny_model(name))(config).train()
    if lora is not None:
        model = add_adapter(model, lora)
    return config, model


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("name", "precision"),
    [("llama", "bf16"), ("mistral", "fp32"), ("gemma", "bf16"), ("gemma", "fp32"), ("qwen3", "bf16")],
)
def test_the_predicted_peak_is_what_real_tensors_take(name, precision, lora):
    batch = row_of(400, num_answers=20)
    for checkpointed in (*map(Recompute, (0, 1, 4, NUM_LAYERS)), WHOLE):
        config, model = deep_model(name, lora=lora)
        if lora is not None and precision == "bf16":  # a frozen base is stored in it
            for parameter in model.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        if checkpointed.num_layers == 0:
            footprint = measure_footprint(config, Row(400, 80, precision), lora=lora)
        layers = prepared_layers(model, checkpointed, compiled=False)
        with segment_attention(model), layers:
            peaks = meter_step(model, batch, autocast=precision == "bf16")
        prediction = predict_memory(footprint, checkpointed)
        assert prediction.activations_bytes == pytest.approx(max(peaks), rel=0.1)
        assert (prediction.moment == "head") == (peaks[0] > peaks[1])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_tiles_of_feed_forward_parts_take_what_is_predicted(name, lora, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 50)
    config, model = deep_model(name, lora=lora)
    footprint = measure_footprint(config, Row(408, 80, "fp32"), lora=lora)  # of another length than in other tests
    in_tiles = replace(WHOLE, tiles=True)
    with segment_attention(model), prepared_layers(model, in_tiles, compiled=False):
        peaks = meter_step(model, row_of(408, num_answers=20), autocast=False)
    prediction = predict_memory(footprint, in_tiles)
    assert prediction.activations_bytes == pytest.approx(max(peaks), rel=0.1)
    assert footprint.layer.work_tiles < 0.8 * footprint.layer.work_whole


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_layer_keeps_the_tensors_that_autograd_saves(name, lora):
    config, model = deep_model(name, lora=lora)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address comes twice
        return tensor

    batch = row_of(400, num_answers=20)
    with (
        segment_attention(model),
        prepared_layers(model, Recompute(0), compiled=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        answer_loss(target_logits(model, batch), batch)
    footprint = measure_footprint(config, Row(400, 80, "fp32"), lora=lora)
    num_saved = sum(size for size, _ in saved.values())
    # Beside the layers: the logits and their softmax, float32, and a few vectors.
    beside = 2 * 4 * 80 * 400
    assert footprint.layer.kept * NUM_LAYERS + beside == pytest.approx(num_saved, rel=0.1)


@pytest.mark.slow
def test_states_by_hand():
    config = CONFIGS["llama"]()
    row = Row(64, 8, "bf16")
    full = predict_memory(measure_footprint(config, row), Recompute(0))
    num_weights = 25600 + 27648 + 224
    assert full.weights_bytes == full.gradients_bytes == 4 * num_weights
    assert (full.optimizer_bytes, full.adapters_bytes) == (8 * num_weights, 0)
    lora = predict_memory(measure_footprint(config, row, lora=RANK_4), Recompute(0))
    num_adapter = 4 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert lora.weights_bytes == 2 * num_weights
    assert lora.adapters_bytes == lora.gradients_bytes == 4 * num_adapter
    assert lora.optimizer_bytes == 8 * num_adapter
    assert lora.total_bytes == lora.states_bytes + lora.activations_bytes


@pytest.mark.slow
def test_a_7b_model_in_32k_tokens_is_known_without_weights():
    config = MistralConfig(sliding_window=None, num_hidden_layers=32)
    footprint = measure_footprint(config, Row(8192, 800, "bf16"), lora=LoraSettings(rank=16))
    # A checkpointed layer leaves its input and its attention's output: twice 8192 tokens of 4096 numbers in bfloat16.
    assert footprint.layer.recomputed == pytest.approx(2 * 8192 * 4096 * 2, rel=0.05)
    assert footprint.layer.whole == 8192 * 4096 * 2
    none, every = (predict_memory(footprint, Recompute(n)).total_bytes / 2**30 for n in (0, 32))
    assert 17 < every < 20
    whole = predict_memory(footprint, Recompute(32, keep_attention=False)).total_bytes / 2**30
    assert 1.8 < every - whole < 2.1  # 32 outputs of 64 MiB, less the one of the layer that goes backward
    assert 55 < none < 75


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_compiled_layers_are_predicted_to_keep_what_they_keep_when_run():
    torch._dynamo.reset()
    config, model = deep_model("llama", lora=RANK_4)
    plain, compiled = (measure_footprint(config, Row(400, 80, "fp32", compiled=c), lora=RANK_4) for c in (False, True))
    kept = measure_kept(model, compiled=True) * 400
    assert compiled.layer.kept == pytest.approx(kept, rel=0.1)
    assert compiled.layer.kept < 0.95 * plain.layer.kept
    assert (compiled.layer.recomputed, compiled.layer.whole) == (plain.layer.recomputed, plain.layer.whole)
    # Compiled, more lives at once while one is recomputed: two and a half layers, as measured on a GPU.
    assert compiled.layer.work_recomputed == max(plain.layer.work_recomputed, round(2.5 * compiled.layer.kept))
    assert compiled.layer.work_whole == max(plain.layer.work_whole, round(2.1 * compiled.layer.kept))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_compiled_layers_keep_no_copies_of_weights_that_autocast_makes():
    torch._dynamo.reset()
    row = Row(num_tokens=32, num_targets=4, precision="bf16")
    plain, compiled = (measure_footprint(LlamaConfig(**DEEP), replace(row, compiled=c)) for c in (False, True))
    # In bfloat16: two square matrices and two narrow ones of attention, and three of the feed-forward.
    copies = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    # Uncompiled, recomputed layers too hold theirs while the head is at work, and no longer in the backward pass.
    assert plain.head.recomputed - plain.layer.recomputed == plain.head.whole - plain.layer.whole == copies
    assert (compiled.head.recomputed, compiled.head.whole) == (plain.layer.recomputed, plain.layer.whole)
    assert (compiled.layer.recomputed, compiled.layer.whole) == (plain.layer.recomputed, plain.layer.whole)
    assert 0 < compiled.head.kept <= plain.head.kept - copies
    assert 0 < compiled.layer.kept <= plain.layer.kept - copies


@pytest.mark.slow
def test_as_few_layers_are_checkpointed_as_memory_asks():
    footprint = measure_footprint(LlamaConfig(**DEEP), Row(400, 80, "fp32"))
    peaks = [predict_memory(footprint, Recompute(n)).total_bytes for n in range(NUM_LAYERS + 1)]
    assert peaks[0] > peaks[3] > peaks[6]
    assert fewest_recomputed(footprint, free_bytes=2 * peaks[0]) == Recompute(0)
    assert fewest_recomputed(footprint, free_bytes=int(peaks[3] / 0.92) + 1) == Recompute(3)
    assert fewest_recomputed(footprint, free_bytes=min(peaks)) == WHOLE
    whole = predict_memory(footprint, WHOLE).total_bytes
    assert whole < min(peaks)
    assert fewest_recomputed(footprint, free_bytes=int(whole / 0.92) + 1) == WHOLE
    assert fewest_recomputed(footprint, free_bytes=whole) == replace(WHOLE, offload=True)
    assert fewest_recomputed(footprint, free_bytes=1000) == replace(WHOLE, offload=True)  # nothing fits, tiles neither


@pytest.mark.slow
def test_tiles_are_taken_where_nothing_else_fits(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 50)
    offload = replace(WHOLE, offload=True)
    footprint = measure_footprint(LlamaConfig(**DEEP), Row(416, 80, "fp32"))  # of another length than in other tests
    in_tiles = predict_memory(footprint, replace(offload, tiles=True)).total_bytes
    assert in_tiles < predict_memory(footprint, offload).total_bytes
    free_bytes = int(in_tiles / 0.92) + 1
    assert fewest_recomputed(footprint, free_bytes=free_bytes) == replace(offload, tiles=True)
    fault = replace(footprint, tiles_fault="OtherLayer is not known")
    assert fewest_recomputed(fault, free_bytes=free_bytes) == offload


@pytest.mark.slow
def test_capped_scores_are_run_as_they_are_because_no_fused_kernel_knows_them():
    row = Row(400, 80, "fp32")
    capped = measure_footprint(Gemma2Config(**{**DEEP, "pad_token_id": 0}), row)
    plain = measure_footprint(Gemma2Config(**{**DEEP, "pad_token_id": 0}, attn_logit_softcapping=None), row)
    # Going backward, at the least the scores of a block of queries.
    assert capped.layer.work_kept > plain.layer.work_kept + 4 * 400 * 400


def test_a_model_that_needs_contents_is_one_line(monkeypatch):
    from manyicl.training.memory import storage_meter

    def needs_contents(model, batch, **_):
        return float(target_logits(model, batch).sum())

    monkeypatch.setattr(storage_meter, "row_loss", needs_contents)
    with pytest.raises(UserError, match="llama: its memory cannot be predicted") as caught:
        measure_footprint(CONFIGS["llama"](), Row(61, 8, "fp32"))  # as no test before: what is known is not run again
    assert "\n" not in str(caught.value)


def test_a_meter_counts_storages_once_and_until_their_end():
    weight = torch.zeros(1000)
    with StorageMeter([weight]) as meter:
        kept = weight + 1  # 4,000 bytes
        view = kept[:10].view(2, 5)
        weight.mul_(2)
        assert meter.live_bytes == 4000
        gone = torch.cat([kept, kept])
        assert meter.live_bytes == 12000
        del gone
        assert (meter.live_bytes, meter.peak_bytes) == (4000, 12000)
        meter.reset()
        assert meter.peak_bytes == 4000
        del kept
        assert meter.live_bytes == 4000
        del view
        assert meter.live_bytes == 0


def test_training_and_plan_choose_the_same_layers_with_the_same_memory(monkeypatch):
    """One predictor decides for both: as many bytes free, as many layers recomputed."""
    config, model = deep_model("llama", lora=None)
    row = Row(400, 80, "fp32")
    footprint = measure_footprint(config, row)
    peaks = [predict_memory(footprint, Recompute(n)).total_bytes for n in range(NUM_LAYERS + 1)]
    for free_bytes in (2 * peaks[0], int(peaks[2] / 0.92) + 1, int(peaks[4] / 0.92) + 1, min(peaks)):
        planned = fewest_recomputed(footprint, free_bytes=free_bytes)
        trained = choose_recompute(model, "auto", row=row, free_bytes=free_bytes)
        assert trained == planned


def test_a_setting_is_taken_and_a_cpu_recomputes_nothing_by_itself():
    model, row = tiny_model("llama"), Row(10**9, 1, "fp32")
    expected = {
        "auto": Recompute(0),
        "none": Recompute(0),
        "selective": Recompute(3),
        "full": Recompute(3, keep_attention=False),
        "offload": Recompute(3, keep_attention=False, offload=True),
        "tiled": Recompute(3, keep_attention=False, offload=True, tiles=True),
        2: Recompute(2),
    }
    for setting, chosen in expected.items():
        assert choose_recompute(model, setting, row=row) == chosen


def test_tiles_are_refused_where_they_would_change_the_model():
    with pytest.raises(
        UserError, match=r"^train\.recompute = 'tiled': Gemma2DecoderLayer is not known .*; set 'offload'"
    ):
        choose_recompute(tiny_model("gemma2"), "tiled", row=Row(64, 8, "fp32"))


@pytest.mark.slow
def test_inputs_in_the_hosts_memory_leave_two_on_the_device():
    footprint = measure_footprint(deep_model("llama", lora=None)[0], Row(400, 80, "fp32"))
    whole, offloaded = (predict_memory(footprint, replace(WHOLE, offload=on)) for on in (False, True))
    one_input = 400 * COMMON["hidden_size"] * 4
    assert whole.total_bytes - offloaded.total_bytes == pytest.approx((NUM_LAYERS - 2) * one_input, rel=0.01)
    assert one_input == 51_200
    assert (whole.host_bytes, offloaded.host_bytes) == (0, NUM_LAYERS * 65_536)  # torch pins powers of two


@pytest.mark.slow
def test_inputs_are_not_sent_to_a_host_without_room_for_them(monkeypatch):
    """'auto' did not look, and the host's memory ran out."""
    config, model = deep_model("llama", lora=None)
    row = Row(400, 80, "fp32")
    footprint = measure_footprint(config, row)
    offload = replace(WHOLE, offload=True)
    free_bytes = int(predict_memory(footprint, offload).total_bytes / 0.92) + 1
    enough = int(NUM_LAYERS * 65_536 / 0.92) + 1
    for host_bytes, expected in ((None, offload), (enough, offload), (enough - 1000, WHOLE)):
        assert fewest_recomputed(footprint, free_bytes=free_bytes, host_bytes=host_bytes) == expected
    monkeypatch.setattr(choice, "free_host_memory", lambda: enough)
    assert choose_recompute(model, "auto", row=row, free_bytes=free_bytes) == offload
    monkeypatch.setattr(choice, "free_host_memory", lambda: enough - 1000)
    told = (
        r"^train\.recompute = 'auto': a step is predicted to take 0\.0 GiB with all layers recomputed, and 0\.0 GiB of"
        r" the GPU's memory can be counted on; inputs of layers need 0\.0 GiB of the host's memory, of which 0\.0 GiB"
    )
    with pytest.warns(UserWarning, match=told):
        assert choose_recompute(model, "auto", row=row, free_bytes=free_bytes) == WHOLE


@pytest.mark.slow
def test_what_fits_no_gpu_takes_the_least_and_says_so(monkeypatch):
    """It used to take `offload` without a word, and the GPU ran out of memory."""
    monkeypatch.setattr(tiles, "TILE_TOKENS", 50)
    monkeypatch.setattr(choice, "free_host_memory", lambda: None)
    model, row = deep_model("llama", lora=None)[1], Row(416, 80, "fp32")
    with pytest.warns(
        UserWarning, match=r"can be counted on; `manyicl plan` with the device's name tells what would fit"
    ):
        chosen = choose_recompute(model, "auto", row=row, free_bytes=1000)
    assert chosen == replace(WHOLE, offload=True, tiles=True)


def test_a_model_whose_memory_is_unknown_is_recomputed_in_full_and_says_so(monkeypatch):
    def refuse(*_, **__):
        raise UserError("llama: its memory cannot be predicted")

    monkeypatch.setattr(choice, "measure_footprint", refuse)
    with pytest.warns(UserWarning, match=r"cannot be predicted; so all layers are recomputed: set train\.recompute"):
        chosen = choose_recompute(tiny_model("llama"), "auto", row=Row(64, 8, "fp32"), free_bytes=10**9)
    assert chosen == Recompute(3, keep_attention=False)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, RANK_4], ids=["full", "lora"])
def test_under_fsdp2_gpus_share_states_and_hold_three_units_whole(lora):
    config, row = CONFIGS["llama"](), Row(64, 8, "bf16")
    one, four = (measure_footprint(config, row, lora=lora, num_shards=n) for n in (1, 4))
    whole, part = (predict_memory(footprint, Recompute(0)) for footprint in (one, four))
    assert part.states_bytes == pytest.approx(whole.states_bytes / 4, abs=4)
    # The largest unit is an end of the model, 400 words of 32 numbers in float32; beside a frozen base it is a layer,
    # its 9,280 weights in bfloat16 and its adapters in float32.
    unit = 4 * 400 * 32 if lora is None else 2 * 9280 + 4 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert (whole.gathered_bytes, part.gathered_bytes) == (0, 3 * unit)
    # FSDP2 gathers weights in bfloat16, so that autocast makes no copies of them.
    assert part.activations_bytes <= whole.activations_bytes
    assert part.total_bytes == part.states_bytes + part.gathered_bytes + part.activations_bytes
