"""Tables of how scores depend on shots and on the length of training episodes (recipes/compare-gemma3-long.toml).

    python benchmarks/long_contexts.py runs/long-*

Each argument is the folder of a comparison with a length of its own. A row per arm (and length, for ManyICL), a column
per number of shots: the mean over held-out tasks, then each of them. Only comparison.json is read; what is missing is a
dash.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path

from manyicl.comparison.comparison_file import Comparison, read_comparison
from manyicl.comparison.schema import CurvePoint, MeanPoint
from manyicl.errors import UserError


def rows_of(comparison: Comparison, *, task: str | None) -> dict[str, dict[str, str]]:
    """Return arm's title -> shots -> score with its interval in %, of a held-out task or of the mean over them."""
    budget = tomllib.loads(comparison.config)["episodes"]["token_budget"]
    points: Sequence[CurvePoint | MeanPoint] = (
        [point for point in comparison.means if point.role == "held-out" and point.family is None]
        if task is None
        else [point for point in comparison.curves if point.task == task]
    )
    titles = {arm.arm: f"{arm.title}, {budget:,}" if arm.arm == "manyicl" else arm.title for arm in comparison.arms}
    rows: dict[str, dict[str, str]] = {}
    for point in points:
        if point.score is None:
            continue
        interval = "" if point.low is None else f" [{100 * point.low:.1f}, {100 * point.high:.1f}]"
        most = f"{point.mean_shots:,.0f} shots: " if point.shots == "fill" and isinstance(point, CurvePoint) else ""
        rows.setdefault(titles[point.arm], {})[str(point.shots)] = f"{most}{100 * point.score:.1f}{interval}"
    return rows


def main(folders: Sequence[str]) -> None:
    """Print the tables."""
    comparisons = [read_comparison(Path(folder)) for folder in folders]
    comparisons.sort(key=lambda one: tomllib.loads(one.config)["episodes"]["token_budget"])
    held_out = [task.task for task in comparisons[0].tasks if task.role == "held-out"]
    shots = [str(k) for k in comparisons[0].shots]
    for task in (None, *held_out):
        print(f"\n{'Mean of ' + str(len(held_out)) + ' held-out tasks' if task is None else task}, %\n")
        print("| arm |", *(f"{k} |" for k in shots))
        print("|---" * (len(shots) + 1) + "|")
        rows: dict[str, dict[str, str]] = {}
        for comparison in comparisons:
            rows |= rows_of(comparison, task=task)
        for title, row in sorted(rows.items(), key=lambda item: item[0].startswith("ManyICL")):
            print(f"| {title} |", *(f"{row.get(k, '–')} |" for k in shots))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    try:
        main(parser.parse_args().folders)
    except UserError as error:
        parser.error(str(error))
