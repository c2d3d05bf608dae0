from .document import print_outcome, write_outcome, write_report
from .numbers import count_noun, tell_plain_path
from .terminal import draw_curves, grid_table, mark_of

__all__ = [
    "count_noun",
    "draw_curves",
    "grid_table",
    "mark_of",
    "print_outcome",
    "tell_plain_path",
    "write_outcome",
    "write_report",
]
