"""Progress for people: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

# Seconds between two plain lines where there is no terminal.
QUIET_S = 15.0


class Bar:
    """One line of progress."""

    def __init__(self, console: Console, progress: Progress | None, total: int) -> None:
        self.console, self.progress, self.total = console, progress, total
        self.line = progress.add_task("", total=total, note="") if progress else None
        self.told = time.monotonic()

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
            # Names of tasks are the user's: "[/b]" in one is no markup.
            line = f"{what}: {done}/{self.total} {note}".rstrip()
            self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


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


class BarCallback(TrainerCallback):
    """Moves a bar with the Trainer's steps and shows the last loss and rate beside it."""

    def __init__(self, bar: Bar, what: str) -> None:
        self.bar, self.what, self.note = bar, what, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Move the bar, but for the last step, whose loss comes behind it."""
        if state.global_step < self.bar.total:
            self.bar.update(self.what, state.global_step, note=self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show the last step with its own loss."""
        self.bar.update(self.what, state.global_step, note=self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Remember what to show."""
        if logs and "tokens_per_s" in logs:
            self.note = (
                f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:,.0f} tokens/s, {logs['answers_per_s']:,.0f} answers/s"
            )
            if "mfu" in logs:
                self.note += f", MFU {100 * logs['mfu']:.0f} %"
