"""How much a model forgets: bits per byte of neutral text before, during and after training.

A text file holds documents, separated by lines `<|endoftext|>`; without such a line it is one document. Each is
tokenised without special tokens (a `</s>` that it happens to contain stays text) and cut into windows of a fixed number
of tokens that do not overlap; the rest at a document's end is a window too, if it is at least half as long. Each window
follows a BOS if the tokenizer has one, and nothing else. Its tokens are the targets, except the first if there is no
BOS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from manyicl.episodes import Batch, TokenizedEpisode, join_row
from manyicl.errors import UserError
from manyicl.intervals import Table
from manyicl.models import device_of, float32_head, row_attention, row_loss
from manyicl.training import MetricsLog

DOCUMENT_END = "<|endoftext|>"
# Windows go through the model in rows of about this many tokens.
ROW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class TextWindows:
    """Windows of one text file, evenly spread over it."""

    file: str
    """Name of the file."""
    ids: tuple[NDArray[np.int32], ...]
    """One array of token ids per window, with its BOS if there is one."""
    num_bytes_W: NDArray[np.int64]
    """UTF-8 bytes of each window's targets, (W,)."""
    has_bos: bool
    """Whether windows begin with a BOS."""
    num_unknown: int
    """Target tokens that stand for text the tokenizer cannot write."""


def read_windows(path: Path, tokenizer: Any, *, window_tokens: int, num_windows: int) -> TextWindows:
    """Return up to `num_windows` windows of a text file, evenly spread over all that it has.

    Raises:
        UserError: the file cannot be read, or has no window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"compare.text_files: {path}: cannot be read ({error}); give UTF-8 text files") from error
    bos = tokenizer.bos_token_id
    windows = []
    for document in re.split(f"^{re.escape(DOCUMENT_END)}$", text, flags=re.MULTILINE):
        if document.strip():
            windows += _cut_document(document.strip(), tokenizer, window_tokens=window_tokens - (bos is not None))
    if not windows:
        raise UserError(
            f"compare.text_files: {path}: has no {window_tokens // 2} tokens in one document; give more text"
        )
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(num_windows, len(windows))).round().astype(int))
    first = 0 if bos is not None else 1  # without a BOS nothing predicts the first token
    ids, num_bytes, num_unknown = [], [], 0
    for place in chosen:
        window_ids, ends = windows[place]
        targets = window_ids[first:]
        num_unknown += sum(token == tokenizer.unk_token_id for token in targets)
        ids.append(np.asarray(([bos] if bos is not None else []) + window_ids, dtype=np.int32))
        num_bytes.append(ends[-1] - ends[first])
    return TextWindows(path.name, tuple(ids), np.asarray(num_bytes, dtype=np.int64), bos is not None, num_unknown)


def _cut_document(text: str, tokenizer: Any, *, window_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Return each window's ids, and the UTF-8 bytes at which its tokens begin, with the end of the last one."""
    ids, firsts = _encode_text(text, tokenizer)
    num_bytes = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    starts = [int(num_bytes[first]) for first in firsts] + [int(num_bytes[-1])]
    cuts = range(0, len(ids), window_tokens)
    windows = [(ids[cut : cut + window_tokens], starts[cut : cut + window_tokens + 1]) for cut in cuts]
    return [window for window in windows if len(window[0]) >= max(2, window_tokens // 2)]


def _encode_text(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a document and where in it each begins; special tokens are read as text."""
    specials = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    names = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")

    def encode(start: int, stop: int) -> tuple[list[int], list[int]]:
        encoded = tokenizer(
            text[start:stop],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        return encoded["input_ids"], [start + first for first, _ in encoded["offset_mapping"]]

    ids, firsts = encode(0, len(text))
    found = [name for name in names.finditer(text) if specials[name[0]] in ids]
    if found:  # a vocabulary may hold them as pieces too: cut in two, their names are not found in it
        cuts = [0, *(name.start() + 1 for name in found), len(text)]
        parts = [encode(start, stop) for start, stop in pairwise(cuts)]
        ids, firsts = [i for part, _ in parts for i in part], [first for _, part in parts for first in part]
    return ids, firsts


@torch.inference_mode()
def window_bits(model: Any, windows: TextWindows) -> NDArray[np.float64]:
    """Return the bits that each window's targets cost, (W,)."""
    bits: list[float] = []
    text, longest = np.concatenate(windows.ids), max(map(len, windows.ids))
    with row_attention(model, text, longest=longest), float32_head(model):
        for row in _fill_rows(windows):
            batch = _text_row(row).to(device_of(model))
            nll_A: Tensor = row_loss(model, batch).nll_A
            bits += (nll_A.double() / math.log(2)).tolist()
    return np.asarray(bits)


def _fill_rows(windows: TextWindows) -> list[list[NDArray[np.int32]]]:
    rows: list[list[NDArray[np.int32]]] = [[]]
    for ids in windows.ids:
        if rows[-1] and sum(map(len, rows[-1])) + len(ids) > ROW_TOKENS:
            rows.append([])
        rows[-1].append(ids)
    return rows


def _text_row(windows: Sequence[NDArray[np.int32]]) -> Batch:
    """Return windows as the segments of one row, each one answer from its second token on."""
    built = [TokenizedEpisode(ids, np.array([[1, len(ids)]], dtype=np.int64)) for ids in windows]
    weights = [np.ones(1) for _ in built]
    return join_row(built, targets="all", weights=weights, tasks=[0] * len(built), episodes=tuple(range(len(built))))


def bits_per_byte(bits_W: NDArray[np.float64], windows: TextWindows) -> float:
    """Return all bits over all bytes."""
    return float(bits_W.sum() / windows.num_bytes_W.sum())


def window_table(bits_W: NDArray[np.float64], num_bytes_W: NDArray[np.int64]) -> Table:
    """Return bits per byte as the mean of a table with a column per window, for intervals; of a paired difference too.

    A ratio of sums (Cochran 1977, Sampling Techniques, ch. 6): the mean is all bits over all bytes, and each window's
    value is off the mean by its bits beyond that ratio, over the average number of bytes.
    """
    ratio = float(bits_W.sum() / num_bytes_W.sum())
    values_W = ratio + (bits_W - ratio * num_bytes_W) / float(num_bytes_W.mean())
    return Table(values_W[None, :], tuple(map(str, range(len(values_W)))))


class DriftCallback(TrainerCallback):
    """Measures bits per byte every `steps` steps of training, and keeps them in metrics.jsonl as `drift/<file>`."""

    def __init__(self, texts: Sequence[TextWindows], *, steps: int, metrics: MetricsLog) -> None:
        self.texts, self.steps, self.metrics = texts, steps, metrics

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Measure after every `steps` steps, and after the last."""
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        if not state.is_world_process_zero:
            return
        was_training = model.training
        model.eval()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):  # as the steps are taken
            drift = {f"drift/{text.file}": bits_per_byte(window_bits(model, text), text) for text in self.texts}
        model.train(was_training)
        self.metrics.append({"step": state.global_step, **drift})


def drift_every(texts: Sequence[TextWindows], *, steps: int) -> Callable[[MetricsLog], Sequence[TrainerCallback]]:
    """Return a function that makes a run's callbacks: one that measures drift, or none without a text."""
    return lambda metrics: [DriftCallback(texts, steps=steps, metrics=metrics)] if texts else []
