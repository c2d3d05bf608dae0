"""The command `manyicl`, and `python -m manyicl`, also under `accelerate launch -m manyicl`."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from manyicl.errors import TerminatedError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


# Seconds after which a process is stopped again if the first time came to nothing.
_AGAIN_S = 0.1


class _LenientFile(io.FileIO):
    """A file that drops what the system does not take, because its disk is full or nobody reads the pipe any more."""

    def write(self, data: Buffer, /) -> int:
        """Write, and call it written either way."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def run() -> None:
    """Run the command line. Ctrl-C (exit code 130) and SIGTERM (143) are one line at any time, imports included."""
    _let_stderr_fail()
    _hear_lost_stops()
    if "RANK" not in os.environ:  # the processes of a launch may wait for each other, and must end at once
        signal.signal(signal.SIGTERM, _stop)
    try:
        from manyicl.cli import main  # here, because it takes seconds, in which somebody may press Ctrl-C

        main()
    except KeyboardInterrupt as error:
        sys.stderr.write("stopped\n")
        sys.exit(143 if isinstance(error, TerminatedError) else 130)


def _let_stderr_fail() -> None:
    """Go on if standard error takes no more: progress and warnings are no reason to lose a result or hours of training.

    Libraries write to it as well, so this is done once for all of them, before any is imported.
    """
    if type(sys.stderr) is not io.TextIOWrapper or os.name != "posix":
        return  # it is closed, somebody who calls this has put a stream of their own in its place, or it is a console
    raw = _LenientFile(sys.stderr.fileno(), "w", closefd=False)
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=True)


def _hear_lost_stops() -> None:
    """Stop the process again if its stop was lost: Python drops what is raised while it frees an object."""
    if os.name != "posix":
        return
    show = sys.unraisablehook

    def hear(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            show(lost)
            return
        number = signal.SIGINT
        if isinstance(lost.exc_value, TerminatedError):
            number = signal.SIGTERM
            signal.signal(number, _stop)
        # Not at once: that would be raised in here, and lost as well.
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()

    sys.unraisablehook = hear


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise TerminatedError


if __name__ == "__main__":
    run()
