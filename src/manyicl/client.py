"""A client of `manyicl serve`: tasks, examples and replies over HTTP, without a model in this process."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from pydantic import TypeAdapter, ValidationError

from manyicl.errors import UserError, check_list, check_text, refuse_tables, take_number, take_whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# A request that the server refused before it took it (429, 503) is sent again, as often as this in all.
_MOST_ATTEMPTS = 8
_MOST_WAIT_S = 30.0
_PAGE = 1000
_NOT_OURS = "the server's answer is not manyicl's"
Content = TypeVar("Content")


class ServerRefusal(UserError):  # noqa: N818  # the server refuses: "ServerRefusalError" would say it twice
    """A server's refusal. The message is the server's own line.

    status: the HTTP status. kind: a few words with hyphens, such as `unknown-task`. problem: the whole body.
    """

    def __init__(self, message: str, *, status: int, kind: str, problem: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status, self.kind, self.problem = status, kind, problem


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task as the server describes it."""

    name: str
    family: str
    metric: str
    instruction: str
    labels: tuple[str, ...]
    """The fixed answers; empty if it has none."""
    version: int
    """Goes up by one with each change."""
    num_examples: int
    model: str
    """Its name for OpenAI's clients."""


@dataclass(frozen=True, slots=True)
class CorrectedTask(TaskInfo):
    """A task after the answer of an example was corrected."""

    notes: tuple[str, ...]
    """Labels that are new to the task."""
    warnings: tuple[str, ...]
    """New labels that look like others of the task, and may be slips."""


@dataclass(frozen=True, slots=True)
class Registered:
    """What became of the rows of an upload."""

    kept: int
    dropped: Mapping[str, int]
    """Reason -> number of rows."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    ids: tuple[int, ...] = ()
    """Of the examples that were appended; empty for a new task."""


@dataclass(frozen=True, slots=True)
class RemoteExample:
    """An example of a task."""

    id: int
    input: str
    answer: str


@dataclass(frozen=True, slots=True)
class RemoteReply:
    """The answer to one input."""

    input: str
    answer: str
    probabilities: Mapping[str, float] | None
    """Of each choice; None for a generated answer."""
    shots: tuple[int, ...]
    """Ids of the examples that were shown, in order."""
    cut: bool
    """Whether the answer ended at its limit of tokens."""
    timing: Mapping[str, Any]
    """Where the time went, in seconds."""
    task_version: int
    confidence: float | None = None
    """Probability of the answer, or the share of samples that gave it; else None."""
    unsure: bool = False
    """Whether the confidence is below the one that was wanted."""


@dataclass(frozen=True, slots=True)
class RemotePoint:
    """The score after so many shots, with its 95 % interval."""

    shots: int
    score: float | None
    low: float | None
    high: float | None
    num_scored: int


@dataclass(frozen=True, slots=True)
class RemoteCurve:
    """What a task's examples say about the answers to come."""

    state: Literal["waiting", "running", "done", "failed", "off"]
    fraction: float
    """How much of it is measured."""
    curve: tuple[RemotePoint, ...]
    majority: float | None
    """Score of the most frequent answer."""
    chance: float | None
    suspects: tuple[Mapping[str, Any], ...]
    """Examples that look mislabelled, the likeliest first."""
    sentence: str
    """What to expect, and whether more examples would help."""
    version: int
    """Of the task that was measured."""


class Client:
    """Talks to a server that `manyicl serve` started.

    >>> client = Client("http://127.0.0.1:8300")
    >>> client.task("banking").predict(["My card has not arrived"])  # doctest: +SKIP

    url: with or without `/v1`. token: from `manyicl token`, if the server needs one.
    timeout_s: how long one answer may take.

    Raises:
        UserError: a wrong URL or token. All methods: the server cannot be reached, or refuses (`ServerRefusal`).
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 600.0) -> None:
        check_text("url", url, "http://127.0.0.1:8300")
        if not isinstance(token, str | None):  # a secret is not shown
            raise UserError("token: is not a text; give it as `manyicl token` printed it")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise UserError("token: holds characters that no token has; give it as `manyicl token` printed it")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        timeout = httpx2.Timeout(timeout_s, connect=10.0)
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError(url)
            self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout)
        except (ValueError, httpx2.InvalidURL) as error:
            raise UserError(f"{url}: is not a URL; write it as http://127.0.0.1:8300") from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tasks(self) -> list[TaskInfo]:
        """Return what tasks there are."""
        return _read(list[TaskInfo], self.request("GET", "/v1/tasks"), "tasks")

    def task(self, name: str) -> RemoteTask:
        """Return a task by its name. Nothing is sent: a name that does not exist is noticed by the first question."""
        return RemoteTask(self, name)

    def add_task(
        self,
        examples: str | Path | Sequence[Mapping[str, Any]],
        *,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> RemoteTask:
        """Make a task and return it; its curve is measured from then on.

        examples: a file that `manyicl check` reads, or rows with `input` and `answer`.
        name: default: that of the settings, else the file's name without its suffix.
        settings: as a task.json; default: the one beside the file, `<name>.task.json`.
        replace: take the place of a task of this name.
        """
        if name is None and not isinstance(examples, str | Path):
            raise UserError("name: is missing; rows need the name of their task")
        if settings is None and isinstance(examples, str | Path):
            settings = _settings_beside(Path(examples))
        if not replace:
            method, path = "POST", "/v1/tasks"
        else:
            # As the server names a task that has no name: by its settings, else by the file.
            name = name or (settings or {}).get("name") or _stem(Path(str(examples)))
            method, path = "PUT", _path_of(name)
        content = self.request(method, path, **_upload(examples, name=None if replace else name, settings=settings))
        task = self.task(_read(TaskInfo, content, "task").name)
        task.registered = _read(Registered, content, "registration")
        return task

    def request(self, method: str, path: str, **content: Any) -> Any:
        """Send a request and return the JSON of its answer; one that the server was too busy to take is repeated.

        content: as httpx2's `request` takes it, such as `json=...`.
        """
        try:
            request = self._http.build_request(method, path, **content)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"a request cannot be sent as JSON ({error}); give whole texts, numbers and lists"
            ) from error
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            try:
                reply = self._http.send(request)
            except httpx2.TimeoutException as error:
                raise UserError(f"{self.url}: no answer in time; try again, or raise timeout_s") from error
            except httpx2.HTTPError as error:
                raise UserError(
                    f"{self.url}: cannot be reached ({error}); is `manyicl serve` running there?"
                ) from error
            if reply.status_code not in (429, 503) or attempt == _MOST_ATTEMPTS:
                break
            time.sleep(_wait_s(reply, attempt))
        if not reply.is_success:
            raise _refusal(reply)
        try:
            return reply.json() if reply.content else None
        except ValueError as error:
            raise UserError(f"{self.url}: {_NOT_OURS} (no JSON)") from error


class RemoteTask:
    """A task on a server.

    registered: what became of the rows, if this client uploaded them.
    """

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, name
        self.registered: Registered | None = None
        self._path = _path_of(name)

    def __repr__(self) -> str:
        return f"RemoteTask({self.name!r} at {self.client.url!r})"

    @property
    def info(self) -> TaskInfo:
        """The task as it is now."""
        return _read(TaskInfo, self.client.request("GET", self._path))

    def predict(
        self,
        inputs: str | Sequence[str],
        *,
        options: Sequence[str] | Sequence[Sequence[str]] | None = None,
        shots: Mapping[str, Any] | DataclassInstance | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        samples: int | None = None,
        seed: int | None = None,
        min_confidence: float | None = None,
        deadline_s: float | None = None,
    ) -> list[RemoteReply]:
        """Answer one input or several, in their order.

        options: the candidate answers of the input; of several inputs, a list for each. Default: the task's labels.
        shots: which examples are shown: a `manyicl.ShotChoice`, or a mapping with its policy, count, seed and ids.
            Default: the server's choice.
        max_new_tokens: most tokens of a generated answer. deadline_s: give up after so long.
        stop, temperature, top_p, samples, seed: how a generated answer is sampled (`manyicl.AnswerSettings`); the
            default is the server's, which is greedy.
        min_confidence: replies with less confidence are marked as unsure.
        """
        refuse_tables("inputs", inputs)
        if not isinstance(inputs, Iterable):
            raise UserError(f"inputs={str(inputs)[:50]}: give a text, or a list of texts")
        asked: dict[str, Any] = {"input": inputs} if isinstance(inputs, str) else {"inputs": list(inputs)}
        if asked.get("inputs") == []:
            return []
        given: dict[str, Any] = {
            "options": options,
            "shots": asdict(shots) if is_dataclass(shots) else shots,
            "stop": None if stop is None else list(stop),
        }
        whole = {"max_new_tokens": max_new_tokens, "samples": samples, "seed": seed}
        numbers = {
            "temperature": temperature,
            "top_p": top_p,
            "min_confidence": min_confidence,
            "deadline_s": deadline_s,
        }
        given |= {name: take_whole(name, value) for name, value in whole.items() if value is not None}
        given |= {name: take_number(name, value) for name, value in numbers.items() if value is not None}
        body = {**asked, **{name: value for name, value in given.items() if value is not None}}
        content = self.client.request("POST", f"{self._path}/predict", json=body)
        return _read(list[RemoteReply], content, "replies")

    def examples(self) -> Iterator[RemoteExample]:
        """Yield the examples in the order of their ids."""
        start = 0
        while True:
            query = {"start": start, "limit": _PAGE}
            content = self.client.request("GET", f"{self._path}/examples", params=query)
            yield from _read(list[RemoteExample], content, "examples")
            start += _PAGE
            if start >= _read(int, content, "total"):
                return

    def add_examples(self, examples: str | Path | Sequence[Mapping[str, Any]]) -> Registered:
        """Append examples: a file, or rows with `input` and `answer`."""
        content = self.client.request("POST", f"{self._path}/examples", **_upload(examples))
        return _read(Registered, content, "registration")

    def correct(self, example_id: int, answer: str) -> CorrectedTask:
        """Correct the answer of an example; a label that the task did not have is in the notes."""
        content = self.client.request("PATCH", f"{self._path}/examples/{example_id}", json={"answer": answer})
        return _read(CorrectedTask, content)

    def remove_examples(self, ids: Sequence[int]) -> TaskInfo:
        """Remove examples."""
        check_list("ids", ids, of=int)
        content = self.client.request("DELETE", f"{self._path}/examples", json={"ids": list(ids)})
        return _read(TaskInfo, content)

    def curve(self, *, wait_s: float = 0.0) -> RemoteCurve:
        """Return the measured curve. wait_s: how long to wait until it is whole; the last state is returned then."""
        deadline = time.monotonic() + wait_s
        while True:
            curve = _read(RemoteCurve, self.client.request("GET", f"{self._path}/curve"))
            left_s = deadline - time.monotonic()
            if curve.state not in ("waiting", "running") or left_s <= 0:
                return curve
            time.sleep(min(0.5, left_s))

    def remove(self) -> None:
        """Remove the task with all of its examples."""
        self.client.request("DELETE", self._path)


def _path_of(name: str) -> str:
    return f"/v1/tasks/{quote(str(name), safe='', errors='replace')}"


def _stem(path: Path) -> str:
    """Return the name of a data file without its suffix, as the server names a task."""
    return Path(path.name.removesuffix(".gz")).stem


def _settings_beside(path: Path) -> Mapping[str, Any] | None:
    """Return the content of the task.json beside a data file; None if there is none."""
    settings_path = path.parent / f"{_stem(path)}.task.json"
    try:
        content = json.loads(settings_path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{settings_path}: cannot be read ({error}); correct it, or give settings") from error
    if not isinstance(content, dict):
        raise UserError(f"{settings_path}: is not a JSON object; correct it, or give settings")
    return content


def _upload(
    examples: str | Path | Sequence[Mapping[str, Any]],
    *,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a file or rows as the body of a request."""
    if not isinstance(examples, str | Path):
        if hasattr(examples, "columns"):
            raise UserError("examples: is a table; give a file, or its rows, of pandas table.to_dict('records')")
        if isinstance(examples, Mapping) or not isinstance(examples, Iterable):
            raise UserError(f"examples={str(examples)[:50]}: give a file, or a list of rows")
        given = {"name": name, "settings": settings}
        return {
            "json": {"examples": list(examples), **{key: value for key, value in given.items() if value is not None}}
        }
    path = Path(examples)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    fields = {} if name is None else {"name": name}
    if settings is not None:
        fields["settings"] = json.dumps(settings)
    return {"files": {"file": (path.name, content)}, "data": fields}


def _read(kind: type[Content], content: Any, field: str | None = None) -> Content:
    """Return JSON, or a field of it, as a dataclass of this module; fields that it does not know are left out."""
    try:
        return TypeAdapter(kind).validate_python(content if field is None else content[field])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{_NOT_OURS} ({'.'.join(map(str, first['loc']))}: {first['msg'].lower()})") from error
    except (LookupError, TypeError) as error:
        raise UserError(f"{_NOT_OURS} (no {field})") from error


def _wait_s(reply: httpx2.Response, attempt: int) -> float:
    """Return the seconds to wait before the next attempt: as the server says, else twice as long each time."""
    try:
        wanted = float(reply.headers.get("retry-after", ""))
    except ValueError:  # such as a date
        wanted = math.nan
    if not math.isfinite(wanted):
        wanted = 0.25 * 2**attempt
    return min(max(wanted, 0.0), _MOST_WAIT_S)


def _refusal(reply: httpx2.Response) -> ServerRefusal:
    try:
        problem = reply.json()
        detail, kind = str(problem["detail"]), str(problem["type"]).rpartition(":")[2]
    except (ValueError, KeyError, TypeError):  # not ours: a proxy's
        problem, kind = {}, "unknown"
        detail = f"{reply.url}: the server refused ({reply.status_code} {reply.reason_phrase})"
    return ServerRefusal(detail, status=reply.status_code, kind=kind, problem=problem)
