"""What a table looks like in a terminal, as text."""

from __future__ import annotations

import re
from io import StringIO

from manyicl.progress import make_console


def render(content, *, width: int = 400) -> str:
    file = StringIO()
    console = make_console()
    console.file, console.width = file, width
    console.print(content)
    assert "nan" not in file.getvalue().lower()
    return file.getvalue()


def cells_of(text: str, first: str) -> list[str]:
    """Return the cells of the table's line that begins with `first`."""
    (line,) = [line for line in text.splitlines() if re.match(rf"[│┃] {re.escape(first)} ", line)]
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
