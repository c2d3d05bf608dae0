"""How an example is written as text, and which part of it is the answer.

The grammar of a sequence (docs/glossary.md) is `[BOS] [instruction] ([input segment][answer][terminator]) x K`. A
Frame holds the fixed text of that grammar; tokens.py turns it into ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from manyicl.episodes.renaming import names_a_label
from manyicl.errors import UserError
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
    """The fixed text of a sequence, as four pieces; inputs and answers go between them.

    opening + instruction + input + before_answer + answer + terminator
            + between     + input + before_answer + answer + terminator ...

    trims_inputs, trims_answers: whether the chat template strips white space from the ends of user and of assistant
    contents, as Gemma's and Llama 3's do.
    """

    opening: str
    between: str
    before_answer: str
    terminator: str
    trims_inputs: bool = False
    trims_answers: bool = False


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


def chat_frame(
    render: RenderChat, *, find_generated: FindGenerated, end_of_text: str = "", drops_thoughts: bool = False
) -> Frame:
    """Read the frame off a chat template by rendering two turns with marked contents.

    Each rendering must extend the one before, or what inference feeds would not be a prefix of what training saw.
    If the template marks what the assistant generates (`{% generation %}`), the terminator is the marked text after
    the answer; else it is all that the template writes between the answer and the next turn.

    end_of_text: a token that the template may write after the last turn of a finished conversation (Phi-3); no prompt
    for an answer contains it, so the frame does not either.
    drops_thoughts: the template opens an answer with an empty thought and leaves that out of earlier turns (Qwen 3,
    with thinking switched off). The frame keeps the thought in every turn, so that all answers are written alike.

    Raises:
        UserError: the template rewrites earlier turns, or drops or repeats a content.
    """
    user = ("[[input-1]]", "[[input-2]]")
    assistant = ("[[answer-1]]", "[[answer-2]]")
    turns = _make_turns(user, assistant)
    asked_1, told_1 = render(turns[:1], True), render(turns[:2], False)
    asked_2, told_2 = render(turns[:3], True), render(turns, False)
    if end_of_text and told_1.endswith(end_of_text) and not asked_2.startswith(told_1):
        told_1, told_2 = told_1.removesuffix(end_of_text), told_2.removesuffix(end_of_text)
    for content in (*user, *assistant):
        if told_2.count(content) != 1:
            raise UserError(
                f"template.style = 'chat': the tokenizer's chat template writes a turn {told_2.count(content)} times;"
                " set template.style = 'plain', or give the tokenizer a template that writes each turn once"
            )
    opening, before_1, after_answer, before_2, _ = _cut_at(told_2, [user[0], assistant[0], user[1], assistant[1]])
    tail = told_1.partition(assistant[0])[2]
    first = opening + user[0] + before_2
    second = opening + user[0] + before_1 + assistant[0] + after_answer + user[1] + before_2
    only_appends = (
        # Some templates (Mistral 7B's) write a space before an answer that their prompt for one does not end with.
        first.startswith(asked_1)
        and told_1 == first + assistant[0] + tail
        and second.startswith(asked_2)
        and told_2 == second + assistant[1] + tail
        and after_answer.startswith(tail)
        and (before_1 == before_2 or (drops_thoughts and before_2.startswith(before_1)))
    )
    if not only_appends:
        raise UserError(
            "template.style = 'chat': the tokenizer's chat template rewrites earlier turns, so shots could not be"
            " a prefix of a query; set template.style = 'plain', or give the tokenizer a template that only appends"
        )
    terminator = _chat_terminator(told_2, find_generated(turns), answer=assistant[0], tail=tail)
    trims_inputs, trims_answers = _find_trimming(render)
    return Frame(
        opening=opening,
        between=after_answer.removeprefix(terminator),
        before_answer=before_2,
        terminator=terminator,
        trims_inputs=trims_inputs,
        trims_answers=trims_answers,
    )


def _make_turns(inputs: Sequence[str], answers: Sequence[str]) -> list[Message]:
    return [
        {"role": role, "content": content}
        for pair in zip(inputs, answers, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _cut_at(text: str, marks: Sequence[str]) -> list[str]:
    """Return the pieces of `text` before, between and after `marks`, each of which it holds once."""
    pieces = []
    for mark in marks:
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _find_trimming(render: RenderChat) -> tuple[bool, bool]:
    """Return whether the template strips white space from the ends of user and of assistant contents."""
    padded = ("  [[input]]  ", "  [[answer]]  ")
    text = render(_make_turns(padded[:1], padded[1:]), False)
    return padded[0] not in text, padded[1] not in text


def _chat_terminator(text: str, generated: Sequence[tuple[int, int]], *, answer: str, tail: str) -> str:
    """Return the generated text after the first answer, or all of `tail` if the template marks nothing."""
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
