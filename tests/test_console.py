"""Issue 18, point 9: tables at 60 and 80 columns, of which nothing is cut or squeezed, and piped without boxes."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from manyicl.cli.tables.forecasts import forecast_table
from manyicl.cli.tables.results import audit_table, curve_plot, difference_table, evaluation_table
from manyicl.comparison.comparison_file import check_comparison
from manyicl.comparison.grid import open_comparison
from manyicl.console import Table, progress_bar, tell_rate, tell_signed, tell_signed_interval
from manyicl.planning.forecast import forecast_run
from manyicl.report.terminal import comparison_table, grid_table
from manyicl.training.recipe import load_recipe
from tests.cli.test_tables_of_results import AUDIT, cell, difference, evaluation
from tests.support.comparison_data import make_comparison
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.rendering import render, render_terminal

LOST = "cannot be trained: 60 of 60 rows lost (terminator inside the answer), more than 1%; set template.terminator"
NARROW = pytest.mark.parametrize("width", [60, 80])


def test_a_signed_number_has_a_real_minus_sign_and_none_if_it_rounds_to_zero():
    assert [tell_signed(x) for x in (3.24, -3.24, -0.04, 0.04, 0.0)] == ["+3.2", "−3.2", "0.0", "0.0", "0.0"]
    assert tell_signed(-0.0004, digits=3) == "0.000"


def test_an_end_of_an_interval_is_shown_as_zero_only_if_zero_is_in_it():
    assert tell_signed_interval(0.04, 4.69) == "[+0.04, +4.69]"
    assert tell_signed_interval(-4.69, -0.004) == "[−4.690, −0.004]"
    assert tell_signed_interval(-0.04, 4.69) == "[0.0, +4.7]"
    assert tell_signed_interval(0.0, 4.69) == "[0.0, +4.7]"


def test_rates_are_written_as_recipes_write_them():
    rates = (3e-4, 3e-5, 0.001, 2.5e-4, 0.01, 1.0, 0.0)
    assert [tell_rate(x) for x in rates] == ["3e-4", "3e-5", "1e-3", "2.5e-4", "1e-2", "1", "0"]


def words(text: str) -> str:
    """Return a text with its line breaks as blanks."""
    return " ".join(text.split())


def small_table(*, has_sentences: bool = False) -> Table:
    table = Table(title="Fruit", texts=("name",), numbers=("weight",), sentences="about" if has_sentences else None)
    if not has_sentences:
        table.add_column("about")
    table.add_row("apple", "120 g", "sweet")
    table.add_row("fig", "", "dries well")
    return table


def test_piped_it_is_lines_of_columns_without_boxes():
    assert render(small_table()) == (
        "Fruit\n"
        "name   weight  about\n"
        "apple   120 g  sweet\n"
        "fig         -  dries well\n"
    )  # fmt: skip


def test_on_a_terminal_it_has_boxes_if_it_fits():
    text = render_terminal(small_table(), width=40)
    assert "│ apple │  120 g │ sweet      │" in text
    assert text.startswith("Fruit\n")


def test_sentences_go_below_the_table_and_then_every_row_is_a_paragraph():
    below = render_terminal(small_table(has_sentences=True), width=25)
    assert "│ apple │  120 g │" in below
    assert below.endswith("apple: sweet\nfig: dries well\n")
    table = small_table(has_sentences=True)
    table.add_row("total", "120 g", "")
    assert render_terminal(table, width=25).endswith("fig: dries well\n")  # not "total: "
    assert render_terminal(small_table(has_sentences=True), width=15) == (
        "Fruit\napple\n  weight: 120 g\n  sweet\nfig\n  dries well\n"
    )
    assert render_terminal(small_table(), width=25) == (
        "Fruit\napple\n  weight: 120 g\n  about: sweet\nfig\n  about: dries well\n"
    )


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_progress_bar_leaves_its_numbers_whole_on_a_narrow_terminal(width):
    """At 40 columns "300/1000" was "300…"."""
    file = StringIO()
    with progress_bar(Console(file=file, width=width, force_terminal=True, color_system=None), total=1000) as bar:
        bar.update("group_dristebebrox: episode", 300, note="loss 1.25 (validation 1.31)")
        bar.progress.refresh()
    assert "300/1000" in file.getvalue()
    assert "-:--:--" in file.getvalue()
    assert "…" not in file.getvalue()


@NARROW
def test_every_verdict_of_check_can_be_read_trial_80(width):
    lost = replace(AUDIT, name="letters", blockers=(LOST,))
    text = render_terminal(audit_table([lost, AUDIT]), width=width)
    assert LOST in words(text)
    assert "…" not in text
    assert "\n  good\n" in text
    assert "read: 1,234; train: 1,000;" in words(text)


@NARROW
def test_every_score_and_difference_can_be_read(width):
    shots = tuple(cell(k, 0.5, low=0.25, high=0.875) for k in (0, 1, 4, 16, 64, 256))
    text = render_terminal(evaluation_table(evaluation(shots)), width=width)
    assert all(f"{k}: 50.0 [25, 88]" in text for k in (0, 1, 4, 16, 64, 256))
    assert "…" not in text
    assert "+4.1 [+1.2, +7.0]" in render_terminal(difference_table(difference()), width=width)
    render_terminal(curve_plot(evaluation(shots), width=width, colour=False), width=width)


@pytest.mark.slow
@NARROW
def test_plan_and_status_can_be_read(tmp_path, width):
    names = write_world(tmp_path)
    make_recipe(tmp_path, names, flips=True)
    config = open_comparison(tmp_path / "out", make_recipe(tmp_path, names))
    text = render_terminal(grid_table(config), width=width)
    assert "…" not in text
    assert all(word in words(text) for word in ("ManyICL", "few-shot FT", "validation", "train"))
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f'[tasks]\nfolder = "{tmp_path / "tasks"}"\n[model]\npath = "seed"\n[train]\nnum_steps = 2\n'
        "learning_rate = 1e-3\n[episodes]\ntoken_budget = 192\n"
    )
    forecast = forecast_run(load_recipe(recipe))
    text = render_terminal(forecast_table(replace(forecast, blockers=(LOST,))), width=width)
    assert f"in the way: {LOST}" in words(text)
    assert "…" not in text
    assert all(task.name in text for task in forecast.tasks)


@NARROW
def test_a_comparison_can_be_read(width):
    found = check_comparison(make_comparison(num_seeds=2, num_tasks=10))
    text = render_terminal(comparison_table(found), width=width)
    assert "…" not in text
    assert words(text).startswith(
        "For these runs (2 seeds): at equal training tokens, ManyICL answers 3 held-out tasks "
    )
    score = found.headline_score("base", "trained", "zero").score
    assert f"{100 * score:.1f}" in text
