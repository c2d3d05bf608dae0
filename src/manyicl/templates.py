"""How an example is written as text, and which part of it is the answer.

The grammar of a sequence (docs/glossary.md) is `[BOS] [instruction] ([input segment][answer][terminator]) x K`. A
Frame holds the fixed text of that grammar; tokens.py turns it into ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from manyicl.errors import UserError
from manyicl.label_names import names_a_label
from manyicl.tasks import Task

PLACEHOLDER = "{input}"
Message = dict[str, str]
# (messages, add_generation_prompt) -> text; and messages -> character ranges that the template marks as generated.
RenderChat = Callable[[Sequence[Message], bool], str]
FindGenerated = Callable[[Sequence[Message]], Sequence[tuple[int, int]]]


class TemplateSettings(BaseModel):
    """How examples are written; the same in training and in every question asked afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: Literal["plain", "chat"] = Field(
        "plain", description="plain text, or the tokenizer's chat template with each shot a user and an assistant turn"
    )
    input: str = Field(
        "Input: {input}\nAnswer:\n", description="the input segment of the plain style, separators included"
    )
    terminator: str = Field(
        "\n\n", description="ends every answer in the plain style; trained, and what an answer is stopped on"
    )
    instruction: bool = Field(True, description="write the task's instruction once, before the first example")
    labels: bool = Field(False, description="list the task's labels after the instruction")

    @field_validator("input")
    @classmethod
    def _has_one_placeholder(cls, value: str) -> str:
        if value.count(PLACEHOLDER) != 1:
            raise ValueError(f"needs {PLACEHOLDER} exactly once, has it {value.count(PLACEHOLDER)} times")
        return value

    @field_validator("terminator")
    @classmethod
    def _is_not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty; an answer without an end is never stopped")
        return value


@dataclass(frozen=True, slots=True)
class Frame:
    """The fixed text of a sequence, as four pieces; `input_text` and the answers go between them.

    opening + instruction + input_text + before_answer + answer + terminator
            + between     + input_text + before_answer + answer + terminator ...
    """

    opening: str
    between: str
    before_answer: str
    terminator: str


def plain_frame(settings: TemplateSettings) -> Frame:
    """Return the frame of the plain style: everything but the terminator belongs to the input segment."""
    return Frame(opening="", between="", before_answer="", terminator=settings.terminator)


def input_text(text: str, *, settings: TemplateSettings) -> str:
    """Return the input segment's own text for an example's input."""
    if settings.style == "chat":
        return text
    before, after = settings.input.split(PLACEHOLDER)
    return f"{before}{text}{after}"


def instruction_text(task: Task, *, settings: TemplateSettings) -> str:
    """Return what stands once before the first example: instruction, labels where asked for, a blank line; or ''."""
    lines = [task.instruction] if settings.instruction and task.instruction else []
    if settings.labels and task.labels:
        lines.append("Answers: " + ", ".join(task.labels))
    return "\n".join(lines) + "\n\n" if lines else ""


def renamed_instruction_text(task: Task, *, settings: TemplateSettings) -> str:
    """Return what stands before the first example of a renamed episode: the same, or '' where it names a label.

    Beside shots that call the classes otherwise, an instruction that names them would be false.
    """
    text = instruction_text(task, settings=settings)
    return "" if names_a_label(text, task.labels) else text


def chat_frame(render: RenderChat, *, find_generated: FindGenerated) -> Frame:
    """Read the frame off a chat template by rendering two turns with marked contents.

    Each rendering must extend the one before, or what inference feeds would not be a prefix of what training saw.
    Where the template marks what the assistant generates (`{% generation %}`), the terminator is the marked text
    after the answer; else it is all that the template writes between the answer and the next turn.

    Raises:
        UserError: the template rewrites earlier turns, or drops or repeats a content.
    """
    user = ("[[input-1]]", "[[input-2]]")
    assistant = ("[[answer-1]]", "[[answer-2]]")
    turns: list[Message] = [
        {"role": role, "content": content}
        for pair in zip(user, assistant, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    asked_1, told_1 = render(turns[:1], True), render(turns[:2], False)
    asked_2, told_2 = render(turns[:3], True), render(turns, False)
    for shorter, longer in ((asked_1, told_1), (told_1, asked_2), (asked_2, told_2)):
        if not longer.startswith(shorter):
            raise UserError(
                "template.style = 'chat': the tokenizer's chat template rewrites earlier turns, so shots could not be"
                " a prefix of a query; set template.style = 'plain', or give the tokenizer a template that only appends"
            )
    for content in (*user, *assistant):
        if told_2.count(content) != 1:
            raise UserError(
                f"template.style = 'chat': the tokenizer's chat template writes a turn {told_2.count(content)} times;"
                " set template.style = 'plain', or give the tokenizer a template that writes each turn once"
            )
    opening, rest = told_2.split(user[0])
    before_answer, rest = rest.split(assistant[0])
    after_answer, _ = rest.split(user[1])
    terminator = _chat_terminator(
        told_2, find_generated(turns), answer=assistant[0], tail=told_1.split(assistant[0])[1]
    )
    return Frame(
        opening=opening,
        between=after_answer.removeprefix(terminator),
        before_answer=before_answer,
        terminator=terminator,
    )


def _chat_terminator(text: str, generated: Sequence[tuple[int, int]], *, answer: str, tail: str) -> str:
    """Return the generated text after the first answer, or all of `tail` where the template marks nothing."""
    stop = text.index(answer) + len(answer)
    for start, end in generated:
        if start <= stop < end and text[stop:end] and tail.startswith(text[stop:end]):
            return text[stop:end]
    if not tail:
        raise UserError(
            "template.style = 'chat': the tokenizer's chat template writes nothing after an answer, so no answer"
            " would end; set template.style = 'plain'"
        )
    return tail
