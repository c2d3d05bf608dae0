"""The command `manyicl`, and `python -m manyicl`, also under `accelerate launch -m manyicl`."""

import os
import signal
import sys
from typing import NoReturn

from manyicl.errors import TerminatedError


def run() -> None:
    """Run the command line. Ctrl-C (exit code 130) and SIGTERM (143) are one line at any time, imports included."""
    if "RANK" not in os.environ:  # the processes of a launch may wait for each other, and must end at once
        signal.signal(signal.SIGTERM, _stop)
    try:
        from manyicl.cli import main  # here, because it takes seconds, in which somebody may press Ctrl-C

        main()
    except KeyboardInterrupt as error:
        sys.stderr.write("stopped\n")
        sys.exit(143 if isinstance(error, TerminatedError) else 130)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise TerminatedError


if __name__ == "__main__":
    run()
