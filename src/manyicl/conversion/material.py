"""What a source gives: for each task its data files, their splits, and what else is known about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyicl.errors import UserError, suggest
from manyicl.tasks import SPLIT_WORDS, SPLITS


@dataclass(frozen=True, slots=True)
class Part:
    """One data file of a task."""

    path: Path
    """A file that the readers of tasks know; a copy in a temporary folder if the source has another format."""
    split: str
    """The source's own name of its split, such as "validation_matched"; "" if it has none."""
    shown: str
    """How messages name it."""


@dataclass(frozen=True, slots=True)
class Material:
    """The files of one task, before they are read."""

    name: str
    parts: tuple[Part, ...]
    kind: str = ""
    """What the source is, if that is known before any row is read, such as "a task file of lm-evaluation-harness"."""
    settings_path: Path | None = None
    """Its task.json, which may not exist."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a task.json that the source decides: family, metric, instruction."""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> names of its classes, if the source says them apart from its data files."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from, as the written task.json records it: source, config, revision."""
    notes: tuple[str, ...] = ()
    """What of the source has no counterpart here."""


def name_splits(theirs: Iterable[str], *, chosen: Mapping[str, str], shown: str) -> dict[str, str | None]:
    """Return the source's split -> ours ("" if there is none); None for a split whose rows are left out.

    chosen: our split -> the source's that takes its place. Other splits keep their place if they have a usual name
    and it is still free. A source that has only train rows names no split, so that its rows are divided.

    Raises:
        UserError: `chosen` names a split that is not ours, or that the source does not have.
    """
    known = list(dict.fromkeys(theirs))
    for ours, own in chosen.items():
        if ours not in SPLITS:
            raise UserError(f"split {ours}={own}: '{ours}' is not a split{suggest(ours, SPLITS)}")
        if own not in known:
            named = [split for split in known if split]
            fix = suggest(own, named) if named else "; it names no splits"
            raise UserError(f"split {ours}={own}: {shown} has no split '{own}'{fix}")
    placed: dict[str, str | None] = {}
    for own in known:
        usual = SPLIT_WORDS.get(own.strip().lower()) if own else ""
        placed[own] = None if usual in chosen else usual
    placed |= {own: ours for ours, own in chosen.items()}
    if {ours for ours in placed.values() if ours is not None} == {"train"}:
        return {own: None if ours is None else "" for own, ours in placed.items()}
    return placed
