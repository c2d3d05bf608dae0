"""Answers as tables have them: lists of right answers, characters that were lost, errors of a spreadsheet."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.tasks import Example, Task, inspect_task


def read(tmp_path: Path, content: str) -> Task:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    task, faults = inspect_task(tmp_path / "t.csv")
    assert task is not None, faults
    return task


@pytest.mark.parametrize(
    "cell",
    [
        '"[""3"", ""three""]"',  # JSON
        "\"['3', 'three']\"",  # Python, as pandas writes lists
        "\"['3' 'three']\"",  # numpy, as pandas writes what it read from Parquet
        "\"['3'\n 'three' '3']\"",
    ],
)
def test_answers_that_are_lists_in_a_table_are_right_answers(tmp_path: Path, cell: str) -> None:
    task = read(tmp_path, f"input,answer,split\nq,{cell},test\nr,\"['it''s']\",test\n".replace("it''s", "its"))
    assert task.test == (Example("q", "3", (), ("three",)), Example("r", "its"))
    assert "t.csv: answers are read as lists of right answers" in task.notes


def test_lists_of_numbers_stay_texts_and_some_lists_among_texts_are_told(tmp_path: Path) -> None:
    task = read(tmp_path, 'input,answer,split\nq,"[1, 2]",test\nr,"[3]",test\n')
    assert (task.test, task.warnings) == ((Example("q", "[1, 2]"), Example("r", "[3]")), ())
    task = read(tmp_path, "input,answer,split\nq,\"['a', 'b']\",test\nr,a,test\n")
    assert task.test == (Example("q", "['a', 'b']"), Example("r", "a"))
    assert task.warnings == (
        "1 of 2 answers of t.csv are written as lists, such as \"['a', 'b']\"; write all as lists to give several right"
        " answers, or none",
    )


@pytest.mark.parametrize("cell", ["['C:\\users', 'b']", "['\\x']", "['a\0b']"])
def test_what_only_looks_like_a_list_is_a_text(tmp_path: Path, cell: str) -> None:
    assert read(tmp_path, f'input,answer,split\nq,"{cell}",test\n').test == (Example("q", cell),)


def test_a_text_of_a_list_may_hold_line_breaks_of_windows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"input,answer,split\r\nq,\"['a\r\nb' 'c']\",test\r\n")
    task, _ = inspect_task(tmp_path / "t.csv")
    assert task is not None
    assert task.test == (Example("q", "a\r\nb", (), ("c",)),)


def test_an_empty_list_is_an_empty_answer(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("input,answer\nq,[]\nr,\"['a']\"\n")
    _, (fault,) = inspect_task(tmp_path / "t.csv")
    assert fault.message.endswith("t.csv, row 1: answer '[]' is empty; fill it in or remove the row")


@pytest.mark.parametrize("cell", ["\"['x', 'y']\"", "\"['x' 'y']\"", '"[""x"", ""y""]"', "x|y"])
def test_options_of_a_table_are_lists_too(tmp_path: Path, cell: str) -> None:
    assert read(tmp_path, f"input,answer,options,split\nq,y,{cell},test\n").test == (Example("q", "y", ("x", "y")),)


@pytest.mark.parametrize(
    ("cells", "warning"),
    [
        ("caf\ufffd|x", "1 text has the mark of a lost character (U+FFFD); convert the source to UTF-8 again"),
        (
            "caf\u00c3\u00a9|d\u00c3\u00bcrfen",
            "2 texts look like UTF-8 that was read as another encoding, such as 'caf\u00c3\u00a9'; convert the"
            " source again",
        ),
        (
            "it\u00e2\u20ac\u2122s|x",
            "1 text looks like UTF-8 that was read as another encoding, such as 'it\u00e2\u20ac\u2122s'; convert the"
            " source again",
        ),
        ("#N/A|x", "cells that hold the error of a spreadsheet: '#N/A' 1; correct or remove these rows"),
        (
            "20 \u00b0C, caf\u00e9, S\u00c3O|\u00abAmanh\u00e3\u2026\u201d, \u00e0\u00a0\u00ab b \u00bb",
            "",
        ),
        ("#1|NA", ""),
    ],
)
def test_texts_that_lost_characters_before_are_counted(tmp_path: Path, cells: str, warning: str) -> None:
    """Report issue 18: U+FFFD, text in a wrong encoding and '#N/A' went into training without a word."""
    lines = [f'row {n},"{cell}",test\n' for n, cell in enumerate(cells.split("|"))]
    task = read(tmp_path, "input,answer,split\n" + "".join(lines))
    assert task.warnings == ((warning,) if warning else ())
