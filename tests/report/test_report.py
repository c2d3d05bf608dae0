"""The report is a pure function of comparison.json: its numbers, its gaps, its caution, and nothing from elsewhere."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from manyicl.cli.app import app
from manyicl.comparison.comparison_file import check_comparison, read_comparison, tell_missing
from manyicl.console import tell_seconds
from manyicl.errors import UserError
from manyicl.report.document import write_report
from manyicl.report.markdown import escape, render_markdown
from manyicl.report.numbers import (
    count_noun,
    join_words,
    tell_bits,
    tell_bytes,
    tell_change,
    tell_count,
    tell_interval,
    tell_percent,
    tell_points,
    tell_power,
    tell_times,
)
from manyicl.report.page import render_page
from manyicl.report.plots import spread_apart
from manyicl.report.tables import TableCell, headline_table, mean_table, task_rows
from manyicl.report.verdict import key_facts, tell_verdict
from tests.support.comparison_data import make_comparison, write_comparison

VOID = {"meta", "br", "wbr", "input", "link", "img", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&amp;|`"


class Page(HTMLParser):
    """The page's tables by the id of the section they stand in, its tags with attributes, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attributes.get("id") or ""
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if ("td" in self.open or "th" in self.open) and "svg" not in self.open:
            self.tables[self.section][-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return make_comparison(num_seeds=5)


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    return make_comparison(num_seeds=2, num_tasks=5)


@pytest.fixture(scope="module")
def rendered(content) -> str:
    return render_page(check_comparison(content))


@pytest.fixture(scope="module")
def page(rendered) -> Page:
    return Page(rendered)


def small(**changes: Any) -> dict[str, Any]:
    """Return a comparison that is quick to draw, with some of its entries replaced."""
    return {**make_comparison(num_seeds=5, num_tasks=5), **changes}


def known_numbers(value: Any) -> set[float]:
    """Return every number in the content, and the lengths of its lists."""
    if isinstance(value, dict):
        return {n for item in value.values() for n in known_numbers(item)}
    if isinstance(value, list):
        return {float(len(value))} | {n for item in value for n in known_numbers(item)}
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


@pytest.mark.slow
def test_every_number_in_the_tables_is_one_of_the_json(content, page):
    numbers = known_numbers(content)
    costs = content["costs"]
    for arm in content["arms"]:  # the costs' first table: means over the seeds
        mine = [c for c in costs if c["arm"] == arm["arm"]]
        for key in ("tokens", "targets", "flops", "wall_s"):
            values = [c[key] for c in mine if c[key] is not None]
            numbers |= {sum(values) / len(values)} if values else set()
        shares = ("answers", "train_rows"), ("target_rows", "train_rows"), ("head_tokens", "tokens")
        for part, whole in shares if arm["arm"] != "base" else ():
            values = [c[part] / c[whole] for c in mine]
            numbers |= {*values, sum(values) / len(values)}
    tells = (tell_percent, tell_points, tell_count, tell_power, tell_bytes, tell_seconds, tell_times, tell_bits)
    shown = {tell(n) for n in numbers for tell in tells} | {tell_bits(n, signed=True) for n in numbers}
    shown |= {f"{n:g}" for n in numbers} | {tell_percent(n).replace("−", "") for n in numbers} | {"1.40"}
    number_pattern = r"(?<![\w.])[+−]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\w)"
    words = {word for text in shown for word in re.findall(number_pattern, text)}
    checked = 0
    for section, tables in page.tables.items():
        if section in ("origin", "examples"):
            continue  # hashes, and texts of the data
        for table in tables:
            for row in table[1:]:
                for cell in row[1:]:
                    for number in re.findall(number_pattern, cell):
                        assert number in words, f"{number} of {row} is none of the file's"
                        checked += 1
    assert checked > 2000


def test_a_number_that_is_not_in_the_json_would_be_found(content):
    assert 0.123456 not in known_numbers(content)
    assert content["curves"][0]["score"] in known_numbers(content)


def test_the_first_table_has_one_row_an_arm_and_a_dash_for_what_is_null(content, page):
    head, second, *rows = page.tables["scores"][0]
    groups = ["Trained tasks, %", "Held-out tasks, %", "Forgetting, bits per byte", "Forgetting, points"]
    assert head == ["Arm", *groups]
    assert second[:3] == ["chosen shots", "0 shots", "most shots (64)"]
    assert [row[0] for row in rows] == ["Base", "Zero-shot", "Few-shot", "ManyICL", "Dedicated"]
    cell = next(c for c in content["headline"] if (c["arm"], c["role"], c["asked"]) == ("manyicl", "trained", "chosen"))
    interval = f"[{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    assert rows[3][1].split() == [f"{100 * cell['score']:.1f}", *interval.split(), "k", "=", "64"]
    assert rows[4][4:7] == ["–", "–", "–"]  # dedicated models answer no held-out task


def test_bold_stands_only_where_the_comparison_says_best(content, rendered):
    comparison = check_comparison(content)
    wanted = {(c.arm, c.role, c.asked) for c in comparison.headline if c.best}
    assert wanted == {("manyicl", "trained", "most"), ("manyicl", "held-out", "most")}
    assert rendered.count('class="num best') == len(wanted)


@pytest.mark.slow
def test_with_few_seeds_each_seed_is_shown_and_the_words_are_about_these_runs(few):
    rendered = render_page(check_comparison(few))
    page = Page(rendered)
    assert 'class="num best' not in rendered
    cell = next(c for c in few["headline"] if (c["arm"], c["role"], c["asked"]) == ("base", "trained", "zero"))
    each = " · ".join(f"{100 * score:.1f}" for score in cell["seeds"])
    assert each in page.tables["scores"][0][2][2].replace("\N{NO-BREAK SPACE}", " ")
    assert tell_verdict(check_comparison(few)).startswith("For these runs (2 seeds): ")
    assert "No arm is called best with fewer than five seeds" in page.text


def pair(other: str, low: float, high: float, **changes: Any) -> dict[str, Any]:
    entry = {"role": "held-out", "tasks": 4, "a": "manyicl", "b": other, "asked": "chosen", "shots_a": 64, "shots_b": 4}
    ends = {"difference": (low + high) / 2, "low": low, "high": high, "seeds": [0.1] * 5, "sentence": ""}
    return {**entry, **ends, **changes}


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        (
            [pair("zero-shot", 0.10, 0.12), pair("few-shot", 0.02, 0.04)],
            "At equal training tokens, ManyICL answers 4 held-out tasks better than Zero-shot and Few-shot, by 3.0 to"
            " 11.0 points.",
        ),
        (
            [pair("zero-shot", -0.01, 0.02), pair("few-shot", -0.02, 0.04)],
            "At equal training tokens, no difference between ManyICL and Zero-shot or Few-shot can be shown on 4"
            " held-out tasks.",
        ),
        (
            [pair("base", 0.1, 0.3), pair("few-shot", -0.06, -0.02), pair("zero-shot", -0.01, 0.03)],
            "At equal training tokens, ManyICL answers 4 held-out tasks worse than Few-shot, by 4.0 points; no"
            " difference from Zero-shot can be shown. It answers 4 held-out tasks better than Base, which is not"
            " trained, by 20.0 points.",
        ),
        (
            [pair("zero-shot", 0.1, 0.3), pair("few-shot", -0.06, -0.02)],
            "At equal training tokens, ManyICL answers 4 held-out tasks better than Zero-shot, by 20.0 points, but"
            " worse than Few-shot, by 4.0 points.",
        ),
        (
            [pair("base", 0.1, 0.2, a="base", b="manyicl")],
            "ManyICL answers 4 held-out tasks worse than Base, which is not trained, by 15.0 points.",
        ),
        (
            [{**pair("base", 0.1, 0.2), "low": None, "high": None}],  # no interval: nothing is told, however large
            "No difference between ManyICL and Base, which is not trained, can be shown on 4 held-out tasks.",
        ),
        ([], "No verdict: no two arms have answered the same queries."),
    ],
)
def test_the_verdict_is_no_stronger_than_the_differences(pairs, verdict):
    assert tell_verdict(check_comparison(small(differences=pairs))) == verdict


def test_without_an_arm_named_manyicl_the_verdict_is_about_the_best_of_those_trained_alike():
    content = small()
    content = json.loads(json.dumps(content).replace('"manyicl"', '"mine"'))
    assert tell_verdict(check_comparison(content)).startswith("At equal training tokens, ManyICL answers")
    for arm in content["arms"]:
        arm["matched"] = arm["arm"] != "mine"  # a ceiling is no contender
    assert tell_verdict(check_comparison(content)).startswith(
        "No verdict: no arm that is matched to Few-shot has answered"
    )


def test_facts_name_flat_curves_and_forgetting(content):
    facts = dict(key_facts(check_comparison(content)))
    assert facts["More shots"] == (
        "The score of ManyICL on held-out tasks rises by 24.3 points [+21.3, +27.3] from 1 shot to 64 shots."
    )
    lost = next(c for c in content["forgetting"]["text"] if (c["arm"], c["file"]) == ("few-shot", "prose.txt"))
    told = f"Few-shot +{lost['difference']:.3f} [+{lost['low']:.3f}, +{lost['high']:.3f}]"
    assert told in facts["Forgetting, text"]


@pytest.mark.slow
def test_a_flat_curve_is_tagged():
    content = small()
    content["flatness"][0] |= {"flat": True, "difference": 0.001, "low": -0.02, "high": 0.022}
    page = render_page(check_comparison(content))
    assert '<span class="tag">flat</span>The score of Base on trained tasks is flat (+0.1 points' in page
    assert "Base  +0.1, flat" in page  # in the plot


@pytest.mark.slow
def test_a_change_that_may_be_chance_is_not_called_flat():
    content = small()
    content["flatness"][0] |= {"flat": True, "difference": 0.2, "low": -0.05, "high": 0.45}
    page = render_page(check_comparison(content))
    assert '<span class="tag">may be chance</span>The score of Base on trained tasks rises by 20.0 points' in page
    assert "Base  +20.0, may be chance" in page


@pytest.mark.slow
def test_a_mean_over_fewer_tasks_stands_in_no_plot_beside_means_over_all():
    content = small()
    content["means"] = [{**m, "tasks": 1} if m["arm"] == "dedicated" else {**m, "tasks": 2} for m in content["means"]]
    content["headline"] = [h for h in content["headline"] if h["arm"] != "dedicated"]
    page = Page(render_page(check_comparison(content)))
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("class") == "plot"]
    about = next(label for label in labels if label.startswith("Score against shots, Trained tasks, mean of 2:"))
    assert "ManyICL" in about
    assert "Dedicated" not in about
    assert "Not in this table: Dedicated (asked on 1 task only); see the paired differences." in page.text
    curves = page.tables["curves"][0]
    assert next(row for row in curves if row[0] == "Dedicated")[1].endswith("1 task")


def test_differences_with_the_same_shots_are_told_once_and_name_every_way_of_asking():
    """Chosen shots, most shots and the same shots had three equal sentences."""
    own = {"shots_a": "fill", "shots_b": "fill", "shots_by_task": {"a": ["fill", "fill"]}}
    pairs = [pair("few-shot", 0.02, 0.04, asked=asked, **own) for asked in ("chosen", "most", "each")]
    pairs += [pair("few-shot", -0.02, 0.04, asked=asked, shots_a=0, shots_b=0) for asked in ("zero", "each")]
    comparison = check_comparison(small(differences=pairs))
    told = render_markdown(comparison).partition("### Held-out tasks")[2].partition("##")[0]
    assert [line for line in told.splitlines() if line] == [
        r"- With as many shots as fit (the chosen number and the most), ManyICL is better than Few-shot by 3.0 points"
        r" \[+2.0, +4.0\] on 4 held-out tasks, over 5 seeds.",
        r"- At 0 shots, no difference between ManyICL and Few-shot can be shown on 4 held-out tasks: +1.0"
        r" \[−2.0, +4.0\], over 5 seeds.",
    ]
    shots = [row[1] for row in Page(render_page(comparison)).tables["differences"][0][1:]]
    assert shots == ["chosen shots and most shots (fill)", "0 shots"]


def test_a_mean_is_marked_as_extrapolated_if_most_of_its_tasks_are():
    """ManyICL's fill was starred for two tasks of eight, where a draw had a few shots more than training."""
    content = small()
    mean = next(m for m in content["means"] if (m["arm"], m["role"], m["shots"]) == ("manyicl", "trained", 64))
    names = [task["task"] for task in content["tasks"] if task["role"] == "trained"]
    curves = {p["task"]: p for p in content["curves"] if (p["arm"], p["shots"]) == ("manyicl", 64)}
    assert (mean["tasks"], mean["family"], len(names)) == (3, None, 3)

    def shown(*extrapolated: str) -> TableCell:
        for name in names:
            curves[name]["extrapolated"] = name in extrapolated
        mean["extrapolated"] = bool(extrapolated)
        shots, rows = mean_table(check_comparison(content), "trained")
        return next(cells[shots.index(64)] for arm, cells in rows if arm.arm == "manyicl")

    score = f"{100 * mean['score']:.1f}"
    assert (shown().text, shown().notes) == (score, ())
    assert (shown(names[0]).text, shown(names[0]).notes) == (score, ("* on 1 of 3 tasks",))
    assert (shown(*names[:2]).text, shown(*names[:2]).notes) == (f"{score}*", ("* on 2 of 3 tasks",))
    assert (shown(*names).text, shown(*names).notes) == (f"{score}*", ())


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0.1, 30))
def test_labels_are_spread_apart_in_their_order(places, space):
    spread = spread_apart(sorted(places), space=space, lowest=-200.0)
    assert all(b - a >= space - 1e-6 for a, b in pairwise(spread))
    if all(b - a >= space for a, b in pairwise(sorted(places))):
        assert spread == pytest.approx(sorted(places), abs=1e-6)  # nothing moves that need not


def test_labels_are_moved_as_little_as_they_must_be_and_not_below_the_plot():
    assert spread_apart([0.0, 0.0, 9.0], space=2.0, lowest=-5.0) == [-1.0, 1.0, 9.0]
    assert spread_apart([0.0, 0.0], space=2.0, lowest=0.0) == [0.0, 2.0]


@pytest.mark.slow
def test_drift_is_the_mean_over_seeds_at_each_step_and_begins_where_all_arms_do():
    content = small()
    points = [(0, 0, 0, 1.0), (1, 0, 0, 1.0), (0, 5, 990, 1.2), (1, 5, 1010, 1.4)]
    for point in content["forgetting"]["drift"]:
        point["bits_per_byte"] = None
    content["forgetting"]["drift"] += [
        {"arm": "manyicl", "seed": seed, "step": step, "tokens": tokens, "file": "prose.txt", "bits_per_byte": value}
        for seed, step, tokens, value in points
    ]
    page = Page(render_page(check_comparison(content)))
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("class") == "plot"]
    assert "Bits per byte of prose.txt over training: ManyICL from 1.000 to 1.300." in labels


@pytest.mark.slow
def test_hostile_texts_are_shown_and_run_nowhere(tmp_path):
    content = small()
    for key in ("name", "device", "git_commit", "config"):
        content[key] = HOSTILE
    content["arms"][0] |= {"title": HOSTILE, "about": HOSTILE}
    old = content["tasks"][0]["task"]
    text = json.dumps(content).replace(json.dumps(old)[1:-1], "[x](javascript:alert(1))<img src=x onerror=y>")
    content = json.loads(text)
    content["examples"][0] |= {"input": HOSTILE, "answer": HOSTILE, "predictions": {"base": HOSTILE}}
    write_report(write_comparison(tmp_path, content))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert HOSTILE in "".join(page.words)
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert handlers == []
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8").split("```toml")[0]
    assert "<img" not in markdown
    assert "<script" not in markdown
    assert not re.search(r"(?<!\\)\]\(", markdown)


def test_nothing_in_the_page_loads_from_anywhere(rendered, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "audio", "video", "source")
        assert not {"src", "srcset", "style", "xlink:href"} & set(attributes)
        for name in ("href", "clip-path"):
            assert (attributes.get(name) or "#").startswith(("#", "url(#"))
    style = re.search(r"<style>(.*?)</style>", rendered, re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|http", style[1])
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert len(rendered) < 1_500_000


def test_ids_are_unique_and_every_link_leads_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for _, a in page.tags if a.get("href")]
    assert len(targets) > 50
    assert set(targets) <= set(ids)


def test_plots_and_tables_can_be_read_by_those_who_do_not_see_them(page):
    plots = [a for tag, a in page.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(plots) > 50
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    assert all(a.get("scope") for tag, a in page.tags if tag == "th")
    labels = [a["aria-label"] for a in plots if a["class"] == "plot"]
    for unit in (
        "score, %",
        "shots (log scale)",
        "bits per byte",
        "million tokens trained on",
        "nats per answer token",
    ):
        assert unit in page.text
    assert any(label.startswith("Score against shots, Trained tasks, mean of 15: Base from ") for label in labels)


@pytest.mark.slow
def test_what_is_missing_of_an_unfinished_comparison_stands_on_top(rendered):
    assert "Not finished" not in rendered
    content = make_comparison(num_seeds=2, num_tasks=5, finished=False)
    comparison = check_comparison(content)
    told = dict(tell_missing(comparison))
    assert list(told) == ["Dedicated, seed 1"]
    assert told["Dedicated, seed 1"].startswith("training 7 of 18 done; validation not begun; test answers")
    text = render_page(comparison)
    assert text.index("Not finished: ") < text.index("Dedicated, seed 1") < text.index('class="verdict"')
    assert tell_verdict(comparison).startswith("So far, and unfinished, for these runs (2 seeds): ")
    markdown = render_markdown(comparison)
    assert markdown.index("Dedicated, seed 1") < markdown.index("## Scores")


@pytest.mark.slow
def test_whether_arms_know_when_they_are_right_is_a_section_of_its_own():
    content = small()
    arm = content["arms"][0]
    entry = {
        "arm": arm["arm"],
        "role": "held-out",
        "tasks": 3,
        "num_answers": 600,
        "mean": 0.913,
        "score": 0.702,
        "ece": 0.211,
        "low": 0.187,
        "high": 0.236,
        "aurc": 0.154,
        "bins": [
            {"confidence": 0.6, "score": 0.5, "num_answers": 300},
            {"confidence": 0.99, "score": 0.9, "num_answers": 300},
        ],
        "coverage": [
            {"threshold": 0.0, "coverage": 1.0, "score": 0.702},
            {"threshold": 0.9, "coverage": 0.5, "score": 0.9},
            {"threshold": 0.99, "coverage": 0.0, "score": None},
        ],
    }
    comparison = check_comparison({**content, "confidence": [entry]})
    page = Page(render_page(comparison))
    [head, row] = page.tables["confidence"][0]
    assert head[-2:] == ["Calibration error, %", "AURC, %"]
    assert row == [arm["title"], "held-out", "3", "91.3", "70.2", "21.1 [18.7, 23.6]", "15.4"]
    assert "Reliability, held-out tasks" in page.text
    assert "If unsure queries get no answer, held-out tasks" in page.text
    markdown = render_markdown(comparison).replace("\\", "")
    assert f"| {arm['title']} | held-out | 3 | 91.3 | 70.2 | 21.1 [18.7, 23.6] | 15.4 |" in markdown
    assert "know when it is right" not in Page(render_page(check_comparison(content))).text


def test_a_comparison_of_nothing_yet_is_a_page_too(tmp_path):
    content = small(finished=False)
    for key in ("costs", "trials", "chosen", "curves", "means", "headline", "differences", "flatness", "shot_losses"):
        content[key] = []
    content |= {"flips": [], "orders": [], "examples": [], "forgetting": {"window_tokens": 512, "bos": True}}
    content["forgetting"] |= {"text": [], "tasks": [], "drift": []}
    write_report(write_comparison(tmp_path, content))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No verdict yet" in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.slow
def test_every_null_is_drawn_and_told_as_missing():
    content = small()
    for key in ("curves", "means", "headline", "differences", "flatness"):
        for entry in content[key]:
            for name in ("score", "difference", "low", "high", "nll", "worst_draw", "best_draw", "majority_score"):
                if name in entry:
                    entry[name] = None
            entry["seeds"] = [None] * 5
    page = Page(render_page(check_comparison(content)))
    assert {cell.split(" ")[0] for row in page.tables["scores"][0][2:] for cell in row[1:7]} == {"–"}
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.slow
def test_the_same_comparison_gives_the_same_bytes():
    comparison = check_comparison(small())
    assert render_page(comparison) == render_page(comparison)
    assert render_markdown(comparison) == render_markdown(comparison)


def test_drops_cuts_and_copies_are_told(content):
    rows = {row.task.task: row for row in task_rows(check_comparison(content))}
    assert rows["classification_amber_00"].notes == [
        "3 rows dropped: answer contains the terminator",
        "11 rows dropped: too long",
        "5 test rows do not fit after its most shots: left out at every k",
    ]
    assert "among the shots: 1 copy and 4 near copies of its queries" in rows["classification_birch_05"].notes
    assert any(note.startswith("no arm has a score at 64 shots") for note in rows["summarization_amber_03"].notes)


@pytest.mark.slow
def test_tasks_that_are_not_evaluated_are_named_in_a_sentence_instead_of_rows_of_dashes():
    content = small()
    content["tasks"] += [{**content["tasks"][0], "task": name, "asked": False} for name in ("one", "two")]
    comparison = check_comparison(content)
    told = "Trained on but not evaluated are one and two."
    assert told in render_markdown(comparison)
    assert "| one |" not in render_markdown(comparison)
    page = Page(render_page(comparison))
    assert told in page.text
    assert not {"one", "two"} & {row[0] for row in page.tables["tasks"][0]}


@pytest.mark.slow
def test_metrics_beside_the_main_one_have_a_table_for_each_task(content):
    comparison = check_comparison(content)
    cells = [c for c in content["curves"] if (c["arm"], c["task"]) == ("manyicl", "qa_amber_02")]
    shown = [tell_percent(cell["other_scores"]["token_f1"]) for cell in cells]
    page, markdown = render_page(comparison), render_markdown(comparison)
    assert ["ManyICL", "token_f1", *shown] in [row for table in Page(page).tables["tasks"] for row in table]
    part = markdown.split("### qa\\_amber\\_02: other metrics in %")[1]
    line = next(line for line in part.splitlines() if line.startswith("| ManyICL |"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [r"token\_f1", *shown]
    for metric in ("macro_f1", "rouge_1", "rouge_2"):
        assert metric in page
        assert escape(metric) in markdown


def test_markdown_has_the_same_first_table(content):
    comparison = check_comparison(content)
    markdown = render_markdown(comparison)
    _, rows = headline_table(comparison)
    for arm, cells in rows:
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {arm.title} |"))
        assert all(cell.text in line for cell in cells)
    assert "**" + rows[3][1][2].text + "**" in markdown
    assert '```toml\nname = "world-five-arms"' in markdown


def test_markdown_shows_texts_as_they_are():
    assert escape("a|b *c* <i> `d` [e](f)\ng") == r"a\|b \*c\* &lt;i&gt; \`d\` \[e\](f) g"


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (lambda path: path.write_text("{"), "is not JSON (Expecting property name"),
        (lambda path: path.write_text("{"), "; manyicl compare --resume "),
        (lambda path: path.write_text("[]"), "has no schema, not 1 or 2"),
        (lambda path: path.write_text('{"schema": 3}'), "has schema 3, not 1 or 2"),
        (lambda path: path.write_text('{"schema": 1}'), "name: Field required"),
        (
            lambda path: path.write_text(json.dumps(small(shots=["many"]))),
            "shots.0.int: Input should be a valid integer, unable to parse string as an integer, found 'many'",
        ),
    ],
)
def test_a_file_that_is_no_comparison_is_one_line(tmp_path, write, told):
    write(tmp_path / "comparison.json")
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "comparison.json") in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_verb_writes_both_files_anew(tmp_path):
    write_comparison(tmp_path, small())
    (tmp_path / "report.html").write_text("old")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "report.html", "report.md"]


def test_fields_of_a_newer_version_are_no_error():
    content = copy.deepcopy(small())
    content["new"] = 1
    content["curves"][0]["new"] = 1
    assert check_comparison(content).name == "world-five-arms"


def test_numbers_are_told_with_units_signs_and_dashes():
    assert [tell_percent(x) for x in (0.5432, 0.0, None, float("nan"))] == ["54.3", "0.0", "–", "–"]
    assert [tell_points(x) for x in (0.0123, -0.0123, 0.0001, None)] == ["+1.2", "−1.2", "0.0", "–"]
    assert [tell_bits(x, signed=True) for x in (0.0481, -0.0481, 0.0)] == ["+0.048", "−0.048", "0.000"]
    counts = (1234567, 0, 2.5, 45053.7, None)
    assert [tell_count(x) for x in counts] == ["1,234,567", "0", "2.5", "45,054", "–"]
    assert [tell_power(x) for x in (5.2e13, 999, None)] == ["5.20 × 10¹³", "999", "–"]
    assert [tell_seconds(x) for x in (3.21, 412.7, 7322, None)] == ["3.2 s", "6.9 min", "2 h 02 min", "–"]
    assert [tell_bytes(x) for x in (3.4e9, 5e6, None)] == ["3.4 GB", "5 MB", "–"]
    assert tell_interval(0.1, 0.2) == "[10.0, 20.0]"
    assert tell_interval(None, 0.2) == ""
    assert tell_interval(-0.001, 0.0004, unit="points") == "[−0.1, 0.0]"
    assert join_words(["a", "b", "c"]) == "a, b and c"
    assert [count_noun(n, "copy") for n in (1, 2)] == ["1 copy", "2 copies"]


def test_an_interval_that_excludes_zero_is_seen_to_exclude_it():
    """An arm was "better by 2.4 points [+0.0, +4.7]"."""
    ends = {"low": 0.0004, "high": 0.0469}
    assert tell_interval(**ends, unit="points") == "[+0.04, +4.69]"
    assert tell_change(0.0237, **ends, unit="points") == "+2.37"  # as many decimals as its interval
    assert tell_interval(-0.0469, -0.00004, unit="points") == "[−4.690, −0.004]"
    assert tell_interval(0.0002, 0.0131, unit="bits") == "[+0.0002, +0.0131]"
    assert tell_interval(-0.0004, 0.0469, unit="points") == "[0.0, +4.7]"  # zero is in it


def test_read_comparison_reads_what_was_written(tmp_path, content):
    assert read_comparison(write_comparison(tmp_path, content)) == check_comparison(content)


def lightness_contrast(colours: dict[str, str], ink: str, paper: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("number", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_paper(number):
    sheet = (Path(__file__).parents[2] / "src/manyicl/report/page.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", re.findall(r":root\{([^}]*)\}", sheet)[number]))
    for text in ("ink", "muted", "accent", "good"):
        assert lightness_contrast(colours, text, "paper") >= 4.5
    assert lightness_contrast(colours, "warn-ink", "warn-paper") >= 4.5
    for place in range(8):
        assert lightness_contrast(colours, f"arm-{place}", "paper") >= 3


@pytest.mark.slow
def test_what_whole_prompts_cost_is_told_below_the_verdict(content):
    """Issue 16, fault 1: the terminal, the page and the Markdown say how much slower the plain path was."""
    path = {"processed_tokens": 120_000, "shared_tokens": 4_000, "fault": "keeps a state"}
    comparison = check_comparison({**content, "plain_path": path})
    sentence = (
        "Every prompt was processed as a whole because the model keeps a state: 120,000 tokens, 30.0 times the 4,000 of"
        " shared shots, about as many times slower."
    )
    assert ("Evaluation", sentence) in key_facts(comparison)
    assert f"- Evaluation: {sentence}" in render_markdown(comparison)
    assert sentence in render_page(comparison)
    assert "Evaluation" not in dict(key_facts(check_comparison(content)))
