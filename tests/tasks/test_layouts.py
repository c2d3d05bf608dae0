"""Which files of a folder are one task, which splits they hold, and what is told to be unread (issue 18, point 2)."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from manyicl.errors import UserError
from manyicl.tasks.layouts import find_layout
from manyicl.tasks.task import SPLITS, Task, load_tasks, name_sources


def write_csv(path: Path, first: int, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("input,answer\n" + "".join(f"row {n},a\n" for n in range(first, first + count)), encoding="utf-8")


def sizes(task: Task) -> tuple[int, ...]:
    return tuple(len(getattr(task, split)) for split in SPLITS)


def found(folder: Path) -> dict[str, list[tuple[str, str]]]:
    return {
        source.stem: [(path.relative_to(folder).as_posix(), split) for path, split in source.files]
        for source in find_layout(folder).sources
    }


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "Dev"])
def test_train_and_test_files_are_one_task_named_after_the_folder_trial_20(tmp_path: Path, word: str) -> None:
    desk = tmp_path / "desk"
    write_csv(desk / "train.csv", 0, 12)
    write_csv(desk / f"{word}.csv", 20, 3)
    write_csv(desk / "test.csv", 30, 4)
    (task,) = load_tasks(desk)
    assert (task.name, sizes(task)) == ("desk", (12, 3, 4))
    assert {example.input for example in task.test} == {"row 30", "row 31", "row 32", "row 33"}


def test_shards_and_split_folders_trials_20b_20c(tmp_path: Path) -> None:
    flat, nested = tmp_path / "data", tmp_path / "desk"
    for name, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 5), ("test-00000-of-00001", 10)):
        table = pyarrow.table({"input": [f"row {n}" for n in range(first, first + 5)], "answer": ["a"] * 5})
        for path in (flat / f"{name}.parquet", nested / name.partition("-")[0] / f"{name}.parquet"):
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, path)
    for folder in (flat, nested):
        (task,) = load_tasks(folder)
        assert (task.name, task.num_rows) == (folder.name, 15)
        assert {example.input for example in task.test} == {f"row {n}" for n in range(10, 15)}


def test_a_folder_a_task_and_names_before_the_split_trial_20d(tmp_path: Path) -> None:
    for name, first in (("desk/train", 0), ("desk/test", 10), ("shop_train", 0), ("shop_test", 10), ("post", 0)):
        write_csv(tmp_path / f"{name}.csv", first, 5)
    assert found(tmp_path) == {
        "desk": [("desk/test.csv", "test"), ("desk/train.csv", "train")],
        "post": [("post.csv", "")],
        "shop": [("shop_test.csv", "test"), ("shop_train.csv", "train")],
    }


def test_a_split_alone(tmp_path: Path) -> None:
    write_csv(tmp_path / "desk" / "train.csv", 0, 400)
    (task,) = load_tasks(tmp_path / "desk")
    assert task.name == "desk"
    assert len(task.test) > 40  # a train file alone is split by hash: nothing else could be asked
    write_csv(tmp_path / "shop" / "test.csv", 0, 4)
    write_csv(tmp_path / "shop" / "post.csv", 0, 4)
    assert found(tmp_path / "shop") == {"post": [("post.csv", "")], "shop": [("test.csv", "test")]}
    write_csv(tmp_path / "names" / "turing_test.csv", 0, 4)
    assert found(tmp_path / "names") == {"turing_test": [("turing_test.csv", "")]}


def test_a_hub_folder_with_its_files_in_data(tmp_path: Path) -> None:
    write_csv(tmp_path / "desk" / "data" / "train.csv", 0, 5)
    write_csv(tmp_path / "desk" / "data" / "test.csv", 9, 5)
    (tmp_path / "desk" / "README.md").write_text("about")
    (tmp_path / "desk" / "dataset_info.json").write_text("{}")
    layout = find_layout(tmp_path / "desk")
    assert ([source.stem for source in layout.sources], layout.left_out) == (["desk"], [])


@pytest.mark.parametrize("place", ["desk/desk.task.json", "desk/task.json", "desk.task.json", "desk/train.task.json"])
def test_the_task_json_of_several_files_may_lie_in_their_folder_or_beside_it(tmp_path: Path, place: str) -> None:
    write_csv(tmp_path / "desk" / "train.csv", 0, 5)
    write_csv(tmp_path / "desk" / "test.csv", 9, 5)
    (tmp_path / place).write_text(json.dumps({"name": "bikes"}))
    assert [task.name for task in load_tasks(tmp_path)] == ["bikes"]
    (tmp_path / "desk" / "test.task.json").write_text("{}")
    with pytest.raises(UserError, match=r"task\.json: task 'desk' also has .*task\.json; keep one"):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("train.csv", "test.csv", "eval.csv"), "eval.csv: is a split by its name, but which one?"),
        (("desk_train.csv", "desk_test.csv", "desk_eval.csv"), "desk_eval.csv: is a split by its name"),
        (("desk.csv", "desk_test.csv"), "desk_test.csv: is a split of task 'desk' by its name, but desk.csv is"),
        (("train.csv", "train.tsv"), "train.tsv: there is also train.csv; rename or remove one"),
    ],
)
def test_what_could_put_test_rows_into_training_is_refused(tmp_path: Path, names: tuple[str], text: str) -> None:
    for name in names:
        write_csv(tmp_path / name, 0, 3)
    with pytest.raises(UserError) as raised:
        find_layout(tmp_path)
    assert text in str(raised.value)


def test_a_split_column_must_agree_with_the_files_name(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", 0, 3)
    (tmp_path / "test.csv").write_text("input,answer,split\nx,a,test\ny,a,train\n")
    with pytest.raises(UserError, match=r"test\.csv, row 2: split 'train' in a file of test rows by its name"):
        load_tasks(tmp_path)


def test_what_is_not_read_is_told_once_trials_10_45(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(tmp_path / "desk.csv", 0, 3)
    write_csv(tmp_path / "old" / "a.csv", 0, 3)
    for name in ("desk.xlsx", "~$desk.csv", "._desk.csv", "notes.md", "first.predictions.parquet", "first.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"model": "x"}')
    with caplog.at_level(logging.WARNING):
        load_tasks(tmp_path)
        load_tasks(tmp_path, names=["desk"])
    assert caplog.messages == [
        f"{tmp_path}: not read: config.json (not a list of rows), desk.xlsx (give manyicl import the file itself),"
        " first.json (result of an evaluation), first.predictions.parquet (predictions of an evaluation),"
        " old/ (1 data file), ~$desk.csv (a lock file)"
    ]


def test_a_folder_of_unread_files_alone_names_them(tmp_path: Path) -> None:
    (tmp_path / "desk.xlsx").write_text("")
    with pytest.raises(
        UserError, match=r"no task in it; .* \(not read: desk\.xlsx \(give manyicl import the file itself\)\)"
    ):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("train", "other", "name"),
    [
        ("train_en", "test_en", "en"),
        ("train-v2.0", "dev-v2.0", "v2.0"),
        ("desk_train_v2", "desk_test_v2", "desk_v2"),
        ("train_set", "test_set", "bikes"),
        ("TrainData", "TestData", "bikes"),
        ("train (1)", "test (1)", "bikes"),
        ("train1", "test1", "bikes"),
        ("Xtrain", "Xtest", "X"),
        ("trn", "tst", "bikes"),
    ],
)
def test_names_that_differ_in_the_split_alone_are_one_task(tmp_path: Path, train: str, other: str, name: str) -> None:
    for stem, first in ((train, 0), (other, 20)):
        write_csv(tmp_path / "bikes" / f"{stem}.csv", first, 12)
    split = "validation" if "dev" in other else "test"
    parts = sorted([(f"{train}.csv", "train"), (f"{other}.csv", split)])
    assert found(tmp_path / "bikes") == {name: parts}


@pytest.mark.parametrize(
    "names",
    [
        ("train", "my_test"),
        ("train", "test_labels"),
        ("train", "heldout"),
        ("train", "held-out"),
        ("train", "eval_set"),
        ("train", "dev_matched"),
        ("desk_train_a", "test_b"),
        ("train", "test", "private_test"),
    ],
)
def test_a_file_that_is_not_for_training_by_its_name_is_no_task_of_its_own(tmp_path: Path, names: tuple[str]) -> None:
    for name in names:
        write_csv(tmp_path / f"{name}.csv", 0, 3)
    with pytest.raises(UserError, match=rf"{names[-1]}.csv: (is not for training|holds a split) by its name, but"):
        find_layout(tmp_path)


def test_a_folder_that_is_not_for_training_by_its_name_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train" / "a.csv", 0, 3)
    write_csv(tmp_path / "held-out" / "a.csv", 9, 3)
    with pytest.raises(UserError, match="held-out: is a split by its name, but which one"):
        find_layout(tmp_path)


def test_parts_as_spark_writes_them_are_one_task_and_a_shard_that_is_not_there_is_told(tmp_path: Path) -> None:
    for number in range(3):
        write_csv(tmp_path / "desk.csv" / f"part-0000{number}-8a-c000.csv", 9 * number, 3)
        if number != 1:
            write_csv(tmp_path / "shop" / f"train-0000{number}-of-00003.csv", 9 * number, 3)
    (tmp_path / "desk.csv" / "_SUCCESS").write_text("")
    layout = find_layout(tmp_path)
    assert [(source.stem, len(source.files)) for source in layout.sources] == [("desk", 3), ("shop", 2)]
    assert "shop/1 of the 3 shards of train.csv (missing)" in layout.left_out


def test_a_pipe_is_not_waited_for_and_a_link_to_the_folder_itself_is_no_second_task(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", 0, 3)
    write_csv(tmp_path / "test.csv", 9, 3)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "latest").symlink_to(tmp_path)
    layout = find_layout(tmp_path)
    assert [source.stem for source in layout.sources] == [tmp_path.name]
    assert layout.left_out == ["latest/ (a link to a folder that contains it)", "pipe.json (not a file)"]


def test_a_file_that_is_called_after_a_split_and_names_the_split_of_each_row_is_a_task(tmp_path):
    """Field trial 21: eval.jsonl beside training.jsonl, both with a column `split`."""
    for name in ("eval", "training"):
        rows = [f'{{"input": "{name} {split}", "answer": "a", "Split": "{split}"}}\n' for split in ("train", "test")]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    assert sorted(name_sources(tmp_path)) == ["eval", "training"]


@pytest.mark.parametrize("name", ["fold_{}", "fold {}", "part{}", "chunk-{}", "Batch_{}"])
def test_parts_as_people_number_them_are_one_task(tmp_path: Path, name: str) -> None:
    """Each part was a task of its own, divided into train and test by itself."""
    for number in range(3):
        write_csv(tmp_path / "desk" / f"{name.format(number)}.csv", 10 * number, 10)
    (task,) = load_tasks(tmp_path / "desk")
    assert (task.name, task.num_rows, sum(sizes(task))) == ("desk", 30, 30)
    write_csv(tmp_path / "one" / f"{name.format(1)}.csv", 0, 10)
    write_csv(tmp_path / "one" / "post.csv", 0, 10)
    assert sorted(found(tmp_path / "one")) == sorted([name.format(1), "post"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("data.zip", "data.zip (unpack it)"),
        ("desk.tar.gz", "desk.tar.gz (unpack it)"),
        ("desk.ndjson", "desk.ndjson (rename it to .jsonl)"),
        ("data-00000-of-00001.arrow", "data-00000-of-00001.arrow (save it as Parquet or CSV)"),
        ("desk.txt", "desk.txt"),
    ],
)
def test_what_is_not_read_is_told_with_what_makes_it_readable(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UserError) as refused:
        find_layout(tmp_path)
    assert str(refused.value).endswith(f" file (not read: {told})")
