"""Many-shot in-context fine-tuning: bring examples, not adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyicl.episodes import EpisodeSettings, TemplateSettings
    from manyicl.errors import UserError
    from manyicl.evaluation import Evaluation, ask_inputs, evaluate, load_asked_model, one_pass_curve
    from manyicl.models import LoraSettings, ModelSettings
    from manyicl.planning import draw_episode
    from manyicl.tasks import Example, Task, load_tasks
    from manyicl.training import Run, RunConfig, TaskSettings, TrainSettings, load_recipe, train

# Where each public name lives. They are imported at first use: torch and transformers take seconds.
_HOMES = {
    "EpisodeSettings": "episodes.plan",
    "Evaluation": "evaluation.results",
    "Example": "tasks.task",
    "LoraSettings": "models.loading",
    "ModelSettings": "models.loading",
    "Run": "training.run_folder",
    "RunConfig": "training.recipe",
    "Task": "tasks.task",
    "TaskSettings": "training.recipe",
    "TemplateSettings": "episodes.template",
    "TrainSettings": "training.recipe",
    "UserError": "errors",
    "ask_inputs": "evaluation.loop",
    "draw_episode": "planning.preview",
    "evaluate": "evaluation.loop",
    "load_asked_model": "evaluation.loop",
    "load_recipe": "training.recipe",
    "load_tasks": "tasks.task",
    "one_pass_curve": "evaluation.loop",
    "train": "training.run",
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
