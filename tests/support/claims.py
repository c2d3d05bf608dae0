"""Another process that works on a piece of shared work."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

from tests.support.forked import ROOT

HOLD = (
    "import sys, time; from pathlib import Path; from manyicl.locks import claiming\n"
    "with claiming(Path(sys.argv[1])) as holder:\n"
    "    print(holder, flush=True)\n"
    "    time.sleep(float(sys.argv[2]))\n"
)


@contextmanager
def other_process(path, *, seconds=60.0):
    """Another process that tries to claim `path`, and holds on to what it got."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src"}
    arguments = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
