"""Mistakes in data files, collected by kind instead of raised at the first one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manyicl.errors import suggest

_ROWS_NAMED = 5  # row numbers kept in one Fault


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of mistake in one file.

    `rows` are the first few row numbers, `count` is how many rows have it (1, with no rows, for a mistake of the file
    as a whole), and `message` is one line: file, first row, the value and the fix.
    """

    path: Path
    kind: str
    rows: tuple[int, ...]
    count: int
    message: str


@dataclass(slots=True)
class _Found:
    """What FaultLog knows about one kind of fault."""

    what: str
    rows: list[int] = field(default_factory=list)
    count: int = 0


class FaultLog:
    """Collects the mistakes of one task: thousands of rows with the same one become one Fault."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[tuple[Path, str], _Found] = {}

    def add(
        self, kind: str, what: str | Callable[[], str], *, row: int | None = None, path: Path | None = None
    ) -> None:
        """Note a fault; `what` (value and fix) is kept, and computed if it is a function, for the first row alone."""
        found = self._found.get((path or self._path, kind))
        if found is None:
            text = what if isinstance(what, str) else what()
            found = self._found[path or self._path, kind] = _Found(" ".join(text.split()))
        found.count += 1
        if row is not None and len(found.rows) < _ROWS_NAMED:
            found.rows.append(row)

    def list_faults(self) -> list[Fault]:
        """Return one Fault for each kind, in the order in which they were met."""
        faults = []
        for (path, kind), found in self._found.items():
            where = f"{path}, row {found.rows[0]:,}" if found.rows else f"{path}"
            others = found.count - 1
            if others and found.rows:
                where += f" (and {others:,} more {'row' if others == 1 else 'rows'})"
            faults.append(Fault(path, kind, tuple(found.rows), found.count, f"{where}: {found.what}"))
        return faults


def show(value: object) -> str:
    """Return `value` as a short one-line literal for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def near_word(word: str, known: tuple[str, ...]) -> str:
    """Return what `suggest` says, or nothing if that would be too long for a message."""
    text = suggest(word, known)
    return text if len(text) <= 160 else ""
