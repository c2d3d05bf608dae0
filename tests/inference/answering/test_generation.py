"""Greedy answers behind one prefix: where they end, what is counted as cut, and that batches change nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.generation import Generated, _QueryKeys, generate_after, generate_and_score
from manyicl.inference.prefix import EMPTY_PREFIX, EngineCount, encode_prefix
from manyicl.inference.query_rows import Query, lay_out_row
from manyicl.training.memory.storage_meter import StorageMeter
from tests.conftest import CONFIGS, tiny_model
from tests.inference.test_prefix import run_out_of_memory, some_ids
from tests.support.answers import answer_nats, engine_of


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


def reciting_model(ids, *, vocab_size=400):
    """Return a real Llama that says `ids[n + 1]` after `ids[n]`, whatever stands before: no layer, a head of links."""
    model = tiny_model("llama", vocab_size=vocab_size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        codes = torch.nn.functional.normalize(
            torch.randn(vocab_size, 32, generator=torch.Generator().manual_seed(0)), dim=1
        )
        model.model.embed_tokens.weight.copy_(codes)
        model.lm_head.weight.zero_()
        for token, following in pairwise(ids):
            model.lm_head.weight[following] += codes[token]
    return model


def test_an_answer_ends_at_the_terminator_the_end_of_text_or_the_limit(tokenizer):
    word = tokenizer.encode_texts(["owl"])[0]
    terminator = tokenizer.terminator_ids
    query = np.array([390], dtype=np.int32)
    for ending, expected in (
        (terminator, Generated("owl", cut=False)),
        ([2], Generated("owl", cut=False)),
        ([tokenizer.encode_texts(["7"])[0][0]], None),
    ):
        model = reciting_model([390, *word, *ending])
        limit = len(word) + len(ending)
        (answer,) = generate_after(model, tokenizer, EMPTY_PREFIX, [query], max_new_tokens=limit)
        assert answer == (expected or Generated("owl7", cut=True))
    # One token less than the terminator needs: cut.
    model = reciting_model([390, *word, *terminator])
    limit = len(word) + len(terminator) - 1
    assert generate_after(model, tokenizer, EMPTY_PREFIX, [query], max_new_tokens=limit)[0].cut


def test_a_terminator_merged_into_another_token_ends_an_answer(tokenizer):
    # Two tokens of one newline each, where the terminator's own ids are others.
    newline = tokenizer.encode_texts(["a\n"])[0][-1]
    word = tokenizer.encode_texts(["fox"])[0]
    assert [newline, newline] != tokenizer.terminator_ids
    model = reciting_model([390, *word, newline, newline])
    query = np.array([390], dtype=np.int32)
    assert generate_after(model, tokenizer, EMPTY_PREFIX, [query], max_new_tokens=9) == [Generated("fox", cut=False)]


@pytest.mark.slow
def test_rows_that_ended_are_dropped_and_the_others_go_on_unchanged(tokenizer, monkeypatch):
    model = tiny_model("llama", seed=3)
    prefix = encode_prefix(model, some_ids(30))
    queries = [some_ids(3 + n, seed=n) for n in range(8)]
    alone = [generate_after(model, tokenizer, prefix, [q], max_new_tokens=15)[0] for q in queries]
    assert len({len(a.text) for a in alone}) > 1
    # End each row after as many steps as its number, and see the batch shrink.
    rows = []
    model.register_forward_pre_hook(lambda m, args, kw: rows.append(kw["input_ids"].shape[1]), with_kwargs=True)
    steps = iter(range(1000))
    judged = tokenizer.has_ended
    monkeypatch.setattr(tokenizer, "has_ended", lambda ids: next(steps) % 5 == 4 or judged(ids))
    generate_after(model, tokenizer, prefix, queries, max_new_tokens=15)
    assert rows[0] == sum(len(q) for q in queries)
    assert rows[1] <= 8
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 8
    monkeypatch.undo()
    assert generate_after(model, tokenizer, prefix, queries, max_new_tokens=15) == alone


def test_out_of_memory_halves_the_batch_and_changes_no_answer(tokenizer):
    model = tiny_model("llama", seed=3)
    prefix = encode_prefix(model, some_ids(30))
    queries = [some_ids(4, seed=n) for n in range(8)]
    expected = generate_after(model, tokenizer, prefix, queries, max_new_tokens=6)
    rows = run_out_of_memory(model, above=16)
    count = EngineCount()
    assert generate_after(model, tokenizer, prefix, queries, max_new_tokens=6, count=count) == expected
    assert rows[0] == 32
    assert max(rows[1:]) == 16
    assert count.num_prefix_tokens == 0
    assert 8 * 4 <= count.num_query_tokens <= 8 * (4 + 5)


def test_no_queries_have_no_answers(tokenizer):
    assert generate_after(tiny_model("llama"), tokenizer, EMPTY_PREFIX, [], max_new_tokens=4) == []


@pytest.mark.parametrize("references", [None, [[5, 6], [5], [7, 8, 9]]])
def test_each_query_has_its_own_limit(tokenizer, references):
    model = tiny_model("llama", seed=3)
    engine = engine_of(model, tokenizer)
    prefix, queries = engine.encode(some_ids(30)), [some_ids(4 + n, seed=n) for n in range(3)]
    answers = engine.generate(prefix, queries, limits=[2, 9, 2], references=references)
    alone = [
        engine.generate(prefix, [query], limits=[limit], references=None if references is None else [references[n]])[0]
        for n, (query, limit) in enumerate(zip(queries, (2, 9, 2), strict=True))
    ]
    assert [(a.text, a.cut) for a in answers] == [(a.text, a.cut) for a in alone]
    if references is None:
        assert [a.reference_nll for a in answers] == [None] * 3
    else:
        assert [a.reference_nll for a in answers] == pytest.approx([a.reference_nll for a in alone], abs=1e-5)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_answer_and_its_references_nats_are_those_of_each_alone(tokenizer, name):
    model = tiny_model(name, seed=3)
    prefix = encode_prefix(model, some_ids(30))
    # References shorter and longer than what is generated: new tokens are written over them.
    asked = [(some_ids(3 + 4 * n, seed=n), some_ids(length, seed=9).tolist()) for n, length in enumerate((1, 4, 25))]
    answers, nats = generate_and_score(model, tokenizer, prefix, asked, max_new_tokens=6)
    assert answers == generate_after(model, tokenizer, prefix, [query for query, _ in asked], max_new_tokens=6)
    assert nats == pytest.approx(answer_nats(model, prefix, asked), abs=1e-4)


def test_a_query_is_encoded_once_for_its_answer_and_its_reference(tokenizer):
    model, count = tiny_model("llama", seed=3), EngineCount()
    prefix, rows = encode_prefix(model, some_ids(30)), []
    model.register_forward_pre_hook(lambda m, args, kw: rows.append(kw["input_ids"].shape[1]), with_kwargs=True)
    generate_and_score(model, tokenizer, prefix, [(some_ids(7), [5, 6, 2])] * 2, max_new_tokens=2, count=count)
    assert rows == [2 * (7 + 2), 2]
    assert count.num_query_tokens == sum(rows)


def test_a_reference_without_a_finite_likelihood_is_an_error(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="1 of 1 answers no finite likelihood"):
        generate_and_score(model, tokenizer, EMPTY_PREFIX, [(some_ids(4), [5, 2])], max_new_tokens=2)
    with pytest.raises(ValueError, match="no ids"):
        generate_and_score(model, tokenizer, EMPTY_PREFIX, [(some_ids(0), [5])], max_new_tokens=2)
    assert generate_and_score(model, tokenizer, EMPTY_PREFIX, [], max_new_tokens=2)[0] == []


def test_what_a_reference_begins_with_rightly_is_not_decoded_again(tokenizer):
    word, terminator = tokenizer.encode_texts(["owl"])[0], tokenizer.terminator_ids
    model = reciting_model([390, *word, *terminator])
    query, right = np.array([390], dtype=np.int32), [*word, *terminator]
    for reference, limit, num_steps, expected in (
        (right, 20, 0, Generated("owl", cut=False)),
        ([*word[:1], 7, 7], 20, len(right) - 2, Generated("owl", cut=False)),  # right in its first token only
        (right[:-1], 20, 1, Generated("owl", cut=False)),  # nothing but right, and too short
        ([7, *right], 20, len(right) - 1, Generated("owl", cut=False)),  # wrong from the start
        (right, len(word), 0, Generated("owl", cut=True)),  # the limit lies inside the reference
    ):
        rows, count = [], EngineCount()
        handle = model.register_forward_pre_hook(
            lambda m, args, kw, rows=rows: rows.append(kw["input_ids"].shape[1]), with_kwargs=True
        )
        asked = [(query, reference)]
        answers, _ = generate_and_score(model, tokenizer, EMPTY_PREFIX, asked, max_new_tokens=limit, count=count)
        handle.remove()
        assert answers == [expected]
        assert [n for n in rows if n != 12][-1 - num_steps :] == [len(reference)] + [1] * num_steps
        assert count.num_query_tokens == len(reference) + num_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_drafts_of_any_length_change_no_answer(tokenizer, name):
    model = tiny_model(name, seed=3)
    prefix = encode_prefix(model, some_ids(30))
    queries = [some_ids(3 + n, seed=n) for n in range(9)]
    alone = [generate_after(model, tokenizer, prefix, [query], max_new_tokens=12)[0] for query in queries]
    greedy = [greedy_ids(model, [*prefix.ids, *query], num=12) for query in queries]
    # The first n tokens of the greedy answer, then others: each query is drafted to another place.
    asked = [(query, [*ids[:n], 5, 6, 7]) for n, (query, ids) in enumerate(zip(queries, greedy, strict=True))]
    answers, nats = generate_and_score(model, tokenizer, prefix, asked, max_new_tokens=12)
    assert answers == alone
    assert nats == pytest.approx(answer_nats(model, prefix, asked), abs=1e-4)


def greedy_ids(model, ids, *, num):
    """Return what a plain forward says is likeliest, again and again."""
    ids = list(ids)
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")  # sdpa refuses its soft cap
    for _ in range(num):
        with torch.inference_mode():
            ids.append(int(model(torch.as_tensor([ids]).long(), use_cache=False).logits[0, -1].argmax()))
    return ids[-num:]


def test_keys_of_ended_answers_are_dropped_one_layer_after_the_other():
    """All layers' keys were copied before any was freed, so that they took twice the memory that was planned."""
    *_, layout = lay_out_row([Query(some_ids(8), None)] * 10, prefix=EMPTY_PREFIX, device=torch.device("cpu"))
    kept = _QueryKeys(layout, most_new=8)
    with StorageMeter([]) as meter:
        for layer in range(10):
            kept.write(layer, torch.zeros(1, 2, 80, 4), torch.zeros(1, 2, 80, 4))
        whole = 10 * 2 * (10 * 2 * 16 * 4) * 4  # layers, keys and values, numbers of each, bytes of one
        assert meter.live_bytes == pytest.approx(whole, rel=0.01)
        meter.reset()
        kept.keep(torch.arange(5))
        assert meter.live_bytes == pytest.approx(whole / 2, rel=0.01)
    assert meter.peak_bytes == pytest.approx(1.05 * whole, rel=0.02)
