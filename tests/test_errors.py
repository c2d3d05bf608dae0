"""A user's mistake is one line with a fix; anything else that escapes is a bug of ours and keeps its traceback."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.cli import app
from manyicl.errors import UserError, list_some, suggest


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("clasification", ["nli", "classification"], "; did you mean 'classification'?"),
        ("num_step", ["num_steps", "num_workers"], "; did you mean 'num_steps'?"),
        ("zebra", ["nli", "classification"], "; known: classification, nli"),
        ("", ["b", "a"], "; known: a, b"),
        ("a", {"a": 1}, "; did you mean 'a'?"),
    ],
)
def test_a_near_word_is_suggested_else_all_are_named(word, known, expected):
    assert suggest(word, known) == expected


def test_some_words_of_many_are_named_and_the_others_counted():
    assert list_some([]) == ""
    assert list_some(["a"]) == "a"
    assert list_some("abc") == "a, b, c"
    assert list_some("abcd") == "a, b, c, and 1 more"
    assert list_some((str(n) for n in range(2000)), most=1, mark="; ") == "0; and 1,999 more"


@settings(deadline=None)
@given(st.text(), st.lists(st.text(min_size=1), min_size=1))
def test_every_word_gets_an_answer(word, known):
    answer = suggest(word, known)
    assert answer.startswith(("; did you mean '", "; known: "))
    assert any(choice in answer for choice in known)


def run_main(monkeypatch, error: BaseException) -> None:
    def fail(**_):
        raise error

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(sys, "argv", ["manyicl"])
    app.main()


def test_a_users_error_is_one_line_on_stderr_and_exit_code_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exited:
        run_main(monkeypatch, UserError("r.toml: train.num_stesp: unknown key; did you mean 'num_steps'?"))
    assert exited.value.code == 2
    expected = "error: r.toml: train.num_stesp: unknown key; did you mean 'num_steps'?\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), RuntimeError("ours")])
def test_a_bug_of_ours_is_not_dressed_up(monkeypatch, error):
    with pytest.raises(type(error), match="ours"):
        run_main(monkeypatch, error)
