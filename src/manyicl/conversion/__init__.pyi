from .importing import Import, ImportedTask, import_tasks
from .memory import SETTINGS, make_task, name_arguments, tell_faults, write_settings, write_source

__all__ = [
    "SETTINGS",
    "Import",
    "ImportedTask",
    "import_tasks",
    "make_task",
    "name_arguments",
    "tell_faults",
    "write_settings",
    "write_source",
]
