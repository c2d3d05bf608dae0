"""The host's memory: how much of it this process can still have, where Linux says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_host_memory(*, proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Return the bytes of the host's memory that this process can still have; None where the system does not say.

    It is what Linux calls available, or what the limit of a control group leaves, such as that of a container or of a
    job; processes that one launch started on this host have equal parts of it.
    """
    available = _read_numbers(proc / "meminfo").get("MemAvailable")
    free = [*_left_in_groups(proc, groups), *([] if available is None else [available * 1024])]
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if free else None


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yield what each limit leaves of the control groups (version 2) that this process is in."""
    own = [line for line in _read_lines(proc / "self" / "cgroup") if line.startswith("0::/")]
    for folder in [place for line in own for place in [groups / line[4:], *(groups / line[4:]).parents]]:
        limit = "".join(_read_lines(folder / "memory.max"))  # "max" if there is none
        used = "".join(_read_lines(folder / "memory.current"))
        if limit.isdecimal() and used.isdecimal():
            # Files that were read and are kept for later reads make room for what is needed.
            yield int(limit) - int(used) + _read_numbers(folder / "memory.stat").get("inactive_file", 0)


def _read_numbers(file: Path) -> dict[str, int]:
    """Return name -> number of a file with a line for each, such as `MemAvailable:  4711 kB`."""
    lines = [line.split() for line in _read_lines(file)]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
