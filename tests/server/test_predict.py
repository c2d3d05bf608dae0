"""The route that answers: JSON, server-sent events, errors before and during a stream, and clients that leave."""

from __future__ import annotations

import httpx2
import pytest

from manyicl.inference import AnswerSettings
from manyicl.server import ServerSettings
from manyicl.service import Closing, DeadlinePassed, InputTooLong, LibraryFault, QueueFull, ServiceSettings
from tests.support.serving import app_in_thread, read_events
from tests.support.slow_service import SlowService, wait_until

ASK = "/v1/tasks/slow/predict"


@pytest.fixture
def service():
    return SlowService()


@pytest.fixture
def url(service):
    with app_in_thread(service, ServerSettings(max_inputs=3)) as url:
        yield url


def stream(url: str, **body) -> list[tuple[str, object]]:
    with httpx2.stream("POST", url + ASK, json={"input": "x", "stream": True, **body}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        return list(read_events(reply.iter_lines()))


def test_several_inputs_have_their_answers_in_order(url):
    reply = httpx2.post(url + ASK, json={"inputs": ["a", "b"]}).json()
    assert [one["input"] for one in reply["replies"]] == ["a", "b"]
    assert reply["replies"][0]["answer"] == "one two three"
    assert reply["replies"][0]["nll"] is None  # NaN is no JSON
    assert (reply["task"], reply["version"]) == ("slow", 1)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": "a", "inputs": ["b"]}, "input"),
        ({"inputs": []}, "inputs"),
        ({"inputs": list("abcd")}, "inputs"),
        ({"input": "a", "shot": {}}, "shot"),
        ({"input": "a", "shots": {"policy": "best"}}, "shots.policy"),
        ({"input": "a", "deadline_s": 0}, "deadline_s"),
        ({"input": "a", "min_confidence": 1.5}, "min_confidence"),
        ({"input": 3}, "input"),
        ({"input": "a", "shots": 4}, "shots"),
    ],
)
def test_a_wrong_body_is_refused_by_its_field(url, body, field):
    refused = httpx2.post(url + ASK, json=body)
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith(f"{field}: ")
    if field == "shot":
        assert refused.json()["detail"] == "shot: no field has this name; leave it out, or see /docs"
    if body.get("shots") == 4:
        assert refused.json()["detail"] == "shots: input should be an object, as in {...}; see /docs"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b'{"input": "\\ud800"}', b"[" * 100_000, b'{"deadline_s": NaN}']
)
def test_a_broken_body_is_a_problem(url, body):
    refused = httpx2.post(url + ASK, content=body, headers={"content-type": "application/json"})
    assert refused.status_code in (400, 422)
    assert refused.headers["content-type"] == "application/problem+json"
    assert "\n" not in refused.json()["detail"]


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (QueueFull("busy", retry_after_s=2.2), 429, "queue-full"),
        (Closing("closing"), 503, "closing"),
        (InputTooLong("long"), 422, "input-too-long"),
        (DeadlinePassed("late"), 504, "deadline-passed"),
        (LibraryFault("broken"), 500, "library-fault"),
        (RuntimeError("secret place /home/x"), 500, "internal-error"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_refusal_has_its_status_also_if_a_stream_was_wanted(service, url, refusal, status, kind, streamed):
    service.refusal = refusal
    refused = httpx2.post(url + ASK, json={"input": "x", "stream": streamed})
    assert (refused.status_code, refused.json()["type"]) == (status, f"urn:manyicl:{kind}")
    assert "secret place" not in refused.text
    if status in (429, 503):
        assert int(refused.headers["retry-after"]) == (3 if status == 429 else 5)


def test_a_stream_brings_text_then_the_reply(url):
    events = stream(url)
    assert [content["text"] for name, content in events if name == "text"] == ["one ", "two ", "three"]
    assert [name for name, _ in events[-2:]] == ["reply", "done"]
    assert events[-2][1]["reply"]["answer"] == "one two three"
    assert events[-1][1] == {"task": "slow", "version": 1}


def test_a_failure_during_a_stream_is_its_last_event(service, url):
    service.failure = DeadlinePassed("too late")
    events = stream(url)
    assert [name for name, _ in events] == ["text", "text", "text", "problem"]
    assert events[-1][1]["detail"] == "too late"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (ASK, {"input": "x"}),
        ("/v1/completions", {"model": "base:slow", "prompt": "x"}),
        ("/v1/completions", {"model": "base", "prompt": "x"}),
        ("/v1/chat/completions", {"model": "base:slow", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_a_client_that_leaves_before_any_text_takes_its_question_along(service, url, monkeypatch, path, body, streamed):
    monkeypatch.setattr("manyicl.server.waiting.BEGIN_S", 600.0)
    service.pieces, service.piece_s = ["x"], 600.0
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(url + path, json={**body, "stream": streamed}, timeout=0.3)
    assert wait_until(service.tickets[0].cancelled.is_set, seconds=20)


def test_a_client_that_leaves_a_quiet_stream_takes_its_question_along(service, url, monkeypatch):
    monkeypatch.setattr("manyicl.server.waiting.BEGIN_S", 0.05)
    service.pieces, service.piece_s = ["x"], 600.0
    with httpx2.stream("POST", url + ASK, json={"input": "x", "stream": True}) as reply:
        assert reply.status_code == 200
    assert wait_until(service.tickets[0].cancelled.is_set, seconds=10)


def test_a_client_that_leaves_a_stream_takes_its_question_along(service, url):
    service.pieces, service.piece_s = ["x"] * 1000, 0.05
    with httpx2.stream("POST", url + ASK, json={"input": "x", "stream": True}) as reply:
        assert next(reply.iter_lines()) == "event: text"
    assert wait_until(service.tickets[0].cancelled.is_set)


def test_the_server_keeps_a_quiet_stream_alive(service, url, monkeypatch):
    monkeypatch.setattr("manyicl.server.waiting.KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr("manyicl.server.waiting.BEGIN_S", 0.05)
    service.pieces, service.piece_s = ["x"], 0.5
    with httpx2.stream("POST", url + ASK, json={"input": "x", "stream": True}) as reply:
        lines = list(reply.iter_lines())
    assert lines.count(": waiting") > 3
    assert [name for name, _ in read_events(lines)] == ["text", "reply", "done"]


def test_an_answer_that_never_comes_is_given_up(service, url, monkeypatch):
    monkeypatch.setattr("manyicl.server.waiting.GRACE_S", 0.0)
    monkeypatch.setattr("manyicl.server.waiting.KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr("manyicl.server.waiting.BEGIN_S", 0.05)
    service.pieces, service.piece_s = ["x"], 30.0
    late = httpx2.post(url + ASK, json={"input": "x", "deadline_s": 0.1})
    assert (late.status_code, late.json()["type"]) == (504, "urn:manyicl:deadline-passed")
    assert stream(url, deadline_s=0.1)[-1][0] == "problem"
    assert wait_until(lambda: all(ticket.cancelled.is_set() for ticket in service.tickets))


def test_settings_of_generation_that_change_nothing_are_named_in_a_header(service, url):
    sampled = {"input": "x", "temperature": 0.7, "samples": 3, "seed": 1, "min_confidence": 0.5}
    assert "x-manyicl-ignored" not in httpx2.post(url + ASK, json=sampled).headers
    service.labels = ("cat", "dog")
    assert httpx2.post(url + ASK, json=sampled).headers["x-manyicl-ignored"] == "temperature, samples, seed"
    with httpx2.stream("POST", url + ASK, json={**sampled, "stream": True}) as reply:
        assert reply.headers["x-manyicl-ignored"] == "temperature, samples, seed"
    assert "x-manyicl-ignored" not in httpx2.post(url + ASK, json={"input": "x"}).headers
    service.labels = ()
    asked = {"inputs": ["x", "y"], "options": [["a", "b"], ["c", "d"]], "stop": ["."]}
    assert httpx2.post(url + ASK, json=asked).headers["x-manyicl-ignored"] == "stop"
    service.labels, service.info.num_parameters = ("cat", "dog"), None  # a model on a server generates labels too
    assert "x-manyicl-ignored" not in httpx2.post(url + ASK, json=sampled).headers


def test_what_a_greedy_answer_does_not_use_is_named_in_the_header(service, url):
    asked = {"input": "x", "top_p": 0.9, "seed": 1, "stop": ["."]}
    assert httpx2.post(url + ASK, json=asked).headers["x-manyicl-ignored"] == "top_p, seed"
    assert httpx2.post(url + ASK, json={**asked, "temperature": 0}).headers["x-manyicl-ignored"] == "top_p, seed"
    assert "x-manyicl-ignored" not in httpx2.post(url + ASK, json={**asked, "temperature": 0.7}).headers
    service.settings = ServiceSettings(answering=AnswerSettings(temperature=0.7))
    assert "x-manyicl-ignored" not in httpx2.post(url + ASK, json=asked).headers
    assert httpx2.post(url + ASK, json={**asked, "temperature": 0}).headers["x-manyicl-ignored"] == "top_p, seed"
