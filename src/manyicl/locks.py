"""One writer at a time, and pieces of work that several processes share through a folder.

Both are locks that the operating system holds for a process, so they are free again as soon as it ends, however it
ends: a kill leaves none behind. The lock file says who holds it, for those who wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from manyicl.errors import UserError

LOCK = ".lock"
_WHO = "process "


@contextmanager
def sole_writer(path: Path, *, is_file: bool = False) -> Iterator[None]:
    """Hold the only right to write to `path`: a folder, which is made if it is absent, or with `is_file` a file.

    The lock of a process that was killed is free. A folder that was made here and is still empty at the end is removed.

    Raises:
        UserError: another process holds it, or no folder can be made there.
    """
    folder = path.parent if is_file else path
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {path}: {error.filename} is a file, not a folder; name another place") from error
    file = folder / (f".{path.name}{LOCK}" if is_file else LOCK)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path}: another process is at work on it{_holder(file)}; wait until that ends, or stop it"
        ) from None
    try:
        _sign(file)
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who has opened it by now finds that it is gone
        lock.release()
        with suppress(OSError):  # no longer empty, so it stays
            for parent in made:
                parent.rmdir()


def _sign(file: Path) -> None:
    """Write who holds the lock; a file system without locks has filelock's own mark there, which must stay."""
    content = file.read_text(encoding="utf-8", errors="replace")
    if not content or content.startswith(_WHO):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write_text(f"{_WHO}{os.getpid()} on {platform.node()}, since {now}", encoding="utf-8")


def _holder(file: Path) -> str:
    """Return ' (who holds the lock)'; empty if that cannot be read."""
    with suppress(OSError):
        return f" ({' '.join(file.read_text(encoding='utf-8', errors='replace').split())})"
    return ""


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def claiming(path: Path) -> Iterator[str | None]:
    """Hold the claim of the lock file at `path` during the block, and give it None.

    If another process holds it, the block gets that process's name instead ("process 4711 on node3"), and no claim.
    A file system without locks gives every process the claim, with a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read() or "another process"
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(f"{path.parent}: no locks on this file system; start one process only", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield None
