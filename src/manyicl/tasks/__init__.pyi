from .answers import (
    check_spellings,
    describe_lookalikes,
    find_labels,
    join_number_forms,
    resolve_choices,
    resolve_lists,
)
from .columns import Columns
from .duplicates import CopyIndex, find_copies
from .faults import Fault, FaultLog
from .formats import SPLIT_WORDS, JsonNumber, data_suffix
from .layouts import Source, find_layout, source_of
from .readers import read_records
from .rows import FileRows, Row, read_rows, tidy_answer
from .settings import METRICS, is_name, parse_setting, read_settings
from .shapes import recognise
from .task import (
    NO_SPLIT_NOTE,
    SPLITS,
    Example,
    Task,
    ask_validation,
    flip_labels,
    flip_map,
    inspect_task,
    load_task,
    load_tasks,
    name_sources,
    with_template,
)

__all__ = [
    "METRICS",
    "NO_SPLIT_NOTE",
    "SPLITS",
    "SPLIT_WORDS",
    "Columns",
    "CopyIndex",
    "Example",
    "Fault",
    "FaultLog",
    "FileRows",
    "JsonNumber",
    "Row",
    "Source",
    "Task",
    "ask_validation",
    "check_spellings",
    "data_suffix",
    "describe_lookalikes",
    "find_copies",
    "find_labels",
    "find_layout",
    "flip_labels",
    "flip_map",
    "inspect_task",
    "is_name",
    "join_number_forms",
    "load_task",
    "load_tasks",
    "name_sources",
    "parse_setting",
    "read_records",
    "read_rows",
    "read_settings",
    "recognise",
    "resolve_choices",
    "resolve_lists",
    "source_of",
    "tidy_answer",
    "with_template",
]
