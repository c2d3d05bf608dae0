"""DDP and FSDP2 by `accelerate launch` on two GPUs: the run of one, whole checkpoints, a model that anybody loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manyicl.models.loading import ModelSettings, load_model
from manyicl.training.run_folder import RunFolder
from tests.trajectory.setting import ROOT, TIMED, read_weights, write_setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
KILLED = str(ROOT / "tests" / "trajectory" / "killed.py")
LAUNCHES = ROOT / "recipes" / "accelerate"
# What a machine measures of itself is not the run's course.
OWN = (*TIMED, "model_flops_per_s", "mfu")


def launch(*script: str, devices: str, how: str = "fsdp2") -> subprocess.CompletedProcess[str]:
    """Run Python on `script` in processes of their own, one a device; `devices` as in CUDA_VISIBLE_DEVICES."""
    num_devices = len(devices.split(","))
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"{LAUNCHES}/{how}.yaml",
        "--num_processes",
        str(num_devices),
    ]
    paths = os.pathsep.join([f"{ROOT}/src", str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *(launcher if num_devices > 1 else ()), *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def train_on(devices: str, *arguments: str, how: str = "fsdp2") -> None:
    process = launch("-m", "manyicl", "train", *arguments, devices=devices, how=how)
    assert process.returncode == 0, process.stderr[-5000:]


def course(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in OWN} for record in records]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_gpus_under_fsdp2_do_the_run_of_one_and_go_on_from_a_checkpoint(tmp_path, lora):
    write_setting(tmp_path, lora=lora)
    recipe = str(tmp_path / "recipe.toml")
    one, two = tmp_path / "one", tmp_path / "two"
    train_on("0", recipe, "--out", str(one))
    train_on("0,1", recipe, "--out", str(two))
    for record, expected in zip(course(two), course(one), strict=True):
        assert record == pytest.approx(expected, rel=2e-3)
    weights, expected_weights = read_weights(two), read_weights(one)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert tensor.shape == expected_weights[name].shape, name
        assert (tensor - expected_weights[name]).norm() <= 1e-2 * expected_weights[name].norm(), name
    load_model(ModelSettings(path=str(two), precision="fp32"))

    # Two micro-batches a step and rank, a checkpoint every two steps: killed in step 6, it goes on behind step 4.
    killed = tmp_path / "killed"
    assert launch(KILLED, str(killed), recipe, "batch", "11", devices="0,1").returncode != 0
    assert [step for step, _ in RunFolder(killed).checkpoints.all()][-1] == 4
    train_on("0,1", "--resume", str(killed))
    for record, expected in zip(course(killed), course(two), strict=True):
        assert record == pytest.approx(expected, rel=2e-3)
    for name, tensor in read_weights(killed).items():
        assert (tensor - weights[name]).norm() <= 1e-2 * weights[name].norm(), name


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_gpus_with_compiled_layers_do_the_run_of_one_with_plain_ones(tmp_path, how):
    write_setting(tmp_path, lora=True)
    one, two = tmp_path / "one", tmp_path / "two"
    train_on("0", str(tmp_path / "recipe.toml"), "--out", str(one))
    train_on("0,1", str(tmp_path / "recipe.toml"), "train.compile=true", "--out", str(two), how=how)
    for record, expected in zip(course(two), course(one), strict=True):
        assert record == pytest.approx(expected, rel=2e-3)
    weights, expected_weights = read_weights(two), read_weights(one)
    for name, tensor in weights.items():
        assert (tensor - expected_weights[name]).norm() <= 1e-2 * expected_weights[name].norm(), name
