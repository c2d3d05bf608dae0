"""Requests that schemathesis makes from the OpenAPI document: no 5xx, and every answer is as the document says.

MANYICL_FUZZ says how many requests are made of each operation and kind: 3 here, more for docs/reliability.md.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
EXAMPLES = int(os.environ.get("MANYICL_FUZZ", "3"))


def put_known_task(context, path_parameters):
    """Ask a task that is there, in every operation that does not change it."""
    operation = context.operation
    if (
        path_parameters
        and "task" in path_parameters
        and (operation.method == "get" or operation.path.endswith("predict"))
    ):
        return {**path_parameters, "task": "animals"}
    return path_parameters


@pytest.mark.slow
def test_every_answer_is_as_the_document_says(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.hook("map_path_parameters")(put_known_task)
    tried = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            @seed(0)
            @given(case=operation.as_strategy(generation_mode=mode))
            def answer_is_as_described(case):
                answer = case.call_and_validate(checks=CHECKS, timeout=60)
                assert "Traceback" not in answer.text
                tried.append(answer.status_code)

            with suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
                answer_is_as_described()
    assert len(tried) > 13 * EXAMPLES
    assert 200 in tried
    print(f"{len(tried):,} requests: {sorted(Counter(tried).items())}")


@pytest.mark.slow
def test_the_document_has_every_route_and_one_shape_of_errors(url):
    document = httpx2.get(f"{url}/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/tasks",
        "/v1/tasks/{task}",
        "/v1/tasks/{task}/curve",
        "/v1/tasks/{task}/examples",
        "/v1/tasks/{task}/examples/{id}",
        "/v1/tasks/{task}/predict",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/completions",
        "/v1/chat/completions",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    listed = httpx2.get(f"{url}/docs")
    assert listed.headers["content-type"].startswith("text/html")
    for path, operations in document["paths"].items():
        assert f"<code>{next(iter(operations)).upper()} {path}</code>" in listed.text
        for operation in operations.values():
            assert "default" in operation["responses"], path
            assert operation["description"], path
    # Offline, and as the content security policy has it: no script, nothing from elsewhere.
    assert "<script" not in listed.text
    assert "//" not in listed.text
