from .audit import TaskAudit, audit_task, audit_tasks
from .devices import ASSUMED_UTILIZATION, LAYER_PASS_S, Device, find_device, predict_seconds
from .fit import join_packs, predict_recipe
from .forecast import (
    SHOT_EDGES,
    Forecast,
    count_layer_passes,
    find_blockers,
    forecast_run,
    forecast_tasks,
    list_refused,
)
from .notes import note_warmup
from .overlap import Overlap, find_overlaps, tell_overlap, tell_overlaps
from .preview import DrawnEpisode, preview_recipe, render_episode

__all__ = [
    "ASSUMED_UTILIZATION",
    "LAYER_PASS_S",
    "SHOT_EDGES",
    "Device",
    "DrawnEpisode",
    "Forecast",
    "Overlap",
    "TaskAudit",
    "audit_task",
    "audit_tasks",
    "count_layer_passes",
    "find_blockers",
    "find_device",
    "find_overlaps",
    "forecast_run",
    "forecast_tasks",
    "join_packs",
    "list_refused",
    "note_warmup",
    "predict_recipe",
    "predict_seconds",
    "preview_recipe",
    "render_episode",
    "tell_overlap",
    "tell_overlaps",
]
