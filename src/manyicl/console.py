"""Output for people: progress with pace and time left, signed numbers, and tables that can be read at any width.

If the output is not a terminal, progress is a plain line every few seconds. A table has boxes if its cells fit the
width. If they don't, its column of sentences goes below it, and if that is not enough, each row becomes a paragraph:
nothing is cut and no column is squeezed to single letters. In a pipe, a table is plain lines with two blanks between
columns: no boxes, no colour, no folded lines, and a dash for an empty cell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, TypeGuard

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

# Seconds between two plain lines of progress if the output is not a terminal.
QUIET_S = 15.0
# What a terminal would obey (cursor, colours, its title) instead of showing it -> a picture of it, or the sign of what
# has none.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
# Columns of the narrowest terminal that has room for a progress bar beside its numbers.
_BAR_WIDTH = 70


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints text as it is, and does not fold lines unless the output is a terminal."""
    # Labels and paths are the user's texts: "[/b]" in one is not markup, and ":cat:" not a picture.
    console = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 4096
    return console


class Bar:
    """A progress bar, or on a console that is not a terminal a plain line now and then."""

    def __init__(self, console: Console, progress: Progress | None, total: int) -> None:
        self.console, self.progress, self.total = console, progress, total
        self.line = progress.add_task("", total=total, note="") if progress else None
        self.printed = self.started = time.monotonic()
        self.first_done: int | None = None
        self.last_note = ""

    def set_total(self, total: int) -> None:
        """Change how much there is to do."""
        self.total = total
        if self.progress is not None and self.line is not None:
            self.progress.update(self.line, total=total)

    def update(self, what: str, done: int, *, note: str = "") -> None:
        """Show that `done` of the total are done. what: the work. note: the newest result, such as a loss."""
        if self.progress is not None and self.line is not None:
            self.progress.update(self.line, description=what, completed=done, note=note)
        elif time.monotonic() - self.printed > QUIET_S or done == self.total:
            self.printed = time.monotonic()
            # A note is the last line of a run's log; it is printed once, not again with each line until the next one.
            shown = [f"{what}: {done}/{self.total}", self._pace(done), note if note != self.last_note else ""]
            self.last_note = note
            line = ", ".join(part for part in shown if part)
            # `what` holds names of tasks, which are the user's texts.
            self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        if self.first_done is None:  # work of an earlier process, which says nothing about this one's pace
            self.first_done, self.started = done, time.monotonic()

    def _pace(self, done: int) -> str:
        """Return the time per step and the time left, '' if too little has been measured."""
        if self.first_done is None or done <= self.first_done:
            return ""
        elapsed = time.monotonic() - self.started
        if elapsed < 1:
            return ""
        each = elapsed / (done - self.first_done)
        left = f", {tell_seconds(each * (self.total - done))} left" if done < self.total else ""
        return f"{each:.2g} s each{left}"


class Pace:
    """Measures how long pieces of work take, by kind, and predicts how long the remaining ones will."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Record the time of one piece."""
        self.seconds.setdefault(kind, []).append(seconds)

    def left(self, kinds: Iterable[str]) -> float | None:
        """Return the seconds that pieces of these kinds will take, None if nothing has been measured.

        Each piece counts as the mean of its kind; if its kind has not been measured, as the mean of all kinds.

        >>> pace = Pace()
        >>> pace.add("train", 100); pace.add("test", 10); pace.add("test", 20)
        >>> pace.left(["train", "test", "test"])
        130.0
        """
        measured = [seconds for one_kind in self.seconds.values() for seconds in one_kind]
        if not measured:
            return None
        means = {kind: fmean(seconds) for kind, seconds in self.seconds.items()}
        return float(sum(means.get(kind, fmean(measured)) for kind in kinds))


@contextmanager
def progress_bar(console: Console, *, total: int) -> Iterator[Bar]:
    """Show a bar while the block runs."""
    if not console.is_terminal:
        yield Bar(console, None, total)
        return
    # Texts may be folded, numbers may not: rich would cut "300/1000" before it shortens the bar on a narrow terminal.
    done = MofNCompleteColumn(table_column=Column(no_wrap=True))
    left = TimeRemainingColumn(table_column=Column(no_wrap=True))
    numbers: list[ProgressColumn] = [done, left]
    if console.width >= _BAR_WIDTH:
        numbers = [BarColumn(40 if console.width >= 100 else 10), done, TimeElapsedColumn(Column(no_wrap=True)), left]
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        *numbers,
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(overflow="fold")),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(console, progress, total)


@contextmanager
def reporting(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Give the block a function (what, done, total) that shows progress."""
    with progress_bar(console, total=1) as bar:

        def report(what: str, done: int, total: int) -> None:
            bar.set_total(total)
            bar.update(what, done)

        yield report


def tell_seconds(value: float | None) -> str:
    """Return a duration as text, in two units at most: "12.3 s", "1 h 05 min"; a dash if it is not known."""
    if not is_known(value):
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{value / 60:.1f} min"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours:,} h {minutes:02} min"


DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def tell_signed(value: float, *, digits: int = 1) -> str:
    """Return a signed number for people, with a real minus sign; one that rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if text.strip("+-0.") else text[1:]


def tell_signed_interval(low: float, high: float, *, digits: int = 1) -> str:
    """Return a signed interval, with as many decimals as show whether zero is in it.

    >>> print(tell_signed_interval(0.04, 4.69), tell_signed_interval(-0.04, 4.69))
    [+0.04, +4.69] [0.0, +4.7]
    """
    shown = deciding_digits(low, high, digits=digits)
    return f"[{tell_signed(low, digits=shown)}, {tell_signed(high, digits=shown)}]"


def tell_estimate(value: float, low: float, high: float, *, digits: int = 1) -> str:
    """Return a signed value with its interval, both with as many decimals as show whether zero is in it.

    >>> print(tell_estimate(2.37, 0.04, 4.69), tell_estimate(2.37, 1, 4.69))
    +2.37 [+0.04, +4.69] +2.4 [+1.0, +4.7]
    """
    shown = deciding_digits(low, high, digits=digits)
    return f"{tell_signed(value, digits=shown)} {tell_signed_interval(low, high, digits=shown)}"


def deciding_digits(low: float | None, high: float | None, *, digits: int = 1) -> int:
    """Return how many decimals an interval and its middle are shown with: `digits`, or more if these hide its sign.

    A sentence that calls a difference shown must not stand beside an end of 0.0 (docs/intervals.md).
    """
    if low is None or high is None or low <= 0 <= high:
        return digits
    nearest = min(abs(low), abs(high))
    while not float(f"{nearest:.{digits}f}"):
        digits += 1
    return digits


def show_controls(text: str) -> str:
    """Return a text of a data file or of a model with pictures in place of control characters.

    >>> show_controls("a\\x1b[31mb\\n")
    'a␛[31mb\\n'
    """
    return text.translate(_PICTURES)


def tell_rate(value: float | None) -> str:
    """Return a learning rate as recipes write it: 3e-4, 2.5e-5; a dash if it is not known."""
    if not is_known(value):
        return DASH
    number, exponent = f"{value:.5e}".split("e")
    return f"{number.rstrip('0').rstrip('.')}e{int(exponent)}" if int(exponent) < 0 else f"{value:g}"


def is_known(value: float | None) -> TypeGuard[float]:
    """Return whether `value` is a finite number."""
    return value is not None and math.isfinite(value)


# Wider than any table: the width that a table takes within it is its width without folded lines.
_ENDLESS = 1 << 16


class Table(RichTable):
    """A table of texts whose first column names its rows, with its title at the left.

    texts, numbers: the heads of its first columns and of those at the right.
    sentences: the head of the last column, if that holds sentences; on a narrow terminal they go below the table.
    """

    def __init__(
        self,
        *,
        title: str = "",
        texts: Sequence[str] = (),
        numbers: Sequence[str] = (),
        sentences: str | None = None,
        show_lines: bool = False,
    ) -> None:
        super().__init__(*texts, show_lines=show_lines)
        self.heading, self.sentences = title, sentences
        for head in numbers:
            self.add_column(head, justify="right")
        if sentences is not None:
            self.add_column(sentences)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table in the form that fits the console."""
        if self.heading:
            yield Text(self.heading, style="italic")
        if not console.is_terminal:
            yield from self._plain_lines()
        elif _width(console, self, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
        elif self.sentences and _width(console, short := self._without_sentences(), options) <= options.max_width:
            yield from RichTable.__rich_console__(short, console, options)
            for name, *_, sentence in self._rows():
                if sentence.plain:
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
        """Yield each row as its name and, below it, its other cells with their heads; a sentence has its own line."""
        heads = [_one_line(column.header) for column in self.columns]
        for name, *cells in self._rows():
            yield Text.assemble(name, style="bold")
            line = Text()
            for head, cell in zip(heads[1:], cells, strict=True):
                if not cell.plain or head == self.sentences:
                    continue
                entry = Text.assemble(head, ": ", Text(" ").join(cell.split("\n")))
                if line.plain and line.cell_len + 2 + entry.cell_len > width - 2:
                    yield _indented(line)
                    line = Text()
                line = Text.assemble(line, "; " if line.plain else "", entry)
            if line.plain:
                yield _indented(line)
            if self.sentences:
                yield _indented(cells[-1])


def _width(console: Console, table: RichTable, options: ConsoleOptions) -> int:
    """Return the width of a table without folded lines."""
    return table.__rich_measure__(console, options.update(max_width=_ENDLESS)).maximum


def _one_line(cell: Any) -> str:
    return " ".join((cell.plain if isinstance(cell, Text) else str(cell)).split("\n")).strip()


def _pad(cell: str, width: int, column: Column) -> str:
    blanks = " " * (width - cell_len(cell))
    return blanks + cell if column.justify == "right" else cell + blanks


def _indented(line: Text) -> Padding:
    return Padding(line, (0, 0, 0, 2), expand=False)
