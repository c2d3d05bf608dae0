"""A service whose model a server runs: tasks and prompts are ours, and answers are what the server writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manyicl.errors import UserError
from manyicl.inference.endpoint import EndpointSettings
from manyicl.service.refusals import DeadlinePassed
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


def test_a_server_that_holds_a_request_keeps_the_worker_no_longer_than_the_requests_deadline(asked):  # noqa: F811
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny", first_wait_s=0.01)
        with open_service(replace(asked, model=None), endpoint=settings, settings=QUIET) as service:
            task = service.add_task(ROWS[:8], name="animals", settings={"family": "qa"})
            server.num_held = 1
            with pytest.raises(DeadlinePassed):
                task.submit("the red fox", deadline=0.3).future.result(5)
            assert task.submit("the red fox", deadline=60).future.result(5)[0].answer is not None
            assert service.stats().requests == {"late": 1, "answered": 1}


def test_a_caller_with_little_patience_does_not_make_a_service_unready(asked):  # noqa: F811
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny")
        with open_service(replace(asked, model=None), endpoint=settings, settings=QUIET) as service:
            service.ready()
            server.num_held = 1
            with pytest.raises(DeadlinePassed):
                service.submit_generation("a", deadline=0.1).future.result(5)
            assert service.is_ready


def test_a_service_is_not_ready_from_a_call_without_an_answer_to_one_with_an_answer(asked):  # noqa: F811
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny", num_attempts=1, timeout_s=0.5)
        with open_service(replace(asked, model=None), endpoint=settings, settings=QUIET) as service:
            service.ready()
            assert service.is_ready
            server.num_held = 1
            with pytest.raises(UserError, match=r"gave no answer \(no answer within 0.5 s\)"):
                service.generate("a")
            assert (service.is_ready, service.calls.fault) == (False, "no answer within 0.5 s")
            service.ready()
            assert service.is_ready
