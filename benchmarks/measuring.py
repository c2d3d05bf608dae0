"""What the training benchmarks share: random episodes, model shapes, times in turn, medians with spread."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig

from manyicl.episodes.batch import Batch, join_row
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.models.loss import AnswerLoss, row_loss

ANSWER_TOKENS = 3

# Name -> config of the real shape.
SHAPES: dict[str, Callable[[], Any]] = {
    "mistral-7b": lambda: MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, sliding_window=None, rope_theta=1e6, max_position_embeddings=1 << 18,
    ),
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 18,
    ),
    "gemma-7b": lambda: GemmaConfig(
        vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16, head_dim=256, max_position_embeddings=1 << 18,
    ),
    "llama-1b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=1 << 18,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "small": lambda: LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1 << 18,
    ),
    "seed": lambda: LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=1 << 18,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1 << 18,
    ),
}  # fmt: skip


def make_model(config: Any, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with random weights, made where it is used."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def make_episodes(
    num_tokens: int, *, episode_tokens: int, target_share: float, vocab_size: int
) -> list[TokenizedEpisode]:
    """Return random episodes that fill a row, each with answers of three tokens on `target_share` of its tokens.

    One that is too short for an answer has none.
    """
    rng, episodes = np.random.default_rng(0), []
    step = max(ANSWER_TOKENS + 1, round(ANSWER_TOKENS / target_share))
    for start in range(0, num_tokens, episode_tokens):
        length = min(episode_tokens, num_tokens - start)
        starts = np.arange(step - ANSWER_TOKENS, length - ANSWER_TOKENS + 1, step)
        spans = np.stack([starts, starts + ANSWER_TOKENS], axis=1)
        episodes.append(TokenizedEpisode(ids=rng.integers(3, vocab_size, length).astype(np.int32), spans=spans))
    return episodes


def make_row(episodes: Sequence[TokenizedEpisode], *, targets: str = "all") -> Batch:
    """Return a row of the episodes whose loss is the mean over its target tokens.

    Ends the benchmark in one line if all are too short for an answer.
    """
    if not any(len(episode.spans) for episode in episodes):
        longest = max(len(episode.ids) for episode in episodes)
        raise SystemExit(f"error: episodes of {longest} tokens or fewer hold no answer; make them longer, or fewer")
    counts = [len(e.spans) if targets == "all" else 1 for e in episodes]
    weights = [np.full(n, 1.0 / (ANSWER_TOKENS * sum(counts))) for n in counts]
    return join_row(
        episodes,
        targets="all" if targets == "all" else "last",
        weights=weights,
        tasks=[0] * len(episodes),
        episodes=tuple(range(len(episodes))),
    )


def run_row(model: Any, batch: Batch, *, autocast: AbstractContextManager[Any]) -> AnswerLoss:
    """Run a row forward, in `autocast`, and backward; the loss that is returned has no autograd graph any more."""
    with autocast:
        scored = row_loss(model, batch)
    scored.loss.backward()
    return replace(scored, loss=scored.loss.detach())


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    sides: Mapping[Any, Callable[[], Any]],
    *,
    repeats: int,
    device: torch.device,
    warmups: int = 1,
    around: Mapping[Any, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[Any, list[float]]:
    """Return the seconds of each side's runs; the sides take turns, so that a busy machine burdens all.

    around: contexts that a side's run stands in, entered before its time begins.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmups + repeats):
        for name, run in sides.items():
            with around[name]() if around and name in around else nullcontext():
                synchronize(device)
                started = time.perf_counter()
                run()
                synchronize(device)
                ended = time.perf_counter()
            if number >= warmups:
                seconds[name].append(ended - started)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], peers: Sequence[float]) -> dict[str, Any]:
    """Return how many times faster ours is: of the medians, and the least and most of the pairs that ran in turn.

    interval: of the pairs' median, 95 %, by their ranks; None of fewer than six pairs.
    """
    pairs = sorted(peer / our for our, peer in zip(ours, peers, strict=True))
    rank = int(binom.ppf(0.025, len(pairs), 0.5))  # the chance that so few pairs lie below the median is 2.5 % at most
    return {
        "ratio": statistics.median(peers) / statistics.median(ours),
        "min": pairs[0],
        "max": pairs[-1],
        "interval": [pairs[rank - 1], pairs[-rank]] if rank else None,
    }


def write_json(path: Path | None, content: Any) -> None:
    """Write what was measured, with the machine, where a path was given."""
    if path is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    path.write_text(json.dumps({"torch": torch.__version__, "device": device, "results": content}, indent=1) + "\n")
