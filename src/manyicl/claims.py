"""Pieces of work that several processes share through a folder: each is done by one process at a time.

A claim is a lock that the operating system holds for a process (flock), so it is free again as soon as the process
ends, however it ends: no claim is left behind by a kill. The lock file says who holds it, for those who wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
