"""Field trials that passed from the start: the verdict on ordinary oddities of a table (docs/field-trials.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.planning import audit_task

HEADER = "input,answer\n"


def rows(answers: list[str]) -> str:
    return HEADER + "".join(f"row {n},{answer}\n" for n, answer in enumerate(answers))


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        (rows(["\U0001f6b2", "\u05dc\u05d0", "\u0644\u0627"] * 120), "good"),  # trial 25
        (rows(["a"] * 60), "cannot be learnt: every train row has the same answer"),  # trial 27
        (rows(["usual"] * 298 + ["rare"] * 2), "usable, but lopsided: "),  # trial 28
        (
            "the lamp is bent,repair\nthe bell rings,sales\n",
            "row 1: no 'input' column (it has 'the lamp is bent', 'repair'); add it, or say in t.task.json which it is",
        ),
        (
            HEADER + 'one,a\n"two "x" y",b\n',
            "row 2: invalid CSV (',' expected after '\"'); close the quote",
        ),  # trial 34
        (HEADER + "one,a\ntwo,b,c\n", "row 2: 3 cells, but the header has 2, separated by a comma; put a cell"),
        (rows(["NA", "None", "null", "nan"] * 90), "good"),  # trial 35
        (rows(["007", "0070", "1e3", "1.50"] * 90), "good"),  # trial 36
        (HEADER + "one,a\ntwo,\nthree,\n", "row 2 (and 1 more row): answer '' is empty; fill it in or remove the row"),
    ],
    ids=["25", "27", "28", "33", "34", "34b", "35", "36", "46"],
)
def test_the_verdict_on_a_table_is_the_cause(tmp_path: Path, content: str, verdict: str) -> None:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    assert verdict in audit_task(tmp_path / "t.csv", tokenizer=None).verdict


def test_labels_of_a_table_are_kept_as_they_are_written(tmp_path: Path) -> None:
    labels = ["NA", "None", "null", "nan", "007", "0070", "1e3", "1.50"]
    (tmp_path / "t.csv").write_text(rows(labels * 60))
    assert sorted(audit_task(tmp_path / "t.csv", tokenizer=None).labels) == sorted(labels)


def test_an_input_with_two_answers_is_counted_trial_44(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + "".join(f"row {n},a\nrow {n},b\n" for n in range(30)))
    audit = audit_task(tmp_path / "t.csv", tokenizer=None)
    assert (audit.num_rows, audit.dropped) == (60, {"duplicate with another answer": 30})
