"""What a sweep over shot counts costs beside its largest k alone: tokens encoded, and seconds.

    python benchmarks/sweep_cost.py [--shots 0,1,4,16,64,256] [--queries 200] [--repeats 5]

A task of `manyicl demo` is swept with a Llama of four layers (random weights: only time is measured). Printed: encoded
tokens of heads and shots, of the sweep and of the largest k alone (goal: at most 1.05 times), and the seconds of the
sweep beside those of encoding the largest k once and of asking the queries after each k, already encoded (goal: at most
1.25 times). Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from manyicl.demo import export_tasks
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import query_ids, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.evaluation.answering import answer_draw
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.engine import choose_engine
from manyicl.inference.model import InferenceModel
from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.models import ModelSettings, load_tokenizer
from manyicl.tasks.task import load_tasks

MOST_TOKENS, MOST_TIME = 1.05, 1.25


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", default="0,1,4,16,64,256")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    shots = tuple(int(k) for k in options.shots.split(","))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    tokenizer, task = load_task()
    model = make_model(len(tokenizer.tokenizer)).to(device)
    sweep = Sweep(shots=shots, num_draws=1, num_queries=options.queries, max_tokens=16384)
    run_sweep(model, task, tokenizer, replace(sweep, shots=(0,)))  # warm up, and the trial of sharing
    num_tokens = run_sweep(model, task, tokenizer, sweep).count.num_prefix_tokens
    num_alone = run_sweep(model, task, tokenizer, replace(sweep, shots=(max(shots),))).count.num_prefix_tokens
    print(f"task {task.task.name}, shots {options.shots}, one draw, {device}")
    print(f"encoded tokens: sweep {num_tokens:,}, largest k alone {num_alone:,}: {num_tokens / num_alone:.3f} times")
    whole, apart = [], []
    for _ in range(options.repeats):  # in turn, so that a busy machine burdens both
        whole.append(time_it(lambda: run_sweep(model, task, tokenizer, sweep), device))
        apart.append(time_apart(model, TaskSweep(task, tokenizer=tokenizer, sweep=sweep), device))
    ratio = statistics.median(whole) / statistics.median(apart)
    for label, values in (("sweep", whole), ("largest k once + queries of each k", apart)):
        print(f"{label}: {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    print(f"{ratio:.3f} times")
    if num_tokens / num_alone > MOST_TOKENS or ratio > MOST_TIME:
        raise SystemExit(1)


def load_task():
    """Return a tokenizer and one task of the demo, in ids."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_tasks(folder / "tasks", num_tasks=1, num_train=320, num_test=200, seed=0)
        tokenizer = TaskTokenizer(load_tokenizer(ModelSettings(path="seed")), TemplateSettings())
        task = load_tasks(folder / "tasks")[0]
        labels = tuple(sorted({e.answer for split in (task.train, task.test) for e in split}))
        task = replace(task, family="classification", metric="accuracy", labels=labels)  # its answers are few: choose
        return tokenizer, tokenize_task(task, tokenizer=tokenizer)


def make_model(vocab_size):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16384,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def run_sweep(model, task, tokenizer, sweep):
    """Ask a whole sweep; return the engine, with its count of encoded tokens."""
    engine = choose_engine(InferenceModel("made here", model, tokenizer, sweep.max_tokens, trained_shots={}))
    plan = TaskSweep(task, tokenizer=tokenizer, sweep=sweep)
    for draw in range(sweep.num_draws):
        for _ in answer_draw(engine, plan, draw=draw):
            pass
    return engine


def time_apart(model, plan, device):
    """Return the seconds of encoding the most shots once, and of asking the queries behind each k, encoded before."""
    largest = max(plan.asked_shots)
    ids = [plan.tokenized.head_ids, plan.prefix_ids(0, start=0, stop=largest)]

    def encode():
        return encode_prefix(model, ids[1], after=encode_prefix(model, ids[0], room=sum(map(len, ids))))

    seconds = time_it(encode, device)
    for shots in plan.asked_shots:
        head = encode_prefix(model, plan.tokenized.head_ids)
        prefix = encode_prefix(model, plan.prefix_ids(0, start=0, stop=shots), after=head)
        queries = [query_ids(plan.tokenized, split="test", index=int(q), after_shots=shots > 0) for q in plan.queries]
        known = {key: [answer for _, answer in pairs] for key, pairs in plan.written.items()}
        written = [known[plan.candidates[int(q)]] for q in plan.queries]
        seconds += time_it(lambda p=prefix, q=queries, w=written: score_choices(model, p, q, w), device)
    return seconds


def time_it(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
