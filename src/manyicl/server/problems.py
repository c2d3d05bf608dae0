"""Errors as clients see them: problem+json (RFC 9457), or OpenAI's shape on OpenAI's routes; never a traceback."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import Scope

from manyicl.errors import UserError, find_refusal
from manyicl.service import (
    BadExamples,
    Closing,
    DeadlinePassed,
    InputTooLong,
    LibraryFault,
    QueueFull,
    TaskExists,
    UnknownExample,
    UnknownTask,
)
from manyicl.tasks import Fault

# nginx's number for a client that left before its answer: nobody receives it, it stands in the log.
CLIENT_LEFT = 499
PROBLEM_TYPE = "application/problem+json"
_STATUSES: tuple[tuple[type[UserError], str, int], ...] = (
    (UnknownTask, "unknown-task", 404),
    (UnknownExample, "unknown-example", 404),
    (TaskExists, "task-exists", 409),
    (BadExamples, "bad-examples", 422),
    (InputTooLong, "input-too-long", 422),
    (QueueFull, "queue-full", 429),
    (Closing, "closing", 503),
    (DeadlinePassed, "deadline-passed", 504),
    (LibraryFault, "library-fault", 500),
)
# Seconds after which a client may ask a server again that is being replaced.
_CLOSING_RETRY_S = 5
_MOST_FAULTS = 50
# Those that routes have; HEAD goes with GET.
_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
# What pydantic puts into the place of an error for each type that a field may have, and how such an error begins.
_TYPE, _SHOULD = re.compile(r"str|int|float|bool|list\[.*\]"), "Input should be a valid "
_logger = logging.getLogger("manyicl.server")


class ProblemBody(BaseModel):
    """An error (RFC 9457). Some kinds have more members, such as the faults of an upload."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="What kind of error it is: `urn:manyicl:` and the kind.")
    title: str = Field(description="The kind in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="One line: what is wrong, and what to do.")


class ProblemError(HTTPException):
    """An error on its way to a client. FastAPI lets an HTTPException through wherever it is raised.

    kind: a few words with hyphens, the same for all errors of the kind. detail: one line, what is wrong and what to do.
    param: the part of the request that is wrong, if there is one. more: further members of the body.
    """

    def __init__(
        self,
        kind: str,
        status: int,
        detail: str,
        *,
        param: str | None = None,
        more: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.kind, self.param, self.more = kind, param, more or {}

    def to_json(self) -> dict[str, Any]:
        """Return the body of the error."""
        return {
            "type": f"urn:manyicl:{self.kind}",
            "title": self.kind.replace("-", " ").capitalize(),
            "status": self.status_code,
            "detail": self.detail,
            **self.more,
        }

    def to_openai(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        if self.kind in ("unknown-task", "unknown-model"):
            code = "model_not_found"
        elif self.kind == "input-too-long":
            code = "context_length_exceeded"
        else:
            code = self.kind.replace("-", "_")
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {"error": {"message": self.detail, "type": kind, "code": code, "param": self.param, **self.more}}


def find_problem(error: BaseException) -> ProblemError:
    """Return an error as it is reported to a client; a bug of ours is logged with its traceback."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, UserError):
        return _from_refusal(error)
    if isinstance(error, RequestValidationError | ValidationError):
        return _from_validation(error.errors())
    if isinstance(error, HTTPException):
        return _from_http(error)
    refused = find_refusal(error)
    if refused is not None:
        _logger.error("the system refused: %s", refused)
        return ProblemError("system-refused", 507 if "disk" in refused else 500, f"the server cannot go on: {refused}")
    _logger.error("a bug of manyicl", exc_info=error)
    return ProblemError("internal-error", 500, "a bug of manyicl; the server's log has its traceback, please report it")


def _from_refusal(error: UserError) -> ProblemError:
    detail = str(error)
    for kind_of_error, kind, status in _STATUSES:
        if not isinstance(error, kind_of_error):
            continue
        more: dict[str, Any] = {}
        headers: dict[str, str] = {}
        if isinstance(error, BadExamples):
            shown = error.faults[:_MOST_FAULTS]
            more["faults"] = [_describe_fault(fault) for fault in shown]
        if isinstance(error, QueueFull):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error, Closing):
            headers["retry-after"] = str(_CLOSING_RETRY_S)
        return ProblemError(kind, status, detail, more=more, headers=headers)
    return ProblemError("refused", 422, detail)


def _describe_fault(fault: Fault) -> dict[str, Any]:
    about = {"kind": fault.kind, "count": fault.count, "rows": list(fault.rows), "message": fault.message}
    return about if fault.settings is None else {**about, "settings": fault.settings}


# What pydantic calls a field that is no JSON object, where its own text speaks of attributes in Python.
_OBJECT_TYPES = ("model_attributes_type", "model_type", "dataclass_type", "dict_type")


def _from_validation(errors: Sequence[Any]) -> ProblemError:
    """Return which fields of a body or query are wrong, and why. Their values are not repeated: they are texts."""
    if errors and tuple(errors[0]["loc"]) == ("body",) and isinstance(errors[0].get("input"), bytes):
        detail = "the body is not sent as JSON; send it as application/json (curl --json)"
        return ProblemError("unsupported-media-type", 415, detail)
    entries = []
    errors = _join_branches(errors)
    for error in errors[:_MOST_FAULTS]:
        is_broken = error["type"] == "json_invalid"  # its place is a number of characters, not a field
        place = [str(part) for part in error["loc"] if part not in ("body", "query", "path")] if not is_broken else []
        message = "is not JSON" if is_broken else _one_line(str(error["msg"])).removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "No field has this name; leave it out, or see /docs"
        elif error["type"] in _OBJECT_TYPES:
            message = "Input should be an object, as in {...}; see /docs"
        entries.append({"field": ".".join(place) or "body", "message": message})
    first = entries[0] if entries else {"field": "body", "message": "is wrong"}
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ProblemError(
        "invalid-request",
        422,
        f"{first['field']}: {first['message'][:1].lower()}{first['message'][1:]}{others}",
        param=first["field"],
        more={"errors": entries},
    )


def _join_branches(errors: Sequence[Any]) -> list[dict[str, Any]]:
    """Return pydantic's errors with one for a field that may be of several types, of which it reports each."""
    fields: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], Any]]] = {}
    for error in errors:
        place = tuple(error["loc"])
        known = place[:-1] if error["type"] == "extra_forbidden" else place  # its last part is a name of the client's
        cut = next((n for n, part in enumerate(known) if _TYPE.fullmatch(str(part))), len(place))
        fields.setdefault(place[:cut], []).append((place[cut + 1 :], error))
    joined = []
    for field, found in fields.items():
        inside = [(rest, error) for rest, error in found if rest]
        if inside or len(found) == 1:  # it has one of the types, but a part of it is wrong
            joined += [{**error, "loc": (*field, *rest)} for rest, error in inside or found]
        else:
            *others, last = (str(error["msg"]).removeprefix(_SHOULD) for _, error in found)
            joined.append({**found[0][1], "loc": field, "msg": f"{_SHOULD}{', '.join(others)} or {last}"})
    return joined


def _from_http(error: HTTPException) -> ProblemError:
    detail = error.detail if isinstance(error.detail, str) and error.detail else HTTPStatus(error.status_code).phrase
    kind = re.sub(r"[^a-z]+", "-", HTTPStatus(error.status_code).phrase.lower()).strip("-")
    if error.status_code == 404:
        kind, detail = "unknown-path", "there is nothing at this path; /docs lists what there is"
    if error.status_code == 405:
        detail = "this path does not have this method; /docs lists what there is"
    return ProblemError(kind, error.status_code, _one_line(detail), headers=error.headers or {})


def _one_line(text: str) -> str:
    return " ".join(text.split())


def is_openai(path: str) -> bool:
    """Return whether a path is one of OpenAI's API, whether or not it is served here."""
    return path.startswith("/v1/") and not path.startswith("/v1/tasks")


def answer_problem(path: str, problem: ProblemError) -> JSONResponse:
    """Return an error as the response to a request for `path`."""
    headers = dict(problem.headers or {})
    if is_openai(path):
        # OpenAI has no 422: its client raises BadRequestError, which programs know, for 400.
        status = 400 if problem.status_code == 422 else problem.status_code
        return JSONResponse(problem.to_openai(), status_code=status, headers=headers)
    return JSONResponse(problem.to_json(), status_code=problem.status_code, headers=headers, media_type=PROBLEM_TYPE)


def handle_errors(app: FastAPI) -> None:
    """Answer every error of an app's routes as a problem."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        problem = find_problem(error)
        request.scope["manyicl.problem"] = problem.kind
        response = answer_problem(request.url.path, problem)
        if response.status_code == 405:
            response.headers["allow"] = ", ".join(_find_methods(app, request.scope))
        return response

    for kind in (ProblemError, UserError, RequestValidationError, ValidationError, HTTPException, OSError, MemoryError):
        app.add_exception_handler(kind, answer)


def _find_methods(app: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of a path: those that its routes take, or, without a route, that of the page's files."""
    routes = [route for route in app.routes if not isinstance(route, Mount)]  # the page's files take what is left

    def is_taken(method: str) -> bool:
        return any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)

    methods = [method for method in _METHODS if is_taken(method)] or ["GET"]
    return sorted([*methods, "HEAD"] if "GET" in methods else methods)  # the gate asks for GET in place of HEAD


def without_folder(error: UserError, folder: Path) -> UserError:
    """Return an error of an uploaded file whose messages name the file alone, not the server's temporary folder."""
    prefix = f"{folder}/"
    error.args = tuple(arg.replace(prefix, "") if isinstance(arg, str) else arg for arg in error.args)
    if isinstance(error, BadExamples):
        error.faults = tuple(replace(fault, message=fault.message.replace(prefix, "")) for fault in error.faults)
    return error
