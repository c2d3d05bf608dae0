"""Shot curves, their points, and the predictions that they are made from; the predictions file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyicl.evaluation.scoring.confidence import Confidence, confidence_from_json
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
        ("confidence", pa.float64()),
    ]
)
_MAPS = ("choice_nll", "other_scores")  # kept as lists of pairs


@dataclass(frozen=True, slots=True)
class DrawPoint:
    """One draw at one number of shots: its score, and what an audit found among its shots."""

    draw: int
    """Number of the draw, from 0."""
    score: float
    """Mean score of its queries."""
    shots_sha256: str
    """Of the shots' ids in order: equal if the shots are, whatever drew them."""
    num_copies: int
    """Queries whose very input is among the shots."""
    num_near_copies: int
    """Further queries with a near-duplicate among the shots (tasks/duplicates.py)."""
    top_label_share: float | None
    """Fraction of the shots with the commonest label; None at 0 shots, and if the task has no labels."""
    num_missing_labels: int | None
    """Labels without a shot; None at 0 shots, and if the task has no labels."""
    num_cut: int
    """Generated answers that reached the limit."""
    num_shots: int = 0
    """How many shots the draw has; with `fill`, draws differ."""


@dataclass(frozen=True, slots=True)
class ShotPoint:
    """One point of a shot curve; scores and nats are None if nothing was scored, never 0."""

    shots: Shots
    """Number of shots, or `fill`."""
    score: float | None
    """Mean score over draws and queries."""
    low: float | None
    """Lower end of the score's 95 % interval."""
    high: float | None
    """Upper end of the interval."""
    nll: float | None
    """Mean nats of the reference answer, terminator included."""
    num_scored: int
    """Scored answers: queries times draws."""
    num_unfit: int
    """Queries that do not fit after the most shots asked for, and are left out at every number of shots."""
    majority_score: float | None
    """Score of always giving the commonest train answer."""
    other_scores: Mapping[str, float] = field(default_factory=dict)
    """Further metrics: name -> mean score."""
    chance_score: float | None = None
    """Score of answering by dice; None if the answers are open."""
    num_cut: int = 0
    """Generated answers that reached the limit."""
    extrapolated: bool = False
    """Whether there are more shots than the model was trained with."""
    spread: float | None = None
    """Standard deviation of the draws' scores; None with one draw."""
    worst_draw: float | None = None
    """Lowest score of a draw; None with one draw."""
    best_draw: float | None = None
    """Highest score of a draw; None with one draw."""
    draws: tuple[DrawPoint, ...] = ()
    """Each draw's own figures; none in a one-pass curve."""
    unanswered: Mapping[str, int] = field(default_factory=dict)
    """Reason -> queries that a server gave no answer to; such a point has no score."""
    why_not: str = ""
    """Why nothing was asked here, such as "it has only 12 train rows"; "" if it was."""
    mean_shots: float | None = None
    """Mean number of shots over the draws; None if nothing was asked."""
    confidence: Confidence | None = None
    """Whether the model knows when it is right; None if its answers have no confidence."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered query; a row of the predictions file."""

    task: str
    """Name of the task."""
    draw: int
    """Number of the draw of shots, from 0."""
    shots: int
    """How many shots stood before the query."""
    query: str
    """Id of the test row."""
    prediction: str
    """The model's answer."""
    answer: str
    """The reference answer."""
    score: float
    """By the task's metric, 0 to 1; the best over all right answers."""
    nll: float | None
    """Nats of the reference answer, terminator included; None from a server, which reports none."""
    cut: bool = False
    """Whether a generated answer reached the limit."""
    choice_nll: Mapping[str, float] | None = None
    """Nats of every known answer; None if the answer was generated."""
    fill: bool = False
    """Whether the shots were as many as fit, so that it belongs to the point `fill`."""
    other_scores: Mapping[str, float] | None = None
    """By further metrics (`scoring.answers.other_metrics`); None in a file of an earlier version."""
    confidence: float | None = None
    """Probability of the model's answer among the known ones, or the share of samples that gave it; else None."""

    @property
    def asked(self) -> Shots:
        """The number of shots that was asked for: the point it belongs to."""
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
    """The curve of one task, and the predictions that it was made from."""

    task: str
    """Name of the task."""
    family: str
    """Its family, such as "classification"."""
    metric: str
    """The metric of `ShotPoint.score`."""
    num_queries: int
    """Test rows asked at every point."""
    num_draws: int
    """Draws of shots."""
    points: tuple[ShotPoint, ...]
    """One per number of shots, ascending."""
    predictions: tuple[Prediction, ...] = ()
    """Every scored answer; none in a one-pass curve."""
    sha256: str = ""
    """The task's hash (`tasks.Task`)."""
    num_encoded_tokens: int | None = None
    """Tokens of heads and shots that a whole sweep encodes, each draw once; None if queries could not share them, and
    if a server or one pass answered."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows that take no part because they are too long (`sweep.TaskSweep`)."""
    plain_path: PlainPath | None = None
    """What whole prompts cost; None if the encoded shots were shared, and if a server or one pass answered."""
    template: int | None = None
    """Number of the task's template that wrote shots and queries, from 1; None if the task has only one."""


def curve_from_json(entry: Mapping[str, Any], predictions: Sequence[Prediction]) -> ShotCurve:
    """Return a curve from its task's entry in a result file, of this version or an earlier one.

    Raises:
        KeyError, TypeError: the entry lacks something.
    """
    points = []
    for point in entry["curve"]:
        draws = tuple(DrawPoint(**known_fields(DrawPoint, draw)) for draw in point["draws"])
        confidence = confidence_from_json(point.get("confidence"))
        points.append(ShotPoint(**known_fields(ShotPoint, point) | {"draws": draws, "confidence": confidence}))
    path = entry.get("plain_path")
    return ShotCurve(
        **known_fields(ShotCurve, entry)
        | {
            "points": tuple(points),
            "predictions": tuple(predictions),
            "plain_path": None if path is None else PlainPath(**path),
        }
    )


def known_fields(kind: type[Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `content` says of the fields of a dataclass; other versions may have written more."""
    names = {one.name for one in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def sum_plain_paths(paths: Iterable[PlainPath | None]) -> PlainPath | None:
    """Return the tokens of several curves together; None if none of them took the plain path."""
    known = [path for path in paths if path is not None]
    if not known:
        return None
    return PlainPath(sum(p.processed_tokens for p in known), sum(p.shared_tokens for p in known))


def predictions_bytes(predictions: Sequence[Prediction]) -> bytes:
    """Return the predictions as a Parquet file's content."""
    buffer = io.BytesIO()
    rows = [asdict(p) for p in predictions]
    for row in rows:
        for key in _MAPS:
            row[key] = None if row[key] is None else list(row[key].items())
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_predictions(path: Path) -> list[Prediction]:
    """Return the rows of a predictions file.

    Raises:
        OSError, pyarrow.ArrowException: it cannot be read, or is no whole Parquet file.
    """
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        for key in _MAPS:
            row[key] = None if row.get(key) is None else dict(row[key])
    return [Prediction(**row) for row in rows]
