"""The main job on real input, killed and resumed once: train, then eval, curve and ask, which must agree.

    python benchmarks/real_small.py OUT [--kill-after 150] [KEY=VALUE ...]

Trains recipes/real-small.toml in another process, kills it (SIGKILL) after so many seconds of training, resumes it,
and prints the wall time of both. Then the three ways of asking the finished model are compared on one token sequence.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from manyicl.episodes.batch import BatchMaker
from manyicl.episodes.packing import Pack
from manyicl.episodes.plan import EpisodeSettings, iter_episodes
from manyicl.episodes.tokenized import join_examples, lengths_of, query_ids
from manyicl.evaluation.curves import score_episode
from manyicl.evaluation.loop import evaluate
from manyicl.inference.answering.questions import ask
from manyicl.inference.model import load_for_inference, tokenize_for
from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.tasks.task import Task, load_tasks
from manyicl.training.run_folder import RunFolder

RECIPE = Path(__file__).parents[1] / "recipes" / "real-small.toml"
TOLERANCE = 1e-5


def train_killed_once(out: Path, *, kill_after_s: float, overrides: list[str]) -> float:
    """Train in a process that is killed after its first checkpoint and `kill_after_s`; return all wall seconds."""
    command = [sys.executable, "-m", "manyicl", "train"]
    started = time.monotonic()
    first = subprocess.Popen([*command, str(RECIPE), *overrides, "--out", str(out)])
    while first.poll() is None:
        time.sleep(0.5)
        saved = any((out / "checkpoints").glob("checkpoint-*"))
        if saved and time.monotonic() - started > kill_after_s:
            first.send_signal(signal.SIGKILL)
            break
    if first.wait() != -signal.SIGKILL:
        raise SystemExit(f"the first process ended by itself with {first.returncode}: choose a smaller --kill-after")
    print(f"killed after {time.monotonic() - started:.0f} s", flush=True)
    subprocess.run([*command, "--resume", str(out)], check=True)
    return time.monotonic() - started


def check_agreement(out: Path, task: Task) -> float:
    """Return the largest relative difference in nats between one pass, engine, ask and transformers' own forward."""
    asked = load_for_inference(str(out), precision="fp32")
    tokenized = tokenize_for(task, asked)
    worst = 0.0
    settings = EpisodeSettings(token_budget=asked.max_tokens)
    episode = next(iter_episodes([lengths_of(tokenized, split="test")], settings=settings, seed=0))
    one_pass, _ = score_episode(
        asked.model, BatchMaker({task.name: tokenized}, split="test"), Pack(index=0, episodes=(episode,))
    )
    test = tokenized.splits["test"]
    for shots in range(0, len(one_pass), max(1, len(one_pass) // 8)):
        index = int(episode.examples[shots])
        before = join_examples(tokenized, split="test", indices=episode.examples[:shots]).ids
        answer = test.ids[test.answer_starts[index] : test.starts[index + 1]].tolist()
        query = query_ids(tokenized, split="test", index=index, after_shots=shots > 0)
        (engine,) = score_choices(asked.model, encode_prefix(asked.model, before), [query], [[answer]])
        plain = plain_nll(asked.model, [*before, *query, *answer], num_answer=len(answer))
        worst = max(worst, relative(engine[0], one_pass[shots]), relative(plain, one_pass[shots]))
    text = task.test[int(test.rows[0])].input
    told = ask(asked, task, [text], shots=2)[0]
    order = np.random.default_rng([0, 0]).permutation(len(tokenized.splits["train"]))[:2].astype(np.int32)
    before = join_examples(tokenized, split="train", indices=order).ids
    answer = asked.tokenizer.encode_answers([told.answer])[0]
    query = query_ids(tokenized, split="test", index=0, after_shots=True)
    if told.nll is not None:
        plain = plain_nll(asked.model, [*before, *query, *answer], num_answer=len(answer))
        worst = max(worst, relative(told.nll, plain))
    return worst


def plain_nll(model, ids, *, num_answer: int) -> float:
    """Return the nats of the last ids by transformers' own forward."""
    with torch.inference_mode():
        logits = model(torch.tensor([[int(i) for i in ids]]), use_cache=False).logits[0]
    targets = torch.tensor([int(i) for i in ids[-num_answer:]])
    return float(torch.nn.functional.cross_entropy(logits[-num_answer - 1 : -1], targets, reduction="sum"))


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def main() -> None:
    """Run it all; exit 1 where the three ways disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill-after", type=float, default=150.0, help="seconds")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    seconds = train_killed_once(options.out, kill_after_s=options.kill_after, overrides=options.overrides)
    print(f"trained in {seconds / 60:.1f} minutes, killed and resumed once")
    config = RunFolder(options.out).read_config()
    tasks = load_tasks(config.tasks.folder, names=config.tasks.names)
    for task in (tasks[0], next(t for t in tasks if t.labels)):
        difference = check_agreement(options.out, task)
        print(f"{task.name}: one pass, engine, ask and a plain forward agree to {difference:.1e} (relative, nats)")
        if difference > TOLERANCE:
            raise SystemExit(1)
    result = evaluate(str(options.out), [t for t in tasks if t.labels][:2], shots=(0, 4, 16), draws=2, queries=40)
    print([(c.task, [cell.score for cell in c.points]) for c in result.curves])


if __name__ == "__main__":
    main()
