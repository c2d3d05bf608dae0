"""The points of a shot curve and the answers behind them: what is measured, and the table it is kept in."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manyicl.evaluation.shots import FILL, Shots

PREDICTION_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("draw", pa.int32()),
        ("shots", pa.int32()),
        ("query", pa.string()),
        ("prediction", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("nll", pa.float64()),
        ("cut", pa.bool_()),
        ("choice_nll", pa.map_(pa.string(), pa.float64())),
        ("fill", pa.bool_()),
        ("other_scores", pa.map_(pa.string(), pa.float64())),
    ]
)


@dataclass(frozen=True, slots=True)
class DrawCell:
    """One draw at one number of shots: its score, and what an audit found among its shots.

    shots_sha256: of the shots' ids in their order; equal for equal shots, whatever drew them. num_copies: queries whose
    very input stands among the shots; num_near_copies: further queries with a near-duplicate there (copies.py).
    top_label_share: of the commonest label among the shots; num_missing_labels: labels without a shot; both are None
    at 0 shots and where the task has no labels. num_cut: generations that reached the limit. num_shots: how many shots
    the draw has; with `fill` draws differ.
    """

    draw: int
    score: float
    shots_sha256: str
    num_copies: int
    num_near_copies: int
    top_label_share: float | None
    num_missing_labels: int | None
    num_cut: int
    num_shots: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a shot curve; scores and nats are None where nothing was scored, never 0.

    nll: mean nats of the reference answer, terminator included. chance_score: of answering by dice, None if the answers
    are open. num_unfit: queries that do not fit behind the largest
    k that is asked, so at no k. num_cut: generations that reached the limit. extrapolated: more shots than trained.
    spread: standard deviation of the draws' scores; worst_draw, best_draw: the lowest and highest of them; all three
    are None where there is one draw. draws: each draw's own figures; none in a one-pass curve. unanswered: reason ->
    queries that a server gave no answer to; such a cell has no score. why_not: why nothing was asked here, such as "it
    has only 12 train rows"; "" if it was. mean_shots: mean over the draws; None if nothing was asked.
    """

    shots: Shots
    score: float | None
    low: float | None
    high: float | None
    nll: float | None
    num_scored: int
    num_unfit: int
    majority_score: float | None
    other_scores: Mapping[str, float] = field(default_factory=dict)
    chance_score: float | None = None
    num_cut: int = 0
    extrapolated: bool = False
    spread: float | None = None
    worst_draw: float | None = None
    best_draw: float | None = None
    draws: tuple[DrawCell, ...] = ()
    unanswered: Mapping[str, int] = field(default_factory=dict)
    why_not: str = ""
    mean_shots: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered query; a row of the predictions file.

    nll: nats of the reference answer, terminator included; None where a server answered, which tells none. cut: a
    generation that reached the limit. choice_nll: nats of every answer that was to choose from, None where the answer
    was generated. shots: how many stood before it. fill: these were as many as fit, and belong to the cell `fill`.
    other_scores: by the metrics that stand beside the task's own (scoring.other_metrics); None in a file of an earlier
    version.
    """

    task: str
    draw: int
    shots: int
    query: str
    prediction: str
    answer: str
    score: float
    nll: float | None
    cut: bool = False
    choice_nll: Mapping[str, float] | None = None
    fill: bool = False
    other_scores: Mapping[str, float] | None = None

    @property
    def asked(self) -> Shots:
        """The number of shots that was asked for: the cell it belongs to."""
        return FILL if self.fill else self.shots


@dataclass(frozen=True, slots=True)
class PlainPath:
    """Tokens put through a model whose cache cannot be shared, so that every prompt is processed as a whole.

    Tokens of generated answers are in neither count: each path processes them once.
    """

    processed_tokens: int
    """Tokens of all whole prompts: one prompt per option of a query; two per query whose answer is generated."""
    shared_tokens: int
    """Tokens that would be processed if the shots of a draw were encoded once and shared by its queries."""


@dataclass(frozen=True, slots=True)
class ShotCurve:
    """The curve of one task, and the predictions behind it. sha256: the task's (tasks.Task).

    num_encoded_tokens: tokens of heads and shots that a whole sweep encodes, each draw once; None where the model's
    cache cannot be shared, so that each query has its shots encoded anew, and where a server or one pass answered.
    left_out: reason -> rows that take no part because they are too long (sweep.TaskSweep).
    plain_path: what whole prompts cost; None if the model's cache was shared, and if a server or one pass answered.
    """

    task: str
    family: str
    metric: str
    num_queries: int
    num_draws: int
    cells: tuple[Cell, ...]
    predictions: tuple[Prediction, ...] = ()
    sha256: str = ""
    num_encoded_tokens: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    plain_path: PlainPath | None = None


def sum_plain_paths(paths: Iterable[PlainPath | None]) -> PlainPath | None:
    """Return the tokens of several curves together; None if none of them took the plain path."""
    known = [path for path in paths if path is not None]
    if not known:
        return None
    return PlainPath(sum(p.processed_tokens for p in known), sum(p.shared_tokens for p in known))


def predictions_bytes(predictions: Sequence[Prediction]) -> bytes:
    """Return the predictions as a Parquet file's content."""
    buffer = io.BytesIO()
    rows = [
        asdict(p) | {key: None if value is None else list(value.items()) for key, value in _maps_of(p).items()}
        for p in predictions
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_predictions(path: Path) -> list[Prediction]:
    """Return the rows of a predictions file.

    Raises:
        OSError, pyarrow.ArrowException: it cannot be read, or is no whole Parquet file.
    """
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        for key in ("choice_nll", "other_scores"):
            row[key] = None if row.get(key) is None else dict(row[key])
    return [Prediction(**row) for row in rows]


def _maps_of(prediction: Prediction) -> dict[str, Mapping[str, float] | None]:
    """Return the fields that a file keeps as lists of pairs."""
    return {"choice_nll": prediction.choice_nll, "other_scores": prediction.other_scores}
