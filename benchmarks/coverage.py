"""How often a 95 % interval of this library holds the truth, where the truth is known (docs/intervals.md).

    python benchmarks/coverage.py [--repetitions 500]

Every line is simulated tables of scores and the library's own intervals of them; a table in Markdown is printed. About
four minutes on one idle core. What the tables are made of:

- difference: paired differences behind 5 draws of shots. A query adds a normal amount of standard deviation .30, a draw
  .03, a cell .10 and a training run .02 (`no run effect`: nothing).
- score: right/wrong answers behind 5 draws. Log-odds are moved by the query (1.5), the draw (.3) and the run (.2).
- 0 shots: right/wrong answers, one draw; log-odds moved by the query (1.5) and, in two lines, the run (.2).

Every task has 100 queries per seed, the same for all seeds or separate ones. With fewer than five seeds the truth is
the mean of these runs over all queries and draws, from five on that of all runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt

import numpy as np
from scipy.optimize import brentq

from manyicl.intervals import MIN_SEEDS, Interval, Run, Table, difference_interval, score_interval

SEEDS = (1, 2, 3, 5, 8)
NUM_QUERIES = 100
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


@dataclass(frozen=True)
class Mix:
    """What scores are made of: the standard deviations that a query, a draw, a cell and a training run add.

    center: the true mean where scores are differences, else the true share of right answers.
    """

    title: str
    kind: str  # "difference": normal amounts; "right": log-odds of right/wrong answers
    query: float
    draw: float
    run: float
    center: float
    num_draws: int = 5
    cell: float = 0.1

    @property
    def interval(self) -> Callable[[Sequence[Run]], Interval]:
        """The library's interval for such scores."""
        return difference_interval if self.kind == "difference" else score_interval


MIXES = (
    Mix("difference, 5 draws", "difference", query=0.3, draw=0.03, run=0.02, center=0.02),
    Mix("difference, 5 draws, no run effect", "difference", query=0.3, draw=0.03, run=0.0, center=0.02),
    Mix("score .70, 5 draws", "right", query=1.5, draw=0.3, run=0.2, center=0.7),
    Mix("score .97, 5 draws", "right", query=1.5, draw=0.3, run=0.2, center=0.97),
    *(Mix(f"0 shots, score .{p}", "right", 1.5, 0.0, run=0.0, center=p / 100, num_draws=1) for p in (50, 84, 93, 97)),
    Mix("0 shots, score .84, run effect", "right", 1.5, 0.0, run=0.2, center=0.84, num_draws=1),
    Mix("0 shots, score .97, run effect", "right", 1.5, 0.0, run=0.2, center=0.97, num_draws=1),
)


def mean_right(log_odds: float, spread: float) -> float:
    """Return the mean share of right answers whose log-odds are normal (Gauss-Hermite quadrature)."""
    return float((WEIGHTS / WEIGHTS.sum() / (1 + np.exp(-(log_odds + spread * NODES)))).sum())


@cache
def center_odds(share: float, spread: float) -> float:
    """Return the mean log-odds with which so large a share of answers is right."""
    return float(brentq(lambda odds: mean_right(odds, spread) - share, -15, 15))


def simulate(
    mix: Mix, rng: np.random.Generator, *, num_seeds: int, num_tasks: int, shared: bool, num_queries: int = NUM_QUERIES
) -> tuple[list[Run], float]:
    """Return the tables of all seeds, and the mean that their interval should hold."""
    shape = (num_seeds, num_tasks, mix.num_draws, num_queries)
    run_S = mix.run * rng.normal(size=(num_seeds, 1, 1, 1))
    query = mix.query * rng.normal(size=(1 if shared else num_seeds, num_tasks, 1, num_queries))
    amount = run_S + query + mix.draw * rng.normal(size=(num_seeds, num_tasks, mix.num_draws, 1))
    if mix.kind == "difference":
        scores = mix.center + amount + mix.cell * rng.normal(size=shape)
        here = mix.center + float(run_S.mean())
    else:
        odds = center_odds(mix.center, sqrt(mix.query**2 + mix.draw**2 + mix.run**2))
        scores = (rng.random(shape) < 1 / (1 + np.exp(-(odds + amount)))).astype(np.float64)
        rest = sqrt(mix.query**2 + mix.draw**2)
        here = float(np.mean([mean_right(odds + float(run), rest) for run in run_S.ravel()])) if mix.run else mix.center
    names = [tuple(f"{0 if shared else seed} {query}" for query in range(num_queries)) for seed in range(num_seeds)]
    runs: list[Run] = [
        {str(task): Table(scores[seed, task], names[seed]) for task in range(num_tasks)} for seed in range(num_seeds)
    ]
    return runs, here if num_seeds < MIN_SEEDS else mix.center


def measure_coverage(mix: Mix, *, repetitions: int, seed: int = 0, **setting: int | bool) -> float:
    """Return the share of simulated intervals that hold the truth. setting: as `simulate`."""
    rng = np.random.default_rng([seed, *map(int, setting.values()), round(1000 * mix.center)])
    hits = 0
    for _ in range(repetitions):
        runs, truth = simulate(mix, rng, **setting)  # type: ignore[arg-type]
        interval = mix.interval(runs)
        hits += interval.low <= truth <= interval.high
    return hits / repetitions


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500, help="of one task; of 16 tasks two fifths as many")
    repetitions = parser.parse_args().repetitions
    print(f"| scores | tasks | queries | {' | '.join(f'seeds: {n}' for n in SEEDS)} | Monte Carlo error |")
    print("|---|---|---|" + "---|" * (len(SEEDS) + 1))
    for mix in MIXES:
        for num_tasks, times in ((1, repetitions), (16, max(1, repetitions * 2 // 5))):
            for shared in (True, False):
                found = [
                    measure_coverage(mix, repetitions=times, num_seeds=n, num_tasks=num_tasks, shared=shared)
                    for n in SEEDS
                ]
                told = " | ".join(f"{100 * share:.1f}" for share in found)
                error = 100 * sqrt(0.95 * 0.05 / times)
                kind = "shared" if shared else "separate"
                print(f"| {mix.title} | {num_tasks} | {kind} | {told} | {error:.1f} |", flush=True)


if __name__ == "__main__":
    main()
