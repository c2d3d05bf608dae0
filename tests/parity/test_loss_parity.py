"""The identities of the objective: all = sum of lasts, ours = Hugging Face's, packed = unpacked, neighbours unseen."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from manyicl.episodes.batch import join_row
from manyicl.episodes.segments import make_segments
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.models.attention import dispatch
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import answer_loss, target_logits
from tests.conftest import CONFIGS, tiny_model

CLASSES = sorted(CONFIGS)


def random_episode(lengths: list[tuple[int, int]], *, seed: int) -> TokenizedEpisode:
    """Return an episode with (input, answer) lengths and random ids, after one BOS."""
    rng = np.random.default_rng(seed)
    total = 1 + sum(a + b for a, b in lengths)
    spans, at = [], 1
    for num_input, num_answer in lengths:
        spans.append((at + num_input, at + num_input + num_answer))
        at += num_input + num_answer
    return TokenizedEpisode(
        ids=np.concatenate([[1], rng.integers(3, 390, total - 1)]).astype(np.int32), spans=np.array(spans)
    )


def row(episodes: list[TokenizedEpisode], *, targets="all"):
    counts = [len(e.spans) if targets == "all" else 1 for e in episodes]
    weights = [np.ones(n) for n in counts]
    names = tuple(range(len(episodes)))
    return join_row(episodes, targets=targets, weights=weights, tasks=[0] * len(episodes), episodes=names)


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = 0.0
    with segment_attention(model):
        for batch in batches:
            loss = answer_loss(target_logits(model, batch), batch).loss
            loss.backward()
            total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prefix_of(episode: TokenizedEpisode, k: int) -> TokenizedEpisode:
    return TokenizedEpisode(ids=episode.ids[: episode.spans[k, 1]], spans=episode.spans[: k + 1])


EPISODE = [(5, 2), (7, 1), (3, 4), (6, 3), (4, 2)]


@pytest.mark.parametrize("name", CLASSES)
def test_all_targets_equal_the_sum_of_the_last_targets_of_every_prefix(name):
    model, episode = tiny_model(name), random_episode(EPISODE, seed=1)
    whole, gradients = loss_and_gradients(model, [row([episode])])
    prefixes = [row([prefix_of(episode, k)], targets="last") for k in range(len(EPISODE))]
    summed, summed_gradients = loss_and_gradients(model, prefixes)
    assert whole == pytest.approx(summed, rel=1e-5)
    for parameter, gradient in gradients.items():
        difference = (gradient - summed_gradients[parameter]).norm() / gradient.norm().clamp(min=1e-12)
        assert difference < 1e-4, parameter


@pytest.mark.parametrize("name", CLASSES)
def test_ours_equals_hugging_faces_own_loss_on_the_same_labels(name):
    model, episode = tiny_model(name), random_episode(EPISODE, seed=2)
    batch = row([episode])
    labels = torch.full_like(batch.input_ids_1T, -100)
    labels[0, batch.target_positions_N] = batch.input_ids_1T[0, batch.target_positions_N]
    if name == "gemma2":  # its soft cap is refused by sdpa
        model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids_1T, labels=labels, use_cache=False).loss.item()
        with segment_attention(model):
            ours = answer_loss(target_logits(model, batch), batch).loss.item() / len(batch.target_positions_N)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_packed_equals_unpacked(name):
    model = tiny_model(name)
    episodes = [random_episode([(5, 2)] * k, seed=k) for k in (3, 1, 6)]
    packed, packed_gradients = loss_and_gradients(model, [row(episodes)])
    apart, gradients = loss_and_gradients(model, [row([e]) for e in episodes])
    assert packed == pytest.approx(apart, rel=1e-5)
    for parameter, gradient in gradients.items():
        assert torch.allclose(gradient, packed_gradients[parameter], rtol=1e-3, atol=1e-4), parameter


def moved_targets(model, *, training: bool) -> list[bool]:
    """Change one token of the middle segment of three and return which segments' logits moved."""
    model.train(training)
    episodes = [random_episode(EPISODE, seed=seed) for seed in (4, 5, 6)]
    before = row(episodes)
    middle = episodes[1]
    changed = TokenizedEpisode(ids=np.where(np.arange(len(middle.ids)) == 2, 7, middle.ids), spans=middle.spans)
    after = row([episodes[0], changed, episodes[2]])
    with torch.no_grad(), segment_attention(model):
        difference = (target_logits(model, before) - target_logits(model, after)).abs().amax(dim=-1)
    segment = before.segment_ids_T[before.target_positions_N]
    return [bool((difference[segment == s] > 0).any()) for s in range(3)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_perturbed_token_moves_no_logit_of_its_neighbours(name, training):
    assert moved_targets(tiny_model(name), training=training) == [False, True, False]


def test_the_perturbation_test_fails_with_isolation_off(monkeypatch):
    def attend_whole_row(module, query, key, value, attention_mask=None, *, segments, **options):
        whole = make_segments((query.shape[2],), bounds_S=segments.bounds_S[[0, -1]])
        return original(module, query, key, value, attention_mask, segments=whole, **options)

    original = dispatch.attend_segments
    monkeypatch.setitem(dispatch.ALL_ATTENTION_FUNCTIONS._global_mapping, dispatch.IMPLEMENTATION, attend_whole_row)
    assert moved_targets(tiny_model("llama"), training=True) == [False, True, True]


def test_a_row_without_targets_keeps_the_graph_connected():
    model, batch = tiny_model("llama"), row([random_episode(EPISODE, seed=7)])
    nothing = batch.target_positions_N[:0]
    empty = replace(
        batch,
        target_positions_N=nothing,
        target_weights_N=batch.target_weights_N[:0],
        target_answers_N=nothing,
        answer_shots_A=nothing,
        answer_tasks_A=nothing,
    )
    loss, gradients = loss_and_gradients(model, [empty])
    assert loss == 0.0
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all(not gradient.any() for gradient in gradients.values())


def test_attention_returns_to_what_it_was():
    model = tiny_model("llama")
    with segment_attention(model):
        assert model.config._attn_implementation == dispatch.IMPLEMENTATION
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_changed_in_every_config_that_a_model_has():
    model = tiny_model("llama")
    model.model.config = copy.deepcopy(model.config)
    with segment_attention(model):
        assert model.model.config._attn_implementation == dispatch.IMPLEMENTATION
    assert model.model.config._attn_implementation == model.config._attn_implementation == "sdpa"


def test_a_forward_without_segments_is_refused():
    model = tiny_model("llama")
    with segment_attention(model), pytest.raises(RuntimeError, match="segments or a layout"):
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
