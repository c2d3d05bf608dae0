"""Ids and spans: what is trained decodes to answers and terminators, and what is asked is a prefix of it."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manyicl.episodes.template import TemplateSettings, input_text
from manyicl.episodes.tokenized import (
    TokenizedTask,
    check_lost_answers,
    default_cache_dir,
    join_examples,
    query_ids,
    tokenize_task,
)
from manyicl.episodes.tokenizer import NOT_GIVEN_BACK, TERMINATOR_INSIDE, TaskTokenizer
from manyicl.errors import UserError
from manyicl.tasks.task import SPLITS, Example, Task, load_task
from tests.conftest import SHARED, make_task, needs_shared, train_tokenizer
from tests.episodes.test_template import CHAT_TEMPLATES, MARKED, chat_tokenizer

REAL = [pytest.param(name, marks=[pytest.mark.real_data, needs_shared]) for name in ("stories260K", "TinyStories-656K")]
TRAINED = ["bpe", "unigram", "sentencepiece"]
KINDS = [*TRAINED, *REAL]
STYLES = ["plain", *sorted(CHAT_TEMPLATES)]

INPUTS = [
    "the red fox",
    " leading and trailing ",
    "line one\nline two",
    "ends with a blank line\n\n",
    "a </s> b <s> c <|end_story|> d",
    "Input: nested\nAnswer:\nyes\n\n",
    "naïve café 漢字 — ünïcödé 🦊",
    "x",
    "",
]
ANSWERS = [
    "fox",
    " leading",
    "  two before",
    "trailing ",
    "yes",
    "9.",
    "#### 42",
    "naïve café",
    "漢字",
    "🦊 — €",
    "</s>",
    "one line\nand another",
    "tab\there",
    "1,234 isn ' t .",
    "\nfirst a line feed",
]


def load_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return train_tokenizer(kind) if kind in TRAINED else AutoTokenizer.from_pretrained(SHARED / "models" / kind)


@cache
def task_tokenizer(kind: str, style: str = "plain", **options) -> TaskTokenizer:
    """Return one tokenizer with its frame; nobody changes it."""
    tokenizer = load_tokenizer(kind)
    if style == "plain":
        return TaskTokenizer(tokenizer, TemplateSettings(**options))
    return TaskTokenizer(chat_tokenizer(tokenizer, CHAT_TEMPLATES[style]), TemplateSettings(style="chat", **options))


def task_of(pairs: Sequence[tuple[str, str]], **changes) -> Task:
    """Return a task whose train split is `pairs`; the other splits are empty."""
    examples = tuple(Example(*pair) for pair in pairs)
    task = replace(make_task("by hand"), train=examples, validation=(), test=(), num_rows=len(examples))
    return replace(task, **changes)


ODD_TASK = task_of([(f"{text}{n}", answer) for n, text in enumerate(INPUTS) for answer in ANSWERS])


def draw_indices(tokenized: TokenizedTask, *, num_episodes: int, most: int = 7) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    population = len(tokenized.splits["train"])
    return [rng.choice(population, size=rng.integers(1, most), replace=False) for _ in range(num_episodes)]


# --- what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_token_belongs_to_an_answer_or_its_terminator(kind, style):
    tokenizer = task_tokenizer(kind, style)
    tokenized = tokenize_task(ODD_TASK, tokenizer=tokenizer)
    rows = tokenized.splits["train"].rows
    for indices in draw_indices(tokenized, num_episodes=1000):
        episode = join_examples(tokenized, split="train", indices=indices)
        answers = [ODD_TASK.train[row].answer for row in rows[indices]]
        answers = [answer.strip() for answer in answers] if tokenizer.frame.trims_answers else answers
        told = [tokenizer.decode(episode.ids[start:stop]) for start, stop in episode.spans]
        assert told == [answer + tokenizer.terminator for answer in answers]


@pytest.mark.slow
@pytest.mark.real_data
@needs_shared
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", ["banking77", "gsm8k", "piqa"])
def test_every_trained_token_of_real_tasks_belongs_to_an_answer(kind, name):
    task = load_task(SHARED / "data" / "tasks" / f"{name}.jsonl")
    task = replace(task, train=task.train[:500], validation=(), test=())
    tokenizer = task_tokenizer(kind)
    tokenized = tokenize_task(task, tokenizer=tokenizer)
    train = tokenized.splits["train"]
    assert len(train) + sum(tokenized.dropped["train"].values()) == 500
    episode = join_examples(tokenized, split="train", indices=range(len(train)))
    told = [tokenizer.decode(episode.ids[start:stop]) for start, stop in episode.spans]
    assert told == [task.train[row].answer + "\n\n" for row in train.rows]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_answers_lies_in_spans_and_nothing_but_inputs_between_them(kind):
    tokenizer = task_tokenizer(kind)
    tokenized = tokenize_task(ODD_TASK, tokenizer=tokenizer)
    episode = join_examples(tokenized, split="train", indices=[3, 0, 7])
    texts = [
        input_text(ODD_TASK.train[row].input, settings=tokenizer.settings) for row in tokenized.splits["train"].rows
    ]
    starts = [len(tokenized.head_ids), *episode.spans[:-1, 1]]
    for index, start, stop in zip([3, 0, 7], starts, episode.spans[:, 0], strict=True):
        assert episode.ids[start:stop].tolist() == tokenizer.encode_texts([texts[index]])[0]
    assert episode.spans[-1, 1] == len(episode.ids)
    assert episode.ids[: len(tokenized.head_ids)].tolist() == tokenized.head_ids.tolist()


def special_ids(tokenizer: TaskTokenizer) -> set[int]:
    """Return the ids that the tokenizer's own text can never mean; unknown characters may become <unk>."""
    added = tokenizer.tokenizer.added_tokens_decoder.items()
    known = {i for i, token in added if token.special and not token.content.startswith("<0x")}  # bytes are text
    return known - {tokenizer.tokenizer.unk_token_id}


@pytest.mark.parametrize("style", ["plain", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_written_in_a_row_stays_text(kind, style):
    tokenizer = task_tokenizer(kind, style)
    names = sorted(tokenizer.tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))
    assert len(names) >= 2
    texts = [text for name in names for text in (name, f"a {name} b", f"{name}{name}", f"<{name}>\n", f"/{name[1:]}")]
    texts.append(" ".join(names))
    for ids in tokenizer.encode_texts(texts):
        assert not special_ids(tokenizer) & set(ids)
    instructed = task_of([("a", "b")], instruction=texts[-1])
    opening = tokenizer.head_ids(task_of([("a", "b")], instruction=""))
    assert not special_ids(tokenizer) & set(tokenizer.head_ids(instructed)[len(opening) :].tolist())


@pytest.mark.parametrize("text", ["</s>", "a </s>b", "<s></s>"])
def test_an_end_of_document_written_in_an_answer_is_trained_as_text_or_dropped(text):
    for kind in ("bpe", "sentencepiece"):
        tokenizer = task_tokenizer(kind)
        (ids,) = tokenizer.encode_answers([text])
        assert tokenizer.decode(ids) == text + "\n\n"
    # The vocabulary of the Unigram tokenizer holds `</s>` as a whole, but no `/`.
    assert task_tokenizer("unigram").encode_answers([text]) == [NOT_GIVEN_BACK]


def test_an_answer_with_an_unknown_token_is_dropped_also_where_its_text_names_one():
    assert task_tokenizer("unigram").encode_answers(["漢🦊", "<unk>"]) == [NOT_GIVEN_BACK, NOT_GIVEN_BACK]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
likely_texts = st.text(st.sampled_from("ab 9.\n</s>▁\u00a0é漢🦊\u0301\t;"), max_size=12)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["plain", "chatml", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(answers=st.lists(texts | likely_texts, max_size=6))
def test_an_answer_is_given_back_exactly_or_dropped_for_a_reason(kind, style, answers):
    tokenizer = task_tokenizer(kind, style)
    end = tokenizer.terminator
    for answer, ids in zip(answers, tokenizer.encode_answers(answers), strict=True):
        if ids == TERMINATOR_INSIDE:
            assert (answer + end).index(end) < len(answer)
        elif ids == NOT_GIVEN_BACK:
            plain = tokenizer.encode_texts([answer])[0]
            given_back = tokenizer.decode(plain + tokenizer.terminator_ids) == answer + end
            assert not given_back or tokenizer.tokenizer.unk_token_id in plain
        else:
            assert tokenizer.decode(ids) == answer + end
            assert tokenizer.cut_answer(ids) == (answer, True)
            assert ids[-len(tokenizer.terminator_ids) :] == tokenizer.terminator_ids
            assert not special_ids(tokenizer) & set(ids[: -len(tokenizer.terminator_ids)])


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@settings(max_examples=200, deadline=None)
@given(answer=texts)
def test_tokenizers_that_know_every_byte_drop_no_answer_but_for_its_terminator(kind, answer):
    tokenizer = task_tokenizer(kind)
    # A word-start mark is a space to SentencePiece, so that it alone cannot be given back.
    if "\n" not in answer and "▁" not in answer:
        (ids,) = tokenizer.encode_answers([answer])
        assert not isinstance(ids, str)


DROPS = task_of(
    [
        ("a", "fox"),
        ("b", "ends in a blank line\n\n"),
        ("c", "one\n\ntwo"),
        ("d", "a line feed at the end\n"),  # "\n" + "\n\n" begins with the terminator
        ("e", "漢字🦊"),
        ("f", "owl"),
    ]
)


def test_answers_that_cannot_be_trained_are_dropped_and_counted():
    tokenized = tokenize_task(DROPS, tokenizer=task_tokenizer("unigram"))
    assert tokenized.splits["train"].rows.tolist() == [0, 5]
    assert tokenized.dropped == {"train": {TERMINATOR_INSIDE: 3, NOT_GIVEN_BACK: 1}, "validation": {}, "test": {}}


def test_a_byte_level_tokenizer_drops_the_terminator_alone():
    tokenized = tokenize_task(DROPS, tokenizer=task_tokenizer("bpe"))
    assert tokenized.splits["train"].rows.tolist() == [0, 4, 5]
    assert tokenized.dropped["train"] == {TERMINATOR_INSIDE: 3}


def test_a_chat_answer_is_dropped_for_the_end_of_turn_and_keeps_blank_lines():
    task = task_of([("a", "one\n\ntwo"), ("b", "x<|im_end|>"), ("c", "x<|im_end|>\ny")])
    for name in ("chatml", "marked"):  # the first one's terminator has a line feed after it
        tokenized = tokenize_task(task, tokenizer=task_tokenizer("bpe", name))
        assert tokenized.dropped["train"] == {TERMINATOR_INSIDE: 2}


@pytest.mark.parametrize(
    ("num_bad", "bad", "fault"),
    [
        (0, "", None),
        (2, "one\n\ntwo", None),  # exactly 1 % of 200
        (3, "one\n\ntwo", "3 of 200 rows lost (terminator inside the answer), more than 1%; set template.terminator"),
        (2, "🦊", None),
        (3, "🦊", "3 of 200 rows lost (answer the tokenizer cannot give back), more than 1%; choose a model"),
    ],
)
def test_lost_answers_are_reported_beyond_one_percent(num_bad, bad, fault):
    answers = [bad] * num_bad + ["fox"] * (200 - num_bad)
    examples = tuple(Example(f"input {n}", answer) for n, answer in enumerate(answers))
    task = task_of([], train=examples[::2], validation=examples[1:50:2], test=examples[51::2])
    told = check_lost_answers(tokenize_task(task, tokenizer=task_tokenizer("unigram")))
    if fault is None:
        assert told is None
    else:
        assert told.startswith(f"task 'by hand': {fault}")
        assert "\n" not in told


def test_a_terminator_that_the_tokenizer_cannot_write_is_refused():
    with pytest.raises(UserError, match=r"template\.terminator = '漢漢🦊': this tokenizer cannot write it") as error:
        TaskTokenizer(load_tokenizer("unigram"), TemplateSettings(terminator="漢漢🦊"))
    assert "\n" not in str(error.value)


def test_an_end_of_turn_that_the_tokenizer_cannot_write_is_refused_by_its_own_name(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["unigram"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '🦊' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"template\.style = 'chat': .*'🦊'.*set template\.style = 'plain'"):
        TaskTokenizer(tokenizer, TemplateSettings(style="chat"))


@pytest.mark.parametrize(
    ("generated", "told"),
    [
        ("fox\n\nInput: the", ("fox", True)),
        ("fox.\n\n", ("fox.", True)),
        ("fox\n", ("fox\n", False)),
        ("\n\nfox", ("", True)),
        ("fox\n\n\n", ("fox", True)),
    ],
)
@pytest.mark.parametrize("kind", TRAINED)
def test_a_generated_answer_is_cut_at_its_first_terminator_in_the_text(kind, generated, told):
    tokenizer = task_tokenizer(kind)
    assert tokenizer.cut_answer(tokenizer.encode_texts([generated])[0]) == told


def test_no_texts_have_no_ids():
    assert task_tokenizer("bpe").encode_texts([]) == []
    assert task_tokenizer("bpe").encode_answers([]) == []


# --- what is asked is a prefix of what is trained ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_query_behind_its_shots_is_a_token_prefix_of_training(kind, style):
    tokenized = tokenize_task(ODD_TASK, tokenizer=task_tokenizer(kind, style, labels=True))
    assert (tokenized.num_between > 0) == (style != "plain")
    for indices in draw_indices(tokenized, num_episodes=100, most=9):
        episode = join_examples(tokenized, split="train", indices=indices)
        for k, (index, start) in enumerate(zip(indices, episode.spans[:, 0], strict=True)):
            shots = join_examples(tokenized, split="train", indices=indices[:k])
            query = query_ids(tokenized, split="train", index=index, after_shots=k > 0)
            assert np.array_equal(np.concatenate([shots.ids, query]), episode.ids[:start])
            assert np.array_equal(shots.spans, episode.spans[:k])


@pytest.mark.parametrize("style", STYLES)
def test_the_length_of_a_sequence_is_its_head_and_its_examples_less_one_between(style):
    tokenized = tokenize_task(ODD_TASK, tokenizer=task_tokenizer("bpe", style))
    lengths = tokenized.splits["train"].lengths
    for indices in draw_indices(tokenized, num_episodes=20):
        episode = join_examples(tokenized, split="train", indices=indices)
        assert len(episode.ids) == len(tokenized.head_ids) - tokenized.num_between + lengths[indices].sum()
        assert np.array_equal(np.diff(episode.spans, axis=1)[:, 0], tokenized.splits["train"].answer_lengths[indices])


def test_no_example_leaves_the_head():
    tokenized = tokenize_task(ODD_TASK, tokenizer=task_tokenizer("bpe", "chatml"))
    nothing = join_examples(tokenized, split="train", indices=[])
    assert np.array_equal(nothing.ids, tokenized.head_ids)
    assert nothing.spans.shape == (0, 2)


# --- the grammar -------------------------------------------------------------------------------------------------

TWO = task_of([("a red fox", "fox"), ("a blue owl", "owl")], instruction="Say which animal.")


def written(tokenizer: TaskTokenizer, task: Task = TWO) -> str:
    tokenized = tokenize_task(task, tokenizer=tokenizer)
    return tokenizer.decode(join_examples(tokenized, split="train", indices=range(len(task.train))).ids)


def test_a_plain_sequence_is_bos_instruction_inputs_and_answers():
    assert written(task_tokenizer("bpe")) == (
        "<s>Say which animal.\n\n"
        "Input: a red fox\nAnswer:\nfox\n\n"
        "Input: a blue owl\nAnswer:\nowl\n\n"
    )  # fmt: skip


def test_labels_are_listed_once_where_the_template_says_so():
    assert written(task_tokenizer("bpe", labels=True)).startswith(
        "<s>Say which animal.\nAnswers: cat, dog, fox, owl\n\nInput: a red fox"
    )


def test_an_empty_instruction_writes_nothing():
    task = replace(TWO, instruction="")
    assert written(task_tokenizer("bpe"), task).startswith("<s>Input: a red fox\n")
    assert written(task_tokenizer("bpe", instruction=False)) == written(task_tokenizer("bpe"), task)


def test_a_tokenizer_without_bos_writes_none(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bpe"])
    tokenizer.bos_token = None
    assert written(TaskTokenizer(tokenizer, TemplateSettings())).startswith("Say which animal.\n\n")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_bos_stands_once_and_first_if_the_chat_template_writes_it(kind, style):
    tokenizer = task_tokenizer(kind, style)
    tokenized = tokenize_task(ODD_TASK, tokenizer=tokenizer)
    episode = join_examples(tokenized, split="train", indices=range(len(tokenized.splits["train"])))
    # A chat template writes BOS itself, or there is none.
    expected = [] if style in ("chatml", "marked") else [0]
    assert np.flatnonzero(episode.ids == tokenizer.tokenizer.bos_token_id).tolist() == expected


def test_special_tokens_that_a_tokenizer_adds_by_itself_are_not_written(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bpe"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("a")["input_ids"][0] == 1  # it does add them, unless told otherwise
    assert written(TaskTokenizer(tokenizer, TemplateSettings())) == written(task_tokenizer("bpe"))


def test_spaces_before_punctuation_are_kept_whatever_the_tokenizers_config_says(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["unigram"])
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(tokenizer("the fox .")["input_ids"]) == "the fox."  # it does, unless told otherwise
    assert written(TaskTokenizer(tokenizer, TemplateSettings()), task_of([("a", "the fox .")])).endswith(
        "the fox .\n\n"
    )


def turns_of(task: Task, *, instruction: str) -> list[dict[str, str]]:
    turns = []
    for number, example in enumerate(task.train):
        turns.append({"role": "user", "content": (instruction if number == 0 else "") + example.input})
        turns.append({"role": "assistant", "content": example.answer})
    return turns


@pytest.mark.parametrize("style", sorted(CHAT_TEMPLATES))
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_chat_sequence_is_what_the_chat_template_writes(kind, style):
    tokenizer = task_tokenizer(kind, style)
    rendered = tokenizer.tokenizer.apply_chat_template(
        turns_of(TWO, instruction="Say which animal.\n\n"), tokenize=False
    )
    # Only what the assistant generates is trained: a template that marks it writes one more line feed behind.
    assert rendered == written(tokenizer) + ("\n" if style == "marked" else "")


def test_the_whole_of_a_marked_chat_sequence_is_as_expected():
    assert written(task_tokenizer("bpe", "marked")) == (
        "<|im_start|>user\nSay which animal.\n\na red fox<|im_end|>\n"
        "<|im_start|>assistant\nfox<|im_end|>\n"
        "<|im_start|>user\na blue owl<|im_end|>\n"
        "<|im_start|>assistant\nowl<|im_end|>"
    )


@pytest.mark.parametrize("style", ["chatml", "gemma"])
def test_an_end_of_turn_with_a_line_feed_is_written_by_a_tokenizer_that_marks_word_starts(style):
    # Made alone, the line feed behind the special token would carry a word-start mark and show as a space.
    tokenizer = task_tokenizer("sentencepiece", style)
    turn_id = tokenizer.tokenizer.convert_tokens_to_ids(tokenizer.terminator.strip())
    assert tokenizer.terminator_ids[0] == turn_id
    assert tokenizer.decode(tokenizer.encode_answers(["fox"])[0]) == "fox" + tokenizer.terminator


# --- the cache ---------------------------------------------------------------------------------------------------


def assert_same(one: TokenizedTask, other: TokenizedTask) -> None:
    assert one.task == other.task
    assert one.num_between == other.num_between
    assert one.dropped == other.dropped
    assert_bytes(one.head_ids, other.head_ids)
    assert list(one.splits) == list(other.splits) == list(SPLITS)
    for split in SPLITS:
        for name in ("ids", "starts", "answer_starts", "rows"):
            assert_bytes(getattr(one.splits[split], name), getattr(other.splits[split], name))


def assert_bytes(one: np.ndarray, other: np.ndarray) -> None:
    assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def forbid_tokenizing(monkeypatch) -> None:
    def refuse(self, examples):
        raise AssertionError("tokenised although the cache holds it")

    monkeypatch.setattr(TaskTokenizer, "tokenize_examples", refuse)


CACHED_TASKS = {
    "odd": ODD_TASK,
    "three splits": make_task("animals"),
    "rows dropped": DROPS,
    "no examples": task_of([]),
    "all dropped": task_of([("a", "\n\n")]),
}


@pytest.mark.parametrize("style", ["plain", "chatml"])
@pytest.mark.parametrize("name", sorted(CACHED_TASKS))
def test_a_task_read_from_the_cache_is_byte_for_byte_the_fresh_one(name, style, tmp_path, monkeypatch):
    task, tokenizer = CACHED_TASKS[name], task_tokenizer("bpe", style)
    fresh = tokenize_task(task, tokenizer=tokenizer)
    assert_same(tokenize_task(task, tokenizer=tokenizer, cache_dir=tmp_path), fresh)
    forbid_tokenizing(monkeypatch)
    read = tokenize_task(task, tokenizer=tokenizer, cache_dir=tmp_path)
    assert_same(read, fresh)
    assert not read.splits["train"].ids.flags.writeable  # it lies in the mapped file, not in memory of its own
    assert not read.splits["train"].ids.flags.owndata


def test_a_changed_byte_in_the_cache_is_no_other_token(tmp_path):
    """Arrow does not find it: it was trained on, or blamed on the tokenizer."""
    task, tokenizer = make_task("animals"), task_tokenizer("bpe", "plain")
    fresh = tokenize_task(task, tokenizer=tokenizer, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.read_bytes()
    at = written.index(fresh.splits["train"].ids.tobytes())
    file.unlink()  # the arrays of `fresh` may lie in it
    file.write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
    assert_same(tokenize_task(task, tokenizer=tokenizer, cache_dir=tmp_path), fresh)
    assert file.read_bytes() == written


def test_sequences_of_a_mapped_task_are_those_of_a_fresh_one_and_may_be_changed(tmp_path):
    tokenizer = task_tokenizer("bpe", "chatml")
    fresh, read = (tokenize_task(ODD_TASK, tokenizer=tokenizer, cache_dir=d) for d in (None, tmp_path))
    read = tokenize_task(ODD_TASK, tokenizer=tokenizer, cache_dir=tmp_path)
    for indices in draw_indices(fresh, num_episodes=20):
        one, other = (join_examples(t, split="train", indices=indices) for t in (fresh, read))
        assert_bytes(one.ids, other.ids)
        assert_bytes(one.spans, other.spans)
        other.ids[0] = 0
    assert_same(tokenize_task(ODD_TASK, tokenizer=tokenizer, cache_dir=tmp_path), fresh)


def with_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def without_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.bos_token = None
    return tokenizer


ONE_MORE = replace(make_task("animals"), sha256="another content")
CHANGES = {
    "the task's content": lambda t: (ONE_MORE, TaskTokenizer(t, TemplateSettings())),
    "the input segment": lambda t: (make_task("animals"), TaskTokenizer(t, TemplateSettings(input="{input}:"))),
    "the terminator": lambda t: (make_task("animals"), TaskTokenizer(t, TemplateSettings(terminator="\n"))),
    "the instruction": lambda t: (make_task("animals"), TaskTokenizer(t, TemplateSettings(instruction=False))),
    "the labels": lambda t: (make_task("animals"), TaskTokenizer(t, TemplateSettings(labels=True))),
    "the style": lambda t: (make_task("animals"), TaskTokenizer(chat_tokenizer(t, MARKED), TemplateSettings())),
    "the vocabulary": lambda t: (make_task("animals"), TaskTokenizer(with_token(t), TemplateSettings())),
    "the BOS": lambda t: (make_task("animals"), TaskTokenizer(without_bos(t), TemplateSettings())),
    "the tokenizer": lambda t: (make_task("animals"), task_tokenizer("unigram")),
}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_what_decides_the_ids_changes_the_cache_file(what, tmp_path, tokenizers):
    tokenize_task(make_task("animals"), tokenizer=task_tokenizer("bpe"), cache_dir=tmp_path)
    task, tokenizer = CHANGES[what](copy.deepcopy(tokenizers["bpe"]))
    tokenized = tokenize_task(task, tokenizer=tokenizer, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(tokenized, tokenize_task(task, tokenizer=tokenizer))


def test_chat_templates_that_write_otherwise_have_their_own_cache_files(tmp_path):
    for style in CHAT_TEMPLATES:
        tokenize_task(TWO, tokenizer=task_tokenizer("bpe", style), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(CHAT_TEMPLATES)


def test_padding_and_truncation_that_a_caller_left_on_change_nothing(tmp_path, tokenizers):
    fresh = tokenize_task(make_task("animals"), tokenizer=task_tokenizer("bpe"), cache_dir=tmp_path)
    tokenizer = copy.deepcopy(tokenizers["bpe"])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    again = TaskTokenizer(tokenizer, TemplateSettings())
    assert_same(tokenize_task(make_task("animals"), tokenizer=again), fresh)
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert_same(tokenize_task(make_task("animals"), tokenizer=again, cache_dir=tmp_path), fresh)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_no_cache_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=r"cannot be cached there .No space left on device.; set MANYICL_CACHE"):
            tokenize_task(TWO, tokenizer=task_tokenizer("bpe"), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    tokenize_task(TWO, tokenizer=task_tokenizer("bpe"), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def other_table() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"ids": [1, 2, 3]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


DAMAGES = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half": lambda content: content[: len(content) // 2],
    "last byte lost": lambda content: content[:-1],
    "zeros at the end": lambda content: content[:-64] + bytes(64),
    "all zeros": lambda content: bytes(len(content)),
    "another file": lambda content: b'{"not": "arrow"}',
    "another table": lambda content: other_table(),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_cache_file_counts_as_absent_and_is_written_again(damage, tmp_path, monkeypatch):
    tokenizer = task_tokenizer("bpe")
    fresh = tokenize_task(DROPS, tokenizer=tokenizer, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(DAMAGES[damage](whole))
    assert_same(tokenize_task(DROPS, tokenizer=tokenizer, cache_dir=tmp_path), fresh)
    assert path.read_bytes() == whole
    forbid_tokenizing(monkeypatch)
    assert_same(tokenize_task(DROPS, tokenizer=tokenizer, cache_dir=tmp_path), fresh)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole, at: whole[:at],
        # Arrow trusts the offsets in a file, and a wrong one ended the process.
        lambda whole, at: whole[:at] + bytes([whole[at] ^ 128]) + whole[at + 1 :],
    ],
    ids=["cut", "a changed bit"],
)
def test_a_cache_file_damaged_anywhere_counts_as_absent(tmp_path, damage):
    tokenizer = task_tokenizer("bpe")
    fresh = tokenize_task(TWO, tokenizer=tokenizer, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.unlink()
        path.write_bytes(damage(whole, at))
        assert_same(tokenize_task(TWO, tokenizer=tokenizer, cache_dir=tmp_path), fresh)
        assert path.read_bytes() == whole


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", "one")
    monkeypatch.setenv("XDG_CACHE_HOME", "two")
    assert default_cache_dir() == Path("one")
    monkeypatch.delenv("MANYICL_CACHE")
    assert default_cache_dir() == Path("two/manyicl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "manyicl"


def test_a_tokenised_task_travels_to_another_process(tmp_path):
    # A worker that is not forked (macOS, Windows, Python 3.14) gets its task pickled.
    tokenizer = task_tokenizer("bpe")
    tokenize_task(DROPS, tokenizer=tokenizer, cache_dir=tmp_path)
    for tokenized in (tokenize_task(DROPS, tokenizer=tokenizer, cache_dir=d) for d in (None, tmp_path)):
        assert_same(pickle.loads(pickle.dumps(tokenized)), tokenized)


def test_a_saved_tokenizer_has_the_same_fingerprint(tmp_path, tokenizers):
    tokenizers["bpe"].save_pretrained(tmp_path)
    again = TaskTokenizer(AutoTokenizer.from_pretrained(tmp_path), TemplateSettings())
    assert again.fingerprint == task_tokenizer("bpe").fingerprint


# Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINED)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_any_ids_are_decoded_as_transformers_does(tokenizers, kind, ids):
    tokenizer = tokenizers[kind]
    theirs = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert TaskTokenizer(tokenizer, TemplateSettings()).decode(ids) == theirs


def test_a_tokenizer_that_decodes_its_own_way_is_asked_itself(tokenizers):
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    tokenizer = Shouting(tokenizer_object=tokenizers["bpe"].backend_tokenizer)
    own = TaskTokenizer(tokenizers["bpe"], TemplateSettings(terminator="\n\n"))
    ids = own.encode_texts(["owl"])[0]
    assert (own.decode(ids), TaskTokenizer(tokenizer, TemplateSettings()).decode(ids)) == ("owl", "OWL")


def test_bos_is_told_once_if_the_tokenizer_is_set_to_write_none_trial_51(tmp_path, caplog):
    train_tokenizer("bpe").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    TaskTokenizer(tokenizer, TemplateSettings())
    assert not caplog.records  # nothing is set
    (tmp_path / "other").mkdir()
    train_tokenizer("bpe").save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": False}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    for _ in range(2):
        writer = TaskTokenizer(tokenizer, TemplateSettings())
    assert writer.bos_ids == [tokenizer.bos_token_id]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(
        f"{tmp_path / 'other'}: its tokenizer says add_bos_token = false, but here every sequence begins with '<s>'"
    )


def test_named_chat_templates_without_a_default_are_refused_in_one_line_trial_55():
    tokenizer = copy.deepcopy(train_tokenizer("bpe"))
    tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    with pytest.raises(UserError, match=r"has several chat templates \(rag, tool_use\), none called 'default'; save"):
        TaskTokenizer(tokenizer, TemplateSettings(style="chat"))
