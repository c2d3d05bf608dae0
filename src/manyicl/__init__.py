"""Many-shot in-context fine-tuning: bring examples, not adapters."""

from manyicl.config import RunConfig, load_recipe
from manyicl.episodes import EpisodeSettings
from manyicl.errors import UserError
from manyicl.evaluation import Evaluation, ask_inputs, evaluate, load_asked_model, one_pass_curve
from manyicl.models import LoraSettings, ModelSettings
from manyicl.preview import draw_episode
from manyicl.runs import Run, train
from manyicl.tasks import Example, Task, load_tasks
from manyicl.templates import TemplateSettings
from manyicl.training import TrainSettings

__all__ = [
    "EpisodeSettings",
    "Evaluation",
    "Example",
    "LoraSettings",
    "ModelSettings",
    "Run",
    "RunConfig",
    "Task",
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
