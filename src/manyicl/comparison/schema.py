"""The entries of comparison.json, as they are written and as reports read them (docs/comparison-format.md).

Scores are from 0 to 1. `low` and `high` are the ends of a 95 % interval, None if there is none. `seeds` has one value
per training seed, None if the work that it needs is not done. Fields are in the order of the file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from manyicl.comparison.settings import Role, TaskRole
from manyicl.evaluation import CoveragePoint, ReliabilityBin, Shots
from manyicl.planning import Overlap

# A change below one point is called flat, however certain it is.
FLAT_GAIN = 0.01
# With int beside float, a whole number stays one in the file.
Number = int | float | None
Seeds = tuple[float | None, ...]
AskedAs = Literal["chosen", "zero", "fewest", "most"]


def count_seeds(seeds: Seeds) -> int:
    """Return how many seeds have a value."""
    return sum(value is not None for value in seeds)


class Entry(BaseModel):
    """One entry of the file. Fields that a newer version adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ArmEntry(Entry):
    """One arm: how it was trained."""

    arm: str
    title: str
    """Its name for readers."""
    trained_shots: int | None = None
    """Most shots that an answer was trained after; None for the base, and if it differs by task."""
    fewer_shots: str = ""
    """On which tasks it was trained with fewer shots than its own number, and why; "" if on none."""
    learning_rate: Number = None
    """None if its models have different ones."""
    matched: bool = True
    """Whether it spent as much as the other arms."""
    trained: bool | None = None
    """None in files of earlier versions."""
    num_models: int = 1
    about: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether it was trained at all; in files of earlier versions all arms but the base were."""
        return self.arm != "base" if self.trained is None else self.trained


class TaskEntry(Entry):
    """One task: its rows, and those that were dropped."""

    task: str
    family: str
    metric: str
    role: TaskRole
    asked: bool = True
    """Whether it is evaluated."""
    dedicated: bool = False
    """Whether it has a model of its own in some arm."""
    num_train: int
    num_validation: int
    num_test: int
    num_labels: int | None = None
    """None if its answers are open."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Reason -> rows that were dropped for it."""
    overlap: Overlap | None = None
    """Rows shared with train rows of trained tasks; None for a trained task, and in files of earlier versions."""
    sha256: str


class WorkDone(Entry):
    """How much of one kind of work is done, for one arm and seed."""

    arm: str
    seed: int
    what: str
    """The kind of work, such as "train" or "test"."""
    done: int
    total: int


class Cost(Entry):
    """What one arm spent with one seed, all its models together.

    A count is None if a run of an earlier version did not make it.
    """

    arm: str
    seed: int
    steps: int | None = None
    packs: int | None = None
    episodes: int | None = None
    short_episodes: int | None = None
    """Episodes with fewer shots than the arm's number."""
    answers: int | None = None
    """Answers that were targets."""
    targets: int | None = None
    """Tokens that were targets."""
    tokens: int | None = None
    """Tokens that went through the model in training, without padding."""
    flops: Number = None
    head_tokens: int | None = None
    """Tokens of instructions and BOS, among `tokens`."""
    train_rows: int | None = None
    target_rows: int | None = None
    """Train rows that were a target at least once."""
    wall_s: Number = None
    peak_bytes: int | None = None

    @property
    def epochs(self) -> float | None:
        """How often a train row is a target, the mean over rows."""
        return _divide(self.answers, self.train_rows)

    @property
    def target_share(self) -> float | None:
        """The fraction of the train rows that are a target at least once."""
        return _divide(self.target_rows, self.train_rows)

    @property
    def head_share(self) -> float | None:
        """The fraction of the processed tokens that is spent on instructions."""
        return _divide(self.head_tokens, self.tokens)


def _divide(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


class Trial(Entry):
    """One learning rate that was tried, judged on validation rows unless its loss was not finite (`diverged`)."""

    arm: str
    task: str | None = None
    """The task of the model, if the arm is tuned for each task separately."""
    learning_rate: float
    shots: Shots | None = None
    """The number of shots with the best score."""
    score: Number = None
    nll: Number = None
    """Nats per answer."""
    chosen: bool = False
    diverged: bool = False


class Tuned(Entry):
    """What was chosen for one model of a tuned arm."""

    arm: str
    task: str
    seed: int
    learning_rate: float
    step: int
    """The step of the checkpoint that became the model."""
    steps: int
    """The steps of the run."""


class ShotsScore(Entry):
    """A validation score at one number of shots."""

    shots: Shots
    score: Number = None


class ChosenShots(Entry):
    """With how many shots an arm is evaluated in the headline."""

    arm: str
    shots: Shots | None = None
    """The number with the best mean over the tasks' validation rows."""
    by_task: dict[str, Shots] = Field(default_factory=dict)
    """Each task's own number."""
    scores: tuple[ShotsScore, ...] = ()
    """The means over tasks that `shots` was chosen by."""


class CurvePoint(Entry):
    """One arm on one task at one number of shots."""

    arm: str
    task: str
    shots: Shots
    mean_shots: Number = None
    """The mean over draws and seeds; differs from `shots` if that is "fill"."""
    score: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    other_scores: dict[str, float] = Field(default_factory=dict)
    """Metric -> score, of the metrics beside the task's main one."""
    nll: Number = None
    """Nats per answer."""
    majority_score: Number = None
    """The score of always giving the most common answer."""
    chance_score: Number = None
    """The score of picking an option at random; None if answers are open."""
    num_scored: int = 0
    num_unfit: int | None = None
    """Queries that do not fit after the most shots, and so are left out at every number of shots."""
    num_cut: int = 0
    """Generated answers that reached the token limit."""
    num_copies: int | None = None
    """Queries whose very input is among the shots."""
    num_near_copies: int | None = None
    """Further queries with a near-duplicate among the shots."""
    extrapolated: bool = False
    """Whether these are more shots than the arm was trained with."""
    worst_draw: Number = None
    best_draw: Number = None


class MeanPoint(Entry):
    """One arm at one number of shots, the mean over all tasks of a role, or over one family of it."""

    arm: str
    role: Role
    family: str | None = None
    shots: Shots
    score: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    tasks: int
    """How many tasks were asked with so many shots."""
    majority_score: Number = None
    chance_score: Number = None
    extrapolated: bool = False


class HeadlineScore(Entry):
    """One number of the first table."""

    arm: str
    role: Role
    asked: str
    """How the numbers of shots were picked: "chosen", "zero" or "most"."""
    shots: Shots | None = None
    """None if tasks have different numbers."""
    shots_by_task: dict[str, Shots] = Field(default_factory=dict)
    tasks: int | None = None
    """How many tasks it is over; None in a file of schema 1."""
    score: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    best: bool = False
    """Whether it beats every other arm of the column: over five or more seeds, each paired interval is above zero."""


class PairDifference(Entry):
    """Arm `a` minus arm `b` on the same tasks, draws and queries."""

    role: Role
    tasks: int
    a: str
    b: str
    asked: str
    """How the numbers of shots were picked: "chosen", "zero", "most", or "each" for the same number."""
    shots_a: Shots | None = None
    """None if tasks have different numbers."""
    shots_b: Shots | None = None
    shots_by_task: dict[str, tuple[Shots, Shots]] = Field(default_factory=dict)
    """Task -> (shots of a, shots of b)."""
    difference: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    sentence: str = ""


class Flatness(Entry):
    """Whether more shots help an arm: its score at the most shots minus that at the fewest."""

    arm: str
    role: Role
    tasks: int | None = None
    """None in files of earlier versions."""
    from_shots: Shots | None = None
    """None if tasks have different numbers."""
    to_shots: Shots | None = None
    difference: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    flat: bool = False
    """Whether the change is below one point or may be chance."""
    sentence: str = ""


class TextChange(Entry):
    """Bits per byte of one neutral text, before and after training; positive differences are losses."""

    arm: str
    file: str
    num_bytes: int | None = None
    unknown_tokens: int = 0
    """Tokens of the text that stand for characters outside the vocabulary."""
    before: Number = None
    after: Number = None
    difference: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()


class TaskChange(Entry):
    """The score on untrained tasks, before and after training; positive differences are gains."""

    arm: str
    kind: Literal["forgetting", "transfer"]
    """"forgetting" on tasks that the base could do, "transfer" on the others."""
    asked: Literal["fewest", "most"] | None = None
    """Whether each task has its fewest or its most shots; None in files of schema 1."""
    shots: Shots | None = None
    """None if tasks have different numbers."""
    shots_by_task: dict[str, Shots] = Field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    before: Number = None
    after: Number = None
    difference: Number = None
    low: Number = None
    high: Number = None
    seeds: Seeds = ()


Scored = CurvePoint | MeanPoint | HeadlineScore
Change = PairDifference | Flatness | TextChange | TaskChange


class DriftPoint(Entry):
    """Bits per byte of one neutral text at one checkpoint."""

    arm: str
    seed: int
    step: int
    tokens: int
    """Tokens trained on by then."""
    file: str
    bits_per_byte: Number = None


class Forgetting(Entry):
    """What training took away, and gave."""

    window_tokens: int | None = None
    bos: bool | None = None
    """Whether each window of text began with a BOS."""
    text: tuple[TextChange, ...] = ()
    tasks: tuple[TaskChange, ...] = ()
    drift: tuple[DriftPoint, ...] = ()


class ShotLoss(Entry):
    """The training loss of answers after so many shots of their episode, at one step."""

    arm: str
    seed: int
    step: int
    tokens: int
    """Tokens trained on by then."""
    shots: str
    """A range such as "2-3"."""
    nats_a_token: Number = None


class Flip(Entry):
    """What an arm answers after shots whose labels are exchanged."""

    arm: str
    role: Role
    shots: Shots | None = None
    """None if tasks have different numbers."""
    tasks: int
    follows: Number = None
    """The fraction of answers that go along with the exchanged labels; `low` and `high` are its interval."""
    low: Number = None
    high: Number = None
    seeds: Seeds = ()
    keeps: Number = None
    """The fraction of answers that keep the true label."""
    plain: Number = None
    """The score with true labels."""


class ArmConfidence(Entry):
    """Whether an arm knows when it is right, at each task's most shots, over all seeds, draws and queries."""

    arm: str
    role: Role
    tasks: int
    """Tasks whose answers have a confidence."""
    score: float
    """Mean score of these answers. The rest is as in `evaluation.Confidence`."""
    num_answers: int
    mean: float
    ece: float
    low: float
    high: float
    aurc: float
    bins: tuple[ReliabilityBin, ...]
    coverage: tuple[CoveragePoint, ...]


class OrderSpread(Entry):
    """The standard deviation of the score over orders of the same shots, and over draws of shots."""

    arm: str
    role: Role
    shots: Shots | None = None
    """None if tasks have different numbers."""
    tasks: int
    spread_of_orders: Number = None
    spread_of_draws: Number = None


class ExampleQuery(Entry):
    """A query, and what every arm answered."""

    task: str
    family: str
    role: Role
    input: str
    answer: str
    shots: dict[str, int | None] = Field(default_factory=dict)
    predictions: dict[str, str | None] = Field(default_factory=dict)
    scores: dict[str, Number] = Field(default_factory=dict)


class PlainPath(Entry):
    """Tokens that the evaluations processed if a model cannot share its encoded shots between queries."""

    processed_tokens: int
    shared_tokens: int
    """Tokens that sharing would have processed."""
    fault: str = ""
    """Why it cannot share them; continues "the model"."""
