"""An arm of one comparison less an arm of another."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.shots import FILL
from tests.support.forked import ROOT
from tests.support.made_up_variants import write_variant

GOOD = {"animals": {0: [0.0, 0.0, 0.0, 0.0], FILL: [1.0, 1.0, 1.0, 0.0]}, "colours": {0: [1.0] * 4, FILL: [1.0] * 4}}
BAD = {"animals": {0: [0.0, 0.0, 0.0, 1.0], FILL: [1.0, 0.0, 0.0, 0.0]}, "colours": {0: [0.0] * 4, FILL: [1.0] * 4}}


@pytest.fixture
def arms_across(monkeypatch) -> ModuleType:
    """The benchmark, which finds the ones beside it as a script does."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("arms_across")


def rows_of(printed: str) -> list[list[str]]:
    """Return the cells of the table, without its head."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def test_two_arms_are_paired_on_each_number_of_shots_that_both_were_asked_with(arms_across, tmp_path, capsys):
    write_variant(tmp_path / "one", [GOOD, GOOD, None])
    write_variant(tmp_path / "two", [BAD, BAD, BAD])
    arms_across.main([str(tmp_path / name / "manyicl") for name in ("one", "two")], each=False)
    printed = capsys.readouterr().out
    assert "| a: ManyICL of one | b: ManyICL of two |" in printed
    cells = [[cell.strip("*").split(" [")[0] for cell in row] for row in rows_of(printed)]
    assert cells == [
        ["1 trained", "0 shots", "100.0 %", "0.0 %", "+100.0"],
        ["1 trained", "as many shots as fit", "100.0 %", "100.0 %", "0.0"],
        ["1 held-out", "0 shots", "0.0 %", "25.0 %", "−25.0"],
        ["1 held-out", "as many shots as fit", "75.0 %", "25.0 %", "+50.0"],
    ]
    assert rows_of(printed)[-1][-1].endswith("(+50.0, +50.0)")
    assert printed.splitlines()[-1] == "Left out: seeds of one alone: 2."


def test_models_of_one_task_are_compared_at_named_numbers_of_shots(arms_across, tmp_path, capsys):
    write_variant(tmp_path / "one", [{"colours": GOOD["colours"]}])
    seed = tmp_path / "one" / "seed-0"
    (seed / "dedicated").mkdir()
    for file in seed.glob("manyicl.test.*"):
        file.rename(seed / "dedicated" / file.name)
    write_variant(tmp_path / "two", [BAD])
    words = [str(tmp_path / "one" / "dedicated@0"), str(tmp_path / "two" / "manyicl@fill")]
    arms_across.main(words, each=True)
    both = "0 shots and as many shots as fit"
    printed = capsys.readouterr().out
    assert [row[:2] for row in rows_of(printed)] == [["1 trained", both], ["colours", both]]
    assert printed.splitlines()[-1] == "Left out: tasks of one alone: animals."


def test_tasks_that_only_one_was_trained_on_are_left_out_and_named(arms_across, tmp_path):
    write_variant(tmp_path / "one", [GOOD])
    write_variant(tmp_path / "two", [BAD], compare={"arms": ["manyicl"], "seeds": [0], "held_out_tasks": ["colours"]})
    words = [str(tmp_path / name / "manyicl") for name in ("one", "two")]
    assert list(arms_across.tell_left_out(*map(arms_across.Side.read, words))) == [
        "tasks that only one was trained on: animals, colours"
    ]
    with pytest.raises(UserError, match="have no seed and task in common"):
        arms_across.main(words, each=False)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("one/other", "one/other: names no arm of a comparison; give FOLDER/ARM"),
        ("none/manyicl", "none/manyicl: names no arm of a comparison"),
        ("one/manyicl@many", "one/manyicl@many: 'many' is not a number of shots; give a number, or fill"),
        ("one/base", "one/base: has answered no test rows yet"),
        ("one/manyicl@0", "give both a number of shots, or neither"),
        ("other/manyicl", "task 'animals': has other rows in one comparison than in the other"),
        ("seeds/manyicl", "have no seed and task in common"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(arms_across, tmp_path, word, told):
    write_variant(tmp_path / "one", [GOOD])
    write_variant(tmp_path / "other", [BAD], sha256="other rows")
    write_variant(tmp_path / "seeds", [None, GOOD])
    with pytest.raises(UserError) as refused:
        arms_across.main([str(tmp_path / word), str(tmp_path / "one" / "manyicl")], each=False)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
