"""Tokens a second that one core builds from a tokenised cache: packs planned, joined and made into tensors.

    python benchmarks/build_speed.py [--repeats 7]

The tasks are those of `manyicl demo` (short examples, the hardest case: many slices a token), tokenised once before the
clock starts. Printed: the minimum, median and maximum over the repeats of each stage, and of the whole.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from manyicl.demo import export_tasks
from manyicl.episodes.batch import BatchMaker
from manyicl.episodes.packing import iter_packs
from manyicl.episodes.plan import EpisodeSettings
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import lengths_of, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.models import ModelSettings, load_tokenizer
from manyicl.tasks.task import load_tasks


def main() -> None:
    """Time planning and building apart, for filled episodes and for single examples packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_tasks(folder / "tasks", num_tasks=30, num_train=120, num_test=40, seed=0)
        tokenizer = TaskTokenizer(load_tokenizer(ModelSettings(path="seed")), TemplateSettings())
        tasks = {t.name: tokenize_task(t, tokenizer=tokenizer) for t in load_tasks(folder / "tasks")}
    print("million tokens/s on one core: min / median / max")
    for label, settings in (
        ("filled episodes of 32,768", EpisodeSettings(token_budget=32768)),
        ("filled episodes of 2,048", EpisodeSettings(token_budget=2048)),
        ("single examples in packs of 2,048", EpisodeSettings(token_budget=2048, shots=0)),
    ):
        pack_tokens = settings.token_budget
        rates = [time_building(tasks, settings, pack_tokens=pack_tokens) for _ in range(repeats + 1)][1:]
        for stage, values in zip(("plan", "build", "whole"), zip(*rates, strict=True), strict=True):
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"{label:36} {stage:6} {low / 1e6:7.2f} / {middle / 1e6:7.2f} / {high / 1e6:7.2f}")


def time_building(tasks, settings, *, pack_tokens):
    """Return tokens a second of planning, of building, and of both, over about a million tokens."""
    lengths = [lengths_of(task) for task in tasks.values()]
    started = time.perf_counter()
    plan = iter_packs(lengths, settings=settings, pack_tokens=pack_tokens, seed=0)
    packs = list(islice(plan, 1_000_000 // pack_tokens))
    planned = time.perf_counter()
    maker = BatchMaker(tasks)
    num_tokens = sum(maker.make_batch([pack]).num_tokens for pack in packs)
    built = time.perf_counter()
    return num_tokens / (planned - started), num_tokens / (built - planned), num_tokens / (built - started)


if __name__ == "__main__":
    main()
