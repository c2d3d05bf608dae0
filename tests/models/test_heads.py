"""Two answers whose logits are one number in bfloat16 are told apart, in every way that a model is asked (review C)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from manyicl.episodes.batch import join_row
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.inference.prefix import EMPTY_PREFIX, encode_prefix, score_choices
from manyicl.models.heads import float32_head
from manyicl.models.isolation import row_attention
from manyicl.models.loss import row_loss
from tests.conftest import ALONE_CONFIGS, CONFIGS, tiny_model
from tests.inference.test_prefix import some_ids
from tests.support.answers import engine_of

# Token 12 is likelier than token 11 by a hundredth of a nat or so; both lie far above all others.
CLOSE, BEST = 11, 12
SHOTS, QUERY = some_ids(30), some_ids(6, seed=1)


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


def tying_model(name: str):
    """Return a bfloat16 model that says CLOSE or BEST after QUERY, with logits that round to the same bfloat16."""
    model = tiny_model(name).bfloat16()
    ids = torch.from_numpy(np.concatenate([SHOTS, QUERY]).astype(np.int64))[None]
    seen = []
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    handle = head.register_forward_hook(lambda module, args, output: seen.append(args[0][0, -1]))
    with torch.no_grad():
        model(input_ids=ids)
        handle.remove()
        hidden_H = seen[0].float()
        head.weight[CLOSE] = 18 * hidden_H / hidden_H.square().sum()
        head.weight[BEST] = head.weight[CLOSE]
        place = hidden_H.abs().argsort()[-3]
        head.weight[BEST, place] *= 1 + 2**-7
        logits_V = model(input_ids=ids).logits[0, -1]
    assert logits_V.dtype == torch.bfloat16
    assert logits_V[CLOSE] == logits_V[BEST] == logits_V.max()  # what this test is about
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({**CONFIGS, **ALONE_CONFIGS}))
@pytest.mark.filterwarnings("ignore:.*shots are encoded anew")
def test_options_that_tie_in_bfloat16_are_told_apart(name):
    model = tying_model(name)
    engine = engine_of(model, None)
    (nats_O,) = engine.score(engine.encode(SHOTS), [QUERY], [[[CLOSE], [BEST]]])
    assert 1e-4 < nats_O[0] - nats_O[1] < 0.12
    assert np.argmin(nats_O) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
@pytest.mark.filterwarnings("ignore:.*shots are encoded anew")
def test_greedy_answers_begin_with_the_likelier_of_two_that_tie_in_bfloat16(name, tokenizer):
    model = tying_model(name)
    engine = engine_of(model, tokenizer)
    prefix = engine.encode(SHOTS)
    (answer,) = engine.generate(prefix, [QUERY], limits=[1])
    assert answer.text == tokenizer.cut_answer([BEST])[0] != tokenizer.cut_answer([CLOSE])[0]
    (again,) = engine.generate(prefix, [QUERY], limits=[1], references=[[CLOSE, 5]])
    assert (again.text, again.cut) == (answer.text, answer.cut)


@pytest.mark.parametrize("most_logits", [None, 400])  # at once, and in chunks of one target
def test_one_pass_and_engine_agree_on_a_tie_in_bfloat16(most_logits):
    model = tying_model("gemma2")
    ids = np.concatenate([SHOTS, QUERY])
    costs = []
    for answer in (CLOSE, BEST):
        whole = np.append(ids, answer).astype(np.int32)
        row = join_row(
            [TokenizedEpisode(whole, np.array([[len(ids), len(whole)]]))],
            targets="all",
            weights=[np.ones(1)],
            tasks=[0],
            episodes=(0,),
        )
        with torch.inference_mode(), row_attention(model, ids, longest=len(whole)), float32_head(model):
            scored = row_loss(model, row, most_logits=most_logits)
        assert scored.correct_A.tolist() == [answer == BEST]
        costs.append(float(scored.nll_A[0]))
    (nats,) = score_choices(model, EMPTY_PREFIX, [ids], [[[CLOSE], [BEST]]])
    assert costs[0] > costs[1]
    assert costs == pytest.approx(nats, abs=0.02)  # attention in bfloat16 rounds otherwise there


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_head_with_an_adapter_is_taken_in_float32_too(targets):
    base = tying_model("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets)).eval()  # B is zero: the base's own logits
    (nats_O,) = score_choices(model, encode_prefix(model, SHOTS), [QUERY], [[[CLOSE], [BEST]]])
    assert nats_O[1] < nats_O[0]


def test_a_model_is_as_it_was_afterwards():
    model = tying_model("llama")
    ids = torch.from_numpy(QUERY.astype(np.int64))[None]
    before = model(input_ids=ids).logits
    with float32_head(model):
        assert model(input_ids=ids).logits.dtype == torch.float32
    assert torch.equal(model(input_ids=ids).logits, before)
    assert before.dtype == torch.bfloat16


def test_blocks_of_two_threads_that_overlap_both_give_float32_logits():
    """The block that ended first gave the head back to the model while the other still asked it."""
    model = tying_model("llama")
    ids = torch.from_numpy(QUERY.astype(np.int64))[None]
    before = model(input_ids=ids).logits
    first, second = float32_head(model), float32_head(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model(input_ids=ids).logits.dtype == torch.float32
    second.__exit__(None, None, None)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert before.dtype == torch.bfloat16
