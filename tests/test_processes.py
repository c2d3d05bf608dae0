"""Processes that divide the work of one folder."""

from __future__ import annotations

import sys
from io import StringIO

import pytest
from rich.console import Console

from manyicl import processes
from manyicl.errors import UserError
from manyicl.processes import place, run_processes


def test_processes_take_turns_over_the_gpus_and_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    placed = [place(index, number=3, gpus=["2", "GPU-5"]) for index in range(3)]
    assert [(where["CUDA_VISIBLE_DEVICES"], shared_by) for where, shared_by in placed] == [
        ("2", 2),
        ("GPU-5", 1),
        ("2", 2),
    ]
    assert place(0, number=3, gpus=[]) == ({"OMP_NUM_THREADS": "2"}, 3)
    assert place(0, number=99, gpus=[]) == ({"OMP_NUM_THREADS": "1"}, 99)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that has two processes run a shell script, with 0 and 1 in CUDA_VISIBLE_DEVICES."""
    file = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(file))
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(processes, "POLL_S", 0.02)

    def run(script: str) -> str:
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        shown = StringIO()
        run_processes(["work"], folder=tmp_path, number=2, console=Console(file=shown, width=200))
        return shown.getvalue()

    return run


def test_finished_items_and_notes_are_shown_once_and_all_is_in_the_logs(program, tmp_path):
    item = '"[$CUDA_VISIBLE_DEVICES/2] b: train:'
    said = program(f'echo "a note"; echo {item} 3/4"; echo {item} done in 2 s"')
    assert sorted(said.splitlines()) == ["[0/2] b: train: done in 2 s", "[1/2] b: train: done in 2 s", "a note"]
    assert (tmp_path / "logs" / "process-1.log").read_text().splitlines() == [
        "a note",
        "[0/2] b: train: 3/4",
        "[0/2] b: train: done in 2 s",
    ]


def test_each_is_told_that_it_is_one_of_several(program, tmp_path):
    program('echo "$@"')
    assert (tmp_path / "logs" / "process-2.log").read_text() == "-m manyicl work --shared-by 1\n"


def test_the_others_go_on_without_a_process_that_died(program):
    said = program('[ $CUDA_VISIBLE_DEVICES = 1 ] && kill -9 $$; sleep 0.3; echo "[1/1] b: test: done in 1 s"')
    died, done = said.splitlines()
    assert died.startswith("process 2 died: code -9, see the end of ")
    assert died.endswith("/logs/process-2.log; the others do its work")
    assert done == "[1/1] b: test: done in 1 s"


def test_it_is_an_error_if_all_died(program):
    with pytest.raises(UserError, match=r"all 2 processes died, the last one with code 3, see the end of .*\.log$"):
        program("exit 3")


def test_a_users_error_ends_all_at_once_and_is_told_as_it_is(program):
    with pytest.raises(UserError, match=r"^tasks: no such folder$"):
        program('[ $CUDA_VISIBLE_DEVICES = 1 ] || exec sleep 60; echo "error: tasks: no such folder"; exit 2')


def test_an_earlier_log_is_kept_and_not_shown_again(program, tmp_path):
    program('echo "first"')
    assert program('echo "second"') == "second\n"
    assert (tmp_path / "logs" / "process-1.log").read_text() == "first\nsecond\n"
