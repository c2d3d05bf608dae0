"""What every request passes: its id, its log line, access, limits of size and time, and headers for browsers."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyicl.server.access import Role, Tokens, bearer_token, is_from_other_site
from manyicl.server.operations import Metrics
from manyicl.server.problems import CLIENT_LEFT, ProblemError, answer_problem, find_problem
from manyicl.server.settings import ServerSettings
from manyicl.service import Closing

# What a page of this server may load: its own files.
_PAGE_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none';"
    " img-src 'self' data:"
)
_ASKING = re.compile(r"/v1/(tasks/[^/]+/predict|completions|chat/completions)")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}")
_logger = logging.getLogger("manyicl.server")


def needed_role(method: str, path: str) -> Role | None:
    """Return the role that a request needs; None for the page, its files, the documentation and the health checks."""
    guarded = path.startswith("/v1") or path.startswith("/metrics")
    if method in ("GET", "HEAD", "OPTIONS"):
        return "read" if guarded else None
    return "read" if _ASKING.fullmatch(path) else "admin"


class Gate:
    """ASGI middleware around the whole app.

    A route can put fields of its log line into `scope["manyicl.log"]`.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, tokens: Tokens | None, metrics: Metrics) -> None:
        self.app, self.settings, self.tokens, self.metrics = app, settings, tokens, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        await _Passage(self, scope, receive, send).run()

    def refuse(self, method: str, path: str, headers: Headers) -> ProblemError | None:
        """Return why a request is not admitted, None if it is."""
        role = needed_role(method, path)
        if self.tokens is None:
            if is_from_other_site(headers):
                return ProblemError(
                    "other-site",
                    403,
                    "this server has no tokens, so it serves only this computer, by its own address, and no other"
                    " site's page; start it with --token-file to serve others",
                )
        elif role is not None:
            token = bearer_token(headers)
            found = self.tokens.find_role(token) if token else None
            if found is None:
                detail = "this token is not known" if token else "a token is needed: Authorization: Bearer TOKEN"
                return ProblemError("unauthorized", 401, detail, headers={"www-authenticate": "Bearer"})
            if role == "admin" and found != "admin":
                return ProblemError(
                    "forbidden", 403, "this token may ask, not change tasks; use one with the role admin"
                )
        if role == "admin" and self.settings.read_only:
            return ProblemError("read-only", 403, "this server is read-only; change tasks on one that is not")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            return self.too_large()
        return None

    def too_large(self) -> ProblemError:
        """Return the error of a body that is too long."""
        most = self.settings.max_body_bytes / (1 << 20)
        return ProblemError("body-too-large", 413, f"the body is longer than {most:.4g} MiB; send it in parts")


class _Passage:
    """One request on its way through the gate and back."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self._receive, self._send, self.method = gate, receive, send, scope["method"]
        # HEAD is answered as GET is, for routes have no method of that name; uvicorn leaves the body out.
        self.scope = {**scope, "method": "GET"} if self.method == "HEAD" else scope
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.log: dict[str, Any] = {}
        self.started = time.monotonic()
        self.status: int | None = None
        self.num_body_bytes = 0
        self.has_body = False
        self.left = False
        self.is_slow = False

    async def run(self) -> None:
        self.scope["manyicl.log"], self.scope["manyicl.id"] = self.log, self.id
        problem = self.gate.refuse(self.method, self.scope["path"], self.headers)
        try:
            if problem is None:
                await self.gate.app(self.scope, self.receive, self.send)
            else:
                await self._answer(problem)
        except (Exception, asyncio.CancelledError) as raised:
            # uvicorn cancels what is not answered when it has waited long enough at its end.
            is_over = isinstance(raised, asyncio.CancelledError)
            error = Closing("the server ended before it answered; try again later") if is_over else raised
            # If the answer is under way it is broken off: uvicorn closes the connection of an answer that does not end,
            # so that it does not pass for a whole one.
            kind = "slow-client" if self.is_slow else (problem := find_problem(error)).kind
            if problem is not None and self.status is None:
                await self._answer(problem)
            else:
                self.log["broken_off"] = kind
        finally:
            self._report()

    async def _answer(self, problem: ProblemError) -> None:
        self.scope["manyicl.problem"] = problem.kind
        await answer_problem(self.scope["path"], problem)(self.scope, self._receive, self.send)

    async def receive(self) -> Message:
        """Receive a piece of the body within the limits of size and time; later, wait until the client leaves."""
        if self.has_body:
            message = await self._receive()
            self.left = self.left or message["type"] == "http.disconnect"
            return message
        rest_s = self.started + self.gate.settings.body_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(rest_s, 0)):
                message = await self._receive()
        except TimeoutError:
            seconds = self.gate.settings.body_timeout_s
            headers = {"connection": "close"}
            raise ProblemError(
                "slow-request", 408, f"the request took longer than {seconds:g} s", headers=headers
            ) from None
        self.num_body_bytes += len(message.get("body", b""))
        if self.num_body_bytes > self.gate.settings.max_body_bytes:
            raise self.gate.too_large()
        self.has_body = message["type"] == "http.disconnect" or not message.get("more_body", False)
        self.left = message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Send a piece of the answer, unless the client leaves it unread for too long."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            headers["content-security-policy"] = _PAGE_POLICY
            if self.scope["path"].startswith("/v1"):
                headers["cache-control"] = "no-store"
        try:
            async with asyncio.timeout(self.gate.settings.send_timeout_s):
                await self._send(message)
        except TimeoutError:
            self.is_slow = True
            raise _SlowClientError from None

    def _report(self) -> None:
        seconds = time.monotonic() - self.started
        status = self.status or (CLIENT_LEFT if self.left else 500)
        route = getattr(self.scope.get("route"), "path", "other")
        self.gate.metrics.observe(method=self.method, route=route, status=status, seconds=seconds)
        if route in ("/healthz", "/readyz", "/metrics") and status < 400:
            return  # asked for every few seconds
        fields = {
            "method": self.method,
            "path": self.scope["path"],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "request_id": self.id,
            "problem": self.scope.get("manyicl.problem"),
            **self.log,
        }
        _logger.log(logging.ERROR if status >= 500 else logging.INFO, "request", extra=fields)


class _SlowClientError(Exception):
    """A client that does not read its answer."""
