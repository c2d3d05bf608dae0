"""A comparison's folder -> report.html and report.md in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyicl.files import write_atomically
from manyicl.report.comparison import read_comparison
from manyicl.report.markdown import render_markdown
from manyicl.report.matchings import check_matchings
from manyicl.report.page import render_page


def write_report(folder: Path, *, others: Sequence[Path] = ()) -> Path:
    """Write report.html and report.md from `folder`'s comparison.json alone; return where the page is.

    others: folders of the same comparison under other matchings, whose differences are shown beside its own.

    Raises:
        UserError: comparison.json is missing, broken, or of another schema, or the folders cannot stand side by side.
    """
    comparison = read_comparison(folder)
    beside = [read_comparison(other) for other in others]
    if beside:
        check_matchings([comparison, *beside], [str(one) for one in (folder, *others)])
    page = folder / "report.html"
    write_atomically(page, render_page(comparison, beside=beside))
    write_atomically(folder / "report.md", render_markdown(comparison, beside=beside))
    return page
