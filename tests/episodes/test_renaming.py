"""Renamed episodes: one name a label throughout, distinct names, exact budgets, and text like any other task's."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from io import StringIO
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from manyicl.cli.tables.runs import plan_table
from manyicl.episodes.batch import BatchMaker, PackDataset, count_divisors
from manyicl.episodes.packing import Pack, iter_packs
from manyicl.episodes.plan import Episode, EpisodeSettings, TaskLengths, iter_episodes
from manyicl.episodes.renaming import WORDS, LabelLengths, check_names, draw_names, names_a_label
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import (
    TokenizedEpisode,
    TokenizedTask,
    join_examples,
    lengths_of,
    tokenize_task,
    with_names,
)
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import answer_loss, target_logits
from manyicl.planning.preview import preview_recipe
from manyicl.tasks.task import Example, Task
from manyicl.training.preparation import count_plan, prepare_run
from manyicl.training.recipe import dump_config, make_config
from tests.cli.test_app import run_manyicl
from tests.conftest import make_task, tiny_model
from tests.episodes.test_template import CHATML, chat_tokenizer
from tests.support.drawn import draw_episode
from tests.trajectory.setting import write_setting

KINDS = ("bpe", "unigram", "sentencepiece")


@pytest.fixture(scope="module")
def tokenizer(tokenizers) -> TaskTokenizer:
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


def named(task: Task, tokenizer: TaskTokenizer) -> TokenizedTask:
    return with_names(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer)


def first_episodes(tasks, num_episodes: int, *, seed: int = 0, **options) -> list[Episode]:
    tasks = [tasks] if isinstance(tasks, TaskLengths) else tasks
    return list(islice(iter_episodes(tasks, settings=EpisodeSettings(**options), seed=seed), num_episodes))


def text_of(task: Task, episode: Episode, names: dict[str, str], *, instruction: str) -> str:
    shots = [task.train[i] for i in episode.examples]
    return instruction + "".join(f"Input: {e.input}\nAnswer:\n{names.get(e.answer, e.answer)}\n\n" for e in shots)


def inputs_of(built: TokenizedEpisode) -> list[list[int]]:
    """Return the ids before each answer, the head before the first."""
    starts = [0, *built.spans[:-1, 1]]
    return [built.ids[a:b].tolist() for a, b in zip(starts, built.spans[:, 0], strict=True)]


def names_of(tokenized: TokenizedTask, episode: Episode) -> dict[str, str]:
    known = tokenized.names
    return (
        {} if episode.names is None else dict(zip(known.texts, (known.texts[n] for n in episode.names), strict=False))
    )


# --- the words ---------------------------------------------------------------------------------------------------


def test_the_words_are_different_plain_words_and_more_than_a_task_has_labels():
    assert len(set(WORDS)) == len(WORDS) > 400
    assert all(word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 8 for word in WORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_given_back_by_every_tokenizer_of_bytes_or_letters(kind, tokenizers):
    tokenizer = TaskTokenizer(tokenizers[kind], TemplateSettings())
    known = named(make_task("animals"), tokenizer).names
    labels, words = known.texts[: known.num_labels], known.texts[known.num_labels :]
    assert labels == ("cat", "dog", "fox", "owl")
    assert set(words) <= set(WORDS) - set(labels)  # fox and owl are words too
    assert [tokenizer.decode(ids) for ids in known.ids] == [f"{text}\n\n" for text in known.texts]
    assert known.name_tokens.tolist() == [len(ids) for ids in known.ids]
    if kind == "bpe":  # knows all bytes
        assert len(words) == len(WORDS) - 2


def test_a_word_that_the_tokenizer_cannot_give_back_is_never_used(tokenizer):
    def encode_answers(texts):
        return ["lost" if text == "acorn" else ids for text, ids in zip(texts, plain(texts), strict=True)]

    plain, task = tokenizer.encode_answers, tokenize_task(make_task("animals"), tokenizer=tokenizer)
    tokenizer.encode_answers = encode_answers
    try:
        known = with_names(task, tokenizer=tokenizer).names
    finally:
        del tokenizer.encode_answers
    assert "acorn" not in known.texts
    assert "album" in known.texts


def test_no_name_is_a_label_in_other_letters(tokenizer):
    task = make_task("animals")
    answers = {"cat": "Acorn", "dog": "ALBUM", "fox": "alley", "owl": "an anchor"}
    train = tuple(Example(e.input, answers[e.answer]) for e in task.train)
    task = replace(task, train=train, validation=(), test=(), labels=tuple(sorted(answers.values())))
    known = named(task, tokenizer).names
    assert not {"acorn", "album", "alley"} & set(known.texts[known.num_labels :])
    assert "anchor" in known.texts


@pytest.mark.parametrize("change", [{"family": "qa"}, {"labels": ()}, {"labels": ("cat",)}])
def test_tasks_without_classes_have_no_names_and_their_plan_is_as_without(change, tokenizer):
    task = replace(make_task("animals"), **change)
    if len(task.labels) == 1:
        task = replace(task, **{s: tuple(Example(e.input, "cat") for e in getattr(task, s)) for s in ("train",)})
        task = replace(task, validation=(), test=())
    tokenized = named(task, tokenizer)
    assert tokenized.names is None
    plain = first_episodes(lengths_of(tokenized), 20, token_budget=200)
    asked = first_episodes(lengths_of(tokenized), 20, token_budget=200, rename_share=1.0)
    assert [e.examples.tolist() for e in asked] == [e.examples.tolist() for e in plain]
    assert all(e.names is None for e in asked)


# --- the draw ----------------------------------------------------------------------------------------------------


def label_lengths(num_labels: int, num_words: int) -> LabelLengths:
    tokens = np.ones(num_labels + num_words, np.int64)
    return LabelLengths(np.zeros(1, np.int32), num_labels=num_labels, name_tokens=tokens, num_head_tokens=0)


@given(num_labels=st.integers(2, 20), spare=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_names_are_distinct_and_never_all_the_labels_own(num_labels, spare, seed):
    labels = label_lengths(num_labels, num_labels + spare)
    permuted = draw_names(labels, to="permuted", rng=np.random.default_rng(seed))
    assert sorted(permuted) == list(range(num_labels))
    assert permuted.tolist() != list(range(num_labels))
    words = draw_names(labels, to="words", rng=np.random.default_rng(seed))
    assert len(set(words.tolist())) == num_labels
    assert num_labels <= min(words)
    assert max(words) < 2 * num_labels + spare


def test_every_permutation_but_the_identity_is_drawn_alike():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(draw_names(label_lengths(3, 0), to="permuted", rng=rng)) for _ in range(1000))
    assert len(counts) == 5
    assert min(counts.values()) > 150


def test_more_labels_than_words_are_refused_in_one_line():
    check_names(label_lengths(5, 4), task="many", to="permuted")
    check_names(label_lengths(4, 4), task="many", to="words")
    with pytest.raises(UserError) as error:
        check_names(label_lengths(5, 4), task="many", to="words")
    assert str(error.value) == (
        "episodes.rename_to = 'words': task 'many' has 5 labels, but only 4 words can replace them; set"
        " episodes.rename_to = 'permuted', or leave the task out"
    )
    lengths = TaskLengths("many", 0, 0, lengths=np.array([3]), labels=label_lengths(5, 4))
    assert first_episodes(lengths, 1)  # nothing is renamed, so nothing is refused
    with pytest.raises(UserError, match="task 'many'"):
        first_episodes(lengths, 1, rename_share=0.1)


# --- the plan ----------------------------------------------------------------------------------------------------


@st.composite
def label_tasks(draw) -> TaskLengths:
    """A task of two to five labels of different lengths, which words of other lengths may stand for."""
    num_labels, num_words = draw(st.integers(2, 5)), draw(st.integers(5, 8))
    name_tokens = np.array(
        draw(st.lists(st.integers(1, 12), min_size=num_labels + num_words, max_size=num_labels + num_words))
    )
    label_of = np.array(draw(st.lists(st.integers(0, num_labels - 1), min_size=1, max_size=40)), np.int32)
    inputs = np.array(draw(st.lists(st.integers(1, 20), min_size=len(label_of), max_size=len(label_of))))
    head = draw(st.integers(0, 9))
    labels = LabelLengths(label_of, num_labels, name_tokens=name_tokens, num_head_tokens=draw(st.integers(0, head)))
    return TaskLengths("task", head, 0, lengths=inputs + name_tokens[label_of], labels=labels)


plans = {
    "task": label_tasks(),
    "budget": st.integers(41, 100),
    "share": st.sampled_from([0.0, 0.3, 1.0]),
    "to": st.sampled_from(["permuted", "words"]),
    "shots": st.sampled_from(["fill", 0, 3, (0, 7)]),
    "seed": st.integers(0, 2**40),
}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(**plans)
def test_renamed_or_not_each_epoch_uses_each_example_once_within_the_budget(task, budget, share, to, shots, seed):
    options = {"rename_share": share, "rename_to": to, "shots": shots}
    episodes = first_episodes(task, 60, seed=seed, token_budget=budget, **options)
    tokens = task.labels.name_tokens
    used: dict[int, list[int]] = {}
    for episode in episodes:
        own = task.labels.label_of[episode.examples]
        if episode.names is None:
            whole = task.num_head_tokens + task.lengths[episode.examples].sum()
        else:
            inputs = task.lengths[episode.examples] - tokens[own]
            whole = task.labels.num_head_tokens + (inputs + tokens[episode.names[own]]).sum()
            assert len(set(episode.names.tolist())) == len(episode.names) == task.labels.num_labels
        assert episode.num_tokens == whole <= budget
        assert len(set(episode.examples.tolist())) == len(episode.examples) > (episode.names is not None)
        used.setdefault(episode.epoch, []).extend(episode.examples.tolist())
    for epoch, examples in used.items():
        assert len(set(examples)) == len(examples)
        if epoch < max(used):
            assert sorted(examples) == list(range(len(task.lengths)))


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(**plans)
def test_a_renaming_depends_on_nothing_that_was_drawn_before_or_beside_it(task, budget, share, to, shots, seed):
    options = {"rename_share": share, "rename_to": to, "shots": shots, "token_budget": budget}
    plan = first_episodes(task, 30, seed=seed, **options)
    other = replace(task, name="other", lengths=task.lengths[::-1].copy(), labels=None)
    mixed = [e for e in first_episodes([other, task], 90, seed=seed, **options) if e.task == "task"]
    # What the mixture gives as its n-th episode of the task is the n-th of the task alone.
    for one, again in zip(plan, mixed, strict=False):
        assert (one.epoch, one.examples.tolist(), one.num_tokens) == (
            again.epoch,
            again.examples.tolist(),
            again.num_tokens,
        )
        assert (None if one.names is None else one.names.tolist()) == (
            None if again.names is None else again.names.tolist()
        )


@pytest.mark.slow
def test_the_share_of_renamed_episodes_is_the_share_asked_for(tokenizer):
    lengths = lengths_of(named(make_task("animals"), tokenizer))
    for share in (0.0, 0.25, 1.0):
        episodes = first_episodes(lengths, 800, token_budget=100, rename_share=share)
        longer = [e for e in episodes if len(e.examples) > 1]
        assert len(longer) > 600
        renamed = sum(e.names is not None for e in longer) / len(longer)
        assert renamed == pytest.approx(share, abs=0.06 * (0 < share < 1))


def test_the_same_episodes_are_renamed_whatever_the_share_grows_to(tokenizer):
    lengths = lengths_of(named(make_task("animals"), tokenizer))
    few, many = (first_episodes(lengths, 40, shots=1, rename_share=share) for share in (0.3, 0.7))
    renamed = [{e.index for e in episodes if e.names is not None} for episodes in (few, many)]
    assert renamed[0] < renamed[1]
    assert all(few[i].names.tolist() == many[i].names.tolist() for i in renamed[0])


def test_an_example_that_fits_only_under_its_own_label_keeps_it():
    # Label 0 takes 2 tokens, a word for it 9: renamed, the last example would need 20 + 7 of 24 tokens.
    labels = LabelLengths(np.zeros(3, np.int32), 2, name_tokens=np.array([2, 2, 9, 9]), num_head_tokens=0)
    task = TaskLengths("task", 0, 0, lengths=np.array([5, 5, 20]), labels=labels)
    episodes = first_episodes(task, 60, token_budget=24, rename_share=1.0)
    told = {(tuple(sorted(e.examples.tolist())), e.names is not None, e.num_tokens) for e in episodes}
    # Two short ones are renamed together, 7 tokens longer each; beside the long one, or alone, they are not.
    assert told == {((0, 1), True, 24), ((2,), False, 20), ((0,), False, 5), ((1,), False, 5)}


def test_nothing_is_renamed_where_no_shot_could_tell_the_name(tokenizer):
    lengths = lengths_of(named(make_task("animals"), tokenizer))
    for shots in (0, 1):
        episodes = first_episodes(lengths, 80, shots=shots, rename_share=1.0)
        assert {e.names is not None for e in episodes} == {shots > 0}


def test_longer_names_leave_the_epochs_of_all_tasks_in_step():
    labels = LabelLengths(np.zeros(60, np.int32), 2, name_tokens=np.array([1, 1, 21, 21]), num_head_tokens=0)
    long_names = TaskLengths("a", 0, 0, lengths=np.full(60, 10), labels=labels)
    tasks = [long_names, TaskLengths("b", 0, 0, lengths=np.full(60, 10))]
    episodes = first_episodes(tasks, 400, token_budget=100, rename_share=1.0, mixture="proportional")
    done = Counter()
    for episode in episodes:
        done[episode.task] += len(episode.examples)
    assert abs(done["a"] - done["b"]) <= 10  # one episode of the longer


# --- the ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["permuted", "words"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_episode_reads_as_the_same_examples_under_other_names(kind, to, tokenizers):
    task, tokenizer = make_task("animals"), TaskTokenizer(tokenizers[kind], TemplateSettings())
    tokenized = named(task, tokenizer)
    options = {"token_budget": 250, "rename_share": 1.0, "rename_to": to}
    for episode in first_episodes(lengths_of(tokenized), 12, **options):
        if len(episode.examples) == 1:  # what an epoch ends on
            assert episode.names is None
            continue
        names = names_of(tokenized, episode)
        assert set(names) == set(task.labels)
        assert len(set(names.values())) == 4
        assert (set(names.values()) == set(task.labels)) == (to == "permuted")
        built = join_examples(tokenized, split="train", indices=episode.examples, names=episode.names)
        assert len(built.ids) == episode.num_tokens <= 250
        own = join_examples(tokenized, split="train", indices=episode.examples)
        assert inputs_of(built) == inputs_of(own)
        if kind == "bpe":  # gives every text back
            expected = text_of(task, episode, names, instruction="Name the animal.\n\n")
            assert tokenizer.decode(built.ids) == f"<s>{expected}"
        answers = [tokenizer.decode(built.ids[a:b]) for a, b in built.spans]
        assert answers == [f"{names[task.train[i].answer]}\n\n" for i in episode.examples]


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_renamed_episode_is_the_episode_of_a_task_that_has_those_labels(style, tokenizers):
    tokenizer = TaskTokenizer(chat_tokenizer(tokenizers["bpe"], CHATML), TemplateSettings(style=style))
    task = make_task("animals")
    tokenized, model = named(task, tokenizer), tiny_model("llama")
    settings_ = {"token_budget": 300, "rename_share": 1.0, "rename_to": "words"}
    for episode in first_episodes(lengths_of(tokenized), 3, **settings_):
        names = names_of(tokenized, episode)
        train = tuple(Example(e.input, names[e.answer]) for e in task.train)
        written = replace(task, train=train, validation=(), test=(), labels=tuple(names.values()), sha256="other")
        other = tokenize_task(written, tokenizer=tokenizer)
        built = join_examples(other, split="train", indices=episode.examples)
        renamed = join_examples(tokenized, split="train", indices=episode.examples, names=episode.names)
        assert np.array_equal(built.ids, renamed.ids)
        assert np.array_equal(built.spans, renamed.spans)
        batches = [
            BatchMaker({"animals": t}).make_batch([Pack(0, (e,))])
            for t, e in ((other, replace(episode, names=None)), (tokenized, episode))
        ]
        with segment_attention(model), torch.no_grad():
            losses = [answer_loss(target_logits(model, batch), batch).loss.item() for batch in batches]
        assert losses[0] == losses[1] > 0


def test_an_instruction_that_names_a_label_is_left_out_of_renamed_episodes_only(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    task = replace(make_task("animals"), instruction="Is it an Owl?")
    tokenized = named(task, tokenizer)
    episodes = first_episodes(lengths_of(tokenized), 20, token_budget=200, rename_share=0.5)
    assert len({e.names is None for e in episodes}) == 2
    for episode in episodes:
        built = join_examples(tokenized, split="train", indices=episode.examples, names=episode.names)
        opening = "Is it an Owl?\n\n" if episode.names is None else ""
        expected = text_of(task, episode, names_of(tokenized, episode), instruction=opening)
        assert tokenizer.decode(built.ids).removeprefix("<s>") == expected
        assert len(built.ids) == episode.num_tokens


def test_a_listed_set_of_labels_is_never_beside_other_names(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings(labels=True))
    tokenized = named(make_task("animals"), tokenizer)
    assert "Answers: cat" in tokenizer.decode(tokenized.head_ids)
    assert tokenizer.decode(tokenized.names.head_ids) == "<s>"


def test_a_label_is_named_as_a_whole_word_only():
    assert names_a_label("Say pro, or con.", ["con"])
    assert names_a_label("is it IN FAVOR of it", ["in favor"])
    assert not names_a_label("Say whether they are paraphrases.", ["paraphrase"])
    assert names_a_label("write :) or :(", [":)"])
    assert not names_a_label("", ["con"])


# --- divisors, plan and preview ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("normalization", ["answer", "token", "task"])
def test_the_weights_of_a_step_with_renamed_episodes_sum_to_one(normalization, targets, tokenizer):
    made = [make_task("animals"), make_task("colours", answer="colour"), replace(make_task("open"), labels=())]
    tasks = {task.name: named(task, tokenizer) for task in made}
    options = EpisodeSettings(token_budget=250, rename_share=0.6)
    lengths = [lengths_of(tasks[name]) for name in sorted(tasks)]
    packs = list(islice(iter_packs(lengths, settings=options, pack_tokens=500, seed=1), 8))
    maker = BatchMaker(tasks, targets=targets, normalization=normalization)
    divisors = count_divisors(packs, tasks=tasks, split="train", targets=targets)
    batches = [maker.make_batch([pack], divisors=divisors) for pack in packs]
    assert sum(len(b.target_positions_N) for b in batches) == divisors.num_targets
    assert sum(float(b.target_weights_N.double().sum()) for b in batches) == pytest.approx(1, abs=1e-6)
    assert [b.num_tokens for b in batches] == [pack.num_tokens for pack in packs]
    assert len({e.names is None for pack in packs for e in pack.episodes}) == 2


def write_config(tmp_path, **episodes):
    config = write_setting(tmp_path)
    return make_config(config.model_dump() | {"episodes": {"token_budget": 160, **episodes}}, source="test")


def test_a_run_counts_what_it_renames_and_measures_nothing_renamed(tmp_path):
    plain = prepare_run(write_config(tmp_path))
    renamed = prepare_run(write_config(tmp_path, rename_share=0.5))
    counts = count_plan(renamed.packs, pack_tokens=160)
    episodes = [e for pack in renamed.packs.packs for e in pack.episodes]
    assert counts["renamed_episodes"] == sum(e.names is not None for e in episodes) > 10
    assert "renamed_episodes" not in count_plan(plain.packs, pack_tokens=160)
    batches = [renamed.packs.collate([item]) for item in renamed.packs]
    assert counts["tokens"] == sum(b.num_tokens for b in batches)
    assert counts["targets"] == sum(len(b.target_positions_N) for b in batches)
    assert counts["answers"] == sum(len(b.answer_shots_A) for b in batches)
    validated = [[e for pack in run.validation[1] for e in pack.episodes] for run in (plain, renamed)]
    for a, b in zip(*validated, strict=True):
        assert (a.task, a.examples.tolist(), a.names, b.names) == (b.task, b.examples.tolist(), None, None)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_build_the_same_renamed_batches(num_workers, tokenizer):
    tasks = {"animals": named(make_task("animals"), tokenizer)}
    options = EpisodeSettings(token_budget=200, rename_share=0.5)
    packs = PackDataset(BatchMaker(tasks), settings=options, pack_tokens=400, packs_per_step=2, num_steps=3, seed=0)
    loader = torch.utils.data.DataLoader(packs, batch_size=2, collate_fn=packs.collate, num_workers=num_workers)
    for place, batch in enumerate(loader):
        expected = packs.collate([packs[2 * place], packs[2 * place + 1]])
        for field in fields(expected):
            a, b = getattr(batch, field.name), getattr(expected, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_shown_says_what_each_label_is_called(tokenizers):
    task = make_task("animals")
    options = EpisodeSettings(token_budget=300, rename_share=1.0)
    drawn = draw_episode(task, tokenizers["bpe"], settings=options)
    held = sorted({task.train[i].answer for i in drawn.episode.examples})
    assert [label for label, _ in drawn.renamed] == held
    names = dict(drawn.renamed)
    answers = [names[task.train[i].answer] for i in drawn.episode.examples]
    assert [text for text, trained in drawn.pieces if trained] == [f"{answer}\n\n" for answer in answers]
    assert drawn.renaming == "renamed episode: " + ", ".join(f"{label} → {name}" for label, name in drawn.renamed)
    assert draw_episode(task, tokenizers["bpe"], settings=EpisodeSettings(token_budget=300)).renaming == ""


@pytest.mark.slow
def test_show_and_the_plan_tell_of_renamed_episodes(tmp_path, capfd):
    config = write_config(tmp_path, rename_share=1.0)
    (tmp_path / "recipe.toml").write_text(dump_config(config))
    code, out, err = run_manyicl(capfd, "show", tmp_path / "recipe.toml")
    assert (code, err) == (0, "")
    drawn = preview_recipe(config)
    assert out.endswith(f"\n{drawn.counts}\n{drawn.renaming}\n")
    console = Console(file=StringIO(), width=200)
    console.print(plan_table(prepare_run(config)))
    assert "49 episodes (49 renamed), " in console.file.getvalue()


@pytest.mark.slow
def test_the_renamed_episodes_shown_are_those_trained(tmp_path):
    config = write_config(tmp_path, rename_share=0.5, rename_to="permuted")
    prepared = prepare_run(config)
    planned = {e.index: (pack, e) for pack in prepared.packs.packs for e in pack.episodes}
    assert len({episode.names is None for _, episode in planned.values()}) == 2
    for number in sorted(planned)[:12]:
        pack, episode = planned[number]
        drawn, batch = preview_recipe(config, number=number), prepared.packs.maker.make_batch([pack])
        assert bool(drawn.renaming) == (episode.names is not None)
        segment = batch.segment_ids_T == batch.episodes.index(number)
        assert batch.input_ids_1T[0, segment].tolist() == drawn.tokens.ids.tolist()


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("rename_share", 1.5, "episodes.rename_share = 1.5: input should be less than or equal to 1"),
        ("rename_share", -0.1, "episodes.rename_share = -0.1: input should be greater than or equal to 0"),
        ("rename_share", float("nan"), "episodes.rename_share = nan: input should be a finite number"),
        ("rename_to", "letters", "episodes.rename_to = 'letters': input should be 'permuted' or 'words'"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(name, value, told):
    values = {"tasks": {"folder": "t"}, "model": {"path": "m"}, "train": {"num_steps": 1}, "episodes": {name: value}}
    with pytest.raises(UserError) as error:
        make_config(values, source="recipe.toml")
    assert str(error.value).startswith(f"recipe.toml: {told}")
    assert "\n" not in str(error.value)


def test_a_recipe_of_an_earlier_version_loads_and_a_warning_says_which_of_its_settings_is_gone():
    values = {"tasks": {"folder": "t"}, "model": {"path": "m"}, "train": {"num_steps": 1}}
    now = make_config(values, source="recipe.toml")
    # Resolved recipes in the folders of old runs name every setting, those that were off too.
    assert make_config({**values, "episodes": {"stratified": False}}, source="recipe.toml") == now
    with pytest.warns(
        UserWarning, match=r"^episodes\.stratified of earlier versions is gone and left out: classes are"
    ):
        assert make_config({**values, "episodes": {"stratified": True}}, source="recipe.toml") == now
