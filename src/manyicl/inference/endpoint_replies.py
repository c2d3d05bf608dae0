"""What a server's replies say beside the answer: its own words for a refusal, tokens counted, how long to wait."""

from __future__ import annotations

from typing import Any

import httpx2


def one_line(error: Exception) -> str:
    """Return an error's own words, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def server_words(reply: httpx2.Response) -> str:
    """Return what the server says of a refusal: OpenAI's `error.message`, FastAPI's `detail`, or the start of it."""
    try:
        content = reply.json()
        found = content.get("error") or content.get("detail") or content.get("message") or content
        words = found.get("message") or found if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        words = reply.text
    return one_line(Exception(str(words))) if words else "no reason given"


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
