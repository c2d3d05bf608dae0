"""OpenAI's routes: models, completions and chat completions, with `<base>:<task>` as the name of a model.

The input of a task is the prompt, or the user's last message; the task's examples stand before it. The base alone
completes the prompt as it is. Decoding is greedy unless a request has a temperature. The labels of a task are scored,
so settings of generation change nothing there: the header `x-manyicl-ignored` names those that a request had, and
`messages` if a task was given more than one. Of greedy answers it names `top_p` and `seed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from manyicl.server.problems import ProblemError, find_problem
from manyicl.server.routes.bodies import model_name
from manyicl.server.routes.completion_bodies import Answered, ChatBody, CompletionBody, OpenAIBody, Shape
from manyicl.server.routes.predict import check_count, log_replies, scores_choices
from manyicl.server.settings import ServerSettings
from manyicl.server.waiting import AnyTicket, EventsResponse, Stream, Unsent, wait_for
from manyicl.service import Generation, Reply, Service

OnText = Callable[[int, str], None]


def make_completion_routes(service: Service, settings: ServerSettings) -> APIRouter:
    """Return OpenAI's routes."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    desk = _Desk(service, settings)

    @router.get("/models")
    def list_models() -> dict[str, Any]:
        """List the base and, as `<base>:<task>`, every task."""
        names = [service.info.base_name, *(model_name(service.info.base_name, t.name) for t in service.tasks())]
        return {"object": "list", "data": [_describe_model(name) for name in names]}

    @router.get("/models/{model:path}")
    def get_model(model: str) -> dict[str, Any]:
        """Return one model."""
        desk.find_task(model)
        return _describe_model(model)

    @router.post("/completions", response_model=None)
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Complete a prompt, or answer it as the input of a task."""
        task = await run_in_threadpool(desk.find_task, body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        check_count(len(prompts) * body.num_choices, settings)
        if not prompts or (task is None and len(prompts) > 1):
            raise ProblemError("invalid-request", 400, "prompt: give one text; only tasks take several", param="prompt")
        ignored = await run_in_threadpool(desk.check, body, task)
        order = _Order(body, task, prompts, body.max_tokens, body.logprobs, ignored)
        return await desk.serve(order, request, kind="text")

    @router.post("/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer the user's last message as the input of a task, or continue a chat with the base."""
        task = await run_in_threadpool(desk.find_task, body.model)
        check_count(body.num_choices, settings)
        ignored = await run_in_threadpool(desk.check, body, task)
        if task is not None:
            ignored += ["messages"] * (len(body.messages) > 1)
            ignored += ["chat_template_kwargs"] * bool(body.chat_template_kwargs)
        asked = [body.last_input()] if task is not None else [(m.role, m.text) for m in body.messages]
        limit = body.max_completion_tokens or body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await desk.serve(_Order(body, task, asked, limit, top, ignored), request, kind="chat")

    return router


def _describe_model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "manyicl"}


@dataclass(frozen=True, slots=True)
class _Order:
    """A request of either route in one form."""

    body: OpenAIBody
    task: str | None
    """None for the base alone."""
    asked: Sequence[str] | Sequence[tuple[str, str]]
    """Inputs; for the base alone one prompt, or the role and text of each message."""
    max_tokens: int | None
    top: int | None
    """Number of choices whose log-probabilities are wanted; None for none."""
    ignored: Sequence[str]
    """Fields of the request that change nothing."""


class _Desk:
    """Takes orders to the service and brings back answers in OpenAI's shape.

    `find_task` and `check` read the library, which another thread's or server's write can keep waiting: the event loop
    leaves them to a thread.
    """

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self.service, self.settings = service, settings

    def find_task(self, model: str) -> str | None:
        """Return the task that the name of a model stands for, None if it is the base alone.

        Raises:
            UnknownTask: it is neither.
        """
        base = self.service.info.base_name
        if model == base:
            return None
        name = model.removeprefix(model_name(base, ""))
        if name == model:
            raise ProblemError(
                "unknown-model", 404, f"model: {model!r} is not served; /v1/models lists what is", param="model"
            )
        return self.service.task(name).name

    def is_chosen(self, task: str | None) -> bool:
        """Return whether answers are chosen among a task's labels, so that settings of generation mean nothing."""
        return task is not None and scores_choices(self.service) and bool(self.service.task(task).labels)

    def check(self, body: OpenAIBody, task: str | None) -> list[str]:
        """Return the names of a request's fields that change nothing.

        Raises:
            ProblemError: a field asks for what this server does not do.
        """
        usual = self.service.settings.answering
        return body.check(usual, of_task=task is not None, is_chosen=self.is_chosen(task))

    async def serve(self, order: _Order, request: Request, *, kind: Any) -> Response:
        """Answer an order."""
        deadline_s = self.settings.default_deadline_s
        log = request.scope["manyicl.log"]
        log.update(task=order.task, inputs=len(order.asked))
        shape = Shape(kind, id=request.scope["manyicl.id"], model=order.body.model, num_choices=order.body.num_choices)
        headers = {"x-manyicl-ignored": ", ".join(order.ignored)} if order.ignored else {}
        submit = partial(self._submit, order, deadline_s)
        if order.body.stream:
            stream: Stream[Any] = Stream(deadline_s=deadline_s)
            await stream.begin(request, partial(submit, stream.on_text))
            chunks = self._chunks(order, shape, stream, log)
            return EventsResponse(chunks, stream, headers=headers)
        answers = self._read(order, await wait_for(request, submit, deadline_s=deadline_s), log)
        content = to_json(shape.whole(answers, top=order.top), inf_nan_mode="null")
        return Response(content, media_type="application/json", headers=headers)

    def _submit(self, order: _Order, deadline_s: float, on_text: OnText | None = None) -> AnyTicket[Any]:
        usual = self.service.settings.answering
        answering = usual if self.is_chosen(order.task) else order.body.to_settings(usual, max_tokens=order.max_tokens)
        seeds = order.body.seeds()
        if order.task is None:
            prompt = order.asked[0] if isinstance(order.asked[0], str) else _make_messages(order.asked)
            return self.service.submit_generation(
                prompt,
                answering=answering,
                seed=seeds,
                deadline=deadline_s,
                on_text=on_text,
                switches=order.body.chat_template_kwargs if isinstance(order.body, ChatBody) else None,
            )
        return self.service.task(order.task).submit(
            [text for text in order.asked if isinstance(text, str) for _ in seeds],
            shots=order.body.shots.to_choice() if order.body.shots else None,
            answering=answering,
            seed=seeds * len(order.asked),
            deadline=deadline_s,
            on_text=on_text,
        )

    def _read(self, order: _Order, outcome: Any, log: dict[str, Any]) -> list[Answered]:
        """Return what a ticket brought, in one form for tasks and the base."""
        if order.task is None:
            found: list[Generation] = outcome
            log.update(
                prompt_tokens=found[0].num_prompt_tokens, answer_tokens=sum(one.num_answer_tokens for one in found)
            )
            if self.settings.log_texts:
                log["texts"] = [{"answer": one.text} for one in found]
            return [Answered(one.text, one.finish, one.num_prompt_tokens, one.num_answer_tokens) for one in found]
        replies: list[Reply] = outcome
        log_replies(log, replies, texts=self.settings.log_texts)
        return [
            Answered(r.answer, r.finish, r.num_prompt_tokens, r.num_answer_tokens, r.probabilities, r) for r in replies
        ]

    async def _chunks(
        self, order: _Order, shape: Shape, stream: Stream[Any], log: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        unsent, begun = Unsent(), set[int]()

        def begin(index: int) -> list[dict[str, Any]]:
            chunk = None if index in begun else shape.first(index)
            begun.add(index)
            return [chunk] if chunk is not None else []

        try:
            async for piece in stream.pieces():
                if piece is None:
                    yield format_sse_event(comment="waiting")
                    continue
                unsent.add(*piece)
                for chunk in [*begin(piece[0]), shape.piece(*piece)]:
                    yield _data(chunk)
            answers = self._read(order, stream.outcome, log)
            for index, answer in enumerate(answers):
                rest = unsent.rest(index, answer.text)
                pieces = [shape.piece(index, rest)] if rest else []
                for chunk in [*begin(index), *pieces, shape.last(index, answer, top=order.top)]:
                    yield _data(chunk)
            if order.body.wants_usage:
                yield _data(shape.usage(answers))
            yield format_sse_event(data_str="[DONE]")
        except Exception as error:  # the status 200 is sent: OpenAI's client raises this chunk as an error
            problem = find_problem(error)
            log["problem"] = problem.kind
            yield _data(problem.to_openai())


def _make_messages(asked: Sequence[Any]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in asked]


def _data(content: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=to_json(content, inf_nan_mode="null").decode())
