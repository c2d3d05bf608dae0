"""A run that is stopped in the middle, and whether it ends as one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from manyicl.training.recipe import RunConfig
from manyicl.training.run import train
from tests.trajectory.setting import read_metrics, read_weights


class StoppedError(Exception):
    pass


class StopAfterThree(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise StoppedError


def assert_resumes(config: RunConfig, *, out: Path, whole: Path) -> None:
    """Stop a run after three steps, resume it, and compare metrics and weights with those of `whole`, to the bit."""
    with pytest.raises(StoppedError):
        train(config, out=out, callbacks=lambda _: (StopAfterThree(),))
    train(config, out=out, resume=True)
    assert read_metrics(out) == read_metrics(whole)
    ours, expected = read_weights(out), read_weights(whole)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
