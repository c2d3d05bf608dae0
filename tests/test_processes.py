"""Processes that help with the work of a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO

import pytest
import torch
from rich.console import Console

from manyicl import processes
from manyicl.processes import helped, place


def test_processes_take_turns_over_the_gpus():
    placed = [place(index, number=3, gpus=["2", "GPU-5"]) for index in range(3)]
    assert [(gpu["CUDA_VISIBLE_DEVICES"], shared_by) for gpu, shared_by in placed] == [("2", 2), ("GPU-5", 1), ("2", 2)]
    assert place(0, number=3, gpus=[]) == ({}, 3)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that has two helpers run a shell script to its end, on GPU 1 and on GPU 0."""
    file = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(file))
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(processes, "POLL_S", 0.02)
    started, kind = [], processes.Helper
    monkeypatch.setattr(
        processes, "Helper", lambda *args, **kwargs: started.append(kind(*args, **kwargs)) or started[-1]
    )

    def run(script: str, *, wait: bool = True) -> str:
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        started.clear()
        shown = StringIO()
        with helped(["work"], folder=tmp_path, number=3, console=Console(file=shown, width=200)) as shared_by:
            assert shared_by == 2  # processes 1 and 3 have GPU 0
            for helper in started if wait else ():
                helper.popen.wait()
        assert all(helper.popen.poll() is not None for helper in started)
        return shown.getvalue()

    return run


def test_finished_items_are_shown_and_all_is_in_the_logs(program, tmp_path):
    item = '"[$CUDA_VISIBLE_DEVICES/2] b: train:'
    said = program(f'echo "a note"; echo {item} 3/4"; echo {item} done in 2 s"')
    assert sorted(said.splitlines()) == ["[0/2] b: train: done in 2 s", "[1/2] b: train: done in 2 s"]
    assert (tmp_path / "logs" / "process-2.log").read_text().splitlines() == [
        "a note",
        "[1/2] b: train: 3/4",
        "[1/2] b: train: done in 2 s",
    ]


def test_each_is_told_how_many_share_its_gpu_and_its_threads(program, tmp_path):
    before = torch.get_num_threads()
    program('echo "$@"; echo $OMP_NUM_THREADS')
    assert torch.get_num_threads() == before
    threads = max(1, before // 3)
    for number, shared_by in ((2, 1), (3, 2)):
        said = (tmp_path / "logs" / f"process-{number}.log").read_text()
        assert said == f"-m manyicl work --shared-by {shared_by}\n{threads}\n"


def test_one_that_dies_is_told(program):
    (line,) = program("[ $CUDA_VISIBLE_DEVICES = 1 ] && kill -9 $$; exit 0").splitlines()
    assert line.startswith("process 2 ended before the work was done: code -9, see the end of ")
    assert line.endswith("/logs/process-2.log")


def test_a_users_error_is_told_as_it_is(program):
    (line,) = program(
        '[ $CUDA_VISIBLE_DEVICES = 1 ] || exit 0; echo "error: tasks: no such folder"; exit 2'
    ).splitlines()
    assert line == "process 2 ended before the work was done: error: tasks: no such folder"


def test_none_outlives_the_block(program):
    assert program("exec sleep 60", wait=False) == ""


def test_an_earlier_log_is_kept_and_not_shown_again(program, tmp_path):
    program('echo "[1/2] first: done in 1 s"')
    assert program('echo "[2/2] second: done in 1 s"') == 2 * "[2/2] second: done in 1 s\n"
    assert (tmp_path / "logs" / "process-2.log").read_text().count("done") == 2


def test_one_process_has_no_helper(tmp_path):
    with helped(["work"], folder=tmp_path, number=1, console=Console(file=StringIO())) as shared_by:
        assert shared_by is None
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_helper_ends_without_the_process_that_it_helps(is_there):
    script = "from manyicl.processes import end_with_helped; import time; end_with_helped(); time.sleep(1.5)"
    environment = {**os.environ, processes.HELPED: str(os.getpid() if is_there else 2**22 + 1)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert ended.returncode == (0 if is_there else 1)
