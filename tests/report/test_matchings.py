"""One comparison under several matchings: differences side by side (review A5)."""

from __future__ import annotations

import pytest

from manyicl.comparison.comparison_file import check_comparison
from manyicl.errors import UserError
from manyicl.report.document import write_report
from manyicl.report.matchings import matching_tables, other_settings
from tests.support.comparison_data import make_comparison, write_comparison


def matched(match: str, **changes):
    content = make_comparison(num_seeds=5, num_tasks=5)
    config = f'seed = 0\n\n[compare]\nname = "{match}"\nmatch = "{match}"\n'
    return {**content, "match": match, "config": config, **changes}


@pytest.mark.slow
def test_differences_under_each_matching_stand_side_by_side(tmp_path):
    tokens, answers = matched("tokens"), matched("answers")
    for pair in answers["differences"]:
        if (pair["role"], pair["asked"], pair["b"]) == ("trained", "chosen", "few-shot"):
            pair |= {"difference": -0.002, "low": -0.03, "high": 0.026, "tasks": 3, "seeds": [-0.002] + [None] * 4}
    folders = [write_comparison(tmp_path / name, content) for name, content in (("a", tokens), ("b", answers))]
    page = write_report(folders[0], others=folders[1:])
    markdown = page.with_suffix(".md").read_text(encoding="utf-8").split("## Under each matching")[1].split("## ")[0]
    assert "| above | equal tokens | equal answers |" in markdown
    row = next(line for line in markdown.split("Trained tasks")[1].splitlines() if line.startswith("| Few-shot |"))
    assert "\N{MINUS SIGN}0.2 [\N{MINUS SIGN}3.0, +2.6] (3 tasks, 1 seed; answers \N{MULTIPLICATION SIGN}0.17" in row
    html = page.read_text(encoding="utf-8")
    assert '<h2 id="matchings-h">Under each matching</h2>' in html
    assert "Settings that differ too" not in html
    write_report(folders[0])
    assert "Under each matching" not in page.read_text(encoding="utf-8")


def test_settings_that_differ_besides_the_matching_are_named():
    config = 'seed = 0\n\n[compare]\nmatch = "answers"\n\n[train]\nnum_steps = 10\n'
    comparisons = [check_comparison(matched("tokens")), check_comparison(matched("answers", config=config))]
    assert other_settings(comparisons) == ["train.num_steps"]
    assert matching_tables(comparisons)[0].heads == ("equal tokens", "equal answers")


def test_arms_stand_beside_each_other_with_equal_shots_if_none_were_chosen_on_validation_rows():
    usual = [{"arm": "few-shot", "shots": 1}, {"arm": "manyicl", "shots": "fill"}]
    comparisons = [check_comparison(matched(match, chosen=usual)) for match in ("tokens", "answers")]
    judged = check_comparison(matched("answers"))
    told = [matching_tables(pair)[0].title for pair in (comparisons, [judged, comparisons[0]], [judged, judged])]
    assert [title.split(", ")[-1] for title in told] == ["most shots", "most shots", "chosen shots"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"match": "tokens"}, "b: is matched by tokens, as "),
        ({"shots": [0, 1]}, "b: has other shot counts than "),
        ({"tasks": make_comparison(num_seeds=5, num_tasks=5, seed=0)["tasks"][:4]}, "b: has other tasks than "),
    ],
)
def test_comparisons_that_asked_other_rows_are_refused(tmp_path, changes, told):
    folders = [
        write_comparison(tmp_path / "a", matched("tokens")),
        write_comparison(tmp_path / "b", matched("answers") | changes),
    ]
    with pytest.raises(UserError, match=told):
        write_report(folders[0], others=folders[1:])
    assert not (folders[0] / "report.html").exists()
