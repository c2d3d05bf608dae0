"""Settings of answering: which of them change nothing for a kind of answers."""

from __future__ import annotations

import pytest

from manyicl.inference.answering.settings import AnswerSettings


@pytest.mark.parametrize(
    ("settings", "are_chosen", "idle"),
    [
        (AnswerSettings(), True, []),
        (AnswerSettings(), False, []),
        (AnswerSettings(calibrate="contextual"), True, []),
        (AnswerSettings(calibrate="contextual"), False, ["calibrate"]),
        (AnswerSettings(temperature=0.7, top_p=0.9, samples=5, stop=("x",)), False, []),
        (AnswerSettings(temperature=0.7, samples=5), True, ["temperature", "samples"]),
        (AnswerSettings(max_new_tokens=4, stop=("x",)), True, ["max_new_tokens", "stop"]),
        (AnswerSettings(top_p=0.9), False, ["top_p"]),
    ],
)
def test_settings_that_change_nothing_are_named(settings, are_chosen, idle):
    assert settings.idle(are_chosen=are_chosen) == idle
