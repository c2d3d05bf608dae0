"""Many-shot in-context fine-tuning: bring examples, not adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyicl.config import RunConfig, TaskSettings, TrainSettings, load_recipe
    from manyicl.episodes import EpisodeSettings
    from manyicl.errors import UserError
    from manyicl.evaluation import ask_inputs, evaluate, load_asked_model, one_pass_curve
    from manyicl.models import LoraSettings, ModelSettings
    from manyicl.preview import draw_episode
    from manyicl.results import Evaluation
    from manyicl.run_folder import Run
    from manyicl.runs import train
    from manyicl.tasks import Example, Task, load_tasks
    from manyicl.templates import TemplateSettings

# Where each public name lives. They are imported at first use: torch and transformers take seconds.
_HOMES = {
    "EpisodeSettings": "episodes",
    "Evaluation": "results",
    "Example": "tasks",
    "LoraSettings": "models",
    "ModelSettings": "models",
    "Run": "run_folder",
    "RunConfig": "config",
    "Task": "tasks",
    "TaskSettings": "config",
    "TemplateSettings": "templates",
    "TrainSettings": "config",
    "UserError": "errors",
    "ask_inputs": "evaluation",
    "draw_episode": "preview",
    "evaluate": "evaluation",
    "load_asked_model": "evaluation",
    "load_recipe": "config",
    "load_tasks": "tasks",
    "one_pass_curve": "evaluation",
    "train": "runs",
}

__all__ = [
    "EpisodeSettings",
    "Evaluation",
    "Example",
    "LoraSettings",
    "ModelSettings",
    "Run",
    "RunConfig",
    "Task",
    "TaskSettings",
    "TemplateSettings",
    "TrainSettings",
    "UserError",
    "ask_inputs",
    "draw_episode",
    "evaluate",
    "load_asked_model",
    "load_recipe",
    "load_tasks",
    "one_pass_curve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'manyicl' has no attribute '{name}'")
    return getattr(importlib.import_module(f"manyicl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
