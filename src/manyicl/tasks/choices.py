"""Answers that name an option by number, letter or label are replaced by the option's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from manyicl.tasks.faults import FaultLog, near_word, show
from manyicl.tasks.rows import FileRows, Row

# Returns the option of a row that an answer means, or None if it means none.
_Reading = Callable[[Row, str], str | None]


def resolve_choices(
    files: Sequence[FileRows], *, answer_index: int | None, settings_name: str, log: FaultLog
) -> list[str]:
    """Replace each answer of a row with options by the text of its option, in place, and return notes about it.

    The meaning of answers is decided for the task as a whole. They are texts, unless some answer is not among its
    options and all answers are labels, numbers or letters of options. A row whose answer means none of its options is
    a fault.

    answer_index: the number of the first option, 0 or 1, if the task.json says that answers are numbers.
    """
    rows = [row for file in files for row in file.rows if row.options]
    if not rows and answer_index is not None and any(file.rows for file in files):
        fix = f"correct {settings_name}"
        log.add("answer_index without options", f'no row has options, but "answer_index" is set; {fix}')
    if not rows:
        return []
    name, reading = _find_reading(rows, answer_index)
    for file in files:
        kept = []
        for row in file.rows:
            answers = [reading(row, answer) for answer in (row.answer, *row.also_right)] if row.options else []
            if None in answers:
                what = partial(_describe_wrong, row, _are_numbers(rows), settings_name)
                log.add("answer not among its options", what, row=row.number, path=file.path)
                file.num_faulty += 1
                continue
            right = tuple(dict.fromkeys(answer for answer in answers if answer is not None))
            kept.append(replace(row, answer=right[0], also_right=right[1:]) if right else row)
        file.rows = kept
    return [f"answers are read as {name}"] if name else []


def _find_reading(rows: Sequence[Row], answer_index: int | None) -> tuple[str, _Reading]:
    if answer_index is not None:
        return f"numbers of options, counted from {answer_index}", partial(_by_number, answer_index)
    if all(row.answer in row.options for row in rows):
        return "", _by_text
    if all(row.answer in row.option_labels for row in rows):
        return "labels of options", _by_label
    if _are_numbers(rows):
        # Decided only if exactly one way of counting fits every row.
        possible = [n for n in (0, 1) if all(_by_number(n, row, row.answer) is not None for row in rows)]
        if len(possible) == 1:
            return f"numbers of options, counted from {possible[0]}", partial(_by_number, possible[0])
    if all(_by_letter(row, row.answer) is not None for row in rows):
        return "letters of options", _by_letter
    return "", _by_text


def _are_numbers(rows: Sequence[Row]) -> bool:
    return all(row.answer.isdecimal() and len(row.answer) < 5 for row in rows)


def _by_text(row: Row, answer: str) -> str | None:
    return answer if answer in row.options else None


def _by_label(row: Row, answer: str) -> str | None:
    return row.options[row.option_labels.index(answer)] if answer in row.option_labels else None


def _by_number(first: int, row: Row, answer: str) -> str | None:
    if not answer.isdecimal() or len(answer) > 4:
        return None
    place = int(answer) - first
    return row.options[place] if 0 <= place < len(row.options) else None


def _by_letter(row: Row, answer: str) -> str | None:
    place = ord(answer.upper()) - ord("A") if len(answer) == 1 and answer.isascii() and answer.isalpha() else -1
    return row.options[place] if 0 <= place < len(row.options) else None


def _describe_wrong(row: Row, are_numbers: bool, settings_name: str) -> str:
    what = f"answer {show(row.answer)} is not among its options"
    if are_numbers:
        example = '{"answer_index": 0}'
        return f"{what}; if it is an option's number, write {example} (counted from 0, or 1) into {settings_name}"
    return what + near_word(row.answer, row.options)
