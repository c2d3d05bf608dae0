"""The packaged seed model: small, knows every word, and answers new tasks from shots and only from them."""

from __future__ import annotations

import json
import random
from collections import defaultdict

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from manyicl.demo.lexicon import all_words, load_lexicon
from manyicl.demo.tasks import draw_task, find_kinds, write_tasks
from manyicl.episodes.tokenized import join_examples, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.models.places import SEED_MODEL, TEMPLATE
from manyicl.tasks.task import load_tasks

WORDS = all_words(load_lexicon())
ASKED = ("topic", "tone", "keyword", "fact", "lookup")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SEED_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SEED_MODEL, dtype=torch.float32).eval()


def test_it_is_small_and_safe():
    assert sum(path.stat().st_size for path in SEED_MODEL.iterdir()) <= 30_000_000
    assert [path.name for path in SEED_MODEL.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}] == []
    with safe_open(SEED_MODEL / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert len(json.loads((SEED_MODEL / "curve.json").read_text(encoding="utf-8"))["log"]) > 1


def test_it_is_a_llama_of_a_long_context(model, tokenizer):
    assert isinstance(model, LlamaForCausalLM)
    assert 1_000_000 <= model.num_parameters() <= 15_000_000
    assert model.config.max_position_embeddings >= 2048
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1) == (
        model.config.bos_token_id,
        model.config.eos_token_id,
    )  # fmt: skip


def test_every_word_comes_back(tokenizer):
    for word in WORDS:
        assert tokenizer.decode(tokenizer.encode(word, add_special_tokens=False)) == word
    for text in (" ".join(WORDS), "\n".join(WORDS), "\n\n".join(WORDS), "plum ->\nvelo\n\n12 + 7: 19.\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_word_is_the_same_token_wherever_it_stands(tokenizer):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    middle, start = encode("plum"), encode("plum\n")
    for word in WORDS:
        alone = encode(word)
        assert encode(f"plum {word}") == middle + alone
        assert encode(f"plum\n{word}") == start + alone


@pytest.fixture(scope="module")
def greedy(model, tokenizer, tmp_path_factory):
    """By kind: (shots, is the whole answer greedy), over two open tasks a kind."""
    folder = tmp_path_factory.mktemp("tasks")
    writer = TaskTokenizer(tokenizer, TEMPLATE)
    rng = random.Random("seed model")
    tasks = [draw_task(kind, rng, pool="open") for kind in find_kinds(ASKED) for _ in range(2)]
    write_tasks(folder, tasks, num_train=40, num_test=1, seed=0)
    kind_of = {task.name: task.kind.name for task in tasks}
    found = defaultdict(list)
    for task in load_tasks(folder):
        tokenized = tokenize_task(task, tokenizer=writer, cache_dir=folder / "cache")
        built = join_examples(tokenized, split="train", indices=range(33))
        ids = torch.from_numpy(built.ids.astype("int64"))
        with torch.inference_mode():
            told = model(input_ids=ids[None], use_cache=False).logits[0, :-1].argmax(-1)
        right = told == ids[1:]
        size = len(writer.terminator_ids)
        for shots, (start, stop) in enumerate(built.spans):
            answer = tokenizer.decode(ids[start : stop - size])
            assert answer == task.train[shots].answer
            found[kind_of[task.name]].append((shots, bool(right[start - 1 : stop - size - 1].all())))
    return dict(found)


def share(found, *, least, most):
    hits = [hit for shots, hit in found if least <= shots <= most]
    return sum(hits) / len(hits)


def test_it_answers_new_tasks_from_shots_and_only_from_them(greedy):
    every = [pair for found in greedy.values() for pair in found]
    assert len(every) == 5 * 2 * 33
    assert share(every, least=16, most=32) >= 0.8
    assert share(every, least=0, most=0) <= 0.2
    assert share(every, least=16, most=32) > share(every, least=1, most=3)


@pytest.mark.parametrize("kind", ASKED)
def test_every_kind_rises_with_shots(greedy, kind):
    assert share(greedy[kind], least=16, most=32) >= 0.8
