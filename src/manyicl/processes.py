"""Processes that divide the work of one folder: started, spread over the GPUs, and shown as one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manyicl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

# Where each process writes what it would have printed, in the folder of the work.
LOGS = "logs"
# The option with which a process is told that it is one of several, and how many share its GPU.
SHARED_BY = "--shared-by"
# Seconds between two looks at the processes, and for which they may end by themselves once they are told to.
POLL_S, PATIENCE_S = 0.3, 20.0
USER_ERROR = 2


class Process:
    """One process at work, and its log."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> None:
        self.number, self.log = number, log
        with log.open("ab") as file:
            self._read = file.tell()  # the log of an earlier start is kept
            self.popen = subprocess.Popen(  # not shell: `command` is a list
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def new_lines(self) -> list[str]:
        """Return the whole lines that it has written since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        return whole.decode("utf-8", errors="replace").splitlines()


def run_processes(command: Sequence[str], *, folder: Path, number: int, console: Console) -> None:
    """Have `number` processes run the same command, which divides the missing work of `folder`; show what they finish.

    They take turns over the GPUs that this process sees, and share each in equal parts; on a CPU they share its cores.
    A process that dies leaves its work to the others; one that ends with a user's error ends all.

    command: after `manyicl`; it takes the option `SHARED_BY`.

    Raises:
        UserError: a process's own, or all processes died.
    """
    (folder / LOGS).mkdir(exist_ok=True)
    shown, died = set[str](), dict[int, str]()
    with _starting(command, folder=folder, number=number, gpus=visible_gpus()) as processes:
        at_work = list(processes)
        while at_work:
            time.sleep(POLL_S)
            ended = [process for process in at_work if process.popen.poll() is not None]
            for process in processes:
                lines = process.new_lines()
                for line in [line for line in lines if is_news(line) and line not in shown]:
                    shown.add(line)
                    console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
                if process in ended:
                    _judge(process, lines, died, others=len(at_work) > len(ended), console=console)
            at_work = [process for process in at_work if process not in ended]
    if len(died) == number:
        raise UserError(f"{folder}: all {number} processes died, the last one with {list(died.values())[-1]}")


def _judge(process: Process, lines: Sequence[str], died: dict[int, str], *, others: bool, console: Console) -> None:
    """Note and tell if a process that has ended died.

    Raises:
        UserError: it ended with a user's error, which its last line says.
    """
    code = process.popen.returncode
    if code == 0:
        return
    if code == USER_ERROR:
        errors = [line for line in lines if line.startswith("error: ")]
        raise UserError(errors[-1].removeprefix("error: ") if errors else f"see the end of {process.log}")
    died[process.number] = f"code {code}, see the end of {process.log}"
    rest = "; the others do its work" if others else ""
    console.print(f"process {process.number} died: {died[process.number]}{rest}", soft_wrap=True, highlight=False)


def is_news(line: str) -> bool:
    """Return whether a line of a process's log is for the terminal: notes and finished items, not progress within one.

    >>> is_news("[3/9] seed 0, base: test: done in 2.0 s"), is_news("[3/9] seed 0, base: test (mawps): 20/162")
    (True, False)
    """
    if line.startswith("["):
        return ": done in " in line
    return bool(line.strip()) and not line.startswith(("error: ", "waiting for ", "stopped"))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    number = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:number] if named else [str(index) for index in range(number)]


def place(index: int, *, number: int, gpus: Sequence[str]) -> tuple[dict[str, str], int]:
    """Return where one of `number` processes works: its part of the environment, and how many share its GPU.

    >>> place(3, number=5, gpus=["0", "1"])[1]  # processes 1 and 3 are on GPU 1
    2
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))}
    if not gpus:
        return threads, number
    gpu = index % len(gpus)
    return threads | {"CUDA_VISIBLE_DEVICES": gpus[gpu]}, len(range(gpu, number, len(gpus)))


@contextmanager
def _starting(command: Sequence[str], *, folder: Path, number: int, gpus: Sequence[str]) -> Iterator[list[Process]]:
    """Start the processes; those that are still at work at the end of the block are stopped, and may save first."""
    processes: list[Process] = []
    try:
        for index in range(number):
            mine, shared_by = place(index, number=number, gpus=gpus)
            # What somebody has set for threads is meant for each process.
            environment = {**mine, **os.environ, **{key: mine[key] for key in mine if key != "OMP_NUM_THREADS"}}
            words = [sys.executable, "-m", "manyicl", *command, SHARED_BY, str(shared_by)]
            processes.append(Process(index + 1, words, environment, log=folder / LOGS / f"process-{index + 1}.log"))
        yield processes
    finally:
        for process in processes:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in processes:
            try:
                process.popen.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
