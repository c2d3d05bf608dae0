"""uvicorn's HTTP/1.1 protocol, which does not wait for ever for a client's first request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# How long a new connection may take until its first request has come with all of its headers.
FIRST_REQUEST_S = 30.0


class ImpatientProtocol(H11Protocol):
    """Closes a connection that brings no request: otherwise idle clients could use up all connections."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection."""
        super().connection_made(transport)
        self._first_request = self.loop.call_later(FIRST_REQUEST_S, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let a connection go."""
        self._first_request.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if getattr(self, "cycle", None) is None:  # uvicorn's own types leave the None out
            self.transport.close()
