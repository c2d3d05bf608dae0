"""What lies in the folder of a run, and what may change when it is resumed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manyicl.episodes import Frame
from manyicl.errors import UserError
from manyicl.models import fingerprint_weights, locate_model
from manyicl.training.held_out import (
    HeldOutRow,
)
from manyicl.training.preparation import Prepared, count_dropped, count_plan, hash_plan
from manyicl.training.recipe import RunConfig, load_recipe

PACKAGES = ("manyicl", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy")
RUN_SCHEMA = 1
# Settings of train.* that decide a run's time and memory, not its course (but for what dropout draws in batches of
# other packs): they may be others when it is resumed.
CHANGEABLE = ("checkpointed_layers", "compile", "num_workers", "packs_per_batch")
# Settings that say where things lie. They may change too, if the same tasks and weights lie in the new place.
MOVABLE = ("tasks.folder", "model.path")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    model: the folder to load or ask. held_out: the closing table, empty where none was asked for, and on all ranks
    but the main process, which alone writes and prints.
    """

    folder: Path
    model: Path
    held_out: tuple[HeldOutRow, ...]
    is_main_process: bool = True


def find_changes(before: RunConfig, now: RunConfig) -> dict[str, Any]:
    """Return the settings in which two recipes differ, such as 'train.num_steps', as they are now."""

    def settings(config: RunConfig) -> dict[str, Any]:
        content = config.model_dump()
        flat = {key: value for key, value in content.items() if not isinstance(value, dict)}
        tables = [(section, table) for section, table in content.items() if isinstance(table, dict)]
        return flat | {f"{section}.{key}": value for section, table in tables for key, value in table.items()}

    old, new = settings(before), settings(now)
    return {key: value for key, value in new.items() if value != old[key]}


def read_run_config(folder: Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the resolved config of a run, with `key=value` overrides applied.

    Raises:
        UserError: `folder` is not a run, or an override has no such key or value.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise UserError(f"{folder}: is not a run (no config.toml); name the folder of a run")
    return load_recipe(path, overrides=overrides)


def read_frame(folder: Path) -> Frame | None:
    """Return the text around examples that a run in the chat style was started with; None if it keeps none."""
    kept = read_json(folder / "run.json").get("frame")
    return Frame(**kept) if kept else None


def is_finished(folder: Path) -> bool:
    """Return whether there is a run in `folder` that has its model and its closing table."""
    state = folder / "run.json"
    return state.is_file() and bool(read_json(state)["finished"])


def describe_run(prepared: Prepared) -> dict[str, Any]:
    """Return what run.json says from the start: versions, commit, hashes, and the plan's counts."""
    config = prepared.config
    return {
        "schema": RUN_SCHEMA,
        "finished": False,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "model": locate_model(config.model.path),
        "weights": fingerprint_weights(locate_model(config.model.path)),
        **({"frame": asdict(prepared.frame)} if config.template.style == "chat" else {}),
        "tasks": {
            name: {"sha256": t.task.sha256, "dropped": count_dropped(t, config)} for name, t in prepared.tasks.items()
        },
        "plan": {**count_plan(prepared.packs, pack_tokens=config.pack_tokens), "sha256": hash_plan(prepared.packs)},
    }


def git_commit() -> str | None:
    """Return the commit of the folder that the caller stands in, '+' where it has changes; None outside git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def to_json(content: Any) -> str:
    """Return JSON as the files of a run have it: indented, with a line end."""
    return json.dumps(content, indent=1) + "\n"
