"""Comparisons that differ in the length of their training episodes, side by side."""

from __future__ import annotations

import importlib
import shutil

import pytest

from manyicl.errors import UserError
from manyicl.verbs import compare
from tests.support.comparison_setting import make_recipe, write_world
from tests.support.forked import ROOT


@pytest.fixture
def long_contexts(monkeypatch):
    """The benchmark, which finds the ones beside it as a script does."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("long_contexts")


def cells_of(printed: str, *, title: str) -> dict[str, list[str]]:
    """Return the rows of the table below a title: arm -> cells, without intervals and marks."""
    table = printed.replace("−", "-").split(f"\n{title}\n\n")[1].split("\n\n", maxsplit=1)[0].splitlines()[2:]
    rows = [[cell.strip(" *").split(" [")[0] for cell in line.strip("|").split("|")] for line in table]
    return {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_each_length_is_a_row_and_is_paired_with_the_base_of_another_folder(long_contexts, tmp_path, capsys):
    names = write_world(tmp_path)
    for tokens, arms in ((192, ["base", "manyicl"]), (384, ["manyicl"])):
        make_recipe(
            tmp_path, names, episodes={"token_budget": tokens}, train={"num_steps": 1}, arms=arms, seeds=[0],
            learning_rates=[], validation_queries=0, shots=[0, 4], queries=6, asked_tasks=1, draws=2,
            familiar_tasks=[], flips=False, orders=False, text_files=[],
        )  # fmt: skip
        compare(tmp_path / "recipe.toml", out=tmp_path / str(tokens))
    capsys.readouterr()

    long_contexts.main([str(tmp_path / name) for name in ("384", "192")], plot=tmp_path / "plot.png")

    printed = capsys.readouterr().out
    scores = cells_of(printed, title="Mean of 2 held-out tasks, %")
    assert list(scores) == ["base", "ManyICL, 192", "ManyICL, 384"]
    for other, names in (("base", ["ManyICL, 192", "ManyICL, 384"]), ("ManyICL, 384", ["base", "ManyICL, 192"])):
        less = cells_of(printed, title=f"Less {other}, points, paired; bold: the interval excludes zero")
        assert list(less) == names
        for name, cells in less.items():
            expected = [float(ours) - float(theirs) for ours, theirs in zip(scores[name], scores[other], strict=True)]
            assert [float(cell) for cell in cells] == pytest.approx(expected, abs=0.11)  # of rounded numbers
    assert "Less few-shot FT" not in printed  # nobody trained it
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    shutil.copytree(tmp_path / "384", tmp_path / "384-again")  # its row took the place of the other's, in silence
    with pytest.raises(UserError, match="two have ManyICL, 384; name one of them"):
        long_contexts.main([str(tmp_path / name) for name in ("384", "192", "384-again")], plot=None)


def test_a_folder_without_a_comparison_is_named(long_contexts, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}"):
        long_contexts.main([str(tmp_path)], plot=None)
