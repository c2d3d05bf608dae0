from .run import FULL, QUICK, run_demo
from .tasks import export_tasks

__all__ = [
    "FULL",
    "QUICK",
    "export_tasks",
    "run_demo",
]
