"""Embeddings of rows: a column of lists of numbers that the task.json names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from manyicl.errors import UserError
from manyicl.tasks import inspect_task, load_tasks

COLUMNS = {"columns": {"embedding": "vector"}}


def write(folder: Path, rows: list[dict[str, object]], *, settings: object = COLUMNS) -> Path:
    (folder / "t.task.json").write_text(json.dumps(settings))
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(num: int = 10) -> list[dict[str, object]]:
    return [{"input": f"row {n}", "answer": "ab"[n % 2], "vector": [n, 0.5, -1]} for n in range(num)]


def read_embeddings(path: Path) -> dict[str, list[float]]:
    (task,) = load_tasks(path.parent)
    rows = [*task.train, *task.validation, *task.test]
    return {row.input: np.frombuffer(row.embedding, dtype=np.float32).tolist() for row in rows}


def test_the_named_column_is_read_from_each_format(tmp_path):
    expected = {f"row {n}": [n, 0.5, -1] for n in range(10)}
    path = write(tmp_path, make_rows())
    assert read_embeddings(path) == expected
    path.unlink()
    cells = [f'{row["input"]},{row["answer"]},"{row["vector"]}"' for row in make_rows()]
    (tmp_path / "t.csv").write_text("input,answer,vector\n" + "\n".join(cells) + "\n")
    assert read_embeddings(path) == expected
    (tmp_path / "t.csv").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(make_rows()), tmp_path / "t.parquet")
    assert read_embeddings(path) == expected


def test_a_column_that_no_task_json_names_is_not_read(tmp_path):
    rows = [{**row, "embedding": "of anything"} for row in make_rows()]
    assert set(map(tuple, read_embeddings(write(tmp_path, rows, settings={})).values())) == {()}


def test_the_tasks_hash_is_another_only_if_embeddings_are(tmp_path):
    def sha(rows, settings):
        return load_tasks(write(tmp_path, rows, settings=settings).parent)[0].sha256

    turned = [{**row, "vector": [1, 2, 3]} for row in make_rows()]
    assert sha(make_rows(), {}) == sha(turned, {})
    assert sha(make_rows(), COLUMNS) != sha(turned, COLUMNS)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({}, "column 'vector', the row's embedding, is missing; correct it"),
        ({"vector": None}, "is missing"),
        ({"vector": "north"}, "is not a list of numbers"),
        ({"vector": [1, "2", 3]}, "is not a list of numbers"),
        ({"vector": [1, True, 3]}, "is not a list of numbers"),
        ({"vector": []}, "is not a list of numbers"),
        ({"vector": [1, 2]}, "has 2 numbers, earlier ones have 3"),
        ({"vector": [0, 0, 0]}, "has no direction: numbers that are not finite, or only zeros"),
        ({"vector": [1, 1e300, 0]}, "has no direction"),
    ],
)
def test_a_row_without_a_usable_embedding_is_a_fault(tmp_path, wrong, fault):
    path = write(tmp_path, [*make_rows(), {"input": "odd", "answer": "a", **wrong}])
    task, faults = inspect_task(path)
    assert task is None
    assert [fault in str(one) for one in faults] == [True]


def test_a_list_of_columns_is_no_embedding(tmp_path):
    path = write(tmp_path, make_rows(), settings={"columns": {"embedding": ["x", "y"]}})
    with pytest.raises(UserError, match="maps 'embedding' to a list; name one column"):
        load_tasks(path.parent)
