"""One .json file that holds whole splits, and pandas' names beside lists of cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.tasks import Columns, Example, FaultLog, inspect_task, load_tasks, read_records

TRAIN = [{"input": "one", "answer": "a"}, {"input": "two", "answer": "b"}]
TEST = [{"input": "three", "answer": "a"}]


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "desk.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"train": TRAIN, "test": TEST},
        {"version": 1, "labels": ["a", "b"], "Train": TRAIN, "testing": TEST},
        {"train": {"input": ["one", "two"], "answer": ["a", "b"]}, "test": {"input": ["three"], "answer": ["a"]}},
        {"train": [{**row, "split": "train"} for row in TRAIN], "test": TEST},
    ],
)
def test_an_object_of_splits_is_one_task_with_these_splits(tmp_path: Path, content: object) -> None:
    write(tmp_path, content)
    (task,) = load_tasks(tmp_path)
    assert {*task.train, *task.validation} == {Example("one", "a"), Example("two", "b")}
    assert task.test == (Example("three", "a"),)


def test_test_rows_alone_are_not_trained_on_and_train_rows_alone_are_divided(tmp_path: Path) -> None:
    task, _ = inspect_task(write(tmp_path, {"test": TEST}))
    assert task is not None
    assert (task.train, task.validation, task.test) == ((), (), (Example("three", "a"),))
    rows = [{"input": f"row {n}", "answer": "ab"[n % 2]} for n in range(40)]
    task, _ = inspect_task(write(tmp_path, {"train": rows}))
    assert task is not None
    assert len(task.test) > 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"train": TRAIN, "eval": TEST}, "desk.json: holds the rows 'train' and 'eval'; name the splits train,"),
        ({"train": TRAIN, "more": TEST}, "desk.json: holds the rows 'train' and 'more'; name the splits train,"),
        (
            {"train": [{**TRAIN[0], "split": "test"}], "test": TEST},
            "desk.json, row 1: split 'test' among the rows of 'train'; correct one of them",
        ),
    ],
)
def test_an_object_of_unclear_splits_is_refused(tmp_path: Path, content: object, text: str) -> None:
    path = write(tmp_path, content)
    _, (fault,) = inspect_task(path)
    assert text in fault.message
    with pytest.raises(UserError, match=r"desk\.json"):  # in a folder the file is not passed over
        load_tasks(tmp_path)


def test_pandas_names_beside_lists_of_cells_are_read(tmp_path: Path) -> None:
    cells = [["one", "a", "train"], ["two", "b", "train"]]
    task, _ = inspect_task(write(tmp_path, {"columns": ["input", "answer", "split"], "index": [0, 1], "data": cells}))
    assert task is not None
    assert {*task.train, *task.validation} == {Example("one", "a"), Example("two", "b")}


def test_a_long_cell_is_read_while_another_table_is_read_to_its_end(tmp_path):
    for name in ("short", "long"):
        (tmp_path / f"{name}.csv").write_text(f"input,answer\nq,a\n{'x' * 200_000 if name == 'long' else 'r'},b\n")
    short, long = (
        read_records(path, columns=Columns({}), log=FaultLog(path)) for path in sorted(tmp_path.iterdir(), reverse=True)
    )
    next(short), next(long)
    assert list(short) == [(2, {"input": "r", "answer": "b"})]
    assert [len(str(record["input"])) for _, record in long if record] == [200_000]
