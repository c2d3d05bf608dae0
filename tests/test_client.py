"""The Python client against a real server of the seed model, and against servers that misbehave."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pytest

import manyicl
from manyicl.client import Client, ServerRefusal
from manyicl.errors import UserError
from manyicl.server import make_token
from tests.server.conftest import ROWS, rows_as_csv
from tests.support.serving import serving


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    token = make_token(folder / "tokens.txt", role="admin")
    with (
        serving(folder / "data", "--token-file", str(folder / "tokens.txt")) as served,
        Client(served.url + "/v1/", token=token) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_task_from_a_file_is_asked_corrected_measured_and_removed(client, tmp_path):
    path = tmp_path / "animals.csv"
    path.write_bytes(rows_as_csv(ROWS))
    task = client.add_task(path)
    assert (task.name, task.registered.kept, task.info.num_examples) == ("animals", len(ROWS), len(ROWS))
    one, other = task.predict(["the red fox 1", "the blue owl 2"], shots={"count": 10, "seed": 1})
    assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-3)
    assert one.shots == other.shots
    assert len(one.shots) == 10
    assert task.predict("the red fox 1", shots=manyicl.ShotChoice(count=10, seed=1))[0].shots == one.shots
    assert task.predict("the red fox 1", min_confidence=np.float32(1), seed=np.int64(2))[0].unsure
    assert task.predict([]) == []
    rows = list(task.examples())
    assert [row.input for row in rows] == [row["input"] for row in ROWS]
    slip = task.correct(rows[0].id, "Owl")
    assert slip.notes == ("new labels: 'Owl'",)
    assert slip.warnings[0].startswith("answers that may be the same: 'owl' ")
    assert task.correct(rows[0].id, "owl").version == task.info.version
    assert next(task.examples()).answer == "owl"
    assert task.add_examples([{"input": "late", "answer": "fox"}]).kept == 1
    assert task.remove_examples([rows[0].id, rows[1].id]).num_examples == len(ROWS) - 1
    curve = task.curve(wait_s=60)
    assert curve.state == "done"
    assert curve.curve[0].shots == 0
    assert [info.name for info in client.tasks()] == ["animals"]
    task.remove()
    assert client.tasks() == []


@pytest.mark.slow
def test_rows_need_a_name_and_can_replace_a_task(client):
    with pytest.raises(UserError, match="rows need the name of their task"):
        client.add_task(ROWS)
    task = client.add_task(ROWS, name="odd name & more", settings={"instruction": "Name it."})
    assert task.info.instruction == "Name it."
    with pytest.raises(ServerRefusal) as caught:
        client.add_task(ROWS, name="odd name & more")
    assert (caught.value.status, caught.value.kind) == (409, "task-exists")
    assert client.add_task(ROWS[:30], name="odd name & more", replace=True).info.num_examples == 30
    task.remove()


@pytest.mark.slow
def test_a_refusal_is_one_line_with_its_kind(client):
    with pytest.raises(ServerRefusal) as caught:
        client.task("none").predict("x")
    assert (caught.value.status, caught.value.kind) == (404, "unknown-task")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_file_that_is_not_there_is_one_line(client, tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        client.add_task(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8300", "ftp://x", "http://", "", "http://[::1", "http://h:99999", "http://h:abc", "http://h:0"]
)
def test_a_wrong_url_is_refused(url):
    with pytest.raises(UserError, match="is not a URL"):
        Client(url)


@pytest.mark.parametrize("token", ["t\n", "\u00e9"])
def test_a_token_with_characters_that_none_has_is_refused(token):
    with pytest.raises(UserError, match=r"^token: holds characters that no token has"):
        Client("http://127.0.0.1:8300", token=token)


def test_values_of_another_kind_are_refused_before_they_are_sent():
    task = Client("http://127.0.0.1:1").task("animals")
    with pytest.raises(UserError, match=r"^inputs=5: give a text, or a list of texts$"):
        task.predict(5)
    with pytest.raises(UserError, match=r"^examples=5: give a file, or a list of rows$"):
        task.add_examples(5)
    with pytest.raises(UserError, match=r"^ids=3: is one value, not a list; give \[3\]$"):
        task.remove_examples(3)
    with pytest.raises(UserError, match=r"^\.: cannot be read \(Is a directory\)$"):
        task.client.add_task(".")
    with pytest.raises(UserError, match=r"^pyproject\.toml/a\.csv: cannot be read \(Not a directory\)$"):
        task.client.add_task("pyproject.toml/a.csv")


def test_no_server_is_one_line():
    with pytest.raises(UserError, match="is `manyicl serve` running there"):
        Client("http://127.0.0.1:1").tasks()


@pytest.fixture
def misbehaving():
    """A server that gives these answers, one after the other: (status, headers, body)."""
    answers: list[tuple[int, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers.pop(0)
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Client(f"http://127.0.0.1:{server.server_address[1]}") as client:
        yield client, answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("file", "settings", "path"),
    [
        ("my.desk.csv", None, "/v1/tasks/my.desk"),
        ("desk.jsonl.gz", None, "/v1/tasks/desk"),
        ("desk.csv", {"name": "mail"}, "/v1/tasks/mail"),
        ("desk.csv", {"name": 5}, "/v1/tasks/5"),  # the server says what is wrong with it
    ],
)
def test_a_file_replaces_the_task_that_it_would_be_named_after(file, settings, path, tmp_path, monkeypatch):
    (tmp_path / file).write_bytes(b"input,answer\nq,a\n")
    asked = []
    info = {"name": "x", "family": "qa", "metric": "exact_match", "instruction": "", "labels": [], "version": 2}
    answer = {
        "task": {**info, "num_examples": 1, "model": "m:x"},
        "registration": {"kept": 1, "dropped": {}, "notes": [], "warnings": []},
    }
    monkeypatch.setattr(Client, "request", lambda _, *sent, **__: asked.append(sent) or answer)
    Client("http://127.0.0.1:8300").add_task(tmp_path / file, settings=settings, replace=True)
    assert asked == [("PUT", path)]


def test_a_task_json_beside_a_file_goes_with_it(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(Client, "request", lambda _, *__, **content: sent.append(content["data"]) or 1 / 0)
    client = Client("http://127.0.0.1:8300")
    for name in ("desk.csv", "desk.csv.gz"):
        (tmp_path / name).write_bytes(b"text,label\nq,a\n")
        (tmp_path / "desk.task.json").write_text('{"columns": {"input": "text", "answer": "label"}}')
        for settings in (None, {"family": "qa"}):
            with pytest.raises(ZeroDivisionError):
                client.add_task(tmp_path / name, settings=settings)
    beside = {"settings": '{"columns": {"input": "text", "answer": "label"}}'}
    assert sent == [beside, {"settings": '{"family": "qa"}'}] * 2
    for wrong, told in (("{", "cannot be read"), ("[]", "is not a JSON object")):
        (tmp_path / "desk.task.json").write_text(wrong)
        with pytest.raises(UserError, match=rf"desk\.task\.json: {told}.*; correct it, or give settings$"):
            client.add_task(tmp_path / "desk.csv")


def test_a_busy_server_is_asked_again_when_it_says(misbehaving):
    client, answers = misbehaving
    busy = json.dumps({"type": "urn:manyicl:queue-full", "detail": "busy"}).encode()
    answers += [(429, {"retry-after": "0"}, busy), (503, {"retry-after": "nan"}, busy), (200, {}, b'{"tasks": []}')]
    assert client.tasks() == []


def test_a_server_that_stays_busy_is_a_refusal(misbehaving):
    client, answers = misbehaving
    busy = json.dumps({"type": "urn:manyicl:queue-full", "detail": "busy"}).encode()
    answers += [(429, {"retry-after": "0"}, busy)] * 8
    with pytest.raises(ServerRefusal, match="busy"):
        client.tasks()


@pytest.mark.parametrize("body", [b"<html>", b'{"tasks": 3}', b'{"tasks": [{"name": "x"}]}', b"[]"])
def test_an_answer_of_another_kind_of_server_is_one_line(misbehaving, body):
    client, answers = misbehaving
    answers.append((200, {}, body))
    with pytest.raises(UserError, match="the server's answer is not manyicl's"):
        client.tasks()


def test_a_proxys_refusal_is_one_line(misbehaving):
    client, answers = misbehaving
    answers.append((502, {}, b"<html>Bad gateway</html>"))
    with pytest.raises(ServerRefusal, match="the server refused \\(502"):
        client.tasks()


def test_the_library_exports_the_client():
    assert manyicl.Client is Client


@pytest.mark.parametrize("value", [float("nan"), object(), "half a pair \ud800"])
def test_what_no_request_can_hold_is_refused_in_one_line(value):
    with Client("http://127.0.0.1:1") as client, pytest.raises(UserError, match="cannot be sent as JSON"):
        client.add_task([{"input": "a", "answer": value}], name="x")


def test_a_table_is_no_list_of_texts_or_rows():
    table = pa.table({"input": ["the red fox"], "answer": ["fox"]})
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises(UserError, match="inputs: is a table; give one of its columns"):
            client.task("animals").predict(table)
        with pytest.raises(UserError, match="examples: is a table; give a file, or its rows"):
            client.add_task(table, name="animals")
        assert repr(client.task("animals")) == "RemoteTask('animals' at 'http://127.0.0.1:1')"
