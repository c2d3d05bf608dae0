"""Does the model know when it is right? Expected calibration error, reliability, and scores of the surest answers.

An answer's confidence is the probability that it has among its known answers (`inference.answering.choices`). Legend:
D draws, Q queries, N = D Q answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # predictions and points are made of what is here
    from manyicl.evaluation.points import Prediction

NUM_BINS = 10
# At which confidences "don't answer" is tried.
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_NUM_RESAMPLES = 400

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Answers of about the same confidence."""

    confidence: float
    """Mean confidence."""
    score: float
    """Mean score. In a calibrated model it equals the confidence."""
    num_answers: int
    """How many answers are in the bin."""


@dataclass(frozen=True, slots=True)
class CoveragePoint:
    """What remains if answers below a confidence are not given."""

    threshold: float
    """The least confidence of a given answer."""
    coverage: float
    """Fraction of the queries that get an answer."""
    score: float | None
    """Mean score of the given answers; None if none is."""


@dataclass(frozen=True, slots=True)
class Confidence:
    """How well the confidences of answers tell which are right."""

    num_answers: int
    """Answers over all draws."""
    mean: float
    """Mean confidence; above the mean score, the model is too sure."""
    ece: float
    """Expected calibration error, 0 to 1 (`calibration_error`)."""
    low: float
    """Lower end of its 95 % interval; 0 if the answers of a calibrated model could look like these."""
    high: float
    """Upper end of the interval."""
    aurc: float
    """Area under the risk-coverage curve (`risk_coverage_area`); lower is better."""
    bins: tuple[ReliabilityBin, ...]
    """By rising confidence."""
    coverage: tuple[CoveragePoint, ...]
    """By rising threshold (`THRESHOLDS`)."""


def measure_confidence(answers: Iterable[Prediction]) -> Confidence | None:
    """Return how well confidences tell which answers are right; None without answers, or if one has no confidence.

    The 95 % interval is a basic bootstrap over queries, all draws of a query together: with q the quantiles of the
    resampled errors, it is [2 e - q(0.975), 2 e - q(0.025)], which also takes away most of the bias (the error of few
    answers is too high on average). Near 0 a bootstrap is too sure. So `low` is 0 if the error is no larger than 97.5 %
    of those that a calibrated model with the same confidences would have (consistency resampling, Broecker and Smith
    2007, Weather and Forecasting 22:651-661).
    """
    rows = list(answers)
    if not rows or any(row.confidence is None for row in rows):
        return None
    by_query: dict[tuple[str, str], list[Prediction]] = {}
    for row in rows:
        by_query.setdefault((row.task, row.query), []).append(row)
    groups = list(by_query.values())
    sizes = np.array([len(group) for group in groups])
    starts = np.cumsum(sizes) - sizes
    confidences_N = np.array([row.confidence for group in groups for row in group], dtype=np.float64)
    scores_N = np.array([row.score for group in groups for row in group], dtype=np.float64)
    error = calibration_error(confidences_N, scores_N)
    rng = np.random.default_rng(0)  # the same interval whenever the same answers are read

    def resample() -> float:
        chosen = rng.integers(0, len(groups), len(groups))
        places = np.concatenate([starts[g] + np.arange(sizes[g]) for g in chosen])
        return calibration_error(confidences_N[places], scores_N[places])

    def simulate() -> float:  # one number per query: its draws are right together, which is the widest
        return calibration_error(
            confidences_N, (np.repeat(rng.random(len(groups)), sizes) < confidences_N).astype(float)
        )

    low, high = (2 * error - q for q in _quantiles(resample)[::-1])
    if error <= _quantiles(simulate)[1]:
        low = 0.0
    return Confidence(
        num_answers=len(rows),
        mean=float(confidences_N.mean()),
        ece=error,
        low=min(max(0.0, low), error),
        high=max(min(1.0, high), error),
        aurc=risk_coverage_area(confidences_N, scores_N),
        bins=tuple(reliability(confidences_N, scores_N)),
        coverage=tuple(cover(confidences_N, scores_N)),
    )


def _quantiles(draw: Callable[[], float]) -> tuple[float, float]:
    low, high = np.quantile([draw() for _ in range(_NUM_RESAMPLES)], [0.025, 0.975])
    return float(low), float(high)


def calibration_error(confidences_N: Array, scores_N: Array) -> float:
    """Return the expected calibration error: sum over bins of n_b / N |mean score - mean confidence|.

    Guo et al. 2017 (arXiv 1706.04599), equation 3, but with 10 bins of equally many answers, since confidences crowd
    near 1 (the adaptive error of Nixon et al. 2019, arXiv 1904.01685). Equal confidences share a bin.
    """
    bins = reliability(confidences_N, scores_N)
    return float(sum(one.num_answers * abs(one.score - one.confidence) for one in bins) / len(confidences_N))


def reliability(confidences_N: Array, scores_N: Array, *, num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """Return bins of about equally many answers by rising confidence; equal confidences are never in two bins."""
    order = np.argsort(confidences_N, kind="stable")
    sure_N, right_N = confidences_N[order], scores_N[order]
    cuts = np.arange(1, num_bins + 1) * len(order) // num_bins
    stops = np.unique(np.searchsorted(sure_N, sure_N[np.maximum(cuts, 1) - 1], side="right"))
    starts = np.concatenate([[0], stops[:-1]])
    counts = stops - starts
    means = np.add.reduceat(sure_N, starts) / counts, np.add.reduceat(right_N, starts) / counts
    return [
        ReliabilityBin(confidence, score, count)
        for confidence, score, count in zip(means[0].tolist(), means[1].tolist(), counts.tolist(), strict=True)
    ]


def cover(confidences_N: Array, scores_N: Array) -> list[CoveragePoint]:
    """Return coverage and mean score of the answers whose confidence is at least each of `THRESHOLDS`."""
    points = []
    for threshold in THRESHOLDS:
        given = confidences_N >= threshold
        score = float(scores_N[given].mean()) if given.any() else None
        points.append(CoveragePoint(threshold, float(given.mean()), score))
    return points


def risk_coverage_area(confidences_N: Array, scores_N: Array) -> float:
    """Return the mean, over all answers, of the error (1 - score) of the answers that are at least as sure.

    The area under the risk-coverage curve of Geifman and El-Yaniv 2017 (arXiv 1705.08500). Confidences that tell
    nothing give the mean error; equal confidences are answered together.
    """
    order = np.argsort(-confidences_N, kind="stable")
    risks_N = np.cumsum(1 - scores_N[order]) / np.arange(1, len(order) + 1)
    last_N = np.searchsorted(-confidences_N[order], -confidences_N[order], side="right") - 1
    return float(risks_N[last_N].mean())


def confidence_from_json(content: Mapping[str, Any] | None) -> Confidence | None:
    """Return what a result file says of confidences; None if it says nothing."""
    if content is None:
        return None
    known = {one.name: content[one.name] for one in fields(Confidence)}
    parts: Sequence[tuple[str, type[Any]]] = (("bins", ReliabilityBin), ("coverage", CoveragePoint))
    return Confidence(**known | {name: tuple(kind(**entry) for entry in known[name]) for name, kind in parts})
