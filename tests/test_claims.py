"""A claim is one process's, until that process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from manyicl.locks import claiming
from tests.trajectory.setting import ROOT

HOLD = (
    "import sys, time; from pathlib import Path; from manyicl.claims import claiming\n"
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


def test_another_process_is_told_who_holds_it(tmp_path):
    path = tmp_path / "claims" / "a.lock"
    with claiming(path) as holder:
        assert holder is None
        with other_process(path) as process:
            assert process.stdout.readline().strip() == f"process {os.getpid()} on {socket.gethostname()}"
    with claiming(path) as holder:
        assert holder is None


def test_the_claim_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "a.lock"
    with other_process(path) as process:
        assert process.stdout.readline().strip() == "None"
        with claiming(path) as holder:
            assert holder == f"process {process.pid} on {socket.gethostname()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claiming(path) as holder:
            assert holder is None


def test_a_file_system_without_locks_gives_every_claim_with_a_warning(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match=f"{tmp_path}: no locks on this file system; start one process only"),
        claiming(tmp_path / "a.lock") as holder,
    ):
        assert holder is None
