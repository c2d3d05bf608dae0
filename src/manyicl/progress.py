"""Progress for people: a bar on a terminal, a plain line now and then elsewhere; both with pace and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from manyicl.report.numbers import tell_seconds

# Seconds between two plain lines where there is no terminal.
QUIET_S = 15.0


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints texts as they are, and folds nothing away where the output is no terminal."""
    # Labels and paths are texts of the user's: "[/b]" is no markup, ":cat:" no picture.
    console = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 4096
    return console


class Bar:
    """One line of progress."""

    def __init__(self, console: Console, progress: Progress | None, total: int) -> None:
        self.console, self.progress, self.total = console, progress, total
        self.line = progress.add_task("", total=total, note="") if progress else None
        self.told = self.started = time.monotonic()
        self.first_done: int | None = None
        self.last_note = ""

    def set_total(self, total: int) -> None:
        """Change how much there is to do."""
        self.total = total
        if self.progress is not None and self.line is not None:
            self.progress.update(self.line, total=total)

    def update(self, what: str, done: int, *, note: str = "") -> None:
        """Show that `done` of the total are done."""
        if self.progress is not None and self.line is not None:
            self.progress.update(self.line, description=what, completed=done, note=note)
        elif time.monotonic() - self.told > QUIET_S or done == self.total:
            self.told = time.monotonic()
            # A note is the last line of a run's log: until there is a new one, it would only be repeated.
            shown = [f"{what}: {done}/{self.total}", self._tell_pace(done), note if note != self.last_note else ""]
            self.last_note = note
            # Names of tasks are the user's: "[/b]" in one is no markup.
            line = ", ".join(part for part in shown if part)
            self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        if self.first_done is None:  # what an earlier process did took no time of this one
            self.first_done, self.started = done, time.monotonic()

    def _tell_pace(self, done: int) -> str:
        """Return how long one step takes and how long the rest will, '' if nothing was measured yet."""
        if self.first_done is None or done <= self.first_done:
            return ""
        elapsed = time.monotonic() - self.started
        if elapsed < 1:
            return ""  # too short to tell anything
        each = elapsed / (done - self.first_done)
        left = f", {tell_seconds(each * (self.total - done))} left" if done < self.total else ""
        return f"{each:.2g} s each{left}"


class Pace:
    """How long pieces of work take, by kind, and so how long the rest of them will."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Remember what one piece took."""
        self.seconds.setdefault(kind, []).append(seconds)

    def left(self, kinds: Iterable[str]) -> float | None:
        """Return the seconds that pieces of these kinds will take, None if nothing was measured yet.

        Each kind is taken at its own mean, one that was never measured at the mean of all.

        >>> pace = Pace()
        >>> pace.add("train", 100); pace.add("test", 10); pace.add("test", 20)
        >>> pace.left(["train", "test", "test"])
        130.0
        """
        every = [second for some in self.seconds.values() for second in some]
        if not every:
            return None
        means = {kind: sum(some) / len(some) for kind, some in self.seconds.items()}
        return float(sum(means.get(kind, sum(every) / len(every)) for kind in kinds))


@contextmanager
def progress_bar(console: Console, *, total: int) -> Iterator[Bar]:
    """Show a bar while the block runs."""
    if not console.is_terminal:
        yield Bar(console, None, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(console, progress, total)


@contextmanager
def reporting(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Return a function (what, done, total) that shows progress while the block runs."""
    with progress_bar(console, total=1) as bar:

        def report(what: str, done: int, total: int) -> None:
            bar.set_total(total)
            bar.update(what, done)

        yield report
