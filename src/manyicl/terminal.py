"""Tables for the terminal that can be read at any width, and as plain lines where the output is no terminal.

As wide as its cells on a terminal, a table has boxes. Where it would not fit, a column of sentences goes below it, and
if that is not enough, each row becomes a paragraph, so that nothing is cut and no column is squeezed to single letters.
Piped, it is lines of columns two blanks apart: no boxes, no colour, nothing folded, and a dash for an empty cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

# Wider than any table, to measure how wide one is if nothing is folded.
_ENDLESS = 1 << 16


class Table(RichTable):
    """A table whose cells are texts, whose first column names its rows, and whose title stands to the left.

    sentences: the head of its last column, if that holds sentences, which stand below it on a narrow terminal.
    """

    def __init__(self, *, title: str = "", sentences: str | None = None, show_lines: bool = False) -> None:
        super().__init__(show_lines=show_lines)
        self.heading, self.sentences = title, sentences

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print it in the form that fits."""
        if self.heading:
            yield Text(self.heading, style="italic")
        if not console.is_terminal:
            yield from self._plain_lines()
        elif _width(console, self, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
        elif self.sentences and _width(console, short := self._without_sentences(), options) <= options.max_width:
            yield from RichTable.__rich_console__(short, console, options)
            for name, *_, sentence in self._rows():
                yield Text.assemble(name, ": ", sentence)
        else:
            yield from self._paragraphs(options.max_width)

    def _rows(self) -> Iterator[list[Text]]:
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield [cell.copy() if isinstance(cell, Text) else Text(str(cell)) for cell in row]

    def _plain_lines(self) -> Iterator[Text]:
        rows = [[_one_line(column.header) for column in self.columns]]
        rows += [[_one_line(cell) or "-" for cell in row] for row in self._rows()]
        widths = [max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]
        for row in rows:
            padded = (_pad(cell, width, column) for cell, width, column in zip(row, widths, self.columns, strict=True))
            yield Text("  ".join(padded).rstrip(), no_wrap=True, overflow="ignore")

    def _without_sentences(self) -> Table:
        short = Table(show_lines=self.show_lines)
        short.columns, short.rows = self.columns[:-1], self.rows
        return short

    def _paragraphs(self, width: int) -> Iterator[Any]:
        """Yield each row as its name and, below it, its other cells with their heads; a sentence begins a line."""
        heads = [_one_line(column.header) for column in self.columns]
        for name, *cells in self._rows():
            yield Text.assemble(name, style="bold")
            line = Text()
            for head, cell in zip(heads[1:], cells, strict=True):
                if not cell.plain or head == self.sentences:
                    continue
                told = Text.assemble(head, ": ", Text(" ").join(cell.split("\n")))
                if line.plain and line.cell_len + 2 + told.cell_len > width - 2:
                    yield _indented(line)
                    line = Text()
                line = Text.assemble(line, "; " if line.plain else "", told)
            if line.plain:
                yield _indented(line)
            if self.sentences:
                yield _indented(cells[-1])


def _width(console: Console, table: RichTable, options: ConsoleOptions) -> int:
    """Return how wide a table is if nothing is folded."""
    return table.__rich_measure__(console, options.update(max_width=_ENDLESS)).maximum


def _one_line(cell: Any) -> str:
    return " ".join((cell.plain if isinstance(cell, Text) else str(cell)).split("\n")).strip()


def _pad(cell: str, width: int, column: Column) -> str:
    blanks = " " * (width - cell_len(cell))
    return blanks + cell if column.justify == "right" else cell + blanks


def _indented(line: Text) -> Padding:
    return Padding(line, (0, 0, 0, 2), expand=False)
