"""Asking real pretrained models: behind a shared prefix = whole prompts = transformers' generate()."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.inference.answering.generation import generate_after
from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.inference.sharing import TRIAL_TOKENS, try_prefix
from manyicl.models.isolation import isolation_fault
from manyicl.models.loading import ModelSettings, load_model, load_tokenizer
from manyicl.models.trials import trial_ids

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

SHOTS = """Input: The soup was cold and the waiter was rude.
Answer:
bad

Input: What a wonderful evening, we will come again!
Answer:
good

Input: Overpriced, noisy, and my order was wrong.
Answer:
bad

Input: Fresh bread, kind people, fair prices.
Answer:
good

"""
QUERIES = [
    "Input: The best meal that I have had in years.\nAnswer:\n",
    "Input: I waited an hour and left hungry.\nAnswer:\n",
]
OPTIONS = ["good\n\n", "bad\n\n"]


@pytest.fixture(params=["smollm2", "gemma3"])
def base(request) -> Path:
    """Each real base in turn."""
    return request.getfixturevalue(request.param)


def load(base: Path):
    """Return the model in float32 and its tokenizer."""
    settings = ModelSettings(path=str(base), precision="fp32")
    return load_model(settings).eval(), TaskTokenizer(load_tokenizer(settings), TemplateSettings())


def ids_of(tokenizer: TaskTokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


def shots_after_prose(tokenizer: TaskTokenizer, num_tokens: int) -> np.ndarray:
    """Return so many tokens of prose and the shots behind it."""
    return np.concatenate([np.array(trial_ids(tokenizer.tokenizer, num_tokens), np.int32), ids_of(tokenizer, SHOTS)])


def behind_prefix(model, before, queries, options) -> np.ndarray:
    """Return the nats of each option of each query, (Q, O), by the library."""
    return np.array(score_choices(model, encode_prefix(model, before), queries, [options] * len(queries)))


@torch.inference_mode()
def by_whole_prompt(model, before, query, option) -> float:
    """Return the nats of one option by transformers alone: one forward of the whole prompt, and its log-softmax."""
    ids = torch.from_numpy(np.concatenate([before, query, option]).astype(np.int64))
    logits = model(ids[None], logits_to_keep=len(option) + 1, use_cache=False).logits[0, :-1]
    return -float(logits.float().log_softmax(-1).gather(1, ids[-len(option) :, None]).sum())


@torch.inference_mode()
def by_next_token(model, before, queries, options) -> np.ndarray:
    """Return the nats of options of one token, (Q, O), by transformers alone: one forward per query tells them all."""
    rows = []
    for query in queries:
        ids = torch.from_numpy(np.concatenate([before, query]).astype(np.int64))
        logits = model(ids[None], logits_to_keep=1, use_cache=False).logits[0, -1]
        rows.append((-logits.float().log_softmax(-1))[np.concatenate(options)].tolist())
    return np.array(rows)


@pytest.mark.parametrize(("name", "prose"), [("smollm2", 60), ("gemma3", 480)])
def test_behind_a_prefix_equals_whole_prompts_and_generate(request, name, prose):
    """In float32 likelihoods agree to 1e-4, greedy text to the letter; Gemma 3 sees beyond its window of 512."""
    model, tokenizer = load(request.getfixturevalue(name))
    before = shots_after_prose(tokenizer, prose)
    assert name == "smollm2" or len(before) > 512 + 20
    queries, options = ([ids_of(tokenizer, text) for text in texts] for texts in (QUERIES, OPTIONS))
    shared = behind_prefix(model, before, queries, options)
    whole = [by_whole_prompt(model, before, *pair) for pair in zip(queries, options, strict=True)]
    assert shared.diagonal() == pytest.approx(whole, abs=1e-4)
    assert min(whole) < 5  # it knows what is asked: these are likelihoods of ordinary text

    free = ids_of(tokenizer, "Input: The kitchen was")
    (ours,) = generate_after(model, tokenizer, encode_prefix(model, before), [free], max_new_tokens=6)
    prompt = torch.from_numpy(np.concatenate([before, free]).astype(np.int64))[None]
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6)
    assert ours.text == tokenizer.decode(theirs[0, prompt.shape[1] :].tolist())


def test_bfloat16_differs_from_float32_as_the_models_own_kernels_do(base):
    """No likelihood is much farther off than with eager or sdpa; options keep their order unless they nearly tie.

    Short, because a CPU without bfloat16 units needs a second for ten tokens.
    """
    model, tokenizer = load(base)
    before = ids_of(tokenizer, "".join(SHOTS.partition("again!\nAnswer:\ngood\n\n")[:2]))
    queries = [ids_of(tokenizer, text) for text in QUERIES]
    options = [ids_of(tokenizer, text)[:1] for text in (*OPTIONS, "green")]
    truth = by_next_token(model, before, queries, options)
    model.bfloat16()
    nats = {"shared": behind_prefix(model, before, queries, options)}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        nats[name] = by_next_token(model, before, queries, options)
    far = {name: np.abs(values - truth).max() for name, values in nats.items()}
    own = max(far["eager"], far["sdpa"])
    assert 0 < far["shared"] <= 3 * own, far
    leads = {name: values[:, :, None] - values[:, None, :] for name, values in {"float32": truth, **nats}.items()}
    clear = np.abs(leads["float32"]) > 4 * own
    assert clear.any()
    for name, values in leads.items():
        assert (np.sign(values) == np.sign(leads["float32"]))[clear].all(), (name, truth, nats)


def test_a_base_in_8_bits_loses_a_twentieth_of_a_nat_and_keeps_episodes_apart(smollm2):
    """Per token of plain prose, against bfloat16. Its shots are shared, and its rows are packed, as the base's own."""
    settings = ModelSettings(path=str(smollm2), precision="bf16")
    stored = load_model(settings.model_copy(update={"quantize": "float8"})).eval()
    own = load_model(settings).eval()
    text = np.asarray(trial_ids(load_tokenizer(settings), TRIAL_TOKENS), dtype=np.int32)
    ids = torch.from_numpy(text[:600].astype(np.int64))[None]
    with torch.no_grad():
        lost = float(stored(ids, labels=ids).loss - own(ids, labels=ids).loss)
    assert 0 < lost < 0.1
    assert try_prefix(stored, text) == ""
    assert isolation_fault(stored, text, longest=4096) == ""


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_a_base_in_4_bits_takes_a_third_of_the_memory_and_loses_a_quarter_of_a_nat(smollm2):
    """The quarter is per token of plain prose. Its shots are shared, as the base's own are."""
    pytest.importorskip("bitsandbytes")
    settings = ModelSettings(path=str(smollm2), precision="fp32")
    packed = load_model(settings.model_copy(update={"quantize": "nf4"})).eval()
    own = load_model(settings).eval()
    tokenizer = TaskTokenizer(load_tokenizer(settings), TemplateSettings())
    text = np.asarray(trial_ids(tokenizer.tokenizer, TRIAL_TOKENS), dtype=np.int32)
    ids = torch.from_numpy(text[:600].astype(np.int64))[None]
    with torch.no_grad():
        lost = float(packed(ids, labels=ids).loss - own(ids, labels=ids).loss)
    assert 0 < lost < 0.3
    size, size_of_own = (sum(p.nbytes for p in model.parameters()) for model in (packed, own))
    assert size < 0.35 * size_of_own
    assert try_prefix(packed, text) == ""
