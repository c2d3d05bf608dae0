"""The HTML page: one file that loads nothing, under a policy that would keep it from doing so."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from manyicl.comparison import Comparison, tell_flatness, tell_missing, tell_progress
from manyicl.intervals import MIN_SEEDS
from manyicl.report import tables, verdict
from manyicl.report.figures import draw_all, sparkline_top
from manyicl.report.matchings import matching_tables, other_settings
from manyicl.report.svg import Plots, make_environment, read_part


def render_page(comparison: Comparison, *, beside: Sequence[Comparison] = ()) -> str:
    """Return the whole page; the same comparison gives the same bytes.

    beside: the same comparison under other matchings (matchings.py).
    """
    plots = Plots()
    figures = draw_all(comparison, plots)
    style = f"{read_part('page.css')}\n{plots.style_sheet()}\n"
    script = read_part("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash_source(style)}'; script-src '{_hash_source(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    return _page_template().render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        matching_tables=matching_tables([comparison, *beside]) if beside else [],
        other_settings=other_settings([comparison, *beside]) if beside else [],
        **page_content(comparison, figures),
    )


@functools.cache
def _page_template() -> jinja2.Template:
    return make_environment(autoescape=True, lstrip_blocks=True).get_template("page.html.jinja")


def page_content(comparison: Comparison, figures: dict[str, Any]) -> dict[str, Any]:
    """Return all that the template shows."""
    columns, headline = tables.headline_table(comparison)
    return {
        "c": comparison,
        "tables": tables,
        "figures": figures,
        "verdict": verdict.tell_verdict(comparison),
        "facts": verdict.key_facts(comparison),
        "missing": tell_missing(comparison),
        "progress": tell_progress(comparison),
        "columns": columns,
        "groups": Counter(column.group for column in columns),
        "headline": headline,
        "mean_tables": {role: tables.mean_table(comparison, role) for role in comparison.roles},
        "mean_costs": tables.mean_costs(comparison),
        "task_rows": tables.task_rows(comparison),
        "overlap": tables.overlap_note(comparison),
        "partial_arms": tables.partial_arms(comparison),
        "sparkline_top": sparkline_top(comparison),
        "chosen": tables.chosen_words(comparison),
        "example_groups": tables.example_groups(comparison),
        "flatness": [(flat, tell_flatness(flat, title=comparison.title_of)) for flat in comparison.flatness],
        "told_pairs": [one for role in comparison.roles for one in verdict.told_pairs(comparison, role)],
        "paired_note": verdict.PAIRED_NOTE,
        "not_asked": verdict.tell_not_asked(comparison),
        "kinds_note": verdict.KINDS_NOTE,
        "intervals": verdict.tell_intervals(comparison),
        "any_enough": comparison.done_seeds[1] >= MIN_SEEDS,
    }


def _hash_source(text: str) -> str:
    """Return the source expression by which a Content-Security-Policy allows an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
