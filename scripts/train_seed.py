"""Train the seed model of the embedded world from random weights: `python -m scripts.train_seed --out seed`.

A plain language model: next-token loss on every token of the world's documents (seed_corpus.documents). With a GPU
it takes ten minutes; on two CPU cores, hours. It ends after `--minutes` of wall time, whatever the machine. Prints, and
writes to curve.json and curve.txt, what it can do in context on tasks of rules and formats that it never reads:
manyicl's own template, the open pool.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scripts.seed_corpus.documents import iter_documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyicl.demo.lexicon import all_words, load_lexicon
from manyicl.demo.tasks import KINDS, iter_tasks, write_tasks
from manyicl.episodes.plan import EpisodeSettings, iter_episodes
from manyicl.episodes.tokenized import join_examples, lengths_of, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.models.places import TEMPLATE
from manyicl.tasks.task import load_tasks

SHOT_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 96)
# Open-pool tasks of these seeds are asked while it trains, and at the end.
PROBE_SEED, FINAL_SEED = 10**6, 10**6 + 1
# Times that every word of the world is read for the tokenizer, beside documents: most become one token.
WORD_READINGS = 600


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
    optimizer: str
    minutes: float
    tasks_per_kind: int


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
    documents = islice(iter_documents(seed=plan.seed, shares=plan.shares), 4000)
    words = [" ".join(all_words(load_lexicon()))] * WORD_READINGS
    tokenizer.train_from_iterator(chain(documents, words), trainer)
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
    """Episodes of open-pool tasks in manyicl's template: ids, spans of answers, and the kind of each."""

    rows: Sequence[Tensor]
    spans: Sequence[np.ndarray[Any, Any]]
    kinds: Sequence[str]


def make_probe(plan: Plan, tokenizer: PreTrainedTokenizerFast, *, seed: int, tasks_per_kind: int) -> Probe:
    """Return one filled episode of each of some open-pool tasks of every kind."""
    writer = TaskTokenizer(tokenizer, TEMPLATE)
    drawn = list(islice(iter_tasks(KINDS, seed=seed, pool="open"), tasks_per_kind * len(KINDS)))
    rows, spans, kinds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), drawn, num_train=145, num_test=1, seed=0)
        for task in load_tasks(folder):
            tokenized = tokenize_task(task, tokenizer=writer, cache_dir=Path(folder) / "cache")
            settings = EpisodeSettings(token_budget=plan.row_tokens)
            episode = next(iter_episodes([lengths_of(tokenized, split="train")], settings=settings, seed=0))
            built = join_examples(tokenized, split="train", indices=episode.examples)
            rows.append(torch.from_numpy(built.ids.astype(np.int64)))
            spans.append(built.spans)
            kinds.append(task.name.rpartition("_")[0])
    return Probe(rows, spans, kinds)


@torch.inference_mode()
def run_probe(model: LlamaForCausalLM, probe: Probe) -> dict[str, list[float | None]]:
    """Return, by kind and for all, the share of answers that are greedy, terminator and all, by bucket of shots."""
    device = next(model.parameters()).device
    hits: dict[str, list[list[float]]] = {name: [[] for _ in SHOT_EDGES] for name in ("all", *sorted(set(probe.kinds)))}
    for ids_T, spans, kind in zip(probe.rows, probe.spans, probe.kinds, strict=True):
        greedy = model(input_ids=ids_T[None].to(device), use_cache=False).logits[0, :-1].argmax(-1).cpu()
        right = greedy == ids_T[1:]
        for shots, (start, stop) in enumerate(spans):
            bucket = int(np.searchsorted(SHOT_EDGES, shots, side="right")) - 1
            for name in ("all", kind):
                hits[name][bucket].append(float(right[start - 1 : stop - 1].all()))
    return {name: [round(float(np.mean(b)), 3) if b else None for b in buckets] for name, buckets in hits.items()}


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), for matrices; those of one shape step together.

    Updates have the root mean square of AdamW's (0.2), so that one learning rate serves both.
    """

    def __init__(self, matrices: Sequence[Tensor], *, lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        groups = [{"params": [matrix for matrix in matrices if tuple(matrix.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # noqa: ARG002 (torch's signature)
        """Take one step along the gradients."""
        for group in self.param_groups:
            matrices = group["params"]
            grad_NRC = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            mean_NRC = state.setdefault("mean", torch.zeros_like(grad_NRC)).lerp_(grad_NRC, 1 - group["momentum"])
            update_NRC = make_orthogonal(grad_NRC.lerp(mean_NRC, group["momentum"]))
            update_NRC *= 0.2 * max(update_NRC.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["decay"])
            torch._foreach_add_(matrices, list(update_NRC.unbind()), alpha=-group["lr"])


def make_orthogonal(update_NRC: Tensor) -> Tensor:
    """Return the matrices with all singular values near 1, by five Newton-Schulz steps."""
    wide = update_NRC.shape[1] <= update_NRC.shape[2]
    x = update_NRC if wide else update_NRC.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def make_optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest."""
    fused = next(model.parameters()).device.type == "cuda"
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    settings = {"lr": plan.learning_rate, "betas": (0.9, 0.98), "weight_decay": 0.1, "fused": fused}
    if plan.optimizer == "adamw":
        return [adamw(model.parameters(), **settings)]
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    return [Muon(matrices, lr=plan.learning_rate), adamw(others, **settings)]


def compile_loss(model: LlamaForCausalLM, ids_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the mean next-token loss as a function of ids; on a GPU compiled, in CUDA graphs where they work."""
    device = ids_BT.device.type

    def loss_of(ids_BT: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
            return functional.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())

    if device == "cpu":
        return loss_of
    for mode in ("reduce-overhead", "default"):
        try:
            compiled: Callable[[Tensor], Tensor] = torch.compile(loss_of, mode=mode)
            for _ in range(4):
                compiled(ids_BT).backward()
                model.zero_grad()
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"torch.compile, {mode}: {' '.join(str(error).split())[:300]}", flush=True)
            torch._dynamo.reset()
        else:
            print(f"torch.compile: {mode}", flush=True)
            return compiled
    return loss_of


def learning_rate_at(share: float, *, peak: float) -> float:
    """Return the rate after a share of the time: warmed up over 2 %, level, then to zero over the last 40 %."""
    return peak * min(1.0, share / 0.02, max(0.0, 1 - share) / 0.4)


def train(plan: Plan, *, device: str, num_workers: int, out: Path, started: float) -> None:
    """Train until `plan.minutes` after `started` and write model, tokenizer and curve to `out`."""
    tokenizer = train_tokenizer(plan)
    probes = {
        seed: make_probe(plan, tokenizer, seed=seed, tasks_per_kind=count)
        for seed, count in ((PROBE_SEED, max(1, plan.tasks_per_kind // 4)), (FINAL_SEED, plan.tasks_per_kind))
    }
    model = make_model(plan).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {time.monotonic() - started:.0f} s to prepare", flush=True)
    asked = probes[PROBE_SEED]
    run_probe(model, Probe(asked.rows[:1], asked.spans[:1], asked.kinds[:1]))  # a GPU's first call is slow
    before = time.monotonic()
    run_probe(model, probes[PROBE_SEED])
    # What the last probe and saving will take.
    reserve_s = 10 + 1.5 * (time.monotonic() - before) * (
        1 + len(probes[FINAL_SEED].rows) / len(probes[PROBE_SEED].rows)
    )
    rows = Rows(plan, tokenizer, seed=plan.seed)
    loader = iter(
        DataLoader(
            rows,
            batch_size=plan.rows_per_step,
            num_workers=num_workers,
            pin_memory=device == "cuda",
            prefetch_factor=8 if num_workers else None,
        )
    )
    loss_of = compile_loss(model, next(loader).to(device, torch.long))
    optimizers = make_optimizers(model, plan)
    log: list[dict[str, Any]] = []
    begun, step, share, next_probe = time.monotonic(), 0, 0.0, 0.1
    length_s = started + 60 * plan.minutes - reserve_s - begun
    if length_s <= 0:
        raise SystemExit(f"--minutes {plan.minutes}: preparing and probing take longer; give more")
    recent = torch.zeros((), device=device)
    while share < 1:
        ids_BT = next(loader).to(device, torch.long, non_blocking=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(share, peak=plan.learning_rate)
        if device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        # A graph's output lies where the next run writes.
        recent = torch.lerp(recent, loss.detach(), 0.01) if step else loss.detach().clone()
        step += 1
        if step % 8 == 0 and device == "cuda":
            torch.cuda.synchronize()  # else the clock would run ahead of the work
        share = (time.monotonic() - begun) / length_s
        if share >= next_probe or share >= 1:
            next_probe += 0.1
            if not math.isfinite(float(recent)):
                raise SystemExit(f"step {step}: the loss is not finite; lower --learning-rate")
            tokens = step * plan.rows_per_step * plan.row_tokens
            match = run_probe(model, probes[PROBE_SEED])
            log.append({"step": step, "tokens": tokens, "loss": float(recent), "match": match})
            print(f"{share:5.0%} {tokens / 1e6:6.0f}M tokens, loss {float(recent):.3f}", match["all"], flush=True)
    save(plan, model, tokenizer, log=log, final=run_probe(model, probes[FINAL_SEED]), seconds=length_s, out=out)


def save(
    plan: Plan,
    model: LlamaForCausalLM,
    tokenizer: Any,
    *,
    log: list[dict[str, Any]],
    final: dict[str, list[float | None]],
    seconds: float,
    out: Path,
) -> None:
    """Write bf16 weights, the tokenizer, curve.json and, for people, curve.txt."""
    whole = copy.deepcopy(model).to(torch.bfloat16)
    whole.tie_weights()
    whole.config.dtype = torch.bfloat16
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "plan": vars(plan), "device": place, "seconds": round(seconds), "shot_edges": SHOT_EDGES, "log": log,
        "final": final,
    }  # fmt: skip
    (out / "curve.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [f"{'from shots':14}" + "".join(f"{edge:>6}" for edge in SHOT_EDGES)]
    for name, shares in final.items():
        lines.append(f"{name:14}" + "".join("     -" if one is None else f"{100 * one:6.0f}" for one in shares))
    (out / "curve.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


def main() -> None:
    """Read the options and train."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="wall time of the whole command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--shares", default="text=0.22,tasks=0.75,prose=0.03", help="sources of the documents")
    parser.add_argument("--tasks-per-kind", type=int, default=12, help="tasks of each kind that are asked at the end")
    parser.add_argument("--workers", type=int, default=3, help="processes that write documents")
    args = parser.parse_args()
    plan = Plan(
        seed=args.seed,
        shares={name: float(share) for name, share in (part.split("=") for part in args.shares.split(","))},
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        vocab_size=4096,
        row_tokens=args.row_tokens,
        rows_per_step=args.rows_per_step,
        learning_rate=args.learning_rate,
        optimizer=args.optimizer,
        minutes=args.minutes,
        tasks_per_kind=args.tasks_per_kind,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(plan, device=device, num_workers=args.workers, out=args.out, started=started)


if __name__ == "__main__":
    main()
