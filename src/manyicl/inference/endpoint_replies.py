"""What a server's replies say beside the answer: its own words for a refusal, tokens counted, how long to wait."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx2

from manyicl.errors import UserError, list_some

if TYPE_CHECKING:
    from manyicl.inference.endpoint import EndpointSettings

_TOO_LONG = re.compile(r"context.?(length|window)|too long|too large|max(imum)?.{0,20}(length|tokens|context)", re.I)


def refusal(
    reply: httpx2.Response,
    settings: EndpointSettings,
    *,
    is_reached: bool,
    key_variable: str,
    served: Callable[[], Sequence[str]],
) -> UserError:
    """Return the one line for a status that no attempt will change, with the fix.

    is_reached: whether the server has answered for this model before. key_variable: holds the server's key. served:
    asks for the names of the server's models.
    """
    server, words = f"endpoint={settings.url}", server_words(reply)
    if reply.status_code in (401, 403):
        known = "another key" if key_variable in os.environ else "the key"
        return UserError(f"{server}: refuses ({reply.status_code}: {words}); put {known} into {key_variable}")
    if reply.status_code in (404, 405):
        names = list_some(served(), most=5)
        fix = f"it serves {names}: choose with `endpoint.model`" if names else "set `endpoint.model`"
        return UserError(
            f"{server}: knows no model '{settings.model}', or has no /v1/completions ({reply.status_code}: {words});"
            f" {fix}"
        )
    if reply.status_code in (400, 413, 422) and _TOO_LONG.search(words):
        return UserError(
            f"{server}: a query is too long for it ({words}); lower `max_tokens`, `shots` or `max_new_tokens`, or start"
            " it with a longer window"
        )
    fix = "change the setting that it refuses" if is_reached else "name its model with `endpoint.model`"
    return UserError(f"{server}: refuses ({reply.status_code}: {words}); {fix}")


def one_line(error: Exception) -> str:
    """Return an error's own words, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def server_words(reply: httpx2.Response) -> str:
    """Return what the server says of a refusal: OpenAI's `error.message`, FastAPI's `detail`, or the start of it.

    Without backticks and `name=value`: the command line writes these as its own options, and a server's names mean
    other things.
    """
    try:
        content = reply.json()
        found = content.get("error") or content.get("detail") or content.get("message") or content
        words = found.get("message") or found if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        words = reply.text
    plain = re.sub(r"(?<=\w)=(?=[^\s=])", " = ", str(words)).replace("`", "'")
    return one_line(Exception(plain)) if words else "no reason given"


def prompt_tokens(content: dict[str, Any]) -> int | None:
    """Return how many tokens the server says the prompt had; None if it does not say."""
    usage = content.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return counted if isinstance(counted, int) else None


def wait_s_of(reply: httpx2.Response) -> float:
    """Return the seconds of a Retry-After header; a date, or none, is 0."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
