from .arguments import check_recipe, find_refused
from .export import export_trl
from .graph import tell_recomputed_graph
from .held_out import HeldOutRow, mean_of_tasks
from .memory.choice import (
    USABLE_FRACTION,
    GpuShare,
    MemoryPrediction,
    PacksChoice,
    fewest_recomputed,
    predict_memory,
    resolve_packs,
    resolve_recompute,
)
from .memory.footprint import Footprint, Row, count_states, measure_footprint
from .memory.optimizers import OPTIMIZERS, Optim
from .metrics import MetricsLog, bucket_name
from .origin import device_name, git_commit, package_versions
from .preparation import (
    Prepared,
    check_weights,
    count_dropped,
    count_plan,
    count_step_flops,
    count_targets,
    largest_row,
    most_shots,
    plan_packs,
    plan_validation,
    prepare_run,
    tokenize_all,
    tokenize_tasks,
    used_rows,
)
from .ranks import find_unshared
from .recipe import (
    RunConfig,
    TaskSettings,
    TrainSettings,
    absolute_paths,
    dump_config,
    has_section,
    load_recipe,
    make_config,
    refuse_changes,
    refuse_gone,
    take_recipe,
    with_batch,
    with_precision,
)
from .recompute.host_store import INPUTS_AT_ONCE
from .recompute.layers import Recompute
from .recompute.tiles import TILE_TOKENS
from .run import train
from .run_folder import Run, RunFolder, RunState, find_changes

__all__ = [
    "INPUTS_AT_ONCE",
    "OPTIMIZERS",
    "TILE_TOKENS",
    "USABLE_FRACTION",
    "Footprint",
    "GpuShare",
    "HeldOutRow",
    "MemoryPrediction",
    "MetricsLog",
    "Optim",
    "PacksChoice",
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
    "check_recipe",
    "check_weights",
    "count_dropped",
    "count_plan",
    "count_states",
    "count_step_flops",
    "count_targets",
    "device_name",
    "dump_config",
    "export_trl",
    "fewest_recomputed",
    "find_changes",
    "find_refused",
    "find_unshared",
    "git_commit",
    "has_section",
    "largest_row",
    "load_recipe",
    "make_config",
    "mean_of_tasks",
    "measure_footprint",
    "most_shots",
    "package_versions",
    "plan_packs",
    "plan_validation",
    "predict_memory",
    "prepare_run",
    "refuse_changes",
    "refuse_gone",
    "resolve_packs",
    "resolve_recompute",
    "take_recipe",
    "tell_recomputed_graph",
    "tokenize_all",
    "tokenize_tasks",
    "train",
    "used_rows",
    "with_batch",
    "with_precision",
]
