"""Do balanced or nearest shots beat random ones at equal tokens? A table of paired differences with intervals.

    python benchmarks/chosen_shots.py MODEL OUT [--tasks FOLDER] [--task NAME ...] [--budget 768] [--queries 40]

Every way of choosing shots fills the same number of tokens, after the same queries, on real tasks. A result file per
way is written to OUT, so a run that was stopped goes on. The last column is the time for all queries on this machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from manyicl.evaluation.difference import Difference, compare_results
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.results import Evaluation
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import load_tasks

TASKS = Path(__file__).parents[2] / "shared" / "data" / "tasks"
# Short inputs, so that a CPU reads thousands of shots in minutes: five families of labels, options, and open answers.
NAMES = (
    "banking77",
    "commonsenseqa",
    "pros_cons",
    "sick",
    "snips",
    "sst2",
    "trec_coarse",
    "trec_fine",
    "tweet_emotion",
    "webquestions",
)
RANDOM = "random"
WAYS: dict[str, dict[str, Any]] = {
    RANDOM: {},
    "balanced": {"choose": "balanced"},
    "nearest 4": {"choose": "nearest", "num_nearest": 4},
    "nearest 8": {"choose": "nearest", "num_nearest": 8},
    "nearest 16": {"choose": "nearest", "num_nearest": 16},
}


def tell(difference: float, low: float | None, high: float | None) -> str:
    """Return a difference in points with its interval; a star if the interval leaves 0 out."""
    if low is None or high is None:
        return f"{100 * difference:+.1f}"
    star = "*" if low > 0 or high < 0 else ""
    return f"{100 * difference:+.1f} [{100 * low:+.0f}, {100 * high:+.0f}]{star}"


def print_table(results: dict[str, Evaluation], seconds: dict[str, float]) -> None:
    """Print scores with random shots, and what each other way adds to them, in points."""
    differences: dict[str, Difference] = {
        way: compare_results(results[RANDOM], result) for way, result in results.items() if way != RANDOM
    }
    print(f"| task | shots | random, % | {' | '.join(f'{way}, points' for way in differences)} |")
    print("|---|---|---|" + "---|" * len(differences))
    for curve in results[RANDOM].curves:
        point = curve.points[0]
        cells = [
            next((tell(c.difference, c.low, c.high) for c in one.cells if c.task == curve.task), "-")
            for one in differences.values()
        ]
        score = "-" if point.score is None else f"{100 * point.score:.1f}"
        shots = "-" if point.mean_shots is None else f"{point.mean_shots:.0f}"
        print(f"| {curve.task} | {shots} | {score} | {' | '.join(cells)} |")
    means = [tell(one.means[0].difference, one.means[0].low, one.means[0].high) for one in differences.values()]
    print(f"| mean | | | {' | '.join(means)} |")
    print("seconds: " + ", ".join(f"{way} {spent:.0f}" for way, spent in seconds.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--task", nargs="+", default=list(NAMES))
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--budget", type=int, default=768)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_for_inference(options.model, precision="fp32", max_tokens=options.budget)
    tasks = load_tasks(options.tasks, names=options.task)
    results: dict[str, Evaluation] = {}
    seconds: dict[str, float] = {}
    for way in dict.fromkeys([RANDOM, *options.way]):
        started = time.monotonic()
        results[way] = evaluate(
            model,
            tasks,
            shots=("fill",),
            draws=options.draws,
            queries=options.queries,
            seed=options.seed,
            out=options.out / f"{way.replace(' ', '-')}.json",
            **WAYS[way],
        )
        seconds[way] = time.monotonic() - started
        print(f"{way}: {seconds[way]:.0f} s", flush=True)
    print(f"\n{options.model}, {options.budget} tokens, {torch.get_num_threads()} threads")
    print_table(results, seconds)


if __name__ == "__main__":
    main()
