"""An arm of one comparison less an arm of another, paired by seed, draw and query.

    python benchmarks/arms_across.py runs/gemma3-zero/zero-shot runs/gemma3/manyicl
    python benchmarks/arms_across.py runs/gemma3-tuned/dedicated-tuned@0 runs/gemma3/manyicl@fill --each

An argument is the folder of a comparison, an arm and, after @, a number of shots; without numbers, all that both were
asked with. Both must have been asked the same queries of the same rows, which recipes with equal tasks, seeds, queries
and draws make sure of. A row for each kind of task and number of shots, with --each for each task too. Seeds and tasks
that one of the two lacks are left out, and named. It needs recipe.toml and the test results alone, no model, no tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from one_change import tell_difference, tell_score

from manyicl.comparison.answers import ArmAnswers, pool_differences, pool_means
from manyicl.comparison.inputs import RECIPE
from manyicl.comparison.settings import ARMS, CompareConfig, Role
from manyicl.errors import UserError
from manyicl.evaluation.shots import FILL, Shots, sort_shots, tell_shot_count
from manyicl.training.recipe import load_recipe


@dataclass(frozen=True)
class Side:
    """One arm of one comparison."""

    title: str
    """The arm's title and the name of its folder."""
    config: CompareConfig
    """The recipe of the comparison."""
    answers: Mapping[int, ArmAnswers]
    """Seed -> what its models answered."""
    shots: Shots | None
    """The number of shots to compare at; None: all."""

    @classmethod
    def read(cls, word: str) -> Side:
        """Return what FOLDER/ARM[@SHOTS] names.

        Raises:
            UserError: there is no such comparison, arm, number of shots or answer.
        """
        place, _, number = word.partition("@")
        folder, arm = Path(place).parent, Path(place).name
        if arm not in ARMS or not (folder / RECIPE).is_file():
            raise UserError(f"{word}: names no arm of a comparison; give FOLDER/ARM, such as runs/gemma3/manyicl")
        if number not in ("", FILL) and not number.isdecimal():
            raise UserError(f"{word}: '{number}' is not a number of shots; give a number, or {FILL}")
        pattern = f"{arm}/*.test.json" if ARMS[arm].per_task else f"{arm}.test.json"
        found: dict[int, list[Path]] = {}
        for path in sorted(folder.glob(f"seed-*/{pattern}")):
            found.setdefault(int(path.relative_to(folder).parts[0].removeprefix("seed-")), []).append(path)
        if not found:
            raise UserError(f"{word}: has answered no test rows yet")
        answers = {seed: ArmAnswers.read(paths) for seed, paths in found.items()}
        config = load_recipe(folder / RECIPE, kind=CompareConfig)
        shots = None if not number else FILL if number == FILL else int(number)
        return cls(f"{ARMS[arm].title} of {folder.name}", config, answers, shots)

    def role_of(self, task: str) -> Role:
        """Return whether a task was trained on."""
        return "held-out" if task in self.config.compare.held_out_tasks else "trained"


def shared_tasks(a: Side, b: Side, seeds: Sequence[int]) -> dict[Role, list[str]]:
    """Return the tasks that both answered with all seeds, by their role, which must be the same in both.

    Raises:
        UserError: a task has other rows in one of them.
    """
    found: dict[Role, list[str]] = {"trained": [], "held-out": []}
    answered = [side.answers[seed].curves for side in (a, b) for seed in seeds]
    for task in sorted(reduce(set.intersection, (set(curves) for curves in answered))):
        if len({curves[task].sha256 for curves in answered}) > 1:
            raise UserError(f"task '{task}': has other rows in one comparison than in the other; nothing can be paired")
        if a.role_of(task) == b.role_of(task):
            found[a.role_of(task)].append(task)
    return found


def tell_left_out(a: Side, b: Side) -> Iterator[str]:
    """Yield which seeds and tasks are of one side alone, or trained on in one and held out in the other."""
    seeds = a.answers.keys() ^ b.answers.keys()
    if seeds:
        yield f"seeds of one alone: {', '.join(map(str, sorted(seeds)))}"
    tasks = [{task for answers in side.answers.values() for task in answers.curves} for side in (a, b)]
    if alone := sorted(tasks[0] ^ tasks[1]):
        yield f"tasks of one alone: {', '.join(alone)}"
    if other := sorted(task for task in tasks[0] & tasks[1] if a.role_of(task) != b.role_of(task)):
        yield f"tasks that only one was trained on: {', '.join(other)}"


def pair_shots(a: Side, b: Side, seeds: Sequence[int], tasks: Sequence[str]) -> list[tuple[Shots, Shots]]:
    """Return the numbers of shots to compare at, of a and of b: those named, or each that all tasks have in both."""
    if a.shots is not None and b.shots is not None:
        return [(a.shots, b.shots)]
    known = [set(side.answers[seed].tables[task]) for side in (a, b) for seed in seeds for task in tasks]
    return [(k, k) for k in sort_shots(reduce(set.intersection, known))]


def list_rows(a: Side, b: Side, *, each: bool) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table.

    each: also one for each task.

    Raises:
        UserError: the two have no seed or task in common, or were asked other queries.
    """
    seeds = sorted(a.answers.keys() & b.answers.keys())
    roles = shared_tasks(a, b, seeds) if seeds else {}
    if not any(roles.values()):
        raise UserError(f"{a.title} and {b.title}: have no seed and task in common")
    ours, theirs = ([side.answers[seed].tables for seed in seeds] for side in (a, b))
    for role, tasks in roles.items():
        groups = [(f"{len(tasks)} {role}", tasks)] * bool(tasks) + [(task, [task]) for task in tasks if each]
        for k, m in pair_shots(a, b, seeds, tasks) if tasks else []:
            for name, group in groups:
                means = [
                    pool_means([{task: run[task][number] for task in group} for run in runs])
                    for runs, number in ((ours, k), (theirs, m))
                ]
                less = pool_differences(ours, theirs, shots=dict.fromkeys(group, (k, m)))
                scores = [tell_score(mean) for mean in means if mean]
                shots = tell_shot_count(k) if k == m else f"{tell_shot_count(k)} and {tell_shot_count(m)}"
                yield (name, shots, *scores, tell_difference(less) if less else "")


def main(words: Sequence[str], *, each: bool) -> None:
    """Print the table.

    Raises:
        UserError: an argument names nothing that can be compared.
    """
    a, b = map(Side.read, words)
    if (a.shots is None) != (b.shots is None):
        raise UserError(f"{' '.join(words)}: give both a number of shots, or neither")
    heads = ("tasks", "shots", f"a: {a.title}", f"b: {b.title}", "a less b, points (each seed's)")
    for row in (heads, ("---",) * len(heads), *list_rows(a, b, each=each)):
        print(f"| {' | '.join(row)} |")
    print("\nBold: the interval excludes zero. With fewer than five seeds intervals are for these runs.")
    for left_out in tell_left_out(a, b):
        print(f"Left out: {left_out}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs=2, metavar="FOLDER/ARM[@SHOTS]", help="of two comparisons, or of one")
    parser.add_argument("--each", action="store_true", help="a row for each task too")
    options = parser.parse_args()
    try:
        main(options.arms, each=options.each)
    except UserError as error:
        parser.error(str(error))
