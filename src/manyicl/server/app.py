"""The application: the routes of the API, the page, errors in one shape, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from manyicl.server.access import Tokens
from manyicl.server.gate import Gate, needed_role
from manyicl.server.operations import Metrics, make_operation_routes
from manyicl.server.problems import PROBLEM_TYPE, ProblemBody, find_problem, handle_errors, is_openai
from manyicl.server.reference import make_reference
from manyicl.server.routes.bodies import ExampleBody, UploadBody
from manyicl.server.routes.completions import make_completion_routes
from manyicl.server.routes.predict import make_predict_routes
from manyicl.server.routes.tasks import make_task_routes
from manyicl.server.settings import ServerSettings
from manyicl.service import Closing, Service

PAGE = Path(__file__).parent / "page"
# How often it is looked whether the model has to be tried, at the start or because its server did not answer.
TRIAL_S = 10.0
_logger = logging.getLogger("manyicl.server")
_ABOUT = """One model, every task: upload labelled examples, and ask. Errors are `application/problem+json`; on OpenAI's
routes they have OpenAI's shape."""


def create_app(service: Service, settings: ServerSettings, *, tokens: Tokens | None = None) -> FastAPI:
    """Return the application that serves `service`, which is closed with it.

    tokens: those of `settings.token_file`; None: no token is needed.
    """
    metrics = Metrics(service)
    app = FastAPI(
        title="manyicl",
        summary="Answers from examples.",
        description=_ABOUT,
        version=version("manyicl"),
        lifespan=partial(_living, service, settings),
        docs_url=None,  # its page loads scripts from a CDN; ours is `make_reference`
        redoc_url=None,
    )
    app.add_middleware(Gate, settings=settings, tokens=tokens, metrics=metrics)
    handle_errors(app)
    for routes in (
        make_task_routes(service, settings),
        make_predict_routes(service, settings),
        make_completion_routes(service, settings),
        make_operation_routes(service, settings, metrics),
    ):
        app.include_router(routes)
    app.include_router(make_reference(app))
    if has_page():
        app.mount("/", _Page(directory=PAGE, html=True), name="page")
    app.openapi = partial(_describe, app, with_tokens=tokens is not None)  # type: ignore[method-assign]
    return app


class _Page(StaticFiles):
    """The files of the page. They get every request that no route takes, also those with another method."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with a file, with 405 if there is one, or a route, that has another method, else with 404."""
        if any(route.matches(scope)[0] is Match.PARTIAL for route in scope["app"].routes):
            raise HTTPException(405)
        if scope["method"] == "GET":  # the gate asks for GET in place of HEAD
            return await super().get_response(path, scope)
        await super().get_response(path, {**scope, "method": "GET"})  # raises 404 where there is nothing
        raise HTTPException(405)


def has_page() -> bool:
    """Return whether this installation has the page for browsers."""
    return (PAGE / "index.html").is_file()


@asynccontextmanager
async def _living(service: Service, settings: ServerSettings, _: FastAPI) -> AsyncIterator[None]:
    """Try the model in the background, and close the service at the end."""
    trial = asyncio.create_task(_try_model(service))
    yield
    trial.cancel()
    await run_sync(partial(service.close, finish=True, timeout=settings.shutdown_s))


async def _try_model(service: Service) -> None:
    """Let a model that is not ready do one forward pass, and again if that fails; /readyz says no until it can."""
    while True:
        try:
            if not service.is_ready:
                await run_sync(service.ready, abandon_on_cancel=True)
        except Closing:
            return
        except Exception as error:
            _logger.warning("the model could not answer: %s", find_problem(error).detail)
        await asyncio.sleep(TRIAL_S)


def _describe(app: FastAPI, *, with_tokens: bool) -> dict[str, Any]:
    """Return the OpenAPI document: FastAPI's, with our form of errors, and the bodies that FastAPI cannot derive."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for body in (UploadBody, ExampleBody, ProblemBody):
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        schemas[body.__name__] = schema
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    error = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            content = error if is_openai(path) else problem
            operation["responses"]["default"] = {"description": "An error", "content": content}
            if with_tokens and needed_role(method.upper(), path) is not None:
                operation["security"] = [{"bearer": []}]
    if with_tokens:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = document
    return document
