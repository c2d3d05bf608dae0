"""The engine behind a prefix, the one-pass curve and transformers' own forward and generate() agree."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import join_examples, query_ids, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.answering import answer_draw
from manyicl.evaluation.loop import one_pass_curve
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.answering.generation import generate_after
from manyicl.inference.answering.questions import ask
from manyicl.inference.drawing import draw_shots
from manyicl.inference.model import InferenceModel
from manyicl.inference.prefix import EMPTY_PREFIX, encode_prefix, score_choices
from tests.conftest import CONFIGS, make_task, tiny_model
from tests.support.answers import answer_nats, answer_prompts, curve_of, engine_of

CLASSES = sorted(CONFIGS)


def plain_nll(model, ids, *, num_answer: int) -> float:
    """Return the nats of the last `num_answer` ids by transformers' own forward, without any cache."""
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")  # sdpa refuses its soft cap
    with torch.inference_mode():
        logits = model(torch.as_tensor(np.asarray(ids), dtype=torch.long)[None], use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)
    places = range(len(ids) - num_answer, len(ids))
    return -sum(float(logprobs[place - 1, int(ids[place])]) for place in places)


@pytest.fixture(scope="module")
def asked(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    return tokenizer, tokenize_task(make_task("animals"), tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_scores_behind_a_nested_prefix_equal_a_plain_forward(name, asked):
    model, (_, task) = tiny_model(name), asked
    test = task.splits["test"]
    prefix = encode_prefix(model, task.head_ids)
    encoded = len(task.head_ids)
    for shots in (0, 1, 4, 7):
        before = join_examples(task, split="train", indices=range(shots)).ids
        prefix = encode_prefix(model, before[encoded:], after=prefix)
        encoded = len(before)
        pairs = []
        for query in (0, 3, 5):
            answer = test.ids[test.answer_starts[query] : test.starts[query + 1]].tolist()
            pairs.append((query_ids(task, split="test", index=query, after_shots=shots > 0), answer))
        nll = answer_nats(model, prefix, pairs)
        expected = [plain_nll(model, [*before, *ids, *answer], num_answer=len(answer)) for ids, answer in pairs]
        assert nll == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_one_pass_equals_the_engine_for_one_token_sequence(name, asked):
    model, (tokenizer, task) = tiny_model(name), asked
    loaded = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=256, trained_shots={})
    curve = one_pass_curve(loaded, [task.task], episodes=1, token_budget=200).curves[0]
    # The same episode, asked again and again behind its own first k examples.
    from manyicl.episodes.plan import EpisodeSettings, iter_episodes
    from manyicl.episodes.tokenized import lengths_of

    lengths = lengths_of(task, split="test")
    episode = next(
        iter_episodes([lengths], settings=EpisodeSettings(token_budget=200), seed=0, purpose="one-pass curve")
    )
    test = task.splits["test"]
    for cell, example in zip(curve.points, episode.examples.tolist(), strict=True):
        before = join_examples(task, split="test", indices=episode.examples[: cell.shots]).ids
        answer = test.ids[test.answer_starts[example] : test.starts[example + 1]].tolist()
        ids = query_ids(task, split="test", index=example, after_shots=cell.shots > 0)
        prefix = encode_prefix(model, before)
        assert cell.nll == pytest.approx(answer_nats(model, prefix, [(ids, answer)])[0], rel=1e-5)
        (greedy,) = generate_after(model, tokenizer, prefix, [ids], max_new_tokens=len(answer))
        assert cell.score == (greedy.text == task.task.test[test.rows[example]].answer and not greedy.cut)


one_model = cache(tiny_model)  # hypothesis asks one model again and again

# Prefixes in up to three steps, and queries and options both shorter and longer than the sliding windows of 16. Few
# different ids, so that options share beginnings, begin one another, and repeat.
STEPS = st.lists(st.integers(0, 25), max_size=3)
OPTION = st.lists(st.integers(3, 5), min_size=1, max_size=4)
QUERIES = st.lists(st.tuples(st.integers(1, 24), st.lists(OPTION, min_size=1, max_size=5)), min_size=1, max_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=15, derandomize=True)
@given(steps=STEPS, asked=QUERIES)
def test_choices_of_any_shape_equal_plain_forwards(name, steps, asked):
    model, rng = one_model(name), np.random.default_rng(len(asked))
    prefix = EMPTY_PREFIX
    for length in steps:
        prefix = encode_prefix(model, rng.integers(3, 390, length).astype(np.int32), after=prefix)
    queries = [rng.integers(3, 390, length).astype(np.int32) for length, _ in asked]
    options = [group for _, group in asked]
    nats = score_choices(model, prefix, queries, options)
    for query, group, nats_O in zip(queries, options, nats, strict=True):
        plain = {tuple(o): plain_nll(model, [*prefix.ids, *query, *o], num_answer=len(o)) for o in group}
        assert nats_O == pytest.approx([plain[tuple(o)] for o in group], abs=1e-4)
        best = min(plain.values())
        assert plain[tuple(group[int(np.argmin(nats_O))])] == pytest.approx(best, abs=1e-4)
        for option in group:  # options that are alike tie exactly
            assert len({nat for nat, other in zip(nats_O.tolist(), group, strict=True) if other == option}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=8, derandomize=True)
@given(steps=STEPS, lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5))
def test_generation_of_any_shape_equals_transformers(name, tokenizers, steps, lengths):
    model, rng = one_model(name, seed=3), np.random.default_rng(len(lengths))
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    prefix = EMPTY_PREFIX
    for length in steps:
        prefix = encode_prefix(model, rng.integers(3, 390, length).astype(np.int32), after=prefix)
    queries = [rng.integers(3, 390, length).astype(np.int32) for length in lengths]
    answers = generate_after(model, tokenizer, prefix, queries, max_new_tokens=10)
    for query, answer in zip(queries, answers, strict=True):
        text = tokenizer.decode(their_ids(model, np.concatenate([prefix.ids, query]), max_new_tokens=10))
        ends = [place for place in (text.find("\n\n"), text.find("</s>")) if place >= 0]
        assert answer.text == text[: min(ends, default=None)]
        assert answer.cut == (not ends)


def their_ids(model, prompt, *, max_new_tokens):
    """Return what transformers' own generate() adds to one prompt, ended by nothing but its end-of-text token."""
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")
    ids = torch.as_tensor(prompt, dtype=torch.long)[None]
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=2, pad_token_id=2)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_batched_generation_equals_generation_alone(name, asked):
    model, (tokenizer, task) = tiny_model(name, seed=3), asked
    prompts = [
        np.concatenate(
            [
                join_examples(task, split="train", indices=range(3)).ids,
                query_ids(task, split="test", index=query, after_shots=True),
            ]
        )
        for query in range(5)
    ]
    together = answer_prompts(model, tokenizer, prompts, max_new_tokens=12)
    alone = [answer_prompts(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone
    for prompt, answer in zip(prompts, together, strict=True):
        text = tokenizer.decode(their_ids(model, prompt, max_new_tokens=12))
        assert text.startswith(answer.text)


def test_a_checkpoints_own_generation_settings_do_not_change_a_greedy_answer(asked):
    model, (tokenizer, task) = tiny_model("llama", seed=3), asked
    prompt = join_examples(task, split="train", indices=range(3)).ids
    before = answer_prompts(model, tokenizer, [prompt], max_new_tokens=12)
    model.generation_config.repetition_penalty = 50.0
    settings = model.generation_config
    assert answer_prompts(model, tokenizer, [prompt], max_new_tokens=12) == before
    assert model.generation_config is settings


def test_ask_gives_the_likeliest_label_and_its_nats(asked):
    model, (tokenizer, task) = tiny_model("llama"), asked
    loaded = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=256, trained_shots={})
    answers = ask(loaded, task.task, ["the red cat 77", "the blue owl 78"], shots=3)
    order = draw_shots(task, seed=0, draw=0)[:3]
    before = join_examples(task, split="train", indices=order.astype(np.int32)).ids
    for answer in answers:
        query = tokenizer.encode_texts([f"Input: {answer.input}\nAnswer:\n"])[0]
        costs = {
            label: plain_nll(model, [*before, *query, *ids], num_answer=len(ids))
            for label, ids in zip(task.task.labels, tokenizer.encode_answers(task.task.labels), strict=True)
        }
        assert answer.answer == min(costs, key=costs.__getitem__)
        assert answer.nll == pytest.approx(costs[answer.answer], abs=1e-4)
        assert answer.shots == 3


def test_ask_answers_behind_the_first_draw_of_a_sweep_with_the_same_seed(asked):
    model, (tokenizer, task) = tiny_model("llama"), asked
    loaded = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=256, trained_shots={})
    sweep = Sweep(shots=(3,), num_draws=2, num_queries=6, seed=5, max_tokens=256)
    told = [p for p in curve_of(model, task, tokenizer=tokenizer, sweep=sweep).predictions if p.draw == 0]
    inputs = {example.id: example.input for example in task.task.test}
    answers = ask(loaded, task.task, [inputs[p.query] for p in told], shots=3, seed=5)
    assert [a.answer for a in answers] == [p.prediction for p in told]
    assert [a.nll for a in answers] == pytest.approx([min(p.choice_nll.values()) for p in told], abs=1e-5)
    other = ask(loaded, task.task, [inputs[p.query] for p in told], shots=3, seed=6)
    assert [a.nll for a in other] != pytest.approx([a.nll for a in answers], abs=1e-3)


def test_ask_fits_exactly_as_many_shots_as_a_sweep_would(asked):
    model, (tokenizer, task) = tiny_model("llama"), asked
    queries = [query_ids(task, split="test", index=index, after_shots=True) for index in range(len(task.task.test))]
    text = task.task.test[max(range(len(queries)), key=lambda index: len(queries[index]))].input
    for max_tokens in range(100, 140, 3):
        loaded = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=max_tokens, trained_shots={})
        fitting = ask(loaded, task.task, [text])[0].shots
        sweep = Sweep(shots=tuple(range(41)), num_draws=1, num_queries=99, max_tokens=max_tokens)
        assert fitting <= max(TaskSweep(task, tokenizer=tokenizer, sweep=sweep).asked_shots) <= fitting + 1
        with pytest.raises(UserError, match=f"leaves room for {fitting} shots in {max_tokens} tokens, not"):
            ask(loaded, task.task, [text], shots=fitting + 1)


def test_ask_uses_as_many_shots_as_fit(asked):
    model, (tokenizer, task) = tiny_model("llama"), asked
    loaded = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=128, trained_shots={})
    few = ask(loaded, task.task, ["the red cat 77"])[0].shots
    wide = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=512, trained_shots={})
    many = ask(wide, task.task, ["the red cat 77"])[0].shots
    assert 0 < few < many <= len(task.splits["train"])


@pytest.mark.slow
def test_a_sweep_asks_the_same_queries_behind_nested_shots(asked):
    model, (tokenizer, task) = tiny_model("llama"), asked
    sweep = Sweep(shots=(0, 1, 4), num_draws=3, num_queries=6, seed=1, max_tokens=400)
    curve = curve_of(model, task, tokenizer=tokenizer, sweep=sweep, trained_shots=1)
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=sweep)
    whole = plan.prefix_ids(2, start=0, stop=4)
    assert plan.prefix_ids(2, start=1, stop=4).tolist() == whole[-len(plan.prefix_ids(2, start=1, stop=4)) :].tolist()
    # Each draw encodes its head and its four shots once, for all shot counts together.
    once = [len(task.head_ids) + len(plan.prefix_ids(draw, start=0, stop=4)) for draw in range(3)]
    assert curve.num_encoded_tokens == plan.num_encoded_tokens == sum(once)
    engine = engine_of(model, tokenizer)
    encode, steps = engine.encode, []
    engine.encode = lambda ids, **options: steps.append(len(ids)) or encode(ids, **options)
    for draw in range(3):
        list(answer_draw(engine, plan, draw=draw))
    assert engine.count.num_prefix_tokens == sum(once)
    # The head has no forward pass of its own, unless there is a point without shots.
    ids = [
        [len(plan.prefix_ids(draw, start=start, stop=stop)) for start, stop in ((0, 1), (1, 4))] for draw in range(3)
    ]
    head = len(task.head_ids)
    assert steps == [head, *ids[0], head + ids[1][0], ids[1][1], head + ids[2][0], ids[2][1]]
    assert [cell.shots for cell in curve.points] == [0, 1, 4]
    assert [cell.num_scored for cell in curve.points] == [6, 18, 18]  # without shots all draws are one
    assert [cell.extrapolated for cell in curve.points] == [False, False, True]
    asked_queries = {(p.shots, p.draw): [] for p in curve.predictions}
    for p in curve.predictions:
        asked_queries[p.shots, p.draw].append(p.query)
    assert len({tuple(queries) for queries in asked_queries.values()}) == 1
    for p in curve.predictions:
        assert p.prediction in task.task.labels
        assert p.score == float(p.prediction == p.answer)
