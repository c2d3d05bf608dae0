"""What the packaged adapter gains over its base: the command runs, prints its table and keeps both results."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

import manyicl

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_gain_of_the_packaged_adapter(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MANYICL_BASES", str(smollm2.parent))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    manyicl.write_world(tmp_path / "tasks", num_tasks=1, num_train=24, num_test=4)
    (name,) = (file.name.removesuffix(".task.json") for file in (tmp_path / "tasks").glob("*.task.json"))
    options = [
        "--tasks",
        str(tmp_path / "tasks"),
        "--task",
        name,
        "--max-tokens",
        "512",
        "--queries",
        "2",
        "--draws",
        "2",
        "--shots",
        "0,4,fill",
    ]
    monkeypatch.setattr(sys, "argv", ["adapter_gain.py", str(tmp_path / "out"), *options])

    import_module("adapter_gain").main()
    first = capsys.readouterr().out.splitlines()
    assert first[:2] == ["| shots | base, % | smollm2-many, % | gained, points |", "|---|---|---|---|"]
    assert [line.split(" | ")[0] for line in first[2:5]] == ["| 0", "| 4", "| fill"]
    assert {file.name for file in (tmp_path / "out").glob("*.json")} == {"base.json", "smollm2-many.json"}
