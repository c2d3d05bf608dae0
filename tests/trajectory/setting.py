"""A tiny recipe on disk that the trajectory tests train, in this process or in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from safetensors.torch import load_file

from manyicl.cli import app
from manyicl.training.recipe import RunConfig, dump_config, make_config
from tests.conftest import make_task, tiny_model, train_tokenizer
from tests.support.forked import ROOT, launch_forked, run_forked

# Times differ from run to run; everything else in metrics.jsonl must not.
TIMED = ("tokens_per_s", "answers_per_s", "model_flops_per_s", "mfu")


def write_tasks(folder: Path) -> None:
    """Write three small tasks under `folder`/tasks."""
    for name, answer in (("animals", "animal"), ("colours", "colour"), ("beasts", "animal")):
        task = make_task(name, answer=answer)
        rows = [
            {"input": f"{name} {e.input}", "answer": e.answer, "split": split}
            for split in ("train", "validation", "test")
            for e in getattr(task, split)
        ]
        path = folder / "tasks" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        about = {"family": "classification", "instruction": task.instruction, "labels": list(task.labels)}
        path.with_suffix(".task.json").write_text(json.dumps(about))


def write_setting(folder: Path, *, lora: bool = False, family: str = "llama", **train: object) -> RunConfig:
    """Write tasks, model and tokenizer under `folder` and return the recipe (also written to recipe.toml)."""
    write_tasks(folder)
    tiny_model(family).save_pretrained(folder / "start")
    train_tokenizer("bpe").save_pretrained(folder / "start")
    values = {
        "seed": 3,
        "tasks": {"folder": str(folder / "tasks")},
        "model": {"path": str(folder / "start"), "precision": "fp32"},
        "episodes": {"token_budget": 160},
        "train": {
            "num_steps": 6,
            "packs_per_step": 8,
            "packs_per_batch": 2,
            "learning_rate": 1e-2,
            "log_every_steps": 1,
            "checkpoint_every_steps": 2,
            "validation_tokens": 300,
            "keep": "last",
            **train,
        },
        "held_out": {"episodes": 2},
    }
    if lora:
        values["model"] |= {"lora": {"rank": 4, "alpha": 8}}
    config = make_config(values, source="test")
    (folder / "recipe.toml").write_text(dump_config(config))
    return config


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the records of a run without its timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's model."""
    return {k: v for file in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(file).items()}


def python_process(script: list[str]) -> dict[str, Any]:
    """Return what `subprocess` takes to run Python on `script` from the repository's root, with one thread."""
    paths = os.pathsep.join([f"{ROOT}/src", str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {"args": [sys.executable, *script], "cwd": ROOT, "env": environment, **pipes}


def start_process(script: list[str], *, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python on `script`, under a launcher if one is named, and return it when it ends."""
    process = python_process([*launcher, *script])
    if launcher:
        return subprocess.run(**process, timeout=300, check=False)
    return run_forked((script, process["env"]))


def start_ranks(script: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python on `script` in two processes of one launch, and return them as one when they end."""
    return launch_forked(script, python_process(script)["env"], ranks=2)


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line of manyicl in this process, which saves the seconds that a new one imports torch for."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["manyicl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            app.main()
    return subprocess.CompletedProcess(arguments, int(exited.value.code or 0), out.getvalue(), err.getvalue())


def end_process() -> Never:
    """End this process of a launch, all well, without the interpreter's own end.

    FSDP2's caches hold the group, so gloo's threads live on until then, and one that still holds a tensor would abort
    the process (pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
