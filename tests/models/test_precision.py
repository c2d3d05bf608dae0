"""precision = "auto": bf16 only if the device multiplies it in hardware, and a run keeps what it began with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from manyicl.models.loading import ModelSettings, load_model
from manyicl.models.precision import (
    find_slow_precision,
    has_bf16_units,
    limit_kernel_caches,
    multiplies_bf16,
    resolve_precision,
)
from manyicl.training.recipe import load_recipe
from manyicl.training.run import train
from tests.trajectory.setting import write_setting


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),  # AMD EPYC of 2019: 10 times slower in bf16
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),  # AMD Zen 4
        ({"avx512_bf16": True, "amx_bf16": True}, True),  # Intel Sapphire Rapids
        ({"sve": True, "bf16": True}, True),  # Arm Neoverse V1
        ({}, False),
    ],
)
def test_a_cpu_has_bf16_units_if_torch_says_so(capabilities, expected):
    assert has_bf16_units(capabilities) is expected


def test_auto_is_what_the_device_is_fast_in_and_a_choice_stays():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", device=cpu) == ("bf16" if multiplies_bf16(cpu) else "fp32")
    assert resolve_precision("bf16", device=cpu) == "bf16"
    assert resolve_precision("auto", device=torch.device("meta")) == "fp32"
    loaded = load_model(ModelSettings(path="seed"))
    assert loaded.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[resolve_precision("auto")]


SLOW = "precision bf16: this CPU has no units for it, and emulates it up to ten times slower; choose fp32, or auto"


def test_a_cpu_that_emulates_bf16_is_told_when_a_model_is_loaded_in_it(monkeypatch, recwarn):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert find_slow_precision("bf16", device=torch.device("cuda")) is None
    for choice in ("fp32", "auto"):
        load_model(ModelSettings(path="seed", precision=choice))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"^{SLOW}$"):
        load_model(ModelSettings(path="seed", precision="bf16"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert find_slow_precision("bf16", device=cpu) is None


@pytest.mark.slow
def test_a_run_writes_the_resolved_precision_and_goes_on_in_it(tmp_path):
    config = write_setting(tmp_path, num_steps=2)
    auto = config.model_copy(update={"model": config.model.model_copy(update={"precision": "auto"})})
    train(auto, out=tmp_path / "run")
    kept = tmp_path / "run" / "config.toml"
    here = resolve_precision("auto")
    assert load_recipe(kept).model.precision == here
    # As if it had been started on a machine of the other kind: "auto" means the run's own precision then.
    other = {"bf16": "fp32", "fp32": "bf16"}[here]
    kept.write_text(kept.read_text().replace(f'precision = "{here}"', f'precision = "{other}"'))
    train(auto, out=tmp_path / "run", resume=True)
    assert load_recipe(kept).model.precision == other


# Prints by how many MB the process has grown after forward passes of 300 lengths.
_GROW = """
import os, torch
from manyicl.models.loading import ModelSettings, load_model

def memory():
    with open("/proc/self/status") as file:
        return int(file.read().partition("VmRSS:")[2].split()[0]) / 1024

model = load_model(ModelSettings(path="seed", precision="bf16"))
with torch.inference_mode():
    model(input_ids=torch.ones(1, 700, dtype=torch.long), logits_to_keep=1)
    before = memory()
    for length in range(1, 301):
        model(input_ids=torch.ones(1, length, dtype=torch.long), logits_to_keep=1)
print(memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not multiplies_bf16(torch.device("cpu")), reason="needs a CPU with bfloat16 units")
def test_memory_does_not_grow_with_every_length_of_row():
    done = subprocess.run([sys.executable, "-c", _GROW], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150  # 600 without a limit


def test_a_limit_of_the_environment_stays(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    limit_kernel_caches()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "64")
