"""Which default? One setting changed at a time, everything else the same: ManyICL on 28 real tasks, three seeds.

    python benchmarks/one_change.py run OUT [NAME ...] [KEY=VALUE ...] [--recipe FILE]
    python benchmarks/one_change.py table OUT [--json FILE]

`run` makes a comparison of each variant (`VARIANTS`) in OUT/NAME, one after the other: of those named, or of all. It
goes on with those that are there. KEY=VALUE changes the recipe of them all, such as tasks.folder=PATH. Call it once per
GPU, with other names each, to share them out.

`table` prints the scores of OUT/base, and those of every other folder less base's: in points, paired by seed, draw and
query over the seeds that both have finished. It needs recipe.toml and the test results alone, no model and no tasks.
With fewer than five seeds intervals are for these runs (docs/intervals.md), so every seed's own difference is shown.

With another template fewer or more examples fit. Such pairs have the query and the number of the draw in common, but
not all shots: that is part of what the setting does, and notes below the table report it. (`manyicl diff` refuses
them, as it compares answers after the same shots.) Queries that one of the two was not asked are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manyicl.comparison.answers import ArmAnswers, Pooled, Tables, pool_differences, pool_means, tabulate
from manyicl.comparison.grid import Grid, WorkItem
from manyicl.comparison.inputs import RECIPE
from manyicl.comparison.settings import CompareConfig, Role
from manyicl.console import DASH, make_console
from manyicl.errors import UserError
from manyicl.evaluation.shots import FILL, Shots, sort_shots, tell_asked_with
from manyicl.files import write_atomically
from manyicl.report.numbers import tell_change, tell_interval, tell_percent, tell_points
from manyicl.training.recipe import load_recipe
from manyicl.training.run_folder import find_changes
from manyicl.verbs import compare

BASE = "base"
SHARED = (
    'compare.arms=["manyicl"]', "compare.seeds=[0,1,2]", "compare.learning_rates=[]", "compare.queries=100",
    'compare.shots=[16,"fill"]', "compare.flips=false", "compare.examples=0", "compare.asked_tasks=8",
    "compare.dedicated_tasks=[]", "train.learning_rate=1e-4",
)  # fmt: skip
# The trained tasks of recipes/compare-smollm2.toml that the base is asked, and one or two more of each family but
# summarization. A variant that trains on fewer tasks is asked the same ones.
ASKED = ("aeslc", "arc_challenge", "arc_easy", "atis", "clinc150", "gsm8k", "mctest_nli", "scitldr")
FURTHER = ("commonsenseqa", "mawps", "movie_polarity", "snips", "snli", "webquestions")


def name_tasks(*names: str) -> str:
    """Return the override that trains on these tasks alone."""
    return f"tasks.names={json.dumps(names)}"


# Name -> what is changed in words, and the overrides that change it.
VARIANTS = {
    BASE: ("nothing", []),
    "token": ("each token counts once in the loss, instead of each answer", ['train.normalization="token"']),
    "task": ("each task of a step counts once in the loss, instead of each answer", ['train.normalization="task"']),
    "range": ("episodes have 4 to 256 shots, log-uniformly, instead of a full budget", ["episodes.shots=[4,256]"]),
    "proportional": ("tasks get tokens by their size, instead of equally", ['episodes.mixture="proportional"']),
    "rename": ("half of the episodes of tasks with fixed labels rename them to words", ["episodes.rename_share=0.5"]),
    "lora-16": ("LoRA of rank 16 instead of all weights, at the same rate", ["model.lora.rank=16"]),
    "lora-16-1e-3": ("LoRA of rank 16, at ten times the rate", ["model.lora.rank=16", "train.learning_rate=1e-3"]),
    "lora-64-1e-3": (
        "LoRA of rank 64 and the scale of rank 16, at ten times the rate",
        ["model.lora.rank=64", "model.lora.alpha=128", "train.learning_rate=1e-3"],
    ),
    "chat": ("the tokenizer's chat template instead of plain text", ['template.style="chat"']),
    "tokens-2x": ("twice the steps, so twice the tokens", ["train.num_steps=160"]),
    "tokens-4x": ("four times the steps, so four times the tokens", ["train.num_steps=320"]),
    "rate-3e-5": ("about a third of the learning rate", ["train.learning_rate=3e-5"]),
    "rate-3e-4": ("three times the learning rate", ["train.learning_rate=3e-4"]),
    "tasks-14": ("half of the training tasks, all that are asked among them", [name_tasks(*ASKED, *FURTHER)]),
    "tasks-8": ("the training tasks that are asked alone", [name_tasks(*ASKED)]),
    "rows-1000": ("at most 1,000 train rows of each task", ["tasks.max_rows=1000"]),
    "rows-300": ("at most 300 train rows of each task", ["tasks.max_rows=300"]),
    "rows-100": ("at most 100 train rows of each task", ["tasks.max_rows=100"]),
}
COLUMNS: dict[str, tuple[Role, Shots]] = {
    "held out, 16 shots": ("held-out", 16),
    "held out, as many as fit": ("held-out", FILL),
    "trained, as many as fit": ("trained", FILL),
}


@dataclass(frozen=True)
class Variant:
    """The folder of one comparison: its recipe, and what ManyICL answered with each finished seed."""

    name: str
    config: CompareConfig
    answers: Mapping[int, ArmAnswers]

    @classmethod
    def read(cls, folder: Path) -> Variant:
        """Return what is in the folder."""
        grid = Grid(folder, load_recipe(folder / RECIPE, kind=CompareConfig))
        items = [WorkItem("manyicl", seed, "test") for seed in grid.settings.seeds]
        done = {item.seed: ArmAnswers.read([grid.path_of(item)]) for item in items if grid.is_done(item)}
        return cls(folder.name, grid.config, done)

    def tasks_of(self, role: Role) -> list[str]:
        """Return the tasks of a role that were asked."""
        asked = {task for answers in self.answers.values() for task in answers.curves}
        held_out, familiar = self.config.compare.held_out_tasks, self.config.compare.familiar_tasks
        return sorted(asked.intersection(held_out) if role == "held-out" else asked.difference(held_out, familiar))


def read_variants(out: Path) -> list[Variant]:
    """Return the base and the other variants in a folder, in the order of `VARIANTS`.

    Raises:
        UserError: the base is missing, or has no finished seed.
    """
    known = {path.parent.name: path.parent for path in out.glob(f"*/{RECIPE}")}
    variants = [Variant.read(known[name]) for name in [*VARIANTS, *sorted(known.keys() - VARIANTS)] if name in known]
    if not variants or variants[0].name != BASE or not variants[0].answers:
        raise UserError(f"{out / BASE}: has no finished seed to take differences from; `run {out} {BASE}` first")
    return variants


def shared_seeds(one: Variant, base: Variant) -> list[int]:
    """Return the seeds that both have finished."""
    return sorted(one.answers.keys() & base.answers.keys())


def pair_answers(one: ArmAnswers, base: ArmAnswers) -> tuple[Tables, Tables, int]:
    """Return the scores of both on the queries that both were asked, and how many queries only one of them was asked.

    Raises:
        UserError: a task has other rows in each.
    """
    for task in sorted(one.curves.keys() & base.curves.keys()):
        if one.curves[task].sha256 != base.curves[task].sha256:
            raise UserError(f"task '{task}': has other rows in a variant than in {BASE}; run both on the same files")
    asked = [{(p.task, p.asked, p.query) for p in side.predictions} for side in (one, base)]
    shared = asked[0] & asked[1]
    ours, theirs = (
        tabulate([p for p in side.predictions if (p.task, p.asked, p.query) in shared]) for side in (one, base)
    )
    return ours, theirs, len(asked[0] ^ asked[1])


def subtract_base(one: Variant, base: Variant) -> tuple[dict[str, Pooled | None], list[str]]:
    """Return a variant less the base, by column, and what a reader must know of these differences."""
    pairs = [pair_answers(one.answers[seed], base.answers[seed]) for seed in shared_seeds(one, base)]
    ours, theirs, left_out = [p[0] for p in pairs], [p[1] for p in pairs], sum(p[2] for p in pairs)
    found: dict[str, Pooled | None] = {}
    notes = tell_other_shots(one, base)
    for title, (role, shots) in COLUMNS.items():
        tasks = base.tasks_of(role)
        found[title] = pooled = pool_differences(ours, theirs, shots=dict.fromkeys(tasks, (shots, shots)))
        if pooled and pooled.num_tasks < len(tasks):
            notes.append(f"{title}: {pooled.num_tasks} of {len(tasks)} tasks")
    if left_out:
        notes.append(f"{left_out:,} queries at a number of shots were asked of it or of {BASE} alone, and are left out")
    return found, notes


def tell_other_shots(one: Variant, base: Variant) -> list[str]:
    """Return in how many draws a variant was asked after other shots than the base, if in any."""
    ours, theirs = (
        {
            (seed, curve.task, point.shots, draw.draw): draw
            for seed in shared_seeds(one, base)
            for curve in side.answers[seed].curves.values()
            for point in curve.points
            for draw in point.draws
        }
        for side in (one, base)
    )
    notes = []
    for shots in sort_shots(shots for _, shots in COLUMNS.values()):
        both = [(ours[key], theirs[key]) for key in ours.keys() & theirs.keys() if key[2] == shots]
        if others := sum(a.shots_sha256 != b.shots_sha256 for a, b in both):
            means = [np.mean([pair[side].num_shots for pair in both]) for side in (0, 1)]
            counts = f"{means[0]:.1f} on average, {means[1]:.1f} in {BASE}"
            notes.append(
                f"{tell_asked_with(shots)}, {others} of {len(both)} draws hold others than in {BASE} ({counts})"
            )
    return notes


def tell_setting(one: Variant, base: Variant) -> str:
    """Return the settings of a variant's recipe that are not those of the base; where its files lie is none of them."""
    ignored = {"compare.name", "compare.seeds", *one.config.movable}
    changes = {key: value for key, value in find_changes(base.config, one.config).items() if key not in ignored}
    return ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in changes.items()) or DASH


def tell_score(pooled: Pooled) -> str:
    """Return a score with its interval."""
    return f"{tell_percent(pooled.mean)} % {tell_interval(pooled.low, pooled.high)}"


def tell_difference(pooled: Pooled) -> str:
    """Return a difference with its interval and each seed's own; bold if the interval excludes zero."""
    points = tell_change(pooled.mean, unit="points", low=pooled.low, high=pooled.high)
    mean = f"{points} {tell_interval(pooled.low, pooled.high, unit='points')}"
    return f"{f'**{mean}**' if pooled.excludes_zero else mean} ({', '.join(map(tell_points, pooled.seeds))})"


def score_base(base: Variant) -> dict[str, Pooled | None]:
    """Return the base's own scores, by column."""
    runs = [answers.tables for answers in base.answers.values()]
    return {
        title: pool_means([{t: run[t][k] for t in base.tasks_of(role) if k in run.get(t, {})} for run in runs])
        for title, (role, k) in COLUMNS.items()
    }


def make_table(out: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the table and its notes as lines, and the same as plain values, one entry per variant."""
    base, *others = read_variants(out)
    found = {base.name: (score_base(base), list[str]())} | {one.name: subtract_base(one, base) for one in others}
    lines = [f"| variant | changed | seeds | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    notes, entries = [], []
    for one in (base, *others):
        (cells, told), change, seeds = found[one.name], tell_setting(one, base), shared_seeds(one, base)
        shown = [(tell_score if one is base else tell_difference)(cell) if cell else DASH for cell in cells.values()]
        lines.append(f"| {one.name} | {change} | {len(seeds)} | {' | '.join(shown)} |")
        if lacking := [str(seed) for seed in one.config.compare.seeds if seed not in seeds]:
            told.append(f"seed {', '.join(lacking)} left out, as it or {BASE} has not finished it")
        notes += [f"- {one.name}: {note}." for note in told]
        values = {
            title: cell
            and ({**cell.as_score} if one is base else {**cell.as_difference, "excludes_zero": cell.excludes_zero})
            | {"tasks": cell.num_tasks}
            for title, cell in cells.items()
        }
        entries.append({"variant": one.name, "changed": change, "seeds": seeds, "cells": values, "notes": told})
    differences = [cell for one in others for cell in found[one.name][0].values() if cell]
    certain, chance = sum(cell.excludes_zero for cell in differences), len(differences) / 20
    lines += [
        "",
        f"{BASE}: scores. Others: less {BASE}, in points, with 95 % intervals and each seed's own difference.",
    ]
    lines.append(
        f"Bold: the interval excludes zero, as {certain} of {len(differences)} do; by chance about {chance:.1f}."
    )
    if any(not cell.has_enough_seeds for cell in differences):
        lines.append(
            "With fewer than five seeds an interval is for these runs: other queries and draws, not other seeds."
        )
    return [*lines, "", *notes], entries


def run(out: Path, words: Sequence[str], *, recipe: Path) -> None:
    """Make the comparison of each variant in `words`, or of all, with the recipe's changes in `words`."""
    changes = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word] or list(VARIANTS)
    for unknown in [name for name in names if name not in VARIANTS]:
        raise UserError(f"{unknown}: is not a variant; known: {', '.join(VARIANTS)}")
    for name in names:
        sentence, own = VARIANTS[name]
        overrides = [*SHARED, *own, *changes]
        print(f"{name}: {sentence}")
        print(shlex.join(["manyicl", "compare", str(recipe), "--out", str(out / name), *overrides]), flush=True)
        compare(recipe, out=out / name, overrides=overrides, console=make_console(stderr=True))


def main() -> None:
    """Run the variants, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner, tabler = (verbs.add_parser(name) for name in ("run", "table"))
    for one in (runner, tabler):
        one.add_argument("out", type=Path, help="holds a comparison per variant")
    runner.add_argument("words", nargs="*", metavar="NAME or KEY=VALUE", help="variants (default: all), and overrides")
    runner.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "compare-smollm2.toml")
    tabler.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    try:
        if options.verb == "run":
            run(options.out, options.words, recipe=options.recipe)
            return
        lines, entries = make_table(options.out)
    except UserError as error:
        parser.error(str(error))
    print("\n".join(lines))
    if options.json:
        write_atomically(options.json, json.dumps(entries, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
