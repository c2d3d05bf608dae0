"""Requests: what waits, in which order it is taken, and what comes back."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError
from manyicl.inference import DEFAULT_ANSWERS, AnswerSettings
from manyicl.service.refusals import Closing, DeadlinePassed, QueueFull
from manyicl.service.selection import Shots, TaskIds

Finish = Literal["stop", "length"]
OnText = Callable[[int, str], None]
Outcome = TypeVar("Outcome")
# How fast the measured pace follows the latest pass.
_PACE_SHARE = 0.2
_FIRST_PACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of an answer went."""

    queued_s: float
    """In the queue."""
    prefix_s: float
    """Encoding or finding the shots."""
    model_s: float
    """In the pass that answered it."""
    total_s: float
    """From the request to the answer."""
    prefix_cached: bool
    """Whether the shots were encoded already."""
    batch_size: int
    """Inputs that shared the pass."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one input."""

    input: str
    answer: str
    """A known answer, or what the model generated."""
    probabilities: Mapping[str, float] | None
    """Of each choice; they sum to 1. None for a generated answer."""
    confidence: float | None
    """The answer's own probability, or the share of samples that gave it; else None."""
    unsure: bool
    """Whether the confidence is below the one that was wanted: the answer should not be used."""
    nll: float | None
    """Nats of the answer with its terminator; None if it was cut, or a server does not say."""
    shots: tuple[int, ...]
    """Ids of the examples that were shown, in order."""
    cut: bool
    """Whether a generated answer reached its limit."""
    finish: Finish
    """"length" if it was cut."""
    timing: Timing
    num_prompt_tokens: int
    """Of shots and input."""
    num_answer_tokens: int
    task_version: int
    """Of the task that answered."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A text that the model wrote without a task."""

    text: str
    finish: Finish
    """"length" if it reached its limit."""
    num_prompt_tokens: int
    num_answer_tokens: int
    timing: Timing


class Ticket(Generic[Outcome]):
    """A request that was taken. future: brings the outcome, or a UserError."""

    def __init__(self) -> None:
        self.future: Future[Outcome] = Future()

    def cancel(self) -> bool:
        """Give it up: inputs that wait are dropped, and a generated answer ends at its next token."""
        return self.future.cancel()


@dataclass(slots=True, eq=False)
class Item:
    """One input of a request."""

    place: int
    """Its index in the request."""
    text: str
    ids: NDArray[np.int32]
    """What the model gets after the shots; for a plain generation the whole prompt."""
    choices: Sequence[tuple[str, Sequence[int]]] = ()
    """Its known answers with their ids; () for an open answer."""
    limit: int = 0
    """Most tokens of its answer."""
    answering: AnswerSettings = DEFAULT_ANSWERS
    """How it is answered."""
    seed: int = 0
    """Decides what is sampled."""

    @property
    def num_read(self) -> int:
        """Tokens of the input and its options, roughly: options that begin alike share some."""
        return len(self.ids) + sum(len(ids) for _, ids in self.choices)

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in a pass: also those that its answer may have, if that is generated."""
        return self.num_read + (0 if self.choices else self.limit * self.answering.samples)


@dataclass(slots=True, eq=False)
class Request:
    """Inputs that wait together."""

    key: str
    """The task's name, "" for plain generations: whose turn it is."""
    group: Hashable
    """Requests of one group may share a pass."""
    items: Sequence[Item]
    ticket: Ticket[Any]
    task: TaskIds | None = None
    shots: Shots | None = None
    min_confidence: float | None = None
    """Answers with less confidence are marked as unsure."""
    deadline: float | None = None
    """On the clock of `time.monotonic`."""
    on_text: OnText | None = None
    since: float = field(default_factory=time.monotonic)
    num_taken: int = 0
    """Items that a pass has taken."""
    outcomes: dict[int, Any] = field(default_factory=dict)
    """Place -> its reply."""
    sent: dict[int, str] = field(default_factory=dict)
    """Place -> the text that was handed to `on_text`."""
    is_counted: bool = False
    """Whether the line has counted how it ended."""

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ticket.future.done()

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def fail(self, error: BaseException) -> bool:
        """Bring an error instead of the outcome; return whether somebody waited for it."""
        with suppress(InvalidStateError):
            self.ticket.future.set_exception(error)
            return True
        return False

    def deliver(self, place: int, outcome: Any) -> None:
        """Keep the outcome of one item; the last one brings all of them."""
        self.outcomes[place] = outcome
        if len(self.outcomes) == len(self.items):
            with suppress(InvalidStateError):  # cancelled, or failed
                self.ticket.future.set_result([self.outcomes[n] for n in range(len(self.items))])


Batch = list[tuple[Request, Item]]


class WaitingLine:
    """Requests that wait: tasks take turns, and within a task the first comes first. Any thread may use it.

    max_items: that may wait. max_batch_tokens: of one pass. max_read_tokens: of its inputs and options alone; default:
        as many.
    """

    def __init__(self, *, max_items: int, max_batch_tokens: int, max_read_tokens: int | None = None) -> None:
        self._max_items, self._max_batch_tokens = max_items, max_batch_tokens
        self._max_read_tokens = max_batch_tokens if max_read_tokens is None else max_read_tokens
        self._changed = threading.Condition()
        self._lines: dict[str, deque[Request]] = {}
        self._turns: deque[str] = deque()
        self._turn = ""  # whose pass was taken last
        self._serving: Sequence[Request] = ()
        self._num_items = 0
        self._closed = False
        self._pace_s = _FIRST_PACE_S
        self.outcomes: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._num_items

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    def lengths(self) -> dict[str, int]:
        """Return the number of waiting inputs of each task that has any."""
        with self._changed:
            lines = self._lines.items()
            return {key: sum(len(r.items) - r.num_taken for r in line) for key, line in lines if line}

    def add(self, request: Request) -> None:
        """Let a request wait.

        Raises:
            QueueFull: too many inputs wait.
            Closing: no more are taken.
            UserError: it has more inputs than may ever wait.
        """
        with self._changed:
            self._refuse_if_closed()
            self._drop_given_up()
            num = len(request.items)
            if num > self._max_items:
                self.outcomes["refused"] += 1
                raise UserError(
                    f"{num:,} inputs at once are more than may wait ({self._max_items:,}); send fewer at a time"
                )
            if self._num_items + num > self._max_items:
                self.outcomes["refused"] += 1
                wait_s = self._wait_s(self._num_items + num - self._max_items)
                raise QueueFull(
                    f"{self._num_items:,} inputs wait already (at most {self._max_items:,}); try again in"
                    f" {wait_s:.0f} s",
                    retry_after_s=wait_s,
                )
            if request.key not in self._lines:
                self._lines[request.key] = deque()
            if request.key not in self._turns:
                self._turns.append(request.key)
            self._lines[request.key].append(request)
            self._num_items += num
            self._changed.notify_all()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Closing("the service is closing and takes no more requests; try again later")

    def _wait_s(self, num_items: int) -> float:
        return max(1.0, num_items * self._pace_s)

    def note_pace(self, seconds: float, num_items: int) -> None:
        """Learn how long an input takes, from a pass of `num_items`."""
        self._pace_s += _PACE_SHARE * (seconds / max(1, num_items) - self._pace_s)

    def take(self, *, timeout: float) -> Batch:
        """Return inputs that can share one pass, of the task whose turn it is; none after `timeout` seconds."""
        with self._changed:
            self._serving = ()
            self._end_turn()
            self._drop_given_up()
            if not self._num_items and not self._closed and timeout > 0:
                self._changed.wait(timeout)
                self._drop_given_up()
            while self._turns:
                key = self._turns.popleft()
                line = self._lines[key]
                if not line:
                    del self._lines[key]
                    continue
                batch = self._take_from(line)
                self._serving = list(dict.fromkeys(request for request, _ in batch))
                self._turn = key
                if not line:
                    del self._lines[key]
                return batch
            return []

    def _end_turn(self) -> None:
        """Let a task whose pass has ended wait for its next turn, behind those that came during the pass."""
        if self._turn in self._lines and self._turn not in self._turns:
            self._turns.append(self._turn)

    def _take_from(self, line: deque[Request]) -> Batch:
        """Return the first request's inputs, and those of others that may share its pass, as many as fit."""
        batch: Batch = []
        group, num_tokens, num_read = line[0].group, 0, 0
        for request in [one for one in line if one.group == group]:
            while request.num_taken < len(request.items):
                item = request.items[request.num_taken]
                num_tokens, num_read = num_tokens + item.num_tokens, num_read + item.num_read
                if batch and (num_tokens > self._max_batch_tokens or num_read > self._max_read_tokens):
                    break
                batch.append((request, item))
                request.num_taken += 1
                self._num_items -= 1
            if request.num_taken < len(request.items):
                break
            line.remove(request)
        return batch

    def _drop_given_up(self) -> None:
        """Drop requests that were cancelled, and fail those whose deadline has passed."""
        for line in self._lines.values():
            for request in [one for one in line if one.is_over or one.is_late]:
                line.remove(request)
                self._num_items -= len(request.items) - request.num_taken
                self.give_up(request)

    def give_up(self, request: Request) -> None:
        """End a request that was cancelled or is late, and count it."""
        if request.ticket.future.cancelled():
            self.count(request, "cancelled")
        elif request.fail(DeadlinePassed.after(time.monotonic() - request.since)):
            self.count(request, "late")

    def count(self, request: Request, outcome: str) -> None:
        """Count how a request ended; only once, although several passes may have had a part of it."""
        with self._changed:
            if not request.is_counted:
                request.is_counted = True
                self.outcomes[outcome] += 1

    def wake(self) -> None:
        """Make `take` look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self, *, finish: bool) -> None:
        """Take no more. finish: keep what waits; else it fails, and so does what a pass has taken."""
        with self._changed:
            self._closed = True
            if not finish:
                self._drop_given_up()
                for request in [*self._serving, *chain.from_iterable(self._lines.values())]:
                    if request.fail(Closing("the service was closed before it answered; try again later")):
                        self.count(request, "closed")
                self._lines.clear()
                self._turns.clear()
                self._num_items = 0
            self._changed.notify_all()


def wait_for(ticket: Ticket[Outcome], *, timeout: float | None) -> Outcome:
    """Return what a ticket brings.

    Raises:
        DeadlinePassed: it takes more than `timeout` seconds; the ticket is cancelled.
    """
    try:
        return ticket.future.result(timeout)
    except TimeoutError:
        raise DeadlinePassed.after(timeout or 0) from None
    finally:
        ticket.cancel()  # also if Ctrl-C interrupts the caller; one that has its outcome keeps it


def to_deadline(seconds: float | None) -> float | None:
    """Return the moment so many seconds from now, on the clock of `time.monotonic`."""
    return None if seconds is None else time.monotonic() + seconds
