"""A command that is stopped ends in one line at any moment, the seconds in which it is imported included."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.trajectory.setting import python_process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_while_it_is_imported_says_so(tmp_path: Path, number: int, code: int) -> None:
    """Field trial 70: it ended without a line, or in a traceback."""
    # In the place of a package that the command line imports, one that stands for a user who presses Ctrl-C meanwhile.
    (tmp_path / "typer.py").write_text(f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(20)\n")
    process = python_process(["-m", "manyicl", "check", str(tmp_path)])
    process["env"]["PYTHONPATH"] = f"{tmp_path}:{process['env']['PYTHONPATH']}"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # else a job in the background ignores it
    try:
        done = subprocess.run(**process, check=False, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "stopped\n")
