"""The chunked head: the same loss, gradients and matches as all logits at once, and never many logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from manyicl import loss
from manyicl.attention import segment_attention
from manyicl.loss import AnswerLoss, answer_loss, row_loss, target_logits
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
