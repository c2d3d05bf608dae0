"""Where a run comes from: the versions, the commit and the device of the process that trains."""

from __future__ import annotations

import importlib.metadata
import subprocess

import torch

PACKAGES = ("manyicl", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what training and answering find."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Return the commit of the folder that the caller stands in, '+' if it has changes; None outside git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def device_name() -> str:
    """Return the name of the GPU that torch would take, or how many threads it has on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
