"""Measures tasks while nothing else is to be done, in pieces of a second or two, as `plans` says.

The answers are chosen just as for requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import join_examples
from manyicl.evaluation import best_score, chance_score, majority_answer, majority_score
from manyicl.inference import (
    CONTENT_FREE,
    answer_queries,
    build_trie,
    model_key,
    sameness_of,
    write_answers,
    write_queries,
)
from manyicl.models import EMPTY_PREFIX, Prefix, count_parameters
from manyicl.service.answering import Answerer
from manyicl.service.library import Library, ServedExample
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
from manyicl.service.measurement.plans import FEWEST_ROWS, Plan, make_plan
from manyicl.service.refusals import UnknownTask
from manyicl.service.selection import Order, TaskBook, TaskIds, choose_shots
from manyicl.service.settings import ShotChoice

# Default of ServiceSettings.measure_tokens: tokens times parameters. On a CPU, two minutes of two cores, found with
# SmolLM2-135M, which gets 13,000 tokens by it. On a GPU under a minute, found with Mistral 7B's shape on an H200, where
# 961,000 tokens took 73 s.
_WORK = {True: 13_000 * 134_515_008, False: 500_000 * 7_241_732_096}
# Fewer would tell nothing; more, as a small model on a GPU or a server could have, are not needed.
_FEWEST_TOKENS, MOST_TOKENS = 6_000, 4_000_000
# How long a piece of work may take, since a request may be waiting for its end. Shorter pieces are slow: after 3,000
# tokens SmolLM2 on two cores answers one query of 60 tokens in 0.48 s, four in 1.22 s, eight in 2.40 s.
_PIECE_S = 1.5
_FIRST_PACE = {True: 500.0, False: 5000.0}  # tokens per second of a model on a CPU, or elsewhere
# A generated token takes about as long as so many that go through the model together.
_STEP_TOKENS = 4
# How long to wait for the search for near copies before requests have their turn.
_WAIT_S = 0.05
# How often the library is looked at for changes, also by other processes.
_LOOK_S = 0.5
_logger = logging.getLogger("manyicl")


@dataclass(slots=True)
class _Found:
    """What has been found so far."""

    scores: dict[int, dict[int, float]] = field(default_factory=dict)
    """Shots -> index into the task's examples -> score."""
    doubts: list[Doubt] = field(default_factory=list)


class TaskMeasuring:
    """The measurement of one version of a task, done piece by piece. measurement: what is known so far."""

    def __init__(self, task: TaskIds, answerer: Answerer, *, most_tokens: int | None, served: Order) -> None:
        self.task, self.answerer, self.served = task, answerer, served
        on_cpu = answerer.engine.server is None and answerer.model.on_cpu
        self._most_tokens = most_tokens or _default_tokens(answerer, on_cpu=on_cpu)
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
        task, copies = self.task, _find_in_background(self.task.examples)
        if len(task.tokens) < FEWEST_EXAMPLES:
            self._publish("done", copies.result())
            return
        plan = make_plan(task, most_tokens=self._most_tokens, query_tokens=self._query_tokens, served=self.served)
        lengths = task.tokens.lengths
        shot_tokens = sum(int(lengths[order[: plan.points[-1]]].sum()) for order in plan.orders)
        rows = (len(plan.points) - 1) * plan.num_rows + plan.num_last
        self._total = shot_tokens + rows * len(plan.folds) * self._query_tokens
        for fold in range(len(plan.folds)):
            for _ in self._measure_fold(plan, fold):
                self._publish("running", copies.result() if copies.done() else Duplicates())
                yield
        while not copies.done():
            time.sleep(_WAIT_S)
            yield
        self._done = self._total
        self._publish("done", copies.result())

    def _measure_fold(self, plan: Plan, fold: int) -> Iterator[None]:
        """Answer the examples of a fold after each number of shots, all of which extend one prefix."""
        engine, order = self.answerer.engine, plan.orders[fold]
        cache, room = self.answerer.cache, len(self._join(order[: plan.points[-1]]))
        prefix = EMPTY_PREFIX
        for shots in plan.points:
            ids = self._join(order[:shots])
            if plan.as_served:  # requests may have extended it since, or it is on disk
                prefix, _ = cache.get(engine, ids, most=0)
            while prefix.num_tokens < len(ids):
                before = prefix.num_tokens
                stop = min(len(ids), before + self._piece_tokens())
                if engine.server is not None or engine.sharing_fault:
                    stop = len(ids)  # nothing is encoded yet
                with self._timed(stop - before):
                    if plan.as_served:
                        prefix, _ = cache.get(engine, ids, most=stop - before, room=room)
                    else:
                        prefix = engine.encode(ids[before:stop], after=prefix, room=room)
                yield
            wanted = plan.folds[fold][: plan.num_last if shots == plan.points[-1] else plan.num_rows].tolist()
            while wanted:
                size = max(1, int(self._piece_tokens() / self._query_tokens))
                with self._timed(min(size, len(wanted)) * self._query_tokens):
                    self._answer(prefix, wanted[:size], shots=shots, is_last=shots == plan.points[-1])
                wanted = wanted[size:]
                yield

    def _join(self, order: Order) -> NDArray[np.int32]:
        return join_examples(self.task.tokenized, split="train", indices=order.astype(np.int32)).ids

    def _piece_tokens(self) -> int:
        return max(32, int(self._pace * _PIECE_S))

    @contextmanager
    def _timed(self, num_tokens: float) -> Iterator[None]:
        """Learn the pace from a piece of work, the block."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
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
            answering=[self.answerer.answering] * len(queries),
            is_same=sameness_of(task.record.about["metric"]),
            free=[write_queries(self.answerer.model.tokenizer, CONTENT_FREE, after_shots=shots > 0)] * len(queries),
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
        name, fewest = self.task.record.name, 1 if state == "done" else FEWEST_ROWS
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
                num_shown=len(self.served),
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


def _default_tokens(answerer: Answerer, *, on_cpu: bool) -> int:
    """Return the tokens of a measurement: as many as a model of its size manages in the time that is meant."""
    if answerer.engine.server is not None:
        return MOST_TOKENS
    return min(MOST_TOKENS, max(_FEWEST_TOKENS, _WORK[on_cpu] // count_parameters(answerer.model.model)))


def _find_in_background(examples: Sequence[ServedExample]) -> Future[Duplicates]:
    """Look for near copies in another thread: among 20,000 examples it takes 12 s, for which no request should wait.

    The thread is a daemon, which those of an executor are not: the end of the process would wait for it.
    """
    found: Future[Duplicates] = Future()

    def find() -> None:
        try:
            found.set_result(find_duplicates(examples))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=find, name="manyicl-copies", daemon=True).start()
    return found


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
            return now if last is None else _as_before(last, "running", now.fraction)
        if last is None:
            return Measurement("waiting", version=version)
        return last if last.version == version else _as_before(last, "waiting", 0.0)

    def step(self) -> bool:
        """Do a piece of work in a second or two; return whether there was any."""
        if self._current is None:
            return self._begin()
        name, task, measuring, pieces = self._current
        if all(task != there for there, _ in self.library.versions().values()):  # removed, perhaps by another server
            self._current = None
            return True
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
            self._fail(name, task, measuring.measurement, error)
        return True

    def _fail(self, name: str, task: int, so_far: Measurement, error: Exception) -> None:
        _logger.warning("task %r: could not be measured (%s)", name, error)
        sentence = f"The measurement failed ({' '.join(str(error).split())[:200]})."
        self._end(task, replace(so_far, state="failed", sentence=sentence))

    def _end(self, task: int, measurement: Measurement) -> None:
        self._last[task], self._tried[task], self._current = measurement, measurement.version, None

    def _begin(self) -> bool:
        """Begin with a task whose version has not been measured; return whether there was one."""
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
            try:
                ids = self.book.get(name)
                served = choose_shots(ids, replace(self._choice, policy="random", ids=())).order
                measuring = TaskMeasuring(ids, self.answerer, most_tokens=self._most_tokens, served=served)
            except UnknownTask:  # removed in this moment
                continue
            except Exception as error:
                self._fail(name, task, Measurement("failed", version=version), error)
                return True
            self._current = (name, task, measuring, measuring.pieces())
            return True
        self._looked = now
        return False


def _as_before(last: Measurement, state: State, fraction: float) -> Measurement:
    """Return the old version's measurement while a new one waits or runs; why the old one failed is past."""
    return replace(last, state=state, fraction=fraction, sentence="" if last.state == "failed" else last.sentence)


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
