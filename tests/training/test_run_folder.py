"""What lies in a run's folder: read back as it was written, also if an earlier version wrote it."""

from __future__ import annotations

import errno
import json
import re

import pytest

from manyicl.errors import UserError
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder, refuse_other_sharding
from tests.trajectory.setting import write_setting

# As runs of early versions have it: no weights, no rows, and another name for the recomputed layers.
EARLY = {
    "schema": 1,
    "finished": False,
    "python": "3.11.7",
    "packages": {"torch": "2.11.0"},
    "git_commit": None,
    "model": "/somewhere/start",
    "tasks": {"animals": {"sha256": "abc", "dropped": {"too long": 3}}},
    "plan": {
        "packs": 8,
        "episodes": 9,
        "answers": 40,
        "targets": 80,
        "tokens": 900,
        "tokens_by_task": {"animals": 900},
        "fill": 0.9,
        "sha256": "def",
    },
    "wall_s": 12.5,
    "checkpointed_layers": 3,
    "attention_recomputed": False,
    "of a later version": [1, 2],
}


def test_the_state_of_an_early_run_is_read_and_nothing_of_it_is_lost(tmp_path):
    folder = RunFolder(tmp_path)
    folder.state_file.write_text(json.dumps(EARLY))
    state = folder.read_state()
    assert (state.recomputed_layers, state.tasks["animals"].dropped, state.plan.tokens) == (3, {"too long": 3}, 900)
    assert (state.weights, state.rows, state.model_step, state.peak_bytes) == (None, None, None, None)
    folder.update_state(finished=True, model_step=20)
    kept = {key: value for key, value in EARLY.items() if key != "checkpointed_layers"}
    assert json.loads(folder.state_file.read_text()) == kept | {
        "recomputed_layers": 3,
        "finished": True,
        "model_step": 20,
    }
    assert folder.is_finished


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_losses_of_the_untrained_model_are_told_in_one_line(tmp_path, content):
    file = tmp_path / "held_out_before.json"
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=f"^{file}: is damaged; restore it, or remove it: its losses are measured again$"
    ):
        RunFolder(tmp_path).take_losses_before(lambda: {"animals": [1.0]})
    file.unlink()
    assert RunFolder(tmp_path).take_losses_before(lambda: {"animals": [1.0]}) == {"animals": [1.0]}


def test_a_state_that_cannot_be_read_is_one_line(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.is_finished
    for content in ("{", json.dumps({**EARLY, "plan": {"packs": "many"}})):
        folder.state_file.write_text(content)
        with pytest.raises(
            UserError, match=rf"^{re.escape(str(tmp_path))}: has no run\.json that can be read"
        ) as caught:
            folder.read_state()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_with_its_recomputed_layers(tmp_path):
    config = write_setting(tmp_path, num_steps=2, recompute="full")
    folder = RunFolder(tmp_path / "run")
    train(config, out=folder.path)
    folder.config_file.write_text(
        folder.config_file.read_text().replace('recompute = "full"', 'checkpointed_layers = "whole"')
    )
    folder.update_state(finished=False)
    with pytest.warns(UserWarning, match=r"train\.checkpointed_layers = 'whole' is now train\.recompute = 'full'$"):
        run = train(folder.read_config(), out=folder.path, resume=True)
    assert run.held_out
    assert folder.is_finished
    assert folder.read_state().changes == []


@pytest.mark.parametrize(
    ("file", "sharded", "told"),
    [
        (
            "pytorch_model_fsdp.bin",
            False,
            "under FSDP; resume it so: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m manyicl train",
        ),
        ("model.safetensors", True, "without FSDP; resume it so: manyicl train"),
    ],
)
def test_a_checkpoint_of_another_kind_of_launch_is_refused_with_the_command(tmp_path, file, sharded, told):
    """Resumed by one plain process, a run under FSDP2 ended in a traceback of transformers."""
    checkpoint = tmp_path / "my run" / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / file).touch()
    refuse_other_sharding(checkpoint, sharded=not sharded)
    with pytest.raises(UserError) as refused:
        refuse_other_sharding(checkpoint, sharded=sharded)
    assert str(refused.value) == f"{checkpoint}: was written {told} --resume '{tmp_path / 'my run'}'"


def test_a_run_that_ended_before_its_recipe_was_written_can_be_called_again(tmp_path, monkeypatch):
    """The first call said that nothing was kept, and the second that the folder was not empty."""
    config = write_setting(tmp_path, num_steps=1)
    run = tmp_path / "run"

    def refuse(config):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("manyicl.training.run_folder.dump_config", refuse)
        with pytest.raises(OSError, match="No space left"):
            train(config, out=run)
    (run / ".config.toml.4711-0a1b2c3d.partial").touch()  # as after a kill
    assert train(config, out=run).model == run / "model"
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match="is not empty; name another"):
        train(config, out=run)
