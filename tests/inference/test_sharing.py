"""Models whose cache cannot be shared are found out, said so once, and answered for rightly all the same."""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GptOssConfig,
    Lfm2Config,
    Mamba2Config,
    Phi3Config,
)

from manyicl.cli.tables.results import evaluation_table
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.answering import answer_draw
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.answering.settings import Decoding
from manyicl.inference.engine import SharedPrefix, WholePrompts, choose_engine
from manyicl.inference.model import InferenceModel, load_for_inference
from manyicl.inference.sharing import sharing_fault
from manyicl.models.isolation import isolation_fault
from tests.conftest import COMMON, CONFIGS, make_task, tiny_model
from tests.parity.test_engine_parity import plain_nll, their_ids
from tests.support.answers import curve_of, engine_of

HYBRID = {**COMMON, "num_hidden_layers": 4}
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
UNSHARED = {
    # convolutions between its attention layers
    "lfm2": lambda: Lfm2Config(**HYBRID, layer_types=["conv", "full_attention"] * 2),
    # a state instead of keys and values
    "mamba2": lambda: Mamba2Config(
        vocab_size=400, hidden_size=32, state_size=16, num_heads=4, head_dim=16, num_hidden_layers=2, n_groups=1
    ),
    "bloom": lambda: BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2),
    "gpt-oss": lambda: GptOssConfig(**COMMON, num_local_experts=2, num_experts_per_tok=1),
    "longrope": lambda: Phi3Config(**COMMON, original_max_position_embeddings=128, rope_parameters=ROPE),
}
WHY = {
    "lfm2": "gives other likelihoods behind a shared prefix",
    "mamba2": "keeps a state besides keys and values",
    "bloom": "does not take its attention from outside",
    "gpt-oss": "attention sinks",
    "longrope": "turns its positions by the length of the whole sequence",
}


def unshared_model(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNSHARED[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_class_of_ours_shares_in_fp32_and_bf16(name):
    assert sharing_fault(tiny_model(name)) == ""
    assert sharing_fault(tiny_model(name).bfloat16()) == ""


@pytest.mark.parametrize("name", sorted(UNSHARED))
def test_a_model_that_cannot_share_says_why_and_only_once(name):
    model = unshared_model(name)
    own = model.config._attn_implementation
    with pytest.warns(UserWarning, match=f"{type(model).__name__} .*{WHY[name]}.*plain path"):
        assert re.search(WHY[name], sharing_fault(model))
    assert model.config._attn_implementation == own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(choose_engine(asked_model(model, None)), WholePrompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "mamba2"])
def test_the_plain_path_scores_and_generates_as_transformers_does(name, tokenizers):
    model, rng = unshared_model(name), np.random.default_rng(0)
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    with pytest.warns(UserWarning, match="plain path"):
        engine = engine_of(model, tokenizer)
    prefix = engine.encode(rng.integers(3, 390, 20).astype(np.int32))
    assert (prefix.num_tokens, engine.count.num_prefix_tokens) == (20, 0)
    queries = [rng.integers(3, 390, n).astype(np.int32) for n in (3, 7, 7)]
    options = [[[5, 6], [5], [8, 9, 7]]] * 3
    nats = engine.score(prefix, queries, options)
    for query, nats_O in zip(queries, nats, strict=True):
        plain = [plain_nll(model, [*prefix.ids, *query, *o], num_answer=len(o)) for o in options[0]]
        assert nats_O == pytest.approx(plain, abs=1e-4)
    assert engine.count.num_prefix_tokens == 9 * 20  # the shots of every option of every query
    answers = engine.generate(prefix, queries, limits=[8, 8, 8], references=[[5, 6]] * 3)
    assert [a.reference_nll for a in answers] == pytest.approx([nats_O[0] for nats_O in nats], abs=1e-5)
    assert [a.text for a in engine.generate(prefix, queries[1:], limits=[3, 8])][1] == answers[2].text
    for query, answer in zip(queries, answers, strict=True):
        text = tokenizer.decode(their_ids(model, np.concatenate([prefix.ids, query]), max_new_tokens=8))
        assert text.startswith(answer.text)
        assert answer.cut == ("</s>" not in text and "\n\n" not in text)


def test_an_answer_of_the_plain_path_counts_its_own_tokens_not_those_of_its_batch(tokenizers):
    """transformers pads the answers of a batch to the longest, and the padding was counted as generated."""
    model, rng = unshared_model("bloom"), np.random.default_rng(0)
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    with pytest.warns(UserWarning, match="plain path"):
        engine = engine_of(model, tokenizer)
    prefix = engine.encode(rng.integers(3, 390, 20).astype(np.int32))
    queries = [rng.integers(3, 390, 5).astype(np.int32) for _ in range(3)]
    (first, *_) = engine.generate(prefix, queries[:1], limits=[6])
    early = Decoding(stop=(first.text[:1],))  # the first answer ends at its first letter, the others go on
    before = engine.count.num_query_tokens
    answers = engine.generate(prefix, queries, limits=[6] * 3, decodings=[early, Decoding(), Decoding()])
    assert [one.num_tokens for one in answers] == [1, 6, 6]
    assert engine.count.num_query_tokens - before == 3 * 5 + 0 + 5 + 5


def fill_gpu(*_):
    raise RuntimeError("CUDA error: out of memory")


def test_a_gpu_that_others_have_filled_is_no_fault_of_the_model():
    """It was asked by the plain path from then on, or refused as one that cannot run."""
    model = tiny_model("llama")
    model.register_forward_pre_hook(fill_gpu)
    for find_fault in (sharing_fault, lambda model: isolation_fault(model, range(400), longest=100)):
        with pytest.raises(RuntimeError, match="out of memory"):
            find_fault(model)


@pytest.mark.slow
def test_a_sweep_of_a_model_that_cannot_share_is_whole_and_counts_no_tokens_as_encoded_once(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    sweep = Sweep(shots=(0, 2), num_draws=1, num_queries=3, max_tokens=200)
    with pytest.warns(UserWarning, match="plain path"):
        plain = curve_of(unshared_model("lfm2"), task, tokenizer=tokenizer, sweep=sweep)
    shared = curve_of(tiny_model("llama"), task, tokenizer=tokenizer, sweep=sweep)
    assert [cell.num_scored for cell in plain.points] == [3, 3]
    assert plain.num_encoded_tokens is None
    assert shared.num_encoded_tokens > len(task.head_ids)
    assert shared.plain_path is None


def asked_model(model, tokenizer):
    return InferenceModel("tiny", model, tokenizer, max_tokens=200, trained_shots={})


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "choose"), [(True, "random"), (False, "random"), (True, "nearest")])
def test_the_plain_path_tells_how_many_times_as_many_tokens_it_processes(tokenizers, tmp_path, labels, choose):
    """Issue 16, fault 1: what is told are the tokens that the engine counts when it takes one path and the other."""
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    task = (
        make_task("animals") if labels else replace(make_task("animals"), family="qa", metric="exact_match", labels=())
    )
    sweep = Sweep(shots=(0, 2), num_draws=2, num_queries=3, max_tokens=200, choose=choose, num_nearest=1)
    plans, counts = {}, {}
    for name, model in (("shared", tiny_model("llama")), ("plain", unshared_model("bloom"))):
        plans[name] = TaskSweep(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer, sweep=sweep)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = engine_of(model, tokenizer)
            for draw in range(2):
                list(answer_draw(engine, plans[name], draw=draw))
        assert isinstance(engine, {"shared": SharedPrefix, "plain": WholePrompts}[name])
        counts[name] = engine.count.num_prefix_tokens + engine.count.num_query_tokens
    path = plans["plain"].plain_path()
    # The engine also counts what it generates, which is in neither number: 3 cells of 3 queries.
    most_generated = 0 if labels else 3 * 3 * plans["shared"].max_new_tokens
    assert 0 <= counts["plain"] - path.processed_tokens <= most_generated
    assert 0 <= counts["shared"] - path.shared_tokens <= most_generated
    assert path.processed_tokens > 2 * path.shared_tokens

    asked = asked_model(unshared_model("bloom"), tokenizer)
    options = {"shots": (0, 2), "draws": 2, "queries": 3, "choose": choose, "num_nearest": 1}
    with pytest.warns(UserWarning, match="plain path"):
        found = evaluate(asked, [task], **options, out=tmp_path / "plain.json")
    assert found.plain_path == path
    entry = json.loads((tmp_path / "plain.json").read_text())
    assert entry["sharing_fault"] == "does not take its attention from outside"
    assert entry["tasks"][0]["plain_path"] == asdict(path)
    terminal = Console(width=400, record=True, file=io.StringIO())
    terminal.print(evaluation_table(found))
    assert (
        "every prompt was processed as a whole because the model does not take its attention from outside:"
        f" {path.processed_tokens:,} tokens, {path.processed_tokens / path.shared_tokens:,.1f} times the"
        f" {path.shared_tokens:,} of shared shots"
    ) in terminal.export_text()


def test_a_model_whose_tokens_see_those_after_them_is_refused_when_it_is_loaded_to_be_asked(tokenizers, tmp_path):
    """B10: such a model fails every trial, and its whole prompts would show it the answers."""
    config = BertConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path)
    tokenizers["bpe"].save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="plain path"),
        pytest.raises(UserError, match="a token of this bert model sees the tokens after it") as raised,
    ):
        load_for_inference(str(tmp_path), precision="fp32")
    assert "\n" not in str(raised.value)
