"""What a table looks like, as text: piped, and on a terminal."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console

from manyicl.console import make_console


def render(content) -> str:
    """Return what is printed where the output is no terminal."""
    file = StringIO()
    console = make_console()
    console.file = file
    console.print(content)
    assert "nan" not in file.getvalue().lower()
    return file.getvalue()


def render_terminal(content, *, width: int) -> str:
    """Return what a terminal without colour shows."""
    file = StringIO()
    plain = {"markup": False, "emoji": False, "highlight": False}
    Console(file=file, width=width, force_terminal=True, color_system=None, **plain).print(content)
    assert max(map(len, file.getvalue().splitlines())) <= width
    return file.getvalue()


def cells_of(text: str, first: str) -> list[str]:
    """Return the cells of the table's line that begins with `first`, as printed without boxes."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{first}  ")]
    return re.split(" {2,}", line)
