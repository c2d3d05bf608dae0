"""A sweep asked from a server: a real `transformers serve`, and a small one of our own that can fail on purpose."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from manyicl import inference
from manyicl.cli.options import in_flags
from manyicl.distributed import Ranks
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import query_ids
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.points import read_predictions
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.evaluation.unfinished import AnswerLog, answer_log_path
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.endpoint import KEY_VARIABLE, Endpoint, EndpointSettings, base_url, text_of_ids
from manyicl.inference.model import InferenceModel, load_for_inference, tokenize_for
from manyicl.models import EMPTY_PREFIX
from manyicl.models.loading import ModelNote
from manyicl.models.saving import save_model
from manyicl.tasks.task import load_tasks
from tests.cli.test_app import run_manyicl
from tests.conftest import SHARED, make_task, needs_shared, tiny_model, train_tokenizer
from tests.episodes.test_template import CHATML, chat_tokenizer
from tests.support.answers import answer_prompts
from tests.support.forked import forked
from tests.trajectory.setting import ROOT

SWEEP = {"shots": (0, 2, 5), "draws": 2, "queries": 4}


def open_task():
    """Return a task whose answers are generated; its prompts are the same in ids and as text for every tokenizer."""
    return replace(make_task("open"), family="qa", metric="exact_match", instruction="", labels=(), sha256="open")


def write_open_task(folder: Path) -> Path:
    """Write the train and test rows of the open task into a new folder, and return it."""
    folder.mkdir()
    rows = [
        {"input": e.input, "answer": e.answer, "split": split}
        for split in ("train", "test")
        for e in getattr(open_task(), split)
    ]
    (folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "open.task.json").write_text(json.dumps({"family": "qa"}))
    return folder


def plain_model(tokenizer):
    """Return a model whose greedy answers hold no special token, and sometimes end by themselves."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # a server leaves special tokens out of its text
        model.lm_head.weight[tokenizer("\n")["input_ids"][-1]] *= 2
    return model


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> InferenceModel:
    """A saved checkpoint, loaded: the local engine that servers are compared with."""
    folder = tmp_path_factory.mktemp("endpoint") / "model"
    tokenizer = train_tokenizer("bpe")
    # A byte-level tokenizer splits '\n\nInput' between the line breaks, but a single one stays itself.
    note = ModelNote(template=TemplateSettings(terminator="\n"))
    save_model(plain_model(tokenizer), tokenizer, folder, note=note)
    return load_for_inference(str(folder), precision="fp32")


# A real server -----------------------------------------------------------------------------------------------------


@contextmanager
def transformers_serve(model: str) -> Iterator[str]:
    """Run `transformers serve` on a free port of this machine; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = ["-m", "transformers.cli.transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"
    with forked([*script, "--device", "cpu", "--dtype", "float32"], environment) as server:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except OSError:
                assert server.is_alive(), "transformers serve ended by itself"
                time.sleep(0.1)
        yield url


@pytest.mark.slow
def test_transformers_serve_answers_as_the_engine_does(asked, tmp_path):
    task = open_task()
    local = evaluate(asked, [task], **SWEEP)
    with transformers_serve(asked.path) as url:
        settings = EndpointSettings(url, model=asked.path, concurrency=2)
        remote = evaluate(asked, [task], endpoint=settings, out=tmp_path / "r.json", **SWEEP)
    (one,), (other,) = local.curves, remote.curves
    assert len(one.predictions) == 4 + 2 * 4 + 2 * 4
    order = [(p.draw, p.shots, p.query) for p in one.predictions]
    assert [(p.draw, p.shots, p.query) for p in other.predictions] == order
    assert [p.prediction for p in other.predictions] == [p.prediction for p in one.predictions]
    assert len({p.prediction for p in one.predictions}) > 5
    assert [(c.score, c.num_cut) for c in other.points] == [(c.score, c.num_cut) for c in one.points]
    assert 0 < sum(c.num_cut for c in other.points) < len(order)
    assert {c.nll for c in other.points} == {None}
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["engine"] == "endpoint"
    assert content["endpoint"] == {"url": f"{url}/v1", "model": asked.path, "prompts": "text"}


@pytest.mark.slow
@needs_shared
@pytest.mark.real_data
def test_transformers_serve_answers_as_the_engine_does_on_a_real_checkpoint():
    model = str(SHARED / "models" / "stories260K")
    tasks = load_tasks(SHARED / "data" / "tasks", names=["webquestions", "mawps"])
    asked = load_for_inference(model, precision="fp32")
    options = {"shots": (0, 2), "draws": 2, "queries": 3}
    local = evaluate(asked, tasks, **options)
    with transformers_serve(model) as url:
        remote = evaluate(asked, tasks, endpoint=EndpointSettings(url, model=model), **options)
    for one, other in zip(local.curves, remote.curves, strict=True):
        assert len(other.predictions) == len(one.predictions) == 3 + 2 * 3
        # This checkpoint's generation_config.json says that <s> ends a text, and the server stops there.
        ends = [p.prediction.partition("<s>")[0] for p in one.predictions]
        assert [p.prediction for p in other.predictions] == ends
        assert len(set(ends)) > 3


# A server that fails on purpose, on a socket, with a real model behind it ---------------------------------------------


class ModelServer:
    """Answers /v1/completions with a model on this machine, in ids or text; `faults` come before the good answers.

    faults: each a (status, body) in place of an answer, taken in turn. refused: ids of prompts that always get a 500.
    num_not_ready: probes that get a 503, first. num_left: good answers, probes included, before everything is refused;
    negative: no end. num_held: requests that are taken and never answered, first.
    """

    def __init__(
        self, asked: InferenceModel, *, takes_ids: bool = True, window: int = 512, key: str | None = None
    ) -> None:
        self.asked, self.takes_ids, self.window, self.key = asked, takes_ids, window, key
        self.faults: list[tuple[int, str]] = []
        self.refused: set[tuple[int, ...]] = set()
        self.prompts: list[tuple[int, ...]] = []
        self.under_way = self.most_under_way = self.extra_tokens = 0
        self.num_left, self.num_not_ready, self.num_held = -1, 0, 0
        self.ended = threading.Event()
        self.takes_extra_fields, self.extra_fields = True, set[str]()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                if server.num_held:
                    server.num_held -= 1
                    server.ended.wait()
                    return
                status, body = server.answer(json.loads(content), self)
                self.send(status, body)

            def do_GET(self) -> None:
                self.send(200, json.dumps({"data": [{"id": "tiny"}]}))

            def send(self, status: int, body: str) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, body: dict, handler: BaseHTTPRequestHandler) -> tuple[int, str]:
        """Return status and content for one request."""
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            try:
                return self.answer_alone(body, handler)
            finally:
                self.under_way -= 1

    def answer_alone(self, body: dict, handler: BaseHTTPRequestHandler) -> tuple[int, str]:
        if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            return 401, json.dumps({"error": {"message": "wrong key"}})
        if body["model"] != "tiny":
            return 404, json.dumps({"error": {"message": "no such model"}})
        if isinstance(body["prompt"], list) and not self.takes_ids:
            return 400, json.dumps({"detail": "prompt must be a string."})
        prompt = body["prompt"]
        ids = self.asked.tokenizer.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if len(ids) + body["max_tokens"] > self.window:
            return 400, json.dumps({"error": {"message": f"maximum context length is {self.window} tokens"}})
        is_probe = body["max_tokens"] == 1
        if not is_probe:
            self.prompts.append(tuple(ids))
        if is_probe and self.num_not_ready:
            self.num_not_ready -= 1
            return 503, "loading"
        if not is_probe and self.faults:
            return self.faults.pop(0)
        if tuple(ids) in self.refused:
            return 500, "broken"
        if len(body["stop"]) > 4:
            return 400, json.dumps({"error": {"message": "stop: List should have at most 4 items"}})
        assert is_probe or (body["temperature"], body["stop"][0]) == (0, self.asked.tokenizer.end_text)
        extra = sorted({"skip_special_tokens", "stop_token_ids"} & set(body))
        if extra and not self.takes_extra_fields:
            return 422, json.dumps({"detail": f"Unexpected fields in the request: {extra}"})
        self.extra_fields |= set(extra)
        self.num_left -= 1
        if not self.num_left:
            self.faults = [(403, "no more")] * 100
        limit = body["max_tokens"]
        (told,) = answer_prompts(
            self.asked.model, self.asked.tokenizer, [np.asarray(ids, dtype=np.int32)], max_new_tokens=limit
        )
        choice = {"text": told.text, "finish_reason": "length" if told.cut else "stop"}
        usage = {"prompt_tokens": len(ids) + self.extra_tokens}
        return 200, json.dumps({"choices": [choice], "usage": usage})

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()


def ask(server: ModelServer, asked: InferenceModel, *, out: Path | None = None, attempts: int = 4):
    """Evaluate the open task at a server, with short waits."""
    settings = EndpointSettings(server.url, model="tiny", concurrency=3, num_attempts=attempts, first_wait_s=0.001)
    return evaluate(asked, [open_task()], endpoint=settings, out=out, **SWEEP)


@pytest.mark.slow
@pytest.mark.parametrize("takes_ids", [True, False])
def test_ids_or_text_the_answers_are_the_engines(asked, takes_ids):
    with ModelServer(asked, takes_ids=takes_ids) as server:
        remote = ask(server, asked)
    assert remote.endpoint["prompts"] == ("ids" if takes_ids else "text")
    local = evaluate(asked, [open_task()], **SWEEP)
    assert [p.prediction for p in remote.curves[0].predictions] == [p.prediction for p in local.curves[0].predictions]


@pytest.mark.slow
@pytest.mark.parametrize("takes_extra_fields", [True, False])
def test_b4_end_tokens_are_sent_in_chat_style_to_servers_that_take_them(asked, takes_extra_fields):
    tokenizer = chat_tokenizer(train_tokenizer("bpe"), CHATML)
    model = plain_model(tokenizer)
    chat = replace(asked, model=model, tokenizer=TaskTokenizer(tokenizer, TemplateSettings(style="chat")))
    with ModelServer(chat) as server:
        server.takes_extra_fields = takes_extra_fields
        remote = ask(server, chat)
    assert server.extra_fields == ({"skip_special_tokens", "stop_token_ids"} if takes_extra_fields else set())
    local = evaluate(chat, [open_task()], **SWEEP)
    assert [p.prediction for p in remote.curves[0].predictions] == [p.prediction for p in local.curves[0].predictions]


def test_known_answers_are_generated_and_count_where_they_are_written_exactly(asked):
    task = make_task("animals")
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny")
        remote = evaluate(asked, [task], endpoint=settings, shots=(2,), draws=1, queries=6)
    plan = TaskSweep(tokenize_for(task, asked), tokenizer=asked.tokenizer, sweep=Sweep((2,), 1, 6, max_tokens=512))
    longest = max(len(ids) for ids in asked.tokenizer.encode_answers(task.labels))
    questions = [np.asarray(ids, dtype=np.int32) for ids in server.prompts]
    local = answer_prompts(asked.model, asked.tokenizer, questions, max_new_tokens=longest)
    assert len(questions) == len(plan.queries) == 6
    assert sorted(p.prediction for p in remote.curves[0].predictions) == sorted(g.text for g in local)
    assert [p.score for p in remote.curves[0].predictions] == [
        float(p.prediction.strip() == p.answer) for p in remote.curves[0].predictions
    ]


@pytest.mark.slow
def test_what_is_sent_is_what_the_engine_would_feed(asked):
    with ModelServer(asked) as server:
        ask(server, asked)
        sweep = Sweep(SWEEP["shots"], SWEEP["draws"], SWEEP["queries"], max_tokens=asked.max_tokens)
        plan = TaskSweep(tokenize_for(open_task(), asked), tokenizer=asked.tokenizer, sweep=sweep)
    before = plan.prefix_ids(1, start=0, stop=5)
    shared = (*plan.tokenized.head_ids.tolist(), *before.tolist())
    ids = [query_ids(plan.tokenized, split="test", index=q, after_shots=True).tolist() for q in plan.queries.tolist()]
    # Point after point, each one's first query alone before the others, so that the shots are in the server's cache.
    assert set(server.prompts[-4:]) == {(*shared, *query) for query in ids}
    assert server.prompts[-4] == (*shared, *ids[0])


@pytest.mark.slow
def test_what_may_pass_is_asked_again(asked):
    with ModelServer(asked) as server:
        server.faults = [(429, "slow down"), (500, ""), (200, "garbage"), (200, '{"choices": []}'), (503, "")]
        remote = ask(server, asked, attempts=8)
        assert len(server.prompts) == 20 + 5
    assert remote.complete
    assert [p.prediction for p in remote.curves[0].predictions] == [
        p.prediction for p in evaluate(asked, [open_task()], **SWEEP).curves[0].predictions
    ]


@pytest.mark.slow
def test_a_query_without_an_answer_makes_its_cell_incomplete_and_is_all_that_is_asked_again(asked, tmp_path):
    out = tmp_path / "r.json"
    with ModelServer(asked) as server:
        whole = ask(server, asked)
        server.refused = {server.prompts[5]}  # the second query behind two shots of the first draw
        server.prompts.clear()
        first = ask(server, asked, out=out)
        assert not first.complete
        zero, two, five = first.curves[0].points
        assert (two.score, two.low, two.nll, two.num_scored) == (None, None, None, 7)
        assert two.unanswered == {"status 500": 1}
        assert zero.score is not None
        assert five.score is not None
        assert json.loads(out.read_text())["tasks"][0]["curve"][1]["unanswered"] == {"status 500": 1}
        assert len(server.prompts) == 19 + 4
        (missing,), server.refused = server.refused, set()
        server.prompts.clear()
        assert ask(server, asked, out=out) == whole
        assert server.prompts == [missing]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.predictions.parquet"]
    assert {p.nll for p in read_predictions(tmp_path / "r.predictions.parquet")} == {None}


@pytest.mark.slow
def test_a_run_that_ends_early_keeps_its_answers_and_goes_on(asked, tmp_path):
    out = tmp_path / "r.json"
    with ModelServer(asked) as server:
        whole = ask(server, asked)
        server.prompts.clear()
        server.num_left = 9  # two of them are probes
        with pytest.raises(
            UserError, match=r"403: no more.*answers are kept in .*r\.answers\.jsonl; repeat the evaluation"
        ):
            ask(server, asked, out=out)
        kept = answer_log_path(out).read_bytes()
        num_kept = kept.count(b"\n")
        assert num_kept == 9 - 2
        # A kill within a write leaves a part of a line.
        answer_log_path(out).write_bytes(kept + b'{"key": "0123", "te')
        server.prompts.clear()
        server.faults = []
        assert ask(server, asked, out=out) == whole
        assert len(server.prompts) == 20 - num_kept


def test_only_a_torn_last_line_is_forgiven(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('nonsense\n{"key": "k", "text": "t", "cut": false}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 1: is not a kept answer; remove the file"):
        AnswerLog(path)
    path.write_text('{"mine": "a whole line, which no killed run leaves"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 1: is not a kept answer; remove the file"):
        AnswerLog(path)
    assert "mine" in path.read_text()
    path.write_text('{"key": "k", "text": "t\\n\\u2028", "cut": false}\n{"key": "l"')
    log = AnswerLog(path)
    assert {key: answer.text for key, answer in log.items()} == {"k": "t\n\u2028"}
    log.close()
    assert path.read_text().count("\n") == 1


def test_what_a_server_cannot_do_is_refused_before_it_is_reached(asked):
    settings = EndpointSettings("http://localhost:1", model="tiny")
    with pytest.raises(UserError, match="normalize=tokens: a server reports no likelihoods"):
        evaluate(asked, [open_task()], endpoint=settings, answering=AnswerSettings(normalize="tokens"))
    with pytest.raises(UserError, match="`endpoint`: 2 processes; let one process ask"):
        evaluate(asked, [open_task()], endpoint=settings, ranks=Ranks(number=0, count=2))


@pytest.mark.slow
def test_orders_of_the_same_shots_can_be_asked_of_a_server_too(asked):
    options = {**SWEEP, "fixed_shots": 5}
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny")
        remote = evaluate(asked, [open_task()], endpoint=settings, **options)
    local = evaluate(asked, [open_task()], **options)
    assert [p.prediction for p in remote.curves[0].predictions] == [p.prediction for p in local.curves[0].predictions]
    assert (remote.fixed_shots, remote.complete) == (5, True)


@pytest.mark.slow
def test_progress_counts_each_answer_of_a_server(asked, tmp_path):
    """As answers come: the first of a point alone, then the others."""
    seen = []
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny")
        evaluate(asked, [open_task()], endpoint=settings, on_progress=lambda *line: seen.append(line), **SWEEP)
    assert [done for _, done, _ in seen] == list(range(1, 21))
    assert {total for *_, total in seen} == {20}
    assert [what for what, *_ in seen][3:5] == ["open, 0 shots", "open, 2 shots"]


def test_a_server_that_fails_every_query_is_given_up(asked):
    with ModelServer(asked) as server:
        server.faults = [(500, "")] * 1000
        with pytest.raises(
            UserError, match=r"20 queries in a row got no answer \(status 500\); look at the server's log"
        ):
            ask(server, asked, attempts=1)


@pytest.mark.parametrize("faults", [[(403, "no more")], [(500, "")] * 20], ids=["refused", "given up"])
def test_an_engine_that_gave_up_tries_again_when_it_is_asked_again(asked, faults):
    """A service keeps its engine: after one refusal each fault was final there, however short."""
    query = np.asarray(asked.tokenizer.encode_texts(["red"])[0], dtype=np.int32)
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny", concurrency=1, num_attempts=1, first_wait_s=0.001)
        with Endpoint(settings, asked.tokenizer) as engine:
            server.faults = list(faults)
            with pytest.raises(UserError):
                engine.generate(EMPTY_PREFIX, [query] * 20, limits=[4] * 20)
            engine.settings = replace(settings, num_attempts=2)
            server.faults = [(500, "for a moment")]
            [answer] = engine.generate(EMPTY_PREFIX, [query], limits=[4])
    assert (answer.fault, server.faults) == ("", [])


@pytest.mark.slow
def test_queries_go_together_but_never_more_than_asked_for(asked):
    with ModelServer(asked) as server:
        server.lock = threading.BoundedSemaphore(8)  # let requests overlap, so that they can be counted
        ask(server, asked)
    assert 1 <= server.most_under_way <= 3


def test_a_prompt_that_no_text_gives_back_is_never_sent(asked):
    tokenizer = TaskTokenizer(train_tokenizer("bpe"), TemplateSettings())
    ids = [*tokenizer.bos_ids, *tokenizer.encode_texts(["the end.\n\n"])[0], *tokenizer.encode_texts(["Input"])[0]]
    assert tokenizer.tokenizer(tokenizer.decode(ids))["input_ids"] != ids
    assert text_of_ids(tokenizer, ids) is None
    assert text_of_ids(tokenizer, tokenizer.tokenizer("<s>the fox")["input_ids"]) == "<s>the fox"
    with ModelServer(replace(asked, tokenizer=tokenizer), takes_ids=False) as server:
        other = replace(asked, tokenizer=tokenizer)
        settings = EndpointSettings(server.url, model="tiny")
        result = evaluate(other, [make_task("animals")], endpoint=settings, shots=(2,), draws=1, queries=3)
    (cell,) = result.curves[0].points
    assert (cell.score, cell.num_scored) == (None, 0)
    assert cell.unanswered == {
        "written as text it has other ids, and this server takes no ids as vLLM and SGLang do": 3
    }
    assert server.prompts == []


@pytest.mark.slow
def test_the_key_comes_from_the_environment_and_goes_nowhere_else(asked, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    with ModelServer(asked, key="secret-17") as server:
        with pytest.raises(UserError, match=rf"refuses \(401: wrong key\); put the key into {KEY_VARIABLE}"):
            ask(server, asked, out=out)
        monkeypatch.setenv(KEY_VARIABLE, "secret-17")
        assert ask(server, asked, out=out).complete
        monkeypatch.setenv(KEY_VARIABLE, "secret-18")
        with pytest.raises(UserError, match="put another key into") as refused:
            ask(server, asked)
    assert "secret" not in str(refused.value)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("localhost:8000", "is not a URL; write it as http://host:8000"),
        ("http://host:80a0", "is not a URL; write it as http://host:8000"),
        ("http://[::1", "is not a URL"),
        ("http://a..b:8000", "is not a URL"),
        (f"http://{'a' * 80}.com", "is not a URL"),
        ("http://me:secret@host:8000", f"carries a key or a query.*{KEY_VARIABLE}"),
        ("http://host:8000/v1?key=secret", "carries a key or a query"),
    ],
)
def test_a_wrong_url_is_refused_and_no_key_is_repeated(url, told):
    with pytest.raises(UserError, match=told) as refused:
        base_url(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("key", ["secret-17\r\nX: y", "secret-17\u2019"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(asked, monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UserError, match=f"^{KEY_VARIABLE}: has a line break or .*; copy the key anew$"):
        Endpoint(EndpointSettings("http://localhost:1", model="tiny"), asked.tokenizer)


def test_a_line_end_after_the_key_does_not_count(asked, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-17\n")
    with (
        ModelServer(asked, key="secret-17") as server,
        Endpoint(EndpointSettings(server.url, model="tiny"), asked.tokenizer),
    ):
        pass


@pytest.mark.parametrize("setting", ["concurrency", "num_attempts"])
def test_a_server_needs_at_least_one_query_and_one_attempt(setting):
    with pytest.raises(UserError, match=f"^{setting}=0: needs at least 1$"):
        EndpointSettings("http://localhost:1", model="tiny", **{setting: 0})


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_a_url_may_end_where_people_copy_it(end):
    assert base_url(f"https://host:8000/models{end}") == "https://host:8000/models/v1"


def test_what_no_attempt_will_change_is_one_line_with_the_fix(asked):
    with ModelServer(asked, window=40) as server:
        with pytest.raises(
            UserError, match=r"too long for it .maximum context length is 40 tokens.; lower `max_tokens`"
        ):
            ask(server, asked)
        settings = EndpointSettings(server.url, model="other", num_attempts=1)
        with pytest.raises(UserError, match=r"knows no model 'other'.*it serves tiny: choose with `endpoint.model`"):
            Endpoint(settings, asked.tokenizer).__enter__()
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\); start it, or correct the URL"):
        Endpoint(replace(settings, url=server.url), asked.tokenizer).__enter__()


@pytest.mark.slow
def test_a_server_with_a_smaller_context_is_told_with_what_to_lower_and_answers_are_kept_trial_88(
    asked, tmp_path, capfd
):
    tasks = write_open_task(tmp_path / "tasks")
    options = ("--tasks", tasks, "--shots", "0,2,8", "--draws", 1, "--queries", 4, "--max-new-tokens", 8)
    command = ("eval", asked.path, *options, "--out", tmp_path / "r.json", "--endpoint-model", "tiny")
    with ModelServer(asked, window=100) as server:
        code, _, err = run_manyicl(capfd, *command, "--endpoint", server.url)
        first = len(server.prompts)
        server.window = 512  # started again, with a longer one
        again, printed, _ = run_manyicl(capfd, *command, "--endpoint", server.url)
    assert (code, again, "open" in printed) == (2, 0, True)
    told = err.splitlines()[-1]
    assert "a query is too long for it (maximum context length is 100 tokens); lower --max-tokens, --shots or" in told
    found = re.search(r"; (\d+) answers are kept in ", told)
    kept = int(found[1]) if found else 0
    assert 0 < kept < 12
    assert len(server.prompts) - first == 12 - kept


def test_a_server_that_is_not_there_is_told_at_once_trial_86(asked, caplog):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"  # bound, but nobody listens
        with pytest.raises(UserError, match=r"cannot be reached \(.*\); start it, or correct the URL"):
            Endpoint(EndpointSettings(url, model="tiny"), asked.tokenizer).__enter__()
    assert not [record for record in caplog.records if "waiting for it" in record.getMessage()]


def test_a_server_that_is_not_ready_yet_is_waited_for_and_that_is_told(asked, caplog):
    with ModelServer(asked) as server:
        server.num_not_ready = 2
        with Endpoint(EndpointSettings(server.url, model="tiny", first_wait_s=0.001), asked.tokenizer):
            pass
        told = [record.getMessage() for record in caplog.records if record.name == "manyicl"]
        assert told == [f"endpoint {server.url}: waiting for it (status 503)"]


def test_the_install_command_names_what_the_extra_holds_trial_87():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["endpoint"]
    assert [re.split("[<>=]", requirement)[0] for requirement in extra] == ["httpx2", "tenacity"]


def test_another_tokenizer_is_noticed_by_its_count(asked):
    with ModelServer(asked, takes_ids=False) as server:
        server.extra_tokens = 1
        with pytest.raises(UserError, match=r"prompt tokens, but .* were sent: its tokenizer is another one"):
            ask(server, asked)


def test_ids_are_not_sent_to_a_server_with_another_tokenizer(asked):
    """It would answer them as the other words that they are there, and the number of ids is right."""
    other = TaskTokenizer(train_tokenizer("unigram"), TemplateSettings(terminator="\n"))
    with ModelServer(asked) as server:
        settings = EndpointSettings(server.url, model="tiny")
        with pytest.raises(UserError, match=r"counts 90 tokens in a trial text, and the tokenizer of MODEL 66: its"):
            Endpoint(settings, other).__enter__()
        assert server.prompts == []


def test_more_stop_texts_than_a_server_takes_end_an_answer_all_the_same(asked):
    answering = AnswerSettings(stop=("q", "x", "z", "e", "o"), max_new_tokens=8)
    options = {"shots": (2,), "draws": 1, "queries": 6, "answering": answering}
    with ModelServer(asked) as server:
        remote = evaluate(asked, [open_task()], endpoint=EndpointSettings(server.url, model="tiny"), **options)
    given = [p.prediction for p in remote.curves[0].predictions]
    assert given == [p.prediction for p in evaluate(asked, [open_task()], **options).curves[0].predictions]
    assert not any(stop in text for text in given for stop in answering.stop)


@pytest.mark.parametrize(
    ("words", "told"),
    [  # vLLM 0.32's
        (
            "temperature must be in [0, 2], got 5.0. (parameter=temperature, value=5.0)",
            "refuses (400: temperature must be in [0, 2], got 5.0. (parameter = temperature, value = 5.0)); change the"
            " setting that it refuses",
        ),
        (
            "max_tokens=600 cannot be greater than max_model_len=512.",
            "a query is too long for it (max_tokens = 600 cannot be greater than max_model_len = 512.); lower"
            " --max-tokens, --shots or --max-new-tokens, or start it with a longer window",
        ),
        ("`shots` is unknown", "refuses (400: 'shots' is unknown); change the setting that it refuses"),
    ],
)
def test_a_setting_that_a_server_refuses_is_told_in_its_own_words(asked, words, told):
    with ModelServer(asked) as server:
        server.faults = [(400, json.dumps({"error": {"message": words}}))]
        with pytest.raises(UserError) as refused:
            ask(server, asked)
    assert in_flags(str(refused.value)) == f"--endpoint {server.url}: {told}"


@pytest.mark.slow
def test_the_command_line_asks_a_server(asked, tmp_path, capfd):
    tasks = write_open_task(tmp_path / "tasks")
    options = ["--tasks", tasks, "--shots", "0,2", "--draws", "1", "--queries", "3", "--out", tmp_path / "r.json"]
    with ModelServer(asked) as server:
        here = ["--endpoint", server.url, "--endpoint-model", "tiny", "--concurrency", "2"]
        code, out, _ = run_manyicl(capfd, "eval", asked.path, *options, *here)
        assert code == 0
        assert "generated by an endpoint (no likelihoods)" in out
        code, _, err = run_manyicl(capfd, "eval", asked.path, *options, *here, "--precision", "fp32")
        assert (code, err) == (2, "error: --precision fp32: the server decides it, with --endpoint; leave it out\n")
        code, _, err = run_manyicl(capfd, "eval", asked.path, *options, *here, "--compile")
        assert (code, err) == (2, "error: --compile: the server decides it, with --endpoint; leave it out\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tenacity", None)
        patch.delitem(sys.modules, "manyicl.inference.endpoint")
        patch.delitem(vars(inference), "EndpointSettings")  # the package keeps what was imported once
        code, _, err = run_manyicl(capfd, "eval", asked.path, *options, "--endpoint", "http://localhost:1")
        assert (code, err) == (2, "error: --endpoint: tenacity is not installed; pip install httpx2 tenacity\n")
    code, _, err = run_manyicl(capfd, "eval", asked.path, *options, *here, "--normalize", "bytes")
    assert (code, err) == (2, "error: --normalize bytes: a server reports no likelihoods to choose by; leave it out\n")
    code, _, err = run_manyicl(capfd, "eval", asked.path, *options, "--endpoint-model", "tiny")
    assert (code, err) == (2, "error: --endpoint-model: needs --endpoint; leave it out\n")
    code, _, err = run_manyicl(capfd, "eval", asked.path, *options, "--concurrency", "2")
    assert (code, err) == (2, "error: --concurrency: needs --endpoint; leave it out\n")
