"""Atomic writes: a file is whole or absent, so nothing that a killed run leaves behind passes for a finished file."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`. A reader sees the old file or the new one, even after a power cut."""
    with writing_atomically(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing_atomically(path: Path) -> Iterator[Path]:
    """Give the block a temporary path to write to; the file moves to `path` once it is on disk.

    If the block fails, `path` stays as it was and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def find_others(folder: Path, ours: Collection[str]) -> list[Path]:
    """Return what lies in a folder, without files of some names and without what a killed write left of a file."""
    left = re.compile(r"\..+\.partial")
    return [path for path in folder.iterdir() if path.name not in ours and not left.fullmatch(path.name)]


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file of our own; None if it is damaged: not UTF-8, not JSON, or not an object.

    Raises:
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def default_folder(name: str) -> Path:
    """Return the default folder of a run of `name` that starts now."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of entries to disk: without it, a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, and the folder itself, to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
