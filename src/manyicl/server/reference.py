"""The list of all routes at /docs: plain HTML made of the OpenAPI document, which loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse


def make_reference(app: FastAPI) -> APIRouter:
    """Return the route of the list."""
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    def read_reference() -> HTMLResponse:
        return HTMLResponse(write_reference(app.openapi()))

    return router


def write_reference(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI document as a page: each route with its parameters, its body and what it does, by tag."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append("\n".join(_write_route(method.upper(), path, operation)))
    title = f"{escape(document['info']['title'])} {escape(document['info']['version'])}"
    sections = "\n".join(
        f"<section><h2>{escape(tag.capitalize())}</h2>\n<dl>\n" + "\n".join(routes) + "\n</dl></section>"
        for tag, routes in by_tag.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: routes</title>
<link rel="stylesheet" href="/page.css">
</head>
<body>
<main>
<h1>{title}: routes</h1>
<p>{escape(document["info"].get("description", ""))} All schemas are in <a href="/openapi.json">/openapi.json</a>.</p>
{sections}
</main>
</body>
</html>
"""


def _write_route(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<dt><code>{method} {escape(path)}</code></dt>"
    yield f"<dd>{escape(operation.get('description') or operation.get('summary', ''))}"
    named = [f"{one['name']} ({one['in']})" for one in operation.get("parameters", [])]
    if named:
        yield f'<br><span class="muted">Parameters: {escape(", ".join(named))}</span>'
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies:
        yield f'<br><span class="muted">Body: {escape(", ".join(bodies))}</span>'
    yield "</dd>"
