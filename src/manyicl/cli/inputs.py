"""What `manyicl ask` reads, and the line that it reports beside the answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyicl.errors import UserError

if TYPE_CHECKING:
    from manyicl.inference import Answer


def describe_answers(answers: Sequence[Answer], *, num_train: int) -> str:
    """Return how many shots stood before the inputs, how many rows could not be shots, and how many answers were cut.

    num_train: train rows of the task.
    """
    shots = f"shots: {answers[0].shots:,} of {num_train:,} train rows"
    left_out = "".join(f"; {count:,} {reason}" for reason, count in answers[0].left_out.items())
    num_cut = sum(answer.cut for answer in answers)
    cut = f"; {num_cut:,} of {len(answers):,} answers cut at the token limit (--max-new-tokens raises it)"
    return f"{shots}{left_out}{cut if num_cut else ''}"


def read_inputs(file: str) -> list[str]:
    """Return the lines of a file, or of standard input for '-', without byte order mark and final carriage returns.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    try:
        if file == "-" and sys.stdin is None:
            raise UserError("standard input: is closed; give a file, or pipe one input a line")
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a UTF-8 text file with one input a line") from error
    text = text.lstrip("\ufeff")
    # Not splitlines: an input may hold other separators.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text:
        raise UserError(f"{'standard input' if file == '-' else file}: is empty; give one input a line")
    return lines
