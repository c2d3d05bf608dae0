"""A server of the seed model with one small task, shared by the tests of a module."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import httpx2
import pytest

from tests.conftest import make_task
from tests.support.serving import serving

TASK = make_task("animals", num_examples=120)
ROWS = [{"input": example.input, "answer": example.answer} for example in (*TASK.train, *TASK.validation, *TASK.test)]


def rows_as_csv(rows: Sequence[Mapping[str, str]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["input", "answer"])
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`manyicl serve seed` as a process, with the task `animals`."""
    with serving(tmp_path_factory.mktemp("data")) as served:
        upload = {"file": ("animals.csv", rows_as_csv(ROWS))}
        assert httpx2.post(f"{served.url}/v1/tasks", files=upload).status_code == 201
        yield served


@pytest.fixture(scope="module")
def url(served):
    return served.url
