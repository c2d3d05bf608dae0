"""Training on real pretrained models: rows of several episodes, a step, a resumed run and a merge, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manyicl.episodes.batch import BatchMaker
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.isolation import isolation_fault
from manyicl.models.loading import LoraSettings, ModelNote, ModelSettings, load_model, load_tokenizer
from manyicl.models.loss import row_loss, target_logits
from manyicl.models.saving import merge_adapter, save_model
from manyicl.models.trials import trial_ids
from manyicl.training.preparation import prepare_run
from manyicl.training.recipe import make_config
from manyicl.training.recompute import tiles
from manyicl.training.recompute.layers import Recompute, prepared_layers
from manyicl.training.run import train
from tests.parity.test_loss_parity import row
from tests.trajectory.setting import read_metrics, read_weights, write_tasks

# Of the 30 of SmolLM2: what steps and checkpoints do is the same in each.
NUM_LAYERS = 6
pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.fixture(params=["smollm2", "gemma3"])
def base(request) -> Path:
    """Each real base in turn."""
    return request.getfixturevalue(request.param)


def load(base: Path):
    settings = ModelSettings(path=str(base), precision="fp32")
    return load_model(settings).eval(), load_tokenizer(settings)


def plain_episode(tokenizer, num_tokens: int, *, first_paragraph: int) -> TokenizedEpisode:
    """Return prose of which all tokens but the first are targets."""
    ids = np.array(trial_ids(tokenizer, num_tokens, first_paragraph=first_paragraph), dtype=np.int32)
    return TokenizedEpisode(ids, np.array([[1, num_tokens]]))


@torch.no_grad()
def test_packed_is_alone(base):
    """Behind a short episode, and behind one longer than Gemma 3's window of 512; on ordinary text."""
    model, tokenizer = load(base)
    num_long = 560 if base.name.startswith("gemma3") else 120
    short, long = (plain_episode(tokenizer, n, first_paragraph=p) for n, p in ((30, 1), (num_long, 2)))
    query = plain_episode(tokenizer, 40, first_paragraph=5)
    with segment_attention(model):
        logits_NV = target_logits(model, row([short, query, long, query]))
    ids = torch.from_numpy(query.ids.astype(np.int64))
    alone_NV = model(ids[None]).logits[0, :-1]
    for start in (29, 29 + 39 + num_long - 1):
        assert (logits_NV[start : start + 39] - alone_NV).abs().max() <= 1e-4 * alone_NV.abs().max()


def test_the_trial_lets_the_episodes_of_a_row_go_together(smollm2):
    model, tokenizer = load(smollm2)
    assert isolation_fault(model, trial_ids(tokenizer, 200), longest=200) == ""


def test_a_real_layer_has_the_same_gradients_with_its_feed_forward_part_in_tiles(smollm2, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 64)
    model, tokenizer = load(smollm2)
    batch = row([plain_episode(tokenizer, n, first_paragraph=p) for n, p in ((130, 1), (70, 2))])
    found = []
    for in_tiles in (False, True):
        recompute = Recompute(30, keep_attention=False, offload=in_tiles, tiles=in_tiles)
        model.train().zero_grad()
        with segment_attention(model), prepared_layers(model, recompute, compiled=False):
            row_loss(model, batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


def recipe(base: Path, folder: Path, *, lora: bool, **train_settings: object):
    write_tasks(folder)
    values = {
        "tasks": {"folder": str(folder / "tasks")},
        "model": {"path": str(base), "precision": "fp32", "config": {"num_hidden_layers": NUM_LAYERS}},
        "episodes": {"token_budget": 96},
        "train": {
            "num_steps": 1,
            "packs_per_step": 2,
            "pack_tokens": 96,
            "learning_rate": 1e-4,
            "max_grad_norm": 0.0,
            "log_every_steps": 1,
            "checkpoint_every_steps": 2,
            "validation_tokens": 0,
            "keep": "last",
            **train_settings,
        },
        "held_out": {"episodes": 0},
    }
    if lora:
        values["model"] |= {"lora": {"rank": 4, "alpha": 8}}
    return make_config(values, source="test")


def test_one_training_step_equals_a_plain_hugging_face_loop(smollm2, tmp_path):
    """Same loss, same gradient norm, same weights after AdamW's step; the loop knows nothing of packs or targets."""
    config = recipe(smollm2, tmp_path, lora=False, normalization="token")
    train(config, out=tmp_path / "run")
    prepared = prepare_run(config)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, num_hidden_layers=NUM_LAYERS)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    maker = BatchMaker(prepared.tasks)
    batches = [maker.make_batch([pack]) for pack in prepared.packs.packs]
    num_targets = sum(len(batch.target_positions_N) for batch in batches)
    loss = 0.0
    for batch in batches:
        is_target = torch.zeros(batch.num_tokens, dtype=torch.bool)
        is_target[batch.target_positions_N] = True
        for start, stop in zip(batch.segment_bounds_S[:-1], batch.segment_bounds_S[1:], strict=True):
            ids = batch.input_ids_1T[:, start:stop]
            labels = ids.masked_fill(~is_target[None, start:stop], -100)
            share = model(input_ids=ids, labels=labels).loss * (labels != -100).sum() / num_targets
            share.backward()
            loss += share.item()
    gradient = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    optimizer.step()
    logged = read_metrics(tmp_path / "run")[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(gradient, rel=1e-4)
    weights = read_weights(tmp_path / "run")
    for name, tensor in weights.items():
        # Adam's first step is the sign of the gradient: compared by tensor, since an entry that is rounding may turn.
        moved, expected = tensor - before[name], model.state_dict()[name] - before[name]
        assert (moved - expected).norm() <= 2e-2 * expected.norm(), name


def test_a_run_killed_after_its_checkpoint_is_resumed_to_the_bit(smollm2, tmp_path):
    whole = recipe(smollm2, tmp_path, lora=True, num_steps=3, packs_per_step=1)
    train(whole, out=tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill_at_step(number: int):
        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == number:
                    raise KilledError

        return lambda metrics: [Kill()]

    with pytest.raises(KilledError):
        train(whole, out=tmp_path / "killed", callbacks=kill_at_step(2))
    train(whole, out=tmp_path / "killed", resume=True)
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")
    ours, theirs = (read_weights(tmp_path / name) for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["rows"]["episodes"] == "together"


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_a_merged_adapter_gives_the_adapters_logits(base, tmp_path):
    """Also in the bases' own bfloat16 the merged weights are the adapter's, rounded once."""
    settings = ModelSettings(path=str(base), precision="fp32", lora=LoraSettings(rank=4, modules=("q_proj", "lm_head")))
    model, tokenizer = load_model(settings, trainable=True).eval(), load_tokenizer(settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1e-3)
    ids = torch.tensor([trial_ids(tokenizer, 24)])
    with torch.no_grad():
        expected = model(ids).logits
    save_model(model, tokenizer, tmp_path / "adapter", note=ModelNote())
    said = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert said.startswith(f"{tmp_path / 'merged'}: a plain model in bfloat16, as its base, with a head of its own")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = merged(ids).logits
    assert ((logits - expected).square().mean() / expected.var()).sqrt() <= 0.02
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.9
