"""comparison.json, read and checked once (docs/comparison-format.md); everything a report says comes from it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyicl.errors import UserError
from manyicl.evaluation import Shots, shots_order
from manyicl.planning import Overlap

# In 1 all tasks of a column had the same number of shots; in 2 each task has its own.
COMPARISON_SCHEMAS = (1, 2)
COMPARISON_NAME = "comparison.json"
# So many training seeds make an interval one over seeds; with fewer each seed is shown.
ENOUGH_SEEDS = 5

Role = Literal["trained", "held-out"]
TaskRole = Literal["trained", "held-out", "familiar"]
Number = float | None
Seeds = tuple[float | None, ...]


def _divide(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def count_seeds(seeds: Seeds) -> int:
    """Return how many seeds have a value."""
    return sum(value is not None for value in seeds)


class Part(BaseModel):
    """One entry of the file. Fields that a newer version adds are no error."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Arm(Part):
    """One way of training."""

    arm: str
    title: str
    trained_shots: int | None = None
    learning_rate: Number = None
    matched: bool = True
    trained: bool | None = None
    num_models: int = 1
    about: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether it was trained at all; files of earlier versions do not say so, and have one base."""
        return self.arm != "base" if self.trained is None else self.trained


class TaskEntry(Part):
    """One task: what it has, and what was left out of it."""

    task: str
    family: str
    metric: str
    role: TaskRole
    dedicated: bool = False
    num_train: int
    num_validation: int
    num_test: int
    num_labels: int | None = None
    dropped: dict[str, int] = Field(default_factory=dict)
    overlap: Overlap | None = None
    """With the train rows of trained tasks; None for a trained one, and in files of earlier versions."""
    sha256: str


class WorkItem(Part):
    """How much of one kind of work is done, in cells."""

    arm: str
    seed: int
    what: str
    done: int
    total: int


class Cost(Part):
    """What one arm spent with one seed."""

    arm: str
    seed: int
    steps: int | None = None
    packs: int | None = None
    episodes: int | None = None
    answers: int | None = None
    targets: int | None = None
    tokens: int | None = None
    flops: Number = None
    head_tokens: int | None = None
    train_rows: int | None = None
    target_rows: int | None = None
    wall_s: Number = None
    peak_bytes: int | None = None

    @property
    def epochs(self) -> float | None:
        """How often a train row is a target, the mean over rows."""
        return _divide(self.answers, self.train_rows)

    @property
    def target_share(self) -> float | None:
        """The share of the train rows that are a target at least once."""
        return _divide(self.target_rows, self.train_rows)

    @property
    def head_share(self) -> float | None:
        """The share of the processed tokens that are spent on instructions."""
        return _divide(self.head_tokens, self.tokens)


class Trial(Part):
    """One learning rate that was tried, judged on validation rows. nll: nats per answer.

    task: of an arm that is tuned for each task alone, the task of the model.
    """

    arm: str
    task: str | None = None
    learning_rate: float
    shots: Shots | None = None
    score: Number = None
    nll: Number = None
    chosen: bool = False


class PlainPath(Part):
    """What the evaluations cost in tokens if the model cannot share its encoded shots; see `cells.PlainPath`."""

    processed_tokens: int
    shared_tokens: int
    fault: str = ""
    """Why, to follow "the model"."""


class Tuned(Part):
    """What was chosen for one model of a tuned arm: its rate, and its checkpoint at `step` of `steps`."""

    arm: str
    task: str
    seed: int
    learning_rate: float
    step: int
    steps: int


class ShotsScore(Part):
    """A validation score at one number of shots."""

    shots: Shots
    score: Number = None


class ChosenShots(Part):
    """The number of shots an arm is asked with, each task's own, and what the arm's was chosen from."""

    arm: str
    shots: Shots | None = None
    by_task: dict[str, Shots] = Field(default_factory=dict)
    scores: tuple[ShotsScore, ...] = ()


class Scored(Part):
    """A score with its interval, and one value a seed."""

    score: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()

    @property
    def num_seeds(self) -> int:
        """How many training seeds are finished and in it."""
        return count_seeds(self.seeds)


class CurveCell(Scored):
    """One arm on one task at one number of shots."""

    arm: str
    task: str
    shots: Shots
    mean_shots: Number = None
    other_scores: dict[str, float] = Field(default_factory=dict)
    nll: Number = None
    majority_score: Number = None
    chance_score: Number = None
    num_scored: int = 0
    num_unfit: int | None = None
    num_cut: int = 0
    num_copies: int | None = None
    num_near_copies: int | None = None
    extrapolated: bool = False
    worst_draw: Number = None
    best_draw: Number = None


class MeanCell(Scored):
    """One arm on all tasks of a role, or of one family of it."""

    arm: str
    role: Role
    family: str | None = None
    shots: Shots
    tasks: int
    majority_score: Number = None
    chance_score: Number = None
    extrapolated: bool = False


class HeadlineCell(Scored):
    """One number of the first table. shots: None if tasks differ; tasks: how many, None in a file of schema 1."""

    arm: str
    role: Role
    asked: str
    shots: Shots | None = None
    shots_by_task: dict[str, Shots] = Field(default_factory=dict)
    tasks: int | None = None
    best: bool = False


class Change(Part):
    """A signed difference with its interval."""

    difference: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()

    @property
    def num_seeds(self) -> int:
        """How many training seeds are finished and in it."""
        return count_seeds(self.seeds)


class PairDifference(Change):
    """Arm `a` less arm `b` on the same tasks, draws and queries. shots_a, shots_b: None if tasks differ."""

    role: Role
    tasks: int
    a: str
    b: str
    asked: str
    shots_a: Shots | None = None
    shots_b: Shots | None = None
    sentence: str = ""


class Flatness(Change):
    """Whether more shots help."""

    arm: str
    role: Role
    from_shots: Shots | None = None
    to_shots: Shots | None = None
    flat: bool = False
    sentence: str = ""


class TextChange(Change):
    """Bits per byte of one text, before and after."""

    arm: str
    file: str
    num_bytes: int | None = None
    before: Number = None
    after: Number = None


class TaskChange(Change):
    """Score on untrained tasks, before and after, at each one's fewest or most shots. shots: None if tasks differ."""

    arm: str
    kind: Literal["forgetting", "transfer"]
    asked: Literal["fewest", "most"] | None = None
    shots: Shots | None = None
    tasks: tuple[str, ...] = ()
    before: Number = None
    after: Number = None


class DriftPoint(Part):
    """Bits per byte of one text at one checkpoint."""

    arm: str
    seed: int
    step: int
    tokens: int
    file: str
    bits_per_byte: Number = None


class Forgetting(Part):
    """What training took away, and gave."""

    window_tokens: int | None = None
    bos: bool | None = None
    text: tuple[TextChange, ...] = ()
    tasks: tuple[TaskChange, ...] = ()
    drift: tuple[DriftPoint, ...] = ()


class ShotLoss(Part):
    """Training loss of the answers behind so many shots, at one step."""

    arm: str
    seed: int
    step: int
    tokens: int
    shots: str
    nats_a_token: Number = None


class Flip(Part):
    """What an arm answers when the labels of its shots are exchanged."""

    arm: str
    role: Role
    shots: Shots | None = None
    tasks: int
    follows: Number = None
    keeps: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    plain: Number = None


class OrderSpread(Part):
    """Spread over orders of the same shots, beside the spread over draws."""

    arm: str
    role: Role
    shots: Shots | None = None
    tasks: int
    spread_of_orders: Number = None
    spread_of_draws: Number = None


class ExampleQuery(Part):
    """A query, and what every arm answered."""

    task: str
    family: str
    role: Role
    input: str
    answer: str
    shots: dict[str, int | None] = Field(default_factory=dict)
    predictions: dict[str, str | None] = Field(default_factory=dict)
    scores: dict[str, Number] = Field(default_factory=dict)


class Comparison(Part):
    """A whole comparison. Where a cell is missing its numbers are None; what was not planned has no entry."""

    name: str
    finished: bool
    config: str
    versions: dict[str, str | None] = Field(default_factory=dict)
    git_commit: str | None = None
    device: str | None = None
    seeds: tuple[int, ...]
    shots: tuple[Shots, ...]
    match: str
    arms: tuple[Arm, ...]
    tasks: tuple[TaskEntry, ...]
    grid: tuple[WorkItem, ...] = ()
    costs: tuple[Cost, ...] = ()
    trials: tuple[Trial, ...] = ()
    tuned: tuple[Tuned, ...] = ()
    chosen: tuple[ChosenShots, ...] = ()
    curves: tuple[CurveCell, ...] = ()
    means: tuple[MeanCell, ...] = ()
    headline: tuple[HeadlineCell, ...] = ()
    differences: tuple[PairDifference, ...] = ()
    flatness: tuple[Flatness, ...] = ()
    forgetting: Forgetting = Forgetting()
    shot_losses: tuple[ShotLoss, ...] = ()
    flips: tuple[Flip, ...] = ()
    orders: tuple[OrderSpread, ...] = ()
    examples: tuple[ExampleQuery, ...] = ()
    plain_path: PlainPath | None = None

    @cached_property
    def done_seeds(self) -> tuple[int, int]:
        """The fewest and the most finished training seeds behind a number of the first table or a difference."""
        scores = [cell.num_seeds for cell in self.headline if cell.score is not None]
        pairs = [pair.num_seeds for pair in self.differences if pair.difference is not None]
        counts = [*scores, *pairs]
        return min(counts, default=0), max(counts, default=0)

    @property
    def few_seeds(self) -> bool:
        """Whether some number has too few finished training seeds to speak of more than these runs."""
        return self.done_seeds[0] < ENOUGH_SEEDS

    @cached_property
    def place(self) -> dict[str, int]:
        """Arm -> its place in the tables, which is also its colour."""
        return {arm.arm: place for place, arm in enumerate(self.arms)}

    def arm_of(self, arm: str) -> Arm:
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
    def curve_cells(self) -> dict[tuple[str, str], list[CurveCell]]:
        """(arm, task) -> its cells by rising shots."""
        cells: dict[tuple[str, str], list[CurveCell]] = {}
        for cell in sorted(self.curves, key=lambda cell: shots_order(cell.shots)):
            cells.setdefault((cell.arm, cell.task), []).append(cell)
        return cells

    def curves_of(self, arm: str) -> list[CurveCell]:
        """Return an arm's cells on all tasks."""
        return [cell for cell in self.curves if cell.arm == arm]

    def mean_cells(self, arm: str, role: str, family: str | None = None) -> list[MeanCell]:
        """Return an arm's mean curve by rising shots."""
        cells = [cell for cell in self.means if (cell.arm, cell.role, cell.family) == (arm, role, family)]
        return sorted(cells, key=lambda cell: shots_order(cell.shots))

    def most_tasks(self, role: str, family: str | None = None) -> int:
        """Return how many tasks a mean of this kind is over where an arm has them all."""
        return max((cell.tasks for cell in self.means if (cell.role, cell.family) == (role, family)), default=0)

    def headline_cell(self, arm: str, role: str, asked: str) -> HeadlineCell | None:
        """Return one number of the first table; None where there is none."""
        found = (cell for cell in self.headline if (cell.arm, cell.role, cell.asked) == (arm, role, asked))
        return next(found, None)


def read_comparison(folder: Path) -> Comparison:
    """Return the comparison that `manyicl compare --out FOLDER` left.

    Raises:
        UserError: there is none, it is broken, or another version of this package wrote it.
    """
    path = folder / COMPARISON_NAME
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        fix = "give the folder of a `manyicl compare`"
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); `manyicl compare --resume {folder}` writes it anew") from error
    return check_comparison(content, path=path)


def check_comparison(content: Any, *, path: Path = Path(COMPARISON_NAME)) -> Comparison:
    """Return the content of a comparison.json with its types.

    Raises:
        UserError: it has another schema, or an entry is missing or of the wrong type.
    """
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in COMPARISON_SCHEMAS:
        found = "no schema" if schema is None else f"schema {schema!r}"
        fix = "`manyicl compare --resume` of this version writes it anew"
        raise UserError(f"{path}: has {found}, not {' or '.join(map(str, COMPARISON_SCHEMAS))}; {fix}")
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        value = repr(first["input"])
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        fix = "`manyicl compare --resume` writes it anew"
        raise UserError(f"{path}: {place}: {first['msg']}, found {shown}; {fix}") from error
