"""The held-out score after LoRA on a float8 base against the same on a bf16 base: paired over training seeds.

    python benchmarks/float8_quality.py --base FOLDER --tasks FOLDER --out FOLDER [--seeds 5] [--steps 40]
                                        [--tokens 4096] [--queries 100] [--processes 10] [--seconds 220]

Each run is `manyicl train` on twelve real tasks (rank 16, four rows of --tokens a step) and then `manyicl eval` on four
others, with as many shots as fit, by bases of both kinds, which meet the same episodes, shots and queries; the base
without an adapter is asked in both kinds too, with the first seed's shots. Processes share the GPU: each takes the next
item, none is begun after --seconds, and what is done lies in OUT/*.json, so a second call goes on. The table has the
mean of the tasks' scores (0 to 1) and of the nats of the right answers, float8 less bf16, with Student's 95 % interval
over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from manyicl.episodes import TaskTokenizer, TemplateSettings, default_cache_dir, tokenize_task
from manyicl.evaluation import evaluate
from manyicl.inference.model import load_for_inference
from manyicl.intervals import t_interval
from manyicl.models import ModelSettings, load_tokenizer
from manyicl.tasks import load_tasks
from manyicl.training.recipe import make_config
from manyicl.training.run import train

TRAINED = (
    "atis", "clinc150", "movie_polarity", "mrpc", "snips", "sst2", "tweet_irony", "snli", "arc_easy",
    "commonsenseqa", "piqa", "scitldr_title",
)  # fmt: skip
HELD_OUT = ("agnews", "openbookqa", "rte", "tweet_emotion")
KINDS = ("bf16", "float8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row, and the most of a query with its shots")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=220.0, help="no item is begun after so long")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # KIND:SEED, in a process of its own
    options = parser.parse_args()
    if options.only:
        kind, _, seed = options.only.partition(":")
        do_item(options, kind, None if seed == "base" else int(seed))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    cache_ids(options)
    items = [f"{kind}:{seed}" for seed in (*range(options.seeds), "base") for kind in KINDS]
    waiting = [item for item in items if not result_file(options, item).exists()]
    running = {}
    while waiting or running:
        while waiting and len(running) < options.processes and time.monotonic() - started < options.seconds:
            item = waiting.pop(0)
            command = [sys.executable, __file__, *sys.argv[1:], "--only", item]
            with result_file(options, item).with_suffix(".log").open("w") as log:
                running[item] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        if not running:
            print(f"left out for want of time: {', '.join(waiting)}")
            break
        time.sleep(0.2)
        for item in [item for item, process in running.items() if process.poll() is not None]:
            code = running.pop(item).returncode
            print(
                f"{item}: {'done' if code == 0 else f'failed ({code})'} at {time.monotonic() - started:.0f} s",
                flush=True,
            )
    report(options)


def result_file(options, item):
    return options.out / f"{item.replace(':', '-')}.json"


def cache_ids(options):
    """Tokenise all tasks once, so that the processes find their ids."""
    tokenizer = TaskTokenizer(load_tokenizer(ModelSettings(path=options.base)), TemplateSettings())
    for task in load_tasks(options.tasks, names=(*TRAINED, *HELD_OUT)):
        tokenize_task(task, tokenizer=tokenizer, cache_dir=default_cache_dir())


def do_item(options, kind, seed):
    """Train an adapter, unless `seed` is None, and write what it, or the base, answers."""
    torch.set_num_threads(1)
    item = f"{kind}:{'base' if seed is None else seed}"
    quantize = "float8" if kind == "float8" else None
    begun = time.monotonic()
    path, losses = options.base, None
    if seed is not None:
        run = options.out / f"run-{kind}-{seed}"
        train(recipe(options, seed=seed, quantize=quantize), out=run, resume=run.exists())
        losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
        path = str(run)
    trained_s = time.monotonic() - begun
    loaded = load_for_inference(path, precision="bf16", max_tokens=options.tokens, quantize=quantize or "none")
    tasks = load_tasks(options.tasks, names=HELD_OUT)
    found = evaluate(loaded, tasks, shots=("fill",), draws=1, queries=options.queries, seed=seed or 0)
    points = {curve.task: curve.points[-1] for curve in found.curves}
    content = {
        "item": item,
        "scores": {task: point.score for task, point in points.items()},
        "nats": {task: point.nll for task, point in points.items()},
        "losses": losses,
        "train_s": trained_s,
        "eval_s": time.monotonic() - begun - trained_s,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }
    result_file(options, item).write_text(json.dumps(content, indent=1) + "\n")


def recipe(options, *, seed, quantize):
    """Return the recipe of one run."""
    return make_config(
        {
            "seed": seed,
            "tasks": {"folder": options.tasks, "names": TRAINED},
            "model": {"path": options.base, "precision": "bf16", "quantize": quantize, "lora": {}},
            "episodes": {"token_budget": options.tokens, "mixture": "uniform"},
            "train": {
                "num_steps": options.steps,
                "packs_per_step": 4,
                "learning_rate": 1e-3,
                "warmup_steps": max(1, options.steps // 10),
                "log_every_steps": max(1, options.steps // 4),
                "checkpoint_every_steps": options.steps,
                "validation_tokens": 0,
                "keep": "last",
            },
            "held_out": {"episodes": 0},
        },
        source="float8_quality",
    )


def report(options):
    """Print the scores of every seed, and the paired differences with their interval."""
    found = {}
    for file in sorted(options.out.glob("*-*.json")):
        content = json.loads(file.read_text())
        found[content["item"]] = content
    differences = {"scores": [], "nats": []}
    for seed in (*range(options.seeds), "base"):
        pair = [found.get(f"{kind}:{seed}") for kind in KINDS]
        if None in pair:
            continue
        means = {key: [statistics.mean(side[key].values()) for side in pair] for key in differences}
        print(
            f"seed {seed}: score {means['scores'][0]:.4f} (bf16) {means['scores'][1]:.4f} (float8); nats"
            f" {means['nats'][0]:.4f} {means['nats'][1]:.4f}; trained in {pair[0]['train_s']:.0f} and"
            f" {pair[1]['train_s']:.0f} s, asked in {pair[0]['eval_s']:.0f} and {pair[1]['eval_s']:.0f} s"
        )
        if seed != "base":
            for key, (plain, stored) in means.items():
                differences[key].append(stored - plain)
    summary = {}
    for key, values in differences.items():
        if len(values) > 1:
            interval = t_interval(np.array(values))
            summary[key] = {"mean": interval.mean, "low": interval.low, "high": interval.high, "each": values}
            print(
                f"{key}, float8 less bf16, {len(values)} seeds: {interval.mean:+.4f}"
                f" [{interval.low:+.4f}, {interval.high:+.4f}]"
            )
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
