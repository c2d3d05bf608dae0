from .document import print_outcome, write_outcome, write_report
from .numbers import count_noun, tell_plain_path
from .terminal import grid_table

__all__ = [
    "count_noun",
    "grid_table",
    "print_outcome",
    "tell_plain_path",
    "write_outcome",
    "write_report",
]
