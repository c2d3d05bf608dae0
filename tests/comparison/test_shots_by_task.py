"""Each task has its own shots: chosen, most, and `fill`; no task takes a number of shots from the others (A7, B9)."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyicl.comparison.comparison_file import Comparison, check_comparison, read_comparison, write_comparison
from manyicl.comparison.grid import open_comparison
from manyicl.comparison.scores import list_differences, list_flatness, list_headline, list_means
from manyicl.comparison.summary import summarize
from manyicl.comparison.worker import run_comparison
from manyicl.evaluation.shots import FILL, cap_shots, sort_shots, tell_shot_count
from manyicl.report.document import write_report
from manyicl.report.markdown import render_markdown
from manyicl.report.tables import tell_shorter_means
from manyicl.report.terminal import comparison_plot
from manyicl.report.verdict import tell_verdict
from tests.support.comparison_data import make_comparison
from tests.support.comparison_results import Curves, ask, level, make_findings
from tests.support.comparison_setting import make_recipe, write_world


def keep_train_rows(file: Path, count: int) -> None:
    """Leave a task's first train rows and all others."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    train = [row for row in rows if row["split"] == "train"][:count]
    kept = [*train, *(row for row in rows if row["split"] != "train")]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def run(folder: Path, *, short: dict[int, int], **compare: Any) -> Comparison:
    """Run 4 trained tasks and 1 held-out one, number 4. short: number of a task -> how many train rows it keeps."""
    trained, held_out, _ = write_world(folder)
    names = [*trained, held_out[0]]
    for number, count in short.items():
        keep_train_rows(next((folder / "tasks").glob(f"{names[number]}.jsonl")), count)
    config = make_recipe(
        folder,
        (trained, held_out[:1], []),
        episodes={"token_budget": 512},
        train={"num_steps": 1, "pack_tokens": 512},
        **{
            "arms": ["base", "manyicl"], "seeds": [0], "asked_tasks": 0, "dedicated_tasks": [], "text_files": [],
            "queries": 4, "validation_queries": 4, **compare,
        },
    )  # fmt: skip
    grid = open_comparison(folder / "out", config)
    run_comparison(grid, console=Console(file=StringIO()))
    found = summarize(grid)
    write_comparison(grid.folder, found)
    assert found.finished
    return found


@pytest.fixture(scope="module")
def short_held_out(tmp_path_factory) -> Comparison:
    """Review A7, its first case: the one held-out task has 12 train rows, and 16 shots are asked."""
    folder = tmp_path_factory.mktemp("short")
    return run(folder, short={4: 12}, shots=[1, 16])


@pytest.mark.slow
def test_a_held_out_task_with_too_few_rows_is_asked_with_its_own_chosen_and_most_shots(short_held_out):
    rows = {(row.arm, row.role, row.asked): row for row in short_held_out.headline}
    for arm in ("base", "manyicl"):
        for asked in ("chosen", "most"):
            assert (rows[arm, "held-out", asked].shots, rows[arm, "held-out", asked].tasks) == (1, 1)
        assert (rows[arm, "trained", "most"].shots, rows[arm, "trained", "most"].tasks) == (16, 4)
    assert short_held_out.schema_version == 2


@pytest.mark.slow
def test_the_verdict_is_made_from_numbers_that_are_there(short_held_out):
    """With all work done it was first "Nothing can be told yet", and then not of the chosen shots."""
    verdict = tell_verdict(short_held_out)
    assert "1 held-out task" in verdict
    assert not verdict.startswith(("Nothing", "No verdict"))
    assert "there is nothing to compare" not in verdict


@pytest.mark.slow
def test_flips_and_orders_take_each_tasks_own_most(short_held_out):
    for rows in (short_held_out.flips, short_held_out.orders):
        shots = {(row.arm, row.role): row.shots for row in rows}
        assert shots["manyicl", "trained"] == 16
    flips = {row.role: row.shots for row in short_held_out.flips}
    assert flips.get("held-out", 1) == 1
    assert all(row.role == "trained" for row in short_held_out.orders)  # one shot has one order


@pytest.mark.slow
def test_a_comparison_that_is_read_back_is_written_with_the_same_bytes(short_held_out, tmp_path):
    """The writer and the reader share one schema, so no key and no number is lost between them."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_comparison(tmp_path / "a", short_held_out)
    found = read_comparison(tmp_path / "a")
    assert found == short_held_out
    write_comparison(tmp_path / "b", found)
    assert (tmp_path / "a" / "comparison.json").read_bytes() == (tmp_path / "b" / "comparison.json").read_bytes()


@pytest.mark.slow
def test_a_report_is_written_and_says_where_a_mean_has_fewer_tasks(tmp_path):
    """Review B9, and A7's second case: of four trained tasks one has only two train rows."""
    found = run(tmp_path, short={0: 2}, shots=[0, 1, 4, FILL], flips=False, orders=False)
    rows = {(row.arm, row.role, row.asked): row for row in found.headline}
    most = rows["manyicl", "trained", "most"]
    assert (most.shots, most.tasks, set(most.shots_by_task.values())) == (FILL, 4, {FILL})
    means = {(m.arm, m.shots): m.tasks for m in found.means if (m.role, m.family) == ("trained", None)}
    assert [means["manyicl", k] for k in (0, 1, 4, FILL)] == [4, 4, 3, 4]
    page = write_report(tmp_path / "out")
    markdown = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "(3 tasks)" in markdown.split("## Trained tasks: score in % against shots")[1].split("##")[0]
    told = "not drawn, since not every task allows so many: 4 shots (3 of 4 tasks)"
    assert told in page.read_text(encoding="utf-8")
    assert "left out at every k" not in markdown  # its queries are asked at the numbers of shots that it allows
    terminal = StringIO()
    Console(file=terminal, width=200).print(comparison_plot(read_comparison(tmp_path / "out"), colour=False))
    assert told in terminal.getvalue()
    (short,) = [task.task for task in found.tasks if task.num_train == 2]
    filled = {point.task: point.mean_shots for point in found.curves if point.shots == FILL}
    assert filled.pop(short) == 2
    assert min(filled.values()) > 4


ROLES = {"trained": ["long", "short"], "held-out": ["new"], "familiar": []}


def one_task_of_each_kind(score: float) -> Curves:
    """`long` and `new` were asked with 0, 1, 4 and 16 shots, `short` with 0 and 1."""
    asked = {"long": (0, 1, 4, 16), "new": (0, 1, 4, 16), "short": (0, 1)}
    return [curve for name, shots in asked.items() for curve in ask(level(score), shots=shots, task=name)]


def validated(by_task: dict[str, dict[int, float]]) -> Curves:
    """Return validation curves: task -> shots -> score."""
    return [
        curve
        for name, scores in by_task.items()
        for curve in ask(lambda k, s, d, q, scores=scores: scores[k], shots=tuple(scores), task=name)
    ]


def find(folder: Path, validation: dict[str, dict[int, float]]) -> Any:
    tests = {arm: [one_task_of_each_kind(score)] for arm, score in (("base", 0.2), ("manyicl", 0.6))}
    chosen_by = {arm: [validated(validation)] for arm in tests}
    return make_findings(folder, tests, shots=(0, 1, 4, 16), roles=ROLES, validation=chosen_by)


CURVES = {"long": {0: 0.1, 1: 0.2, 4: 0.9, 16: 0.9}, "short": {0: 0.5, 1: 0.4}}


def test_a_task_takes_the_shots_that_are_best_on_its_own_validation_rows_the_fewest_of_equals(tmp_path):
    chosen = find(tmp_path, CURVES).chosen["manyicl"]
    assert (chosen.by_task["long"], chosen.by_task["short"]) == (4, 0)


def test_a_new_task_takes_the_arms_shots_to_which_a_short_task_adds_the_most_it_was_asked_with(tmp_path):
    """Means: (.1 + .5) / 2, (.2 + .4) / 2, (.9 + .4) / 2 twice: 4 shots, the fewest of equals."""
    chosen = find(tmp_path, CURVES).chosen["manyicl"]
    assert [(one.shots, round(one.score, 6)) for one in chosen.scores] == [
        (0, 0.3),
        (1, 0.3),
        (4, 0.65),
        (16, 0.65),
    ]
    assert (chosen.shots, chosen.by_task["new"]) == (4, 4)


def test_without_validation_an_arm_of_filled_episodes_is_asked_with_as_many_as_fit(tmp_path):
    asked = {arm: [one_task_of_each_kind(0.5)] for arm in ("base", "zero-shot", "manyicl")}
    findings = make_findings(tmp_path, asked, shots=(0, 1, 4, 16, FILL), roles=ROLES)
    assert {arm: one.shots for arm, one in findings.chosen.items()} == {"base": FILL, "zero-shot": 0, "manyicl": FILL}
    assert findings.chosen["base"].by_task == {"long": 16, "short": 1, "new": 16}


def test_the_shots_of_a_new_task_are_capped_to_the_next_lower_that_it_was_asked_with():
    assert [cap_shots(k, [1, 4, 16]) for k in (0, 1, 3, 15, 16, FILL)] == [1, 1, 1, 4, 16, 16]


def test_pairs_and_columns_have_each_tasks_own_shots(tmp_path):
    findings = find(tmp_path, CURVES)
    rows = {(row.arm, row.role, row.asked): row for row in list_headline(findings)}
    chosen = rows["manyicl", "trained", "chosen"]
    assert (chosen.shots, chosen.shots_by_task, chosen.tasks) == (None, {"long": 4, "short": 0}, 2)
    assert rows["manyicl", "trained", "most"].shots_by_task == {"long": 16, "short": 1}
    assert rows["manyicl", "held-out", "most"].shots == 16
    found = {(row.role, row.asked, row.shots_a): row for row in list_differences(findings)}
    pair = found["trained", "most", None]
    assert pair.shots_by_task == {"long": (16, 16), "short": (1, 1)}
    assert pair.sentence.startswith(
        "With each task's most shots, no difference between ManyICL and base can be shown on 2 trained tasks: "
    )
    assert (found["trained", "each", 1].tasks, found["trained", "each", 16].tasks) == (2, 1)


def test_a_mean_says_how_many_tasks_it_holds_and_flatness_leaves_out_a_task_with_one_number_of_shots(tmp_path):
    findings = find(tmp_path, CURVES)
    means = [m for m in list_means(findings) if (m.arm, m.role, m.family) == ("base", "trained", None)]
    assert [(m.shots, m.tasks) for m in means] == [(0, 2), (1, 2), (4, 1), (16, 1)]
    flat = next(row for row in list_flatness(findings) if (row.arm, row.role) == ("base", "trained"))
    assert (flat.tasks, flat.from_shots, flat.to_shots) == (1, 1, 16)


def test_the_number_of_shots_that_an_arm_is_trained_with_is_always_asked(tmp_path):
    """Review B7: with few_shot_shots = 5 and shots = 0, 1, 4, 16, 64 it was never asked as it was trained."""
    names = write_world(tmp_path)
    with_it = make_recipe(tmp_path, names, arms=["base", "few-shot"], few_shot_shots=5, shots=[0, FILL, 16])
    assert open_comparison(tmp_path / "out", with_it).shots == [0, 5, 16, FILL]
    metaicl = make_recipe(tmp_path, names, arms=["base", "metaicl"], few_shot_shots=5, shots=[0, 64])
    assert open_comparison(tmp_path / "metaicl", metaicl).shots == [0, 16, 64]
    without = make_recipe(tmp_path, names, arms=["base", "manyicl"], few_shot_shots=5, shots=[0, 16])
    assert open_comparison(tmp_path / "other", without).shots == [0, 16]


def test_the_report_of_an_older_comparison_is_still_written():
    """In schema 1 all tasks of a column had the same number of shots, and a row has no count of tasks."""
    content = make_comparison(num_seeds=5, num_tasks=5)
    assert content["schema"] == 1
    text = render_markdown(check_comparison(content))
    assert "Trained tasks, %: most shots (64)" in text
    assert tell_shorter_means(check_comparison(content), "trained") == ""


def test_numbers_of_shots_in_order_and_in_words():
    assert sort_shots([16, FILL, 0, 4, 16]) == [0, 4, 16, FILL]
    assert [tell_shot_count(k) for k in (0, 1, 1000, FILL)] == [
        "0 shots",
        "1 shot",
        "1,000 shots",
        "as many shots as fit",
    ]
