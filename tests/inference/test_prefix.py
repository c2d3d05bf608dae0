"""A prefix is encoded once and never written to or copied again; memory that runs out costs nothing but time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import manyicl.inference.prefix
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.prefix import (
    EMPTY_PREFIX,
    EngineCount,
    encode_prefix,
    score_choices,
)
from tests.conftest import CONFIGS, tiny_model, train_tokenizer
from tests.parity.test_engine_parity import plain_nll
from tests.support.answers import answer_nats, engine_of

CLASSES = sorted(CONFIGS)


def some_ids(num: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 390, num).astype(np.int32)


def run_out_of_memory(model, *, above: int) -> list[int]:
    """Let the model raise where a row has more tokens than `above`; return the list of the rows' tokens."""
    rows: list[int] = []

    def refuse(module, args, kwargs):
        rows.append(kwargs["input_ids"].shape[1])
        if rows[-1] > above:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return rows


def test_nested_prefixes_share_their_tensors_and_encode_each_token_once():
    model, ids, count = tiny_model("llama"), some_ids(60), EngineCount()
    first = encode_prefix(model, ids[:20], room=60, count=count)
    before = first.layer(0)[0].clone()
    second = encode_prefix(model, ids[20:60], after=first, count=count)
    assert second.layer(0)[0].data_ptr() == first.layer(0)[0].data_ptr()
    assert (first.num_tokens, second.num_tokens) == (20, 60)
    assert first.layer(0)[0].shape == (1, 2, 20, 8)
    assert torch.equal(first.layer(0)[0], before)
    assert count.num_prefix_tokens == 60
    assert encode_prefix(model, ids[:0], after=second) is second


def test_a_prefix_without_room_grows_by_doubling():
    model, ids = tiny_model("llama"), some_ids(300)
    prefix, places = EMPTY_PREFIX, set()
    for start in range(0, 300, 10):
        prefix = encode_prefix(model, ids[start : start + 10], after=prefix)
        places.add(prefix.layer(0)[0].data_ptr())
    assert len(places) <= 6  # 10, 20, 40, 80, 160 and 320 tokens
    whole = encode_prefix(model, ids)
    for layer in range(3):
        for grown, direct in zip(prefix.layer(layer), whole.layer(layer), strict=True):
            assert torch.allclose(grown, direct, atol=1e-5)


def test_a_prefix_that_is_extended_twice_is_not_overwritten():
    model, ids = tiny_model("llama"), some_ids(60)
    trunk = encode_prefix(model, ids[:20])
    left = encode_prefix(model, ids[20:40], after=trunk)
    kept = left.layer(1)[1].clone()
    right = encode_prefix(model, ids[40:60], after=trunk)
    assert torch.equal(left.layer(1)[1], kept)
    query = [(some_ids(4), [5, 6])]
    for prefix in (left, right):
        nll = answer_nats(model, prefix, query)
        assert nll[0] == pytest.approx(plain_nll(model, [*prefix.ids, *query[0][0], 5, 6], num_answer=2), abs=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_no_forward_writes_to_a_prefix_or_moves_it(name):
    model = tiny_model(name)
    prefix = encode_prefix(model, some_ids(40))
    before = {layer: [x.clone() for x in prefix.layer(layer)] for layer in range(3)}
    places = [x.data_ptr() for layer in range(3) for x in prefix.layer(layer)]
    score_choices(model, prefix, [some_ids(5), some_ids(9)], [[[3, 4], [3, 5]]] * 2)
    assert [x.data_ptr() for layer in range(3) for x in prefix.layer(layer)] == places
    assert all(torch.equal(a, b) for layer in range(3) for a, b in zip(prefix.layer(layer), before[layer], strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_a_prefix_encoded_in_chunks_equals_one_encoded_at_once(name, monkeypatch):
    model, ids = tiny_model(name), some_ids(90)
    whole = encode_prefix(model, ids)
    monkeypatch.setattr(manyicl.inference.prefix, "CHUNK_TOKENS", 23)  # longer and shorter than the windows of 16
    chunked = encode_prefix(model, ids)
    for layer in range(3):
        for a, b in zip(whole.layer(layer), chunked.layer(layer), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_many_labels_run_few_tokens_and_their_last_tokens_never():
    model, count = tiny_model("llama"), EngineCount()
    labels = [[7, 8, number, 2] for number in range(100, 177)]  # 77 labels that part in their third token
    nats = score_choices(model, EMPTY_PREFIX, [some_ids(10)], [labels], count=count)
    assert nats[0].shape == (77,)
    assert count.num_query_tokens == 10 + 2 + 77


def test_a_query_without_ids_is_an_error():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no ids"):
        score_choices(model, EMPTY_PREFIX, [some_ids(0)], [[[5]]])
    with pytest.raises(ValueError, match="at least one"):
        score_choices(model, EMPTY_PREFIX, [some_ids(3)], [[]])
    assert score_choices(model, EMPTY_PREFIX, [], []) == []


def test_out_of_memory_halves_rows_and_changes_no_score():
    model = tiny_model("llama")
    ids, queries = some_ids(200), [some_ids(5 + n, seed=n) for n in range(20)]
    prefix = encode_prefix(model, ids)
    expected = score_choices(model, prefix, queries, [[[3, 4], [5]]] * 20)
    rows = run_out_of_memory(model, above=60)
    count = EngineCount()
    halved = encode_prefix(model, ids, count=count)
    assert rows == [200, 100, 50, 50, 50, 50]
    assert count.num_prefix_tokens == 200
    nats = score_choices(model, halved, queries, [[[3, 4], [5]]] * 20, count=count)
    assert np.concatenate(nats) == pytest.approx(np.concatenate(expected), abs=1e-4)
    assert count.num_query_tokens == sum(len(query) + 1 for query in queries)


def test_a_query_that_never_fits_is_one_line():
    model = tiny_model("llama")
    prefix = encode_prefix(model, some_ids(10))
    run_out_of_memory(model, above=2)
    with pytest.raises(UserError, match="out of memory with one query at a time"):
        answer_nats(model, prefix, [(some_ids(5), [3])] * 2)
    with pytest.raises(UserError, match="out of memory at 10 tokens of shots"):
        encode_prefix(model, some_ids(9), after=prefix)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "llama"])
def test_lora_unmerged_and_merged_score_alike(name):
    base = tiny_model(name)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    asked = [(some_ids(6, seed=n), [3, 4 + n]) for n in range(3)]
    unmerged = answer_nats(model, encode_prefix(model, some_ids(30)), asked)
    with model.disable_adapter():
        without = answer_nats(model, encode_prefix(model, some_ids(30)), asked)
    merged = model.merge_and_unload()
    nll = answer_nats(merged, encode_prefix(merged, some_ids(30)), asked)
    plain = [plain_nll(merged, [*some_ids(30), *query, *answer], num_answer=2) for query, answer in asked]
    assert unmerged == pytest.approx(plain, abs=1e-3)
    assert nll == pytest.approx(plain, abs=1e-4)
    assert not np.allclose(without, plain, atol=0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_bf16_behind_a_prefix_is_near_fp32(name):
    model = tiny_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the same weights in both
    asked = [(some_ids(6, seed=n), [3, 4 + n]) for n in range(8)]
    expected = answer_nats(model, encode_prefix(model, some_ids(40)), asked)
    half = model.bfloat16()
    nll = answer_nats(half, encode_prefix(half, some_ids(40)), asked)
    assert nll == pytest.approx(expected, rel=0.05)


def test_an_engine_changes_the_models_attention_once_not_for_each_request(monkeypatch):
    model, tokenizer = tiny_model("llama"), TaskTokenizer(train_tokenizer("bpe"), TemplateSettings())
    changes, own = [], model.config._attn_implementation
    change = type(model.config).__setattr__

    def note(config, name, value):
        if name == "_attn_implementation_internal":
            changes.append(value)
        change(config, name, value)

    monkeypatch.setattr(type(model.config), "__setattr__", note)
    engine = engine_of(model, tokenizer)
    changes.clear()  # those of its trial
    query = np.array([5, 6, 7], np.int32)
    with engine:
        for _ in range(3):
            prefix = engine.encode(np.array([3, 4, 9], np.int32))
            engine.score(prefix, [query], [[[8], [9]]])
    assert changes == ["manyicl_segments", own]
    assert model.config._attn_implementation == own
