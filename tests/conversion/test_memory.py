"""Tasks made of the rows of a program: as files of them would be, and each refusal names the argument."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

import manyicl

ROWS = [{"input": f"ticket {n}", "answer": ("card", "payment")[n % 2]} for n in range(100)]


def test_rows_become_the_task_that_a_file_of_them_becomes(tmp_path):
    (tmp_path / "tickets.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    assert manyicl.make_task("tickets", ROWS, split=True) == manyicl.load_tasks(tmp_path)[0]


def test_rows_without_splits_are_all_train_unless_they_are_to_be_split():
    task = manyicl.make_task("tickets", iter(ROWS))
    assert (len(task.train), task.validation, task.test, task.labels) == (100, (), (), ("card", "payment"))
    assert [example.input for example in task.train[:2]] == ["ticket 0", "ticket 1"]
    parts = [{**ROWS[0], "split": "train"}, {**ROWS[1], "split": "test"}]
    named = manyicl.make_task("tickets", parts)
    assert [len(named.train), len(named.test)] == [1, 1]


def test_what_is_dropped_is_counted():
    task = manyicl.make_task("tickets", [ROWS[0], ROWS[0], {**ROWS[0], "answer": "payment"}])
    assert task.dropped == {"duplicate input": 1, "duplicate with another answer": 1}


def test_settings_are_those_of_a_task_file_but_for_the_name():
    rows = [{"text": "red", "label": np.int64(1)}, {"text": "blue", "label": np.int64(2)}]
    settings = {"columns": {"input": "text", "answer": "label"}, "labels": ["1", "2"], "name": "other"}
    task = manyicl.make_task("colours", rows, settings=settings)
    assert (task.name, task.labels, task.train[0].answer) == ("colours", ("1", "2"), "1")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2026, 12, 1, 9, 30), "2026-12-01T09:30:00"),
        (Decimal("1.50"), "1.50"),
        (pd.Timestamp("2026-12-01"), "2026-12-01T00:00:00"),
        (np.array(["yes"]), "yes"),
    ],
)
def test_values_of_tables_and_databases_are_read_as_a_file_would_hold_them(value, text):
    assert manyicl.make_task("tickets", [{"input": "a", "answer": value, "when": value}]).train[0].answer == text


@pytest.mark.parametrize("gap", [None, float("nan"), pd.NA, pd.NaT])
def test_a_gap_in_a_column_that_is_read_is_refused_and_in_another_is_not(gap):
    assert len(manyicl.make_task("tickets", [{**ROWS[0], "closed": gap}]).train) == 1
    with pytest.raises(
        manyicl.UserError, match=r"^examples, row 1: answer (nan|None) is empty; fill it in or remove the row$"
    ):
        manyicl.make_task("tickets", [{"input": "a", "answer": gap}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a/b"}, r"name='a/b': cannot be a task's name; give a text on one line, without slashes"),
        ({"name": 3}, r"name=3: is not a text; give one, such as 'tickets'"),
        ({"examples": []}, r"examples: there are no rows; give some"),
        ({"examples": ROWS[0]}, r"examples=\{'input': 'ticket 0', .*: give a list of rows, .*"),
        ({"examples": "tickets.jsonl"}, r"examples=tickets\.jsonl: give a list of rows, .*"),
        ({"examples": ["input", "answer"]}, r"examples, row 1: 'input' is not a row; .* table\.to_dict\('records'\)"),
        ({"examples": [*ROWS, {"input": "a"}]}, r"examples, row 101: no 'answer' column \(it has 'input'\); add it"),
        ({"examples": [*ROWS, {"input": "a", "answer": float("nan")}]}, r"examples, row 101: answer nan is empty; .*"),
        (
            {"examples": [{"input": "a", "answer": {1}}]},
            r"examples, row 1: 'answer' is not made of texts, numbers and lists \(it has a value of type set\)",
        ),
        (
            {"examples": [{"text": "a", "label": "b"}]},
            r'examples: no \'input\' column: .* write \{"columns": .*`settings`',
        ),
        (
            {"examples": {"train": ROWS}},
            r"examples=\{'train': \[.*: give a list of rows, .*, such as examples\['train'\]",
        ),
        (
            {"settings": {"labels": ["card"]}},
            r"examples, row 2 .* answer 'payment' is not among the labels of `settings`; .*",
        ),
        ({"settings": [1]}, r"settings=\[1\]: give a dict, such as \{'family': 'classification'\}"),
        ({"settings": {"metric": "acc"}}, r"settings: metric 'acc' is unknown; known: accuracy, .*"),
        (
            {"examples": [{"input": "", "answer": "a"}, {"input": "b", "answer": ""}]},
            r"examples, row 1: input '' is empty; .* \(and 1 more kind of mistakes\)",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_in_one_line(given, message):
    with pytest.raises(manyicl.UserError, match=rf"^{message}$"):
        manyicl.make_task(**{"name": "tickets", "examples": ROWS, **given})
