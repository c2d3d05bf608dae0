from .answers import find_labels
from .duplicates import CopyIndex, find_copies
from .formats import data_suffix
from .layouts import Source, source_of
from .rows import tidy_answer
from .settings import METRICS
from .task import (
    NO_SPLIT_NOTE,
    SPLITS,
    Example,
    Fault,
    Task,
    ask_validation,
    flip_labels,
    flip_map,
    inspect_task,
    load_task,
    load_tasks,
    name_sources,
)

__all__ = [
    "METRICS",
    "NO_SPLIT_NOTE",
    "SPLITS",
    "CopyIndex",
    "Example",
    "Fault",
    "Source",
    "Task",
    "ask_validation",
    "data_suffix",
    "find_copies",
    "find_labels",
    "flip_labels",
    "flip_map",
    "inspect_task",
    "load_task",
    "load_tasks",
    "name_sources",
    "source_of",
    "tidy_answer",
]
