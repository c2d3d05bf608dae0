"""A comparison in a terminal of 80 columns, without colour."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.comparison.comparison_file import check_comparison
from manyicl.console import make_console
from manyicl.report.document import print_outcome
from manyicl.report.terminal import comparison_plot, comparison_table
from tests.support.comparison_data import make_comparison
from tests.support.rendering import render_terminal


def show(content, *, width: int = 80) -> str:
    text = render_terminal(content, width=width)
    assert "\x1b" not in text
    assert "nan" not in text.lower()
    return text


@pytest.fixture(scope="module")
def finished():
    return check_comparison(make_comparison(num_seeds=5, num_tasks=10))


@pytest.fixture(scope="module")
def unfinished():
    return check_comparison(make_comparison(num_seeds=2, num_tasks=10, finished=False))


def cells_of(text: str, first: str) -> list[list[str]]:
    """Return the cells of every table's row that begins with `first`."""
    return [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith(f"│ {first} ")]


def test_the_table_begins_with_the_verdict_and_has_every_arm_in_every_group(finished):
    text = show(comparison_table(finished))
    assert text.startswith("At equal training tokens, ManyICL answers ")
    for title in ("Trained tasks, %", "Held-out tasks, %", "Forgetting, bits per byte"):
        assert title in text
    assert len(cells_of(text, "ManyICL")) == 4
    cell = finished.headline_score("base", "trained", "zero")
    assert cells_of(text, "Base")[0][2] == f"{100 * cell.score:.1f}"


def test_best_is_marked_without_colour(finished, unfinished):
    best = finished.headline_score("manyicl", "held-out", "most")
    assert best.best
    assert cells_of(show(comparison_table(finished)), "ManyICL")[1][3] == f"{100 * best.score:.1f}!"
    assert "!" not in show(comparison_table(unfinished))


def test_what_was_not_measured_is_a_dash_and_what_is_missing_is_told(unfinished):
    text = show(comparison_table(unfinished))
    assert cells_of(text, "Dedicated")[1][1:] == ["–", "–", "–"]
    assert "not finished: " in text
    assert "Dedicated, seed 1: training 7 of 18 done" in text
    assert "each seed's value is shown" in " ".join(text.split())


def test_a_ceiling_is_named_as_not_matched():
    content = make_comparison(num_tasks=5)
    content["arms"][4] |= {"matched": False}
    assert "not matched" in show(comparison_table(check_comparison(content)))


def test_every_arm_has_a_mark_in_the_plot(finished):
    text = show(comparison_plot(finished, colour=False))
    for title in ("held-out tasks: mean score in %", "trained tasks: mean score in %"):
        assert title in text
    assert "o Base   x Zero-shot   + Few-shot   * ManyICL   # Dedicated" in text
    body = text.split("o Base")[0]
    assert all(mark in body for mark in "ox+*#")


def test_no_means_no_plot():
    content = make_comparison(num_tasks=5)
    content["means"] = []
    assert "no curve" in show(comparison_plot(check_comparison(content)))


def test_the_command_that_resumes_it_is_one_that_a_shell_takes(unfinished):
    console = make_console()
    with console.capture() as shown:
        print_outcome(unfinished, Path("my runs/[a]"), console=console)
    assert "report: my runs/[a]/report.html\n" in shown.get()
    assert shown.get().endswith("not finished; resume it: manyicl compare --resume 'my runs/[a]'\n")
