"""A server with OpenAI's completions API: exact prompts in, greedy text out, asked again where that can help.

vLLM, SGLang and `transformers serve` all have `/v1/completions`. The first two take token ids, so what they see is what
the engine would see, to the token; `transformers serve` takes text alone, which is sent only where the model's own
tokenizer makes the very same ids of it. The number of prompt tokens that a server reports is checked in both cases.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2
import tenacity

from manyicl.episodes import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.generation import Generated

# The one place that a key comes from. Not OPENAI_API_KEY: that one must not travel to any URL a user types.
KEY_VARIABLE = "MANYICL_API_KEY"
NOT_THE_SAME_IDS = "written as text it has other ids, and this server takes no ids as vLLM and SGLang do"
CONNECT_TIMEOUT_S = 10.0
MAX_WAIT_S = 60.0
_TRY_AGAIN = frozenset({408, 409, 425, 429})
_TOO_LONG = re.compile(r"context.?(length|window)|too long|too large|max(imum)?.{0,20}(length|tokens|context)", re.I)


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Which server is asked, and how patiently.

    url: with or without `/v1`. model: the name that the server knows it by. concurrency: queries under way at once.
    num_attempts: of one query, the first included, with waits of `first_wait_s`, twice that, ... and some chance.
    timeout_s: how long one answer may take.
    """

    url: str
    model: str
    concurrency: int = 8
    num_attempts: int = 8
    first_wait_s: float = 0.5
    timeout_s: float = 600.0


class UnansweredError(Exception):
    """A query that got no answer after all attempts; `str` of it is the reason, as it is counted."""


class _TryAgainError(Exception):
    """An attempt that failed in a way that may pass. wait_s: how long the server asks to be left alone."""

    def __init__(self, reason: str, *, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Endpoint:
    """A server that was reached, knows the model, and says whether it takes token ids ('ids') or text ('text').

    Raises:
        UserError: a wrong URL, a server that is not reached, refuses the key, or does not know the model.
    """

    def __init__(self, settings: EndpointSettings, tokenizer: TaskTokenizer) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.base_url = base_url(settings.url)
        self.num_failed_in_a_row = 0
        self._is_reached = False
        # An end of turn that is a special token is left out of the text by default, so `stop` would never see it. vLLM
        # and SGLang take these two; `transformers serve` refuses what OpenAI's API does not name.
        self.extra_fields: dict[str, Any] = {}
        if tokenizer.settings.style == "chat":
            self.extra_fields = {"skip_special_tokens": False, "stop_token_ids": list(tokenizer.end_ids)}
        self._stopped = threading.Event()
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(settings.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=settings.concurrency + 1),
        )
        try:
            self.prompts: Literal["ids", "text"] = self._find_prompts()
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """Let every attempt under way be the last of its query."""
        self._stopped.set()

    def write_prompt(self, ids: Sequence[int]) -> list[int] | str | None:
        """Return `ids` as the server takes them; None where it takes text and no text of these ids gives them back."""
        if self.prompts == "ids":
            return [int(i) for i in ids]
        return text_of_ids(self.tokenizer, ids)

    def generate(self, ids: Sequence[int], *, max_new_tokens: int) -> Generated:
        """Return the greedy answer behind `ids`, to the terminator.

        Raises:
            UnansweredError: all attempts failed, or the prompt cannot be sent exactly.
            UserError: the server refuses, or is gone, or counts other prompt tokens than were sent.
        """
        prompt = self.write_prompt(ids)
        if prompt is None:
            raise UnansweredError(NOT_THE_SAME_IDS)
        content = self._attempt(prompt, max_new_tokens=max_new_tokens)
        told = _prompt_tokens(content)
        if told not in (None, len(ids)):
            raise UserError(
                f"--endpoint {self.settings.url}: counts {told} prompt tokens where {len(ids)} were sent, so its"
                f" tokenizer is another one; name the model that it serves as MODEL"
            )
        choice = content["choices"][0]
        text, ended = self.tokenizer.cut_text(str(choice["text"]))
        # Some servers leave the terminator out when they stop on it, some do not; a limit reached says 'length'.
        return Generated(text=text, cut=not ended and choice.get("finish_reason") == "length")

    def _find_prompts(self) -> Literal["ids", "text"]:
        """Ask for one token behind a letter, which any server can do, and then behind ids."""
        if self.extra_fields:
            try:
                self._attempt("a", max_new_tokens=1)
            except (UnansweredError, UserError):
                self.extra_fields = {}  # the next attempt reports whatever else is wrong
        try:
            self._attempt("a", max_new_tokens=1)
        except UnansweredError as error:
            raise UserError(f"--endpoint {self.settings.url}: no answer ({error}); look at the server's log") from None
        probe = [*self.tokenizer.bos_ids, *self.tokenizer.encode_texts(["a"])[0]]
        try:
            content = self._attempt(probe, max_new_tokens=1)
        except (UnansweredError, UserError):
            return "text"
        return "ids" if _prompt_tokens(content) in (None, len(probe)) else "text"

    def _attempt(self, prompt: list[int] | str, *, max_new_tokens: int) -> dict[str, Any]:
        return self._retry(lambda: self._read(self._post(prompt, max_new_tokens=max_new_tokens)))

    def _retry(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `ask` gives, after waits that double where it fails in a way that may pass.

        A server that was never reached is not waited for; one that is reached and not ready is, and that is logged.
        """
        settings = self.settings
        first = settings.first_wait_s
        backoff = tenacity.wait_exponential(multiplier=first, max=MAX_WAIT_S) + tenacity.wait_random(0, first)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(backoff(state), min(getattr(error, "wait_s", 0.0), MAX_WAIT_S))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._may_pass),
            before_sleep=self._tell_waiting,
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(settings.num_attempts), tenacity.stop_when_event_set(self._stopped)
            ),
            wait=wait,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            return retrying(ask)
        except _TryAgainError as error:
            raise UnansweredError(str(error)) from None
        except httpx2.TransportError as error:
            raise UserError(
                f"--endpoint {settings.url}: cannot be reached ({one_line(error)}); start it, or correct the URL"
            ) from None

    def _may_pass(self, error: BaseException) -> bool:
        return isinstance(error, _TryAgainError) or (self._is_reached and isinstance(error, httpx2.NetworkError))

    def _tell_waiting(self, state: tenacity.RetryCallState) -> None:
        """Log once, before the first answer, that the server is waited for; later progress shows it."""
        if not self._is_reached and state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            logging.getLogger("manyicl").warning("--endpoint %s: waiting for it (%s)", self.settings.url, error)

    def _post(self, prompt: list[int] | str, *, max_new_tokens: int) -> httpx2.Response:
        """Send one query; raise what may pass, return everything else."""
        body = {
            "model": self.settings.model,
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "frequency_penalty": 0.0,  # a checkpoint's own penalty would forbid the answers that the shots show
            "stop": [self.tokenizer.end_text],
            **self.extra_fields,
        }
        try:
            reply = self._client.post(f"{self.base_url}/completions", json=body)
        except httpx2.ConnectTimeout as error:
            raise httpx2.ConnectError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from error
        except httpx2.TimeoutException:
            raise _TryAgainError(f"no answer within {self.settings.timeout_s:g} s") from None
        except (httpx2.RemoteProtocolError, httpx2.DecodingError):
            raise _TryAgainError("connection broken off") from None
        if reply.status_code in _TRY_AGAIN or reply.status_code >= 500:
            raise _TryAgainError(f"status {reply.status_code}", wait_s=_wait_s(reply))
        return reply

    def _read(self, reply: httpx2.Response) -> dict[str, Any]:
        """Return a completion's content.

        Raises:
            UserError: the server refuses. What is no completion may pass, and is asked again.
        """
        if reply.status_code != 200:
            raise self._refusal(reply)
        try:
            content: dict[str, Any] = reply.json()
            if isinstance(content["choices"][0]["text"], str):
                self._is_reached = True
                return content
        except (ValueError, LookupError, TypeError):
            pass
        raise _TryAgainError("an answer that is no completion")

    def _refusal(self, reply: httpx2.Response) -> UserError:
        """Return the one line for a status that no attempt will change."""
        where, words = f"--endpoint {self.settings.url}", _server_words(reply)
        if reply.status_code in (401, 403):
            known = "another key" if KEY_VARIABLE in os.environ else "the key"
            return UserError(f"{where}: refuses ({reply.status_code}: {words}); put {known} into {KEY_VARIABLE}")
        if reply.status_code in (404, 405):
            return UserError(
                f"{where}: knows no model '{self.settings.model}', or has no /v1/completions ({reply.status_code}:"
                f" {words}); {self._served_models()}"
            )
        if reply.status_code in (400, 413, 422) and _TOO_LONG.search(words):
            return UserError(
                f"{where}: a query is too long for it ({words}); lower --max-tokens or --shots, or start it with a"
                " longer window"
            )
        return UserError(f"{where}: refuses ({reply.status_code}: {words}); name its model with --endpoint-model")

    def _served_models(self) -> str:
        """Return which models the server names, as the fix of a wrong one."""
        try:
            names = [str(entry["id"]) for entry in self._client.get(f"{self.base_url}/models").json()["data"]]
        except (httpx2.HTTPError, ValueError, LookupError, TypeError):
            names = []
        return f"it serves {', '.join(names[:5])}: choose with --endpoint-model" if names else "set --endpoint-model"


def base_url(url: str) -> str:
    """Return `url` up to and with `/v1`.

    Raises:
        UserError: no http(s) URL, or one that carries a key or a query.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint {url}: is no URL; write it as http://host:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"--endpoint {parts.scheme}://{parts.hostname}: carries a key or a query, and results name the URL; put the"
            f" key into {KEY_VARIABLE}"
        )
    bare = url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return f"{bare}/v1"


def text_of_ids(tokenizer: TaskTokenizer, ids: Sequence[int]) -> str | None:
    """Return the text that a server's tokenizer, left to itself, turns into exactly `ids`; None where there is none.

    With BOS written out where the tokenizer adds none of its own, and without it where it does.
    """
    wanted = [int(i) for i in ids]
    num_bos = len(tokenizer.bos_ids)
    starts = (num_bos, 0) if num_bos and wanted[:num_bos] == tokenizer.bos_ids else (0,)
    for start in starts:
        text = tokenizer.decode(wanted[start:])
        if list(tokenizer.tokenizer(text, verbose=False)["input_ids"]) == wanted:
            return text
    return None


def one_line(error: Exception) -> str:
    """Return an error's own words, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _server_words(reply: httpx2.Response) -> str:
    """Return what the server says of a refusal: OpenAI's `error.message`, FastAPI's `detail`, or the start of it."""
    try:
        content = reply.json()
        found = content.get("error") or content.get("detail") or content.get("message") or content
        words = found.get("message") or found if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        words = reply.text
    return one_line(Exception(str(words))) if words else "no reason given"


def _prompt_tokens(content: dict[str, Any]) -> int | None:
    """Return how many tokens the server says the prompt had; None where it does not say."""
    usage = content.get("usage")
    told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return told if isinstance(told, int) else None


def _wait_s(reply: httpx2.Response) -> float:
    """Return the seconds of a Retry-After header; a date, or none, is 0."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
