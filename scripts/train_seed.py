"""Train the seed model of the embedded world from random weights: `python scripts/train_seed.py --out seed`.

A plain language model: next-token loss on every token of the world's documents (manyicl.world.documents). With a GPU
it takes ten minutes; on two CPU cores, hours. Prints, and writes to curve.json, what it can do in context on tasks of
rules and formats that it never reads: manyicl's own template, the open pool.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyicl.batches import lengths_of
from manyicl.episodes import EpisodeSettings, plan_episode
from manyicl.tasks import load_tasks
from manyicl.tokens import TaskTokenizer, join_examples, tokenize_task
from manyicl.world.documents import iter_documents
from manyicl.world.seed import TEMPLATE
from manyicl.world.tasks import KINDS, iter_tasks, write_tasks

SHOT_EDGES = (0, 1, 2, 4, 8, 16, 32, 64)
# Documents of another seed, never trained on.
HELD_OUT_SEED = 10**6


@dataclass(frozen=True)
class Plan:
    """Everything that decides the model."""

    seed: int
    shares: dict[str, float]
    width: int
    layers: int
    heads: int
    vocab_size: int
    row_tokens: int
    rows_per_step: int
    learning_rate: float
    minutes: float


def train_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE in which a word is the same token at a line's start and after a space.

    Each line, and each run of line ends, is written behind a space, which the decoder takes away again: a tiny model
    should not have to learn every word twice. Lost are a line's single leading space and its last trailing one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(iter_documents(seed=plan.seed, shares=plan.shares), 8000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Rows(IterableDataset[Tensor]):
    """Endless rows of `row_tokens` + 1 ids, documents one after the other, each behind <s>."""

    def __init__(self, plan: Plan, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
        self.plan, self.tokenizer, self.seed = plan, tokenizer, seed

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        documents = iter_documents(seed=self.seed, shares=self.plan.shares, start=start, step=step)
        length = self.plan.row_tokens + 1
        ids: list[int] = []
        while True:
            for encoding in self.tokenizer.backend_tokenizer.encode_batch(list(islice(documents, 32))):
                ids.extend(encoding.ids)
            while len(ids) >= length:
                yield torch.tensor(ids[:length], dtype=torch.int32)
                ids = ids[length:]


def make_model(plan: Plan) -> LlamaForCausalLM:
    """Return the model with random weights."""
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=plan.vocab_size,
            hidden_size=plan.width,
            intermediate_size=plan.width * 11 // 4 // 16 * 16,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.heads,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


@dataclass(frozen=True)
class Probe:
    """Episodes of open-pool tasks in manyicl's template; ids (E, T), spans of answers, and the kind of each."""

    ids_ET: Tensor
    spans: Sequence[np.ndarray[Any, Any]]
    kinds: Sequence[str]


def make_probe(plan: Plan, tokenizer: PreTrainedTokenizerFast, *, tasks_per_kind: int) -> Probe:
    """Return one filled episode of each of some open-pool tasks of every kind."""
    writer = TaskTokenizer(tokenizer, TEMPLATE)
    drawn = list(islice(iter_tasks(KINDS, seed=HELD_OUT_SEED, pool="open"), tasks_per_kind * len(KINDS)))
    rows, spans, kinds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), drawn, num_train=72, num_test=1, seed=0)
        for task in load_tasks(folder):
            tokenized = tokenize_task(task, tokenizer=writer, cache_dir=Path(folder) / "cache")
            settings = EpisodeSettings(token_budget=plan.row_tokens)
            episode = plan_episode(lengths_of(tokenized, split="train"), settings=settings)
            built = join_examples(tokenized, split="train", indices=episode.examples)
            rows.append(torch.from_numpy(built.ids.astype(np.int64)))
            spans.append(built.spans)
            kinds.append(task.name.rpartition("_")[0])
    return Probe(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), spans, kinds)


@torch.inference_mode()
def run_probe(model: LlamaForCausalLM, probe: Probe) -> dict[str, list[float | None]]:
    """Return, by kind and for all, the share of answers that are greedy, terminator aside, by bucket of shots."""
    device = next(model.parameters()).device
    hits: dict[str, list[list[float]]] = {name: [[] for _ in SHOT_EDGES] for name in ("all", *sorted(set(probe.kinds)))}
    for ids_ET, spans, kind in zip(probe.ids_ET.split(1), probe.spans, probe.kinds, strict=True):
        greedy = model(input_ids=ids_ET.to(device), use_cache=False).logits[0, :-1].argmax(-1).cpu()
        right = greedy == ids_ET[0, 1:]
        for shots, (start, stop) in enumerate(spans):
            bucket = int(np.searchsorted(SHOT_EDGES, shots, side="right")) - 1
            for name in ("all", kind):
                hits[name][bucket].append(float(right[start - 1 : stop - 2].all()))
    return {name: [round(float(np.mean(b)), 3) if b else None for b in buckets] for name, buckets in hits.items()}


def learning_rate_at(share: float, *, peak: float) -> float:
    """Return the rate after a share of the time: warmed up over 2 %, level, then to zero over the last 30 %."""
    return peak * min(1.0, share / 0.02, (1 - share) / 0.3)


def train(plan: Plan, *, device: str, num_workers: int, out: Path) -> None:
    """Train for `plan.minutes` and write model, tokenizer and curve.json to `out`."""
    tokenizer = train_tokenizer(plan)
    probe = make_probe(plan, tokenizer, tasks_per_kind=3)
    model = make_model(plan).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(probe.kinds)} probe episodes", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=device == "cuda"
    )
    rows = Rows(plan, tokenizer, seed=plan.seed)
    loader = iter(DataLoader(rows, batch_size=plan.rows_per_step, num_workers=num_workers, pin_memory=device == "cuda"))
    compiled: Any = torch.compile(model) if device == "cuda" else model
    log: list[dict[str, Any]] = []
    started, step, share, next_probe = time.monotonic(), 0, 0.0, 0.0
    recent = torch.zeros((), device=device)
    while share < 1:
        ids_BT = next(loader).to(device, torch.long, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(share, peak=plan.learning_rate)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = compiled(input_ids=ids_BT[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = 0.99 * recent + 0.01 * loss.detach()
        step += 1
        if step == 1:
            started, recent = time.monotonic(), loss.detach()  # compiling is not training
        share = (time.monotonic() - started) / (60 * plan.minutes)
        if share >= next_probe or share >= 1:
            next_probe += 0.1
            if not math.isfinite(float(recent)):
                raise SystemExit(f"step {step}: the loss is not finite; lower --learning-rate")
            tokens = step * plan.rows_per_step * plan.row_tokens
            log.append({"step": step, "tokens": tokens, "loss": float(recent), "match": run_probe(model, probe)})
            print(
                f"{share:5.0%} {tokens / 1e6:7.0f}M tokens, loss {float(recent):.3f}",
                log[-1]["match"]["all"],
                flush=True,
            )
            save(plan, model, tokenizer, log=log, seconds=time.monotonic() - started, out=out)


def save(
    plan: Plan, model: LlamaForCausalLM, tokenizer: Any, *, log: list[dict[str, Any]], seconds: float, out: Path
) -> None:
    """Write bf16 weights, the tokenizer and curve.json."""
    whole = copy.deepcopy(model).to(torch.bfloat16)
    whole.tie_weights()
    whole.config.dtype = torch.bfloat16
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "plan": vars(plan), "device": place, "seconds": round(seconds), "shot_edges": SHOT_EDGES, "log": log,
    }  # fmt: skip
    (out / "curve.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--shares", default="text=0.22,tasks=0.75,prose=0.03", help="sources of the documents")
    parser.add_argument("--workers", type=int, default=2, help="processes that write documents")
    args = parser.parse_args()
    plan = Plan(
        seed=args.seed,
        shares={name: float(share) for name, share in (part.split("=") for part in args.shares.split(","))},
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        vocab_size=4096,
        row_tokens=2048,
        rows_per_step=args.rows_per_step,
        learning_rate=args.learning_rate,
        minutes=args.minutes,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(plan, device=device, num_workers=args.workers, out=args.out)


if __name__ == "__main__":
    main()
