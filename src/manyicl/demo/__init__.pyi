from .run import run_demo
from .tasks import export_tasks

__all__ = [
    "export_tasks",
    "run_demo",
]
