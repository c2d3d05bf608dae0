"""Rows padded to one shape keep their loss; when a pass becomes a CUDA graph. The graphs themselves: tests/gpu."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from manyicl.episodes.batch import pad_row
from manyicl.errors import UserError
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import row_loss
from manyicl.training import trainer
from manyicl.training.arguments import check_recipe
from manyicl.training.graph import GraphedPass, choose_graph, find_obstacle, padded_row, shape_of
from manyicl.training.recompute.layers import Recompute
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.conftest import CONFIGS, tiny_model
from tests.parity.test_loss_parity import random_episode, row
from tests.trajectory.setting import write_setting

SHORT = row([random_episode([(5, 2)] * n, seed=n) for n in (3, 1, 6)])
LONG = row([random_episode([(5, 2)] * n, seed=n) for n in (9, 2, 1, 1)])
ONE = row([random_episode([(5, 2)] * 9, seed=4)])


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize(
    ("batch", "other", "num_tokens"),
    [
        (SHORT, LONG, 120),
        (LONG, SHORT, 100),
        (SHORT, SHORT, 73),
        (ONE, ONE, 80),
        (pad_row(SHORT, multiple=8), LONG, 96),
    ],
    ids=["smaller than another", "larger", "of full length", "one episode", "padded before"],
)
def test_a_padded_row_has_the_loss_and_the_gradients_of_the_row(name, batch, other, num_tokens):
    model = tiny_model(name)
    shape = shape_of(batch.counts, num_tokens=num_tokens).joined(shape_of(other.counts, num_tokens=num_tokens))
    padded = padded_row(batch, shape)
    found = []
    for one in (batch, padded):
        model.zero_grad()
        with segment_attention(model):
            scored = row_loss(model, one)
            scored.loss.backward()
        found.append((scored, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (scored, same) = found
    num_answers = len(batch.answer_shots_A)
    assert padded.num_tokens == num_tokens
    assert len(padded.answer_shots_A) > num_answers
    assert scored.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert scored.nll_A[:num_answers].tolist() == pytest.approx(expected.nll_A.tolist(), rel=1e-5)
    assert scored.num_tokens_A[:num_answers].tolist() == expected.num_tokens_A.tolist()
    assert scored.correct_A[:num_answers].tolist() == expected.correct_A.tolist()
    for key, gradient in gradients.items():
        assert (same[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


def test_shapes_grow_with_the_rows_and_seldom():
    small, large = (shape_of(batch.counts, num_tokens=100) for batch in (SHORT, LONG))
    assert (small.longest, large.longest) == (64, 64)  # of 43 and 64 tokens; 100 - 73 and 100 - 95 are padding
    assert (small.num_targets, large.num_targets) == (20, 28)  # of 20 and 26
    both = small.joined(large)
    assert both == large.joined(small) == both.joined(small)
    assert both.num_targets == 28
    # Of 1 to 4,096 targets, there are so many shapes at most that a run captures.
    sizes = {
        shape_of(row([random_episode([(1, 1)] * n, seed=0)]).counts, num_tokens=9000).num_targets for n in range(1, 400)
    }
    assert len(sizes) < 40


def test_padding_that_is_longer_than_any_episode_counts_as_the_longest():
    assert shape_of(SHORT.counts, num_tokens=1000).longest == 1024  # 927 tokens of padding
    assert shape_of(ONE.counts, num_tokens=1000).longest == 1024
    assert shape_of(ONE.counts, num_tokens=1000).is_one
    assert not shape_of(SHORT.counts, num_tokens=1000).is_one


@pytest.mark.parametrize(
    ("setting", "obstacle", "pass_flops", "chosen", "reason"),
    [
        ("auto", "", 2e13, True, "a pass has 2e+13 FLOPs, and the GPU would wait"),
        ("auto", "", 2e14, False, "a pass has 2e+14 FLOPs, which keep a GPU at work"),
        ("auto", "", None, False, "FLOPs are not known"),
        ("auto", "there is dropout", 2e13, False, "there is dropout"),
        (True, "", 2e14, True, "the recipe says so"),
        (False, "", 2e13, False, "the recipe says so"),
        (False, "there is dropout", 2e13, False, "the recipe says so"),
    ],
)
def test_a_graph_is_for_passes_that_wait_for_python(setting, obstacle, pass_flops, chosen, reason):
    found, why = choose_graph(setting, obstacle=obstacle, pass_flops=pass_flops)
    assert found is chosen
    assert reason in why


def test_a_graph_that_cannot_be_is_refused_if_the_recipe_asks_for_it():
    with pytest.raises(UserError, match=r"train\.cuda_graph = true: there is dropout; set it to 'auto' or false"):
        choose_graph(True, obstacle="there is dropout", pass_flops=2e13)


def test_what_stands_in_the_way_of_a_graph(monkeypatch):
    model = tiny_model("llama")
    common = {"fault": "", "is_wrapped": False, "recompute": Recompute(0), "is_half": True, "quantize": None}
    assert find_obstacle(model, **common) == "there is no GPU"
    monkeypatch.setattr("manyicl.training.graph.device_of", lambda _: type("Device", (), {"type": "cuda"}))
    dropping = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    assert find_obstacle(model, **common) == ""
    assert find_obstacle(dropping, **common) == "there is dropout"
    assert find_obstacle(tiny_model("gemma2"), **common) == "models of type gemma2 were not tried"
    stretching = tiny_model("llama")
    stretching.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert find_obstacle(stretching, **common) == "the host waits for the longest position (rope_type 'dynamic')"
    own_code = tiny_model("llama")
    own_code.__class__ = type("OwnLlama", (type(own_code),), {"__module__": "transformers_modules.somebody"})
    assert find_obstacle(own_code, **common) == "OwnLlama is not transformers' own code, and was not tried"
    odd = tiny_model("llama")
    odd.config.head_dim = 100  # Open LLaMA 3B's
    assert find_obstacle(odd, **common) == "attention goes segment by segment (heads of 100)"
    for change, reason in (
        ({"is_wrapped": True}, "the model is in DDP or FSDP"),
        ({"fault": "mixes tokens"}, "each episode goes through the model alone"),
        ({"is_half": False}, "products are in float32, whose attention goes segment by segment"),
        ({"quantize": "nf4"}, "the base is kept in nf4"),
        ({"recompute": Recompute(1)}, "layers are recomputed"),
    ):
        assert find_obstacle(model, **{**common, **change}) == reason


def test_a_graph_of_a_class_that_has_none_is_refused_by_its_config_before_anything_is_loaded(tmp_path, monkeypatch):
    """It was refused after the model was loaded, and the run's folder had been made."""
    setting = write_setting(tmp_path)
    CONFIGS["gemma2"]().save_pretrained(tmp_path / "gemma2")  # without weights or a tokenizer
    model = setting.model.model_copy(update={"path": str(tmp_path / "gemma2"), "precision": "bf16"})
    config = setting.model_copy(update={"model": model})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_recipe(config)  # "auto" goes without
    config = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": True})})
    with pytest.raises(UserError, match=r"^train\.cuda_graph = true: models of type gemma2 were not tried; set it to"):
        check_recipe(config)


class PythonGraph:
    """Stands in for a CUDA graph: launched, it calls what was captured, and writes to the same places."""

    def replay(self):
        again = self.run(self.row)
        for name in ("loss", "nll_A", "num_tokens_A", "correct_A"):
            getattr(self.scored, name).copy_(getattr(again, name))

    def pool(self):
        return None


class Stream:
    def wait_stream(self, other):
        pass


def stand_in_for_cuda(monkeypatch, capture):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PythonGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("is_planned", [False, True])
def test_gradients_add_up_over_a_step_whatever_is_captured_in_the_middle_of_it(is_planned, monkeypatch):
    """A capture itself runs nothing, so it leaves gradients as they are. Rows known ahead are captured once."""
    model, captures, open_captures = tiny_model("llama"), [], []

    def run(batch):
        bounds = batch.segment_bounds_S.tolist()  # a GPU reads these in place of the lengths
        lengths = tuple(stop - start for start, stop in pairwise(bounds) if stop > start)
        scored = row_loss(model, replace(batch, segment_lengths=lengths))
        scored.loss.backward()
        scored = replace(scored, loss=scored.loss.detach())
        for graph in open_captures:
            graph.run, graph.row, graph.scored = run, batch, scored
        return scored

    @contextmanager
    def capture(graph, **_):
        before = [p.grad.clone() for p in model.parameters()]
        captures.append(graph)
        open_captures.append(graph)
        yield
        open_captures.clear()
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad.copy_(gradient)

    stand_in_for_cuda(monkeypatch, capture)

    def take_gradients():
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return found

    larger = row([random_episode([(5, 2)] * n, seed=n) for n in (9, 3, 2, 1, 1)])
    # Captured are the first, the second, which is of one segment, and the larger one in the middle of the second step.
    steps = [[SHORT, ONE, SHORT], [ONE, larger, SHORT], [SHORT]]
    with segment_attention(model):
        expected = [([run(batch).nll_A.tolist() for batch in step], take_gradients()) for step in steps]
        rows = [batch.counts for step in steps for batch in step] if is_planned else []
        graphed = GraphedPass(run, model.parameters(), num_tokens=160, rows=rows)
        found = [([graphed(batch).nll_A.tolist() for batch in step], take_gradients()) for step in steps]
    assert len(captures) == (2 if is_planned else 3)
    for (losses, gradients), (right, right_gradients) in zip(found, expected, strict=True):
        for one, other in zip(losses, right, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        for gradient, other in zip(gradients, right_gradients, strict=True):
            assert (gradient - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.slow
def test_a_run_knows_its_rows_before_they_are_made_also_if_it_is_resumed(tmp_path, monkeypatch):
    """A resumed run padded its rows to the largest since, which rounds otherwise."""
    planned, made = [], []

    class Plain:
        def __init__(self, run, parameters, *, num_tokens, rows):
            self.run, self.num_tokens = run, num_tokens
            planned.append(list(rows))

        def __call__(self, batch):
            made.append(batch.counts)
            return self.run(batch)

    monkeypatch.setattr(trainer, "find_obstacle", lambda *_, **__: "")
    monkeypatch.setattr(trainer, "GraphedPass", Plain)
    config = write_setting(tmp_path, num_steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "run", callbacks=lambda _: [StopAfter(3)])
    train(config, out=tmp_path / "run", resume=True)
    assert len(planned[0]) == 4 * 4  # rows of two of eight packs in each step
    assert planned[0] == planned[1]
    assert made == [*planned[0][:12], *planned[0][8:]]  # the last checkpoint was that of the second step
    assert len(set(made)) > 8


class StopAfter(TrainerCallback):
    """Stops a run at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError("CUDA out of memory")),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), RuntimeError("CUDA error: out of memory")),
        (
            RuntimeError("not permitted when stream is capturing\nCUDA kernel errors might be"),
            UserError("not permitted when stream is capturing.; set train.cuda_graph = false"),
        ),
    ],
    ids=["memory", "memory of CUDA", "a wait"],
)
def test_a_capture_that_fails_says_why_although_its_end_fails_too(cause, error, monkeypatch):
    """torch.cuda.graph ends the capture on its way out, and raises what CUDA says of that."""
    model, is_captured = tiny_model("llama"), []

    def run(batch):
        if is_captured:
            raise cause
        scored = row_loss(model, replace(batch, segment_lengths=(*SHORT.segment_lengths, 7)))
        scored.loss.backward()
        return replace(scored, loss=scored.loss.detach())

    @contextmanager
    def capture(graph, **_):
        is_captured.append(graph)
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    stand_in_for_cuda(monkeypatch, capture)
    graphed = GraphedPass(run, model.parameters(), num_tokens=80)
    with segment_attention(model), pytest.raises(type(error), match=str(error)):
        graphed(SHORT)


def test_a_run_on_a_cpu_says_that_it_has_no_graph_and_refuses_to_be_made_one(tmp_path):
    config = write_setting(tmp_path, num_steps=1)
    train(config, out=tmp_path / "run")
    state = RunFolder(tmp_path / "run").read_state()
    assert (state.cuda_graph, state.cuda_graph_reason) == (False, "there is no GPU")
    asked = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": True})})
    prepared: list[object] = []
    with pytest.raises(UserError, match=r"train\.cuda_graph = true: there is no GPU; set it to 'auto' or false"):
        train(asked, out=tmp_path / "other", on_prepared=prepared.append)
    assert not prepared  # nor is a model loaded
    assert not (tmp_path / "other").exists()  # so that the name is free for the run that is meant
    with pytest.raises(UserError, match=r"train\.cuda_graph = true: there is no GPU"):
        train(asked, out=tmp_path / "run", resume=True)  # though it has no step left
