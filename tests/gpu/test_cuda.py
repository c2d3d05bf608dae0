"""On a CUDA device: isolation, packed = unpacked, the engine behind a prefix, and whole runs. Skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyicl.attention import segment_attention
from manyicl.loss import answer_loss, target_logits
from manyicl.prefix import encode_prefix, score_answers
from manyicl.runs import train
from tests.conftest import CONFIGS, tiny_model
from tests.parity.test_engine_parity import plain_nll
from tests.parity.test_loss_parity import EPISODE, TokenizedEpisode, random_episode, row
from tests.trajectory.setting import read_metrics, write_setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CLASSES = sorted(CONFIGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_perturbed_token_moves_no_logit_of_its_neighbours(name, dtype):
    model = tiny_model(name).to("cuda", dtype)
    episodes = [random_episode(EPISODE, seed=seed) for seed in (4, 5, 6)]
    middle = episodes[1]
    changed = TokenizedEpisode(ids=np.where(np.arange(len(middle.ids)) == 2, 7, middle.ids), spans=middle.spans)
    before, after = row(episodes).to("cuda"), row([episodes[0], changed, episodes[2]]).to("cuda")
    with torch.no_grad(), segment_attention(model):
        moved = (target_logits(model, before) - target_logits(model, after)).abs().amax(dim=-1) > 0
    segment = before.segment_ids_T[before.target_positions_N]
    assert [bool(moved[segment == s].any()) for s in range(3)] == [False, True, False]


@pytest.mark.parametrize("name", CLASSES)
def test_packed_equals_unpacked_and_the_cpu(name):
    model = tiny_model(name)
    episodes = [random_episode([(5, 2)] * k, seed=k) for k in (3, 1, 6)]
    losses = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        for label, rows in (("packed", [row(episodes)]), ("apart", [row([e]) for e in episodes])):
            with torch.no_grad(), segment_attention(model):
                batches = [r.to(device) for r in rows]
                losses[device, label] = sum(answer_loss(target_logits(model, b), b).loss.item() for b in batches)
    assert list(losses.values()) == pytest.approx([losses["cpu", "apart"]] * 4, rel=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_scores_behind_a_prefix_equal_the_cpus_plain_forward(name):
    model = tiny_model(name)
    rng = np.random.default_rng(0)
    before = rng.integers(3, 390, 40).astype(np.int32)
    pairs = [(rng.integers(3, 390, 6).astype(np.int32), rng.integers(3, 390, 3).tolist()) for _ in range(4)]
    expected = [plain_nll(model, [*before, *ids, *answer], num_answer=3) for ids, answer in pairs]
    model.to("cuda")
    nll, _ = score_answers(model, encode_prefix(model, before), pairs)
    assert nll == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_and_is_the_same_by_other_micro_batches(tmp_path, lora, precision):
    courses = []
    for packs in (8, 2):
        config = write_setting(
            tmp_path, lora=lora, packs_per_batch=packs, num_steps=4, gradient_checkpointing=packs == 2
        )
        config = config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})
        train(config, out=tmp_path / f"rows-{packs}")
        courses.append([r["loss"] for r in read_metrics(tmp_path / f"rows-{packs}") if "loss" in r])
    assert courses[0] == pytest.approx(courses[1], rel=1e-3 if precision == "fp32" else 5e-2)
    assert courses[0][-1] < courses[0][0]
