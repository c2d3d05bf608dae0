"""Expected calibration error, reliability and coverage, on answers that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from manyicl.evaluation.points import Prediction
from manyicl.evaluation.scoring.confidence import (
    calibration_error,
    cover,
    measure_confidence,
    reliability,
    risk_coverage_area,
)

# Four answers at 0.9, of which two are right, and four at 0.6, of which three are right.
CONFIDENCES = np.array([0.9, 0.6, 0.9, 0.6, 0.9, 0.6, 0.9, 0.6])
SCORES = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])


def make_answers(confidences_DQ, scores_DQ) -> list[Prediction]:
    return [
        Prediction("a task", draw, 4, f"q{place}", "x", "x", score=float(score), nll=1.0, confidence=float(confidence))
        for draw, (row, right) in enumerate(zip(confidences_DQ, scores_DQ, strict=True))
        for place, (confidence, score) in enumerate(zip(row, right, strict=True))
    ]


def test_equal_confidences_share_a_bin_and_the_error_is_the_mean_gap():
    low, high = reliability(CONFIDENCES, SCORES)
    assert (low.confidence, low.score, low.num_answers) == (pytest.approx(0.6), 0.75, 4)
    assert (high.confidence, high.score, high.num_answers) == (pytest.approx(0.9), 0.5, 4)
    # 4 / 8 * |0.75 - 0.6| + 4 / 8 * |0.5 - 0.9|
    assert calibration_error(CONFIDENCES, SCORES) == pytest.approx(0.275)


def test_bins_have_equally_many_answers():
    confidences = np.linspace(0.5, 1.0, 100) ** 8  # crowded at the lower end
    assert [one.num_answers for one in reliability(confidences, np.ones(100))] == [10] * 10


def test_the_error_is_the_gap_of_the_bins_weighted_by_their_answers():
    rng = np.random.default_rng(5)
    confidences = rng.uniform(0.4, 1.0, 230).round(2)  # many are equal
    scores = (rng.random(230) < confidences).astype(float)
    bins = reliability(confidences, scores)
    by_hand = sum(one.num_answers * abs(one.score - one.confidence) for one in bins) / 230
    assert calibration_error(confidences, scores) == pytest.approx(by_hand)


def test_the_interval_is_that_of_queries_drawn_with_replacement_one_resample_at_a_time():
    rng = np.random.default_rng(7)
    confidences = rng.uniform(0.4, 1.0, (2, 30)).round(2)
    scores = (rng.random((2, 30)) < confidences - 0.3).astype(float)
    measured = measure_confidence(make_answers(confidences, scores))
    stream, errors = np.random.default_rng(0), []
    for _ in range(400):
        chosen = stream.integers(0, 30, 30)
        errors.append(calibration_error(confidences[:, chosen].ravel(), scores[:, chosen].ravel()))
    low, high = np.quantile(errors, [0.025, 0.975])
    assert (measured.low, measured.high) == pytest.approx((2 * measured.ece - high, 2 * measured.ece - low))


def test_coverage_counts_who_gets_an_answer_and_scores_them():
    points = {point.threshold: (point.coverage, point.score) for point in cover(CONFIDENCES, SCORES)}
    assert points[0.0] == (1.0, 0.625)
    assert points[0.6] == (1.0, 0.625)
    assert points[0.7] == (0.5, 0.5)
    assert points[0.99] == (0.0, None)


def test_area_is_zero_if_the_wrong_answers_come_last_and_the_mean_error_if_confidences_say_nothing():
    # The surest three are right: risks 0, 0, 0, 1/4.
    assert risk_coverage_area(np.array([0.9, 0.8, 0.7, 0.6]), np.array([1.0, 1, 1, 0])) == pytest.approx(1 / 16)
    assert risk_coverage_area(np.full(4, 0.5), np.array([0.0, 1, 1, 1])) == 0.25


def test_answers_of_a_calibrated_model_have_an_interval_from_zero_and_too_sure_ones_do_not():
    rng = np.random.default_rng(3)
    confidences = rng.uniform(0.4, 1.0, (3, 150))
    lots = rng.random(150)[None]  # a query is hard in all draws
    calibrated = measure_confidence(make_answers(confidences, lots < confidences))
    assert calibrated.low == 0
    assert calibrated.ece < 0.1
    too_sure = measure_confidence(make_answers(confidences, lots < confidences - 0.25))
    assert too_sure.low < 0.25 < too_sure.high + 0.05
    assert too_sure.low > 0.1
    assert too_sure.mean == pytest.approx(confidences.mean())
    assert measure_confidence(make_answers(confidences, lots < confidences)) == calibrated  # no chance is left in it


def test_nothing_is_said_without_confidences():
    answers = [Prediction("a task", 0, 4, "q", "x", "x", score=1.0, nll=1.0)]
    assert measure_confidence(answers) is None
    assert measure_confidence([]) is None
