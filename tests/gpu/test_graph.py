"""A pass as a CUDA graph gives what the pass itself gives, for rows of any size, and whole runs go the same way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from manyicl.episodes.batch import pad_row
from manyicl.models import loss as losses
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import row_loss
from manyicl.training.graph import GRAPHED, GraphedPass
from manyicl.training.recompute.layers import Recompute, prepared_layers, unwidened_inputs
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.conftest import CONFIGS, tiny_model
from tests.parity.test_loss_parity import random_episode, row
from tests.trajectory.setting import read_metrics, write_setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CLASSES = [name for name in sorted(CONFIGS) if CONFIGS[name]().model_type in GRAPHED]
# The second and the sixth are larger than any before; rows of one episode have a graph of their own.
ROWS = [(3, 1), (6, 2, 1), (9,), (3, 1), (4,), (2, 2, 2, 2, 2, 2, 2, 2, 2), (9,), (3, 1)]
NUM_TOKENS = 160


def pass_of(model):
    """Return forward and backward of a row, as a graph holds them."""

    def run(batch):
        with torch.autocast("cuda", torch.bfloat16):
            scored = row_loss(model, batch)
        scored.loss.backward()
        return replace(scored, loss=scored.loss.detach())

    return run


def make_batches(counts=ROWS, *, multiple=1):
    rows = [row([random_episode([(5, 2)] * n, seed=n) for n in one]) for one in counts]
    return [(pad_row(one, multiple=multiple) if multiple > 1 else one).to("cuda") for one in rows]


@pytest.mark.parametrize(
    ("name", "lora", "compiled"),
    [
        *((name, lora, False) for name in CLASSES for lora in (False, True)),
        ("llama", False, True),
        ("llama", True, True),
        ("gemma3", True, True),
    ],
)
def test_a_graph_gives_the_losses_and_gradients_of_the_pass(name, lora, compiled, monkeypatch):
    monkeypatch.setitem(losses.MOST_LOGITS, "cuda", 390 * 20)  # so that the largest row's head goes in chunks
    model = tiny_model(name).to("cuda")
    if lora:
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
        )
    model.train()

    run = pass_of(model)

    def take_gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    # Layers are compiled for each length anew: as in a run, their rows have one.
    batches = make_batches([(3, 1), (9,), (6, 2, 1)], multiple=NUM_TOKENS) if compiled else make_batches()
    with (
        segment_attention(model),
        prepared_layers(model, Recompute(0), compiled=compiled),
        unwidened_inputs(model, autocast=True),
    ):
        expected = [(run(batch), take_gradients()) for batch in batches]
        graphed = GraphedPass(run, model.parameters(), num_tokens=NUM_TOKENS)
        found = [(graphed(batch), take_gradients()) for batch in batches]
        for batch in batches[:3]:  # a step of three rows
            run(batch)
        expected_step = take_gradients()
        for batch in batches[:3]:
            graphed(batch)
        found_step = take_gradients()
    assert sorted(graphed.graphs) == [False, True]
    for (scored, gradients), (right, right_gradients) in zip(found, expected, strict=True):
        assert scored.loss.item() == pytest.approx(right.loss.item(), rel=2e-2)
        assert scored.nll_A.tolist() == pytest.approx(right.nll_A.tolist(), rel=5e-2, abs=5e-2)
        assert scored.num_tokens_A.tolist() == right.num_tokens_A.tolist()
        assert_near(gradients, right_gradients)
    assert_near(found_step, expected_step)


def assert_near(gradients, expected):
    assert gradients.keys() == expected.keys()
    for key, right in expected.items():
        assert (gradients[key] - right).norm() <= 0.05 * right.norm() + 1e-6, key


class KilledError(Exception):
    """What ends a run in the middle."""


class KillAfter(TrainerCallback):
    """Ends a run after a step, as a kill would."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3:
            raise KilledError


@pytest.mark.parametrize(("lora", "compiled"), [(False, False), (True, False), (True, True)])
def test_a_run_with_a_graph_goes_as_one_without_also_if_it_is_killed_and_resumed(tmp_path, lora, compiled):
    def course_of(name, **graph):
        config = write_setting(tmp_path, lora=lora, compile=compiled, recompute="none", num_steps=6, **graph)
        config = config.model_copy(update={"model": config.model.model_copy(update={"precision": "bf16"})})
        if name == "killed":
            with pytest.raises(KilledError):
                train(config, out=tmp_path / name, callbacks=lambda _: [KillAfter()])
        train(config, out=tmp_path / name, resume=name == "killed")
        records = [record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record]
        assert len(records) == 6
        return records, RunFolder(tmp_path / name).read_state()

    plain, state = course_of("plain", cuda_graph=False)
    assert state.cuda_graph is False
    assert plain[-1] < plain[0]
    for name, graph in (("auto", {}), ("on", {"cuda_graph": True}), ("workers", {"num_workers": 1}), ("killed", {})):
        losses_of, state = course_of(name, **graph)
        assert state.cuda_graph is True, state.cuda_graph_reason
        assert losses_of == pytest.approx(plain, rel=5e-2), name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_rows_of_a_graph_start_without_a_wait_for_the_gpu():
    """In this mode torch refuses to wait."""
    model = tiny_model("llama").to("cuda").train()

    run = pass_of(model)

    batches = make_batches()
    with segment_attention(model), prepared_layers(model, Recompute(0), compiled=False):
        graphed = GraphedPass(run, model.parameters(), num_tokens=NUM_TOKENS)
        for batch in batches:
            graphed(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                graphed(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
