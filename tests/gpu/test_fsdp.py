"""FSDP2 by `accelerate launch` on two GPUs: the run of one GPU, whole checkpoints, a model that anybody loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manyicl.models import ModelSettings, load_model
from tests.trajectory.setting import ROOT, TIMED, read_weights, write_setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FSDP2 = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
# What a machine measures of itself is not the run's course.
OWN = (*TIMED, "model_flops_per_s", "mfu")


def launch(*arguments: str, devices: str) -> None:
    """Train in processes of their own, one a device; `devices` as in CUDA_VISIBLE_DEVICES."""
    num_devices = len(devices.split(","))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", str(num_devices)]
    paths = os.pathsep.join([f"{ROOT}/src", str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, *(launcher if num_devices > 1 else ()), "-m", "manyicl", "train", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]


def course(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in OWN} for record in records]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_gpus_under_fsdp2_do_the_run_of_one_and_go_on_from_a_checkpoint(tmp_path, lora):
    write_setting(tmp_path, lora=lora)
    recipe = str(tmp_path / "recipe.toml")
    one, two = tmp_path / "one", tmp_path / "two"
    launch(recipe, "--out", str(one), devices="0")
    launch(recipe, "--out", str(two), devices="0,1")
    for record, expected in zip(course(two), course(one), strict=True):
        assert record == pytest.approx(expected, rel=2e-3)
    weights, expected_weights = read_weights(two), read_weights(one)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert tensor.shape == expected_weights[name].shape, name
        assert (tensor - expected_weights[name]).norm() <= 1e-2 * expected_weights[name].norm(), name
    load_model(ModelSettings(path=str(two), precision="fp32"))
    # As if killed after the fourth step: what is left is a whole checkpoint, and the end is the same.
    ended = course(two)
    shutil.rmtree(two / "model")
    shutil.copytree(two / "checkpoints", tmp_path / "kept")
    shutil.rmtree(two / "checkpoints" / "checkpoint-6")
    if not (two / "checkpoints" / "checkpoint-4").exists():
        pytest.skip("only the last checkpoint was kept; the best one was the last")
    launch("--resume", str(two), devices="0,1")
    assert course(two)[-1] == pytest.approx(ended[-1], rel=1e-4)
    again = read_weights(two)
    assert all((again[name] - tensor).norm() <= 1e-3 * tensor.norm() for name, tensor in weights.items())
