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
    assert end_of_check(tmp_path) == (code, "", "stopped\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_comes_while_an_object_is_freed_is_not_lost(tmp_path: Path, number: int, code: int) -> None:
    """Python drops what __del__ raises: a comparison went on to its end, as if nobody had stopped it."""
    (tmp_path / "typer.py").write_text(
        f"import os, time\nclass Freed:\n    def __del__(self):\n        os.kill(os.getpid(), {number:d})\n"
        "Freed()\ntime.sleep(20)\n"
    )
    assert end_of_check(tmp_path) == (code, "", "stopped\n")


def end_of_check(packages: Path) -> tuple[int, str, str]:
    """Return exit code, output and errors of `manyicl check` with the packages of a folder in place of others."""
    process = python_process(["-m", "manyicl", "check", str(packages)])
    process["env"]["PYTHONPATH"] = f"{packages}:{process['env']['PYTHONPATH']}"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # else a job in the background ignores it
    try:
        done = subprocess.run(**process, check=False, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    return done.returncode, done.stdout, done.stderr
