"""OpenAI's routes, called by OpenAI's own client: calls, streams, models, errors."""

from __future__ import annotations

import asyncio
import threading

import httpx2
import openai
import pytest

from manyicl.inference import AnswerSettings
from manyicl.server import ServerSettings, make_token
from manyicl.server.routes.completion_bodies import Answered, Shape
from manyicl.service import Closing, DeadlinePassed, InputTooLong, QueueFull, ServiceSettings
from tests.support.serving import app_in_thread
from tests.support.slow_service import SlowService, wait_until

ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def service():
    return SlowService()


@pytest.fixture(scope="module")
def url(service):
    with app_in_thread(service) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def refusing(service):
    def refuse(error):
        service.refusal = error

    yield refuse
    service.refusal = None
    service.failure = None


def test_models_are_the_base_and_its_tasks(client):
    assert [model.id for model in client.models.list()] == ["base", "base:slow"]
    assert client.models.retrieve("base:slow").owned_by == "manyicl"
    with pytest.raises(openai.NotFoundError, match="there is no such task"):
        client.models.retrieve("base:other")
    with pytest.raises(openai.NotFoundError, match="/v1/models lists what is"):
        client.models.retrieve("gpt-4")


def test_what_this_server_does_not_have_is_not_found_in_words(client, url):
    with pytest.raises(openai.NotFoundError, match="there is nothing at this path; /docs lists what there is"):
        client.responses.create(model="base:slow", input="hello")
    with pytest.raises(openai.NotFoundError, match="there is nothing at this path"):
        client.embeddings.create(model="base:slow", input="hello")
    for path in ("nothing", "%00", "a" * 300):
        assert httpx2.post(f"{url}/{path}").status_code == 404
    assert httpx2.post(f"{url}/v1/tasks/slow/curve").status_code == 405  # has another method
    assert httpx2.post(f"{url}/page.js").status_code == 405


def test_json_that_is_not_sent_as_json_is_refused_with_the_fix(url):
    for path, read in (
        ("tasks/slow/predict", lambda body: body["detail"]),
        ("completions", lambda b: b["error"]["message"]),
    ):
        form = {"content-type": "application/x-www-form-urlencoded"}  # as curl -d sends it
        refused = httpx2.post(f"{url}/v1/{path}", content=b'{"input": "x"}', headers=form)
        assert refused.status_code == 415
        assert read(refused.json()) == "the body is not sent as JSON; send it as application/json (curl --json)"


def test_a_chat_with_a_task(client):
    answer = client.chat.completions.create(model="base:slow", messages=ASKED)
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 3, 8)
    assert answer.model_extra["manyicl"][0]["shots"] == [1, 2]


def test_the_parts_of_a_message_are_its_text(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(model="base:slow", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "one two three"


def test_several_prompts_have_a_choice_each(client):
    answer = client.completions.create(model="base:slow", prompt=["a", "b"])
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "one two three"), (1, "one two three")]
    assert answer.usage.prompt_tokens == 10


def test_the_base_alone_completes_a_prompt_and_continues_a_chat(client):
    completed = client.completions.create(model="base", prompt="once", max_tokens=5, stop=["\n"])
    assert (completed.choices[0].text, completed.choices[0].finish_reason) == ("one two three", "length")
    chatted = client.chat.completions.create(model="base", messages=[{"role": "system", "content": "s"}, *ASKED])
    assert chatted.choices[0].message.content == "one two three"


def test_a_streamed_chat(client):
    chunks = list(client.chat.completions.create(model="base:slow", messages=ASKED, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]


def test_a_stream_ends_with_its_usage_if_that_is_wanted(client):
    options = {"include_usage": True}
    chunks = list(client.completions.create(model="base:slow", prompt="a", stream=True, stream_options=options))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "one two three"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 8)


def test_the_client_streams_with_its_own_helper(client):
    with client.chat.completions.stream(model="base:slow", messages=ASKED) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "one two three"


def test_the_asynchronous_client(url):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            calls = [client.chat.completions.create(model="base:slow", messages=ASKED) for _ in range(10)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == ["one two three"] * 10


@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [
        (QueueFull("busy", retry_after_s=1), openai.RateLimitError, "queue_full"),
        (Closing("closing"), openai.InternalServerError, "closing"),
        (InputTooLong("long"), openai.BadRequestError, "context_length_exceeded"),
        (DeadlinePassed("late"), openai.InternalServerError, "deadline_passed"),
        (RuntimeError("bug"), openai.InternalServerError, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_classes(client, refusing, error, raised, code, stream):
    refusing(error)
    with pytest.raises(raised) as caught:
        client.chat.completions.create(model="base:slow", messages=ASKED, stream=stream)
    assert caught.value.code == code
    assert caught.value.request_id


def test_an_error_during_a_stream_is_raised_by_the_client(client, service, refusing):
    service.failure = DeadlinePassed("too late")
    with pytest.raises(openai.APIError, match="too late"):
        list(client.chat.completions.create(model="base:slow", messages=ASKED, stream=True))


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"n": 2}, "n"),  # all would be alike: it is greedy
        ({"n": 0}, "n"),
        ({"n": 129, "temperature": 1}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 99}, "top_logprobs"),
        ({"extra_body": {"shots": {"policy": "x"}}}, "shots.policy"),
        ({"extra_body": {"chat_template_kwargs": ["enable_thinking"]}}, "chat_template_kwargs"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, wanted, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base:slow", messages=ASKED, **wanted)
    assert caught.value.param == param


class BusyService(SlowService):
    """Its library is busy, as while it waits for another server's write."""

    def __init__(self):
        super().__init__()
        self.asked_library, self.is_free = threading.Event(), threading.Event()

    def task(self, name):
        self.asked_library.set()
        assert self.is_free.wait(60)
        return super().task(name)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_busy_library_does_not_hold_up_other_requests(route):
    service = BusyService()
    body = (
        {"model": "base:slow", "prompt": "hello"}
        if route == "completions"
        else {"model": "base:slow", "messages": ASKED}
    )
    found = []
    with app_in_thread(service) as url:
        asking = threading.Thread(target=lambda: found.append(httpx2.post(f"{url}/v1/{route}", json=body, timeout=60)))
        asking.start()
        try:
            assert service.asked_library.wait(20)
            assert httpx2.get(f"{url}/healthz", timeout=10).status_code == 200
        finally:
            service.is_free.set()
            asking.join(timeout=60)
    assert [reply.status_code for reply in found] == [200]


def test_prompts_of_token_ids_are_refused(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base:slow", prompt=[1, 2, 3])


def test_a_task_answers_the_user_and_not_the_assistant(client):
    with pytest.raises(openai.BadRequestError, match="last one is not the user's"):
        client.chat.completions.create(model="base:slow", messages=[*ASKED, {"role": "assistant", "content": "hm"}])


def test_settings_of_sampling_are_honoured_for_generated_answers(client, service):
    wanted = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "stop": ["x"], "max_tokens": 9}
    expected = AnswerSettings(max_new_tokens=9, stop=("x",), temperature=0.7, top_p=0.9)
    for model in ("base:slow", "base"):
        raw = client.chat.completions.with_raw_response.create(model=model, messages=ASKED, **wanted)
        assert "x-manyicl-ignored" not in raw.headers
        assert (service.asked[-1]["answering"], service.asked[-1]["seed"]) == (expected, [5])
    client.chat.completions.create(model="base:slow", messages=ASKED)
    assert service.asked[-1]["answering"] == AnswerSettings()  # greedy


def test_several_choices_are_sampled_each_from_a_seed_of_its_own(client, service):
    wanted = {"n": 3, "temperature": 0.7, "seed": 5}
    for model in ("base:slow", "base"):
        answer = client.chat.completions.create(model=model, messages=ASKED, **wanted)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        seeds = service.asked[-1]["seed"]
        assert (seeds[0], len(set(seeds))) == (5, 3)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 9)  # the prompt counts once
    answer = client.completions.create(model="base:slow", prompt=["a", "b"], n=2, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 10


def test_several_choices_are_streamed_by_their_index(client):
    chunks = list(client.chat.completions.create(model="base", messages=ASKED, n=2, temperature=1, stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "one two three", 1: "one two three"}
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("length") == 2


def test_several_choices_of_a_task_whose_labels_are_scored_are_refused(client, service, monkeypatch):
    monkeypatch.setattr(service, "labels", ("one", "two"))
    with pytest.raises(openai.BadRequestError, match="labels are scored") as caught:
        client.chat.completions.create(model="base:slow", messages=ASKED, n=2, temperature=1)
    assert caught.value.param == "n"


def test_switches_of_the_chat_template_reach_the_base_alone(client, service):
    wanted = {"chat_template_kwargs": {"enable_thinking": True}}
    client.chat.completions.create(model="base", messages=ASKED, extra_body=wanted)
    assert service.asked[-1]["switches"] == {"enable_thinking": True}
    raw = client.chat.completions.with_raw_response.create(model="base:slow", messages=ASKED, extra_body=wanted)
    assert raw.headers["x-manyicl-ignored"] == "chat_template_kwargs"


def test_settings_that_change_nothing_are_named_in_a_header(client, service, monkeypatch):
    monkeypatch.setattr(service, "labels", ("one", "two"))  # which are scored
    raw = client.chat.completions.with_raw_response.create(
        model="base:slow",
        messages=[{"role": "system", "content": "s"}, *ASKED],
        temperature=0.7,
        top_p=0.9,
        stop=["x"],
        max_tokens=9,
    )
    assert raw.headers["x-manyicl-ignored"] == "temperature, top_p, stop, max_tokens, messages"
    plain = client.chat.completions.with_raw_response.create(model="base:slow", messages=ASKED, user="ada")
    assert "x-manyicl-ignored" not in plain.headers


@pytest.mark.parametrize("model", ["base", "base:slow"])
def test_what_a_generated_answer_does_not_use_is_named_in_the_header(client, service, monkeypatch, model):
    def ignored(**wanted):
        raw = client.chat.completions.with_raw_response.create(model=model, messages=ASKED, **wanted)
        return raw.headers.get("x-manyicl-ignored")

    assert ignored(top_p=0.9, seed=5, stop=["x"]) == "top_p, seed"
    assert ignored(top_p=0.9, seed=5, temperature=0) == "top_p, seed"
    assert ignored(logprobs=True, top_logprobs=2) == "logprobs, top_logprobs"
    assert ignored(logprobs=False) is None
    monkeypatch.setattr(service, "settings", ServiceSettings(answering=AnswerSettings(temperature=0.7)))
    assert ignored(top_p=0.9, seed=5) is None


def test_choices_may_be_sampled_with_the_temperature_of_the_service(client, service, monkeypatch):
    monkeypatch.setattr(service, "settings", ServiceSettings(answering=AnswerSettings(temperature=0.7)))
    assert len(client.chat.completions.create(model="base", messages=ASKED, n=2).choices) == 2
    with pytest.raises(openai.BadRequestError, match="no temperature above 0"):
        client.chat.completions.create(model="base", messages=ASKED, n=2, temperature=0)


def test_labels_that_a_model_on_a_server_generates_are_sampled(client, service, monkeypatch):
    monkeypatch.setattr(service, "labels", ("one", "two"))
    monkeypatch.setattr(service.info, "num_parameters", None)  # as of a model on a server
    raw = client.chat.completions.with_raw_response.create(model="base:slow", messages=ASKED, temperature=0.7, seed=5)
    assert "x-manyicl-ignored" not in raw.headers
    assert service.asked[-1]["answering"] == AnswerSettings(temperature=0.7)


def test_a_closed_stream_gives_its_question_up(client, service):
    service.pieces, before = ("x ",) * 1000, service.pieces
    try:
        stream = client.chat.completions.create(model="base:slow", messages=ASKED, stream=True)
        next(iter(stream))
        stream.close()
        assert wait_until(service.tickets[-1].cancelled.is_set)
    finally:
        service.pieces = before


def test_the_api_key_is_the_token(tmp_path):
    path = tmp_path / "tokens.txt"
    token = make_token(path)
    with app_in_thread(SlowService(), ServerSettings(token_file=path)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=token) as client:
            assert client.chat.completions.create(model="base:slow", messages=ASKED).choices
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_the_probabilities_of_choices_are_given_as_log_probabilities():
    answer = Answered("yes", "stop", 5, 1, probabilities={"yes": 0.75, "no": 0.25, "maybe": 0.0})
    choice = Shape("text", id="1", model="m").whole([answer], top=2)["choices"][0]["logprobs"]
    assert choice["tokens"] == ["yes"]
    assert choice["token_logprobs"] == pytest.approx([-0.2877], abs=1e-4)
    assert list(choice["top_logprobs"][0]) == ["yes", "no"]
    content = Shape("chat", id="1", model="m").whole([answer], top=3)["choices"][0]["logprobs"]["content"][0]
    assert (content["token"], content["bytes"]) == ("yes", [121, 101, 115])
    assert content["top_logprobs"][2] == {"token": "maybe", "logprob": -9999.0, "bytes": list(b"maybe")}


def test_an_answer_without_choices_has_no_log_probabilities():
    answer = Answered("free text", "stop", 5, 1)
    assert Shape("text", id="1", model="m").whole([answer], top=2)["choices"][0]["logprobs"] is None
