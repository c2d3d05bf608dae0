"""How scores depend on shots and on the length of training episodes (recipes/compare-gemma3-long.toml).

    python benchmarks/long_contexts.py runs/long-* [--plot FILE.png]

Each argument is the folder of a comparison with a length of its own. A row per arm (and length, for ManyICL), a column
per number of shots: the mean over held-out tasks; then each arm less the base, less few-shot fine-tuning and less
ManyICL of the longest episodes, paired by seed, draw and query; then each held-out task. Only recipes, comparison.json
and results are read, no weights; what is missing is a dash.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from one_change import pair_answers

from manyicl.comparison.answers import ArmAnswers, Pooled, pool_differences
from manyicl.comparison.comparison_file import Comparison, read_comparison
from manyicl.comparison.grid import Grid, WorkItem
from manyicl.comparison.inputs import RECIPE
from manyicl.comparison.schema import CurvePoint, MeanPoint
from manyicl.comparison.settings import ARMS, CompareConfig
from manyicl.console import DASH
from manyicl.errors import UserError
from manyicl.evaluation.shots import Shots, sort_shots
from manyicl.report.numbers import tell_change, tell_interval, tell_percent
from manyicl.training.recipe import load_recipe


@dataclass(frozen=True)
class Length:
    """A comparison whose episodes have one length."""

    comparison: Comparison
    grid: Grid

    @classmethod
    def read(cls, folder: Path) -> Length:
        """Return what is in the folder."""
        comparison = read_comparison(folder)
        return cls(comparison, Grid(folder, load_recipe(folder / RECIPE, kind=CompareConfig)))

    def title(self, arm: str) -> str:
        """Return an arm's title; the length belongs to ManyICL's alone."""
        tokens = f", {self.grid.config.episodes.token_budget:,}" if arm == "manyicl" else ""
        return ARMS[arm].title + tokens

    def answers(self) -> dict[str, dict[int, ArmAnswers]]:
        """Return arm's title -> seed -> what it answered."""
        items = [WorkItem(arm, seed, "test") for arm in self.grid.settings.arms for seed in self.grid.settings.seeds]
        found: dict[str, dict[int, ArmAnswers]] = {}
        for item in filter(self.grid.is_done, items):
            found.setdefault(self.title(item.arm), {})[item.seed] = ArmAnswers.read([self.grid.path_of(item)])
        return found


def scores_of(lengths: Sequence[Length], *, task: str | None) -> dict[str, dict[str, CurvePoint | MeanPoint]]:
    """Return arm's title -> shots -> score of a held-out task, or the mean over them."""
    rows: dict[str, dict[str, CurvePoint | MeanPoint]] = {}
    for length in lengths:
        points: Sequence[CurvePoint | MeanPoint] = (
            [point for point in length.comparison.means if point.role == "held-out" and point.family is None]
            if task is None
            else [point for point in length.comparison.curves if point.task == task]
        )
        for point in points:
            if point.score is not None:
                rows.setdefault(length.title(point.arm), {})[str(point.shots)] = point
    return rows


def differences_of(
    answers: Mapping[str, Mapping[int, ArmAnswers]], *, other: str, tasks: Sequence[str], columns: Sequence[Shots]
) -> dict[str, dict[str, Pooled]]:
    """Return arm's title -> shots -> its mean over tasks less the other arm's, on the queries that both were asked.

    answers: arm's title -> seed -> what it answered.
    other: the title of the arm that is taken from each; {} if it has answered nothing.
    """
    rows: dict[str, dict[str, Pooled]] = {}
    for title, seeds in answers.items():
        if title == other:
            continue
        theirs_by_seed = answers.get(other, {})
        shared = sorted(seeds.keys() & theirs_by_seed.keys())
        pairs = [pair_answers(seeds[seed], theirs_by_seed[seed]) for seed in shared]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for shots in columns:
            pooled = pool_differences(ours, theirs, shots=dict.fromkeys(tasks, (shots, shots)))
            if pooled is not None and pooled.num_tasks == len(tasks):
                rows.setdefault(title, {})[str(shots)] = pooled
    return rows


def tell_point(point: CurvePoint | MeanPoint) -> str:
    """Return a score in % with its interval, and how many shots are as many as fit."""
    interval = "" if point.low is None else f" {tell_interval(point.low, point.high)}"
    most = f"{point.mean_shots:,.0f} shots: " if point.shots == "fill" and isinstance(point, CurvePoint) else ""
    return f"{most}{tell_percent(point.score)}{interval}"


def tell_difference(pooled: Pooled) -> str:
    """Return a difference in points with its interval; bold if that excludes zero."""
    points = tell_change(pooled.mean, unit="points", low=pooled.low, high=pooled.high)
    text = f"{points} {tell_interval(pooled.low, pooled.high, unit='points')}"
    return f"**{text}**" if pooled.excludes_zero else text


def print_table(title: str, rows: Mapping[str, Mapping[str, str]], *, columns: Sequence[str]) -> None:
    """Print one table."""
    print(f"\n{title}\n\n| arm | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells.get(column, DASH) for column in columns)} |")


def draw(rows: Mapping[str, Mapping[str, CurvePoint | MeanPoint]], path: Path, *, columns: Sequence[str]) -> None:
    """Draw the means against shots, with their intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, (name, points) in enumerate(rows.items()):
        known = [(place, points[column]) for place, column in enumerate(columns) if column in points]
        x = [place + 0.05 * (number - len(rows) / 2) for place, _ in known]
        y = [100 * point.score for _, point in known]
        errors = [[100 * (p.score - p.low) for _, p in known], [100 * (p.high - p.score) for _, p in known]]
        style = "o-" if name.startswith(ARMS["manyicl"].title) else "s--"
        axes.errorbar(x, y, yerr=errors, fmt=style, markersize=4, linewidth=1.4, capsize=2, label=name)
    axes.set_xticks(range(len(columns)), ["as many as fit" if column == "fill" else column for column in columns])
    axes.set(xlabel="shots", ylabel="mean over held-out tasks, % (95 % interval)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(folders: Sequence[str], *, plot: Path | None) -> None:
    """Print all tables, and draw the plot.

    Raises:
        UserError: a folder holds no comparison, or two have episodes of one length.
    """
    lengths = sorted(
        (Length.read(Path(folder)) for folder in folders), key=lambda one: one.grid.config.episodes.token_budget
    )
    titles = [length.title("manyicl") for length in lengths if "manyicl" in length.grid.settings.arms]
    for title in {title for title in titles if titles.count(title) > 1}:
        raise UserError(f"{' '.join(folders)}: two have {title}; name one of them, and pair both by arms_across.py")
    asked = sort_shots({k for one in lengths for k in one.grid.settings.shots})
    columns = [str(shots) for shots in asked]
    tasks = sorted({task for length in lengths for task in length.grid.settings.held_out_tasks})
    means = scores_of(lengths, task=None)
    means = dict(sorted(means.items(), key=lambda row: row[0].startswith(ARMS["manyicl"].title)))
    for task in (None, *tasks):
        found = means if task is None else scores_of(lengths, task=task)
        rows = {name: found.get(name, {}) for name in means}
        told = {name: {shots: tell_point(point) for shots, point in points.items()} for name, points in rows.items()}
        print_table(f"Mean of {len(tasks)} held-out tasks, %" if task is None else f"{task}, %", told, columns=columns)
        if task is None:
            answers = {title: seeds for length in lengths for title, seeds in length.answers().items()}
            for other in (ARMS["base"].title, ARMS["few-shot"].title, lengths[-1].title("manyicl")):
                less = differences_of(answers, other=other, tasks=tasks, columns=asked)
                told = {name: {k: tell_difference(d) for k, d in less[name].items()} for name in means if name in less}
                if told:
                    title = f"Less {other}, points, paired; bold: the interval excludes zero"
                    print_table(title, told, columns=columns)
    if plot:
        draw(means, plot, columns=columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--plot", type=Path, help="also draw the means, to this file (needs matplotlib)")
    options = parser.parse_args()
    try:
        main(options.folders, plot=options.plot)
    except UserError as error:
        parser.error(str(error))
