"""comparison.json as a whole: everything that a report says comes from it, and how far its work is."""

from __future__ import annotations

import json
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from manyicl.comparison.schema import (
    ArmConfidence,
    ArmEntry,
    ChosenShots,
    Cost,
    CurvePoint,
    Entry,
    ExampleQuery,
    Flatness,
    Flip,
    Forgetting,
    HeadlineScore,
    MeanPoint,
    OrderSpread,
    PairDifference,
    PlainPath,
    ShotLoss,
    TaskEntry,
    Trial,
    Tuned,
    WorkDone,
    count_seeds,
)
from manyicl.comparison.settings import Role
from manyicl.errors import UserError
from manyicl.evaluation import FILL, Shots, shots_order
from manyicl.files import write_atomically
from manyicl.intervals import MIN_SEEDS

COMPARISON_FILE = "comparison.json"
# In schema 1 all tasks of a column had the same number of shots; in 2 each task has its own.
COMPARISON_SCHEMAS = (1, 2)
# Kind of work -> its name in the list of missing work.
_WORK_NAMES = {
    "train": "training",
    "validation": "validation",
    "test": "test answers",
    "text": "plain text",
    "flip": "exchanged labels",
    "order": "orders of the shots",
}


class Comparison(Entry):
    """A whole comparison.

    Work that is not done leaves None in its numbers, or no entry at all; work that was not planned has no entry.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_version: int = Field(COMPARISON_SCHEMAS[-1], alias="schema")
    name: str
    """Its title."""
    finished: bool
    """Whether all planned work is done."""
    config: str
    """The resolved recipe, as TOML."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    """Package -> the version that models were trained with; several with "and" between them."""
    git_commit: str | None = None
    """The commit that models were trained at, with "+" if it was changed since; None if it was in no repository."""
    device: str | None = None
    """What models were trained on; None if an earlier version trained them. Without models, who summarised it."""
    seeds: tuple[int, ...]
    """The training seeds; lists named `seeds` in other entries have one value per seed, in this order."""
    shots: tuple[Shots, ...]
    """The numbers of shots that every arm is evaluated with, ascending."""
    match: str
    """The amount that is equal for all arms: tokens, answers or flops."""
    arms: tuple[ArmEntry, ...]
    """The arms, in the order of the tables."""
    tasks: tuple[TaskEntry, ...]
    grid: tuple[WorkDone, ...] = ()
    """How much of the work is done."""
    costs: tuple[Cost, ...] = ()
    """What the arms spent in training."""
    trials: tuple[Trial, ...] = ()
    """The learning rates that were tried."""
    tuned: tuple[Tuned, ...] = ()
    """What was chosen for the models of tuned arms."""
    chosen: tuple[ChosenShots, ...] = ()
    """The numbers of shots that were chosen on validation rows."""
    curves: tuple[CurvePoint, ...] = ()
    """Scores by task."""
    means: tuple[MeanPoint, ...] = ()
    """Scores by role and family."""
    headline: tuple[HeadlineScore, ...] = ()
    """The numbers of the first table."""
    differences: tuple[PairDifference, ...] = ()
    """Paired differences between arms."""
    flatness: tuple[Flatness, ...] = ()
    """Whether more shots help."""
    forgetting: Forgetting = Forgetting()
    """What training took away, and gave."""
    shot_losses: tuple[ShotLoss, ...] = ()
    """Training losses by number of shots."""
    flips: tuple[Flip, ...] = ()
    """Answers after shots with exchanged labels."""
    orders: tuple[OrderSpread, ...] = ()
    """Scores after the same shots in other orders."""
    confidence: tuple[ArmConfidence, ...] = ()
    """Whether arms know when they are right; none in a file of an earlier version."""
    examples: tuple[ExampleQuery, ...] = ()
    """A few queries with every arm's answers."""
    plain_path: PlainPath | None = None
    """The cost of whole prompts; None if all models can share their encoded shots."""

    @cached_property
    def done_seeds(self) -> tuple[int, int]:
        """The fewest and the most finished training seeds of a number of the first table or a difference."""
        scores = [count_seeds(one.seeds) for one in self.headline if one.score is not None]
        pairs = [count_seeds(pair.seeds) for pair in self.differences if pair.difference is not None]
        return min([*scores, *pairs], default=0), max([*scores, *pairs], default=0)

    @property
    def few_seeds(self) -> bool:
        """Whether some number has too few finished training seeds to generalise beyond these runs."""
        return self.done_seeds[0] < MIN_SEEDS

    @cached_property
    def place(self) -> dict[str, int]:
        """Arm -> its place in the tables, which also decides its colour."""
        return {arm.arm: place for place, arm in enumerate(self.arms)}

    def arm_of(self, arm: str) -> ArmEntry:
        """Return an arm by its name.

        Raises:
            KeyError: there is no such arm.
        """
        return self.arms[self.place[arm]]

    def title_of(self, arm: str) -> str:
        """Return an arm's name for readers."""
        return self.arms[self.place[arm]].title if arm in self.place else arm

    def tasks_of(self, role: str) -> list[TaskEntry]:
        """Return the tasks of one role."""
        return [task for task in self.tasks if task.role == role]

    @property
    def roles(self) -> list[Role]:
        """The roles that have tasks, held-out ones last."""
        every: tuple[Role, ...] = ("trained", "held-out")
        return [role for role in every if self.tasks_of(role)]

    @property
    def families(self) -> list[str]:
        """The families, in the order of the tasks."""
        return list(dict.fromkeys(task.family for task in self.tasks))

    @cached_property
    def curve_points(self) -> dict[tuple[str, str], list[CurvePoint]]:
        """(arm, task) -> the points of its curve by rising shots."""
        points: dict[tuple[str, str], list[CurvePoint]] = {}
        for point in sorted(self.curves, key=lambda point: shots_order(point.shots)):
            points.setdefault((point.arm, point.task), []).append(point)
        return points

    def mean_points(self, arm: str, role: str, family: str | None = None) -> list[MeanPoint]:
        """Return an arm's mean curve by rising shots."""
        points = [point for point in self.means if (point.arm, point.role, point.family) == (arm, role, family)]
        return sorted(points, key=lambda point: shots_order(point.shots))

    def most_tasks(self, role: str, family: str | None = None) -> int:
        """Return how many tasks a mean of this kind is over if an arm has them all."""
        return max((point.tasks for point in self.means if (point.role, point.family) == (role, family)), default=0)

    def num_extrapolated(self, point: MeanPoint) -> int:
        """Return on how many tasks of a mean the arm had more shots than in training, as its curves have it."""
        if not point.extrapolated:
            return 0
        names = {task.task for task in self.tasks_of(point.role) if point.family in (None, task.family)}
        curves = [one for one in self.curves if (one.arm, one.shots) == (point.arm, point.shots) and one.task in names]
        # A file may have means without curves.
        return sum(one.extrapolated and one.score is not None for one in curves) or point.tasks

    def is_extrapolated(self, point: MeanPoint) -> bool:
        """Return whether a mean counts as extrapolated: most of its tasks are."""
        return 2 * self.num_extrapolated(point) > point.tasks

    def headline_score(self, arm: str, role: str, asked: str) -> HeadlineScore | None:
        """Return one number of the first table; None if there is none."""
        found = (one for one in self.headline if (one.arm, one.role, one.asked) == (arm, role, asked))
        return next(found, None)

    @property
    def chooses_shots(self) -> bool:
        """Whether numbers of shots were chosen on validation rows, or it is not known how they were picked."""
        return not self.chosen or any(entry.scores for entry in self.chosen)

    @property
    def asked_order(self) -> tuple[str, ...]:
        """Ways to pick numbers of shots, in the order in which arms are compared: the first that there is counts.

        Where no number was chosen on validation rows, "chosen" is the most that each arm was trained with, so that an
        arm with 5 shots would be compared with one that has hundreds.
        """
        return ("chosen", "most", "fill", "zero") if self.chooses_shots else ("most", "fill", "chosen", "zero")

    def main_asked(self, role: str) -> str:
        """Return how the numbers of shots are picked that arms are compared at first on the tasks of a role."""
        known = {pair.asked for pair in self.differences if pair.role == role}
        return next((asked for asked in self.asked_order if asked in known), "chosen")

    def distinct_pairs(self, role: str) -> list[tuple[PairDifference, list[str]]]:
        """Return the known differences on the tasks of a role, each with all ways of asking that came to its shots.

        So chosen shots that are the most are one entry. They are in the order of the arms, and of each pair of arms
        that with chosen shots is the first, before rising numbers.
        """
        groups: dict[object, list[PairDifference]] = {}
        for pair in self.differences:
            if pair.role == role and pair.difference is not None:
                own = pair.shots_by_task or (None if None not in (pair.shots_a, pair.shots_b) else pair.asked)
                key = (pair.a, pair.b, pair.shots_a, pair.shots_b, str(own), pair.tasks, pair.difference)
                groups.setdefault(key, []).append(pair)
        arms = list(dict.fromkeys((pair.a, pair.b) for pair in self.differences))

        def place(pairs: list[PairDifference]) -> tuple[int, bool, float]:
            first = pairs[0]
            shots = shots_order(FILL if first.shots_a is None else first.shots_a)
            return arms.index((first.a, first.b)), first.asked != "chosen", shots

        return [(pairs[0], [pair.asked for pair in pairs]) for pairs in sorted(groups.values(), key=place)]


def tell_missing(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what is missing from an unfinished comparison: (arm and seed, the missing work) in words."""
    missing: dict[tuple[str, int], list[WorkDone]] = {}
    for work in comparison.grid:
        if work.done < work.total:
            missing.setdefault((work.arm, work.seed), []).append(work)
    return [
        (f"{comparison.title_of(arm)}, seed {seed}", "; ".join(map(_tell_work, parts)))
        for (arm, seed), parts in missing.items()
    ]


def _tell_work(work: WorkDone) -> str:
    """Return "training 7 of 18 done", or "training not begun"."""
    done = f"{work.done:,} of {work.total:,} done" if work.done else "not begun"
    return f"{_WORK_NAMES.get(work.what, work.what)} {done}"


def tell_progress(comparison: Comparison) -> str:
    """Return how far the whole comparison is."""
    done, total = sum(work.done for work in comparison.grid), sum(work.total for work in comparison.grid)
    return f"{done:,} of {total:,} pieces of work done"


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write comparison.json into a comparison's folder."""
    content = comparison.model_dump(by_alias=True)
    write_atomically(folder / COMPARISON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_comparison(folder: Path) -> Comparison:
    """Return the comparison that `compare` left in its folder.

    Raises:
        UserError: there is none, it is broken, or another version of this package wrote it.
    """
    path = folder / COMPARISON_FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        fix = "give the folder of a `manyicl compare`"
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except ValueError as error:
        fix = f"manyicl compare --resume {shlex.quote(str(folder))} writes it anew"
        raise UserError(f"{path}: is not JSON ({error}); {fix}") from error
    return check_comparison(content, path=path)


def check_comparison(content: Any, *, path: Path = Path(COMPARISON_FILE)) -> Comparison:
    """Return the content of a comparison.json with its types.

    Raises:
        UserError: it has another schema, or an entry is missing or of the wrong type.
    """
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in COMPARISON_SCHEMAS:
        found = "no schema" if schema is None else f"schema {schema!r}"
        fix = "a comparison of this version with `resume` writes it anew"
        raise UserError(f"{path}: has {found}, not {' or '.join(map(str, COMPARISON_SCHEMAS))}; {fix}")
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        value = repr(first["input"])
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        fix = "a comparison with `resume` writes it anew"
        raise UserError(f"{path}: {place}: {first['msg']}, found {shown}; {fix}") from error
