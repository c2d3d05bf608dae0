"""What `manyicl ask` reads, and the lines that it reports beside the answers."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyicl.console import show_controls
from manyicl.errors import UserError
from manyicl.tasks import data_suffix

if TYPE_CHECKING:
    from manyicl.inference import Answer, Questions


# What ends a line of inputs, and so must not stand in the line of an answer; there its sign does, as in `show`.
_LINE_END, _BREAK = re.compile(r"\r\n|\r|\n"), "⏎"
# Of a task without fixed labels.
IDLE_BALANCE = "without effect: --choose balanced (there are no labels, so the shots are random ones)"


def describe_questions(questions: Questions, *, num_labels: int = 0) -> str:
    """Return how many shots stand before the inputs, and how many rows were left out.

    num_labels: labels that all inputs' shots should show; 0 if each input has shots of its own.
    """
    num_train = len(questions.task.train)
    shots = f"shots: {questions.shots:,} of {num_train:,} train rows"
    if questions.shots < min(num_labels, num_train):
        shots += f", for {num_labels:,} labels (--choose nearest shows each input examples like it)"
    return shots + "".join(f"; {count:,} {reason}" for reason, count in questions.left_out.items())


def describe_answers(answers: Sequence[Answer]) -> str:
    """Return how many answers are cut, unsure or of several lines; "" if none is."""
    counts = {
        "cut at the token limit (--max-new-tokens raises it)": sum(answer.cut for answer in answers),
        "unsure (--min-confidence)": sum(answer.unsure for answer in answers),
        f"of several lines, whose breaks are written as {_BREAK} (--json keeps them)": sum(
            _LINE_END.search(answer.answer) is not None for answer in answers
        ),
    }
    return "; ".join(f"{count:,} of {len(answers):,} answers {what}" for what, count in counts.items() if count)


def tell_idle(names: Sequence[str], *, are_chosen: bool) -> str:
    """Return that settings of answering change nothing, and why.

    names: from `AnswerSettings.idle`, at least one. are_chosen: whether answers are chosen among known ones.
    """
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    how = "chosen among the known ones, not generated" if are_chosen else "generated"
    why = "" if are_chosen or list(names) != ["top_p"] else ", and greedily without --temperature"
    return f"without effect: {flags} (answers are {how}{why})"


def write_answer(answer: Answer) -> str:
    """Return the one line of an answer; one that is unsure says so, with its confidence."""
    line = show_controls(_LINE_END.sub(_BREAK, answer.answer))
    return f"unsure ({answer.confidence:.2f}): {line}" if answer.unsure else line


def read_inputs(file: str) -> list[str]:
    """Return the lines of a file, or of standard input for '-', without byte order mark and final carriage returns.

    The text is UTF-8, or UTF-16 with a byte order mark, as PowerShell writes it.

    Raises:
        UserError: the file cannot be read, it or a line of it is empty, or it is a data file, whose lines are more.
    """
    name = "standard input" if file == "-" else file
    if data_suffix(Path(file)):
        raise UserError(
            f"{name}: is a data file, whose lines hold more than inputs; give a text file with one input per line, or"
            " evaluate its rows as a task: manyicl eval"
        )
    try:
        text = _decode(_read_bytes(file))
    except OSError as error:
        told = f"cannot be read ({error.strerror or error})"
        raise UserError(f"{name}: {told}; give a UTF-8 text file with one input per line") from error
    except UnicodeDecodeError as error:
        told = f"byte {error.start + 1:,} is not UTF-8"
        raise UserError(f"{name}: {told}; give a UTF-8 text file with one input per line") from error
    text = _LINE_END.sub("\n", text)
    if not text:
        raise UserError(f"{name}: is empty; give one input per line")
    lines = text.removesuffix("\n").split("\n")  # not splitlines: an input may hold other separators
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{name}, line {number:,}: is empty; remove it, or give an input")
    return lines


def _read_bytes(file: str) -> bytes:
    if file != "-":
        return Path(file).read_bytes()
    if sys.stdin is None:
        raise UserError("standard input: is closed; give a file, or pipe one input per line")
    return sys.stdin.buffer.read()


def _decode(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode().lstrip("\ufeff")
