"""Does the model know when it is right? Expected calibration error, reliability, and scores of the surest answers.

An answer's confidence is the probability that it has among its known answers (`inference.answering.choices`). Legend:
D draws, Q queries, N = D Q answers, R resamples, B bins.
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
_NUMBERS_AT_ONCE = 1_000_000  # of resampled answers, so that 100,000 answers do not take gigabytes

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
    query_ids: dict[tuple[str, str], int] = {}
    queries_N = np.array([query_ids.setdefault((row.task, row.query), len(query_ids)) for row in rows])
    confidences_N = np.array([row.confidence for row in rows], dtype=np.float64)
    scores_N = np.array([row.score for row in rows], dtype=np.float64)
    error = calibration_error(confidences_N, scores_N)
    rng = np.random.default_rng(0)  # the same interval whenever the same answers are read
    order = np.argsort(confidences_N, kind="stable")
    sure_N, gaps_N, queries_N = confidences_N[order], (scores_N - confidences_N)[order], queries_N[order]
    num_queries = len(query_ids)

    def resample(num: int) -> Array:
        chosen_RQ = rng.integers(0, num_queries, (num, num_queries))
        chosen_RQ += num_queries * np.arange(num)[:, None]  # all resamples are counted at once
        counts_RQ = np.bincount(chosen_RQ.ravel(), minlength=num * num_queries).reshape(num, num_queries)
        counts_RN = np.take(counts_RQ, queries_N, axis=1)
        return _binned_errors(sure_N, counts_RN, gaps_RN=counts_RN * gaps_N)

    def simulate(num: int) -> Array:  # one number per query: its draws are right together, which is the widest
        right_RN = np.take(rng.random((num, num_queries)), queries_N, axis=1) < sure_N
        return _binned_errors(sure_N, np.ones((1, len(rows)), dtype=np.int64), gaps_RN=right_RN - sure_N)

    low, high = (2 * error - q for q in _quantiles(resample, num_answers=len(rows))[::-1])
    if low > 0 and error <= _quantiles(simulate, num_answers=len(rows))[1]:
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


def _quantiles(draw: Callable[[int], Array], *, num_answers: int) -> tuple[float, float]:
    at_once = max(1, _NUMBERS_AT_ONCE // num_answers)
    errors = [draw(min(at_once, _NUM_RESAMPLES - done)) for done in range(0, _NUM_RESAMPLES, at_once)]
    low, high = np.quantile(np.concatenate(errors), [0.025, 0.975])
    return float(low), float(high)


def calibration_error(confidences_N: Array, scores_N: Array) -> float:
    """Return the expected calibration error: sum over bins of n_b / N |mean score - mean confidence|.

    Guo et al. 2017 (arXiv 1706.04599), equation 3, but with 10 bins of equally many answers, since confidences crowd
    near 1 (the adaptive error of Nixon et al. 2019, arXiv 1904.01685). Equal confidences share a bin.
    """
    order = np.argsort(confidences_N, kind="stable")
    gaps_N = (scores_N - confidences_N)[order]
    counts_1N = np.ones((1, len(order)), dtype=np.int64)
    return float(_binned_errors(confidences_N[order], counts_1N, gaps_RN=gaps_N[None])[0])


def _binned_errors(sure_N: Array, counts_RN: NDArray[np.int64], *, gaps_RN: Array) -> Array:
    """Return R calibration errors at once, in the bins of `reliability`.

    sure_N: confidences, rising.
    counts_RN: how often each answer occurs; one row does for all R if none differs.
    gaps_RN: score minus confidence, as often as the answer occurs. In a bin n |mean score - mean confidence| is the
        absolute value of their sum.
    """
    # One search for all: a row's answers are counted after those of the rows before it.
    num_rows, num_answers = counts_RN.shape
    seen_RN = np.cumsum(counts_RN).reshape(num_rows, num_answers)
    before_R1 = np.concatenate([[0], seen_RN[:-1, -1]])[:, None]
    totals_R1 = seen_RN[:, -1:] - before_R1
    cuts_RB = np.maximum(np.arange(1, NUM_BINS + 1) * totals_R1 // NUM_BINS, 1)
    places_RB = np.searchsorted(seen_RN.ravel(), (cuts_RB + before_R1).ravel()).reshape(cuts_RB.shape) % num_answers
    last_RB = np.searchsorted(sure_N, sure_N[places_RB], side="right") - 1  # equal confidences stay together
    sums_RB = np.take_along_axis(np.cumsum(gaps_RN, axis=1), np.broadcast_to(last_RB, (len(gaps_RN), NUM_BINS)), axis=1)
    errors_R = np.abs(np.diff(sums_RB, axis=1, prepend=0)).sum(axis=1)
    return np.asarray(errors_R / totals_R1[:, 0], dtype=np.float64)


def reliability(confidences_N: Array, scores_N: Array) -> list[ReliabilityBin]:
    """Return bins of about equally many answers by rising confidence; equal confidences are never in two bins."""
    order = np.argsort(confidences_N, kind="stable")
    sure_N, right_N = confidences_N[order], scores_N[order]
    cuts = np.arange(1, NUM_BINS + 1) * len(order) // NUM_BINS
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
