"""A comparison's folder -> report.html and report.md in it."""

from __future__ import annotations

from pathlib import Path

from manyicl.files import write_atomically
from manyicl.report.comparison import read_comparison
from manyicl.report.markdown import render_markdown
from manyicl.report.page import render_page


def write_report(folder: Path) -> Path:
    """Write report.html and report.md from `folder`'s comparison.json alone; return where the page is.

    Raises:
        UserError: comparison.json is missing, broken, or of another schema.
    """
    comparison = read_comparison(folder)
    page = folder / "report.html"
    write_atomically(page, render_page(comparison))
    write_atomically(folder / "report.md", render_markdown(comparison))
    return page
