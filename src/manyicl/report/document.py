"""A comparison -> comparison.json, the report in its folder, a card beside each model, its table and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from manyicl.comparison import Grid, read_comparison, write_findings
from manyicl.files import write_atomically
from manyicl.report.markdown import render_markdown
from manyicl.report.matchings import check_matchings
from manyicl.report.model_card import write_model_card
from manyicl.report.page import render_page
from manyicl.report.terminal import comparison_plot, comparison_table


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


def finish_comparison(comparison: Grid, *, console: Console) -> bool:
    """Write and print what is found; return whether every cell is done."""
    finished: bool = write_findings(comparison)["finished"]
    page = write_report(comparison.folder)
    found = read_comparison(comparison.folder)
    for cell in comparison.cells():
        if cell.what == "train" and cell.rate is None and comparison.is_done(cell):
            write_model_card(comparison.place(cell), found, cell.arm, cell.seed)
    console.print(comparison_table(found))
    console.print(comparison_plot(found, width=min(78, console.width), colour=console.is_terminal))
    console.print(f"report: {page}", soft_wrap=True)
    if not finished:
        console.print(f"not finished; go on: manyicl compare --resume {comparison.folder}", soft_wrap=True)
    return finished
