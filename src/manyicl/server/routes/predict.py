"""The route that answers: replies as JSON, or text as server-sent events while it is generated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event
from pydantic_core import to_json

from manyicl.server.problems import ProblemError, find_problem
from manyicl.server.routes.bodies import PredictBody, PredictedBody, ReplyBody
from manyicl.server.settings import ServerSettings
from manyicl.server.waiting import AnyTicket, EventsResponse, Stream, Unsent, wait_for
from manyicl.service import Reply, Service

_EVENTS = """`stream: true` answers with server-sent events: `text` {index, text} while text is generated, `reply`
{index, reply} for each input, then `done` {task, version}; or `problem` if it fails after it has begun."""


def make_predict_routes(service: Service, settings: ServerSettings) -> APIRouter:
    """Return the route that answers inputs of a task."""
    router = APIRouter(prefix="/v1/tasks", tags=["predict"])
    stream_content = {
        "text/event-stream": {"schema": {"type": "string"}, "example": 'event: done\ndata: {"task": "x"}\n\n'}
    }

    @router.post("/{task}/predict", response_model=PredictedBody, responses={200: {"content": stream_content}})
    async def predict(task: str, body: PredictBody, request: Request, response: Response) -> Any:
        inputs, options = read_inputs(body, settings), read_options(body)
        deadline_s = choose_deadline(body.deadline_s, settings)
        log = request.scope["manyicl.log"]
        log.update(task=task, inputs=len(inputs))
        headers: dict[str, str] = {}

        def submit(on_text: Callable[[int, str], None] | None = None) -> AnyTicket[list[Reply]]:
            served = service.task(task)
            are_chosen = scores_choices(service) and (options is not None or bool(served.labels))
            usual = service.settings.answering
            if ignored := body.ignored(usual, are_chosen=are_chosen):
                headers["x-manyicl-ignored"] = ", ".join(ignored)
            return served.submit(
                inputs,
                options=options,
                shots=body.shots.to_choice() if body.shots else None,
                answering=body.to_settings(usual),
                seed=body.seed,
                min_confidence=body.min_confidence,
                deadline=deadline_s,
                on_text=on_text,
            )

        if body.stream:
            stream: Stream[list[Reply]] = Stream(deadline_s=deadline_s)
            await stream.begin(request, partial(submit, stream.on_text))
            events = _events(task, stream, log, log_texts=settings.log_texts)
            return EventsResponse(events, stream, headers=headers)
        replies = await wait_for(request, submit, deadline_s=deadline_s)
        log_replies(log, replies, texts=settings.log_texts)
        response.headers.update(headers)
        return make_predicted(task, replies)

    predict.__doc__ = f"Answer one input, or several, after the task's examples.\n\n{_EVENTS}"
    router.routes[-1].description = predict.__doc__  # type: ignore[attr-defined]
    return router


def read_inputs(body: PredictBody, settings: ServerSettings) -> list[str]:
    """Return the inputs of a request.

    Raises:
        ProblemError: it has none, both forms of them, or too many.
    """
    if (body.input is None) == (body.inputs is None):
        raise ProblemError("invalid-request", 422, "input: give either `input` or `inputs`", param="input")
    inputs = body.inputs if body.inputs is not None else [body.input or ""]
    check_count(len(inputs), settings)
    return inputs


def read_options(body: PredictBody) -> list[list[str]] | None:
    """Return the candidate answers of each input, None if the request has none.

    Raises:
        ProblemError: one input has several lists, or several inputs have one.
    """
    if body.options is None:
        return None
    lists = [one for one in body.options if isinstance(one, list)]
    if body.input is not None and not lists:
        return [[one for one in body.options if isinstance(one, str)]]
    if body.inputs is not None and len(lists) == len(body.inputs):
        return lists
    detail = "options: give a list of texts for `input`, or for `inputs` a list of such lists, one for each"
    raise ProblemError("invalid-request", 422, detail, param="options")


def scores_choices(service: Service) -> bool:
    """Return whether known answers are scored; a model on a server has no parameters here, and generates them too."""
    return service.info.num_parameters is not None


def check_count(count: int, settings: ServerSettings) -> None:
    """Refuse a request with too many inputs."""
    if count > settings.max_inputs:
        raise ProblemError(
            "too-many-inputs", 422, f"inputs: {count:,} are more than {settings.max_inputs:,}; send fewer at once"
        )


def choose_deadline(wanted_s: float | None, settings: ServerSettings) -> float:
    """Return after how many seconds a request is given up."""
    return min(wanted_s or settings.default_deadline_s, settings.max_deadline_s)


def make_predicted(task: str, replies: Sequence[Reply]) -> PredictedBody:
    """Return the replies to a request as they are sent."""
    bodies = [ReplyBody.model_validate(reply) for reply in replies]
    return PredictedBody(task=task, version=bodies[0].task_version, replies=bodies)


def log_replies(log: dict[str, Any], replies: Sequence[Reply], *, texts: bool) -> None:
    """Put into a request's log line what its replies took; their texts only if that was asked for."""
    first = replies[0].timing
    log.update(
        queued_ms=round(first.queued_s * 1000, 1),
        model_ms=round(first.model_s * 1000, 1),
        prefix_cached=first.prefix_cached,
        batch_size=first.batch_size,
        shots=len(replies[0].shots),
        prompt_tokens=sum(reply.num_prompt_tokens for reply in replies),
        answer_tokens=sum(reply.num_answer_tokens for reply in replies),
    )
    if texts:
        log["texts"] = [{"input": reply.input, "answer": reply.answer} for reply in replies]


async def _events(
    task: str, stream: Stream[list[Reply]], log: dict[str, Any], *, log_texts: bool
) -> AsyncIterator[bytes]:
    unsent = Unsent()
    try:
        async for piece in stream.pieces():
            if piece is None:
                yield format_sse_event(comment="waiting")
                continue
            index, text = piece
            unsent.add(index, text)
            yield _event("text", {"index": index, "text": text})
        predicted = make_predicted(task, stream.outcome)
        log_replies(log, stream.outcome, texts=log_texts)
        for index, reply in enumerate(predicted.replies):
            if rest := unsent.rest(index, reply.answer):
                yield _event("text", {"index": index, "text": rest})
            yield _event("reply", {"index": index, "reply": reply})
        yield _event("done", {"task": task, "version": predicted.version})
    except Exception as error:  # the status 200 is sent: the error is the last event
        problem = find_problem(error)
        log["problem"] = problem.kind
        yield _event("problem", problem.to_json())


def _event(name: str, content: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=to_json(content, inf_nan_mode="null").decode())
