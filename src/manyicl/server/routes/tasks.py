"""Routes of tasks and their examples: upload, list, append, correct, replace, remove; and the measured curve."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response

from manyicl.server.problems import ProblemError
from manyicl.server.routes.bodies import (
    CorrectedBody,
    CorrectionBody,
    ExampleId,
    MeasurementBody,
    RegisteredBody,
    RemovalBody,
    ServedExampleBody,
    ServedExamplesBody,
    TaskBody,
    TasksBody,
    make_corrected,
    make_registered,
    make_task,
)
from manyicl.server.routes.uploads import UPLOAD_BODY, Upload, receiving
from manyicl.server.settings import ServerSettings
from manyicl.service import Service, UnknownTask

# Uploads are read by few threads, so that they leave some to the questions.
_UPLOADS_AT_ONCE = 2


def make_task_routes(service: Service, settings: ServerSettings) -> APIRouter:
    """Return the routes of tasks and their examples."""
    router = APIRouter(prefix="/v1/tasks", tags=["tasks"])
    uploads = anyio.CapacityLimiter(_UPLOADS_AT_ONCE)
    _add_task_routes(router, service, settings, uploads)
    _add_example_routes(router, service, settings, uploads)
    return router


def _add_task_routes(
    router: APIRouter, service: Service, settings: ServerSettings, uploads: anyio.CapacityLimiter
) -> None:
    base = service.info.base_name

    @router.get("")
    def list_tasks() -> TasksBody:
        """List all tasks."""
        shown = []
        for task in service.tasks():
            with suppress(UnknownTask):  # removed in this moment, perhaps by another server
                shown.append(make_task(task, base))
        return TasksBody(tasks=shown)

    @router.post("", status_code=201, openapi_extra=UPLOAD_BODY)
    async def add_task(request: Request) -> RegisteredBody:
        """Make a task from a file of examples, or from examples as JSON. Its curve is measured from then on."""

        def add(upload: Upload) -> RegisteredBody:
            task = service.add_task(upload.rows, name=upload.name, settings=upload.settings or {})
            return make_registered(task, base)

        async with receiving(request, most_bytes=settings.max_body_bytes, limiter=uploads) as upload:
            if upload.name is None and not _is_file(upload):
                raise ProblemError("invalid-request", 422, "name: is missing; a new task needs one", param="name")
            return await run_sync(add, upload, limiter=uploads)

    @router.get("/{task}")
    def get_task(task: str) -> TaskBody:
        """Return one task."""
        return make_task(service.task(task), base)

    @router.put("/{task}", openapi_extra=UPLOAD_BODY)
    async def replace_task(task: str, request: Request) -> RegisteredBody:
        """Replace a task and all of its examples, or make it if it is not there."""

        def replace(upload: Upload) -> RegisteredBody:
            return make_registered(
                service.add_task(upload.rows, name=task, settings=upload.settings or {}, replace=True), base
            )

        async with receiving(request, most_bytes=settings.max_body_bytes, limiter=uploads) as upload:
            if upload.name not in (None, task):
                raise ProblemError(
                    "invalid-request", 422, "name: is not the one in the path; leave it out", param="name"
                )
            return await run_sync(replace, upload, limiter=uploads)

    @router.delete("/{task}", status_code=204)
    def remove_task(task: str) -> Response:
        """Remove a task with all of its examples."""
        service.remove_task(task)
        return Response(status_code=204)

    @router.get("/{task}/curve")
    def get_curve(task: str) -> MeasurementBody:
        """Return the score after each number of shots, what to expect, and rows that look mislabelled."""
        return MeasurementBody.model_validate(service.task(task).measurement)


def _add_example_routes(
    router: APIRouter, service: Service, settings: ServerSettings, uploads: anyio.CapacityLimiter
) -> None:
    base = service.info.base_name

    @router.get("/{task}/examples")
    def list_examples(
        task: str,
        start: Annotated[int, Query(ge=0, lt=1 << 53)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> ServedExamplesBody:
        """List examples in the order of their ids, from the `start`-th on."""
        served = service.task(task)
        shown = [ServedExampleBody.model_validate(example) for example in served.examples(start, limit)]
        return ServedExamplesBody(examples=shown, start=start, total=served.num_examples)

    @router.post("/{task}/examples", status_code=201, openapi_extra=UPLOAD_BODY)
    async def append_examples(task: str, request: Request) -> RegisteredBody:
        """Add examples from a file, or as JSON."""

        def append(upload: Upload) -> RegisteredBody:
            registration = service.task(task).add_examples(upload.rows)
            return make_registered(service.task(task), base, registration)

        async with receiving(request, most_bytes=settings.max_body_bytes, limiter=uploads) as upload:
            if upload.name is not None or upload.settings is not None:
                raise ProblemError("invalid-request", 422, "name and settings belong to the task; leave them out")
            return await run_sync(append, upload, limiter=uploads)

    @router.delete("/{task}/examples")
    def remove_examples(task: str, body: RemovalBody) -> TaskBody:
        """Remove several examples."""
        service.task(task).remove_examples(body.ids)
        return make_task(service.task(task), base)

    @router.patch("/{task}/examples/{id}")
    def correct_example(task: str, id: ExampleId, body: CorrectionBody) -> CorrectedBody:
        """Correct the answer of an example; a label that the task did not have is in the notes."""
        registration = service.task(task).correct(id, body.answer)
        return make_corrected(service.task(task), base, registration)

    @router.delete("/{task}/examples/{id}")
    def remove_example(task: str, id: ExampleId) -> TaskBody:
        """Remove one example."""
        service.task(task).remove_examples([id])
        return make_task(service.task(task), base)


def _is_file(upload: Upload) -> bool:
    return not isinstance(upload.rows, list)
