"""How an example is written as text, and which part of it is the answer.

The grammar of a sequence (docs/glossary.md) is `[BOS] [instruction] ([input segment][answer][terminator]) x K`. A
Frame is the fixed text of that grammar; tokenizer.py turns it into ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from manyicl.episodes.renaming import names_a_label
from manyicl.errors import UserError
from manyicl.tasks import Task

PLACEHOLDER = "{input}"
Message = dict[str, str]
# (messages, add_generation_prompt) -> text; and messages -> character ranges that the template marks as generated.
RenderChat = Callable[[Sequence[Message], bool], str]
FindGenerated = Callable[[Sequence[Message]], Sequence[tuple[int, int]]]


class TemplateSettings(BaseModel):
    """How examples are written, in training and in evaluation alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    style: Literal["plain", "chat"] = "plain"
    """'plain' text, or 'chat': the tokenizer's chat template, with a user and an assistant turn per example. On SmolLM2
    'chat' was 1.40 points [0.01, 2.79] better on new tasks after many shots, though fewer fit (docs/results.md, "Which
    default?")."""
    input: str = "Input: {input}\nAnswer:\n"
    """Plain style: the input segment, separators included."""
    terminator: str = "\n\n"
    """Plain style: the text that ends every answer. It is trained, and generation stops on it."""
    system: str = ""
    """Chat style: a system prompt, once, before all else. Default: what the chat template writes without one."""
    instruction: bool = True
    """Write the task's instruction once, before the first example."""
    labels: bool = False
    """List the task's labels after the instruction."""

    @field_validator("input")
    @classmethod
    def _has_one_placeholder(cls, value: str) -> str:
        if value.count(PLACEHOLDER) != 1:
            raise ValueError(f"needs {PLACEHOLDER} exactly once, but it occurs {value.count(PLACEHOLDER)} times")
        return value

    @model_validator(mode="after")
    def _has_a_system_to_tell(self) -> TemplateSettings:
        if self.system and self.style != "chat":
            raise ValueError("system: is for template.style = 'chat'; put the text into the tasks' instruction instead")
        return self

    @field_validator("terminator")
    @classmethod
    def _is_not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty; generation would not know where an answer ends")
        return value


@dataclass(frozen=True, slots=True)
class Frame:
    """The fixed text of a sequence, as four pieces with inputs and answers between them.

    opening + instruction + input + before_answer + answer + terminator
            + between     + input + before_answer + answer + terminator ...
    """

    opening: str
    """Before the instruction; in the chat style with BOS, if the template writes one."""
    between: str
    """Between a terminator and the next input."""
    before_answer: str
    """Between an input and its answer."""
    terminator: str
    """Ends every answer."""
    trims_inputs: bool = False
    """Whether the chat template strips white space from both ends of what a user says, as Gemma's and Llama 3's do."""
    trims_answers: bool = False
    """Whether it strips white space from both ends of what the assistant says."""


def plain_frame(settings: TemplateSettings) -> Frame:
    """Return the frame of the plain style: all fixed text but the terminator is part of the input segment."""
    return Frame(opening="", between="", before_answer="", terminator=settings.terminator)


def input_text(text: str, *, settings: TemplateSettings) -> str:
    """Return an example's input as the input segment writes it."""
    if settings.style == "chat":
        return text
    before, after = settings.input.split(PLACEHOLDER)
    return f"{before}{text}{after}"


def instruction_text(task: Task, *, settings: TemplateSettings) -> str:
    """Return the text before the first example: instruction, labels if the settings list them, a blank line; or ''."""
    lines = [task.instruction] if settings.instruction and task.instruction else []
    if settings.labels and task.labels:
        lines.append("Answers: " + ", ".join(task.labels))
    return "\n".join(lines) + "\n\n" if lines else ""


def renamed_instruction_text(task: Task, *, settings: TemplateSettings) -> str:
    """Return the text before the first example of a renamed episode: the same, or '' if it names a label.

    Such an instruction would be false, since the shots use other names for the labels.
    """
    text = instruction_text(task, settings=settings)
    return "" if names_a_label(text, task.labels) else text


def chat_frame(
    render: RenderChat, *, find_generated: FindGenerated, end_of_text: str = "", drops_thoughts: bool = False
) -> Frame:
    """Read the frame off a chat template by rendering two exchanges with marked contents.

    Each rendering must extend the one before; else a prompt at inference would not be a prefix of a training sequence.
    If the template marks what the assistant generates (`{% generation %}`), the terminator is the marked text after
    the answer; else it is all text that the template writes between the answer and the next turn.

    render: renders messages, with or without the generation prompt. find_generated: gives the character ranges that the
    template marks as generated.
    end_of_text: a token that the template may write after the last turn of a finished conversation (Phi-3). No prompt
    contains it, so the frame does not either.
    drops_thoughts: the template begins an answer with an empty thought, which it leaves out of earlier turns (Qwen 3,
    with thinking switched off). The frame keeps the thought in every turn, so that all answers are written alike.

    Raises:
        UserError: the template rewrites earlier turns, or drops or repeats a content.
    """
    user = ("[[input-1]]", "[[input-2]]")
    assistant = ("[[answer-1]]", "[[answer-2]]")
    turns = _make_turns(user, assistant)
    prompt_1, whole_1 = render(turns[:1], True), render(turns[:2], False)
    prompt_2, whole_2 = render(turns[:3], True), render(turns, False)
    if end_of_text and whole_1.endswith(end_of_text) and not prompt_2.startswith(whole_1):
        whole_1, whole_2 = whole_1.removesuffix(end_of_text), whole_2.removesuffix(end_of_text)
    for content in (*user, *assistant):
        if whole_2.count(content) != 1:
            raise UserError(
                f"template.style = 'chat': the tokenizer's chat template writes a turn {whole_2.count(content)} times;"
                " set template.style = 'plain', or give the tokenizer a template that writes each turn once"
            )
    opening, before_1, after_answer, before_2, _ = _cut_at(whole_2, [user[0], assistant[0], user[1], assistant[1]])
    tail = whole_1.partition(assistant[0])[2]
    first = opening + user[0] + before_2
    second = opening + user[0] + before_1 + assistant[0] + after_answer + user[1] + before_2
    only_appends = (
        # A prefix, not equal: some templates (Mistral 7B's) write a space before an answer, but not into the prompt.
        first.startswith(prompt_1)
        and whole_1 == first + assistant[0] + tail
        and second.startswith(prompt_2)
        and whole_2 == second + assistant[1] + tail
        and after_answer.startswith(tail)
        and (before_1 == before_2 or (drops_thoughts and before_2.startswith(before_1)))
    )
    if not only_appends:
        raise UserError(
            "template.style = 'chat': the tokenizer's chat template rewrites earlier turns, so shots could not be"
            " a prefix of a query; set template.style = 'plain', or give the tokenizer a template that only appends"
        )
    terminator = _chat_terminator(whole_2, find_generated(turns), answer=assistant[0], tail=tail)
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
    """Return the pieces of `text` before, between and after `marks`, each of which occurs once."""
    pieces = []
    for mark in marks:
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _find_trimming(render: RenderChat) -> tuple[bool, bool]:
    """Return whether the template strips white space from the ends of user contents, and of assistant contents."""
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
            "template.style = 'chat': the tokenizer's chat template writes nothing after an answer, so answers"
            " would never end; set template.style = 'plain'"
        )
    return tail
