"""Trackers through the Trainer: what they keep is what metrics.jsonl holds, and a run without them needs none."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.training.arguments import check_trackers
from manyicl.training.run import train
from tests.trajectory.setting import write_setting


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_tensorboard_has_the_figures_of_the_metrics_file(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(write_setting(tmp_path, num_steps=2, report_to=["tensorboard"]), out=tmp_path / "run")
    (file,) = run.folder.rglob("events.out.tfevents.*")
    read = events.EventAccumulator(str(file)).Reload()
    for key, name in (("loss", "train/loss"), ("loss_by_shot/0", "train/loss_by_shot/0"), ("eval_loss", "eval/loss")):
        wanted = [(one["step"], pytest.approx(one[key], rel=1e-6)) for one in read_metrics(run.folder) if key in one]
        assert len(wanted) >= 1
        assert [(scalar.step, scalar.value) for scalar in read.Scalars(name)] == wanted


# In a process of its own, because these packages warn, and keep threads and global state.
TRAIN = """
import sys
from pathlib import Path
from manyicl.training.run import train
from tests.trajectory.setting import write_setting
folder = Path(sys.argv[1])
train(write_setting(folder, num_steps=2, report_to=[sys.argv[2]]), out=folder / "run")
"""


def train_with(tracker: str, folder: Path, **environment: str) -> list[dict[str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder), tracker],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [one for one in read_metrics(folder / "run") if "loss" in one]


@pytest.mark.slow
def test_wandb_offline_keeps_the_run_on_this_machine(tmp_path):
    pytest.importorskip("wandb")
    logged = train_with("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    found, content, place = [], file.read_bytes(), 7
    assert len(content) < 32_768  # one block of LevelDB's log format: checksum, length and type before each record
    while place < len(content):
        start, size = place + 7, int.from_bytes(content[place + 4 : place + 6], "little")
        record = Record.FromString(content[start : start + size])
        found.append({(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item})
        place = start + size
    losses = [float(one["train/loss"]) for one in found if "train/loss" in one]
    assert losses == pytest.approx([one["loss"] for one in logged])


@pytest.mark.slow
def test_trackio_keeps_the_run_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    logged = train_with("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "kept"))

    (file,) = (tmp_path / "kept").glob("manyicl*.db")
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics order by step").fetchall()
    losses = [one["train/loss"] for one in (json.loads(metrics) for _, _, metrics in rows) if "train/loss" in one]
    assert losses == pytest.approx([one["loss"] for one in logged])
    assert {name for name, _, _ in rows} == {"run"}


def test_a_tracker_that_is_not_there_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(UserError, match=r"^train\.report_to: wandb is not installed; pip install wandb$"):
        check_trackers(["wandb"])
    with pytest.raises(UserError, match=r"^train\.report_to: no tracker 'wandbb'; did you mean 'wandb'\?$"):
        check_trackers(["wandbb"])
    check_trackers([])
