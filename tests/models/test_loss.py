"""The chunked head: the same loss, gradients and matches as all logits at once, and never many logits."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from manyicl.models import loss
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import AnswerLoss, answer_loss, row_loss, target_logits
from tests.conftest import CONFIGS, tiny_model
from tests.parity.test_loss_parity import EPISODE, random_episode, row


def both_ways(model, monkeypatch) -> list[tuple[AnswerLoss, dict[str, torch.Tensor]]]:
    """Return loss and gradients from all logits at once, and from chunks of four targets."""
    batch, found = row([random_episode(EPISODE, seed=seed) for seed in (1, 2)]), []
    monkeypatch.setitem(loss.MOST_LOGITS, "cpu", 4 * 400)
    for scored_by in (lambda m, b: answer_loss(target_logits(m, b), b), row_loss):
        model.zero_grad()
        with segment_attention(model):
            scored = scored_by(model, batch)
            scored.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((scored, gradients))
    return found


def assert_alike(found) -> None:
    (one, gradients), (other, chunked) = found
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    assert torch.allclose(other.nll_A, one.nll_A, rtol=1e-5)
    assert torch.equal(other.num_tokens_A, one.num_tokens_A)
    assert torch.equal(other.correct_A, one.correct_A)
    assert gradients.keys() == chunked.keys()
    for name, gradient in gradients.items():
        assert (gradient - chunked[name]).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_chunks_give_the_loss_gradients_and_matches_of_all_logits(name, monkeypatch):
    model = tiny_model(name)
    cap = getattr(model.config, "final_logit_softcapping", None)
    assert (cap is not None) == (name == "gemma2")
    assert_alike(both_ways(model, monkeypatch))
    assert getattr(model.config, "final_logit_softcapping", None) == cap
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_chunks_beside_an_adapter(modules, monkeypatch):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    found = both_ways(model, monkeypatch)
    assert_alike(found)
    assert all("lora_" in name for name in found[1][1])


@pytest.mark.parametrize("most_logits", [None, 4 * 400], ids=["at once", "chunks"])
def test_a_tied_embeddings_gradient_is_added_to_the_heads_in_place(most_logits):
    """At most two gradients of a matrix of the vocabulary's size at once; autograd alone makes a third, their sum."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings, config.vocab_size = True, 4000
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    matrix_bytes = 4 * config.vocab_size * config.hidden_size
    batch, peaks, gradients = row([random_episode([(5, 1)] * 2, seed=1)]), [], []
    for score in (lambda m, b: answer_loss(target_logits(m, b), b), partial(row_loss, most_logits=most_logits)):
        model.zero_grad(set_to_none=True)
        with segment_attention(model), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            score(model, batch).loss.backward()
        peaks.append(peak_bytes(profiled) / matrix_bytes)
        gradients.append(model.lm_head.weight.grad.clone())
        assert "forward" not in vars(model.lm_head)
    assert peaks[0] > 3
    assert peaks[1] < 2.5
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def peak_bytes(profiled) -> int:
    """Return the most bytes that lived at once, by torch's own count of what its allocator gave and took."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def test_no_more_logits_than_a_chunks_are_made(monkeypatch):
    model, sizes = tiny_model("llama"), []
    original = loss._score_chunk

    def counted(head, hidden, *rest):
        sizes.append(len(hidden))
        return original(head, hidden, *rest)

    monkeypatch.setattr(loss, "_score_chunk", counted)
    both_ways(model, monkeypatch)
    # 24 targets, forward, and again in the backward pass.
    assert sizes == [4] * 12


def test_a_model_that_scales_its_logits_behind_the_head_gets_them_all_at_once(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(loss, "PLAIN_HEADS", frozenset())
    monkeypatch.setattr(loss, "_score_chunk", None)
    assert_alike(both_ways(model, monkeypatch))
