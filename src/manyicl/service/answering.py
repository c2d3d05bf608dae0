"""One pass: inputs that share their shots are answered together after the encoded prefix, and become replies."""

from __future__ import annotations

import copy
import inspect
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer, TemplateSettings, join_examples, without_thinking
from manyicl.errors import UserError
from manyicl.inference import (
    CONTENT_FREE,
    DEFAULT_ANSWERS,
    PATIENCE_S,
    Answered,
    AnswerSettings,
    EndpointCalls,
    EndpointSettings,
    Engine,
    Generated,
    InferenceModel,
    answer_queries,
    choose_engine,
    cut_at,
    generate_voted,
    is_unsure,
    sameness_of,
    write_queries,
)
from manyicl.models import EMPTY_PREFIX, count_parameters
from manyicl.service.prefix_cache import PrefixCache
from manyicl.service.requests import Batch, Finish, Generation, Item, Reply, Request, Timing
from manyicl.service.selection import Shots, TaskIds, count_fitting, find_nearest

_UNFINISHED = "\ufffd"  # how a decoder writes the first bytes of a character
Switch = str | int | float | bool | None
# What a chat template is given beside the parameters of `apply_chat_template` and the names of special tokens.
_TEMPLATE_NAMES = frozenset({"messages", "raise_exception", "strftime_now", "generation_indices"})


class _Forgetful(dict[str, Generated]):
    """Keeps no answer of a server: they would pile up as long as the service lives."""

    def __setitem__(self, key: str, value: Generated) -> None:
        """Forget it."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that answers."""

    path: str
    """As it was named."""
    base_name: str
    """The last part of that: OpenAI's clients name a task as `<base_name>:<task>`."""
    max_tokens: int
    """Its window."""
    num_parameters: int | None
    """None if a server has the model."""
    device: str
    dtype: str
    shared_prefix: bool
    """Whether many inputs share one encoded prefix."""
    version: str
    """Of this library."""


@dataclass(slots=True)
class TokenCount:
    """Tokens of passes that answered requests."""

    prompt: int = 0
    """Of inputs and their shots, as if each input had had them to itself."""
    answer: int = 0


class Answerer:
    """A model with its engines and its prefixes. Only one thread uses it, between `__enter__` and `__exit__`."""

    def __init__(
        self,
        model: InferenceModel,
        *,
        endpoint: EndpointSettings | None,
        cache: PrefixCache,
        answering: AnswerSettings = DEFAULT_ANSWERS,
    ) -> None:
        self.model, self.cache, self.answering = model, cache, answering
        self.tokens = TokenCount()
        self._endpoint = endpoint
        self.calls = EndpointCalls()
        self.trial_s = None if endpoint is None else PATIENCE_S  # a model here is waited for
        self.engine: Engine = choose_engine(model, endpoint=endpoint, kept=_Forgetful(), calls=self.calls)
        self.plain_tokenizer = _plain_tokenizer(model.tokenizer)
        self._plain: Engine | None = None  # made for the first plain generation: a server is tried again for it
        self._encoding = threading.Lock()  # threads that submit prompts
        self._stack = ExitStack()

    def __enter__(self) -> Answerer:
        self._stack.enter_context(self.engine)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def encode_prompt(
        self, prompt: str | Sequence[Mapping[str, str]], *, switches: Mapping[str, Switch] | None = None
    ) -> list[int]:
        """Return the ids of a prompt as the model expects one: a text after BOS, or what the chat template writes.

        switches: variables of the chat template.

        Raises:
            UserError: there is no chat template, it refuses the messages, or it has no such switch.
        """
        tokenizer, bos = self.plain_tokenizer.tokenizer, self.plain_tokenizer.bos_ids
        if not isinstance(prompt, str):
            if not tokenizer.chat_template:
                raise UserError("messages: this model has no chat template; send a prompt, or ask a task")
            options: dict[str, Any] = _template_options(tokenizer, switches or {})
            try:
                text = tokenizer.apply_chat_template(
                    [{**one} for one in prompt], tokenize=False, add_generation_prompt=True, **options
                )
            except Exception as error:  # templates raise what they like
                raise UserError(f"messages: the chat template refuses them ({' '.join(str(error).split())})") from error
            prompt, bos = str(text), []
        with self._encoding:
            return [*bos, *map(int, tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])]

    def answer(self, batch: Batch) -> None:
        """Answer inputs of one group, and deliver each; what nobody waits for any more, or has its reply, is left out.

        Raises:
            UserError: memory runs out, or a server refuses; what was delivered before that stays so.
        """
        open_ = [
            (request, item) for request, item in batch if not request.is_over and item.place not in request.outcomes
        ]
        if not open_:
            return
        self.calls.until = max(math.inf if one.deadline is None else one.deadline for one, _ in open_)
        if open_[0][0].task is None:
            self._generate(open_)
            return
        parts: dict[int, list[_Query]] = {}
        for request, item in open_:
            try:
                query = _place_input(request, item)
            except UserError as error:  # too long for this version of the task
                request.fail(error)
            else:
                parts.setdefault(query.num_shots, []).append(query)
        for num_shots in sorted(parts, reverse=True):  # the longest first: the others are beginnings of it
            self._answer_part(parts[num_shots], num_shots=num_shots)

    def _answer_part(self, queries: Sequence[_Query], *, num_shots: int) -> None:
        task, shots = queries[0].task, queries[0].shots
        began = time.monotonic()
        ids = join_examples(task.tokenized, split="train", indices=shots.order[:num_shots].astype(np.int32)).ids
        prefix, cached = self.cache.get(self.engine, ids)
        ready = time.monotonic()
        stream = _Streams([(query.request, query.item) for query in queries], self.model.tokenizer)
        answers = answer_queries(
            self.engine,
            self.model.tokenizer,
            prefix,
            [query.ids for query in queries],
            choices=[query.item.choices for query in queries],
            limits=[query.item.limit for query in queries],
            answering=[query.item.answering for query in queries],
            seeds=[query.item.seed for query in queries],
            is_same=sameness_of(task.tokenized.task.metric),
            free=self._write_content_free(queries),
            on_ids=stream.on_ids,
        )
        ended = time.monotonic()
        shown = task.ids_of(shots.order[:num_shots])
        for place, (query, one) in enumerate(zip(queries, answers, strict=True)):
            timing = _time(query.request, began, ready, ended, cached=cached, size=len(queries))
            num_prompt = len(ids) + len(query.ids)
            reply = _make_reply(query, one, shown=shown, timing=timing, num_prompt=num_prompt)
            stream.finish(place, reply.answer)
            self._deliver(query.request, query.item, reply, fault=one.fault, num_prompt=num_prompt)

    def _write_content_free(self, queries: Sequence[_Query]) -> list[list[NDArray[np.int32]]] | None:
        """Return for each query inputs without content in its place, after its own shots; None if none needs it."""
        if all(query.item.answering.calibrate == "none" for query in queries):
            return None
        shared = write_queries(self.model.tokenizer, CONTENT_FREE, after_shots=True)
        bare = write_queries(self.model.tokenizer, CONTENT_FREE, after_shots=False)
        written = []
        for query in queries:
            own = query.ids[: len(query.ids) - len(query.item.ids)] if query.nearest else None
            if own is None:
                written.append(shared if query.num_shots else bare)
            else:
                written.append([np.concatenate([own, ids]).astype(np.int32) for ids in shared])
        return written

    def _generate(self, batch: Batch) -> None:
        """Answer plain generations."""
        began = time.monotonic()
        if self._plain is None:
            model = replace(self.model, tokenizer=self.plain_tokenizer)
            engine = choose_engine(model, endpoint=self._endpoint, kept=_Forgetful(), calls=self.calls)
            self._plain = self._stack.enter_context(engine)
        stream = _Streams(batch, self.plain_tokenizer)
        generated, _ = generate_voted(
            self._plain,
            EMPTY_PREFIX,
            [item.ids for _, item in batch],
            limits=[item.limit for _, item in batch],
            decodings=[item.answering.decodings(item.seed) for _, item in batch],
            is_same=sameness_of(""),
            on_ids=stream.on_ids,
        )
        ended = time.monotonic()
        for place, ((request, item), one) in enumerate(zip(batch, generated, strict=True)):
            timing = _time(request, began, began, ended, cached=True, size=len(batch))
            finish: Finish = "length" if one.cut else "stop"
            made = Generation(one.text, finish, len(item.ids), one.num_tokens or 0, timing)
            stream.finish(place, one.text)
            self._deliver(request, item, made, fault=one.fault, num_prompt=len(item.ids))

    def _deliver(self, request: Request, item: Item, outcome: Any, *, fault: str, num_prompt: int) -> None:
        self.tokens.prompt += num_prompt
        self.tokens.answer += outcome.num_answer_tokens
        if fault and request.is_late:
            return  # it is given up as any late one
        if fault:
            request.fail(UserError(f"endpoint: gave no answer ({fault}); try again, or look at the server's log"))
        elif not (request.is_late and outcome.finish == "length"):  # its answer was ended by the deadline
            request.deliver(item.place, outcome)


@dataclass(frozen=True, slots=True, eq=False)
class _Query:
    """One input after its shots."""

    request: Request
    item: Item
    task: TaskIds
    shots: Shots
    num_shots: int
    """Shared ones."""
    nearest: Sequence[int]
    """Indices of its own shots."""
    ids: NDArray[np.int32]
    """Its own shots and the input."""


def _place_input(request: Request, item: Item) -> _Query:
    """Return an input with as many shots as fit before it.

    Raises:
        InputTooLong: it does not fit.
    """
    task, shots = request.task, request.shots
    assert task is not None
    assert shots is not None
    head = len(task.tokenized.head_ids)
    nearest = find_nearest(task, item.text, shots, room=task.max_tokens - head - len(item.ids) - item.limit)
    tokens = task.tokens
    own = [tokens.ids[tokens.starts[index] : tokens.starts[index + 1]] for index in nearest]
    ids = np.concatenate([*own, item.ids]).astype(np.int32)
    num_shots = count_fitting(task, shots, num_after=len(ids) + item.limit)
    if not num_shots:
        ids = ids[task.tokenized.num_between :]
    return _Query(request, item, task, shots, num_shots, nearest, ids)


def _make_reply(query: _Query, one: Answered, *, shown: tuple[int, ...], timing: Timing, num_prompt: int) -> Reply:
    return Reply(
        input=query.item.text,
        answer=one.text,
        probabilities=one.probabilities,
        confidence=one.confidence,
        unsure=is_unsure(one.confidence, query.request.min_confidence),
        nll=one.nll,
        shots=shown + query.task.ids_of(list(query.nearest)),
        cut=one.cut,
        finish="length" if one.cut else "stop",
        timing=timing,
        num_prompt_tokens=num_prompt,
        num_answer_tokens=one.num_tokens,
        task_version=query.task.record.version,
    )


def _time(request: Request, began: float, ready: float, ended: float, *, cached: bool, size: int) -> Timing:
    return Timing(
        queued_s=began - request.since,
        prefix_s=ready - began,
        model_s=ended - ready,
        total_s=ended - request.since,
        prefix_cached=cached,
        batch_size=size,
    )


def _plain_tokenizer(tokenizer: TaskTokenizer) -> TaskTokenizer:
    """Return a tokenizer for plain generations, which end at the end of the text or turn, not at a blank line."""
    own = copy.deepcopy(tokenizer.tokenizer)  # in prompts special tokens are recognised, which is a state of it
    end = own.eos_token
    if tokenizer.settings.style == "plain" and isinstance(end, str):
        with suppress(UserError):  # it cannot write its own end of text
            return TaskTokenizer(own, TemplateSettings(terminator=end), end_ids=tokenizer.end_ids)
    return TaskTokenizer(own, tokenizer.settings, frame=tokenizer.frame, end_ids=tokenizer.end_ids)


def _template_options(tokenizer: Any, switches: Mapping[str, Switch]) -> dict[str, Any]:
    """Return the variables that a chat template is given: `switches`, and no thinking where it can be switched off.

    Raises:
        UserError: the template has no such switch, or a value is not a single one.
    """
    template = str(tokenizer.get_chat_template())
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    for name, value in switches.items():
        where = f"chat_template_kwargs: {name[:80]!r}"
        is_named = name.isidentifier() and re.search(rf"\b{name}\b", template)
        if name in taken | _TEMPLATE_NAMES or not is_named:
            raise UserError(f"{where} is not a switch of this model's chat template; leave it out")
        if not isinstance(value, Switch):
            raise UserError(f"{where} has a list or an object for a value; give a text, a number, true, false or null")
    return {**without_thinking(template), **switches}


@dataclass(slots=True)
class _Streams:
    """The text of generated answers, handed out piece by piece while they are generated."""

    batch: Sequence[tuple[Request, Item]]
    tokenizer: TaskTokenizer

    def on_ids(self, place: int, ids: Sequence[int]) -> bool:
        """Hand out what is certain of an answer; return whether it is to go on."""
        request, item = self.batch[place]
        if request.is_over or request.is_late:
            return False
        if request.on_text is None or item.answering.samples > 1:  # which sample wins is known at the end
            return True
        text, ended = self.tokenizer.cut_answer(ids)
        text, stopped = cut_at(text, item.answering.stop)
        if not ended and not stopped:
            text = _certain(text, (self.tokenizer.end_text, *item.answering.stop))
        self._send(place, text)
        return True

    def finish(self, place: int, text: str) -> None:
        """Hand out what is left of an answer."""
        self._send(place, text)

    def _send(self, place: int, text: str) -> None:
        request, item = self.batch[place]
        sent = request.sent.get(item.place, "")  # also by a pass that failed
        if request.on_text is None or len(text) <= len(sent) or not text.startswith(sent) or request.is_over:
            return
        request.sent[item.place] = text
        try:
            request.on_text(item.place, text[len(sent) :])
        except Exception as error:  # the caller's own: it must not end the pass of the others
            request.fail(error)


def _certain(text: str, ends: Sequence[str]) -> str:
    """Return `text` without an end that may still become one of `ends`, or is half of a character."""
    text = text.rstrip(_UNFINISHED)
    held = [n for end in ends for n in range(1, len(end)) if text.endswith(end[:n])]
    return text[: len(text) - max(held, default=0)]


def describe_model(answerer: Answerer) -> ModelInfo:
    """Return what the model of an answerer is."""
    model = answerer.model
    weights = None if model.model is None else next(model.model.parameters())
    return ModelInfo(
        path=model.path,
        base_name=Path(model.path).name or model.path,
        max_tokens=model.max_tokens,
        num_parameters=None if model.model is None else count_parameters(model.model),
        device="server" if weights is None else str(weights.device),
        dtype="unknown" if weights is None else str(weights.dtype).removeprefix("torch."),
        shared_prefix=answerer.engine.sharing_fault == "",
        version=version("manyicl"),
    )
