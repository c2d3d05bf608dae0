"""Processes that share the work of a folder: started, spread over the GPUs, shown and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from manyicl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

# Where each helper writes what it would have printed, in the folder of the work.
LOGS = "logs"
# The option that makes a process a helper; its value is how many processes share its GPU.
SHARED_BY = "--shared-by"
# The variable that names the process that it helps, without which it ends.
HELPED = "MANYICL_HELPED_PROCESS"
# What a launcher has set for the calling process alone.
OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds between two looks at the helpers; in which they end by themselves once all is done; and may save when told to.
POLL_S, ENDING_S, PATIENCE_S = 0.5, 5.0, 20.0


class Helper:
    """A process that does a part of the work, and its log."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> None:
        self.number, self.log, self.error, self.is_told = number, log, "", False
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

    def news(self) -> list[str]:
        """Return which items it has finished since the last call, and how it has ended if that was not well."""
        code = self.popen.poll()  # first, or its last lines may be missed
        lines = self._new_lines()
        self.error = next((line for line in reversed(lines) if line.startswith("error: ")), self.error)
        news = [line for line in lines if is_finished_item(line)]
        if code and not self.is_told:
            self.is_told = True
            news.append(f"process {self.number} ended before the work was done: {self.tell_end()}")
        return news

    def tell_end(self) -> str:
        """Return how it ended: its own error, or its exit code and where to look."""
        return self.error or f"code {self.popen.returncode}, see the end of {self.log}"

    def _new_lines(self) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        return whole.decode("utf-8", errors="replace").splitlines()


def share_work(
    work: Callable[[int | None], None], command: Sequence[str], *, folder: Path, number: int, console: Console
) -> None:
    """Have `number` processes do the work of `folder`, and show what the others finish.

    They take turns over the GPUs that this process sees, and share the cores. This process is one of them, unless there
    are several GPUs: it would see them all, so it waits. Whoever dies leaves its work to the others; none outlives this
    process.

    work: does the missing work in this process until all is done; its argument is how many processes share its GPU, or
    None if it is alone. command: does the same in another process, after `manyicl`; it takes the option `SHARED_BY`.

    Raises:
        UserError: all processes ended before the work was done.
    """
    gpus = visible_gpus()
    is_one = len(gpus) < 2
    if number == 1 and is_one:
        work(None)
        return
    if number < len(gpus):
        console.print(f"of {len(gpus)} GPUs {number} will be used: as many as processes", highlight=False)
    indices = range(1 if is_one else 0, number)
    with _helped(command, indices, folder=folder, number=number, gpus=gpus, console=console) as helpers:
        if is_one:
            work(place(0, number=number, gpus=gpus)[1])
        _wait(helpers, seconds=ENDING_S if is_one else None)
    if not is_one and all(helper.popen.returncode for helper in helpers):
        raise UserError(f"{folder}: no process could end its work: {helpers[-1].tell_end().removeprefix('error: ')}")


@contextmanager
def _helped(
    command: Sequence[str], indices: range, *, folder: Path, number: int, gpus: Sequence[str], console: Console
) -> Iterator[list[Helper]]:
    """Start the processes of some indices and show what they do; end those that are left at the end of the block."""
    import torch

    threads = torch.get_num_threads()
    each = str(max(1, threads // number))
    (folder / LOGS).mkdir(exist_ok=True)
    helpers: list[Helper] = []
    over = threading.Event()
    shower = threading.Thread(target=_show, args=(helpers, over, console), daemon=True)
    inherited = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCH}
    torch.set_num_threads(int(each))
    try:
        for index in indices:
            gpu, shared_by = place(index, number=number, gpus=gpus)
            words = [sys.executable, "-m", "manyicl", *command, SHARED_BY, str(shared_by)]
            own = {"OMP_NUM_THREADS": each, "MKL_NUM_THREADS": each, HELPED: str(os.getpid()), **gpu}
            helpers.append(Helper(index + 1, words, inherited | own, log=folder / LOGS / f"process-{index + 1}.log"))
        shower.start()
        yield helpers
    finally:
        try:
            over.set()
            if shower.ident is not None:
                shower.join()
        finally:
            _end(helpers)
            torch.set_num_threads(threads)


def _show(helpers: Sequence[Helper], over: threading.Event, console: Console) -> None:
    """Print which items helpers finish, and if one dies, until `over` is set."""
    is_last = False
    while not is_last:
        is_last = over.wait(POLL_S)
        for line in [line for helper in helpers for line in helper.news()]:
            console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _wait(helpers: Sequence[Helper], *, seconds: float | None) -> None:
    """Wait until all have ended, at most so many seconds."""
    start = time.monotonic()
    while any(helper.popen.poll() is None for helper in helpers):
        if seconds is not None and time.monotonic() - start > seconds:
            return
        time.sleep(min(POLL_S, 0.1))


def _end(helpers: Sequence[Helper]) -> None:
    """End the helpers that are still at work; all may save first, in the same time."""
    try:
        for helper in helpers:
            if helper.popen.poll() is None:
                helper.popen.terminate()
        _wait(helpers, seconds=PATIENCE_S)
    finally:
        for helper in helpers:
            with suppress(ProcessLookupError):
                helper.popen.kill()  # does nothing to one that has ended
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
    """End this process as soon as the one that it helps has gone: killed, it could not say so.

    Not on Windows, where a process keeps its parent's number.
    """
    helped_process = int(os.environ.get(HELPED, "0"))

    def watch() -> None:
        while os.getppid() == helped_process:
            time.sleep(1.0)
        os._exit(1)

    if helped_process and os.name == "posix":
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
