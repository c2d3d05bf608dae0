"""Columns that a task.json names: templates of several of them, with every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.tasks.columns import template_fields
from manyicl.tasks.task import Task, load_task

NLI = {"input": "{premise}\nTherefore: {hypothesis}\n{{yes or no}}", "answer": "{verdict.word} ({verdict.sure} %)"}


def write(folder: Path, rows: list[dict[str, object]], **about: object) -> Path:
    path = folder / "nli.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "nli.task.json").write_text(json.dumps(about))
    return path


def examples_of(task: Task) -> list[tuple[str, str]]:
    """Return (input, answer) of all rows; some of train become validation, by a hash of the input."""
    return sorted((one.input, one.answer) for one in (*task.train, *task.validation))


def row_of(number: int, **more: object) -> dict[str, object]:
    return {
        "premise": f"{number} foxes ran.",
        "hypothesis": "A fox ran.",
        "verdict": {"word": "yes", "sure": 90},
        "split": "train",
        **more,
    }


def test_a_template_puts_columns_and_paths_into_inputs_and_answers(tmp_path):
    task = load_task(write(tmp_path, [row_of(1), row_of(2)], columns=NLI, family="qa"))
    assert examples_of(task) == [
        ("1 foxes ran.\nTherefore: A fox ran.\n{yes or no}", "yes (90 %)"),
        ("2 foxes ran.\nTherefore: A fox ran.\n{yes or no}", "yes (90 %)"),
    ]


def test_a_template_reads_csv_and_its_columns_are_not_called_unread(tmp_path):
    path = tmp_path / "nli.csv"
    path.write_text("Premise,hypothesis,answer,split\nIt rains.,It is wet.,yes,train\nIt is hot.,It snows.,no,train\n")
    (tmp_path / "nli.task.json").write_text(json.dumps({"columns": {"input": "{premise} So: {hypothesis}"}}))
    task = load_task(path)
    assert [given for given, _ in examples_of(task)] == ["It is hot. So: It snows.", "It rains. So: It is wet."]
    assert not any("hypothesis" in note for note in (*task.notes, *task.warnings))


def test_a_rows_own_instruction_is_a_column_of_the_template(tmp_path):
    orders = {"Add.": 5, "Multiply.": 6}
    rows = [{"task": task, "text": "2 3", "answer": answer, "split": "train"} for task, answer in orders.items()]
    task = load_task(write(tmp_path, rows, columns={"input": "{task}\n{text}"}))
    assert examples_of(task) == [("Add.\n2 3", "5"), ("Multiply.\n2 3", "6")]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [row_of(1), row_of(2, hypothesis=" ")],
            NLI,
            "row 2: column 'hypothesis' of the template of 'input' is empty; fill it in or remove the row",
        ),
        (
            [row_of(1), row_of(2, hypothesis={"text": "A fox ran."})],
            NLI,
            "row 2: hypothesis {'text': 'A fox ran.'} is not a text, a number, true or false, or a list of these; name"
            " the part that is, {hypothesis.text}, in the template in nli.task.json",
        ),
        (
            [row_of(1)],
            {**NLI, "input": "{premise} {hypotesis}"},
            "row 1: no 'hypotesis' column (it has 'premise', 'hypothesis', 'verdict', 'split'); correct \"columns\" in",
        ),
        ([row_of(1)], {"input": "{premise}", "split": "{split}"}, "maps 'split' to a template, which only 'input' and"),
        ([row_of(1)], {"input": ["premise", "{hypothesis}"]}, "maps 'input' to a list with a template; write one"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(tmp_path, rows, columns, message):
    with pytest.raises(UserError) as error:
        load_task(write(tmp_path, rows, columns=columns))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_braces_that_hold_no_column_are_no_template():
    assert template_fields("text") == template_fields("{{text}}") == template_fields("{}") == ()
    assert template_fields("{a} {b.0} {a}") == ("a", "b.0")
