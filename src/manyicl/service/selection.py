"""A served task in ids, and which of its examples are shown before an input, in which order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import ExampleTokens, TaskTokenizer, TokenizedTask, check_lost_answers
from manyicl.inference import (
    InferenceModel,
    InputIndex,
    most_answer_tokens,
    pick_nearest,
    prefix_lengths,
    write_answers,
)
from manyicl.models import check_vocabulary
from manyicl.seeds import make_seed
from manyicl.service.library import Library, ServedExample, TaskRecord
from manyicl.service.refusals import BadExamples, InputTooLong, UnknownExample
from manyicl.service.settings import CPU_SHOT_TOKENS, ShotChoice
from manyicl.tasks import Example, Task

# Tasks whose ids are kept in memory; more are tokenised again when they are asked for.
_MOST_TASKS = 64
# Part of the window that is left for examples that come later, so that the prefix of a full window can be extended.
TAIL_SHARE = 0.1
# Room that is left for an input after the shots, as part of the window; a longer input gets fewer shots.
_INPUT_SHARE = 0.25
# The nearest examples are at most so many, and take at most this part of the room for shots.
MOST_NEAREST = 16
_NEAREST_SHARE = 0.34

Piece = tuple[NDArray[np.int32], int]  # ids of an example, and where its answer begins
Order = NDArray[np.int64]  # indices into the usable examples


@dataclass(frozen=True, eq=False)
class TaskIds:
    """A task in ids, at one version."""

    record: TaskRecord
    examples: tuple[ServedExample, ...]
    """All of them, by id."""
    tokenized: TokenizedTask
    """Its train split holds the usable ones; `rows` are indices into `examples`."""
    labels: Sequence[tuple[str, Sequence[int]]]
    """Its fixed answers with their ids, in one object, so that queries share one trie; () for open answers."""
    max_tokens: int
    """The model's window."""
    most_shot_tokens: int | None = None
    """Most tokens of shots if a request does not count them; None: as many as fit."""
    orders: dict[Any, Any] = field(default_factory=dict)
    """What was worked out once: orders by choice, the index of inputs."""

    @property
    def tokens(self) -> ExampleTokens:
        """The usable examples."""
        return self.tokenized.splits["train"]

    @property
    def limit(self) -> int:
        """Most tokens of an answer, if a request does not say."""
        return most_answer_tokens(self.tokenized, self.labels or None)

    @property
    def input_room(self) -> int:
        """Tokens that are left for an input after the shots."""
        lengths = self.tokens.lengths - self.tokens.answer_lengths
        longest = int(lengths.max()) if len(lengths) else 0
        return min(max(64, longest + longest // 4), int(_INPUT_SHARE * self.max_tokens))

    @property
    def shot_room(self) -> int:
        """Most tokens of the head and the shots, if neither input nor answer is longer than usual."""
        return max(len(self.tokenized.head_ids), self.max_tokens - self.limit - self.input_room)

    @property
    def usual_room(self) -> int:
        """The same if a request does not count its shots."""
        if self.most_shot_tokens is None:
            return self.shot_room
        return min(self.shot_room, len(self.tokenized.head_ids) + self.most_shot_tokens)

    def example_of(self, index: int) -> ServedExample:
        """Return the example at an index into the usable ones."""
        return self.examples[int(self.tokens.rows[index])]

    def ids_of(self, order: Sequence[int] | Order) -> tuple[int, ...]:
        """Return the ids of examples by their indices."""
        return tuple(self.example_of(int(index)).id for index in order)


class TaskBook:
    """The tasks of a library in ids; each version is tokenised once, and only what is new in it.

    shot_tokens: `ServiceSettings.shot_tokens`.
    """

    def __init__(self, library: Library, model: InferenceModel, *, shot_tokens: int | None = None) -> None:
        self.library, self.model = library, model
        self._most_shot_tokens = shot_tokens if shot_tokens is not None or not model.on_cpu else CPU_SHOT_TOKENS
        self._lock = threading.Lock()
        self._known: OrderedDict[int, TaskIds] = OrderedDict()
        self._pieces: dict[int, dict[tuple[str, str], Piece | str]] = {}
        self._uploaded: dict[tuple[str, str], Piece | str] = {}  # of the last upload, until its task is read

    def check_writable(self, task: Task) -> dict[str, int]:
        """Return how many examples of an upload the model's tokenizer cannot write, by reason; keep what it wrote.

        Raises:
            BadExamples: so many that the task would not be the one that was meant, or all.
        """
        pieces = _write_pieces(task.train, self.model.tokenizer)
        lost = _check_pieces(task, pieces, model=self.model)
        with self._lock:
            self._uploaded = pieces
        return lost

    def get(self, name: str) -> TaskIds:
        """Return a task as the library has it now.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._lock:
            record = self.library.task(name)
            known = self._known.get(record.id)
            if known is not None and known.record.version == record.version and known.record.name == name:
                self._known.move_to_end(record.id)
                return known
            record, examples = self.library.read_task(name)
            pieces = {**self._uploaded, **self._pieces.get(record.id, {})}
            self._uploaded = {}
            fresh, pieces = make_task_ids(record, examples, model=self.model, pieces=pieces)
            fresh = replace(fresh, most_shot_tokens=self._most_shot_tokens)
            self._known[record.id], self._pieces[record.id] = fresh, pieces
            self._known.move_to_end(record.id)
            while len(self._known) > _MOST_TASKS:
                oldest, _ = self._known.popitem(last=False)
                self._pieces.pop(oldest, None)
            return fresh


def make_task_ids(
    record: TaskRecord,
    examples: Sequence[ServedExample],
    *,
    model: InferenceModel,
    pieces: Mapping[tuple[str, str], Piece | str],
) -> tuple[TaskIds, dict[tuple[str, str], Piece | str]]:
    """Return a task in ids, and the ids of each (input, answer), or why it has none.

    pieces: those that are known already.

    Raises:
        UserError: the model's vocabulary is too small for its tokenizer.
    """
    missing = [one for one in examples if (one.input, one.answer) not in pieces]
    made = {**pieces, **_write_pieces([one.to_example() for one in missing], model.tokenizer)}
    kept = {(one.input, one.answer): made[one.input, one.answer] for one in examples}
    task = _make_task(record, [one.to_example() for one in examples])
    tokenized = TokenizedTask(
        task=task,
        head_ids=model.tokenizer.head_ids(task),
        num_between=len(model.tokenizer.between_ids),
        splits={"train": _join_pieces(kept.values()), "validation": _join_pieces([]), "test": _join_pieces([])},
        dropped={"train": _count_reasons(kept.values()), "validation": {}, "test": {}},
    )
    if model.model is not None:
        check_vocabulary(model.model.config, path=model.path, num_tokens=tokenized.num_ids)
    labels = write_answers(model.tokenizer, task.labels)
    return TaskIds(record, tuple(examples), tokenized, labels, model.max_tokens), kept


def _check_pieces(
    task: Task, pieces: Mapping[tuple[str, str], Piece | str], *, model: InferenceModel
) -> dict[str, int]:
    """Return how many examples cannot be written, by reason. Raises BadExamples if too few can."""
    dropped = _count_reasons(pieces.values())
    tokens = _join_pieces(pieces.values())
    tokenized = TokenizedTask(
        task, model.tokenizer.head_ids(task), len(model.tokenizer.between_ids), {"train": tokens}, {"train": dropped}
    )
    fault = check_lost_answers(tokenized)
    if fault or not len(tokens):
        raise BadExamples(fault or f"task '{task.name}': the model's tokenizer can write none of its answers")
    head = len(tokenized.head_ids)
    if head + int(tokens.lengths.min()) > model.max_tokens:
        raise BadExamples(
            f"task '{task.name}': none of its examples fits {model.max_tokens:,} tokens with the instruction; shorten"
            " them, or serve a model with a longer window"
        )
    return dropped


def _write_pieces(examples: Sequence[Example], tokenizer: TaskTokenizer) -> dict[tuple[str, str], Piece | str]:
    tokens, _ = tokenizer.tokenize_examples(examples)
    pieces: dict[tuple[str, str], Piece | str] = {}
    for place, row in enumerate(tokens.rows.tolist()):
        start, stop = int(tokens.starts[place]), int(tokens.starts[place + 1])
        example = examples[row]
        pieces[example.input, example.answer] = (
            tokens.ids[start:stop].copy(),
            int(tokens.answer_starts[place]) - start,
        )
    lost = [example for example in examples if (example.input, example.answer) not in pieces]
    for example, reason in zip(lost, tokenizer.encode_answers([one.answer for one in lost]), strict=True):
        pieces[example.input, example.answer] = str(reason)
    return pieces


def _join_pieces(pieces: Any) -> ExampleTokens:
    listed = list(pieces)
    usable = [(row, piece) for row, piece in enumerate(listed) if not isinstance(piece, str)]
    lengths = [len(ids) for _, (ids, _) in usable]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return ExampleTokens(
        ids=np.concatenate([np.zeros(0, np.int32), *(ids for _, (ids, _) in usable)]).astype(np.int32),
        starts=starts,
        answer_starts=starts[:-1] + np.asarray([begin for _, (_, begin) in usable], dtype=np.int64),
        rows=np.asarray([row for row, _ in usable], dtype=np.int32),
    )


def _count_reasons(pieces: Any) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for piece in pieces:
        if isinstance(piece, str):
            reasons[piece] = reasons.get(piece, 0) + 1
    return reasons


def _make_task(record: TaskRecord, examples: Sequence[Example]) -> Task:
    about = record.about
    return Task(
        name=record.name,
        family=about["family"],
        metric=about["metric"],
        instruction=about["instruction"],
        labels=tuple(about["labels"]),
        train=tuple(examples),
        validation=(),
        test=(),
        sha256=f"{record.id} {record.version}",
        num_rows=len(examples),
        dropped={},
        split_note="",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Shots:
    """The examples that the inputs of a request share, and how others are found for each input."""

    order: Order
    """Of the shared ones; the first of them are shown if not all fit."""
    num_nearest: int = 0
    """How many more are chosen for each input."""
    nearest_tokens: int = 0
    """Most tokens of those."""
    must_fit: bool = False
    """Whether all of `order` were named by the request, so that none may be left out."""


def choose_shots(task: TaskIds, choice: ShotChoice) -> Shots:
    """Return the shots of a choice.

    Raises:
        UnknownExample: the choice names an example that the task does not have, or that the tokenizer cannot write.
    """
    found: Shots | None = task.orders.get(choice)
    if found is None:
        found = _choose_shots(task, choice)
        if len(task.orders) > 64:  # each request may have its own
            task.orders.clear()  # another thread may have just put its choice in
        task.orders[choice] = found
    return found


def _choose_shots(task: TaskIds, choice: ShotChoice) -> Shots:
    if choice.policy == "fixed":
        places = {task.example_of(index).id: index for index in range(len(task.tokens))}
        unknown = [id_ for id_ in choice.ids if id_ not in places]
        if unknown:
            raise UnknownExample(f"shots.ids: task '{task.record.name}' has no usable example {unknown[0]}")
        order = np.asarray([places[id_] for id_ in choice.ids], dtype=np.int64)
        return Shots(order if choice.count is None else order[: choice.count], must_fit=True)
    room = task.usual_room if choice.count is None else task.shot_room
    if choice.policy == "nearest":
        count = len(task.tokens) if choice.count is None else choice.count
        num_nearest = min(MOST_NEAREST, (count + 1) // 2)
        nearest_tokens = int(_NEAREST_SHARE * (room - len(task.tokenized.head_ids)))
        order = order_random(task, seed=choice.seed, room=room - nearest_tokens)
        return Shots(order[: max(0, count - num_nearest)], num_nearest, nearest_tokens)
    order = order_random(task, seed=choice.seed, room=room)
    return Shots(order if choice.count is None else order[: choice.count])


def order_random(task: TaskIds, *, seed: int, room: int) -> Order:
    """Return examples in a random order, as many as fit `room` tokens; the order goes on as examples are added.

    Those that came later follow those that were there, as long as they fit; then all are drawn anew. So a prefix is
    extended again and again before it has to be encoded anew. It depends on nothing but the examples and `room`.
    """
    lengths = task.tokens.lengths
    free = room - len(task.tokenized.head_ids)
    fitting = np.flatnonzero(lengths <= free)
    batches = np.asarray([task.example_of(int(index)).batch for index in fitting])
    base, tail, tail_tokens = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    base_tokens, most = 0, free
    for batch in np.unique(batches).tolist():
        new = fitting[batches == batch]
        num_new = int(lengths[new].sum())
        if len(base) and base_tokens + tail_tokens + num_new <= free:
            tail, tail_tokens = np.concatenate([tail, new]), tail_tokens + num_new
            continue
        base, tail, tail_tokens = np.concatenate([base, tail, new]), np.zeros(0, np.int64), 0
        most = free if int(lengths[base].sum()) <= free else int((1 - TAIL_SHARE) * free)
        base_tokens = min(int(lengths[base].sum()), most)
    shuffled = shuffle_by_label(task, base, seed=seed)
    num_base = int(np.searchsorted(np.cumsum(lengths[shuffled]), most, side="right"))
    return np.concatenate([shuffled[:num_base], shuffle_by_label(task, tail, seed=seed)])


def shuffle_by_label(task: TaskIds, indices: Order, *, seed: int) -> Order:
    """Return examples in a random order in which every part has about as many of each label as the whole.

    The first of each label comes early, so that a beginning knows them all.
    """
    groups: dict[str, list[int]] = {}
    for index in indices.tolist():
        answer = task.example_of(index).answer if task.labels else ""
        groups.setdefault(answer, []).append(index)
    places: list[tuple[float, int, int]] = []
    early = len(groups) / max(1, len(indices))
    for answer, members in groups.items():
        rng = np.random.default_rng(make_seed("evaluation", seed, "served shots", task.record.name, answer))
        order = rng.permutation(len(members))
        starts = (np.arange(len(members)) + rng.random(len(members))) / len(members)
        starts[0] = min(starts[0], early * rng.random())
        places += [(float(start), members[0], members[int(n)]) for start, n in zip(starts, order, strict=True)]
    return np.asarray([index for _, _, index in sorted(places)], dtype=np.int64)


def count_fitting(task: TaskIds, shots: Shots, *, num_after: int) -> int:
    """Return how many of the shared shots fit before an input.

    num_after: tokens of the input, its nearest examples and the answer.

    Raises:
        InputTooLong: not even the head fits, or shots that the request named do not.
    """
    lengths = prefix_lengths(task.tokenized, shots.order)
    room = task.max_tokens - num_after
    fitting = int(np.searchsorted(lengths, room, side="right")) - 1
    if fitting < 0:
        raise InputTooLong(
            f"input: {num_after:,} tokens with room for the answer do not fit the model's {task.max_tokens:,} tokens;"
            " shorten it"
        )
    if shots.must_fit and fitting < len(shots.order):
        raise InputTooLong(
            f"shots.ids: {len(shots.order):,} examples leave no room for the input in {task.max_tokens:,} tokens"
            f" ({fitting:,} would); name fewer"
        )
    return fitting


def find_nearest(task: TaskIds, text: str, shots: Shots, *, room: int) -> list[int]:
    """Return the examples most like an input that are not shared ones, the most similar last.

    room: most tokens of them.
    """
    if not shots.num_nearest or not len(task.tokens):
        return []
    index = task.orders.get("inputs")
    if index is None:
        index = InputIndex([task.example_of(place).input for place in range(len(task.tokens))])
        task.orders["inputs"] = index
    shared = set(shots.order.tolist())
    return pick_nearest(
        (place for place in index.rank(text) if place not in shared),
        lengths=task.tokens.lengths,
        count=shots.num_nearest,
        room=min(room, shots.nearest_tokens),
    )
