"""OpenAI's requests as this server takes them, and its answers in OpenAI's shapes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from manyicl.inference import AnswerSettings
from manyicl.seeds import make_seed
from manyicl.server.problems import ProblemError
from manyicl.server.routes.bodies import OF_SAMPLING, ShotsBody, TextBody
from manyicl.service import Reply

# What a request may not ask for, since an answer without it would be another one than was meant: field -> values that
# ask for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "audio": (None,),
    "modalities": (None, [], ["text"]),
    "response_format": (None, {"type": "text"}),
}
# Fields that ask for nothing of the answer.
_SILENT = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier", *_REFUSED})
# Fields that change nothing of an answer that is scored, and of one that is generated.
_OF_GENERATED = ("temperature", "top_p", "seed", "stop", "max_tokens", "max_completion_tokens")
_OF_CHOSEN = ("logprobs", "top_logprobs")
_MOST_TOP = 20
_MOST_CHOICES = 128  # as OpenAI's own


class StreamOptions(BaseModel):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class OpenAIBody(TextBody):
    """What both kinds of completions have in common. Fields that would change the answer are refused."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str = Field(description="`<base>:<task>`, or the base alone.")
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default, unlike OpenAI's: 0, which is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(
        None, ge=1, le=_MOST_CHOICES, description="How many choices are sampled for each prompt; needs a `temperature`."
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    shots: ShotsBody | None = Field(None, description="Not OpenAI's: which examples are shown (`extra_body`).")

    def check(self, usual: AnswerSettings, *, of_task: bool, is_chosen: bool = False) -> list[str]:
        """Return the names of the fields that change nothing.

        usual: the settings that this request's stand in for.
        is_chosen: whether the answer is one of a task's labels, which are scored: nothing is sampled then.

        Raises:
            ProblemError: a field asks for what this server does not do.
        """
        given = self.model_extra or {}
        for name, nothing in _REFUSED.items():
            if name in given and given[name] not in nothing:
                detail = f"{name}: is not supported; leave it out"
                raise ProblemError("unsupported-parameter", 400, detail, param=name)
        is_greedy = not (usual.temperature if self.temperature is None else self.temperature)
        if self.num_choices > 1 and (is_chosen or is_greedy):
            why = "labels are scored, not sampled" if is_chosen else "there is no temperature above 0"
            detail = f"n={self.n}: all choices would be alike, since {why}; leave n out"
            raise ProblemError("unsupported-parameter", 400, detail, param="n")
        ignored = [name for name, value in given.items() if name not in _SILENT and value is not None]
        idle = _OF_GENERATED if is_chosen else (*(OF_SAMPLING if is_greedy else ()), *_OF_CHOSEN)
        settings = {name: getattr(self, name, None) for name in idle}
        ignored += [name for name, value in settings.items() if value not in (None, [], "") and value is not False]
        if not of_task and self.shots is not None:
            ignored.append("shots")
        return ignored

    @property
    def num_choices(self) -> int:
        """How many choices each prompt gets."""
        return self.n or 1

    def seeds(self) -> list[int]:
        """Return what decides each choice of a prompt; the first is that of a request for one choice."""
        first = self.seed or 0
        return [first, *(make_seed("choices", first, number) for number in range(1, self.num_choices))]

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which a completion ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def to_settings(self, usual: AnswerSettings, *, max_tokens: int | None) -> AnswerSettings:
        """Return how a prompt is answered: as `usual`, except for what this request says."""
        given: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "stop": self.stops or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        known = {name: value for name, value in given.items() if value is not None}
        if self.temperature == 0:
            known["samples"] = 1
        return replace(usual, **known)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(OpenAIBody):
    """A request for completions."""

    prompt: str | list[str] = Field(description="A text, or several, each of which gets a choice of its own.")
    logprobs: int | None = Field(
        None, ge=0, le=_MOST_TOP, description="Log-probabilities of so many of a task's choices."
    )


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(OpenAIBody):
    """A request for a chat completion."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_TOP)
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        max_length=16,
        description="Not OpenAI's: switches of the base's chat template, such as `enable_thinking` (default: false).",
    )

    def last_input(self) -> str:
        """Return the text of the user's last message.

        Raises:
            ProblemError: the last message is not a user's.
        """
        if self.messages[-1].role != "user":
            detail = "messages: the last one is not the user's; a task answers that one"
            raise ProblemError("invalid-request", 400, detail, param="messages")
        return self.messages[-1].text


@dataclass(frozen=True, slots=True)
class Answered:
    """One choice of a completion."""

    text: str
    finish: str
    num_prompt_tokens: int
    num_answer_tokens: int
    probabilities: Mapping[str, float] | None = None
    reply: Reply | None = None
    """Of a task; None for the base alone."""


class Shape:
    """Answers in the shape of one of OpenAI's two routes.

    kind: "chat" or "text". id: the completion's. model: its name in the request. num_choices: of each prompt.
    """

    def __init__(self, kind: Literal["chat", "text"], *, id: str, model: str, num_choices: int = 1) -> None:
        self.kind, self.model, self.num_choices = kind, model, num_choices
        self.id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{id}"
        self.created = int(time.time())

    def whole(self, answers: Sequence[Answered], *, top: int | None) -> dict[str, Any]:
        """Return a completion. top: number of labels whose log-probabilities it has; None for none."""
        choices = [self._choice(index, answer, top) for index, answer in enumerate(answers)]
        body = self._envelope("chat.completion" if self.kind == "chat" else "text_completion", choices)
        body["usage"] = self._count_usage(answers)
        replies = [answer.reply for answer in answers if answer.reply is not None]
        if replies:  # not OpenAI's: its client keeps fields that it does not know
            body["manyicl"] = [
                {"shots": reply.shots, "probabilities": reply.probabilities, "task_version": reply.task_version}
                for reply in replies
            ]
        return body

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that begins a choice; None if this shape has none."""
        if self.kind == "text":
            return None
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return a chunk of text."""
        if self.kind == "text":
            return self._chunk([{"index": index, "text": text, "finish_reason": None, "logprobs": None}])
        return self._chunk([{"index": index, "delta": {"content": text}, "finish_reason": None, "logprobs": None}])

    def last(self, index: int, answer: Answered, *, top: int | None) -> dict[str, Any]:
        """Return the chunk that ends a choice."""
        content: dict[str, Any] = {"text": ""} if self.kind == "text" else {"delta": {}}
        logprobs = self._logprobs(answer, top)
        return self._chunk([{"index": index, **content, "finish_reason": answer.finish, "logprobs": logprobs}])

    def usage(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return {**self._chunk([]), "usage": self._count_usage(answers)}

    def _count_usage(self, answers: Sequence[Answered]) -> dict[str, int]:
        """Return the numbers of tokens; a prompt counts once, however many choices it has."""
        num_prompt = sum(answer.num_prompt_tokens for answer in answers[:: self.num_choices])
        num_answer = sum(answer.num_answer_tokens for answer in answers)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk" if self.kind == "chat" else "text_completion", choices)

    def _choice(self, index: int, answer: Answered, top: int | None) -> dict[str, Any]:
        logprobs = self._logprobs(answer, top)
        common = {"index": index, "finish_reason": answer.finish, "logprobs": logprobs}
        if self.kind == "text":
            return {**common, "text": answer.text}
        return {**common, "message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def _logprobs(self, answer: Answered, top: int | None) -> dict[str, Any] | None:
        """Return the log-probabilities of a task's choices, each as if it were one token; None if it has no choices."""
        if top is None or answer.probabilities is None or answer.text not in answer.probabilities:
            return None
        logs = {choice: _log(p) for choice, p in answer.probabilities.items()}
        best = sorted(logs, key=lambda choice: -logs[choice])[:top]
        if self.kind == "text":
            return {
                "tokens": [answer.text],
                "token_logprobs": [logs[answer.text]],
                "top_logprobs": [{choice: logs[choice] for choice in best}],
                "text_offset": [0],
            }
        own = _token(answer.text, logs[answer.text])
        return {
            "content": [{**own, "top_logprobs": [_token(choice, logs[choice]) for choice in best]}],
            "refusal": None,
        }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -9999.0  # OpenAI's own number for "very unlikely"
