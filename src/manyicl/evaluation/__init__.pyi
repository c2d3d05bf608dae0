from .difference import CellDifference, Difference, MeanDifference, MetricDifference, compare_results, tell_difference
from .endpoint_sweep import evaluate_at_endpoint
from .loop import evaluate, one_pass_curve
from .points import Cell, PlainPath, Prediction, ShotCurve, sum_plain_paths
from .results import Evaluation, check_out, predictions_path, read_result, refuse_other_result
from .scoring import chance_score
from .shots import FILL, Shots, cap_shots, shots_order, sort_shots, tell_asked_with, tell_shot_count
from .sweep import Sweep, TaskSweep
from .text_loss import TextWindows, drift_every, read_windows, window_bits, window_table
from .unfinished import package_versions

__all__ = [
    "FILL",
    "Cell",
    "CellDifference",
    "Difference",
    "Evaluation",
    "MeanDifference",
    "MetricDifference",
    "PlainPath",
    "Prediction",
    "ShotCurve",
    "Shots",
    "Sweep",
    "TaskSweep",
    "TextWindows",
    "cap_shots",
    "chance_score",
    "check_out",
    "compare_results",
    "drift_every",
    "evaluate",
    "evaluate_at_endpoint",
    "one_pass_curve",
    "package_versions",
    "predictions_path",
    "read_result",
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
