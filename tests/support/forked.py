"""Processes that begin with torch and this library imported: a new Python takes nine seconds of a core for that.

They are forked from a clean server of the standard library, which has done nothing but import; so each is as new as one
that was started, and can be killed, can run out of memory or can be one of several ranks.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.preloaded"])
TIMEOUT_S = 300


@contextmanager
def forked(
    script: Sequence[str], environment: Mapping[str, str], *, err: str = os.devnull
) -> Iterator[multiprocessing.process.BaseProcess]:
    """Have Python run on `script` during the block; it is killed at the end of the block.

    err: the file or pipe that its standard error goes to. Its output goes nowhere.
    """
    process = FORKS.Process(target=_become, args=(list(script), dict(environment), os.devnull, err))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


class ForkedPopen:
    """Takes the place of `subprocess.Popen` in code that starts Python scripts with a log each, and polls them."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdout: IO[str] | IO[bytes], **_: object
    ) -> None:
        self.process = FORKS.Process(target=_become, args=(list(command[1:]), dict(env), stdout.name, stdout.name))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("a forked process", timeout)


def run_forked(
    *processes: tuple[Sequence[str], Mapping[str, str]], err: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python on each (script, environment) at once from the repository's root; return all as one when they end.

    A script is `["-m", module, ...]` or `[file, ...]`. If one fails, the others are killed, as by a launcher.
    err: the device that standard error goes to. Default: it is returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder, f"{number}.err") if err is None else Path(err) for number in range(len(processes))]
        streams = [(Path(folder, f"{number}.out"), file) for number, file in enumerate(errors)]
        started = [
            FORKS.Process(target=_become, args=(list(script), dict(environment), *map(str, files)))
            for (script, environment), files in zip(processes, streams, strict=True)
        ]
        for process in started:
            process.start()
        code = _wait(started)
        out, told = (
            "".join(file.read_text() for file in files if file.is_file()) for files in zip(*streams, strict=True)
        )
    return subprocess.CompletedProcess([script for script, _ in processes], code, out, told)


def launch_forked(script: Sequence[str], environment: Mapping[str, str], *, ranks: int) -> subprocess.CompletedProcess:
    """Run Python on `script` in several processes with the variables that torch.distributed.run gives them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return run_forked(*((script, {**environment, **shared, **number}) for number in numbers))


def _wait(started: Sequence[multiprocessing.process.BaseProcess]) -> int:
    """Return the exit code of the first process that failed, negative if a signal killed it; 0 if none did."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        failed = [process.exitcode for process in started if process.exitcode]
        late = time.monotonic() > end
        if failed or late or all(process.exitcode == 0 for process in started):
            break
        time.sleep(0.01)
    for process in started:
        process.kill()
        process.join()
    assert not late, f"still at work after {TIMEOUT_S} s"
    return failed[0] if failed else 0


def _become(script: Sequence[str], environment: Mapping[str, str], out: str, err: str) -> None:
    """Do in this process what `python SCRIPT` does."""
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if script[0] == "-m":
            sys.argv = list(script[1:])
            runpy.run_module(script[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(script)
            sys.path.insert(0, str(Path(script[0]).parent))
            runpy.run_path(script[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
