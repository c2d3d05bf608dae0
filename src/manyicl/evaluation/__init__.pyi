from .difference import Difference, MeanDifference, MetricDifference, PointDifference, compare_results, tell_difference
from .loop import evaluate, evaluate_sweep, one_pass_curve
from .points import DrawPoint, PlainPath, Prediction, ShotCurve, ShotPoint, sum_plain_paths
from .results import Evaluation, check_out, predictions_path, refuse_other_result
from .scoring.answers import best_score, chance_score, majority_answer, majority_score
from .scoring.confidence import Confidence, CoveragePoint, ReliabilityBin, measure_confidence
from .shots import FILL, Shots, cap_shots, shots_order, sort_shots, tell_asked_with, tell_shot_count
from .sweep import Sweep, TaskSweep
from .text_loss import TextWindows, drift_every, read_windows, window_bits, window_table

__all__ = [
    "FILL",
    "Confidence",
    "CoveragePoint",
    "Difference",
    "DrawPoint",
    "Evaluation",
    "MeanDifference",
    "MetricDifference",
    "PlainPath",
    "PointDifference",
    "Prediction",
    "ReliabilityBin",
    "ShotCurve",
    "ShotPoint",
    "Shots",
    "Sweep",
    "TaskSweep",
    "TextWindows",
    "best_score",
    "cap_shots",
    "chance_score",
    "check_out",
    "compare_results",
    "drift_every",
    "evaluate",
    "evaluate_sweep",
    "majority_answer",
    "majority_score",
    "measure_confidence",
    "one_pass_curve",
    "predictions_path",
    "read_windows",
    "refuse_other_result",
    "shots_order",
    "sort_shots",
    "sum_plain_paths",
    "tell_asked_with",
    "tell_difference",
    "tell_shot_count",
    "window_bits",
    "window_table",
]
