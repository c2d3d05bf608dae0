"""Exported rows are the plan's own, and TRL trains them to the same loss as ours."""

from __future__ import annotations

import importlib.util

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from manyicl.episodes.batch import BatchMaker
from manyicl.errors import UserError
from manyicl.files import sync_tree
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import load_model
from manyicl.models.loss import answer_loss, target_logits
from manyicl.training.export import export_trl
from manyicl.training.preparation import prepare_run
from tests.trajectory.setting import write_setting

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None,
    reason='TRL is not installed; pip install "manyicl[bench]"',
)


@pytest.fixture
def prepared(tmp_path):
    return prepare_run(write_setting(tmp_path, pack_tokens=320))


def read_rows(folder, split):
    return pq.read_table(folder / "data" / f"{split}.parquet").to_pylist()


def test_a_row_is_an_episode_and_its_labels_are_the_answers(prepared, tmp_path):
    counts = export_trl(prepared, tmp_path / "rows")
    rows = read_rows(tmp_path / "rows", "train")
    episodes = [episode for pack in prepared.packs.packs for episode in pack.episodes]
    assert counts["train"] == len(rows) == len(episodes)
    validated = [episode.num_tokens for pack in prepared.validation[1] for episode in pack.episodes]
    assert counts["validation"] == len(validated)
    assert [row["seq_lengths"] for row in read_rows(tmp_path / "rows", "validation")] == [[n] for n in validated]
    decode = prepared.tokenizer.decode
    for row, episode in zip(rows, episodes, strict=True):
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert row["seq_lengths"] == [len(ids)] == [episode.num_tokens]
        trained = labels != -100
        assert np.array_equal(labels[trained], ids[trained])
        examples = [prepared.tasks[episode.task].task.train[i] for i in episode.examples]
        assert decode(ids[trained]) == "".join(f"{example.answer}\n\n" for example in examples)
    assert sum(sum(label != -100 for label in row["labels"]) for row in rows) == sum(
        divisors.num_targets for divisors in prepared.packs.divisors
    )


def test_a_row_can_be_a_pack(prepared, tmp_path):
    export_trl(prepared, tmp_path / "rows", rows="packs")
    rows = read_rows(tmp_path / "rows", "train")
    packs = prepared.packs.packs
    assert [row["seq_lengths"] for row in rows] == [[e.num_tokens for e in pack.episodes] for pack in packs]
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
    assert "padding_free=True" in (tmp_path / "rows" / "README.md").read_text()


def test_a_folder_that_exists_is_left_alone_and_a_failure_leaves_nothing_of_its_name(prepared, tmp_path, monkeypatch):
    export_trl(prepared, tmp_path / "rows")
    with pytest.raises(UserError, match="exists already; name a new folder"):
        export_trl(prepared, tmp_path / "rows")

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr("manyicl.locks.sync_tree", full)
    with pytest.raises(OSError, match="disk full"):
        export_trl(prepared, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr("manyicl.locks.sync_tree", sync_tree)
    export_trl(prepared, tmp_path / "other")


@needs_trl
def test_the_card_tells_datasets_where_the_splits_are(prepared, tmp_path):
    from datasets import load_dataset

    counts = export_trl(prepared, tmp_path / "rows")
    loaded = load_dataset(str(tmp_path / "rows"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(loaded[split]) for split in loaded} == counts


@needs_trl
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of TRL's and datasets' own
def test_one_step_in_trl_has_the_loss_of_ours(prepared, tmp_path):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    export_trl(prepared, tmp_path / "rows")
    dataset = load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))
    packs = prepared.packs.packs[:8]
    num_episodes = sum(len(pack.episodes) for pack in packs)
    args = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_length=None,
        max_steps=1,
        per_device_train_batch_size=num_episodes,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = load_model(prepared.config.model, trainable=True)
    # The model of the test has no padding token; rows of unlike length are padded behind, with no label.
    prepared.tokenizer.pad_token = prepared.tokenizer.eos_token
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=prepared.tokenizer)
    trainer.train()
    theirs = next(record["loss"] for record in trainer.state.log_history if "loss" in record)

    ours = load_model(prepared.config.model, trainable=True)
    batch = BatchMaker(prepared.tasks, normalization="token").make_batch(packs)
    with segment_attention(ours), torch.no_grad():
        loss = answer_loss(target_logits(ours, batch), batch).loss
    assert float(loss) == pytest.approx(theirs, rel=1e-4)
