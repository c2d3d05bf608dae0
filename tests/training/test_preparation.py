"""Validation's plan: the same episodes in few rows, each counted with its own task."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from manyicl.episodes import Pack
from manyicl.models import ModelSettings, load_model, row_loss
from manyicl.training import trainer
from manyicl.training.preparation import prepare_run
from manyicl.training.recipe import make_config
from manyicl.training.run import train
from tests.trajectory.setting import read_metrics, write_setting

# Name -> rows of each split, and what each input holds.
TASKS = {
    "short": (30, "sea"),
    "middle": (21, "a walk by the sea"),
    "long": (12, "a walk by the sea and over hills " * 2),
}


def write_unequal(folder, *, family="llama", **train):
    """Write three tasks of unlike lengths and numbers of rows; without shots, so that each row is an episode."""
    config = write_setting(folder, family=family, **{"num_steps": 2, "validation_tokens": 2000, **train})
    shutil.rmtree(folder / "tasks")
    (folder / "tasks").mkdir()
    for name, (number, text) in TASKS.items():
        rows = [
            {"input": f"{split} {text} {i}", "answer": ("fox", "a bird")[i % 2], "split": split}
            for split in ("train", "validation")
            for i in range(number)
        ]
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config.model_dump()
    values["episodes"] |= {"shots": 0}
    return make_config(values, source="test")


def drawn(config):
    """Return the validation episodes of a recipe, in an order that does not depend on its packs."""
    _, planned = prepare_run(config).validation
    return sorted((e.task, e.index, e.examples.tolist(), e.num_tokens) for pack in planned for e in pack.episodes)


def test_validation_rows_hold_whole_episodes_of_any_tasks_and_each_episode_once(tmp_path):
    _, planned = prepare_run(write_unequal(tmp_path, pack_tokens=400)).validation
    episodes = [e for pack in planned for e in pack.episodes]
    for name, (number, _) in TASKS.items():
        assert sorted(int(e.examples[0]) for e in episodes if e.task == name) == list(range(number))
    assert max(pack.num_tokens for pack in planned) <= 400
    assert len(planned) < 1.2 * sum(pack.num_tokens for pack in planned) / 400 + 1
    assert [pack.index for pack in planned] == list(range(len(planned)))
    assert any(len({e.task for e in pack.episodes}) > 1 for pack in planned)


def test_the_length_of_packs_does_not_change_what_is_validated(tmp_path):
    short, long = (write_unequal(tmp_path / str(n), pack_tokens=n, validation_tokens=300) for n in (160, 900))
    assert drawn(short) == drawn(long)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*each episode goes through the model alone")
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_the_validation_loss_is_that_of_each_episode_alone_in_fewer_rows(tmp_path, monkeypatch, family):
    config, rows = write_unequal(tmp_path, family=family, pack_tokens=400), []
    plain = trainer.row_loss

    def counted(model, batch):
        if not torch.is_grad_enabled():
            rows.append(batch)
        return plain(model, batch)

    monkeypatch.setattr(trainer, "row_loss", counted)
    run = train(config, out=tmp_path / "run")
    logged = next(record for record in read_metrics(run.folder) if "eval_loss" in record)
    maker, planned = prepare_run(config).validation
    assert len(rows) == len(planned) < 20
    assert sum(len(batch) for batch in rows) == 30 + 21 + 12

    model = load_model(ModelSettings(path=str(run.model), precision="fp32"), trainable=False).eval()
    losses = {name: [] for name in TASKS}
    for pack in planned:
        for episode in pack.episodes:
            alone = Pack(0, episodes=(episode,))
            with torch.no_grad():
                scored = row_loss(model, maker.make_batch([alone]))
            losses[episode.task] += (scored.nll_A / scored.num_tokens_A).tolist()
    by_task = {name: sum(values) / len(values) for name, values in losses.items()}
    for name, loss in by_task.items():
        assert logged[f"eval_loss/{name}"] == pytest.approx(loss, rel=1e-6)
    assert logged["eval_loss"] == pytest.approx(sum(by_task.values()) / 3, rel=1e-6)
