"""B8: rows of held-out and familiar tasks that are train rows of trained tasks are found, counted and told."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from manyicl.comparison.grid import open_comparison
from manyicl.comparison.inputs import INPUTS_FILE
from manyicl.comparison.summary import summarize
from manyicl.comparison.worker import run_comparison
from manyicl.planning.overlap import Overlap, SplitOverlap, find_overlaps, tell_overlap, tell_overlaps
from manyicl.report.document import write_outcome
from manyicl.tasks.task import load_tasks
from tests.cli.test_app import run_manyicl
from tests.support.comparison_setting import make_recipe, write_world

Row = dict[str, str]


def rows(count: int, *, topic: str, split: str) -> list[Row]:
    return [
        {"input": f"please write to me about {topic} number {n} today", "answer": f"a{n % 2}", "split": split}
        for n in range(count)
    ]


def write_task(folder: Path, name: str, content: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in content)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_leak(folder: Path) -> None:
    """Write a trained task, and a held-out one whose 40 test rows are 40 train rows of it."""
    trained = rows(60, topic="bikes", split="train")
    write_task(folder, "trained", [*trained, *rows(10, topic="boats", split="test")])
    leaked = [{**row, "split": "test"} for row in trained[:40]]
    write_task(folder, "held", [*rows(30, topic="cats", split="train"), *leaked])


def overlap(**changes: object) -> Overlap:
    none = SplitOverlap(exact=0, same_answer=0, near=0, of=10)
    return Overlap(**{"test": none, "shots": none, "with_tasks": {}, **changes})


def test_test_rows_that_are_train_rows_of_a_trained_task_are_counted(tmp_path):
    write_leak(tmp_path)
    tasks = {task.name: task for task in load_tasks(tmp_path)}
    assert find_overlaps(tasks, trained=["trained"]) == {
        "held": Overlap(
            test=SplitOverlap(exact=40, same_answer=40, near=0, of=40),
            shots=SplitOverlap(exact=0, same_answer=0, near=0, of=29),  # of 30, one became a validation row
            with_tasks={"trained": 40},
        )
    }


def test_near_copies_and_the_shot_pool_count_too_each_row_once(tmp_path):
    one, two = rows(20, topic="bikes", split="train"), rows(20, topic="kites", split="train")
    write_task(tmp_path, "one", [*one, *rows(5, topic="boats", split="test")])
    write_task(tmp_path, "two", [*two, one[0], *rows(5, topic="ships", split="test")])
    held = [
        {**one[0], "split": "test"},  # in both
        {**one[1], "answer": "other", "split": "test"},
        {"input": two[2]["input"].upper() + "!", "answer": "a0", "split": "test"},
        {"input": "nothing of the kind", "answer": "a0", "split": "test"},
        one[3],
        {"input": two[4]["input"].title(), "answer": "a0", "split": "train"},
        {"input": "nothing of that kind either", "answer": "a1", "split": "train"},
    ]
    write_task(tmp_path, "held", held)
    tasks = {task.name: task for task in load_tasks(tmp_path)}
    (found,) = find_overlaps(tasks, trained=["one", "two"]).values()
    assert found.test == SplitOverlap(exact=2, same_answer=1, near=1, of=4)
    assert found.shots == SplitOverlap(exact=1, same_answer=1, near=1, of=3)
    assert found.with_tasks == {"one": 3, "two": 3}
    assert find_overlaps(tasks, trained=["one", "two", "held"]) == {}


def test_an_overlap_is_told_in_one_line():
    test = SplitOverlap(exact=1200, same_answer=1000, near=34, of=2000)
    found = overlap(test=test, with_tasks={"a": 900, "b": 300, "c": 30, "d": 3, "e": 1})
    assert tell_overlap(found) == (
        "1,234 of 2,000 test rows are rows of trained tasks too (1,200 exactly, 1,000 with the same answer; 34"
        " nearly): a 900, b 300, c 30, and 2 more"
    )
    assert list(tell_overlaps({"held": found, "clean": overlap()})) == [
        f"overlap: task 'held' is not trained on, but {tell_overlap(found)}"
    ]
    assert list(tell_overlaps({"clean": overlap()})) == [
        "overlap: none of the 20 rows of tasks that are not trained on is one of a trained task, or nearly"
    ]
    assert list(tell_overlaps({})) == []


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of a comparison of the base alone, its held-out task with leaked rows, and what it printed."""
    folder = tmp_path_factory.mktemp("leaky")
    names = write_world(folder)
    held = names[1][0]
    trained = [json.loads(line) for line in (folder / "tasks" / f"{names[0][0]}.jsonl").read_text().splitlines()]
    own = [json.loads(line) for line in (folder / "tasks" / f"{held}.jsonl").read_text().splitlines()]
    leaked = [{**row, "answer": own[0]["answer"], "split": "test"} for row in trained if row["split"] == "train"][:12]
    write_task(folder / "tasks", held, [*(row for row in own if row["split"] == "train"), *leaked])
    off = {"flips": False, "orders": False, "validation_queries": 0, "text_files": [], "seeds": [0]}
    config = make_recipe(folder, names, arms=["base"], **off)
    comparison = open_comparison(folder / "out", config)
    printed = StringIO()
    run_comparison(comparison, console=Console(file=printed))
    write_outcome(comparison)
    return folder / "out", held, printed.getvalue()


@pytest.mark.slow
def test_a_comparison_tells_at_its_start_and_in_its_findings_and_report(leaky):
    folder, held, printed = leaky
    content = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    found = {entry["task"]: entry["overlap"] for entry in content["tasks"]}
    assert found[held]["test"]["exact"] == found[held]["test"]["of"] == 12
    assert found[held]["with_tasks"]
    assert [found[entry["task"]] for entry in content["tasks"] if entry["role"] == "trained"] == [None] * 4
    assert printed.startswith("overlap: task '")
    assert f"overlap: task '{held}' is not trained on, but 12 of 12 test rows are rows of" in printed
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text(encoding="utf-8").replace("\\", "")
        assert "12 of 12 test rows are rows of trained tasks too (12 exactly" in text
        assert "test rows of held-out tasks, 12 are rows of trained tasks too, and" in text


@pytest.mark.slow
def test_it_is_found_once_and_kept_and_an_earlier_comparison_gets_it(leaky):
    folder, held, _ = leaky
    file = folder / INPUTS_FILE
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["overlaps"][held]["test"]["exact"] == 12
    kept = {**content, "overlaps": {**content["overlaps"], held: overlap().model_dump()}}
    file.write_text(json.dumps(kept), encoding="utf-8")
    shown = {entry.task: entry.overlap for entry in summarize(open_comparison(folder, None)).tasks}
    assert shown[held].test.model_dump() == {
        "exact": 0,
        "same_answer": 0,
        "near": 0,
        "of": 10,
    }  # as kept, not found again
    file.write_text(json.dumps({"tasks": content["tasks"], "texts": content["texts"]}), encoding="utf-8")
    open_comparison(folder, None)
    # Nobody wrote down then which weights it began with.
    assert json.loads(file.read_text(encoding="utf-8")) == {**content, "weights": None}


@pytest.mark.slow
def test_check_looks_for_rows_of_held_out_tasks(tmp_path, capfd):
    write_leak(tmp_path / "tasks")
    told = "overlap: task 'held' is not trained on, but 40 of 40 test rows are rows of trained tasks too (40"
    code, out, err = run_manyicl(capfd, "check", tmp_path / "tasks", "--held-out", "held")
    assert (code, err) == (0, "")
    assert told in out
    assert "overlap" not in run_manyicl(capfd, "check", tmp_path / "tasks")[1]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[tasks]\nfolder = "tasks"\nnames = ["trained"]\n[model]\npath = "seed"\n[train]\nnum_steps = 1\n'
        'learning_rate = 1e-3\n[compare]\nheld_out_tasks = ["held"]\n'
    )
    assert told in run_manyicl(capfd, "check", tmp_path / "tasks", "--recipe", recipe)[1]
    code, _, err = run_manyicl(capfd, "check", tmp_path / "tasks", "--held-out", "hold")
    assert (code, err) == (2, "error: --held-out: no task 'hold' in the folder; did you mean 'held'?\n")
    code, _, err = run_manyicl(capfd, "check", tmp_path / "tasks", "--held-out", "held", "--held-out", "trained")
    assert code == 2
    assert err.startswith("error: --held-out: leaves no task to train on")
