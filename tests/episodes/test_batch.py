"""Batches: rows of whole episodes, targets and their weights, the same by any way of cutting an optimizer step."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from manyicl.episodes.batch import (
    Batch,
    BatchMaker,
    Divisors,
    PackDataset,
    answer_weight,
    count_divisors,
    join_row,
    pad_row,
    targets_of,
)
from manyicl.episodes.packing import Pack, iter_packs
from manyicl.episodes.plan import Episode, EpisodeSettings
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import TokenizedEpisode, TokenizedTask, lengths_of, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.tasks.task import Example
from tests.conftest import make_task

NORMALIZATIONS = ["answer", "token", "task"]
TARGETS = ["all", "last"]


@pytest.fixture(scope="module")
def tokenizer(tokenizers) -> TaskTokenizer:
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


@pytest.fixture(scope="module")
def tasks(tokenizer) -> dict[str, TokenizedTask]:
    """Three tasks whose answers are one word, another word, and a sentence."""
    sentences = make_task("sentences", num_examples=30)
    longer = tuple(
        Example(e.input, f"The {e.answer} that the sentence names runs over a hill.") for e in sentences.train
    )
    sentences = replace(sentences, train=longer, labels=(), sha256="sentences")
    made = [make_task("animals"), make_task("colours", answer="colour"), sentences]
    return {task.name: tokenize_task(task, tokenizer=tokenizer) for task in made}


def packs_of(tasks: dict[str, TokenizedTask], num_packs: int, *, seed: int = 0) -> list[Pack]:
    lengths = [lengths_of(tasks[name]) for name in sorted(tasks)]
    episodes = EpisodeSettings(token_budget=250, shots=(0, 9))
    return list(islice(iter_packs(lengths, settings=episodes, pack_tokens=400, seed=seed), num_packs))


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


# --- a row by hand -----------------------------------------------------------------------------------------------

# Two episodes; their answers are [12, 13], [16] and [22, 23, 24].
FIRST = TokenizedEpisode(ids=np.array([1, 11, 12, 13, 15, 16], np.int32), spans=np.array([[2, 4], [5, 6]]))
SECOND = TokenizedEpisode(ids=np.array([1, 21, 22, 23, 24], np.int32), spans=np.array([[2, 5]]))


def test_a_row_of_two_episodes():
    batch = join_row(
        [FIRST, SECOND],
        targets="all",
        weights=[np.array([0.5, 0.25]), np.array([0.125])],
        tasks=[7, 3],
        episodes=(4, 9),
    )
    assert batch.input_ids_1T.tolist() == [[1, 11, 12, 13, 15, 16, 1, 21, 22, 23, 24]]
    assert batch.segment_ids_T.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert batch.position_ids_1T.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert batch.segment_lengths == (6, 5)
    assert batch.segment_bounds_S.tolist() == [0, 6, 11]
    assert batch.target_positions_N.tolist() == [2, 3, 5, 8, 9, 10]
    assert batch.target_weights_N.tolist() == [0.5, 0.5, 0.25, 0.125, 0.125, 0.125]
    assert batch.target_answers_N.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.answer_shots_A.tolist() == [0, 1, 0]
    assert batch.answer_tasks_A.tolist() == [7, 7, 3]
    assert batch.episodes == (4, 9)
    assert (len(batch), batch.num_tokens) == (2, 11)
    kinds = {f.name: getattr(batch, f.name).dtype for f in fields(Batch) if isinstance(getattr(batch, f.name), Tensor)}
    assert kinds.pop("target_weights_N") == torch.float32
    assert kinds.pop("segment_bounds_S") == torch.int32  # as torch's varlen attention wants it
    assert set(kinds.values()) == {torch.int64}


def test_a_row_with_the_last_answers_alone():
    batch = join_row(
        [FIRST, SECOND], targets="last", weights=[np.array([0.25]), np.array([0.125])], tasks=[7, 3], episodes=(4, 9)
    )
    assert batch.target_positions_N.tolist() == [5, 8, 9, 10]
    assert batch.target_answers_N.tolist() == [0, 1, 1, 1]
    assert batch.answer_shots_A.tolist() == [1, 0]
    assert batch.answer_tasks_A.tolist() == [7, 3]
    assert batch.input_ids_1T.shape == (1, 11)  # the shots stay in the row


def test_a_row_without_answers_has_no_targets():
    silent = TokenizedEpisode(ids=np.array([1, 11, 12], np.int32), spans=np.zeros((0, 2), np.int64))
    batch = join_row([silent], targets="all", weights=[np.zeros(0)], tasks=[0], episodes=(0,))
    assert batch.target_positions_N.tolist() == batch.target_answers_N.tolist() == []
    assert batch.target_positions_N.dtype == torch.int64


@pytest.mark.parametrize(("targets", "chosen"), [("all", [0, 1, 2, 3]), ("last", [3])])
def test_targets_of(targets, chosen):
    assert list(range(4))[targets_of(4, targets)] == chosen
    assert [0][targets_of(1, targets)] == [0]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_positions_and_segments_follow_from_lengths(lengths):
    silent = [TokenizedEpisode(ids=np.zeros(n, np.int32), spans=np.zeros((0, 2), np.int64)) for n in lengths]
    batch = join_row(
        silent, targets="all", weights=[np.zeros(0) for _ in lengths], tasks=[0] * len(lengths), episodes=(0,)
    )
    assert batch.segment_lengths == tuple(lengths)
    assert batch.segment_ids_T.tolist() == [place for place, n in enumerate(lengths) for _ in range(n)]
    assert batch.position_ids_1T.tolist() == [[position for n in lengths for position in range(n)]]


# --- rows of a plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS)
def test_what_is_trained_are_the_answers_of_the_plan(tasks, tokenizer, targets):
    maker = BatchMaker(tasks, targets=targets)
    for pack in packs_of(tasks, 20):
        batch = maker.make_batch([pack])
        chosen = [(e, n) for e in pack.episodes for n in range(len(e.examples))[targets_of(len(e.examples), targets)]]
        assert batch.episodes == tuple(e.index for e in pack.episodes)
        assert batch.segment_lengths == tuple(e.num_tokens for e in pack.episodes)
        assert batch.num_tokens == pack.num_tokens == sum(batch.segment_lengths)
        assert batch.answer_shots_A.tolist() == [n for _, n in chosen]
        assert [maker.task_names[n] for n in batch.answer_tasks_A] == [e.task for e, _ in chosen]
        for answer, (episode, n) in enumerate(chosen):
            positions = batch.target_positions_N[batch.target_answers_N == answer]
            tokenized = tasks[episode.task]
            row = tokenized.splits["train"].rows[episode.examples[n]]
            told = tokenizer.decode(batch.input_ids_1T[0, positions].numpy())
            assert told == tokenized.task.train[row].answer + "\n\n"
            assert positions.tolist() == list(range(positions[0], positions[0] + len(positions)))
            assert batch.segment_ids_T[positions].unique().tolist() == [batch.episodes.index(episode.index)]


def test_last_has_one_answer_an_episode(tasks):
    maker = BatchMaker(tasks, targets="last")
    for pack in packs_of(tasks, 20):
        batch = maker.make_batch([pack])
        assert len(batch.answer_shots_A) == len(batch)
        assert batch.answer_shots_A.tolist() == [len(e.examples) - 1 for e in pack.episodes]


def test_the_split_that_a_maker_is_given_is_the_one_that_it_reads(tasks, tokenizer):
    animals = tasks["animals"]
    episode = Episode(index=0, task="animals", epoch=0, examples=np.array([2, 0], np.int32), num_tokens=0)
    batch = BatchMaker(tasks, split="test").make_batch([Pack(index=0, episodes=(episode,))])
    told = [
        tokenizer.decode(batch.input_ids_1T[0, batch.target_positions_N[batch.target_answers_N == n]].numpy())
        for n in (0, 1)
    ]
    assert told == [animals.task.test[2].answer + "\n\n", animals.task.test[0].answer + "\n\n"]


def test_a_batch_is_the_same_whatever_was_asked_before(tasks):
    packs = packs_of(tasks, 12)
    divisors = count_divisors(packs, tasks=tasks, split="train", targets="all")
    forwards, backwards = BatchMaker(tasks), BatchMaker(dict(reversed(tasks.items())))
    first = [forwards.make_batch([pack], divisors=divisors) for pack in packs]
    second = [backwards.make_batch([pack], divisors=divisors) for pack in reversed(packs)][::-1]
    for one, other, pack in zip(first, second, packs, strict=True):
        assert_same(one, other)
        assert_same(one, forwards.make_batch([pack], divisors=divisors))


# --- weights -----------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    # A step with 4 answers and 20 targets; task a has 3 of the answers. Two of them, of 2 and of 5 tokens:
    divisors = Divisors(num_answers=4, num_targets=20, num_answers_by_task={"a": 3, "b": 1})
    weights = {
        name: answer_weight(np.array([2, 5]), task="a", divisors=divisors, normalization=name)
        for name in NORMALIZATIONS
    }
    assert weights["answer"].tolist() == pytest.approx([1 / 8, 1 / 20])
    assert weights["token"].tolist() == pytest.approx([1 / 20, 1 / 20])
    assert weights["task"].tolist() == pytest.approx([1 / 2 / 3 / 2, 1 / 2 / 3 / 5])


def test_divisors_by_hand(tasks):
    answer_tokens = {name: tasks[name].splits["train"].answer_lengths for name in tasks}

    def episode(index: int, task: str, examples: list[int]) -> Episode:
        return Episode(index=index, task=task, epoch=0, examples=np.array(examples, np.int32), num_tokens=0)

    packs = [
        Pack(index=0, episodes=(episode(0, "animals", [3, 1]), episode(1, "sentences", [0]))),
        Pack(index=1, episodes=(episode(2, "animals", [5]),)),
    ]
    counted = count_divisors(packs, tasks=tasks, split="train", targets="all")
    assert counted.num_targets == answer_tokens["animals"][[3, 1, 5]].sum() + answer_tokens["sentences"][0]
    assert (counted.num_answers, counted.num_answers_by_task) == (4, {"animals": 3, "sentences": 1})
    counted = count_divisors(packs, tasks=tasks, split="train", targets="last")
    assert counted.num_targets == answer_tokens["animals"][[1, 5]].sum() + answer_tokens["sentences"][0]
    assert (counted.num_answers, counted.num_answers_by_task) == (3, {"animals": 2, "sentences": 1})


def total_weights(batches: list[Batch]) -> tuple[list[float], dict[int, float], np.ndarray]:
    """Return the weight of each answer, of each task, and of each target of all `batches`."""
    by_answer: list[float] = []
    by_task: dict[int, float] = {}
    for batch in batches:
        for answer, task in enumerate(batch.answer_tasks_A.tolist()):
            weight = float(batch.target_weights_N[batch.target_answers_N == answer].double().sum())
            by_answer.append(weight)
            by_task[task] = by_task.get(task, 0.0) + weight
    return by_answer, by_task, np.concatenate([b.target_weights_N.double().numpy() for b in batches])


@pytest.mark.slow
@pytest.mark.parametrize("packs_per_batch", [1, 2, 8])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_weights_of_a_step_sum_to_one_however_it_is_cut(tasks, normalization, targets, packs_per_batch):
    packs = packs_of(tasks, 8)
    divisors = count_divisors(packs, tasks=tasks, split="train", targets=targets)
    maker = BatchMaker(tasks, targets=targets, normalization=normalization)
    cuts = [packs[n : n + packs_per_batch] for n in range(0, 8, packs_per_batch)]
    batches = [maker.make_batch(cut, divisors=divisors) for cut in cuts]
    by_answer, by_task, by_target = total_weights(batches)
    assert by_target.sum() == pytest.approx(1, rel=1e-5)
    assert (by_target > 0).all()
    assert len(by_task) == 3
    if normalization == "answer":
        assert by_answer == pytest.approx([1 / len(by_answer)] * len(by_answer), rel=1e-5)
    elif normalization == "token":
        assert by_target == pytest.approx(1 / len(by_target), rel=1e-5)
    else:
        assert list(by_task.values()) == pytest.approx([1 / 3] * 3, rel=1e-5)
        for batch in batches:  # within a task, each answer counts once
            for answer, task in enumerate(batch.answer_tasks_A.tolist()):
                whole = float(batch.target_weights_N[batch.target_answers_N == answer].sum())
                assert whole == pytest.approx(1 / 3 / divisors.num_answers_by_task[maker.task_names[task]], rel=1e-5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    normalization=st.sampled_from(NORMALIZATIONS),
    targets=st.sampled_from(TARGETS),
    seed=st.integers(0, 5),
)
def test_any_cut_of_a_step_gives_each_target_the_weight_that_the_whole_row_gives_it(
    tasks, cuts, normalization, targets, seed
):
    packs = packs_of(tasks, sum(cuts), seed=seed)
    maker = BatchMaker(tasks, targets=targets, normalization=normalization)
    divisors = count_divisors(packs, tasks=tasks, split="train", targets=targets)
    stops = np.cumsum(cuts)
    parts = [maker.make_batch(packs[a:b], divisors=divisors) for a, b in zip([0, *stops[:-1]], stops, strict=True)]
    whole = maker.make_batch(packs)  # without divisors a row is normalised by itself
    assert torch.equal(torch.cat([p.target_weights_N for p in parts]), whole.target_weights_N)
    assert torch.equal(torch.cat([p.input_ids_1T for p in parts], dim=1), whole.input_ids_1T)
    assert torch.equal(torch.cat([p.position_ids_1T for p in parts], dim=1), whole.position_ids_1T)
    assert tuple(n for p in parts for n in p.segment_lengths) == whole.segment_lengths
    assert tuple(n for p in parts for n in p.episodes) == whole.episodes


# --- the packs of a run ------------------------------------------------------------------------------------------


def dataset_of(tasks: dict[str, TokenizedTask], *, num_steps: int = 4, targets="all", **changes) -> PackDataset:
    options = {"pack_tokens": 400, "packs_per_step": 3, "num_steps": num_steps, "seed": 0, **changes}
    episodes = EpisodeSettings(token_budget=250, shots=(0, 9), targets=targets)
    return PackDataset(BatchMaker(tasks, targets=targets), settings=episodes, **options)


def written_out(packs: list[Pack]) -> list[list[tuple]]:
    return [[(e.index, e.task, e.epoch, e.examples.tolist(), e.num_tokens) for e in pack.episodes] for pack in packs]


@pytest.mark.parametrize("targets", TARGETS)
def test_a_run_has_the_packs_of_the_plan_with_the_divisors_of_their_step(tasks, targets):
    dataset = dataset_of(tasks, targets=targets)
    assert len(dataset) == 12
    packs = packs_of(tasks, 12)
    assert written_out([dataset[n][0] for n in range(12)]) == written_out(packs)
    for n in range(12):
        step = packs[n // 3 * 3 : n // 3 * 3 + 3]
        assert dataset[n][1] == count_divisors(step, tasks=tasks, split="train", targets=targets)


@pytest.mark.parametrize("packs_per_batch", [1, 3])
def test_the_batches_of_each_step_of_a_run_sum_to_one(tasks, packs_per_batch):
    dataset = dataset_of(tasks)
    starts = range(0, 12, packs_per_batch)
    sums = [dataset.collate([dataset[n + i] for i in range(packs_per_batch)]).target_weights_N.sum() for n in starts]
    steps = torch.stack(sums).reshape(4, -1).sum(dim=1)
    assert steps.tolist() == pytest.approx([1.0] * 4, rel=1e-5)


def test_a_longer_run_begins_like_a_shorter_one(tasks):
    short, long = dataset_of(tasks, num_steps=2), dataset_of(tasks, num_steps=5)
    assert written_out(long.packs[:6]) == written_out(short.packs)
    assert long.divisors[:2] == short.divisors


def test_another_number_of_packs_a_step_trains_the_same_packs(tasks):
    assert written_out(dataset_of(tasks, packs_per_step=4, num_steps=3).packs) == written_out(dataset_of(tasks).packs)


def test_packs_are_served_in_the_order_and_with_the_padding_of_a_run_and_the_plan_stays(tasks):
    plan = dataset_of(tasks)
    served = plan.arranged(order=[2, 0, 1, *range(3, 12)], row_multiple=64)
    assert [served[n][0] for n in range(4)] == [plan.packs[n] for n in (2, 0, 1, 3)]
    assert [served[n][1] for n in range(12)] == [plan[n][1] for n in range(12)]  # packs stay in their step
    padded, bare = served.collate([served[1]]), plan.collate([plan[0]])
    assert padded.num_tokens % 64 == 0
    assert torch.equal(padded.input_ids_1T[:, : bare.num_tokens], bare.input_ids_1T)
    assert [plan[n][0] for n in range(12)] == plan.packs


@pytest.mark.parametrize(("packs_per_row", "row_multiple"), [(1, 1), (1, 64), (3, 64)])
@pytest.mark.parametrize("targets", TARGETS)
def test_what_a_row_has_is_known_before_it_is_made(tasks, targets, packs_per_row, row_multiple):
    served = dataset_of(tasks, targets=targets).arranged(order=[2, 0, 1, *range(3, 12)], row_multiple=row_multiple)
    made = [
        served.collate([served[n] for n in range(start, start + packs_per_row)])
        for start in range(0, 12, packs_per_row)
    ]
    assert list(served.count_rows(packs_per_row=packs_per_row)) == [batch.counts for batch in made]
    assert [batch.counts.num_tokens for batch in made] == [batch.num_tokens for batch in made]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_build_the_same_batches(tasks, num_workers):
    dataset = dataset_of(tasks)
    loader = DataLoader(dataset, batch_size=3, collate_fn=dataset.collate, num_workers=num_workers)
    for step, batch in enumerate(loader):
        assert_same(batch, dataset.collate([dataset[n] for n in range(3 * step, 3 * step + 3)]))


def test_a_run_travels_to_workers_that_are_not_forked(tasks):
    dataset = dataset_of(tasks)
    again = pickle.loads(pickle.dumps(dataset))
    for n in (0, 7, 11):
        assert_same(again.collate([again[n]]), dataset.collate([dataset[n]]))


# --- moving a batch ----------------------------------------------------------------------------------------------


def test_a_moved_batch_loses_no_field(tasks):
    batch = BatchMaker(tasks).make_batch(packs_of(tasks, 1))
    assert_same(batch.to("cpu"), batch)
    away = batch.to("meta", non_blocking=True)
    for field in fields(Batch):
        before, after = getattr(batch, field.name), getattr(away, field.name)
        if isinstance(before, Tensor):
            assert (after.device.type, after.dtype, after.shape) == ("meta", before.dtype, before.shape)
        else:
            assert after == before


def test_a_pinned_batch_loses_no_field_and_pins_every_tensor(tasks, monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor.data_ptr())
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)  # page-locked memory needs a GPU
    batch = BatchMaker(tasks).make_batch(packs_of(tasks, 1))
    assert_same(batch.pin_memory(), batch)
    tensors = [getattr(batch, field.name) for field in fields(Batch)]
    assert sorted(pinned) == sorted(t.data_ptr() for t in tensors if isinstance(t, Tensor))


def test_padding_goes_on_the_last_episode_and_is_no_target():
    batch = join_row(
        [TokenizedEpisode(ids=np.arange(4, dtype=np.int32) + 5, spans=np.array([[2, 4]])) for _ in range(2)],
        targets="all",
        weights=[np.ones(1), np.ones(1)],
        tasks=[0, 0],
        episodes=(0, 1),
    )
    padded = pad_row(batch, multiple=6)
    assert padded.input_ids_1T.tolist() == [[5, 6, 7, 8, 5, 6, 7, 8, 0, 0, 0, 0]]
    assert padded.position_ids_1T.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0, 0]]
    assert padded.segment_lengths == (4, 8)
    assert padded.segment_bounds_S.tolist() == [0, 4, 12, 12]
    assert padded.target_positions_N.tolist() == batch.target_positions_N.tolist() == [2, 3, 6, 7]
    assert pad_row(batch, multiple=8).input_ids_1T.tolist() == batch.input_ids_1T.tolist()
