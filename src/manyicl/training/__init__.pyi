from .export import export_trl
from .footprint import Footprint, Row, count_states, measure_footprint
from .held_out import HeldOutRow, mean_of_tasks
from .memory import USABLE_FRACTION, MemoryPrediction, fewest_recomputed, predict_memory, resolve_recompute
from .metrics import MetricsLog, bucket_name
from .preparation import (
    Prepared,
    count_dropped,
    count_plan,
    count_step_flops,
    count_targets,
    count_too_long,
    largest_row,
    plan_packs,
    plan_validation,
    prepare_run,
    tokenize_all,
    tokenize_tasks,
)
from .recipe import (
    RunConfig,
    TaskSettings,
    TrainSettings,
    absolute_paths,
    dump_config,
    has_section,
    load_recipe,
    make_config,
    with_precision,
)
from .recompute import Recompute
from .run import train
from .run_folder import Run, RunFolder, RunState, find_changes, git_commit, package_versions

__all__ = [
    "USABLE_FRACTION",
    "Footprint",
    "HeldOutRow",
    "MemoryPrediction",
    "MetricsLog",
    "Prepared",
    "Recompute",
    "Row",
    "Run",
    "RunConfig",
    "RunFolder",
    "RunState",
    "TaskSettings",
    "TrainSettings",
    "absolute_paths",
    "bucket_name",
    "count_dropped",
    "count_plan",
    "count_states",
    "count_step_flops",
    "count_targets",
    "count_too_long",
    "dump_config",
    "export_trl",
    "fewest_recomputed",
    "find_changes",
    "git_commit",
    "has_section",
    "largest_row",
    "load_recipe",
    "make_config",
    "mean_of_tasks",
    "measure_footprint",
    "package_versions",
    "plan_packs",
    "plan_validation",
    "predict_memory",
    "prepare_run",
    "resolve_recompute",
    "tokenize_all",
    "tokenize_tasks",
    "train",
    "with_precision",
]
