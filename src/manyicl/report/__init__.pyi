from .document import print_outcome, write_outcome, write_report
from .numbers import count_noun, tell_plain_path
from .plots import draw_curves, mark_of
from .terminal import grid_table

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
