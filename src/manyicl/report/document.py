"""The report of a comparison: two files in its folder, a card beside each model, a table and a plot in the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from manyicl.comparison import Comparison, Grid, read_comparison, summarize, write_comparison
from manyicl.files import write_atomically
from manyicl.report.markdown import render_markdown
from manyicl.report.matchings import check_matchings
from manyicl.report.model_card import write_model_card
from manyicl.report.page import render_page
from manyicl.report.terminal import comparison_plot, comparison_table
from manyicl.training import RunFolder

# The report's file in a comparison's folder.
PAGE = "report.html"


def write_report(folder: Path, *, others: Sequence[Path] = ()) -> Path:
    """Write report.html and report.md from the comparison.json of `folder`; return the path of the page.

    others: folders of the same comparison under other matchings; their differences are shown beside its own.

    Raises:
        UserError: comparison.json is missing, broken, or of another schema, or the folders cannot be compared.
    """
    comparison = read_comparison(folder)
    beside = [read_comparison(other) for other in others]
    if beside:
        check_matchings([comparison, *beside], [str(one) for one in (folder, *others)])
    page = folder / PAGE
    write_atomically(page, render_page(comparison, beside=beside))
    write_atomically(folder / "report.md", render_markdown(comparison, beside=beside))
    return page


def write_outcome(grid: Grid) -> Comparison:
    """Write comparison.json, the report and a card beside each finished model; return what comparison.json holds.

    A model that somebody has deleted gets no card.
    """
    comparison = summarize(grid)
    write_comparison(grid.folder, comparison)
    write_report(grid.folder)
    for item in grid.work():
        run = grid.path_of(item)
        is_final = item.kind == "train" and item.rate is None and grid.is_done(item)
        if is_final and RunFolder(run).model.is_dir():
            write_model_card(run, comparison, item.arm, item.seed)
    return comparison


def print_outcome(comparison: Comparison, folder: Path, *, console: Console) -> None:
    """Print the table and the curves of the comparison in `folder`, where its report is, and how to resume it."""
    console.print(comparison_table(comparison))
    console.print(comparison_plot(comparison, width=min(78, console.width), colour=console.is_terminal))
    console.print(f"report: {folder / PAGE}", soft_wrap=True)
    if not comparison.finished:
        console.print(f"not finished; resume it: manyicl compare --resume {shlex.quote(str(folder))}", soft_wrap=True)
