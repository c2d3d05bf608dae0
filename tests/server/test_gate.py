"""Limits of size and time, ids, headers for browsers, and log lines without texts."""

from __future__ import annotations

import gc
import json
import logging
import socket
import threading

import httpx2
import pytest

from manyicl.server import ServerSettings
from manyicl.server.request_log import JsonLines, PlainLines
from manyicl.server.routes.bodies import UploadBody
from tests.support.serving import app_in_thread
from tests.support.slow_service import SlowService, wait_until


@pytest.fixture(scope="module")
def url():
    with app_in_thread(SlowService(), ServerSettings(max_body_bytes=10_000)) as url:
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_every_answer_has_its_id_and_headers_for_browsers(url):
    reply = httpx2.get(f"{url}/v1/models", headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert reply.headers["cache-control"] == "no-store"


def test_an_id_that_would_break_a_log_is_replaced(url):
    reply = httpx2.get(f"{url}/v1/models", headers={"x-request-id": 'a" b'})
    assert len(reply.headers["x-request-id"]) == 16


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/tasks", "GET, HEAD, POST"),
        ("FOO", "/v1/tasks", "GET, HEAD, POST"),
        ("POST", "/v1/tasks/slow", "DELETE, GET, HEAD, PUT"),
        ("GET", "/v1/tasks/slow/predict", "POST"),
        ("HEAD", "/v1/tasks/slow/predict", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/healthz", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
        ("POST", "/page.js", "GET, HEAD"),
        ("PATCH", "/", "GET, HEAD"),
    ],
)
def test_a_method_that_a_path_does_not_have_is_answered_with_those_that_it_has(url, method, path, allowed):
    refused = httpx2.request(method, url + path)
    assert (refused.status_code, refused.headers["allow"]) == (405, allowed)


def test_without_the_page_a_path_still_names_all_its_methods(monkeypatch):
    monkeypatch.setattr("manyicl.server.app.has_page", lambda: False)
    with app_in_thread(SlowService()) as url:
        assert httpx2.delete(f"{url}/v1/tasks").headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/docs", "/openapi.json", "/page.js", "/"])
def test_head_is_answered_as_get_without_the_body(url, path):
    get, head = httpx2.get(url + path), httpx2.head(url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))


def test_a_body_that_is_too_long_is_refused_before_it_is_read(url):
    refused = httpx2.post(f"{url}/v1/tasks/slow/predict", json={"input": "x" * 20_000})
    assert refused.status_code == 413
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["type"] == "urn:manyicl:body-too-large"


def test_a_body_without_a_length_is_counted_as_it_comes(url):
    def pieces():
        for _ in range(30):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    refused = httpx2.post(f"{url}/v1/tasks/slow/predict", content=pieces(), headers=headers)
    assert (refused.status_code, refused.json()["type"]) == (413, "urn:manyicl:body-too-large")


def test_openai_routes_refuse_a_long_body_in_their_own_shape(url):
    refused = httpx2.post(f"{url}/v1/completions", json={"model": "base", "prompt": "x" * 20_000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


def test_a_health_check_is_answered_while_json_is_parsed(monkeypatch):
    parse, is_parsing, is_healthy = UploadBody.model_validate_json, threading.Event(), threading.Event()

    def parse_slowly(content):
        is_parsing.set()
        assert is_healthy.wait(30)
        return parse(content)

    monkeypatch.setattr(UploadBody, "model_validate_json", parse_slowly)
    body, replies = {"examples": [{"input": "a", "answer": "b"}]}, []
    with app_in_thread(SlowService()) as url:
        uploading = threading.Thread(target=lambda: replies.append(httpx2.post(f"{url}/v1/tasks", json=body)))
        uploading.start()
        try:
            assert is_parsing.wait(30)
            assert httpx2.get(f"{url}/healthz", timeout=10).json() == {"status": "ok"}
        finally:
            is_healthy.set()
            uploading.join(30)
    assert replies[0].json()["detail"] == "name: is missing; a new task needs one"


def test_a_client_that_sends_its_body_too_slowly_is_let_go():
    with app_in_thread(SlowService(), ServerSettings(body_timeout_s=0.3)) as url, connect(url) as link:
        link.sendall(
            b"POST /v1/tasks/slow/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 500\r\n\r\n{"
        )
        assert b"408" in link.recv(1000)
        assert httpx2.get(f"{url}/healthz").status_code == 200


@pytest.fixture
def _no_garbage_collection():
    """Nothing may lean on the collector: it comes when it likes."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tasks/slow/predict", b'{"input": "x", "stream": true}'),
        ("/v1/completions", b'{"model": "base", "prompt": "x", "stream": true}'),
    ],
)
def test_a_client_that_does_not_read_its_answer_is_let_go_and_its_question_given_up(path, body):
    service = SlowService(pieces=["x" * 100_000] * 20_000, piece_s=0.001)
    with app_in_thread(service, ServerSettings(send_timeout_s=0.3)) as url, connect(url) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        link.sendall(
            b"POST " + path.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        assert wait_until(lambda: bool(service.tickets) and service.tickets[0].cancelled.is_set())
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_a_connection_that_brings_no_request_is_closed(monkeypatch):
    monkeypatch.setattr("manyicl.server.protocol.FIRST_REQUEST_S", 0.2)
    with app_in_thread(SlowService()) as url, connect(url) as link:
        link.sendall(b"GET /healthz HTT")
        assert link.recv(100) == b""


@pytest.mark.parametrize(
    "request_line",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"x" * 100_000,
        b"\r\n\r\n\x00\x00\r\n\r\n",
    ],
)
def test_what_is_not_http_harms_nobody(url, request_line):
    with connect(url) as link:
        link.sendall(request_line)
        link.shutdown(socket.SHUT_WR)
        answer = link.recv(1000)
    assert b"Traceback" not in answer
    assert httpx2.get(f"{url}/healthz").status_code == 200


def test_a_log_line_has_no_texts_unless_that_is_wanted(caplog):
    logging.getLogger("manyicl").propagate = True
    caplog.set_level(logging.INFO, logger="manyicl")
    for wanted in (False, True):
        with app_in_thread(SlowService(), ServerSettings(log_texts=wanted)) as url:
            httpx2.post(f"{url}/v1/tasks/slow/predict", json={"input": "my secret"})
            assert wait_until(lambda: bool(caplog.records))
        record = caplog.records[-1]
        line = JsonLines().format(record)
        assert ("my secret" in line) is wanted
        entry = json.loads(line)
        assert (entry["event"], entry["status"], entry["task"]) == ("request", 200, "slow")
        assert (entry["prompt_tokens"], entry["answer_tokens"]) == (5, 3)
        caplog.clear()


def test_a_name_with_a_line_break_stays_on_one_line_of_the_log():
    record = logging.LogRecord("manyicl.server", logging.INFO, "", 0, "request", (), None)
    record.task = "a\nb status=500"
    assert "\n" not in PlainLines().format(record)
    assert json.loads(JsonLines().format(record))["task"] == "a\nb status=500"
