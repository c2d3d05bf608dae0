"""lm-evaluation-harness through our engine against its own `hf` model: the same requests, seconds and scores.

    pip install ".[bench]"
    python benchmarks/lm_eval_backend.py --model MODEL [--tasks FOLDER] [--task trec_coarse] [--queries 16] [--rounds 3]

Both models are loaded once, in this process, in float32, and `lm_eval.simple_evaluate` asks them in turn: ours, then
`hf`, in each round. Seconds are those of a whole call, with the harness's own work on both sides. Before the first
round `hf` is tried with several batch sizes, and keeps the fastest. Three settings: shots drawn for each query, as the
harness does by default (what a query's choices have in common is shared); the first rows as shots of every query
(`first_n`: the shots are shared too); and generation after these.

Every likelihood and text of the two is compared; the largest difference is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch

from manyicl.tasks.task import load_tasks

SHARED = Path(__file__).parents[2] / "shared"
BATCH_SIZES = (1, 4, 16)
SETTINGS: dict[str, dict[str, Any]] = {
    "shots drawn for each query": {},
    "the same shots": {"fewshot_config": {"sampler": "first_n"}},
    "the same shots, generated": {
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Write a task file of the harness for each setting; return its name -> the setting."""
    (task,) = load_tasks(options.tasks, names=[options.task])
    if not task.labels:
        raise SystemExit(f"--task {task.name}: has open answers; name a task with labels")
    for split, examples in (("train", task.train[: options.shots]), ("test", task.test[: options.queries])):
        rows = [{"text": e.input, "label": task.labels.index(e.answer), "choices": task.labels} for e in examples]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    names = {}
    for place, (setting, keys) in enumerate(SETTINGS.items()):
        name = f"setting{place}"
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
            "training_split": "train",
            "fewshot_split": "train",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "num_fewshot": options.shots,
            "metric_list": [{"metric": "acc"}],
            **keys,
        }
        (folder / f"{name}.yaml").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        names[name] = setting
    return names


def ask(model: Any, name: str, manager: Any) -> tuple[float, dict[str, Any]]:
    """Return the seconds of one evaluation, and what the harness says."""
    import lm_eval

    started = time.perf_counter()
    said = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    return time.perf_counter() - started, said


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    """Return the largest difference of two likelihoods in nats; infinity if a generated text differs."""
    largest = 0.0
    for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        for said, wanted in zip(one["resps"], other["resps"], strict=True):
            if isinstance(said[0], str):
                largest = max(largest, 0.0 if said == wanted else float("inf"))
            else:
                largest = max(largest, abs(said[0][0] - wanted[0][0]))
    return largest


def run(options: argparse.Namespace, folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from manyicl.harness.model import ManyICL

    torch.set_num_threads(options.threads)
    ours = ManyICL(options.model, dtype="float32", device=options.device)
    theirs = HFLM(pretrained=options.model, dtype="float32", device=options.device)
    names = write_tasks(folder, options)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    first = next(iter(names))
    tried = {}
    for size in BATCH_SIZES:
        theirs.batch_size_per_gpu = size
        tried[size] = ask(theirs, first, manager)[0]
    theirs.batch_size_per_gpu = min(tried, key=tried.__getitem__)
    print(f"hf's batch size: {theirs.batch_size_per_gpu}, of { ({size: round(s, 1) for size, s in tried.items()}) } s")
    for name, setting in names.items():
        ask(ours, name, manager)  # once to get warm; hf is warm from its trials
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.rounds):
            our_s, our_said = ask(ours, name, manager)
            their_s, their_said = ask(theirs, name, manager)
            seconds["ours"].append(our_s)
            seconds["theirs"].append(their_s)
        ratios = [their / our for our, their in zip(seconds["ours"], seconds["theirs"], strict=True)]
        print(
            f"{setting}: ours {statistics.median(seconds['ours']):.2f} s,"
            f" hf {statistics.median(seconds['theirs']):.2f} s,"
            f" {statistics.median(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f});"
            f" largest difference {largest_difference(our_said, their_said, name):.1e} nats",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub name that both can load")
    parser.add_argument("--tasks", type=Path, default=SHARED / "data" / "tasks", help="folder of task files")
    parser.add_argument("--task", default="trec_coarse", help="one of them, with labels")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{folder}/cache")
        run(parser.parse_args(), Path(folder))


if __name__ == "__main__":
    main()
