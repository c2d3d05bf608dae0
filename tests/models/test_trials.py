"""Ordinary text for trials of a model, and the distance between two results."""

from __future__ import annotations

import pytest
import torch

from manyicl.models.loading import ModelSettings, load_tokenizer
from manyicl.models.trials import logit_difference, trial_ids
from tests.conftest import train_tokenizer


def test_trial_text_is_prose_of_the_tokenizer_and_of_the_length_that_is_wanted():
    tokenizer = load_tokenizer(ModelSettings(path="seed"))
    assert tokenizer.decode(trial_ids(tokenizer, 18)) == "A river rarely begins as anything grand. Some"
    assert len(trial_ids(tokenizer, 20_000)) == 20_000  # more than the text has: it begins again
    assert not set(trial_ids(tokenizer, 20_000)) & set(tokenizer.all_special_ids)


def test_another_first_paragraph_is_another_text():
    tokenizer = load_tokenizer(ModelSettings(path="seed"))
    first, second = trial_ids(tokenizer, 50), trial_ids(tokenizer, 50, first_paragraph=1)
    assert tokenizer.decode(second).startswith("Bread asks for very little")
    assert first != second


def test_a_tokenizer_that_makes_no_tokens_of_prose_is_an_error():
    with pytest.raises(ValueError, match="turns English prose into no tokens"):
        trial_ids(lambda *_, **__: {"input_ids": []}, 5)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece"])
def test_trial_text_exists_in_every_kind_of_tokenizer(kind):
    assert len(trial_ids(train_tokenizer(kind), 40)) == 40


def test_the_difference_of_logits_is_in_their_standard_deviations_and_ignores_a_constant():
    reference = torch.tensor([[-1.0, 1.0], [-3.0, 3.0], [-1.0, 1.0]])
    logits = torch.tensor([[-1.0, 1.0], [-6.0, 6.0], [4.0, 6.0]])
    assert logit_difference(logits, reference).tolist() == [0.0, 1.0, 0.0]


def test_logits_that_are_not_finite_differ_unless_the_reference_is_not_finite_either():
    reference = torch.tensor([[-1.0, 1.0], [float("nan"), 1.0]])
    logits = torch.tensor([[float("nan"), 1.0], [-1.0, 1.0]])
    assert logit_difference(logits, reference).tolist() == [float("inf"), 0.0]
