from .importing import Import, ImportedTask, import_tasks

__all__ = [
    "Import",
    "ImportedTask",
    "import_tasks",
]
