"""From the model's thread to the event loop: waiting for a ticket, its text as it comes, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from manyicl.server.problems import CLIENT_LEFT, ProblemError
from manyicl.service import DeadlinePassed

# A comment goes out after so many seconds without text, so that no proxy takes the stream for dead.
KEEP_ALIVE_S = 15.0
# A pass of the model cannot be interrupted, so a reply may come this much after its deadline before it is given up.
GRACE_S = 30.0
# An error before this many seconds still has its own HTTP status; after them the stream has begun with status 200.
BEGIN_S = 10.0

Outcome = TypeVar("Outcome")


class AnyTicket(Protocol[Outcome]):
    """What `submit` returns: a future, and a way to give it up."""

    @property
    def future(self) -> Future[Outcome]:
        """The outcome to come."""

    def cancel(self) -> object:
        """Give it up."""


async def wait_for(request: Request, submit: Callable[[], AnyTicket[Outcome]], *, deadline_s: float) -> Outcome:
    """Return what `submit`'s ticket brings. If the client leaves before that, the ticket is cancelled.

    Raises:
        UserError: the service refuses it, or the deadline has passed.
        ProblemError: the client left; nobody will read this.
    """
    ticket = await run_in_threadpool(submit)
    outcome = asyncio.wrap_future(ticket.future)
    leaving = asyncio.ensure_future(_wait_until_left(request))
    try:
        either: list[asyncio.Future[Any]] = [outcome, leaving]
        await asyncio.wait(either, timeout=deadline_s + GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return outcome.result()
        if leaving.done():
            raise _client_left()
        raise DeadlinePassed.after(deadline_s)
    finally:
        leaving.cancel()
        if not outcome.done():
            ticket.cancel()
            outcome.cancel()


def _client_left() -> ProblemError:
    return ProblemError("client-left", CLIENT_LEFT, "the client closed the connection")


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(Generic[Outcome]):
    """The text of a ticket while it is generated.

    outcome: what the ticket brought, once `pieces` has ended.
    """

    def __init__(self, *, deadline_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()  # as long as the answers at most
        self._deadline_s, self._late = deadline_s, time.monotonic() + deadline_s + GRACE_S
        self._first: list[tuple[int, str] | None] = []
        self._ticket: AnyTicket[Outcome] | None = None

    def on_text(self, index: int, text: str) -> None:
        """Take a piece of text; called by the model's thread, which never waits for a client."""
        self._put((index, text))

    def _put(self, piece: tuple[int, str] | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def begin(self, request: Request, submit: Callable[[], AnyTicket[Outcome]]) -> None:
        """Submit, and wait for the first piece or the end for a few seconds, so that a refusal has its own status.

        Raises:
            UserError: the service refuses it.
            ProblemError: the client left; nobody will read this.
        """
        self._ticket = await run_in_threadpool(submit)
        self._ticket.future.add_done_callback(lambda _: self._put(None))
        first = asyncio.ensure_future(self._queue.get())
        leaving = asyncio.ensure_future(_wait_until_left(request))
        try:
            await asyncio.wait([first, leaving], timeout=BEGIN_S, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                self._first.append(first.result())
            elif leaving.done():
                raise _client_left()
        except BaseException:
            self._ticket.cancel()
            raise
        finally:
            first.cancel()  # what comes later stays in the queue
            leaving.cancel()
        if self._first == [None]:
            self.outcome  # noqa: B018  # raises its error, if it has one

    @property
    def outcome(self) -> Outcome:
        """What the ticket brought.

        Raises:
            UserError: it failed.
        """
        assert self._ticket is not None, "the stream has not begun"
        return self._ticket.future.result(timeout=0)

    async def pieces(self) -> AsyncIterator[tuple[int, str] | None]:
        """Yield pieces of text with the index of their input, or None if there was none for a while.

        Raises:
            DeadlinePassed: no end came in time.
        """
        while True:
            try:
                if self._first:
                    piece = self._first.pop()
                else:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        piece = await self._queue.get()
            except TimeoutError:
                if time.monotonic() > self._late:
                    raise DeadlinePassed.after(self._deadline_s) from None
                yield None
                continue
            if piece is None:
                return
            yield piece

    def close(self) -> None:
        """Give the ticket up; one that has its outcome keeps it."""
        assert self._ticket is not None, "the stream has not begun"
        self._ticket.cancel()


class EventsResponse(StreamingResponse):
    """Server-sent events made of a stream, which is closed however the response ends: sent, failed or cut off.

    Starlette does not close the iterator that it is given; one that is left early would go on until it is collected
    as garbage, and the model with it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], stream: Stream[Any], *, headers: Mapping[str, str] | None = None
    ) -> None:
        # A buffering proxy would hold the events back.
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


class Unsent:
    """How much of each answer a stream has sent, and so what is left of it at the end."""

    def __init__(self) -> None:
        self._sent: dict[int, str] = {}

    def add(self, index: int, text: str) -> None:
        """Record a piece that was sent."""
        self._sent[index] = self._sent.get(index, "") + text

    def rest(self, index: int, answer: str) -> str:
        """Return what is left of an answer: all of one that is chosen, usually nothing of one that was generated."""
        return answer.removeprefix(self._sent.get(index, ""))
