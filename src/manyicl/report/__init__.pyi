from .document import finish_comparison, write_outcome, write_report
from .numbers import count_noun, tell_plain_path
from .terminal import grid_table

__all__ = [
    "count_noun",
    "finish_comparison",
    "grid_table",
    "tell_plain_path",
    "write_outcome",
    "write_report",
]
