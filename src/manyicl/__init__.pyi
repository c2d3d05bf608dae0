from .client import Client
from .conversion.importing import Import, import_tasks
from .conversion.memory import make_task
from .episodes.plan import EpisodeSettings
from .episodes.template import TemplateSettings
from .errors import UserError
from .evaluation.loop import evaluate, one_pass_curve
from .evaluation.results import Evaluation
from .inference.answering.questions import ask
from .inference.answering.settings import AnswerSettings
from .inference.endpoint import EndpointSettings
from .inference.model import InferenceModel, load_for_inference
from .models.loading import LoraSettings, ModelSettings
from .server.access import make_token
from .server.running import serve
from .service.settings import ServiceSettings, ShotChoice
from .tasks.task import Example, Task, load_tasks
from .training.recipe import RunConfig, TaskSettings, TrainSettings, load_recipe
from .training.run import train
from .training.run_folder import Run
from .verbs import Check, check, compare, diff, export, merge, open, plan, run_demo, show, write_report, write_world

__all__ = [
    "AnswerSettings",
    "Check",
    "Client",
    "EndpointSettings",
    "EpisodeSettings",
    "Evaluation",
    "Example",
    "Import",
    "InferenceModel",
    "LoraSettings",
    "ModelSettings",
    "Run",
    "RunConfig",
    "ServiceSettings",
    "ShotChoice",
    "Task",
    "TaskSettings",
    "TemplateSettings",
    "TrainSettings",
    "UserError",
    "ask",
    "check",
    "compare",
    "diff",
    "evaluate",
    "export",
    "import_tasks",
    "load_for_inference",
    "load_recipe",
    "load_tasks",
    "make_task",
    "make_token",
    "merge",
    "one_pass_curve",
    "open",
    "plan",
    "run_demo",
    "serve",
    "show",
    "train",
    "write_report",
    "write_world",
]
