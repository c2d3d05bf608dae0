"""What renaming labels changes: ManyICL trained with and without, everything else the same.

    python benchmarks/augmentation.py --out DIR                         # the demo's many tasks, five seeds
    python benchmarks/augmentation.py --out DIR --recipe RECIPE.toml    # a comparison's recipe: its tasks, model, seeds
                                      [--variant words] [--seed N] [--report]

Variants: off (as everywhere else), permuted (half of the episodes of tasks with fixed labels have them exchanged),
words (three quarters have them renamed to random words).
Each is an ordinary comparison of its own in DIR, so that a killed call goes on, and several processes may share out
variants and seeds (--variant, --seed; start one with --prepare first). Scores are means over tasks and seeds: of tasks
with fixed labels, which alone are changed, and of the others, on trained and held-out ones, and of the first kind
behind shots with exchanged labels, as the share of answers that follow the shots. Each variant less off is paired by
seed and query; from five seeds on intervals are over seeds, with fewer over draws and queries.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from manyicl.comparison.answers import Findings, Pooled, pool_differences, pool_means
from manyicl.comparison.grid import RECIPE, Grid, WorkItem, open_comparison, plan_file
from manyicl.comparison.settings import CompareConfig
from manyicl.comparison.worker import run_comparison
from manyicl.console import make_console
from manyicl.demo.regimes import HEADLINE
from manyicl.demo.run import FULL, demo_config, write_regime
from manyicl.evaluation.shots import Shots, sort_shots
from manyicl.training.recipe import load_recipe

VARIANTS = {
    "off": {},
    "permuted": {"rename_share": 0.5, "rename_to": "permuted"},
    "words": {"rename_share": 0.75, "rename_to": "words"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="holds a comparison a variant; goes on with what is there"
    )
    parser.add_argument("--recipe", type=Path, help="a comparison's recipe; the demo's many tasks unless said")
    parser.add_argument("--variant", choices=tuple(VARIANTS), action="append", help="repeat for more; all unless said")
    parser.add_argument("--seed", type=int, action="append", help="repeat for more; all unless said")
    parser.add_argument("--prepare", action="store_true", help="write recipes and tasks, and run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    chosen = options.variant or list(VARIANTS)
    if all((options.out / name / RECIPE).is_file() for name in chosen):
        comparisons = {name: open_comparison(options.out / name, None) for name in chosen}
    else:
        config = shared_config(options.out, options.recipe)
        comparisons = {name: open_variant(options.out, config, name) for name in chosen}
    if options.prepare:
        return
    if not options.report:
        for comparison in comparisons.values():
            run_comparison(comparison, seeds=options.seed, console=make_console(stderr=True))
    if set(chosen) == set(VARIANTS):
        report({name: Findings(comparison) for name, comparison in comparisons.items()})


def shared_config(out: Path, recipe: Path | None) -> CompareConfig:
    """Return the recipe that the variants share."""
    if recipe is not None:
        return load_recipe(recipe, kind=CompareConfig)
    folder = out / "tasks"
    size = next(size for regime, size in FULL if regime is HEADLINE)
    names = write_regime(folder, HEADLINE, size, seed=0)
    return demo_config(folder, size, names=names, seeds=range(5))


def open_variant(out: Path, config: CompareConfig, name: str) -> Grid:
    """Return the comparison of one variant: the base, which tells what text cost before, and ManyICL."""
    compare = config.compare.model_copy(
        update={"arms": ("base", "manyicl"), "name": f"augmentation: {name}", "flips": True, "orders": False}
    )
    episodes = config.episodes.model_copy(update=VARIANTS[name])
    return open_comparison(out / name, config.model_copy(update={"compare": compare, "episodes": episodes}))


def report(found: dict[str, Findings]) -> None:
    """Print the tables."""
    first = found["off"]
    labelled = [name for name, task in first.grid.tasks.items() if len(task.labels) > 1]
    done = {name: sum(asked is not None for asked in findings.tests["manyicl"]) for name, findings in found.items()}
    print(f"seeds done: {', '.join(f'{name} {num}' for name, num in done.items())}")
    for role in ("trained", "held-out"):
        for kind in ("fixed labels", "open answers"):
            tasks = [t for t in first.tasks[role] if (t in labelled) == (kind == "fixed labels")]
            asked = [set(first.shots_by_task.get(task, ())) for task in tasks]
            shots = sort_shots(set.intersection(*asked)) if asked else []
            if not shots:
                continue
            print(f"\n{len(tasks)} {role} tasks, {kind}\n| variant |" + "".join(f" {k} shots |" for k in shots))
            print("|---|" + "---|" * len(shots))
            cells = [tell(first.pool("base", dict.fromkeys(tasks, k))) for k in shots]
            print(f"| (base) | {' | '.join(cells)} |")
            for name, findings in found.items():
                cells = []
                for k in shots:
                    own = tell(findings.pool("manyicl", dict.fromkeys(tasks, k)))
                    less = subtract(findings, first, tasks, k) if name != "off" else None
                    cells.append(f"{own} ({tell(less, signed=True)})" if less else own)
                print(f"| {name} | {' | '.join(cells)} |")
    print("\n| variant | follow exchanged labels, trained | held out | bits per byte lost | tokens | answers |")
    print("|---|---|---|---|---|---|")
    for name, findings in found.items():
        flips = [follow(findings, [t for t in first.tasks[role] if t in labelled]) for role in ("trained", "held-out")]
        print(f"| {name} | {' | '.join(flips)} | {lost(findings)} | {' | '.join(spent(findings))} |")


def subtract(findings: Findings, first: Findings, tasks: list[str], shots: Shots) -> Pooled | None:
    """Return a variant less off."""
    pair = (findings.tables_of("manyicl"), first.tables_of("manyicl"))
    return pool_differences(*pair, shots=dict.fromkeys(tasks, (shots, shots)))


def follow(findings: Findings, tasks: list[str]) -> str:
    """Return the share of answers that follow shots with exchanged labels, at the most shots."""
    seeds = [
        {t: table for t in tasks for table in asked.tables.get(t, {}).values()} if asked else None  # one table a task
        for asked in findings.read("flip")["manyicl"]
    ]
    return tell(pool_means([run or None for run in seeds]))


def lost(findings: Findings) -> str:
    """Return how many bits per byte of neutral text each seed lost, their mean first."""
    grid, values = findings.grid, []
    for seed in findings.seeds:
        places = [grid.path_of(WorkItem(arm, seed, "text")) for arm in ("base", "manyicl")]
        if all(place.is_file() for place in places):
            before, after = (json.loads(place.read_bytes())["texts"] for place in places)
            bits = sum(sum(a["bits"]) - sum(b["bits"]) for b, a in zip(before, after, strict=True))
            values.append(bits / sum(sum(text["bytes"]) for text in before))
    return f"{np.mean(values):+.3f} ({', '.join(f'{v:+.3f}' for v in values)})" if values else "-"


def spent(findings: Findings) -> list[str]:
    """Return the mean tokens and answers of a seed's training."""
    plans = [plan_file(findings.grid.path_of(WorkItem("manyicl", seed, "train"))) for seed in findings.seeds]
    known = [json.loads(plan.read_bytes()) for plan in plans if plan.is_file()]
    return [f"{np.mean([plan[what] for plan in known]):,.0f}" if known else "-" for what in ("tokens", "answers")]


def tell(pooled: Pooled | None, *, signed: bool = False) -> str:
    """Return a mean in % with its interval."""
    if pooled is None or pooled.low is None or pooled.high is None:
        return "-" if pooled is None else f"{100 * pooled.mean:.1f}"
    sign = "+" if signed else ""
    return f"{100 * pooled.mean:{sign}.1f} [{100 * pooled.low:{sign}.1f}, {100 * pooled.high:{sign}.1f}]"


if __name__ == "__main__":
    main()
