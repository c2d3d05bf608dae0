"""Processes that share the work of a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from manyicl import processes
from manyicl.errors import UserError
from manyicl.processes import place, share_work, visible_gpus

ONE, TWO = ("0",), ("0", "1")
DONE = 'echo "[$CUDA_VISIBLE_DEVICES/2] b: train: done in 2 s"'


def test_processes_take_turns_over_the_gpus():
    placed = [place(index, number=3, gpus=["2", "GPU-5"]) for index in range(3)]
    assert [(gpu["CUDA_VISIBLE_DEVICES"], shared_by) for gpu, shared_by in placed] == [("2", 2), ("GPU-5", 1), ("2", 2)]
    assert place(0, number=3, gpus=[]) == ({}, 3)


@pytest.mark.parametrize(
    ("variable", "number", "names"),
    [
        (None, 2, ["0", "1"]),
        ("2, GPU-5", 2, ["2", "GPU-5"]),
        ("3,9", 1, ["3"]),  # there is no 9
        ("", 0, []),
        ("-1", 0, []),
    ],
)
def test_gpus_have_the_names_that_the_variable_gives_them(variable, number, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == names


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[..., str]:
    """Return a function that has three processes share work, the others by a shell script; it returns what is shown.

    With one GPU this process works too, and learns how many processes share it.
    """
    file = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(file))
    monkeypatch.setattr(processes, "POLL_S", 0.02)

    def run(
        script: str, *, gpus: Sequence[str] = TWO, number: int = 3, work: Callable[[int | None], None] | None = None
    ) -> str:
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(processes, "visible_gpus", lambda: list(gpus))
        shown = StringIO()
        console = Console(file=shown, width=200)
        share_work(work or pytest.fail, ["work"], folder=tmp_path, number=number, console=console)
        return shown.getvalue()

    return run


def read_log(folder: Path, number: int) -> list[str]:
    return (folder / "logs" / f"process-{number}.log").read_text().splitlines()


def test_with_one_gpu_this_process_works_beside_the_others(program, tmp_path):
    told = []
    assert program(DONE, gpus=ONE, work=told.append) == 2 * "[0/2] b: train: done in 2 s\n"
    assert told == [3]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["process-2.log", "process-3.log"]


def test_with_several_gpus_it_waits_since_it_would_see_them_all(program, tmp_path):
    said = program(DONE)
    assert sorted(said.splitlines()) == 2 * ["[0/2] b: train: done in 2 s"] + ["[1/2] b: train: done in 2 s"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir())[0] == "process-1.log"


def test_one_process_has_one_of_several_gpus(program):
    """It was refused: a process that sees several would train on all of them."""
    told, said = program(DONE, number=1).splitlines()
    assert (told, said) == ("of 2 GPUs 1 will be used: as many as processes", "[0/2] b: train: done in 2 s")


def test_notes_and_progress_are_in_the_logs_alone(program, tmp_path):
    said = program(f'echo "a note"; echo "[1/2] b: train: 3/4"; {DONE}')
    assert all(line.endswith("done in 2 s") for line in said.splitlines())
    assert read_log(tmp_path, 2) == ["a note", "[1/2] b: train: 3/4", "[1/2] b: train: done in 2 s"]


def test_each_is_told_how_many_share_its_gpu_and_its_threads(program, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")  # of a launch of this process
    before = torch.get_num_threads()
    program('echo "$@"; echo $OMP_NUM_THREADS $MASTER_PORT')
    assert torch.get_num_threads() == before
    for number, shared_by in ((1, 2), (2, 1), (3, 2)):
        assert read_log(tmp_path, number) == [f"-m manyicl work --shared-by {shared_by}", f"{max(1, before // 3)}"]


def test_one_that_dies_is_told_and_the_others_go_on(program):
    said = program(f"[ $CUDA_VISIBLE_DEVICES = 1 ] && kill -9 $$; {DONE}").splitlines()
    (line,) = [line for line in said if line.startswith("process")]
    assert line.startswith("process 2 ended before the work was done: code -9, see the end of ")
    assert line.endswith("/logs/process-2.log")
    assert said.count("[0/2] b: train: done in 2 s") == 2


def test_it_is_an_error_if_nobody_could_end_the_work(program):
    with pytest.raises(UserError, match=r": no process could end its work: tasks: no such folder$"):
        program('echo "error: tasks: no such folder"; sleep 0.1; exit 2')  # the line is read before the end


def test_an_error_of_this_process_ends_the_others(program, tmp_path):
    def fail(_: int | None) -> None:
        raise UserError("tasks: no such folder")

    with pytest.raises(UserError, match=r"^tasks: no such folder$"):
        program("exec sleep 60", gpus=ONE, work=fail)


def test_one_that_does_not_end_is_killed(program, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ENDING_S", 0.3)
    monkeypatch.setattr(processes, "PATIENCE_S", 0.2)
    program("trap '' TERM; echo begun; while :; do sleep 0.05; done", gpus=ONE, work=lambda _: None)
    assert read_log(tmp_path, 2) == ["begun"]


def test_an_earlier_log_is_kept_and_not_shown_again(program, tmp_path):
    program(DONE)
    assert program(DONE.replace("b:", "c:")).count("c:") == 3
    assert len(read_log(tmp_path, 1)) == 2


def test_one_process_has_no_helper(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0"])
    told = []
    share_work(told.append, ["work"], folder=tmp_path, number=1, console=Console(file=StringIO()))
    assert told == [None]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_helper_ends_without_the_process_that_it_helps(is_there):
    script = "\n".join(
        (
            "import time",
            "from manyicl.processes import end_with_helped",
            "print('begun', flush=True)",
            "end_with_helped()",
            "time.sleep(1.5)",
            "print('ended')",
        )
    )
    environment = {**os.environ, processes.HELPED: str(os.getpid() if is_there else 2**22 + 1)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == (["begun", "ended"] if is_there else ["begun"])
    assert ended.returncode == (0 if is_there else 1)
