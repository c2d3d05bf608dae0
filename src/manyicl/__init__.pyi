from .episodes.plan import EpisodeSettings
from .episodes.template import TemplateSettings
from .errors import UserError
from .evaluation.loop import ask_inputs, evaluate, load_asked_model, one_pass_curve
from .evaluation.results import Evaluation
from .models.loading import LoraSettings, ModelSettings
from .planning.preview import draw_episode
from .tasks.task import Example, Task, load_tasks
from .training.recipe import RunConfig, TaskSettings, TrainSettings, load_recipe
from .training.run import train
from .training.run_folder import Run

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
