"""The inputs of `ask`, by pipe as by file."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manyicl.cli.inputs import describe_answers, describe_questions, read_inputs, tell_idle, write_answer
from manyicl.errors import UserError
from manyicl.inference import Answer, Questions
from manyicl.tasks import Example
from tests.conftest import make_task


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffthe bell is broken\r\nthe saddle is lost\r\n"
    file = tmp_path / "inputs.txt"
    file.write_bytes(content.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), newline=""))
    expected = ["the bell is broken", "the saddle is lost"]
    assert read_inputs(str(file)) == read_inputs("-") == expected
    file.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match="is empty; give one input per line"):
        read_inputs(str(file))
    file.write_bytes(b"the bell is broken\n \nthe saddle is lost\n")
    with pytest.raises(UserError, match=r"inputs\.txt, line 2: is empty; remove it, or give an input"):
        read_inputs(str(file))


@pytest.mark.parametrize("codec", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_a_pipe_of_powershell_and_line_ends_of_other_systems_are_read(monkeypatch, codec: str, end: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"the caf\u00e9{end}is lost{end}".encode(codec))))
    assert read_inputs("-") == ["the caf\u00e9", "is lost"]


def test_what_is_not_a_text_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data file was answered line by line, its header and its answers included."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a caf\xe9")))
    with pytest.raises(UserError, match=r"^standard input: byte 6 is not UTF-8; give a UTF-8 text file with one input"):
        read_inputs("-")
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be read \(Is a directory\); give a UTF-8 text file"):
        read_inputs(str(tmp_path))
    for name in ("t.csv", "t.jsonl.gz", "t.parquet"):
        with pytest.raises(UserError, match=rf"^{tmp_path / name}: is a data file, whose lines hold more than inputs"):
            read_inputs(str(tmp_path / name))


def make_questions(*, num_train: int) -> Questions:
    rows = tuple(Example(f"lost my card {n}", "lost_card") for n in range(num_train))
    nothing = np.zeros(0, np.int32)
    return Questions(("lost my card",), 30, {}, replace(make_task("animals"), train=rows), nothing, (nothing,), (), 8)


def test_fewer_shots_than_labels_are_told_with_what_shows_more() -> None:
    questions = make_questions(num_train=900)
    assert describe_questions(questions) == "shots: 30 of 900 train rows"
    assert describe_questions(questions, num_labels=30) == "shots: 30 of 900 train rows"
    assert describe_questions(questions, num_labels=77) == (
        "shots: 30 of 900 train rows, for 77 labels (--choose nearest shows each input examples like it)"
    )
    long = replace(questions, left_out={"train rows too long": 2})
    assert describe_questions(long) == "shots: 30 of 900 train rows; 2 train rows too long"
    # Labels without a row cannot be shown at all.
    assert describe_questions(make_questions(num_train=30), num_labels=77) == "shots: 30 of 30 train rows"


def test_answers_that_are_cut_or_unsure_are_counted_after_them() -> None:
    answer = Answer(input="lost my card", answer="lost_card", nll=0.1, shots=30, cut=False)
    assert describe_answers([answer]) == ""
    assert describe_answers([answer, replace(answer, cut=True), replace(answer, unsure=True)]) == (
        "1 of 3 answers cut at the token limit (--max-new-tokens raises it); 1 of 3 answers unsure (--min-confidence)"
    )


def test_an_answer_of_several_lines_stays_on_the_line_of_its_input() -> None:
    """The second of two inputs had its answer on line 53."""
    answer = Answer(input="a list", answer="bread\nmilk\r\n\neggs\n", nll=0.1, shots=30, cut=True)
    assert write_answer(answer) == "bread⏎milk⏎⏎eggs⏎"
    assert write_answer(replace(answer, answer="\x1b[2Jbread\x07")) == "␛[2Jbread␇", "a terminal obeys neither"
    assert write_answer(replace(answer, unsure=True, confidence=0.5)) == "unsure (0.50): bread⏎milk⏎⏎eggs⏎"
    assert describe_answers([answer, replace(answer, answer="bread", cut=False)]) == (
        "1 of 2 answers cut at the token limit (--max-new-tokens raises it); 1 of 2 answers of several lines, whose"
        " breaks are written as ⏎ (--json keeps them)"
    )


def test_settings_that_change_nothing_are_told_with_the_reason() -> None:
    assert tell_idle(["stop", "max_new_tokens"], are_chosen=True) == (
        "without effect: --stop, --max-new-tokens (answers are chosen among the known ones, not generated)"
    )
    assert tell_idle(["top_p"], are_chosen=False) == (
        "without effect: --top-p (answers are generated, and greedily without --temperature)"
    )
