"""The JSON of the API: what requests and answers hold. The fields are those of the service's dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from manyicl.inference import AnswerSettings
from manyicl.service import Registration, ServedTask, ShotChoice

# The fields of a question that are settings of generated answers.
_OF_GENERATED = ("max_new_tokens", "stop", "temperature", "top_p", "samples")
# The fields of a question that change nothing if the likeliest token is always taken.
OF_SAMPLING = ("top_p", "seed")
ExampleId = Annotated[int, Field(ge=0, lt=1 << 53)]


class TextBody(BaseModel):
    """A body whose texts are Unicode: JSON can also write half of a surrogate pair, which is no character."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, content: Any) -> Any:
        try:
            json.dumps(content, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is not a character") from None
        return content


class RequestBody(TextBody):
    """A body that a client sends: a field that it does not have is refused, not dropped."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class AnswerBody(BaseModel):
    """A body that the server sends, made from a dataclass of the service."""

    model_config = ConfigDict(from_attributes=True)


class ShotsBody(RequestBody):
    """Which examples are shown before an input."""

    policy: Literal["random", "fixed", "nearest"] = Field(
        "random",
        description="random: stratified by label; fixed: `ids`; nearest: similar to the input, after a random part.",
    )
    count: int | None = Field(None, ge=0, le=1 << 20, description="How many. Default: as many as fit.")
    seed: int = Field(0, ge=0, lt=1 << 53, description="Decides which examples a random choice takes.")
    ids: list[ExampleId] = Field([], max_length=100_000, description="Ids of the examples to show, in this order.")

    def to_choice(self) -> ShotChoice:
        """Return it as the service takes it."""
        return ShotChoice(policy=self.policy, count=self.count, seed=self.seed, ids=tuple(self.ids))


class ExampleBody(RequestBody):
    """One labelled example."""

    input: str
    answer: str | int | float | bool | list[str] = Field(description="Or a list of right answers; the first is shown.")
    options: list[str] | None = Field(None, description="The candidate answers of this example, if it has its own.")

    def to_row(self) -> dict[str, Any]:
        """Return it as a row of a data file."""
        return self.model_dump(exclude_none=True)


class UploadBody(RequestBody):
    """Examples as JSON, with the name and settings of the task that they are for."""

    name: str | None = Field(None, description="The task's name; a new task needs one.")
    settings: dict[str, Any] | None = Field(
        None, description="As a task.json: family, metric, instruction, labels, ..."
    )
    examples: list[ExampleBody] = Field(min_length=1)


class RemovalBody(RequestBody):
    """Examples to remove."""

    ids: list[ExampleId] = Field(min_length=1, max_length=100_000)


class CorrectionBody(RequestBody):
    """The right answer of an example."""

    answer: str


class PredictBody(RequestBody):
    """One input, or several, to answer after a task's examples."""

    input: str | None = Field(None, description="One input; or else `inputs`.")
    inputs: list[str] | None = Field(None, min_length=1, description="Several inputs; or else `input`.")
    options: list[str] | list[list[str]] | None = Field(
        None, description="The candidate answers of the input; of several inputs, a list for each. Default: the labels."
    )
    shots: ShotsBody | None = Field(None, description="Default: the server's.")
    max_new_tokens: int | None = Field(None, ge=1, le=1 << 20, description="Most tokens of a generated answer.")
    stop: list[str] | None = Field(None, max_length=16, description="Texts that end a generated answer.")
    temperature: float | None = Field(None, ge=0, le=10, description="Sample a generated answer; 0: greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the likeliest tokens of this probability.")
    samples: int | None = Field(None, ge=1, le=64, description="Generate so many answers, and take the majority.")
    seed: int = Field(0, ge=0, lt=1 << 53, description="Decides what is sampled.")
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="Mark replies with less confidence as `unsure`. Needs labels, options or samples."
    )
    deadline_s: float | None = Field(None, gt=0, description="Give up after so many seconds (504).")
    stream: bool = Field(False, description="Send text as it is generated, as server-sent events.")

    def to_settings(self, usual: AnswerSettings) -> AnswerSettings:
        """Return how the inputs are answered: as `usual`, except for what this request says.

        Raises:
            UserError: several samples without a temperature, or an empty stop text.
        """
        return replace(usual, **{name: value for name in _OF_GENERATED if (value := getattr(self, name)) is not None})

    def ignored(self, usual: AnswerSettings, *, are_chosen: bool) -> list[str]:
        """Return the fields that change nothing.

        usual: the settings that this request's stand in for. are_chosen: answers are chosen among known ones.
        """
        is_greedy = not (usual.temperature if self.temperature is None else self.temperature)
        names = (*_OF_GENERATED, "seed") if are_chosen else OF_SAMPLING if is_greedy else ()
        return [name for name in names if name in self.model_fields_set and getattr(self, name) is not None]


class RegistrationBody(AnswerBody):
    """What became of the rows of an upload."""

    kept: int
    dropped: Mapping[str, int] = Field(description="Reason -> number of rows.")
    notes: list[str]
    warnings: list[str]
    ids: list[int] = Field(description="Ids of the examples that were appended; empty for a new task.")


class TaskBody(AnswerBody):
    """A served task."""

    name: str
    family: str
    metric: str
    instruction: str
    labels: list[str] = Field(description="The fixed answers; empty if it has none.")
    version: int = Field(description="Goes up by one with each change.")
    num_examples: int
    created: str
    changed: str
    model: str = Field(description="Its name for OpenAI's clients.")


class CorrectedBody(TaskBody):
    """A served task after the answer of an example was corrected."""

    notes: list[str] = Field(description="Labels that are new to the task.")
    warnings: list[str] = Field(description="New labels that look like others of the task, and may be slips.")


def make_task(task: ServedTask, base: str) -> TaskBody:
    """Return a task as it is sent. base: the name of the model, for OpenAI's clients."""
    record = task.record  # read once: each property of the task would read the library again
    return TaskBody(
        name=record.name,
        family=record.about["family"],
        metric=record.about["metric"],
        instruction=record.about["instruction"],
        labels=record.about["labels"],
        version=record.version,
        num_examples=task.num_examples,
        created=record.created,
        changed=record.changed,
        model=model_name(base, record.name),
    )


def model_name(base: str, task: str) -> str:
    """Return the name of a task as a model of OpenAI's clients. base: the name of the model that answers."""
    return f"{base}:{task}"


class TasksBody(AnswerBody):
    """All served tasks."""

    tasks: list[TaskBody]


class RegisteredBody(AnswerBody):
    """A task after an upload, and what became of the rows."""

    task: TaskBody
    registration: RegistrationBody


def make_registered(task: ServedTask, base: str, registration: Registration | None = None) -> RegisteredBody:
    """Return a task and what became of the rows of an upload, by default of its first one."""
    found = RegistrationBody.model_validate(registration if registration is not None else task.registration)
    return RegisteredBody(task=make_task(task, base), registration=found)


def make_corrected(task: ServedTask, base: str, registration: Registration) -> CorrectedBody:
    """Return a task after a correction, and what is to be known of it."""
    told = {"notes": registration.notes, "warnings": registration.warnings}
    return CorrectedBody.model_validate({**make_task(task, base).model_dump(), **told})


class ServedExampleBody(AnswerBody):
    """An example of a served task."""

    id: int
    input: str
    answer: str
    options: list[str] = Field(description="Its own candidate answers, if it has any.")
    also_right: list[str] = Field(description="Other answers that count as right.")
    added: str
    source: str


class ServedExamplesBody(AnswerBody):
    """Some of a task's examples, in the order of their ids."""

    examples: list[ServedExampleBody]
    start: int
    total: int


class TimingBody(AnswerBody):
    """Where the time of an answer went."""

    queued_s: float
    prefix_s: float
    model_s: float
    total_s: float
    prefix_cached: bool
    batch_size: int


class ReplyBody(AnswerBody):
    """The answer to one input."""

    input: str
    answer: str
    probabilities: Mapping[str, float] | None = Field(description="Of each choice; null for a generated answer.")
    confidence: float | None = Field(
        description="Probability of the answer, or share of the samples that gave it; else null."
    )
    unsure: bool = Field(description="Whether the confidence is below the `min_confidence` of the request.")
    nll: float | None = Field(description="Negative log-likelihood of the answer in nats.")
    shots: list[int] = Field(description="Ids of the examples that were shown, in order.")
    cut: bool = Field(description="Whether the answer ended at its limit of tokens.")
    finish: Literal["stop", "length"]
    timing: TimingBody
    num_prompt_tokens: int
    num_answer_tokens: int
    task_version: int


class PredictedBody(AnswerBody):
    """The answers to the inputs of a request, in their order."""

    task: str
    version: int
    replies: list[ReplyBody]


class PointBody(AnswerBody):
    """A point of a shot curve: the score after so many shots, with its 95 % interval."""

    shots: int
    score: float
    low: float | None
    high: float | None
    num_scored: int


class SuspectBody(AnswerBody):
    """An example whose label looks wrong at many shots."""

    example_id: int
    input: str
    answer: str
    likelier: str
    nats_gap: float


class DuplicatesBody(AnswerBody):
    """Examples with nearly the same input."""

    num_examples: int
    pairs: list[tuple[int, int]] = Field(description="The first of them, as pairs of ids.")


class MeasurementBody(AnswerBody):
    """What a task's examples say about the answers to come."""

    state: Literal["waiting", "running", "done", "failed", "off"]
    fraction: float
    curve: list[PointBody]
    majority: float | None
    chance: float | None
    suspects: list[SuspectBody]
    duplicates: DuplicatesBody
    sentence: str
    slope: float | None = Field(description="What the last doublings of the shots added to the score, per doubling.")
    slope_low: float | None
    slope_high: float | None
    seconds: float | None
    version: int


class HealthBody(AnswerBody):
    """The server is up."""

    status: Literal["ok"]


class ReadyBody(AnswerBody):
    """The server is ready to answer."""

    status: Literal["ready"]
    model: str
    version: str
    num_tasks: int
    read_only: bool
