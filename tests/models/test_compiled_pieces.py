"""Compiled pieces: the same likelihoods as without them, only in the block, and none where a model is not known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation import loop
from manyicl.inference.answering.questions import ask
from manyicl.inference.model import InferenceModel, load_for_inference
from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.models.attention import dispatch
from manyicl.models.compiled_pieces import PIECES, fused_pieces
from tests.conftest import make_task, tiny_model

KNOWN = ["llama", "mistral", "mistral-sliding", "qwen3"]
OPTIONS = [[7, 8, 9], [7, 8], [7, 11, 12, 2], [13], [7, 8]]  # share beginnings, begin one another, repeat


def replaced() -> list[object]:
    """Return all that a block may replace."""
    norms = [modeling_llama.LlamaRMSNorm, modeling_mistral.MistralRMSNorm, modeling_qwen3.Qwen3RMSNorm]
    gates = [modeling_llama.LlamaMLP, modeling_mistral.MistralMLP, modeling_qwen3.Qwen3MLP]
    turned = [m.apply_rotary_pos_emb for m in (modeling_llama, modeling_mistral, modeling_qwen3)]
    return [dispatch.current_merge(), *(kind.forward for kind in (*norms, *gates)), *turned]


def nats_behind(model, *, num_prefix: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    before, *queries = (rng.integers(3, 390, n).astype(np.int32) for n in (num_prefix, 1, 6, 6, 24))
    return np.array(score_choices(model, encode_prefix(model, before), queries, [OPTIONS] * 4))


@pytest.fixture
def uncompiled(monkeypatch):
    """Let the pieces run as plain functions, and note which would have been compiled."""
    asked: list[str] = []

    def note(function, *, dynamic, backend):
        asked.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("names", [*((name,) for name in PIECES), PIECES], ids="+".join)
@pytest.mark.parametrize("name", KNOWN)
def test_likelihoods_are_those_of_the_model_as_it_is(name, names, uncompiled):
    model, before = tiny_model(name), replaced()
    expected = nats_behind(model)
    with fused_pieces(model, names):
        changed = sum(one is not other for one, other in zip(replaced(), before, strict=True))
        nats = nats_behind(model)
    assert changed == len(names)
    assert replaced() == before
    assert nats == pytest.approx(expected, abs=1e-5)
    assert nats_behind(model).tolist() == expected.tolist()


def test_each_piece_is_run(uncompiled, monkeypatch):
    """With its formula wrong, each piece changes the likelihoods."""
    from manyicl.models import compiled_pieces

    model = tiny_model("llama")
    expected = nats_behind(model)
    wrong = {
        "merge": ("merged_for_projection", lambda parts: parts[0][0]),
        "norm": ("normed", lambda self, x: x),
        "rotary": ("rotated_by_head", lambda q, k, cos, sin: (q, k)),
        "gate": ("gated", lambda gate, up: up),
    }
    for name, (function, formula) in wrong.items():
        formula.__name__ = name
        monkeypatch.setattr(compiled_pieces, function, formula)
        with fused_pieces(model, (name,)):
            assert np.abs(nats_behind(model) - expected).max() > 1e-3, name


@pytest.mark.slow
def test_traced_by_the_compiler_they_give_the_same():
    model = tiny_model("qwen3")
    expected = nats_behind(model)
    with fused_pieces(model, backend="eager"):
        assert nats_behind(model) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_keeps_its_part(uncompiled):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = nats_behind(tiny_model("mistral"))
    model = get_peft_model(tiny_model("mistral"), config).eval()
    expected = nats_behind(model)
    assert np.abs(expected - plain).max() > 1e-2
    with fused_pieces(model):
        assert nats_behind(model) == pytest.approx(expected, abs=1e-5)


def test_everything_returns_where_the_block_fails(uncompiled):
    before = replaced()
    with pytest.raises(RuntimeError, match="halfway"), fused_pieces(tiny_model("llama")):
        raise RuntimeError("halfway")
    assert replaced() == before


def test_an_unknown_class_is_left_as_it_is_with_one_warning(uncompiled):
    model, before = tiny_model("gemma2"), replaced()
    with (
        pytest.warns(UserWarning, match=r"^Gemma2ForCausalLM: merge, norm, rotary, gate run uncompiled") as told,
        fused_pieces(model),
    ):
        assert replaced() == before
    assert len(told) == 1
    assert uncompiled == []


def test_another_activation_leaves_the_gate_alone(uncompiled):
    model, gate = tiny_model("llama"), modeling_llama.LlamaMLP.forward
    model.config.hidden_act = "gelu"
    told = r"^LlamaForCausalLM: gate run uncompiled \(its activation is gelu\)"
    block = fused_pieces(model)
    with pytest.warns(UserWarning, match=told):
        block.__enter__()
    assert modeling_llama.LlamaMLP.forward is gate
    assert dispatch.current_merge().__name__ == "merged_for_projection"
    block.__exit__(None, None, None)


def test_without_a_gpu_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^`compiled`: works on a GPU only.*; leave it out$"):
        load_for_inference("seed", compiled=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_a_model_that_is_to_be_compiled_is_asked_so(compiled, tokenizers, uncompiled, tmp_path):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    asked = InferenceModel("here", tiny_model("llama"), tokenizer, 400, trained_shots={}, compiled=compiled)
    task = make_task("animals")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = ask(asked, task, ["the red fox 3"], shots=2)
        loop.evaluate(asked, [task], shots=(0, 2), draws=1, queries=2)
        loop.one_pass_curve(asked, [task], episodes=1, token_budget=100)
    assert len(answers) == 1
    assert uncompiled == (["merged_for_projection", "rotated_by_head", "gated"] * 3 if compiled else [])
