"""One run, one writer (field trials 73, 74): the second is refused, and a dead holder's lock is free."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from manyicl.comparison.grid import open_comparison
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.locks import LOCK, claiming, new_folder, sole_writer
from manyicl.tasks.task import load_tasks
from manyicl.training.run import train
from tests.support.claims import other_process
from tests.support.comparison_setting import make_recipe, write_world
from tests.trajectory.setting import write_setting

HOLDER = """
import sys, time
from pathlib import Path
from manyicl.locks import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_with_the_process_that_is_at_work_and_the_folder_is_free_afterwards(tmp_path):
    run = tmp_path / "runs" / "one"
    with sole_writer(run):
        with pytest.raises(UserError) as refused, sole_writer(run):
            pass
        told = str(refused.value)
        assert re.fullmatch(
            rf"{run}: process {os.getpid()} on \S+ \(since 20\d\d-[\d :-]+\) is at work on it;"
            " wait until that ends, or stop it",
            told,
        )
    assert not (tmp_path / "runs").exists()  # nothing was written, so nothing is left
    with sole_writer(run):
        (run / "config.toml").touch()
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_a_new_folder_is_whole_or_absent_and_has_one_writer(tmp_path):
    """Exports, merges and worlds: of two at once one was left in a traceback; one that failed left its half."""
    out = tmp_path / "rows"

    def write(fault: BaseException | None) -> None:
        with new_folder(out) as partial:
            (partial / "1.txt").write_text("one")
            if fault is not None:
                raise fault

    for fault in (OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()):
        with pytest.raises(type(fault)):
            write(fault)
        assert not list(tmp_path.iterdir())
    with new_folder(out) as partial:
        (partial / "1.txt").write_text("one")
        with pytest.raises(UserError, match=rf"^{out}: process {os.getpid()} on .* is at work on it"):
            write(None)
    assert [path.name for path in tmp_path.rglob("*")] == ["rows", "1.txt"]
    with pytest.raises(UserError, match=rf"^{out}: exists already; name a new folder$"):
        write(None)


def test_what_a_killed_writer_left_of_a_new_folder_is_not_in_the_next_one(tmp_path):
    (tmp_path / ".rows.partial").mkdir()
    (tmp_path / ".rows.partial" / "old.txt").touch()
    with new_folder(tmp_path / "rows") as partial:
        (partial / "1.txt").write_text("one")
    assert [path.name for path in tmp_path.rglob("*")] == ["rows", "1.txt"]


def test_a_lock_whose_process_was_killed_is_taken_over(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on "), sole_writer(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).read_text().startswith(f"process {holder.pid} on ")
    with sole_writer(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_not_inherited_by_a_worker_that_outlives_its_process(tmp_path):
    with ExitStack() as stack:
        stack.enter_context(sole_writer(tmp_path))
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        stack.close()
        with sole_writer(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_process_is_told_who_holds_it(tmp_path):
    path = tmp_path / "claims" / "a.lock"
    with claiming(path) as holder:
        assert holder is None
        with other_process(path) as process:
            assert process.stdout.readline().startswith(f"process {os.getpid()} on {platform.node()} (since 20")
    assert not path.exists()
    with claiming(path) as holder:
        assert holder is None


def test_the_claim_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "a.lock"
    with other_process(path) as process:
        assert process.stdout.readline().strip() == "None"
        with claiming(path) as holder:
            assert holder.startswith(f"process {process.pid} on {platform.node()} (since 20")
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


def test_training_and_going_on_are_refused_before_a_task_is_read_while_another_process_trains(tmp_path):
    config = write_setting(tmp_path, num_steps=1)
    run = tmp_path / "run"
    nothing = config.model_copy(update={"tasks": config.tasks.model_copy(update={"folder": str(tmp_path / "none")})})
    with sole_writer(run), pytest.raises(UserError, match=f"^{run}: process {os.getpid()} on"):
        train(nothing, out=run)
    (run).mkdir()
    (run / "config.toml").write_text((tmp_path / "recipe.toml").read_text())
    with sole_writer(run), pytest.raises(UserError, match=f"^{run}: process {os.getpid()} on"):
        train(nothing, out=run, resume=True)


def test_a_training_that_fails_before_it_begins_leaves_no_folder(tmp_path):
    config = write_setting(tmp_path, num_steps=1)
    nothing = config.model_copy(update={"tasks": config.tasks.model_copy(update={"folder": str(tmp_path / "none")})})
    with pytest.raises(UserError, match="no such folder"):
        train(nothing, out=tmp_path / "runs" / "run")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_evaluation_of_a_result_that_another_process_writes_is_refused(tmp_path):
    config = write_setting(tmp_path)
    tasks = load_tasks(config.tasks.folder, names=["animals"])
    out = tmp_path / "r.json"
    with sole_writer(out, is_file=True), pytest.raises(UserError, match=f"^{out}: process {os.getpid()} on"):
        evaluate(config.model.path, tasks, shots=(0,), draws=1, queries=2, out=out)
    evaluate(config.model.path, tasks, shots=(0,), draws=1, queries=2, out=out)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tasks", "start", "recipe.toml", "r.json", "r.predictions.parquet"}


def test_two_processes_do_not_start_a_comparison_in_one_folder(tmp_path):
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["base"], flips=False, orders=False, text_files=[])
    out = tmp_path / "out"
    with sole_writer(out), pytest.raises(UserError, match=f"^{out}: process {os.getpid()} on"):
        open_comparison(out, config)
    assert not out.exists()
    assert open_comparison(out, config).work()
    assert sorted(path.name for path in out.iterdir()) == ["inputs.json", "recipe.toml"]
