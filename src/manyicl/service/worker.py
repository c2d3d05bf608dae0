"""The one thread that owns the model: it answers what waits, and measures tasks while nothing does."""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from manyicl.errors import UserError
from manyicl.service.answering import Answerer
from manyicl.service.refusals import Closing
from manyicl.service.requests import Batch, Request, WaitingLine

# Upper ends of the latencies' buckets.
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_IDLE_S = 0.5
# The longest that a server is waited for by one step of the background, which takes a second or two.
_BACKGROUND_S = 120.0
_logger = logging.getLogger("manyicl")


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """What a service has done so far, and what it holds."""

    waiting: Mapping[str, int]
    """Task -> inputs that wait; "" are plain generations."""
    requests: Mapping[str, int]
    """Outcome -> requests: answered, cancelled, late, refused (the queue was full), failed, closed."""
    num_answers: int
    """Inputs that were answered."""
    num_passes: int
    """Passes that answered them."""
    latency_sum_s: float
    """From request to outcome, of all answered requests."""
    latency_counts: Mapping[float, int]
    """Upper end in seconds -> answered requests up to it; infinity counts all."""
    prefixes: Mapping[str, int]
    """What became of prefixes: hits, extended, loaded, encoded, spilled, dropped, bad_files."""
    prefix_bytes: int
    """Memory of encoded prefixes."""
    spilled_bytes: int
    """Disk of encoded prefixes."""
    tokens: Mapping[str, int]
    """Kind -> tokens: prompt and answer as requests count them; prefix and query as they went through the model."""
    num_tasks: int
    measuring: str | None
    """The task that is being measured."""


@dataclass(slots=True)
class Served:
    """What the worker counts."""

    num_answers: int = 0
    num_passes: int = 0
    latency_sum_s: float = 0.0
    latencies: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))

    def observe(self, seconds: float) -> None:
        """Count an answered request."""
        self.latency_sum_s += seconds
        self.latencies[bisect.bisect_left(BUCKETS_S, seconds)] += 1

    def latency_counts(self) -> dict[float, int]:
        """Return the requests up to each bucket's end."""
        total, counts = 0, {}
        for end, number in zip((*BUCKETS_S, float("inf")), self.latencies, strict=True):
            total += number
            counts[end] = total
        return counts


class Background(Protocol):
    """Work for the time when nothing waits."""

    def step(self) -> bool:
        """Do a piece of it, in a second or two; return whether there was any."""


class NoBackground:
    """No work in the background."""

    def step(self) -> bool:
        """Do nothing."""
        return False


class Worker:
    """A thread that serves a line until it is closed. An error fails its requests, and the thread goes on.

    make_background: makes the work for idle time, in the thread itself.
    """

    def __init__(
        self, answerer: Answerer, line: WaitingLine, *, make_background: Callable[[Answerer], Background]
    ) -> None:
        self.answerer, self.line = answerer, line
        self.served = Served()
        self._make_background = make_background
        self._started = threading.Event()
        self._ended = threading.Event()
        self._start_error: BaseException | None = None
        # Not joined at the interpreter's end: a service that was never closed must not keep a program alive.
        self._thread = threading.Thread(target=self._run, name="manyicl-worker", daemon=True)

    def start(self) -> None:
        """Start, and wait until the engine is entered.

        Raises:
            UserError: it cannot be, as when a server is not reached.
        """
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def join(self, timeout: float | None) -> bool:
        """Wait for the end of a closed line; return whether it came."""
        self._thread.join(timeout)
        return self._ended.is_set()

    def _run(self) -> None:
        try:
            with self.answerer:
                background = self._make_background(self.answerer)
                self._started.set()
                self._serve_all(background)
        except BaseException as error:
            self._start_error = error
            if self._started.is_set():
                _logger.exception("the worker of the service has ended")
        finally:
            self.line.close(finish=False)  # nobody waits for a thread that is gone
            self._started.set()
            self._ended.set()

    def _serve_all(self, background: Background) -> None:
        is_idle = False
        while True:
            batch = self.line.take(timeout=_IDLE_S if is_idle else 0)
            if batch:
                is_idle = False
                self._serve(batch)
            elif self.line.closed and not len(self.line):  # in this order: nothing is added to a closed line
                return
            else:
                is_idle = not self._do_background(background)

    def _do_background(self, background: Background) -> bool:
        if self.answerer.calls.fault:
            return False  # a server that does not answer is left to requests and trials
        self.answerer.calls.until = time.monotonic() + _BACKGROUND_S
        try:
            return background.step()
        except Exception:
            _logger.exception("work in the background failed")
            return False

    def _serve(self, batch: Batch) -> None:
        """Answer a batch. If that fails, its requests are tried one by one, so that one of them cannot fail others."""
        began = time.monotonic()
        requests = list(dict.fromkeys(request for request, _ in batch))
        try:
            self.answerer.answer(batch)
        except BaseException as error:
            if len(requests) > 1 and isinstance(error, UserError):
                for request in requests:
                    self._serve([(one, item) for one, item in batch if one is request])
                return
            self._fail(requests, error)
            if not isinstance(error, Exception):
                raise
        self._count(batch, requests, began)

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        if not isinstance(error, UserError):
            _logger.error("a pass failed", exc_info=error)
        shown = error if isinstance(error, Exception) else Closing("the service has ended; start it again")
        for request in requests:
            if request.is_late:
                self.line.give_up(request)
            request.fail(shown)

    def _count(self, batch: Batch, requests: list[Request], began: float) -> None:
        now = time.monotonic()
        self.served.num_passes += 1
        self.served.num_answers += sum(item.place in request.outcomes for request, item in batch)
        self.line.note_pace(now - began, len(batch))
        for request in requests:
            future = request.ticket.future
            if not request.is_over:
                if request.is_late:
                    self.line.give_up(request)
            elif future.cancelled():
                self.line.count(request, "cancelled")
            elif future.exception() is not None:
                self.line.count(request, "failed")
            else:
                self.line.count(request, "answered")
                self.served.observe(now - request.since)
