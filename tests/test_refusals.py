"""What the system refuses is one line and exit code 2, and says what was kept (field trials 75 to 77, 81, 84)."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from manyicl import files
from manyicl.cli import app
from manyicl.errors import UserError, find_refusal
from manyicl.training import run as runs
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder, refuse_damaged
from tests.cli.test_app import refusal, run_manyicl
from tests.support.forked import run_forked
from tests.trajectory.setting import python_process, write_setting

FULL = Path("/dev/full")  # every write to it finds the disk full
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left", "r.json"), "r.json: the disk is full; free some space"),
        (OSError(errno.EROFS, "Read-only", "x"), "x: the file system is read-only; name a folder that can be written"),
        (OSError(errno.EROFS, "", "runs/.r.json.4711-0a1b2c3d.partial"), "runs/r.json: the file system is read-only"),
        (OSError(errno.EROFS, "", "runs/.rows.lock"), "runs/rows: the file system is read-only"),
        (OSError(errno.EROFS, "", "runs/one/.lock"), "runs/one: the file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: permission is denied; "),
        (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is full"),
        (
            OSError(errno.EFBIG, "File too large", "x"),
            "x: the file is larger than a limit",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "no temporary file can be ",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "x"), "x: a file stands in its way; name another place"),
        (OSError(errno.ELOOP, "Too many levels", "runs/one/.lock"), "runs/one: is a link that cannot be followed"),
        (MemoryError(), "this computer is out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the GPU is out of memory; free it"),
    ],
)
def test_a_refusal_of_the_system_is_told_with_its_path_and_what_to_do(error, told):
    assert find_refusal(error).startswith(told)
    later = ValueError("while cleaning up")
    later.__context__ = error
    assert find_refusal(later).startswith(told)


def test_a_path_below_the_home_of_nobody_is_one_line(capfd, tmp_path):
    told = refusal(capfd, "merge", "~nobody-4711/run", "--out", tmp_path / "merged")
    assert told == "a path begins with ~ and names no user of this computer; write the whole path"


def test_a_user_without_a_home_folder_is_not_told_of_a_path_that_nobody_wrote(monkeypatch):
    error = RuntimeError("Could not determine home directory.")
    assert find_refusal(error) == "a path begins with ~ and names no user of this computer; write the whole path"
    monkeypatch.delenv("HOME")
    assert find_refusal(error) == "no home folder is known for this user; set HOME"


@pytest.mark.parametrize("arguments", [("world", "w"), ("demo", "--quick"), ("eval", "seed", "--tasks", "t")])
def test_a_folder_that_was_removed_under_the_command_is_one_line(tmp_path, monkeypatch, capfd, arguments):
    """Another terminal, or a branch that was changed, had removed it: a traceback, if anything was to be written."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    more = ("--out", "r.json") if arguments[0] == "eval" else ()
    told = refusal(capfd, *arguments, *more)
    assert told.startswith("the folder that this was called in has been removed; go to another, or to a new one of")


def test_a_bug_of_ours_is_not_taken_for_a_refusal():
    for error in (KeyError(28), FileNotFoundError(errno.ENOENT, "No such file", "x"), RuntimeError("shape 28")):
        assert find_refusal(error) is None


@pytest.mark.slow
@needs_full
def test_a_full_disk_is_one_line_that_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capfd):
    config = write_setting(tmp_path, num_steps=4)
    run = tmp_path / "run"
    original = runs.save_beside_weights

    def write_to_full_disk(*arguments, **options):
        with FULL.open("wb", buffering=0) as file:
            file.write(b"weights")

    monkeypatch.setattr(runs, "save_beside_weights", write_to_full_disk)
    code, _, err = run_manyicl(capfd, "train", tmp_path / "recipe.toml", "--out", run)
    command = f"manyicl train --resume {run}"
    told = f"error: the disk is full; free some space; what was saved is kept; resume with: {command}"
    assert (code, err.splitlines()[-1]) == (2, told)
    monkeypatch.setattr(runs, "save_beside_weights", original)
    assert [step for step, _ in RunFolder(run).checkpoints.all()][-1] == config.train.num_steps
    code, out, _ = run_manyicl(capfd, *command.split()[1:])
    assert (code, f"model: {run / 'model'}" in out) == (0, True)


def test_a_folder_that_may_not_be_written_is_told_before_tasks_are_read(tmp_path, monkeypatch, capfd):
    write_setting(tmp_path)

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    told = refusal(capfd, "train", tmp_path / "recipe.toml", "tasks.folder=/none", "--out", tmp_path / "run")
    assert told.startswith(f"{tmp_path / 'run'}: the file system is read-only; name a folder that can be written")
    assert told.endswith("nothing is kept")
    told = refusal(capfd, "world", tmp_path / "w", "--tasks", 1)
    assert "the file system is read-only" in told


def test_a_curve_whose_result_cannot_be_written_is_shown_all_the_same(tmp_path, monkeypatch, capfd):
    config = write_setting(tmp_path)

    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("manyicl.evaluation.results.write_atomically", refuse)
    arguments = ("curve", tmp_path / "start", "--tasks", config.tasks.folder, "--task", "animals", "--episodes", 1)
    code, out, err = run_manyicl(capfd, *arguments, "--out", tmp_path / "c.json")
    assert code == 2
    assert "animals" in out
    assert err.splitlines()[-1] == f"error: {tmp_path / 'c.json'}: the disk is full; free some space"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train_settings", "step"),
    [
        ("model.safetensors", {}, 3),
        ("optimizer.pt", {}, 3),
        ("trainer_state.json", {}, 3),
        ("trainer_state.json", {"early_stopping_patience": 9, "keep": "best"}, 3),
        ("trainer_state.json", {}, 4),  # all steps are trained, and the model is still to be written
    ],
)
def test_a_damaged_checkpoint_is_named_with_how_to_go_on_without_it(tmp_path, name, train_settings, step):
    config = write_setting(tmp_path, num_steps=4, **train_settings)
    run = tmp_path / "run"
    train(config, out=run)
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"finished": False}))
    (run / "model").rename(tmp_path / "model")
    _, checkpoint = RunFolder(run).checkpoints.all()[-1]
    checkpoint = checkpoint.rename(checkpoint.with_name(f"checkpoint-{step}"))  # 3: as if it had not come to the end
    damaged = checkpoint / name
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(
        UserError, match=rf"^{damaged}: is damaged .*; remove {checkpoint} and go on from the checkpoint"
    ):
        train(config, out=run, resume=True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_without_one_of_its_files_is_refused(tmp_path, name):
    """Without the optimizer or the schedule a run was resumed to another model than its own, and nothing said so."""
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, checkpoint / "model.safetensors")
    for other in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": 1}, checkpoint / other)
    (checkpoint / "trainer_state.json").write_text("{}")
    refuse_damaged(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=rf"^{checkpoint}/\S+: is damaged \(no such file\); remove {checkpoint} and "):
        refuse_damaged(checkpoint)


def test_an_output_that_is_not_utf_8_gets_escapes_and_no_traceback(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["manyicl", "ask", "漢"])
    app._open_streams()
    print("café 漢")
    sys.stdout.flush()
    assert written.getvalue() == b"caf\xe9 \\u6f22" + os.linesep.encode()


@pytest.mark.slow
def test_closed_input_is_one_line_and_closed_output_is_none(tmp_path):
    config = write_setting(tmp_path)
    arguments = ["-m", "manyicl", "ask", config.model.path, "--tasks", config.tasks.folder, "--task", "animals"]
    environment = {key: value for key, value in python_process(arguments).items() if key != "args"}
    ask = " ".join([sys.executable, *arguments])
    ended = subprocess.run(["sh", "-c", f"{ask} <&-"], **environment, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: standard input: is closed; give a file, or pipe one input per line\n"
    check = f"{sys.executable} -m manyicl check {config.tasks.folder}"
    ended = subprocess.run(["sh", "-c", f"{check} >&-"], **environment, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@needs_full
def test_a_full_standard_error_leaves_the_output_and_the_exit_code_as_they_are(tmp_path):
    """Beyond the list of field trials: it was exit code 1, for a traceback that nobody could see."""
    (tmp_path / "desk.csv").write_text("input,answer\n" + "the bell rings,yes\nno bell,no\n" * 3)
    check = [sys.executable, "-m", "manyicl", "check", tmp_path]
    with FULL.open("w") as full:
        environment = python_process([])["env"]
        ended = subprocess.run(check, stdout=subprocess.PIPE, stderr=full, env=environment, text=True, check=False)
        assert (ended.returncode, "desk" in ended.stdout) == (1, True)
        ended = subprocess.run([*check, "--no-such-option"], stderr=full, env=environment, check=False)
        assert ended.returncode == 2


@pytest.mark.slow
@needs_full
def test_what_takes_long_goes_on_when_standard_error_is_full(tmp_path):
    """A traceback ended `eval`, `curve`, `ask` and `train` when they first told their progress."""
    config = write_setting(tmp_path, num_steps=1)
    environment = python_process([])["env"]
    asking = ["--tasks", config.tasks.folder, "--task", "animals"]
    queries = tmp_path / "queries.txt"
    queries.write_text("a fox\n")
    for arguments, told in (
        (["train", tmp_path / "recipe.toml", "--out", tmp_path / "run"], f"model: {tmp_path / 'run' / 'model'}"),
        (["eval", tmp_path / "start", *asking, "--shots", "0", "--draws", "1", "--queries", "2"], "animals"),
        (["curve", tmp_path / "start", *asking, "--episodes", "1"], "animals"),
        (["ask", tmp_path / "start", queries, *asking, "--json"], '"input": "a fox"'),
    ):
        ended = run_forked((["-m", "manyicl", *map(str, arguments)], environment), err="/dev/full")
        assert (ended.returncode, told in ended.stdout) == (0, True), arguments[0]


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "r.json"
    files.write_atomically(path, "old")

    def fail() -> None:
        with files.writing_atomically(path) as partial:
            partial.write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device", str(partial))

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
