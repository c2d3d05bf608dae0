"""A server that is killed, stopped, doubled or attacked: what it acknowledged stays, and nothing hangs.

docs/reliability.md lists these with what they found. MANYICL_KILLS says how often a server is killed in the middle of
uploads (5 here, 50 for that table), MANYICL_FUZZ how many requests are made of each operation.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time

import httpx2
import pytest

from manyicl.errors import UserError
from manyicl.server import ServerSettings, run_server
from tests.server.conftest import ROWS
from tests.support.serving import app_in_thread, serving
from tests.support.slow_service import SlowService, wait_until

KILLS = int(os.environ.get("MANYICL_KILLS", "5"))
# Their servers are processes, the first of which takes ten seconds of a core to start.
pytestmark = pytest.mark.slow


def upload_until_killed(url: str, number: int, acknowledged: list[str]) -> None:
    """Add one example after another, each with a name of its own, and a task now and then, until the server is gone."""
    with httpx2.Client(base_url=url, timeout=10) as client:
        for turn in range(100_000):
            name = f"kill {number}, row {turn}"
            try:
                if turn % 5 == 4:
                    body = {"name": f"task {number} {turn}", "examples": [*ROWS[:60], {"input": name, "answer": "fox"}]}
                    sent = client.put(f"/v1/tasks/task {number} {turn % 3}", json={"examples": body["examples"]})
                else:
                    sent = client.post("/v1/tasks/kept/examples", json={"examples": [{"input": name, "answer": "fox"}]})
            except httpx2.HTTPError:
                return
            assert sent.status_code in (200, 201), sent.text
            if turn % 5 != 4:
                acknowledged.append(name)


def read_inputs(url: str, task: str) -> list[str]:
    found, start = [], 0
    while True:
        page = httpx2.get(f"{url}/v1/tasks/{task}/examples", params={"start": start, "limit": 1000}).json()
        found += [example["input"] for example in page["examples"]]
        start += 1000
        if start >= page["total"]:
            return found


def test_a_kill_in_the_middle_of_uploads_loses_nothing_that_was_acknowledged(tmp_path):
    rng, acknowledged, replaced = random.Random(0), [], 0
    for number in range(KILLS):
        with serving(tmp_path, "--no-measure") as served:
            if number == 0:
                body = {"name": "kept", "examples": ROWS}
                assert httpx2.post(f"{served.url}/v1/tasks", json=body).status_code == 201
            uploads = threading.Thread(target=upload_until_killed, args=(served.url, number, acknowledged))
            uploads.start()
            time.sleep(rng.uniform(0.02, 1.0))
            served.kill()
            uploads.join(timeout=20)
            assert not uploads.is_alive()
    with serving(tmp_path, "--no-measure") as served:
        found = read_inputs(served.url, "kept")
        assert len(acknowledged) > KILLS
        assert set(acknowledged) <= set(found)
        assert len(found) == len(set(found))
        # A row that was stored and not yet acknowledged may be there: one per kill at most.
        assert len(found) - len(ROWS) - len(acknowledged) <= KILLS
        for task in httpx2.get(f"{served.url}/v1/tasks").json()["tasks"]:
            replaced += task["name"] != "kept"
            assert task["num_examples"] in (61, len(found))  # whole or absent
            reply = httpx2.post(
                f"{served.url}/v1/tasks/{task['name']}/predict", json={"input": "the red fox"}, timeout=60
            )
            assert reply.status_code == 200
    print(f"{KILLS} kills: {len(acknowledged)} acknowledged rows, 0 lost; {replaced} tasks replaced, each whole")


def test_a_server_that_is_told_to_stop_finishes_what_it_took(tmp_path):
    replies = []

    def ask(url: str) -> None:
        inputs = [f"the red fox {number}" for number in range(150)]  # of three clients, fewer than may wait
        replies.append(httpx2.post(f"{url}/v1/tasks/animals/predict", json={"inputs": inputs}, timeout=120))

    with serving(tmp_path, "--no-measure") as served:
        body = {"name": "animals", "examples": ROWS}
        assert httpx2.post(f"{served.url}/v1/tasks", json=body).status_code == 201
        asking = [threading.Thread(target=ask, args=(served.url,)) for _ in range(3)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        assert served.stop() == 0
        for thread in asking:
            thread.join(timeout=10)
        assert [reply.status_code for reply in replies] == [200, 200, 200]
        assert [len(reply.json()["replies"]) for reply in replies] == [150, 150, 150]
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{served.url}/healthz")


def test_two_servers_share_one_library(tmp_path):
    with serving(tmp_path, "--no-measure") as one, serving(tmp_path, "--no-measure") as two:
        body = {"name": "animals", "examples": ROWS}
        assert httpx2.post(f"{one.url}/v1/tasks", json=body).status_code == 201
        ask = {"input": "the red fox 1", "shots": {"policy": "random", "count": 20, "seed": 3}}
        place = "/v1/tasks/animals/predict"
        first, other = (httpx2.post(url + place, json=ask, timeout=60).json() for url in (one.url, two.url))
        assert first["replies"][0]["answer"] == other["replies"][0]["answer"]
        assert first["replies"][0]["shots"] == other["replies"][0]["shots"]

        def append(url: str, number: int) -> int:
            row = {"input": f"the late fox {number}", "answer": "fox"}
            return httpx2.post(f"{url}/v1/tasks/animals/examples", json={"examples": [row]}, timeout=60).status_code

        statuses: list[int] = []
        writers = [
            threading.Thread(target=lambda url=url, n=n: statuses.append(append(url, n)))
            for n, url in enumerate([one.url, two.url] * 20)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(timeout=60)
        assert statuses == [201] * 40
        for url in (one.url, two.url):
            task = httpx2.get(f"{url}/v1/tasks/animals").json()
            assert task["num_examples"] == len(ROWS) + 40
            assert httpx2.post(url + place, json=ask, timeout=60).json()["version"] == task["version"]
        # A correction through one is in the other's next answer, and a killed one does not stop the other.
        id_ = first["replies"][0]["shots"][0]
        corrected = httpx2.patch(f"{one.url}/v1/tasks/animals/examples/{id_}", json={"answer": "owl"})
        assert corrected.status_code == 200
        one.kill()
        seen = httpx2.post(two.url + place, json=ask, timeout=60).json()
        assert seen["version"] == task["version"] + 1
        assert append(two.url, 40) == 201
        with serving(tmp_path, "--no-measure") as three:
            assert httpx2.get(f"{three.url}/v1/tasks/animals").json()["num_examples"] == len(ROWS) + 41
            assert httpx2.delete(f"{three.url}/v1/tasks/animals").status_code == 204
            assert httpx2.post(two.url + place, json=ask).status_code == 404


def test_a_full_queue_answers_429_and_a_short_deadline_504(tmp_path):
    with serving(tmp_path, "--no-measure", "--max-queue", "1") as served:
        body = {"name": "animals", "examples": ROWS}
        assert httpx2.post(f"{served.url}/v1/tasks", json=body).status_code == 201
        place = f"{served.url}/v1/tasks/animals/predict"
        late = httpx2.post(place, json={"input": "the red fox", "deadline_s": 1e-6})
        assert (late.status_code, late.json()["type"]) == (504, "urn:manyicl:deadline-passed")
        found = []

        def ask(number: int) -> None:
            found.append(httpx2.post(place, json={"input": f"the red fox {number}"}, timeout=60))

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(timeout=60)
        statuses = [reply.status_code for reply in found]
        assert set(statuses) == {200, 429}
        refused = next(reply for reply in found if reply.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1


def test_an_input_that_is_too_long_is_refused(url):
    long = httpx2.post(f"{url}/v1/tasks/animals/predict", json={"input": "fox " * 20_000})
    assert (long.status_code, long.json()["type"]) == (422, "urn:manyicl:input-too-long")


def test_clients_that_leave_do_not_stop_the_others(url):
    for number in range(20):
        inputs = [f"the red fox {number} {row}" for row in range(50)]
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{url}/v1/tasks/animals/predict", json={"inputs": inputs}, timeout=0.005)
    assert httpx2.post(f"{url}/v1/tasks/animals/predict", json={"input": "the owl"}, timeout=60).status_code == 200


def test_metrics_count_requests_queue_cache_and_tokens(url):
    httpx2.post(f"{url}/v1/tasks/animals/predict", json={"input": "the red fox 1"}, timeout=60)
    text = httpx2.get(f"{url}/metrics").text
    assert 'manyicl_http_requests_total{method="POST",route="/v1/tasks/{task}/predict",status="200"}' in text
    for name in ("manyicl_queue_length", "manyicl_prefix_", "manyicl_tokens_total", "manyicl_requests_total"):
        assert f"\n{name}" in text, name


def test_the_log_of_a_server_has_no_texts(served):
    secret = "the very secret fox 77"
    httpx2.post(f"{served.url}/v1/tasks/animals/predict", json={"input": secret}, timeout=60)
    assert wait_until(lambda: any(entry.get("task") == "animals" for entry in served.log))
    assert not any(secret in str(entry) for entry in served.log)
    assert not any("traceback" in entry for entry in served.log)


def test_a_server_is_ready_after_a_real_forward(url):
    assert wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, seconds=30)
    assert httpx2.get(f"{url}/readyz").json()["model"] == "seed"


def test_a_model_that_fails_its_trial_is_tried_again(monkeypatch, caplog):
    service, trials = SlowService(), []
    service.is_ready = False

    def ready():
        trials.append(1)
        if len(trials) == 1:
            raise UserError("endpoint: gave no answer")
        service.is_ready = True

    service.ready = ready
    monkeypatch.setattr("manyicl.server.app.TRIAL_S", 0.01)
    with app_in_thread(service) as url:
        assert wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, seconds=10)
    assert "the model could not answer: endpoint: gave no answer" in caplog.text


def test_a_server_of_the_model_that_does_not_answer_is_not_ready_and_is_tried_again(monkeypatch):
    service, is_back = SlowService(), threading.Event()

    def ready():
        if not is_back.is_set():
            raise UserError("endpoint: gave no answer")
        service.is_ready, service.calls.fault = True, ""

    service.ready = ready
    monkeypatch.setattr("manyicl.server.app.TRIAL_S", 0.01)
    with app_in_thread(service) as url:
        assert httpx2.get(f"{url}/readyz").status_code == 200
        service.is_ready, service.calls.fault = False, "no answer within 120 s"
        told = httpx2.get(f"{url}/readyz")
        assert told.status_code == 503
        assert "the server of the model does not answer (no answer within 120 s)" in told.json()["detail"]
        is_back.set()
        assert wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, seconds=10)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("tasks/slow/predict", {"input": "x"}),
        ("tasks/slow/predict", {"input": "x", "stream": True}),
        ("completions", {"model": "base", "prompt": "x"}),
    ],
)
def test_a_request_that_takes_longer_than_the_end_of_the_server_is_answered_as_closing(path, body, caplog):
    service, found = SlowService(pieces=("x",), piece_s=60.0), []
    with app_in_thread(service, ServerSettings(shutdown_s=1)) as url:
        asking = threading.Thread(target=lambda: found.append(httpx2.post(f"{url}/v1/{path}", json=body, timeout=30)))
        asking.start()
        assert wait_until(lambda: service.tickets)
    asking.join(timeout=30)
    assert (found[0].status_code, found[0].headers["retry-after"]) == (503, "5")
    assert "the server ended before it answered; try again later" in found[0].text
    assert service.tickets[0].cancelled.is_set()
    assert "Traceback" not in caplog.text


def test_a_port_that_another_server_took_meanwhile_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    taken = []

    def open_slowly():
        taken.append(socket.create_server(("127.0.0.1", port)))  # while the model is loaded
        return SlowService()

    with pytest.raises(UserError, match=f"--port {port}: another program uses it"):
        run_server(open_slowly, ServerSettings(port=port))
    taken[0].close()
