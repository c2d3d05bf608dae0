"""Sampling: how often which tokens are sampled, that it depends on seed, prompt and number alone, and votes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.decoding import Decoding, Sampler, cut_at, pick_token, sampled_probabilities
from manyicl.inference.answering.generation import generate_after
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.answering.voting import sameness_of, vote
from manyicl.inference.engine import WholePrompts, score_whole_prompts
from manyicl.inference.model import InferenceModel
from manyicl.inference.prefix import EMPTY_PREFIX, encode_prefix
from tests.conftest import tiny_model
from tests.inference.answering.test_generation import reciting_model
from tests.inference.test_prefix import some_ids
from tests.support.answers import engine_of

# Probabilities 1/2, 1/4, 1/8, 1/8.
LOGITS = torch.log(torch.tensor([0.125, 0.5, 0.125, 0.25]))


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.125, 0.5, 0.125, 0.25]),
        (0.5, 1.0, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),  # squared
        (1.0, 0.5, [0, 1, 0, 0]),
        (1.0, 0.6, [0, 2 / 3, 0, 1 / 3]),
        (1.0, 0.8, [0.125, 0.5, 0.125, 0.25]),  # the two that are alike stay together
        (1e-3, 1.0, [0, 1, 0, 0]),
    ],
)
def test_probabilities_that_tokens_are_sampled_with(temperature, top_p, expected):
    found = sampled_probabilities(LOGITS, temperature=temperature, top_p=top_p)
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_tokens_have_their_parts_of_the_unit_interval():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [int(pick_token(probabilities, number)) for number in (0.0, 0.24, 0.25, 0.999999, 1.0)] == [1, 1, 3, 3, 3]


@pytest.mark.slow
def test_a_sampled_token_is_as_frequent_as_the_softmax_says(tokenizer):
    model, query = tiny_model("llama"), some_ids(9)
    count = 4000
    decodings = [Decoding(temperature=1.0, seed=1, sample=sample) for sample in range(count)]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(query[None].astype(np.int64))).logits[0, -1].double() * 4
    sampler = Sampler(decodings, [query] * count)
    tokens = sampler.choose(logits.expand(count, -1), range(count)).tolist()
    expected = torch.softmax(logits, -1).numpy() * count
    seen = Counter(tokens)
    common = [token for token in range(len(expected)) if expected[token] >= 5]
    assert len(common) > 20
    observed = [seen[token] for token in common]
    rest = count - sum(observed), count - expected[common].sum()
    assert chisquare([*observed, rest[0]], [*expected[common], rest[1]]).pvalue > 0.01


@pytest.mark.slow
def test_samples_do_not_depend_on_their_batch_and_differ_by_seed_prompt_and_number(tokenizer):
    model = tiny_model("llama")
    prefix = encode_prefix(model, some_ids(20))
    queries = [some_ids(5), some_ids(9), some_ids(7)]

    def sample(which, **changes):
        decodings = [Decoding(temperature=1.0, **{"seed": 3, "sample": 0} | changes)] * len(which)
        asked = [queries[n] for n in which]
        return [
            one.text for one in generate_after(model, tokenizer, prefix, asked, max_new_tokens=8, decodings=decodings)
        ]

    together = sample([0, 1, 2])
    assert together == [sample([n])[0] for n in range(3)]
    assert len(set(together)) == 3
    assert sample([2, 0]) == [together[2], together[0]]
    assert sample([0], sample=1) != together[:1]
    assert sample([0], seed=4) != together[:1]


def test_rows_of_one_batch_are_greedy_or_sampled_each_by_its_own_settings(tokenizer):
    model, queries = tiny_model("llama"), [some_ids(5), some_ids(9)]
    greedy = generate_after(model, tokenizer, EMPTY_PREFIX, queries, max_new_tokens=6)
    nearly = [Decoding(temperature=1e-4), Decoding(temperature=1.0, seed=1)]
    mixed = generate_after(model, tokenizer, EMPTY_PREFIX, queries, max_new_tokens=6, decodings=nearly)
    assert mixed[0] == greedy[0]  # near 0 it is greedy
    assert mixed[1] != greedy[1]


def test_both_engines_sample_alike(tokenizer):
    """transformers' own generate(), which models use that cannot share a prefix, gets the same tokens."""
    model = tiny_model("llama")
    shared = engine_of(model, tokenizer)
    before, queries = some_ids(12), [some_ids(5), some_ids(5)[::-1].copy()]
    decodings = [Decoding(temperature=0.8, top_p=0.9, seed=2), Decoding()]
    loaded = InferenceModel("tiny", model, tokenizer, max_tokens=10_000, trained_shots={})
    whole = WholePrompts(loaded, "a test")
    answers = [
        engine.generate(engine.encode(before), queries, limits=[6, 6], decodings=decodings)
        for engine in (shared, whole)
    ]
    assert answers[0] == answers[1]


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(tokenizer):
    words = tokenizer.encode_texts(["owl 12 fox"])[0]
    model = reciting_model([390, *words, *tokenizer.terminator_ids])
    query = np.array([390], dtype=np.int32)
    engine = engine_of(model, tokenizer)
    (whole,) = engine.generate(EMPTY_PREFIX, [query], limits=[30])
    assert (whole.text, whole.cut) == ("owl 12 fox", False)
    (stopped,) = engine.generate(EMPTY_PREFIX, [query], limits=[30], decodings=[Decoding(stop=("fox", "12"))])
    assert (stopped.text, stopped.cut) == ("owl ", False)
    assert stopped.num_tokens < whole.num_tokens
    # The nats of a reference are those without stop texts.
    decodings = [Decoding(stop=("12",))]
    (scored,) = engine.generate(EMPTY_PREFIX, [query], limits=[30], decodings=decodings, references=[[5, 6]])
    assert scored.reference_nll == pytest.approx(score_whole_prompts(model, some_ids(0), [query], [[[5, 6]]])[0][0])
    assert cut_at("a b", ("x",)) == ("a b", False)


def test_the_answer_of_most_samples_wins_and_numbers_vote_by_value():
    texts = ["so 3 #### 7", "it is 8", "x #### 7.0", "#### 8", "the answer is 7"]
    found = vote(texts, is_same=sameness_of("math_exact_match"))
    assert (found.winner, found.share) == (0, 0.6)
    assert vote(["b", "a", "a ", "b"], is_same=sameness_of("exact_match")).winner == 0  # a tie goes to the first
    assert vote(["a", "b", " b"], is_same=sameness_of("accuracy")).share == pytest.approx(2 / 3)


def test_settings_that_cannot_be_meant_are_refused():
    for wrong, told in (
        ({"samples": 5}, "samples=5: needs at least 1, and for more a `temperature` above 0"),
        ({"temperature": -1.0}, "temperature=-1: give a number from 0"),
        ({"top_p": 0.0}, "top_p=0: is not a probability above 0"),
        ({"stop": ("",)}, "stop='': an empty text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: an answer needs at least 1 token"),
    ):
        with pytest.raises(UserError, match=told):
            AnswerSettings(**wrong)
    assert AnswerSettings(stop=["x"]).stop == ("x",)
