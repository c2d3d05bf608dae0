"""The prequential score: which steps are of unseen rows, and what their answers cost."""

from __future__ import annotations

import json

import pytest

from manyicl.batches import BatchMaker, PackDataset
from manyicl.episodes import EpisodeSettings
from manyicl.prequential import count_unseen_steps, prequential_loss
from manyicl.templates import TemplateSettings
from manyicl.tokens import TaskTokenizer, tokenize_task
from tests.conftest import make_task


def make_packs(tokenizers, *, num_steps: int) -> PackDataset:
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    tasks = {"animals": tokenize_task(make_task("animals"), tokenizer=tokenizer)}
    settings = EpisodeSettings(token_budget=64, shots=0)
    return PackDataset(
        BatchMaker(tasks, targets="all"),
        settings=settings,
        pack_tokens=64,
        packs_per_step=2,
        num_steps=num_steps,
        seed=0,
    )


def test_steps_are_unseen_until_an_example_comes_again(tokenizers):
    packs = make_packs(tokenizers, num_steps=40)
    unseen = count_unseen_steps(packs)
    met = []
    for step in range(unseen + 1):
        row = packs.packs[2 * step : 2 * step + 2]
        examples = [int(i) for pack in row for episode in pack.episodes for i in episode.examples]
        assert bool(set(examples) & set(met)) == (step == unseen)
        met += examples
    assert 0 < unseen < 40
    assert count_unseen_steps(make_packs(tokenizers, num_steps=1)) == 1


def test_the_loss_is_that_of_unseen_steps_answers_counting_alike(tmp_path):
    records = [
        {"step": 1, "loss": 4.0, "answers": 10},
        {"step": 2, "drift/a.txt": 1.5},
        {"step": 2, "loss": 1.0, "answers": 30},
        {"step": 3, "loss": 0.5, "answers": 10},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert prequential_loss(tmp_path, unseen_steps=2) == pytest.approx((4.0 * 10 + 1.0 * 30) / 40)
    assert prequential_loss(tmp_path, unseen_steps=3) == pytest.approx((4.0 * 10 + 1.0 * 30 + 0.5 * 10) / 50)
    assert prequential_loss(tmp_path, unseen_steps=1) is None  # the untrained model's loss alone tells nothing
