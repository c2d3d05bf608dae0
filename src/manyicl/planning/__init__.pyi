from .audit import TaskAudit, audit_task
from .devices import ASSUMED_UTILIZATION, Device, find_device
from .fit import fits, predict_recipe
from .footprint import MemoryPrediction, measure_footprint
from .forecast import SHOT_EDGES, Forecast, find_blockers, forecast_run, forecast_tasks, largest_row, name_bucket
from .overlap import Overlap, find_overlaps, tell_overlap, tell_overlaps
from .preview import DrawnEpisode, draw_episode, preview_recipe, render_episode

__all__ = [
    "ASSUMED_UTILIZATION",
    "SHOT_EDGES",
    "Device",
    "DrawnEpisode",
    "Forecast",
    "MemoryPrediction",
    "Overlap",
    "TaskAudit",
    "audit_task",
    "draw_episode",
    "find_blockers",
    "find_device",
    "find_overlaps",
    "fits",
    "forecast_run",
    "forecast_tasks",
    "largest_row",
    "measure_footprint",
    "name_bucket",
    "predict_recipe",
    "preview_recipe",
    "render_episode",
    "tell_overlap",
    "tell_overlaps",
]
