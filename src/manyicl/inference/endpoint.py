"""The engine of a server with OpenAI's completions API: exact prompts in, text out, with retries.

vLLM, SGLang and `transformers serve` all have `/v1/completions`. The first two take token ids, so they see the same
tokens as a local model. `transformers serve` takes text alone, which is sent only if the model's own tokenizer makes
the very same ids of it. The number of prompt tokens that a server reports is checked in both cases.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal, Never, Self
from urllib.parse import urlsplit

import httpx2
import numpy as np
import tenacity
from numpy.typing import NDArray

from manyicl.episodes import TaskTokenizer
from manyicl.errors import UserError, take_whole
from manyicl.inference.answering.decoding import GREEDY, cut_at
from manyicl.inference.answering.generation import Generated, OnIds
from manyicl.inference.answering.settings import Decoding
from manyicl.inference.endpoint_calls import CONNECT_TIMEOUT_S, EndpointCalls
from manyicl.inference.endpoint_replies import one_line, prompt_tokens, refusal, wait_s_of
from manyicl.inference.prefix import EngineCount
from manyicl.models import EMPTY_PREFIX, Prefix
from manyicl.seeds import make_seed

# The one place that a key comes from. Not OPENAI_API_KEY: that one must not travel to any URL a user types.
KEY_VARIABLE = "MANYICL_API_KEY"
NOT_THE_SAME_IDS = "written as text it has other ids, and this server takes no ids as vLLM and SGLang do"
# After so many failed queries in a row the server is taken to be down.
MAX_FAILED_IN_A_ROW = 20
MAX_WAIT_S = 60.0
_TRY_AGAIN = frozenset({408, 409, 425, 429})
# OpenAI's API takes four stop texts, and vLLM refuses more. The answer is cut here at those that are not sent.
MOST_STOPS = 4
# Tokenizers of different models make different numbers of tokens of it: digits, accents, scripts, code.
TRIAL_TEXT = "In 1905, café №42 sold 1,234,567 naïve books — 東京タワー, Привет!  x_i = f(y)\n\treturn 0.5"


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Which server answers, and how patiently it is asked.

    Raises:
        UserError: a `concurrency` or `num_attempts` below 1.
    """

    url: str
    """With or without `/v1`."""
    model: str
    """The server's name for the model."""
    concurrency: int = 8
    """Queries under way at once."""
    num_attempts: int = 8
    """Attempts per query, the first included."""
    first_wait_s: float = 0.5
    """Wait after the first failed attempt; it doubles each time, with some chance added."""
    timeout_s: float = 600.0
    """How long one answer may take."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "num_attempts"):
            if (given := take_whole(name, getattr(self, name))) < 1:
                raise UserError(f"{name}={given}: needs at least 1")


@dataclass(frozen=True, slots=True)
class _Request:
    """One query as it is sent."""

    place: int
    """Its index among the queries."""
    ids: tuple[int, ...]
    """Prefix and query."""
    limit: int
    """Most tokens of the answer."""
    decoding: Decoding
    key: str
    """A hash of all that decides the answer: what it is kept under."""


class UnansweredError(Exception):
    """A query that got no answer after all attempts; `str` of it is the reason, as it is counted."""


class _TryAgainError(Exception):
    """An attempt that failed in a way that may pass. wait_s: how long the server wants to be left alone."""

    def __init__(self, reason: str, *, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Endpoint:
    """The engine of a server, which is reached when it is entered as a context.

    It generates every answer; a server reports no likelihood of a given one.

    kept: answers that were given before, by key; those that are given now are added. calls: of all its engines.
    prompts: whether the server takes token ids ('ids') or text ('text'); known once it was reached.

    Raises:
        UserError: a wrong URL or key; when entered, no server is reached, or it refuses the key or the model.
    """

    has_likelihoods = False
    sharing_fault = None

    def __init__(
        self,
        settings: EndpointSettings,
        tokenizer: TaskTokenizer,
        *,
        kept: MutableMapping[str, Generated] | None = None,
        calls: EndpointCalls | None = None,
    ) -> None:
        self.settings, self.tokenizer, self.calls = settings, tokenizer, calls or EndpointCalls()
        self.base_url = base_url(settings.url)
        self.kept: MutableMapping[str, Generated] = {} if kept is None else kept
        self.count = EngineCount()
        self.prompts: Literal["ids", "text"] = "text"
        self._num_failed_in_a_row = 0
        self._is_reached = False
        # An end of turn that is a special token is left out of the text by default, so `stop` would never see it. vLLM
        # and SGLang take these two; `transformers serve` refuses what OpenAI's API does not name.
        self.extra_fields: dict[str, Any] = {}
        if tokenizer.settings.style == "chat":
            self.extra_fields = {"skip_special_tokens": False, "stop_token_ids": list(tokenizer.end_ids)}
        self._stopped = threading.Event()  # makes every attempt under way the last of its query
        key = _read_key()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=settings.concurrency + 1),
        )

    def __enter__(self) -> Self:
        try:
            self.prompts = self._find_prompts()
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._client.close()

    @property
    def server(self) -> Mapping[str, str]:
        """URL, model and form of the prompts, as results keep them."""
        return {"url": self.base_url, "model": self.settings.model, "prompts": self.prompts}

    def encode(self, ids: NDArray[np.int32], *, after: Prefix = EMPTY_PREFIX, room: int = 0) -> Prefix:  # noqa: ARG002
        """Return the prefix `after` extended by `ids`; the server encodes it."""
        return Prefix(ids=np.concatenate([after.ids, ids]).astype(np.int32))

    def score(
        self,
        prefix: Prefix,
        queries: Sequence[NDArray[np.int32]],
        options: Sequence[Sequence[Sequence[int]]],
    ) -> Never:
        """A server cannot do this: it reports no likelihood of a given answer."""
        raise NotImplementedError

    def generate(
        self,
        prefix: Prefix,
        queries: Sequence[NDArray[np.int32]],
        *,
        limits: Sequence[int],
        decodings: Sequence[Decoding] | None = None,
        references: Sequence[Sequence[int]] | None = None,  # noqa: ARG002
        on_answer: Callable[[int], None] = lambda _: None,
        on_ids: OnIds | None = None,  # noqa: ARG002
    ) -> list[Generated]:
        """Return each query's answer, or why it has none; only queries without a kept answer are sent.

        The first is sent alone, so that the server has the prefix in its cache before the others come at once.

        Raises:
            UserError: the server refuses, or has failed too many queries in a row.
        """
        each = zip(queries, limits, decodings or [GREEDY] * len(queries), strict=True)
        requests = [self._make_request(place, prefix, *asked) for place, asked in enumerate(each)]
        answers = {r.place: self.kept[r.key] for r in requests if r.key in self.kept}
        if answers:
            on_answer(len(answers))
        missing = [r for r in requests if r.place not in answers]
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            for group in (missing[:1], missing[1:]):
                futures = {
                    pool.submit(self.complete, r.ids, max_new_tokens=r.limit, decoding=r.decoding): r for r in group
                }
                try:
                    for future in as_completed(futures):
                        answers[futures[future].place] = self._take_answer(future, futures[future])
                        on_answer(1)
                except BaseException:  # also Ctrl-C: nothing more is sent, and what is under way is not tried again
                    self._stopped.set()
                    pool.shutdown(cancel_futures=True)
                    for future, request in futures.items():
                        if not (future.cancelled() or future.exception() or request.place in answers):
                            self.kept[request.key] = future.result()
                    self._stopped.clear()  # nothing is under way any more, and a service goes on with other requests
                    raise
        return [answers[place] for place in range(len(queries))]

    def _make_request(
        self, place: int, prefix: Prefix, query: NDArray[np.int32], limit: int, decoding: Decoding
    ) -> _Request:
        ids = (*prefix.ids.tolist(), *query.tolist())
        decisive: list[Any] = [self.base_url, self.settings.model, self.tokenizer.terminator, limit, ids]
        if decoding != GREEDY:  # greedy answers keep the keys that they had before there were others
            decisive.append(asdict(decoding))
        return _Request(place, ids, limit, decoding, hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32])

    def _take_answer(self, future: Future[Generated], request: _Request) -> Generated:
        """Return an answer, and keep it; or the reason why there is none.

        Raises:
            UserError: the server refuses, or has failed too many queries in a row.
        """
        try:
            answer = future.result()
        except UnansweredError as error:
            self._num_failed_in_a_row += 1
            if self._num_failed_in_a_row % MAX_FAILED_IN_A_ROW == 0:
                raise UserError(
                    f"endpoint={self.settings.url}: {MAX_FAILED_IN_A_ROW} queries in a row got no answer ({error});"
                    " look at the server's log"
                ) from None
            return Generated(text="", cut=False, fault=str(error))
        self._num_failed_in_a_row = 0
        self.kept[request.key] = answer
        return answer

    def complete(self, ids: Sequence[int], *, max_new_tokens: int, decoding: Decoding = GREEDY) -> Generated:
        """Return the answer after `ids`, up to the terminator or a stop text.

        Raises:
            UnansweredError: all attempts failed, or the prompt cannot be sent exactly.
            UserError: the server refuses, or is gone, or counts other prompt tokens than were sent.
        """
        prompt = [int(i) for i in ids] if self.prompts == "ids" else text_of_ids(self.tokenizer, ids)
        if prompt is None:
            raise UnansweredError(NOT_THE_SAME_IDS)
        content = self._attempt(prompt, max_new_tokens=max_new_tokens, decoding=decoding)
        counted = prompt_tokens(content)
        if counted not in (None, len(ids)):
            raise UserError(
                f"endpoint={self.settings.url}: counts {counted} prompt tokens, but {len(ids)} were sent: its"
                f" tokenizer is another one; name the model that it serves as MODEL"
            )
        choice = content["choices"][0]
        text, ended = self.tokenizer.cut_text(str(choice["text"]))
        text, stopped = cut_at(text, decoding.stop)
        # Some servers leave the terminator out when they stop on it, some do not; a limit reached says 'length'.
        is_whole = ended or stopped or choice.get("finish_reason") != "length"
        return Generated(text=text, cut=not is_whole)

    def _find_prompts(self) -> Literal["ids", "text"]:
        """Ask for one token after a text, which any server can do, and then after ids.

        Raises:
            UserError: no answer, or a server that takes ids counts other tokens of the text than MODEL's tokenizer:
                ids would be answered even so, as the other words that they are there.
        """
        if self.extra_fields:
            try:
                self._attempt("a", max_new_tokens=1)
            except (UnansweredError, UserError):
                self.extra_fields = {}  # the next attempt reports whatever else is wrong
        try:
            counted = prompt_tokens(self._attempt(TRIAL_TEXT, max_new_tokens=1))
        except UnansweredError as error:
            raise UserError(f"endpoint={self.settings.url}: no answer ({error}); look at the server's log") from None
        probe = [*self.tokenizer.bos_ids, *self.tokenizer.encode_texts(["a"])[0]]
        try:
            content = self._attempt(probe, max_new_tokens=1)
        except (UnansweredError, UserError):
            return "text"
        if prompt_tokens(content) not in (None, len(probe)):
            return "text"
        num_tokens = len(self.tokenizer.tokenizer(TRIAL_TEXT, add_special_tokens=False)["input_ids"])
        with_special = len(self.tokenizer.tokenizer(TRIAL_TEXT)["input_ids"])
        if counted not in (None, num_tokens, num_tokens + 1, with_special):  # a server may add a BOS that we do not
            raise UserError(
                f"endpoint={self.settings.url}: counts {counted} tokens in a trial text, and the tokenizer of MODEL"
                f" {num_tokens}: its tokenizer is another one; name the model that it serves as MODEL"
            )
        return "ids"

    def _attempt(self, prompt: list[int] | str, *, max_new_tokens: int, decoding: Decoding = GREEDY) -> dict[str, Any]:
        """Return a completion's content, after waits that double each time an attempt fails in a way that may pass.

        A server that was never reached is not waited for; one that was reached and is not ready is, which is logged.
        """
        settings = self.settings
        first = settings.first_wait_s
        backoff = tenacity.wait_exponential(multiplier=first, max=MAX_WAIT_S) + tenacity.wait_random(0, first)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return self.calls.left_s(max(backoff(state), min(getattr(error, "wait_s", 0.0), MAX_WAIT_S)))

        enough = tenacity.stop_any(
            tenacity.stop_after_attempt(settings.num_attempts), tenacity.stop_when_event_set(self._stopped)
        )
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._may_pass),
            before_sleep=self._log_waiting,
            stop=lambda state: enough(state) or self.calls.are_over(),
            wait=wait,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            return retrying(lambda: self._read(self._post(prompt, max_new_tokens=max_new_tokens, decoding=decoding)))
        except _TryAgainError as error:
            raise UnansweredError(str(error)) from None
        except httpx2.TransportError as error:
            raise UserError(
                f"endpoint={settings.url}: cannot be reached ({one_line(error)}); start it, or correct the URL"
            ) from None

    def _may_pass(self, error: BaseException) -> bool:
        return isinstance(error, _TryAgainError) or (self._is_reached and isinstance(error, httpx2.NetworkError))

    def _log_waiting(self, state: tenacity.RetryCallState) -> None:
        """Log once, before the first answer, that the server is waited for; later, progress shows it."""
        if not self._is_reached and state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            logging.getLogger("manyicl").warning("endpoint %s: waiting for it (%s)", self.settings.url, error)

    def _post(self, prompt: list[int] | str, *, max_new_tokens: int, decoding: Decoding) -> httpx2.Response:
        """Send one query; raise what may pass, return everything else."""
        body = {
            "model": self.settings.model,
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            "temperature": decoding.temperature,
            **({"top_p": decoding.top_p, "seed": _server_seed(prompt, decoding)} if decoding.temperature else {}),
            "frequency_penalty": 0.0,  # a checkpoint's own penalty would forbid the answers that the shots show
            "stop": [self.tokenizer.end_text, *decoding.stop][:MOST_STOPS],
            **self.extra_fields,
        }
        try:
            with self.calls.waiting(self.settings.timeout_s) as timeout:
                reply = self._client.post(f"{self.base_url}/completions", json=body, timeout=timeout)
        except httpx2.ConnectTimeout as error:
            raise httpx2.ConnectError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from error
        except httpx2.TimeoutException as error:
            raise _TryAgainError(str(error)) from None
        except (httpx2.RemoteProtocolError, httpx2.DecodingError):
            raise _TryAgainError("connection broken off") from None
        if reply.status_code in _TRY_AGAIN or reply.status_code >= 500:
            raise _TryAgainError(f"status {reply.status_code}", wait_s=wait_s_of(reply))
        return reply

    def _read(self, reply: httpx2.Response) -> dict[str, Any]:
        """Return a completion's content.

        Raises:
            UserError: the server refuses. A reply that is not a completion is asked for again.
        """
        if reply.status_code != 200:
            raise refusal(
                reply, self.settings, is_reached=self._is_reached, key_variable=KEY_VARIABLE, served=self._served_models
            )
        try:
            content: dict[str, Any] = reply.json()
            if isinstance(content["choices"][0]["text"], str):
                self._is_reached = True
                return content
        except (ValueError, LookupError, TypeError):
            pass
        raise _TryAgainError("an answer that is not a completion")

    def _served_models(self) -> list[str]:
        """Return the names of the models that the server says it has; none if it does not say."""
        try:
            return [str(entry["id"]) for entry in self._client.get(f"{self.base_url}/models").json()["data"]]
        except (httpx2.HTTPError, ValueError, LookupError, TypeError):
            return []


def _server_seed(prompt: list[int] | str, decoding: Decoding) -> int:
    """Return the seed of one sample as servers take it, from 0 to 2**31 - 1."""
    return make_seed("samples", decoding.seed, json.dumps(prompt), decoding.sample) % 2**31


def _read_key() -> str:
    """Return the key for the server, '' if there is none.

    Raises:
        UserError: it has characters that no header can hold. It is not repeated, as an error of the client would.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: has a line break or a character that is not ASCII; copy the key anew")
    return key


def base_url(url: str) -> str:
    """Return `url` up to and with `/v1`.

    Raises:
        UserError: it is not an http(s) URL, or carries a key or a query.
    """
    try:
        httpx2.URL(url)
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna"))
    except (httpx2.InvalidURL, ValueError):  # a port that is no number, brackets left open, a label of 80 letters
        is_url = False
    if not is_url:
        raise UserError(f"endpoint={url}: is not a URL; write it as http://host:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"endpoint={parts.scheme}://{parts.hostname}: carries a key or a query, and results name the URL; put the"
            f" key into {KEY_VARIABLE}"
        )
    bare = url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return f"{bare}/v1"


def text_of_ids(tokenizer: TaskTokenizer, ids: Sequence[int]) -> str | None:
    """Return the text that a server's tokenizer, left to itself, turns into exactly `ids`; None if there is none.

    With BOS written out if the tokenizer adds none of its own, and without it if it does.
    """
    wanted = [int(i) for i in ids]
    num_bos = len(tokenizer.bos_ids)
    starts = (num_bos, 0) if num_bos and wanted[:num_bos] == tokenizer.bos_ids else (0,)
    for start in starts:
        text = tokenizer.decode(wanted[start:])
        if list(tokenizer.tokenizer(text, verbose=False)["input_ids"]) == wanted:
            return text
    return None
