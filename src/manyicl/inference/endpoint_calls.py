"""The calls to a server: until when they are waited for, and why the last one got no answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only those who use a server install it
    import httpx2

# A server that was waited for so long without an answer is at fault; after a shorter deadline the caller may be.
PATIENCE_S = 30.0
CONNECT_TIMEOUT_S = 10.0
_LEAST_S = 0.01  # a timeout of 0 means something else to sockets


@dataclass(slots=True)
class EndpointCalls:
    """What the engines of one server share. One thread sets `until`; any may read `fault`."""

    until: float = math.inf
    """No call is waited for after it; on the clock of `time.monotonic`."""
    fault: str = ""
    """Why the last call got no reply; "" if it got one, even a refusal."""

    def are_over(self) -> bool:
        """Return whether no answer is waited for any more."""
        return time.monotonic() >= self.until

    def left_s(self, most_s: float) -> float:
        """Return how long may be waited now, at most `most_s` seconds."""
        return max(_LEAST_S, min(most_s, self.until - time.monotonic()))

    @contextmanager
    def waiting(self, most_s: float) -> Iterator[httpx2.Timeout]:
        """Give the call inside its timeouts, at most `most_s` seconds, and note whether it got an answer.

        Raises:
            httpx2.TimeoutException: none in that time, which is in its words; or there was no time left to ask.
        """
        import httpx2

        if self.are_over():
            raise httpx2.ReadTimeout("no time was left to ask")
        wait_s = self.left_s(most_s)
        try:
            yield httpx2.Timeout(wait_s, connect=min(CONNECT_TIMEOUT_S, wait_s))
        except httpx2.TimeoutException as error:
            if wait_s >= min(PATIENCE_S, most_s):
                self.fault = f"no answer within {wait_s:.3g} s"
            if isinstance(error, httpx2.ConnectTimeout):
                raise
            raise httpx2.ReadTimeout(f"no answer within {wait_s:.3g} s") from None
        except httpx2.TransportError:
            self.fault = "no connection, or a broken one"
            raise
        self.fault = ""
