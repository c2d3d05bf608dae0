"""A task's rows as token ids: flat arrays, one cache file per task, and examples joined into sequences."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manyicl.episodes.plan import TaskLengths
from manyicl.episodes.renaming import LabelNames, collect_names
from manyicl.episodes.tokenizer import NOT_GIVEN_BACK, TERMINATOR_INSIDE, ExampleTokens, TaskTokenizer
from manyicl.errors import UserError
from manyicl.files import write_atomically
from manyicl.tasks import SPLITS, Task, with_template

# A task that loses more than this fraction of its rows, because of their answers, is not the task that was meant.
MAX_LOST_SHARE = 0.01
# Of BLAKE2b; also the alignment that Arrow wants of the arrays that follow.
_DIGEST_BYTES = 64


@dataclass(frozen=True, slots=True)
class TokenizedTask:
    """One task in token ids."""

    task: Task
    head_ids: NDArray[np.int32]
    """Ids before the first example of every sequence: BOS, the frame's opening, the instruction."""
    num_between: int
    """Tokens before an input if another example precedes it; 0 in the plain style."""
    splits: Mapping[str, ExampleTokens]
    dropped: Mapping[str, Mapping[str, int]]
    """Split -> reason -> number of examples left out."""
    names: LabelNames | None = None
    """Names of its labels in renamed episodes; only `with_names` sets them."""
    wordings: tuple[ExampleTokens, ...] = ()
    """The train split as each further template of the task writes it; only `with_wordings` sets them."""

    def tokens_of(self, split: str, *, template: int = 0) -> ExampleTokens:
        """Return the examples of a split in one of the task's templates; others than the first are of train alone."""
        assert not template or split == "train", "only training draws templates"
        return self.wordings[template - 1] if template else self.splits[split]

    @property
    def num_ids(self) -> int:
        """One more than the largest id: the rows that an embedding needs at least."""
        examples = (*self.splits.values(), *self.wordings)
        return 1 + max(int(ids.max(initial=0)) for ids in (self.head_ids, *(tokens.ids for tokens in examples)))


@dataclass(frozen=True, slots=True)
class TokenizedEpisode:
    """One training sequence in token ids."""

    ids: NDArray[np.int32]
    """(T,)."""
    spans: NDArray[np.int64]
    """(K, 2), the range [start, stop) of each answer, terminator included."""


def tokenize_task(task: Task, *, tokenizer: TaskTokenizer, cache_dir: Path | None = None) -> TokenizedTask:
    """Return `task` in ids, from the cache if the same text has been tokenised before.

    cache_dir: folder of the cache's Arrow files; None uses no cache.

    Raises:
        UserError: the cache cannot be written.
    """
    if cache_dir is None:
        return _tokenize_splits(task, tokenizer)
    key = hashlib.sha256(f"{task.sha256}\0{tokenizer.fingerprint}".encode()).hexdigest()[:32]
    path = cache_dir / f"{key}.arrow"
    try:
        return _read_cache(path, task, tokenizer)
    except (OSError, ValueError):  # absent, or damaged
        tokenized = _tokenize_splits(task, tokenizer)
    try:
        _write_cache(path, tokenized)
    except OSError as error:
        raise UserError(
            f"{cache_dir}: tokenised tasks cannot be cached there ({error.strerror or error}); set MANYICL_CACHE to a"
            " folder that can be written"
        ) from error
    return tokenized


def with_names(tokenized: TokenizedTask, *, tokenizer: TaskTokenizer) -> TokenizedTask:
    """Return the task with names for its labels; without names if it has no labels to rename."""
    names = collect_names(
        tokenized.task,
        rows={split: tokens.rows for split, tokens in tokenized.splits.items()},
        encode_answers=tokenizer.encode_answers,
        head_ids=tokenizer.head_ids(tokenized.task, renamed=True),
    )
    return replace(tokenized, names=names)


def with_wordings(
    tokenized: TokenizedTask, *, tokenizer: TaskTokenizer, cache_dir: Path | None = None
) -> TokenizedTask:
    """Return the task with its train rows in all of its templates, from which training draws; most tasks have one."""
    task = tokenized.task
    wordings = []
    for number in range(2, len(task.templates) + 1):
        again = tokenize_task(with_template(task, number), tokenizer=tokenizer, cache_dir=cache_dir)
        tokens = again.splits["train"]
        # Which rows are left out depends on their answers alone, which all templates share.
        assert np.array_equal(tokens.rows, tokenized.splits["train"].rows)
        wordings.append(tokens)
    return replace(tokenized, wordings=tuple(wordings))


def check_lost_answers(tokenized: TokenizedTask) -> str | None:
    """Return None, or if too many rows are lost because of their answers, one line that says so and how to fix it."""
    task = tokenized.task
    num_examples = sum(len(getattr(task, split)) for split in SPLITS)
    for reason in (TERMINATOR_INSIDE, NOT_GIVEN_BACK):
        lost = sum(dropped.get(reason, 0) for dropped in tokenized.dropped.values())
        if lost > MAX_LOST_SHARE * num_examples:
            fix = (
                "set template.terminator to a text that no answer contains"
                if reason == TERMINATOR_INSIDE
                else "choose a model whose tokenizer knows these characters"
            )
            return (
                f"task '{task.name}': {lost:,} of {num_examples:,} rows lost ({reason}), more than"
                f" {MAX_LOST_SHARE:.0%}; {fix}, or leave the task out"
            )
    return None


def default_cache_dir() -> Path:
    """Return the folder where tokenised tasks are cached: $MANYICL_CACHE, else the user's cache folder."""
    root = os.environ.get("MANYICL_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyicl"


def join_examples(
    tokenized: TokenizedTask,
    *,
    split: str,
    indices: Iterable[int] | NDArray[np.int32],
    names: NDArray[np.int32] | None = None,
    template: int = 0,
) -> TokenizedEpisode:
    """Return the sequence of the examples `indices` (into the split's ExampleTokens), in this order.

    names: in a renamed episode, the name of each label (`Episode.names`). template: which of the task's templates
    writes them, from 0.
    """
    tokens = tokenized.tokens_of(split, template=template)
    chosen = np.asarray(list(indices) if not isinstance(indices, np.ndarray) else indices, dtype=np.int64)
    if names is not None:
        return _join_renamed(tokenized, tokens, split=split, chosen=chosen, names=names)
    starts = tokens.starts[chosen].copy()
    stops = tokens.starts[chosen + 1]
    answer_lengths = stops - tokens.answer_starts[chosen]
    if len(chosen):
        starts[0] += tokenized.num_between
    pieces = [tokenized.head_ids, *(tokens.ids[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True))]
    ends = len(tokenized.head_ids) + np.cumsum(stops - starts)
    return TokenizedEpisode(ids=np.concatenate(pieces), spans=np.stack([ends - answer_lengths, ends], axis=1))


def _join_renamed(
    tokenized: TokenizedTask,
    tokens: ExampleTokens,
    *,
    split: str,
    chosen: NDArray[np.int64],
    names: NDArray[np.int32],
) -> TokenizedEpisode:
    known = tokenized.names
    assert known is not None, "only a task with names has renamed episodes"
    starts, answer_starts = tokens.starts[chosen].copy(), tokens.answer_starts[chosen]
    if len(chosen):
        starts[0] += tokenized.num_between
    answers = [known.ids[name] for name in names[known.label_of[split][chosen]].tolist()]
    pieces = [known.head_ids]
    for start, stop, answer in zip(starts.tolist(), answer_starts.tolist(), answers, strict=True):
        pieces += [tokens.ids[start:stop], answer]
    answer_lengths = np.asarray([len(answer) for answer in answers], dtype=np.int64)
    ends = len(known.head_ids) + np.cumsum(answer_starts - starts + answer_lengths)
    return TokenizedEpisode(ids=np.concatenate(pieces), spans=np.stack([ends - answer_lengths, ends], axis=1))


def answer_lengths_of(
    tokenized: TokenizedTask, *, split: str, indices: NDArray[np.int32], names: NDArray[np.int32] | None
) -> NDArray[np.int64]:
    """Return the number of tokens of examples' answers as `join_examples` writes them, terminators included."""
    if names is None:
        return tokenized.splits[split].answer_lengths[indices]
    assert tokenized.names is not None, "only a task with names has renamed episodes"
    return tokenized.names.name_tokens[names[tokenized.names.label_of[split][indices]]]


def input_segments(
    tokenized: TokenizedTask,
    *,
    split: str,
    indices: Sequence[int] | NDArray[np.int64],
    after_shots: bool,
    template: int = 0,
) -> list[NDArray[np.int32]]:
    """Return the input segment of each example: what the model gets after the shots (or the head) to answer it."""
    tokens, chosen = tokenized.tokens_of(split, template=template), np.asarray(indices, dtype=np.int64)
    starts = tokens.starts[chosen] + (0 if after_shots else tokenized.num_between)
    return [tokens.ids[a:b] for a, b in zip(starts.tolist(), tokens.answer_starts[chosen].tolist(), strict=True)]


def query_ids(
    tokenized: TokenizedTask, *, split: str, index: int, after_shots: bool, template: int = 0
) -> NDArray[np.int32]:
    """Return the input segment of one example."""
    return input_segments(tokenized, split=split, indices=[index], after_shots=after_shots, template=template)[0]


def _tokenize_splits(task: Task, tokenizer: TaskTokenizer) -> TokenizedTask:
    splits, dropped = {}, {}
    for split in SPLITS:
        splits[split], dropped[split] = tokenizer.tokenize_examples(getattr(task, split))
    return _make_task(task, tokenizer, splits, dropped)


def _make_task(
    task: Task,
    tokenizer: TaskTokenizer,
    splits: Mapping[str, ExampleTokens],
    dropped: Mapping[str, Mapping[str, int]],
) -> TokenizedTask:
    return TokenizedTask(
        task=task,
        head_ids=tokenizer.head_ids(task),
        num_between=len(tokenizer.between_ids),
        splits=dict(splits),
        dropped=dict(dropped),
    )


def _write_cache(path: Path, tokenized: TokenizedTask) -> None:
    """Write a digest, then the arrays of all splits as an Arrow file, with the counts of dropped rows as metadata."""
    columns: dict[str, Any] = {}
    for split, tokens in tokenized.splits.items():
        columns[f"{split}.ids"] = tokens.ids
        columns[f"{split}.starts"] = tokens.starts
        columns[f"{split}.answer_starts"] = tokens.answer_starts
        columns[f"{split}.rows"] = tokens.rows
    # Columns must have one length, and the arrays have several: so the table has one row, each array a list in a cell.
    arrays = [pa.array([values], type=pa.large_list(pa.from_numpy_dtype(values.dtype))) for values in columns.values()]
    dropped = json.dumps({split: dict(counts) for split, counts in tokenized.dropped.items()})
    table = pa.table(arrays, names=list(columns)).replace_schema_metadata({"dropped": dropped})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    write_atomically(path, hashlib.blake2b(content).digest() + content)


def _read_cache(path: Path, task: Task, tokenizer: TaskTokenizer) -> TokenizedTask:
    """Read a cache file without copying: the arrays point into the memory-mapped file.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged.
    """
    whole = memoryview(pa.memory_map(str(path)).read_buffer())
    content = whole[_DIGEST_BYTES:]
    # Before Arrow reads it: a changed byte may be another token, or an offset outside the file, which ends the process.
    if bytes(whole[:_DIGEST_BYTES]) != hashlib.blake2b(content).digest():
        raise ValueError(f"{path}: damaged")
    table = pa.ipc.open_file(pa.py_buffer(content)).read_all()

    def column(name: str) -> NDArray[Any]:
        values: NDArray[Any] = table.column(name).chunk(0).values.to_numpy(zero_copy_only=True)
        return values

    splits = {
        split: ExampleTokens(
            ids=column(f"{split}.ids"),
            starts=column(f"{split}.starts"),
            answer_starts=column(f"{split}.answer_starts"),
            rows=column(f"{split}.rows"),
        )
        for split in SPLITS
    }
    return _make_task(task, tokenizer, splits, json.loads(table.schema.metadata[b"dropped"]))


def lengths_of(tokenized: TokenizedTask, *, split: str = "train") -> TaskLengths:
    """Return what the plan of episodes needs to know of one split of a tokenised task."""
    return TaskLengths(
        name=tokenized.task.name,
        num_head_tokens=len(tokenized.head_ids),
        num_between=tokenized.num_between,
        lengths=tokenized.splits[split].lengths,
        labels=tokenized.names.lengths(split) if tokenized.names else None,
        wordings=tuple(tokens.lengths for tokens in tokenized.wordings) if split == "train" else (),
    )
