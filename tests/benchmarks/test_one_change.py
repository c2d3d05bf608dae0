"""One setting changed at a time: the table of what is finished, and the comparisons that it is made from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import one_change
from manyicl.comparison.settings import CompareConfig
from manyicl.evaluation.shots import FILL
from manyicl.training.recipe import load_recipe
from manyicl.training.run_folder import find_changes
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.made_up_variants import write_variant

RECIPE = Path(__file__).parents[2] / "recipes" / "compare-smollm2.toml"


def print_table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of the table."""
    monkeypatch.setattr(sys, "argv", ["one_change.py", "table", str(folder), "--json", str(folder / "table.json")])
    one_change.main()
    return capsys.readouterr().out.splitlines()


BASE = {"animals": {16: [1.0, 0.0, 0.0, 0.0], FILL: [0.1, 0.1, 0.1, 0.1]}, "colours": {FILL: [1.0, 1.0, 0.0, 0.0]}}
OTHER = {"animals": {16: [1.0, 1.0, 0.0, 0.0], FILL: [0.5, 0.6, 0.6, 0.7]}, "colours": {FILL: [1.0, 0.0, 0.0, 0.0]}}


def test_each_variant_stands_with_what_it_changes_and_its_difference_to_the_base(tmp_path, monkeypatch, capsys):
    write_variant(tmp_path / "base", [BASE, BASE])
    write_variant(tmp_path / "rename", [OTHER, None], episodes={"rename_share": 0.5})
    lines = print_table(tmp_path, monkeypatch, capsys)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert lines[0].split(" | ")[3:] == ["held out, 16 shots", "held out, as many as fit", "trained, as many as fit |"]
    assert [cell.split(" %")[0] for cell in cells[0]] == ["base", "–", "2", "25.0", "10.0", "50.0"]
    assert cells[1][:3] == ["rename", "`episodes.rename_share = 0.5`", "1"]
    # One of four queries is better by 1: its standard error is 0.25, and Student's quantile with three degrees 3.182.
    assert cells[1][3] == "+25.0 [−54.6, +100.0] (+25.0)"
    # 0.4, 0.5, 0.5 and 0.6 better: 0.5 with a standard error of 0.0408.
    assert cells[1][4] == "**+50.0 [+37.0, +63.0]** (+50.0)"
    assert cells[1][5] == "−25.0 [−100.0, +54.6] (−25.0)"
    assert "Bold: the interval excludes zero, as 1 of 3 do; by chance about 0.1." in lines
    assert lines[-1] == "- rename: seed 1 left out, as it or base has not finished it."
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept[1]["seeds"] == [0]
    assert kept[1]["cells"]["held out, 16 shots"] | {"low": 0, "high": 0} == {
        "difference": 0.25, "low": 0, "high": 0, "seeds": [0.25], "tasks": 1, "excludes_zero": False,
    }  # fmt: skip


def test_another_template_is_paired_by_query_and_draw_and_what_differs_is_told(tmp_path, monkeypatch, capsys):
    fewer = {"animals": {16: [1.0, 0.0, 1.0], FILL: [0.1, 0.2, 0.3]}}  # neither q3 nor the trained task fits
    write_variant(tmp_path / "base", [BASE])
    write_variant(tmp_path / "chat", [fewer], fill=20, template={"style": "chat"})
    lines = print_table(tmp_path, monkeypatch, capsys)
    row = lines[3].split(" | ")
    assert [cell.split(" [")[0].strip("*") for cell in row[3:]] == ["+33.3", "+10.0", "– |"]
    assert lines[-2:] == [
        "- chat: with as many shots as fit, 2 of 2 draws hold others than in base (20.0 on average, 31.0 in base).",
        "- chat: 6 queries at a number of shots were asked of it or of base alone, and are left out.",
    ]


@pytest.mark.parametrize("folders", [[], ["rename"]])
def test_without_a_base_there_is_no_table(tmp_path, monkeypatch, capsys, folders):
    for name in folders:
        write_variant(tmp_path / name, [OTHER])
    with pytest.raises(SystemExit, match="2"):
        print_table(tmp_path, monkeypatch, capsys)
    assert f"{tmp_path / 'base'}: has no finished seed to take differences from" in capsys.readouterr().err


def test_variants_of_other_rows_are_refused(tmp_path, monkeypatch, capsys):
    write_variant(tmp_path / "base", [BASE])
    write_variant(tmp_path / "rename", [OTHER], sha256="other rows")
    with pytest.raises(SystemExit, match="2"):
        print_table(tmp_path, monkeypatch, capsys)
    assert "task 'animals': has other rows in a variant than in base" in capsys.readouterr().err


def test_every_variant_changes_the_recipe_and_trains_on_some_of_its_tasks():
    def load(own: list[str]) -> CompareConfig:
        return load_recipe(RECIPE, overrides=[*one_change.SHARED, *own], kind=CompareConfig)

    changes = {name: load(own) for name, (_, own) in one_change.VARIANTS.items()}
    base = changes.pop("base")
    assert all(find_changes(base, config) for config in changes.values())
    assert {len(config.tasks.names) for config in changes.values()} == {8, 14, 28}
    assert all(set(config.tasks.names) <= set(base.tasks.names) for config in changes.values())


@pytest.mark.slow
def test_variants_are_trained_and_their_table_needs_neither_tasks_nor_models(tmp_path, monkeypatch, capsys):
    names = write_world(tmp_path)
    make_recipe(tmp_path, names, episodes={"token_budget": 512}, train={"pack_tokens": 512}, text_files=[])
    words = ["token", "base", "compare.seeds=[0]", "compare.queries=3", "compare.asked_tasks=2"]
    words += ["train.num_steps=1", "compare.validation_queries=0"]
    options = ["--recipe", str(tmp_path / "recipe.toml")]
    monkeypatch.setattr(sys, "argv", ["one_change.py", "run", str(tmp_path / "out"), *words, *options])
    one_change.main()
    assert 'train.normalization="token"' in capsys.readouterr().out
    one_change.main()  # goes on with what is there: nothing
    capsys.readouterr()
    shutil.rmtree(tmp_path / "tasks")
    for path in tmp_path.glob("out/*/seed-0/manyicl"):
        shutil.rmtree(path)
    lines = print_table(tmp_path / "out", monkeypatch, capsys)
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| base", "| token"]
    assert '`train.normalization = "token"`' in lines[3]
    assert "points" in "".join(lines)
