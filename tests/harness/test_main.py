"""The harness's command line through ours: mistakes that lm_eval itself finds are one line, as our own are."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("lm_eval")

from manyicl.harness.__main__ import is_about_arguments, main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "run --model manyicl --model_args pretrained=seed --tasks arc_esay",
            "Tasks not found: arc_esay; python -m manyicl.harness ls tasks lists those it knows, --include_path FOLDER"
            " adds your own",
        ),
        (
            "run --model manyicl --model_args pretrained=seed",
            "No tasks specified, or no tasks found. Please verify the task names; name some with --tasks",
        ),
        ("run --config /no/file.yaml", "Config file not found: /no/file.yaml"),
        ("run --model manycl --tasks arc_easy", "Attempted to load model 'manycl', but no model for this name found!"),
    ],
)
def test_a_mistake_that_lm_eval_finds_is_one_line_with_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["manyicl.harness", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert line.startswith(f"error: {message}")


def test_an_error_from_elsewhere_keeps_its_traceback():
    from lm_eval.api.registry import get_model

    with pytest.raises(ValueError, match="no model for this name") as caught:
        get_model("manycl")
    assert is_about_arguments(caught.value)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert not is_about_arguments(caught.value)
