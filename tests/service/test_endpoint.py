"""A service whose model a server runs: tasks and prompts are ours, and answers are what the server writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manyicl.errors import UserError
from manyicl.inference.endpoint import EndpointSettings
from manyicl.service.served import open_service
from manyicl.service.settings import ServiceSettings
from tests.inference.test_endpoint import ModelServer, asked  # noqa: F401  # a fixture
from tests.service.conftest import QUIET, ROWS


def test_answers_of_a_server_are_those_of_the_model_here(asked):  # noqa: F811
    rows = [{"input": row["input"].replace(" 1", " "), "answer": row["answer"]} for row in ROWS[:20]]
    with open_service(asked, settings=QUIET) as service:
        here = service.add_task(rows, name="animals", settings={"family": "qa"}).predict(["the red fox", "a blue owl"])
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny", num_attempts=2, first_wait_s=0.01)
        remote = replace(asked, model=None)
        with open_service(remote, endpoint=settings, settings=QUIET) as service:
            assert service.info.device == "server"
            task = service.add_task(rows, name="animals", settings={"family": "qa"})
            there = task.predict(["the red fox", "a blue owl"])
            assert [reply.answer for reply in there] == [reply.answer for reply in here]
            assert [reply.shots for reply in there] == [reply.shots for reply in here]
            assert all(reply.probabilities is None and reply.nll is None for reply in there)
            server.faults = [(500, "broken")] * 2
            with pytest.raises(UserError, match="endpoint: gave no answer"):
                task.predict("the red fox")
            assert task.predict("the red fox")[0].answer == here[0].answer
            assert service.stats().requests == {"answered": 2, "failed": 1}


@pytest.mark.slow
def test_labels_are_generated_by_a_server_and_measured(asked):  # noqa: F811
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny")
        limits = ServiceSettings(measure_tokens=2_000)
        with open_service(replace(asked, model=None), endpoint=settings, settings=limits) as service:
            task = service.add_task(ROWS[:16], name="animals", settings={"family": "classification"})
            assert task.labels
            assert task.predict("the red fox")[0].probabilities is None
            assert task.measure(120).state == "done"


def test_a_server_that_is_not_there_is_told_at_once(asked):  # noqa: F811
    with pytest.raises(UserError, match=r"endpoint=http://127\.0\.0\.1:9: cannot be reached"):
        open_service(replace(asked, model=None), endpoint=EndpointSettings("http://127.0.0.1:9", model="tiny"))
