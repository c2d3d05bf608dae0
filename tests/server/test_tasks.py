"""Tasks over HTTP on the seed model: uploads of every kind, examples, corrections, the curve, and hostile requests."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.server.conftest import ROWS, rows_as_csv

# They share a server that is a process of its own, which takes ten seconds of a core to start.
pytestmark = pytest.mark.slow


@pytest.fixture
def tasks(url):
    """The URL of the tasks; those that a test makes are removed after it."""
    before = {task["name"] for task in httpx2.get(f"{url}/v1/tasks").json()["tasks"]}
    yield f"{url}/v1/tasks"
    for task in httpx2.get(f"{url}/v1/tasks").json()["tasks"]:
        if task["name"] not in before:
            httpx2.delete(f"{url}/v1/tasks/{quote(task['name'], safe='')}")


def as_parquet(rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


UPLOADS = {
    "pets.csv": rows_as_csv(ROWS),
    "pets.csv.gz": gzip.compress(rows_as_csv(ROWS)),
    "pets.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "pets.json": json.dumps(ROWS).encode(),
    "pets.parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_every_kind_of_file_makes_the_same_task(tasks, name):
    made = httpx2.post(tasks, files={"file": (name, UPLOADS[name])})
    assert made.status_code == 201
    task = made.json()["task"]
    assert (task["name"], task["num_examples"], task["family"]) == ("pets", len(ROWS), "classification")
    assert sorted(task["labels"]) == ["cat", "dog", "fox", "owl"]
    assert made.json()["registration"]["kept"] == len(ROWS)
    shown = httpx2.get(f"{tasks}/pets/examples", params={"start": 1, "limit": 2}).json()
    assert [example["input"] for example in shown["examples"]] == [row["input"] for row in ROWS[1:3]]
    assert shown["total"] == len(ROWS)


def test_a_task_as_json(tasks):
    body = {"name": "animals as json", "settings": {"instruction": "Name the animal."}, "examples": ROWS}
    assert httpx2.post(tasks, json=body).status_code == 201
    task = httpx2.get(f"{tasks}/animals%20as%20json").json()
    assert task["instruction"] == "Name the animal."


def test_an_answer_has_probabilities_shots_and_timing(tasks):
    httpx2.post(tasks, files={"file": ("pets.csv", UPLOADS["pets.csv"])})
    content = httpx2.post(f"{tasks}/pets/predict", json={"inputs": ["the red fox 1", "the blue owl 2"]}).json()
    for reply in content["replies"]:
        assert sum(reply["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert reply["answer"] == max(reply["probabilities"], key=reply["probabilities"].get)
        assert len(reply["shots"]) == len(set(reply["shots"])) > 10
        assert reply["timing"]["total_s"] >= reply["timing"]["model_s"] > 0
        assert reply["num_prompt_tokens"] > 50
    fixed = {"input": "the red fox 1", "shots": {"policy": "fixed", "ids": content["replies"][0]["shots"][:3]}}
    again = httpx2.post(f"{tasks}/pets/predict", json=fixed).json()
    assert again["replies"][0]["shots"] == content["replies"][0]["shots"][:3]


def test_examples_are_appended_corrected_and_removed(tasks):
    version = httpx2.post(tasks, files={"file": ("pets.csv", UPLOADS["pets.csv"])}).json()["task"]["version"]
    more = httpx2.post(f"{tasks}/pets/examples", json={"examples": [{"input": "a late fox", "answer": "fox"}]})
    assert (more.status_code, more.json()["registration"]["kept"]) == (201, 1)
    assert more.json()["task"]["version"] == version + 1
    last = httpx2.get(f"{tasks}/pets/examples", params={"start": len(ROWS)}).json()["examples"]
    assert [example["input"] for example in last] == ["a late fox"]
    place = f"{tasks}/pets/examples/{last[0]['id']}"
    assert httpx2.patch(place, json={"answer": "owl"}).status_code == 200
    changed = httpx2.get(f"{tasks}/pets/examples", params={"start": len(ROWS)}).json()["examples"]
    assert changed[0]["answer"] == "owl"
    assert httpx2.delete(place).json()["num_examples"] == len(ROWS)
    assert httpx2.delete(place).status_code == 404
    ids = [example["id"] for example in httpx2.get(f"{tasks}/pets/examples").json()["examples"][:2]]
    removed = httpx2.request("DELETE", f"{tasks}/pets/examples", json={"ids": ids})
    assert removed.json()["num_examples"] == len(ROWS) - 2


def test_a_mistyped_label_is_reported_by_a_correction_as_by_an_upload(tasks):
    httpx2.post(tasks, files={"file": ("pets.csv", UPLOADS["pets.csv"])})
    first = httpx2.get(f"{tasks}/pets/examples?limit=1").json()["examples"][0]
    place, common = f"{tasks}/pets/examples/{first['id']}", first["answer"]
    corrected = httpx2.patch(place, json={"answer": f"{common}."}).json()
    assert corrected["notes"] == [f"new labels: '{common}.'"]
    assert corrected["warnings"][0].startswith(f"answers that may be the same: '{common}' ")
    assert corrected["labels"] == httpx2.get(f"{tasks}/pets").json()["labels"]
    back = httpx2.patch(place, json={"answer": common}).json()
    assert (back["notes"], back["warnings"], back["num_examples"]) == ([], [], len(ROWS))
    row = {"input": "a late one", "answer": f"{common}."}
    added = httpx2.post(f"{tasks}/pets/examples", json={"examples": [row]}).json()["registration"]
    assert added["notes"] == corrected["notes"]
    assert added["warnings"][0].startswith(f"answers that may be the same: '{common}' ")


def test_a_task_is_replaced_and_removed(tasks):
    file = {"file": ("pets.csv", UPLOADS["pets.csv"])}
    assert httpx2.put(f"{tasks}/pets", files=file).status_code == 200
    twice = httpx2.post(tasks, files=file)
    assert (twice.status_code, twice.json()["type"]) == (409, "urn:manyicl:task-exists")
    assert httpx2.put(f"{tasks}/pets", json={"examples": ROWS[:20]}).json()["task"]["num_examples"] == 20
    assert httpx2.put(f"{tasks}/pets", json={"name": "other", "examples": ROWS[:20]}).status_code == 422
    assert httpx2.delete(f"{tasks}/pets").status_code == 204
    assert httpx2.get(f"{tasks}/pets").json()["type"] == "urn:manyicl:unknown-task"
    assert httpx2.delete(f"{tasks}/pets").status_code == 404


def test_the_curve_is_measured_by_itself(url):
    for _ in range(600):
        curve = httpx2.get(f"{url}/v1/tasks/animals/curve").json()
        if curve["state"] not in ("waiting", "running"):
            break
        time.sleep(0.1)
    assert (curve["state"], curve["fraction"]) == ("done", 1.0)
    assert curve["curve"][0]["shots"] == 0
    assert all(point["low"] <= point["score"] <= point["high"] for point in curve["curve"])
    assert 0 < curve["majority"] <= 1
    assert curve["sentence"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pets.csv", b"input,answer\n", "pets.csv"),
        ("pets.csv", b"text;label\na;b\n", "pets.csv"),
        ("pets.jsonl", b"{broken\n", "pets.jsonl"),
        ("pets.parquet", b"PAR1 not really", "pets.parquet"),
        ("pets.exe", b"MZ", "pets.exe"),
        ("pets.csv.gz", b"not gzip", "pets.csv.gz"),
        ("pets", b"input,answer\na,b\n", "pets"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tasks, name, content, words):
    refused = httpx2.post(tasks, files={"file": (name, content)})
    assert refused.status_code == 422
    detail = refused.json()["detail"]
    assert words in detail
    assert "\n" not in detail
    assert "/tmp" not in refused.text
    assert "manyicl-upload" not in refused.text
    assert "Traceback" not in refused.text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            None,
            """pets.csv: no 'input' column: 'text' looks like the input and 'label' like the answer; to read it,\
 write {"columns": {"input": "text", "answer": "label"}} into `settings`""",
        ),
        ('{"famly": "nli"}', "settings: unknown key 'famly'; did you mean 'family'? (and 1 more kind of mistakes)"),
    ],
    ids=["other columns", "wrong settings"],
)
def test_a_file_that_needs_settings_is_refused_with_those_that_an_upload_can_have(tasks, settings, told):
    form = {"files": {"file": ("pets.csv", b"text,label\na,b\nc,d\n")}}
    refused = httpx2.post(tasks, **form, data={} if settings is None else {"settings": settings})
    assert refused.json()["detail"] == told
    assert "/tmp" not in refused.text
    columns = {"columns": {"input": "text", "answer": "label"}}
    assert refused.json()["faults"][0].get("settings") == (columns if settings is None else None)
    assert httpx2.post(tasks, **form, data={"settings": json.dumps(columns)}).status_code == 201


def test_rows_that_cannot_be_read_are_counted_by_kind(tasks):
    refused = httpx2.post(tasks, files={"file": ("pets.jsonl", b'{"input": "a", "answer": "b"}\n{"input": 3}\n')})
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:manyicl:bad-examples")
    assert refused.json()["faults"][0]["count"] == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "examples.0.answer: input should be a valid string, integer, number, boolean or array"),
        (["cat", 3], "examples.0.answer.1: input should be a valid string"),
    ],
)
def test_an_answer_of_no_kind_is_one_mistake_of_one_field(tasks, answer, told):
    """One null was five mistakes, of examples.0.answer.str and other fields that nobody had sent."""
    refused = httpx2.post(tasks, json={"name": "pets", "examples": [{"input": "it purrs", "answer": answer}]})
    assert (refused.status_code, refused.json()["detail"]) == (422, told)
    assert [error["field"] for error in refused.json()["errors"]] == [told.partition(":")[0]]


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd.csv",
        "..\\..\\win.csv",
        "/etc/cron.d/x.csv",
        ".csv",
        "a\nb.csv",
        "\u202egpj.csv",
        "\u8868" * 96 + ".csv",  # 292 bytes
    ],
)
def test_a_hostile_file_name_is_only_a_name(tasks, name):
    made = httpx2.post(tasks, files={"file": (name, rows_as_csv(ROWS))}, data={"name": "named"})
    assert made.status_code in (201, 422)
    assert "/tmp" not in made.text


HOSTILE = [
    "",
    ".",
    "..",
    "a/b",
    "../x",
    "x" * 5000,
    "a\x00b",
    "a\nb",
    "\x1b[31mred",
    "\u202eevil",
    "%2e%2e",
    "'; DROP TABLE tasks;--",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_task_name_is_refused_or_is_only_a_name(tasks, name):
    made = httpx2.post(tasks, json={"name": name, "examples": ROWS})
    assert made.status_code in (201, 422), made.text
    assert "Traceback" not in made.text
    listed = [task["name"] for task in httpx2.get(tasks).json()["tasks"]]
    if made.status_code == 201:
        assert name in listed
        path = f"{tasks}/{quote(name, safe='')}"
        assert httpx2.get(path).json()["name"] == name
        assert httpx2.delete(path).status_code == 204
    else:
        assert name not in listed


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"content": b"x", "headers": {"content-type": "text/csv"}}, 415),
        ({"content": b"x"}, 415),
        ({"data": {"name": "x"}}, 415),
        ({"files": {"other": ("a.csv", b"input,answer\n")}}, 422),
        ({"files": {"file": ("a.csv", b"x")}, "data": {"settings": "[1]"}}, 422),
        ({"files": {"file": ("a.csv", b"x")}, "data": {"settings": "{"}}, 422),
        ({"files": {"file": ("a.csv", b"x")}, "data": {"surplus": "1"}}, 422),
        ({"files": [("file", ("a.csv", b"x")), ("file", ("b.csv", b"x"))]}, 400),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 422),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"json": {"examples": ROWS}}, 422),
        ({"json": {"name": "x", "examples": []}}, 422),
        ({"json": {"name": "x", "examples": [{"input": "a"}]}}, 422),
        ({"content": b'{"name": "\\ud800", "examples": []}', "headers": {"content-type": "application/json"}}, 422),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 422),
    ],
)
def test_a_malformed_upload_is_a_problem(tasks, body, status):
    refused = httpx2.post(tasks, **body)
    assert refused.status_code == status, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    assert "\n" not in refused.json()["detail"]


def test_a_file_that_unpacks_to_gigabytes_is_refused(tasks):
    bomb = gzip.compress(b"input,answer\n" + b"0" * (200 << 20))
    assert len(bomb) < 1 << 20
    refused = httpx2.post(tasks, files={"file": ("bomb.csv.gz", bomb)}, timeout=60)
    assert (refused.status_code, refused.json()["type"]) == (413, "urn:manyicl:body-too-large")
    table = pa.table({"input": ["0" * (1 << 20)] * 200, "answer": ["a"] * 200})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    refused = httpx2.post(tasks, files={"file": ("bomb.parquet", sink.getvalue())}, timeout=60)
    assert refused.status_code == 413


def test_a_text_that_a_parquet_file_has_once_for_many_rows_counts_for_each(tasks):
    """700 bytes said that they were 300,000, and became 6 GB in the server."""
    table = pa.table({"input": ["0" * 300_000] * 1000, "answer": ["a"] * 1000})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    groups = pq.ParquetFile(sink).metadata
    assert (len(sink.getvalue()) < 1000, groups.row_group(0).total_byte_size < 1 << 20) == (True, True)
    refused = httpx2.post(tasks, files={"file": ("bomb.parquet", sink.getvalue())}, timeout=60)
    assert (refused.status_code, refused.json()["type"]) == (413, "urn:manyicl:body-too-large")


@pytest.mark.parametrize(
    "path", ["/v1/tasks/%00", "/v1/tasks/%2e%2e", "/v1/tasks/a%2Fb", "/v1/tasks/%ff", "/v1/tasks/" + "x" * 5000]
)
def test_a_hostile_path_finds_nothing(url, path):
    found = httpx2.get(url + path)
    assert found.status_code in (404, 422)
    assert found.headers["content-type"] == "application/problem+json"


def test_uploads_leave_nothing_behind(tasks):
    httpx2.post(tasks, files={"file": ("pets.csv", UPLOADS["pets.csv"])})
    httpx2.post(tasks, files={"file": ("pets.csv", b"broken")})
    assert not list(Path(tempfile.gettempdir()).glob("manyicl-upload-*"))
