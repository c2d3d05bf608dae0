from .export import export_trl
from .held_out import HeldOutRow, mean_of_tasks
from .metrics import MetricsLog
from .preparation import (
    Prepared,
    count_dropped,
    count_plan,
    count_too_long,
    plan_packs,
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
from .recompute import (
    RECOMPUTED_WORK_COMPILED,
    WHOLE_WORK_COMPILED,
    Checkpointed,
    cast_bytes,
    decoder_layers,
    measure_activations,
    prepared_layers,
    spread,
    unwidened_inputs,
)
from .run import train
from .run_folder import Run, find_changes, git_commit, is_finished, read_run_config
from .validation import plan_validation

__all__ = [
    "RECOMPUTED_WORK_COMPILED",
    "WHOLE_WORK_COMPILED",
    "Checkpointed",
    "HeldOutRow",
    "MetricsLog",
    "Prepared",
    "Run",
    "RunConfig",
    "TaskSettings",
    "TrainSettings",
    "absolute_paths",
    "cast_bytes",
    "count_dropped",
    "count_plan",
    "count_too_long",
    "decoder_layers",
    "dump_config",
    "export_trl",
    "find_changes",
    "git_commit",
    "has_section",
    "is_finished",
    "load_recipe",
    "make_config",
    "mean_of_tasks",
    "measure_activations",
    "plan_packs",
    "plan_validation",
    "prepare_run",
    "prepared_layers",
    "read_run_config",
    "spread",
    "tokenize_all",
    "tokenize_tasks",
    "train",
    "unwidened_inputs",
    "with_precision",
]
