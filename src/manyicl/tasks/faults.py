"""Mistakes in data files, collected by kind rather than raised one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from manyicl.errors import suggest

_ROWS_NAMED = 5  # row numbers kept in one Fault


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of mistake in one file."""

    path: Path
    kind: str
    """A few words, the same for all mistakes of the kind."""
    rows: tuple[int, ...]
    """Numbers of the first few rows that have it; none for a mistake of the file as a whole."""
    count: int
    """Number of rows that have it; 1 for a mistake of the file as a whole."""
    message: str
    """One line: file, first row, value and fix."""
    settings: Mapping[str, object] | None = None
    """A task.json that reads the file, if its layout is a known one."""


@dataclass(slots=True)
class _Found:
    """One kind of fault in one file, so far."""

    what: str
    """Value and fix of the first row."""
    rows: list[int] = field(default_factory=list)
    count: int = 0
    settings: Mapping[str, object] | None = None


class FaultLog:
    """Collects the mistakes of one task: thousands of rows with the same mistake become one Fault."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[tuple[Path, str], _Found] = {}

    def add(
        self,
        kind: str,
        what: str | Callable[[], str],
        *,
        row: int | None = None,
        path: Path | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Record a fault.

        what: value and fix, or a function that returns them. Only the first row's is used: a function is called only
        then. path: the file; default: that of the task. settings: a task.json that reads the file.
        """
        found = self._found.get((path or self._path, kind))
        if found is None:
            text = what if isinstance(what, str) else what()
            found = self._found[path or self._path, kind] = _Found(" ".join(text.split()), settings=settings)
        found.count += 1
        if row is not None and len(found.rows) < _ROWS_NAMED:
            found.rows.append(row)

    def has(self, path: Path, kind: str) -> bool:
        """Return whether a file has a fault of this kind."""
        return (path, kind) in self._found

    def retell(self, path: Path, kinds: Collection[str], what: str) -> None:
        """Describe faults of these kinds in a file as one of the file as a whole, if it has any."""
        there = [kind for kind in kinds if (path, kind) in self._found]
        for kind in there[1:]:
            self._found[path, there[0]].count += self._found.pop((path, kind)).count
        if there:
            self._found[path, there[0]].what, self._found[path, there[0]].settings = what, None
            self._found[path, there[0]].rows.clear()

    def list_faults(self) -> list[Fault]:
        """Return one Fault per file and kind, in the order in which they first occurred."""
        faults = []
        for (path, kind), found in self._found.items():
            where = f"{path}, row {found.rows[0]:,}" if found.rows else f"{path}"
            others = found.count - 1
            if others and found.rows:
                where += f" (and {others:,} more {'row' if others == 1 else 'rows'})"
            faults.append(Fault(path, kind, tuple(found.rows), found.count, f"{where}: {found.what}", found.settings))
        return faults


def show(value: object) -> str:
    """Return `value` as a short one-line literal for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def near_word(word: str, known: tuple[str, ...]) -> str:
    """Return `suggest`'s text, or '' if it would be too long for a message."""
    text = suggest(word, known)
    return text if len(text) <= 160 else ""
