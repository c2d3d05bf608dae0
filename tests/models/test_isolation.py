"""Finding A1 of the review: no episode of a row sees another, in any class of models, or each goes alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from manyicl.episodes.batch import split_row
from manyicl.errors import UserError
from manyicl.evaluation.text_loss import TextWindows, window_bits
from manyicl.models.isolation import isolation_fault, row_attention
from manyicl.models.loss import row_loss
from manyicl.training.run import train
from tests.conftest import ALONE_CONFIGS, CONFIGS, tiny_model
from tests.parity.test_loss_parity import EPISODE, random_episode, row
from tests.trajectory.setting import read_metrics, write_setting

TEXT = np.random.default_rng(0).integers(3, 390, 600).astype(np.int32)
FAULTS = {
    "falcon": "does not take its attention from outside",
    "gpt_oss": "fails on a row of several episodes",
    "lfm2": "does not keep the episodes of a row apart",
    "llama4-chunked": "gives other logits by the attention for rows than by its own",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_class_that_keeps_episodes_apart_passes_the_trial(name):
    assert isolation_fault(tiny_model(name), TEXT, longest=512) == ""


@pytest.mark.parametrize("name", sorted(ALONE_CONFIGS))
def test_a_class_that_does_not_is_found_out_and_warned_of_once(name):
    model = tiny_model(name).train()
    before = model.config._attn_implementation
    with pytest.warns(UserWarning, match=f"{FAULTS[name]}.*: each episode goes through the model alone"):
        fault = isolation_fault(model, TEXT, longest=100)
    assert fault.startswith(FAULTS[name])
    assert isolation_fault(model, TEXT, longest=100) == fault  # a second warning would be an error
    assert model.training
    assert model.config._attn_implementation == before


def test_the_trial_is_made_again_for_episodes_longer_than_a_chunk():
    torch.manual_seed(0)
    model = tiny_model("llama4-chunked")
    assert isolation_fault(model, TEXT, longest=16) == ""
    with pytest.warns(UserWarning, match="each episode goes through the model alone"):
        assert isolation_fault(model, TEXT, longest=20)


def test_bfloat16_alone_is_no_reason_to_fail_the_trial():
    assert isolation_fault(tiny_model("llama").bfloat16(), TEXT, longest=512) == ""
    with pytest.warns(UserWarning, match="does not keep the episodes of a row apart"):
        assert isolation_fault(tiny_model("lfm2").bfloat16(), TEXT, longest=512)


def test_a_model_whose_tokens_see_those_after_them_is_refused_in_one_line():
    config = BertConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    with pytest.raises(UserError, match="a token of this bert model sees the tokens after it") as told:
        isolation_fault(model, TEXT, longest=100)
    assert "\n" not in str(told.value)


def test_a_model_whose_own_forward_fails_is_refused_in_one_line():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="its own forward pass fails on 40 tokens") as told:
        isolation_fault(model, TEXT, longest=100)
    assert "\n" not in str(told.value)


def loss_and_gradient(model, batches):
    model.zero_grad()
    losses = [row_loss(model, batch) for batch in batches]
    torch.stack([scored.loss for scored in losses]).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat([scored.nll_A for scored in losses]), gradient


@pytest.mark.filterwarnings("ignore:.*each episode goes through the model alone")
@pytest.mark.parametrize("name", [*sorted(ALONE_CONFIGS), "llama"])
def test_a_row_costs_what_its_episodes_cost_alone_by_hugging_faces_own_forward(name):
    model = tiny_model(name)
    episodes = [random_episode(EPISODE, seed=seed) for seed in (1, 2)]
    with row_attention(model, TEXT, longest=100):
        nll_A, gradient = loss_and_gradient(model, [row(episodes)])
    model.zero_grad()
    expected = []
    for episode in episodes:
        ids = torch.from_numpy(episode.ids.astype(np.int64))
        logprobs = model(ids[None]).logits[0].log_softmax(dim=-1)
        expected += [-sum(logprobs[i - 1, ids[i]] for i in range(start, stop)) for start, stop in episode.spans]
    torch.stack(expected).sum().backward()
    expected_gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(nll_A, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.filterwarnings("ignore:.*each episode goes through the model alone")
@pytest.mark.parametrize("name", sorted(ALONE_CONFIGS))
def test_bits_of_a_window_do_not_depend_on_the_window_before_it(name):
    model = tiny_model(name)
    first, other, last = TEXT[:30], TEXT[60:90], TEXT[30:60]

    def bits_of_last(*ids):
        return window_bits(model, TextWindows("text", ids, np.array([30] * len(ids)), True, 0))[-1]

    alone = bits_of_last(last)
    assert bits_of_last(first, last) == pytest.approx(alone, rel=1e-5)
    assert bits_of_last(other, last) == pytest.approx(alone, rel=1e-5)


def test_the_episodes_of_a_row_are_split_with_their_targets_and_weights():
    batch = row([random_episode([(2, 1), (3, 2)], seed=1), random_episode([(1, 3)], seed=2)])
    first, second = split_row(batch)
    assert (first.segment_lengths, second.segment_lengths) == ((9,), (5,))
    assert first.target_positions_N.tolist() == [3, 7, 8]
    assert second.target_positions_N.tolist() == [2, 3, 4]
    assert second.target_answers_N.tolist() == [0, 0, 0]
    assert second.position_ids_1T.tolist() == [[0, 1, 2, 3, 4]]
    assert (first.answer_shots_A.tolist(), second.answer_shots_A.tolist()) == ([0, 1], [0])
    assert (first.episodes, second.episodes) == ((0,), (1,))
    assert split_row(first) == [first]


@pytest.mark.slow
def test_training_runs_the_episodes_alone_and_says_so_in_run_json(tmp_path):
    config = write_setting(tmp_path, family="lfm2", num_steps=2)
    with pytest.warns(UserWarning, match="each episode goes through the model alone"):
        train(config, out=tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert rows["episodes"] == "alone"
    assert rows["reason"].startswith("does not keep the episodes of a row apart")
    one = config.model_copy(update={"train": config.train.model_copy(update={"packs_per_batch": 1})})
    with pytest.warns(UserWarning, match="each episode goes through the model alone"):
        train(one, out=tmp_path / "one")
    # Alone, an episode is trained alike in any row. Packed, the two runs differed from the first step on.
    losses = [[r["loss"] for r in read_metrics(tmp_path / run) if "loss" in r] for run in ("run", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_class_that_keeps_episodes_apart_trains_them_together(tmp_path):
    train(write_setting(tmp_path, num_steps=2), out=tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert rows == {"episodes": "together", "reason": ""}


@pytest.mark.slow
def test_compiled_layers_are_refused_if_episodes_go_alone(tmp_path):
    config = write_setting(tmp_path, family="lfm2", num_steps=2, compile=True)
    with (
        pytest.warns(UserWarning, match="each episode goes through the model alone"),
        pytest.raises(UserError, match=r"train\.compile = true: the model does not keep the episodes of a row apart"),
    ):
        train(config, out=tmp_path / "run")
