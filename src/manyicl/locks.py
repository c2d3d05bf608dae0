"""Locks: one writer per file or folder, and pieces of work that several processes divide through a folder.

Both are locks that the operating system holds for a process. They are free again as soon as the process ends, however
it ends: a kill leaves none behind. The lock file names its holder, for those who wait.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from manyicl.errors import UserError
from manyicl.files import sync_folder, sync_tree

LOCK = ".lock"
# How network file systems without locks refuse one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def sole_writer(path: Path, *, is_file: bool = False) -> Iterator[None]:
    """Hold the only right to write to `path`: a folder, which is created if needed, or with `is_file` a file.

    A folder that was created here and is still empty at the end is removed.

    Raises:
        UserError: another process holds the right, or the folder cannot be created.
    """
    folder = path.parent if is_file else path
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"out={path}: {error.filename} is a file, not a folder; name another place") from error
    try:
        with claiming(folder / (f".{path.name}{LOCK}" if is_file else LOCK)) as holder:
            if holder is not None:
                raise UserError(f"{path}: {holder} is at work on it; wait until that ends, or stop it")
            yield
    finally:
        with suppress(OSError):  # a folder that is not empty stays
            for parent in created:
                parent.rmdir()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give the block an empty folder to fill; it becomes `path` once it is whole and on disk.

    If the block fails or is stopped, nothing of it is left.

    Raises:
        UserError: `path` exists, or another process is writing it.
    """
    partial = path.with_name(f".{path.name}.partial")
    with sole_writer(path, is_file=True):
        if path.exists():  # perhaps by a process that has ended just now
            raise UserError(f"{path}: exists already; name a new folder")
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        try:
            partial.mkdir()
            yield partial
            sync_tree(partial)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)


@contextmanager
def claiming(file: Path) -> Iterator[str | None]:
    """Hold the lock file `file` during the block, and give the block None; the file is removed afterwards.

    If another process holds it, the block gets that process's name instead ("process 4711 on node3 (since 2026-11-28
    09:30:00)"), and no lock. On a file system without locks every process gets the lock, with a warning.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # filelock's own fallback, a file that exists while its holder lives, would outlast a holder killed on another host.
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield _read_holder(file)
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{file.parent}: no locks on this file system; start one process only", stacklevel=3)
    try:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write_text(f"process {os.getpid()} on {platform.node()} (since {now})", encoding="utf-8")
        yield None
    finally:
        file.unlink(missing_ok=True)  # before the release: a process that opened the file by now finds it gone
        lock.release()


def _read_holder(file: Path) -> str:
    """Return what the holder wrote into the file, "another process" if it has not written yet."""
    with suppress(OSError):
        if holder := " ".join(file.read_text(encoding="utf-8", errors="replace").split()):
            return holder
    return "another process"
