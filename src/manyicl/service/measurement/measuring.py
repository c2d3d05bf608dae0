"""Measures tasks while nothing else is to be done: every example is answered from others, in pieces of half a second.

The examples are dealt into a few folds, labels spread evenly. The examples of one fold are answered after growing
numbers of shots from all others, in a random order: after none, 1, 2, 4 and so on up to as many as fit. So every answer
is given without its own example among the shots, each example can be answered, and none is lost to a test set. All
numbers of shots of a fold extend one prefix, and the answers are chosen just as for requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import join_examples
from manyicl.evaluation import best_score, chance_score, majority_answer, majority_score
from manyicl.inference import answer_queries, build_trie, model_key, write_answers
from manyicl.models import Prefix
from manyicl.service.answering import Answerer
from manyicl.service.library import Library
from manyicl.service.measurement.findings import (
    FEWEST_EXAMPLES,
    Doubt,
    Duplicates,
    Measurement,
    State,
    find_duplicates,
    find_slope,
    find_suspects,
    from_content,
    make_points,
    to_content,
    write_sentence,
)
from manyicl.service.selection import TaskBook, TaskIds, choose_shots, shuffle_by_label
from manyicl.service.settings import ShotChoice

# Default of ServiceSettings.measure_tokens, by where the model is.
CPU_TOKENS, OTHER_TOKENS = 60_000, 4_000_000
# Parts of those tokens: encoding shots, and answering after the most shots; the rest is for all other points.
_PREFIX_SHARE, _LAST_SHARE = 0.35, 0.6
_MOST_FOLDS = 4
# Examples of a fold that are answered at each point, if that is not too dear; below it there are fewer points.
_ENOUGH_ROWS, _FEWEST_ROWS = 16, 4
# How long a piece of work may take, since a request may be waiting for its end.
_PIECE_S = 0.4
_FIRST_PACE = {True: 500.0, False: 5000.0}  # tokens per second of a model on a CPU, or elsewhere
# A generated token takes about as long as so many that go through the model together.
_STEP_TOKENS = 4
# How often the library is looked at for changes, also by other processes.
_LOOK_S = 0.5
_logger = logging.getLogger("manyicl")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a measurement answers, after which shots."""

    folds: tuple[NDArray[np.int64], ...]
    """The examples of each fold, by index, in a random order."""
    orders: tuple[NDArray[np.int64], ...]
    """The shots of each fold, from the other folds."""
    points: tuple[int, ...]
    """Numbers of shots, ascending."""
    num_rows: int
    """Examples of a fold that are answered at each point but the last."""
    num_last: int
    """The same at the last."""


def make_plan(task: TaskIds, *, most_tokens: int, query_tokens: float) -> Plan:
    """Return the plan of a measurement that takes about `most_tokens`.

    query_tokens: of one answer, all its options included.
    """
    lengths = task.tokens.lengths
    free = task.usual_room - len(task.tokenized.head_ids)
    usable = shuffle_by_label(task, np.flatnonzero(lengths <= max(free, 0)).astype(np.int64), seed=0)
    whole = int(lengths[usable].sum())
    budget = _PREFIX_SHARE * most_tokens
    num_folds = next((n for n in range(_MOST_FOLDS, 2, -1) if n * min(free, whole * (n - 1) / n) <= budget), 2)
    free = min(free, max(int(budget / num_folds), int(lengths[usable].max(initial=0))))
    folds = tuple(usable[fold::num_folds] for fold in range(num_folds))
    orders, most_shots = [], []
    for fold in range(num_folds):
        others = np.concatenate([folds[other] for other in range(num_folds) if other != fold])
        order = shuffle_by_label(task, others, seed=fold + 1)
        orders.append(order)
        most_shots.append(int(np.searchsorted(np.cumsum(lengths[order]), free, side="right")))
    left = max(0.0, most_tokens - num_folds * min(free, whole))
    most, size = min(most_shots), max(len(fold) for fold in folds)
    for step in (2, 4):
        points = _list_points(most, step=step)
        num_last = max(_FEWEST_ROWS, min(size, int(_LAST_SHARE * left / query_tokens / num_folds)))
        left_rows = (left / query_tokens - num_last * num_folds) / num_folds / max(1, len(points) - 1)
        num_rows = min(max(_FEWEST_ROWS, int(left_rows)), num_last)
        if num_rows >= _ENOUGH_ROWS:
            break
    return Plan(folds, tuple(orders), points, num_rows, num_last)


def _list_points(most: int, *, step: int) -> tuple[int, ...]:
    """Return 0, 1, and powers of `step` up to `most`, which is the last."""
    points, shots = [0], 1
    while shots * 1.4 < most:
        points.append(shots)
        shots *= step
    return (*points, most) if most else (0,)


@dataclass(slots=True)
class _Found:
    """What has been found so far."""

    scores: dict[int, dict[int, float]] = field(default_factory=dict)
    """Shots -> index into the task's examples -> score."""
    doubts: list[Doubt] = field(default_factory=list)


class TaskMeasuring:
    """The measurement of one version of a task, done piece by piece. measurement: what is known so far."""

    def __init__(self, task: TaskIds, answerer: Answerer, *, most_tokens: int | None, num_shown: int) -> None:
        self.task, self.answerer, self.num_shown = task, answerer, num_shown
        on_cpu = answerer.engine.server is None and answerer.model.on_cpu
        self._most_tokens = most_tokens or (CPU_TOKENS if on_cpu else OTHER_TOKENS)
        self._pace = _FIRST_PACE[on_cpu]
        self._choices = self._find_choices()
        self._query_tokens = self._estimate_query()
        self._levels = self._find_levels()
        self.seconds, self._done, self._total = 0.0, 0.0, 1.0
        self._found = _Found()
        self.measurement = Measurement("running", version=task.record.version)

    def _find_choices(self) -> list[Sequence[tuple[str, Sequence[int]]]]:
        """Return what the answer of each usable example is chosen from."""
        tokenizer, task = self.answerer.model.tokenizer, self.task
        own: dict[tuple[str, ...], Sequence[tuple[str, Sequence[int]]]] = {}
        found = []
        for index in range(len(task.tokens)):
            options = task.example_of(index).options
            if options and options not in own:
                own[options] = write_answers(tokenizer, options)
            found.append(own[options] if options else task.labels)
        return found

    def _estimate_query(self) -> float:
        """Return how many tokens one answer takes."""
        tokens, engine = self.task.tokens, self.answerer.engine
        inputs = float(np.mean(tokens.lengths - tokens.answer_lengths)) if len(tokens) else 1.0
        sample = [pairs for pairs in self._choices[:50] if pairs]
        if not sample or not engine.has_likelihoods:
            return inputs + _STEP_TOKENS * float(np.mean(tokens.answer_lengths) if len(tokens) else 1.0)
        if engine.sharing_fault:  # a whole prompt for each option
            return (inputs + self.task.shot_room / 2) * float(np.mean([len(pairs) for pairs in sample]))
        return inputs + float(np.mean([len(build_trie([ids for _, ids in pairs]).tokens_N) for pairs in sample]))

    def pieces(self) -> Iterator[None]:
        """Do the work, and yield after each piece of it; at the end `measurement` is done."""
        task = self.task
        began = time.monotonic()
        duplicates = find_duplicates(task.examples)
        self.seconds += time.monotonic() - began
        if len(task.tokens) < FEWEST_EXAMPLES:
            self._publish("done", duplicates)
            return
        plan = make_plan(task, most_tokens=self._most_tokens, query_tokens=self._query_tokens)
        lengths = task.tokens.lengths
        shot_tokens = sum(int(lengths[order[: plan.points[-1]]].sum()) for order in plan.orders)
        rows = (len(plan.points) - 1) * plan.num_rows + plan.num_last
        self._total = shot_tokens + rows * len(plan.folds) * self._query_tokens
        for fold in range(len(plan.folds)):
            for _ in self._measure_fold(plan, fold):
                self._publish("running", duplicates)
                yield
        self._done = self._total
        self._publish("done", duplicates)

    def _measure_fold(self, plan: Plan, fold: int) -> Iterator[None]:
        """Answer the examples of a fold after each number of shots, all of which extend one prefix."""
        engine, tokenized, order = self.answerer.engine, self.task.tokenized, plan.orders[fold]
        room = len(tokenized.head_ids) + int(self.task.tokens.lengths[order[: plan.points[-1]]].sum())
        prefix = engine.encode(tokenized.head_ids, room=room)
        for shots in plan.points:
            ids = join_examples(tokenized, split="train", indices=order[:shots].astype(np.int32)).ids
            while prefix.num_tokens < len(ids):
                stop = min(len(ids), prefix.num_tokens + self._piece_tokens())
                if engine.server is not None or engine.sharing_fault:
                    stop = len(ids)  # nothing is encoded yet
                with self._timed(stop - prefix.num_tokens):
                    prefix = engine.encode(ids[prefix.num_tokens : stop], after=prefix, room=room)
                yield
            wanted = plan.folds[fold][: plan.num_last if shots == plan.points[-1] else plan.num_rows].tolist()
            while wanted:
                size = max(1, int(self._piece_tokens() / self._query_tokens))
                with self._timed(min(size, len(wanted)) * self._query_tokens):
                    self._answer(prefix, wanted[:size], shots=shots, is_last=shots == plan.points[-1])
                wanted = wanted[size:]
                yield

    def _piece_tokens(self) -> int:
        return max(32, int(self._pace * _PIECE_S))

    def _timed(self, num_tokens: float) -> _Stopwatch:
        return _Stopwatch(self, num_tokens)

    def note(self, seconds: float, num_tokens: float) -> None:
        """Learn the pace from a piece of work."""
        self.seconds += seconds
        self._done += num_tokens
        self._pace += 0.3 * (num_tokens / max(seconds, 1e-3) - self._pace)

    def _answer(self, prefix: Prefix, indices: Sequence[int], *, shots: int, is_last: bool) -> None:
        """Answer examples by index after a prefix, and score the answers."""
        task, tokens = self.task, self.task.tokens
        skipped = 0 if shots else task.tokenized.num_between
        queries = [tokens.ids[tokens.starts[n] + skipped : tokens.answer_starts[n]] for n in indices]
        choices = [self._choices[n] for n in indices]
        answers = answer_queries(
            self.answerer.engine,
            self.answerer.model.tokenizer,
            prefix,
            queries,
            choices=choices,
            limits=[max((len(ids) for _, ids in pairs), default=task.limit) for pairs in choices],
        )
        for index, one in zip(indices, answers, strict=True):
            if one.fault:
                continue  # a server that gave no answer: the point has one fewer
            example = task.example_of(index)
            right = (example.answer, *example.also_right)
            row = int(tokens.rows[index])
            self._found.scores.setdefault(shots, {})[row] = best_score(
                one.text, answers=right, metric=task.record.about["metric"]
            )
            nats = one.choice_nll
            if is_last and nats is not None and example.answer in nats:
                others = {text: value for text, value in nats.items() if text not in right}
                if others:
                    likelier = min(others, key=lambda text, others=others: others[text])  # type: ignore[misc]
                    given = min(nats[text] for text in right if text in nats)
                    self._found.doubts.append(Doubt(row, likelier, given - others[likelier]))

    def _publish(self, state: State, duplicates: Duplicates) -> None:
        """Make what has been found so far the measurement."""
        name, fewest = self.task.record.name, 1 if state == "done" else _FEWEST_ROWS
        points = make_points(
            {shots: found for shots, found in self._found.scores.items() if len(found) >= fewest}, task=name
        )
        now = Measurement(
            state,
            min(1.0, self._done / self._total),
            points,
            majority=self._levels[0],
            chance=self._levels[1],
            duplicates=duplicates,
            version=self.task.record.version,
        )
        self.measurement = now if state == "running" else self._conclude(now)

    def _conclude(self, found: Measurement) -> Measurement:
        """Return a measurement of all points with what follows from them."""
        examples, points = self.task.examples, found.curve
        slope = find_slope(self._found.scores, task=self.task.record.name)
        last = points[-1] if points else None
        return replace(
            found,
            fraction=1.0,
            suspects=find_suspects(self._found.doubts, examples, last=last, majority=found.majority),
            sentence=write_sentence(
                points,
                slope,
                majority=found.majority,
                majority_answer=majority_answer([one.answer for one in examples]) or "",
                num_examples=len(examples),
                num_shown=self.num_shown,
                duplicates=found.duplicates,
            ),
            slope=None if slope is None else slope.mean,
            slope_low=None if slope is None else slope.low,
            slope_high=None if slope is None else slope.high,
            seconds=self.seconds,
        )

    def _find_levels(self) -> tuple[float | None, float | None]:
        """Return what the commonest answer scores on all usable examples, and what a die does."""
        about, examples = self.task.record.about, [self.task.example_of(n) for n in range(len(self.task.tokens))]
        right = [(one.answer, *one.also_right) for one in examples]
        common = [one.answer for one in examples]
        choices = [one.options or tuple(about["labels"]) for one in examples]
        return (
            majority_score(right, train_answers=common, metric=about["metric"]),
            chance_score(choices, test_answers=right, metric=about["metric"]),
        )


class _Stopwatch:
    """Times a piece of work."""

    def __init__(self, measuring: TaskMeasuring, num_tokens: float) -> None:
        self._measuring, self._num_tokens = measuring, num_tokens

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._measuring.note(time.monotonic() - self._began, self._num_tokens)


class Measurer:
    """Keeps the measurement of every task up to date, one task at a time. Its work is done by the worker's thread."""

    def __init__(
        self, library: Library, book: TaskBook, answerer: Answerer, *, most_tokens: int | None, choice: ShotChoice
    ) -> None:
        self.library, self.book, self.answerer = library, book, answerer
        self._most_tokens, self._choice = most_tokens, choice
        self._model = _name_model(answerer)
        self._last: dict[int, Measurement] = {}
        self._tried: dict[int, int] = {}  # task -> version of the last measurement that ended, well or not
        self._current: tuple[str, int, TaskMeasuring, Iterator[None]] | None = None
        self._looked = float("-inf")

    @property
    def current(self) -> str | None:
        """The task that is being measured."""
        return self._current[0] if self._current is not None else None

    def find(self, task: int, version: int) -> Measurement:
        """Return what is known of a task; while a new version waits, the curve is that of the old one."""
        current, last = self._current, self._last.get(task)
        if current is not None and current[1] == task:
            now = current[2].measurement
            return now if last is None else replace(last, state="running", fraction=now.fraction)
        if last is None:
            return Measurement("waiting", version=version)
        return last if last.version == version else replace(last, state="waiting", fraction=0.0)

    def step(self) -> bool:
        """Do a piece of work in less than a second; return whether there was any."""
        if self._current is None and not self._begin():
            return False
        assert self._current is not None
        name, task, measuring, pieces = self._current
        try:
            next(pieces)
        except StopIteration:
            self._end(task, measuring.measurement)
            self.library.keep_measurement(
                task,
                model=self._model,
                version=measuring.task.record.version,
                content=to_content(measuring.measurement),
            )
        except Exception as error:
            _logger.warning("task %r: could not be measured (%s)", name, error)
            sentence = f"The measurement failed ({' '.join(str(error).split())[:200]})."
            failed = replace(measuring.measurement, state="failed", sentence=sentence)
            self._end(task, failed)
        return True

    def _end(self, task: int, measurement: Measurement) -> None:
        self._last[task], self._tried[task], self._current = measurement, measurement.version, None

    def _begin(self) -> bool:
        """Begin with a task whose version has not been measured; return whether there is one."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return False
        versions = self.library.versions()
        there = {task for task, _ in versions.values()}
        self._last = {task: one for task, one in self._last.items() if task in there}
        self._tried = {task: version for task, version in self._tried.items() if task in there}
        for name, (task, version) in versions.items():
            if self._tried.get(task) == version:
                continue
            kept = self.library.find_measurement(task, model=self._model)
            if kept is not None and kept[0] == version and (found := _read(kept[1])) is not None:
                self._last[task], self._tried[task] = found, version
                continue
            self._tried[task] = version
            ids = self.book.get(name)
            num_shown = len(choose_shots(ids, replace(self._choice, policy="random", ids=())).order)
            measuring = TaskMeasuring(ids, self.answerer, most_tokens=self._most_tokens, num_shown=num_shown)
            self._current = (name, task, measuring, measuring.pieces())
            return True
        self._looked = now
        return False


def _read(content: Mapping[str, Any]) -> Measurement | None:
    """Return a measurement that was kept; None if another version of this library wrote it."""
    try:
        return from_content(content)
    except (TypeError, KeyError, ValueError):
        return None


def _name_model(answerer: Answerer) -> str:
    """Return a name by which measurements with this very model are found again."""
    if answerer.engine.server is not None:
        return "server " + " ".join(answerer.engine.server.values())
    return "weights " + " ".join(asdict(model_key(answerer.model.model)).values())
