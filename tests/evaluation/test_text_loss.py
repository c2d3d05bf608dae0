"""Bits per byte of neutral text: which windows are read, what they cost, and what measuring it on the way changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.text_loss import (
    TextWindows,
    bits_per_byte,
    drift_every,
    read_windows,
    window_bits,
    window_table,
)
from manyicl.intervals import mean_interval
from manyicl.training.metrics import MetricsLog
from manyicl.training.run import train
from tests.conftest import tiny_model, train_tokenizer
from tests.trajectory.setting import read_metrics, read_weights, write_setting

# Five letters a word; none of them is merged with a blank, so that bytes can be counted by eye.
DOCUMENT = "the red fox runs over a small hill "


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def read_whole(path, tokenizer) -> TextWindows:
    """Return the file as one window."""
    num_tokens = len(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    windows = read_windows(path, tokenizer, window_tokens=num_tokens + 1, num_windows=5)
    assert len(windows.ids) == 1
    return windows


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def no_bos():
    tokenizer = train_tokenizer("bpe")
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    return tokenizer


def test_a_window_begins_with_a_bos_that_is_no_target(tmp_path, tokenizers):
    tokenizer = tokenizers["bpe"]
    windows = read_windows(write(tmp_path / "a.txt", DOCUMENT * 9), tokenizer, window_tokens=12, num_windows=3)
    assert windows.has_bos
    assert windows.file == "a.txt"
    assert [len(ids) for ids in windows.ids][:2] == [12, 12]  # the last one is what the text leaves
    for ids, num_bytes in zip(windows.ids, windows.num_bytes_W, strict=True):
        assert ids.tolist().count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert num_bytes == len(decode(tokenizer, ids[1:]))


def test_without_a_bos_the_first_token_is_no_target_and_its_bytes_do_not_count(tmp_path, no_bos):
    windows = read_windows(write(tmp_path / "a.txt", DOCUMENT * 9), no_bos, window_tokens=12, num_windows=3)
    assert not windows.has_bos
    assert [len(ids) for ids in windows.ids][:2] == [12, 12]
    for ids, num_bytes in zip(windows.ids, windows.num_bytes_W, strict=True):
        assert num_bytes == len(decode(no_bos, ids[1:]))
        assert num_bytes < len(decode(no_bos, ids))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece"])
def test_the_name_of_a_special_token_in_a_text_stays_text(tmp_path, tokenizers, kind):
    """Review C: `</s>` in neutral text was the token that ends a document."""
    tokenizer, text = tokenizers[kind], f"{DOCUMENT}</s> and <s> {DOCUMENT * 3}"
    windows = read_windows(write(tmp_path / "a.txt", text), tokenizer, window_tokens=12, num_windows=50)
    targets = [token for ids in windows.ids for token in ids[1:].tolist()]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id}.isdisjoint(targets)
    # As inputs and answers are written.
    (whole,) = TaskTokenizer(tokenizer, TemplateSettings()).encode_texts([text.strip()])
    assert targets == whole[: len(targets)]
    assert len(targets) > len(whole) - 6


def test_bytes_are_those_of_utf8(tmp_path, tokenizers):
    """Three bytes each: €, 漢, 字; two: ï, é."""
    text = "naïve café costs 3 €, 漢字"
    windows = read_whole(write(tmp_path / "a.txt", text), tokenizers["bpe"])
    assert len(text) == 24
    assert windows.num_bytes_W.tolist() == [24 + 2 + 3 * 2]


def test_all_windows_of_a_file_have_the_bytes_of_the_file(tmp_path, tokenizers):
    """Cut inside characters, too: a byte-level tokenizer writes 漢 as three tokens."""
    text = ("漢字 ünïcödé fox " * 7).strip()
    tokenizer = tokenizers["bpe"]
    num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    size = next(size for size in range(7, 30) if num_tokens % size == 0 or num_tokens % size >= size / 2)
    windows = read_windows(write(tmp_path / "a.txt", text), tokenizer, window_tokens=size + 1, num_windows=1000)
    assert sum(len(ids) - 1 for ids in windows.ids) == num_tokens
    assert windows.num_bytes_W.sum() == len(text.encode())
    assert windows.num_bytes_W.min() > 0


def test_windows_do_not_overlap_and_documents_are_not_joined(tmp_path, tokenizers):
    documents = ["fox " * 20, "owl " * 20]
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(documents))
    windows = read_windows(path, tokenizers["bpe"], window_tokens=9, num_windows=1000)
    texts = [decode(tokenizers["bpe"], ids) for ids in windows.ids]
    assert not [text for text in texts if "fox" in text and "owl" in text]
    assert "".join(text for text in texts if "fox" in text) == documents[0].strip()
    assert not any("endoftext" in text for text in texts)


def test_a_separator_at_an_end_of_the_file_or_beside_another_is_no_text(tmp_path, tokenizers):
    mark, text = "<|endoftext|>", "fox " * 20
    plain = read_whole(write(tmp_path / "a.txt", text), tokenizers["bpe"])
    whole = write(tmp_path / "b.txt", "\n".join([mark, mark, text.strip(), mark, mark]))
    marked = read_windows(whole, tokenizers["bpe"], window_tokens=len(plain.ids[0]), num_windows=5)
    assert [ids.tolist() for ids in marked.ids] == [ids.tolist() for ids in plain.ids]


@pytest.mark.parametrize(("rest", "kept"), [(0, False), (4, False), (5, True), (9, True)])
def test_a_rest_of_a_document_is_a_window_from_half_the_length_on(tmp_path, tokenizers, rest, kept):
    """Digits are a token each to this tokenizer."""
    text = ("0123456789" * 3)[: 20 + rest]
    assert len(tokenizers["unigram"](text, add_special_tokens=False)["input_ids"]) == 20 + rest
    path = write(tmp_path / "a.txt", text)
    windows = read_windows(path, tokenizers["unigram"], window_tokens=11, num_windows=9)
    assert [len(ids) - 1 for ids in windows.ids] == [10, 10, *([rest] if kept else [])]
    assert windows.num_bytes_W.tolist() == [10, 10, *([rest] if kept else [])]


def test_fewer_windows_are_spread_over_the_whole_file(tmp_path, tokenizers):
    path = write(tmp_path / "a.txt", " ".join(f"{n}" for n in range(1000, 1400)))
    every = read_windows(path, tokenizers["bpe"], window_tokens=17, num_windows=10_000)
    few = read_windows(path, tokenizers["bpe"], window_tokens=17, num_windows=3)
    num = len(every.ids)
    assert num > 30
    places = [next(i for i, other in enumerate(every.ids) if np.array_equal(ids, other)) for ids in few.ids]
    assert places == [0, round((num - 1) / 2), num - 1]


def test_text_that_the_tokenizer_cannot_write_is_counted(tmp_path, tokenizers):
    path = write(tmp_path / "a.txt", "the red fox ⛄ runs ☃ over a small hill")
    assert read_whole(path, tokenizers["unigram"]).num_unknown == 2
    assert read_whole(path, tokenizers["bpe"]).num_unknown == 0


def test_a_file_that_has_no_text_is_refused_in_one_line(tmp_path, tokenizers):
    absent, binary = tmp_path / "absent.txt", tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    short = write(tmp_path / "short.txt", "fox\n<|endoftext|>\nowl")
    for path, told in (
        (absent, "cannot be read"),
        (binary, "cannot be read"),
        (short, "has no 32 tokens in one document"),
    ):
        with pytest.raises(UserError) as refused:
            read_windows(path, tokenizers["bpe"], window_tokens=64, num_windows=5)
        message = str(refused.value)
        assert message.startswith(f"compare.text_files: {path}: {told}")
        assert "\n" not in message


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_window_costs_what_transformers_own_loss_says(tmp_path, tokenizers, no_bos, name, bos):
    """Each window alone, by `labels=`, which averages nats over all tokens but the first."""
    tokenizer = tokenizers["bpe"] if bos else no_bos
    path = write(tmp_path / "a.txt", "the red fox runs over 漢字 a small hill. " * 12)
    windows = read_windows(path, tokenizer, window_tokens=24, num_windows=6)
    assert len(windows.ids) == 6
    model = tiny_model(name)
    bits_W = window_bits(model, windows)
    for ids, bits in zip(windows.ids, bits_W, strict=True):
        row = torch.tensor(ids[None].astype(np.int64))
        with torch.no_grad():
            nats = model(input_ids=row, labels=row).loss.item() * (len(ids) - 1)
        assert bits == pytest.approx(nats / math.log(2), rel=1e-5)


def test_windows_in_rows_of_many_cost_what_they_cost_alone(tmp_path, tokenizers, monkeypatch):
    path = write(tmp_path / "a.txt", DOCUMENT * 20)
    windows = read_windows(path, tokenizers["bpe"], window_tokens=24, num_windows=7)
    model = tiny_model("llama")
    together = window_bits(model, windows)
    monkeypatch.setattr("manyicl.evaluation.text_loss.ROW_TOKENS", 1)
    np.testing.assert_allclose(window_bits(model, windows), together, rtol=1e-5)
    assert len(set(together.round(3))) > 1


def test_bits_per_byte_are_all_bits_over_all_bytes():
    windows = TextWindows("a.txt", (), np.array([10, 30]), has_bos=True, num_unknown=0)
    assert bits_per_byte(np.array([30.0, 10.0]), windows) == 1.0  # not (3 + 1/3) / 2


def test_the_interval_of_a_ratio_by_hand():
    """Windows of 10, 20 and 30 bytes that cost 20, 20 and 80 bits: 2 bits a byte; residuals 0, -20 and 20."""
    interval = mean_interval([{"a.txt": window_table(np.array([20.0, 20.0, 80.0]), np.array([10, 20, 30]))}])
    error = math.sqrt(3 / 2 * (0 + 400 + 400)) / 60
    assert interval.mean == pytest.approx(2.0)
    assert interval.high - interval.mean == pytest.approx(4.3026527 * error)  # Student's, two degrees of freedom
    assert interval.mean - interval.low == pytest.approx(4.3026527 * error)


def test_one_window_has_no_interval():
    interval = mean_interval([{"a.txt": window_table(np.array([20.0]), np.array([10]))}])
    assert interval.mean == 2.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.slow
def test_measuring_drift_leaves_records_and_changes_nothing(tmp_path, tokenizers):
    config = write_setting(tmp_path, validation_tokens=0)
    path = write(tmp_path / "neutral.txt", DOCUMENT * 20)
    texts = [read_windows(path, tokenizers["bpe"], window_tokens=24, num_windows=4)]
    train(config, out=tmp_path / "without")
    train(config, out=tmp_path / "with", callbacks=drift_every(texts, steps=4))
    plain, drifting = read_metrics(tmp_path / "without"), read_metrics(tmp_path / "with")
    drift = [record for record in drifting if "drift/neutral.txt" in record]
    assert [record for record in drifting if record not in drift] == plain
    assert [record["step"] for record in drift] == [4, 6]  # every fourth, and the last
    for (name, one), other in zip(
        read_weights(tmp_path / "without").items(), read_weights(tmp_path / "with").values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert len({record["drift/neutral.txt"] for record in drift}) == 2


def test_no_text_makes_no_callback(tmp_path):
    assert drift_every([], steps=4)(MetricsLog(tmp_path / "metrics.jsonl")) == []
