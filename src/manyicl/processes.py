"""Processes that help this one with the work of a folder: started, spread over the GPUs, shown and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Where each helper writes what it would have printed, in the folder of the work.
LOGS = "logs"
# The option with which a process is told that it is a helper, and how many share its GPU.
SHARED_BY = "--shared-by"
# The variable that names the process that it helps, without which it ends.
HELPED = "MANYICL_HELPED_PROCESS"
# Seconds between two looks at the helpers, and for which one may save before it is killed.
POLL_S, PATIENCE_S = 0.5, 20.0
USER_ERROR = 2


class Helper:
    """A process that helps, and its log."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> None:
        self.number, self.log, self.is_told = number, log, False
        with log.open("ab") as file:
            self._read = file.tell()  # the log of an earlier start is kept
            self.popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the process that it helps, which ends it
            )

    def new_lines(self) -> list[str]:
        """Return the whole lines that it has written since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        return whole.decode("utf-8", errors="replace").splitlines()

    def news(self) -> list[str]:
        """Return which items it has finished since the last call, and how it has ended if that was not well."""
        code = self.popen.poll()  # first, or its last lines may be missed
        lines = self.new_lines()
        news = [line for line in lines if is_finished_item(line)]
        if code and not self.is_told:
            self.is_told = True
            errors = [line for line in lines if line.startswith("error: ")]
            how = errors[-1] if code == USER_ERROR and errors else f"code {code}, see the end of {self.log}"
            news.append(f"process {self.number} ended before the work was done: {how}")
        return news


@contextmanager
def helped(command: Sequence[str], *, folder: Path, number: int, console: Console) -> Iterator[int | None]:
    """Have `number` processes, this one among them, do the work of `folder` in the block; show what the others finish.

    They take turns over the GPUs that this process sees, of which it has the first itself, and share the cores. What a
    helper leaves when it dies is for this process to do, which the helpers do not outlive.

    command: what a helper runs, after `manyicl`; it takes the option `SHARED_BY`.

    Gives the block how many share this process's GPU; None if it is alone.
    """
    if number == 1:
        yield None
        return
    import torch

    threads, gpus = torch.get_num_threads(), visible_gpus()
    each = max(1, threads // number)
    (folder / LOGS).mkdir(exist_ok=True)
    helpers: list[Helper] = []
    over = threading.Event()
    shower = threading.Thread(target=_show, args=(helpers, over, console), daemon=True)
    torch.set_num_threads(each)
    try:
        for index in range(1, number):
            gpu, shared_by = place(index, number=number, gpus=gpus)
            words = [sys.executable, "-m", "manyicl", *command, SHARED_BY, str(shared_by)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(each), "MKL_NUM_THREADS": str(each), **gpu}
            environment[HELPED] = str(os.getpid())
            helpers.append(Helper(index + 1, words, environment, log=folder / LOGS / f"process-{index + 1}.log"))
        shower.start()
        yield place(0, number=number, gpus=gpus)[1]
    finally:
        over.set()
        if shower.ident is not None:
            shower.join()
        _end(helpers)
        torch.set_num_threads(threads)


def _show(helpers: Sequence[Helper], over: threading.Event, console: Console) -> None:
    """Print which items helpers finish, and if one dies, until `over` is set."""
    is_last = False
    while not is_last:
        is_last = over.wait(POLL_S)
        for line in [line for helper in helpers for line in helper.news()]:
            console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _end(helpers: Sequence[Helper]) -> None:
    """End the helpers that are still at work; each may save first."""
    for helper in helpers:
        if helper.popen.poll() is None:
            helper.popen.terminate()
    for helper in helpers:
        try:
            helper.popen.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            helper.popen.kill()
            helper.popen.wait()


def is_finished_item(line: str) -> bool:
    """Return whether a line of a helper's log says that an item of work is done.

    >>> is_finished_item("[3/9] seed 0, base: test: done in 2.0 s")
    True
    >>> is_finished_item("[3/9] seed 0, base: test (mawps): 20/162")
    False
    """
    return line.startswith("[") and ": done in " in line


def end_with_helped() -> None:
    """End this process as soon as the one that it helps has gone: killed, it could not say so."""
    helped_process = int(os.environ.get(HELPED, "0"))

    def watch() -> None:
        while os.getppid() == helped_process:
            time.sleep(1.0)
        os._exit(1)

    if helped_process:
        threading.Thread(target=watch, daemon=True).start()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    number = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:number] if named else [str(index) for index in range(number)]


def place(index: int, *, number: int, gpus: Sequence[str]) -> tuple[dict[str, str], int]:
    """Return where one of `number` processes works: a variable that names its GPU, and how many share it.

    >>> place(3, number=5, gpus=["0", "1"])  # with process 1
    ({'CUDA_VISIBLE_DEVICES': '1'}, 2)
    """
    if not gpus:
        return {}, number
    gpu = index % len(gpus)
    return {"CUDA_VISIBLE_DEVICES": gpus[gpu]}, len(range(gpu, number, len(gpus)))
