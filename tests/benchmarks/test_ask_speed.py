"""The time of a first answer and of those after it."""

from __future__ import annotations

import sys

import pytest

from benchmarks import ask_speed


@pytest.mark.slow
def test_a_first_answer_and_a_hundred_more_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ask_speed.py", "seed", "--rounds", "1"])
    ask_speed.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["round", "first", "the"]


def test_questions_that_are_not_answered_end_it(tmp_path):
    with pytest.raises(SystemExit, match="error: "):
        ask_speed.ask("seed", tmp_path, "none", ["Is there a task?"])
