"""Optimizers, schedules and early stopping by the Trainer's names: resumable, predicted, refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from manyicl.comparison.settings import CompareConfig
from manyicl.errors import UserError
from manyicl.models.costs import count_weights
from manyicl.models.loading import ModelSettings, load_config
from manyicl.training.memory.footprint import Row, count_states
from manyicl.training.memory.optimizers import OPTIMIZERS
from manyicl.training.recipe import RunConfig, make_config
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.trajectory.setting import read_metrics, read_weights, write_setting

pytestmark = pytest.mark.slow
# What each optimizer keeps of a weight, under its own names.
STATES = ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "state1", "state2", "absmax1", "absmax2")


def write_recipe(folder: Path, **train_settings: Any) -> RunConfig:
    """Return a recipe of the packaged seed model, whose matrices are large enough for 8 bits."""
    few = {"num_steps": 4, "packs_per_step": 1, "packs_per_batch": 1, "learning_rate": 1e-3}
    values = write_setting(folder, **{**few, **train_settings}).model_dump()
    values["model"]["path"] = "seed"
    values["held_out"]["episodes"] = 0
    return make_config(values, source="test")


class Stopping(TrainerCallback):
    """Ends the process before a step, as Ctrl-C does, and notes what the optimizer keeps."""

    def __init__(self, before_step: int | None = None) -> None:
        self.before_step = before_step
        self.kept_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.before_step is not None and state.global_step + 1 == self.before_step:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        tensors = [kept[name] for kept in optimizer.state.values() for name in STATES if name in kept]
        self.kept_bytes = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def run(config: RunConfig, out: Path, *, stop_before: int | None = None, resume: bool = False) -> Stopping:
    callback = Stopping(stop_before)
    with warnings.catch_warnings():
        # bitsandbytes says that it pages nothing on a CPU, which is so.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        train(config, out=out, resume=resume, callbacks=lambda _: [callback])
    return callback


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_a_run_goes_on_with_every_optimizer_as_if_it_had_never_stopped_and_takes_what_plan_says(tmp_path, optim):
    if OPTIMIZERS[optim].needs_bitsandbytes and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    config = write_recipe(tmp_path, optim=optim)
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", stop_before=4)
    run(config, tmp_path / "stopped", resume=True)
    one, other = (read_weights(tmp_path / name) for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "stopped")

    weights = count_weights(load_config(ModelSettings(path="seed")), lora=None)
    predicted = count_states(weights, lora=None, row=Row(64, 8, "fp32", optim=optim))["optimizer_bytes"]
    if optim == "adafactor":
        assert 0 < whole.kept_bytes < predicted
    else:
        assert whole.kept_bytes == pytest.approx(predicted, rel=0.02)


def test_optimizers_are_not_one_and_the_same(tmp_path):
    names = ("adamw_torch_fused", "adamw_torch", "adafactor")
    for optim in names:
        run(write_recipe(tmp_path / optim, optim=optim), tmp_path / optim / "run")
    last = {optim: read_metrics(tmp_path / optim / "run")[-1]["eval_loss"] for optim in names}
    assert last["adamw_torch"] == pytest.approx(last["adamw_torch_fused"], rel=1e-4)
    assert abs(last["adafactor"] - last["adamw_torch"]) > 1e-3


# The learning rate of each of ten steps, as a fraction of the peak.
RATES = {
    "linear": [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "constant": [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1],
    # The last four of ten steps fall by half a cosine.
    "warmup_stable_decay": [0, 0.5, 1, 1, 1, 1, 1, 0.854, 0.5, 0.146],
    "inverse_sqrt": [0, 0.5, 1, *((2 / step) ** 0.5 for step in range(3, 10))],
}


@pytest.mark.parametrize("schedule", sorted(RATES))
def test_the_learning_rate_follows_the_schedule(tmp_path, schedule):
    settings = {"schedule": schedule, "num_steps": 10, "warmup_steps": 2, "validation_tokens": 0}
    settings |= {"decay_share": 0.4} if schedule == "warmup_stable_decay" else {}
    run(write_recipe(tmp_path, **settings), tmp_path / "run")
    rates = [record["learning_rate"] / 1e-3 for record in read_metrics(tmp_path / "run") if "learning_rate" in record]
    assert rates == pytest.approx(RATES[schedule], abs=2e-3)


OVERFITTING = {
    "num_steps": 60, "learning_rate": 2e-2, "checkpoint_every_steps": 1, "keep": "best", "early_stopping_patience": 3,
    "schedule": "constant", "validation_tokens": 600,
}  # fmt: skip


def test_a_run_that_overfits_stops_early_and_keeps_its_best_checkpoint(tmp_path):
    config = write_recipe(tmp_path, **OVERFITTING)
    run(config, tmp_path / "whole")
    losses = [record["eval_loss"] for record in read_metrics(tmp_path / "whole") if "eval_loss" in record]
    best = losses.index(min(losses)) + 1
    state = RunFolder(tmp_path / "whole").read_state()
    assert len(losses) == state.stopped_step == best + 3 < 60
    assert state.model_step == best

    # A run that is stopped while it counts goes on counting.
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", stop_before=best + 3)
    run(config, tmp_path / "stopped", resume=True)
    assert RunFolder(tmp_path / "stopped").read_state().stopped_step == best + 3
    one, other = (read_weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    # One that was killed after its end, before its model was written, trains no further.
    folder = RunFolder(tmp_path / "whole")
    shutil.rmtree(folder.model)
    content = json.loads(folder.state_file.read_text())
    folder.state_file.write_text(json.dumps({**content, "finished": False}))
    run(config, tmp_path / "whole", resume=True)
    assert len(read_metrics(tmp_path / "whole")) == 2 * (best + 3)
    assert all(torch.equal(one[name], read_weights(tmp_path / "whole")[name]) for name in one)


def test_patience_that_lasts_changes_nothing(tmp_path):
    for name, patience in (("patient", 5), ("plain", None)):
        run(write_recipe(tmp_path / name, early_stopping_patience=patience, keep="best"), tmp_path / name / "run")
    one, other = (read_weights(tmp_path / name / "run") for name in ("patient", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert RunFolder(tmp_path / "patient" / "run").read_state().stopped_step is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adam"}, r"train.optim = 'adam': input should be 'adamw_torch_fused', 'adamw_torch', 'adafactor', "),
        ({"schedule": "cosin"}, r"train.schedule = 'cosin': input should be 'cosine', 'linear', 'constant', "),
        ({"early_stopping_patience": 2, "keep": "last"}, "keeps the best checkpoint, and keep = 'last'; set keep"),
        ({"early_stopping_patience": 2, "keep": "best", "validation_tokens": 0}, "needs a validation loss"),
        ({"decay_share": 0.5}, "decay_share = 0.5: does nothing with schedule = 'cosine'; leave it out, or set sched"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        write_recipe(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_a_comparison_does_not_stop_early_because_its_arms_spend_the_same(tmp_path):
    values = write_recipe(tmp_path, early_stopping_patience=2, keep="best").model_dump() | {"compare": {}}
    with pytest.raises(UserError, match=r"early_stopping_patience: the arms of a comparison spend the same"):
        make_config(values, source="test", kind=CompareConfig)


def test_a_missing_bitsandbytes_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = write_recipe(tmp_path, optim="adamw_8bit")
    with pytest.raises(UserError, match=r"train.optim = 'adamw_8bit': bitsandbytes is not installed; pip install bits"):
        train(config, out=tmp_path / "run")
