"""What a comparison ends with: comparison.json, the report, a card beside each model, table and plot."""

from __future__ import annotations

from rich.console import Console

from manyicl.comparison import Comparison
from manyicl.comparison_display import comparison_plot, comparison_table
from manyicl.comparison_summary import write_findings
from manyicl.model_card import write_model_card
from manyicl.report.comparison import read_comparison
from manyicl.report.document import write_report


def finish_comparison(comparison: Comparison, *, console: Console) -> bool:
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
