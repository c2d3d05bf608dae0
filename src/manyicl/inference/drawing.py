"""Which train examples stand before a query: draws of shots, how many tokens they take, and answers written in ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer, TokenizedTask
from manyicl.errors import UserError
from manyicl.seeds import AskPurpose, make_stream
from manyicl.tasks import Example

ShotPolicy = Literal["random", "balanced", "nearest"]
SHOT_POLICIES: tuple[ShotPolicy, ...] = ("random", "balanced", "nearest")
# Default number of an input's own shots, after the shared ones. A guess: benchmarks/chosen_shots.py tries others.
NUM_NEAREST = 8

LONG_TRAIN = "train rows too long to be shots"
# Default limit of a generated answer: as many tokens as the task's longest train answer has, and at most this many.
MAX_ANSWER_TOKENS = 256


def draw_shots(
    tokenized: TokenizedTask,
    *,
    seed: int,
    draw: int,
    purpose: AskPurpose = "evaluation",
    most_tokens: int | None = None,
    choose: ShotPolicy = "random",
) -> NDArray[np.int64]:
    """Return one draw: the train examples in a random order; its first k are its k shots, for any k.

    most_tokens: longer examples are left out; the order of the others stays the same.
    choose: "balanced" lets the task's labels take turns, in a random order each time, until their examples are used
        up; a task without fixed labels is drawn at random. "nearest" draws the shared shots at random.
    """
    train = tokenized.splits["train"]
    rng = make_stream(purpose, seed, "shots", tokenized.task.name, draw)
    order = rng.permutation(len(train))
    places = rng.random(len(train))
    if most_tokens is not None:
        order = order[train.lengths[order] <= most_tokens]
    if choose != "balanced" or not tokenized.task.labels:
        return order
    seen: Counter[str] = Counter()
    rounds = []
    for index in order.tolist():
        answer = tokenized.task.train[train.rows[index]].answer
        rounds.append(seen[answer])
        seen[answer] += 1
    return order[np.lexsort((places[order], np.array(rounds, dtype=np.int64)))]


def check_choice(choose: str, num_nearest: int, *, calibrate: str = "none") -> None:
    """Refuse an unknown way to choose shots, one that asks for nothing, or one that `calibrate` does not go with.

    Raises:
        UserError: naming the setting.
    """
    if choose not in SHOT_POLICIES:
        raise UserError(f"choose={choose}: is unknown; known: {', '.join(SHOT_POLICIES)}")
    if num_nearest < 1:
        raise UserError(f"num_nearest={num_nearest}: needs at least 1; choose random or balanced shots instead")
    if choose == "nearest" and calibrate != "none":  # the empty inputs would have to stand after each query's own shots
        raise UserError(f"calibrate={calibrate}: needs the same shots for all queries; choose random or balanced ones")


class InputIndex:
    """The inputs of some examples, to find those most like another input by BM25 (Lucene's formula, in bm25s).

    Raises:
        UserError: bm25s is not installed.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise UserError("nearest shots: bm25s is not installed; pip install bm25s") from error
        self._bm25s = bm25s
        self._index: Any = bm25s.BM25()
        words = bm25s.tokenize(list(inputs), stopwords=None, show_progress=False)
        self._is_empty = not words.vocab or not any(len(ids) for ids in words.ids)
        if not self._is_empty:
            self._index.index(words, show_progress=False)

    def rank(self, text: str) -> list[int]:
        """Return the places of the inputs that have a word in common with `text`, the most similar first.

        Of equally similar ones the first comes first.
        """
        (words,) = self._bm25s.tokenize([text], stopwords=None, show_progress=False, return_ids=False)
        if not words or self._is_empty:
            return []
        scores = self._index.get_scores(words)
        ranked = np.argsort(-scores, kind="stable")
        return [int(place) for place in ranked[: int((scores > 0).sum())]]


class VectorIndex:
    """The embeddings of some examples, to find those most like another by the cosine of the angle between them.

    embeddings: float32 numbers, as `Example.embedding` has them.

    Raises:
        UserError: they are not all of one length.
    """

    def __init__(self, embeddings: Sequence[bytes]) -> None:
        self._size = len(embeddings[0]) if embeddings else 0
        self._units_ND = np.stack([self._to_unit(one) for one in embeddings]) if embeddings else np.zeros((0, 0))

    def rank(self, embedding: bytes) -> list[int]:
        """Return the places of the examples, the most similar first; of equally similar ones the first.

        Raises:
            UserError: it is of another length.
        """
        unit_D = self._to_unit(embedding)
        return np.argsort(-(self._units_ND @ unit_D), kind="stable").tolist() if len(self._units_ND) else []

    def _to_unit(self, embedding: bytes) -> NDArray[np.float32]:
        if self._size and len(embedding) != self._size:
            raise UserError(
                f"nearest shots: one row's embedding has {len(embedding) // 4} numbers, another's {self._size // 4};"
                " make all of them with one model"
            )
        numbers_D = np.frombuffer(embedding, dtype=np.float32)
        scaled_D = numbers_D / np.abs(numbers_D).max()  # squares of large numbers would overflow
        unit_D: NDArray[np.float32] = scaled_D / np.linalg.norm(scaled_D)
        return unit_D


def index_examples(examples: Sequence[Example]) -> Callable[[Example], list[int]]:
    """Return what ranks examples by their likeness to another: by their embeddings if they have some, else by BM25.

    Raises:
        UserError: embeddings of several lengths, or bm25s is wanted and not installed.
    """
    if examples and examples[0].embedding:
        vectors = VectorIndex([one.embedding for one in examples])
        return lambda asked: vectors.rank(asked.embedding)
    inputs = InputIndex([one.input for one in examples])
    return lambda asked: inputs.rank(asked.input)


def choose_own_shots(
    ranked: Sequence[int], *, free: NDArray[np.int64], lengths: NDArray[np.int64], count: int, room: int
) -> list[int]:
    """Return exactly `count` of the examples `free` as an input's own shots, the most similar one last.

    The ranked ones come first, then the others in their order: an input that has few words in common with any example
    gets as many shots as others.

    ranked: examples by their likeness to the input, the most similar first.
    lengths: tokens of each example.
    room: most tokens of the shots; the `count` shortest of `free` must fit it.
    """
    is_free = np.zeros(len(lengths), dtype=bool)
    is_free[free] = True
    nearest = [place for place in ranked if is_free[place]]
    is_free[nearest] = False
    others = (place for place in free.tolist() if is_free[place])
    shortest = np.partition(lengths[free], count - 1)[:count].tolist()
    return pick_nearest(chain(nearest, others), lengths=lengths, count=count, room=room, shortest=shortest)


def pick_nearest(
    ranked: Iterable[int], *, lengths: NDArray[np.int64], count: int, room: int, shortest: Sequence[int] = ()
) -> list[int]:
    """Return the first `count` of the ranked examples that fit, in reverse: the most similar one last.

    lengths: tokens of each example; those that are picked take at most `room` together.
    shortest: the lengths of the `count` shortest examples there are, if as many as `count` must be found: an example is
        passed over if the shortest of the others would no longer fit after it.
    """
    found: list[int] = []
    left = sorted(shortest)
    for index in ranked:
        if len(found) == count:
            break
        length = int(lengths[index])
        if length in left:
            left.remove(length)
        if length + sum(left[: count - len(found) - 1]) <= room:
            found.append(index)
            room -= length
    return found[::-1]


def reorder_shots(first: NDArray[np.int64], *, num_fixed: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return draw 0 with its first `num_fixed` shots in another random order; the rest stays as it is."""
    return np.concatenate([rng.permutation(first[:num_fixed]), first[num_fixed:]])


def prefix_lengths(tokenized: TokenizedTask, draw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of the head and the first k shots of a draw, for k = 0 to all of them."""
    lengths = tokenized.splits["train"].lengths[draw]
    return len(tokenized.head_ids) + np.concatenate([[0], np.cumsum(lengths)])


def most_answer_tokens(
    tokenized: TokenizedTask, written: Sequence[tuple[str, Sequence[int]]] | None, *, limit: int | None = None
) -> int:
    """Return the most tokens an answer may take: the longest known answer, or the limit of a generated one.

    written: the known answers with their ids; None for an open answer.
    limit: of a generated answer. Default: the longest train answer, at most `MAX_ANSWER_TOKENS`.
    """
    if written is not None:
        return max((len(ids) for _, ids in written), default=0)
    if limit is not None:
        return limit
    lengths = tokenized.splits["train"].answer_lengths
    return min(MAX_ANSWER_TOKENS, int(lengths.max())) if len(lengths) else MAX_ANSWER_TOKENS


def write_answers(tokenizer: TaskTokenizer, known: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return known answers with their ids, in order; one that the tokenizer cannot write is left out."""
    encoded = zip(known, tokenizer.encode_answers(known), strict=True)
    return [(text, ids) for text, ids in encoded if not isinstance(ids, str)]
