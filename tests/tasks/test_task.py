"""Reading, checking and splitting tasks: small files that a reader can check by eye."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyicl.errors import UserError
from manyicl.tasks.layouts import find_layout
from manyicl.tasks.settings import FAMILIES, METRICS
from manyicl.tasks.task import (
    SPLITS,
    Example,
    Fault,
    Task,
    flip_labels,
    flip_map,
    inspect_task,
    load_task,
    load_tasks,
)
from tests.conftest import make_task

REAL_TASKS = Path(__file__).parents[3] / "shared" / "data" / "tasks"


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_settings(path: Path, content: object) -> None:
    path.with_name(f"{path.stem}.task.json").write_text(json.dumps(content), encoding="utf-8")


def only_fault(path: Path) -> Fault:
    task, faults = inspect_task(path)
    assert task is None
    assert len(faults) == 1, faults
    assert "\n" not in faults[0].message
    return faults[0]


def all_examples(task: Task) -> list[Example]:
    return [*task.train, *task.validation, *task.test]


GOOD = [
    {"input": "2 + 2", "answer": "4", "split": "train"},
    {"input": "3 + 3", "answer": "6", "split": "dev"},
    {"input": "4 + 4", "answer": "8", "split": "test"},
]


def test_jsonl_with_a_task_json_is_read_and_answers_lose_the_blanks_around_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "sums.jsonl", [*GOOD, {"input": " 5 + 5\n", "answer": " 10 ", "split": "Train"}])
    write_settings(path, {"name": "adding", "family": "math", "instruction": "Add.", "license": "CC0", "note": "x"})
    task = load_task(path)
    assert (task.name, task.family, task.metric, task.instruction) == ("adding", "math", "math_exact_match", "Add.")
    assert task.train == (Example("2 + 2", "4"), Example(" 5 + 5\n", "10"))
    assert task.validation == (Example("3 + 3", "6"),)
    assert task.test == (Example("4 + 4", "8"),)
    assert (task.num_rows, task.dropped, task.labels) == (4, {}, ())
    assert task.split_note == "Train, validation and test are as the files give them."


def test_an_example_is_known_by_a_hash_of_its_input_and_answer() -> None:
    assert Example("a", "b").id == hashlib.sha256(b"a\0b").hexdigest()[:16]
    assert Example("a", "b", ("b", "c")).id == Example("a", "b").id != Example("a", "c").id


def test_choices_are_the_rows_own_then_the_labels(tmp_path: Path) -> None:
    rows = [{"input": "x", "answer": "b", "options": ["b", "a"]}, {"input": "y", "answer": "a"}]
    path = write_rows(tmp_path / "t.jsonl", rows)
    write_settings(path, {"labels": ["b", "a", "c"]})
    task = load_task(path)
    first, second = sorted(all_examples(task), key=lambda example: example.input)
    assert task.labels == ("a", "b", "c")
    assert task.choices(first) == ("b", "a")
    assert task.choices(second) == ("a", "b", "c")
    assert replace(task, labels=()).choices(second) == ()


def test_the_same_data_is_the_same_task_in_every_format(tmp_path: Path) -> None:
    rows = [
        {"input": "a, b", "answer": "yes", "split": "train", "options": ["yes", "no"]},
        {"input": 'two\nlines "quoted"', "answer": "no", "split": "test", "options": ["yes", "no"]},
    ]
    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / kind).mkdir()
    write_rows(tmp_path / "jsonl" / "t.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "t.parquet")
    (tmp_path / "csv" / "t.csv").write_text(
        'input, answer,split,options\r\n"a, b",yes,train,yes | no\r\n\r\n'
        '"two\nlines ""quoted""",no,test,"[""yes"", ""no""]"\r\n',
        newline="",
    )
    tasks = [load_tasks(tmp_path / kind)[0] for kind in ("jsonl", "csv", "parquet")]
    assert tasks[0].test[0] == Example('two\nlines "quoted"', "no", ("yes", "no"))
    assert tasks[0] == tasks[1] == tasks[2]
    assert tasks[0].sha256 == tasks[1].sha256


def test_the_hash_covers_what_a_run_depends_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", GOOD)
    hashes = {load_task(path).sha256}
    for content in ({"name": "u"}, {"family": "math"}, {"metric": "token_f1"}, {"instruction": "Add."}):
        write_settings(path, content)
        hashes.add(load_task(path).sha256)
    write_settings(path, {"license": "other"})
    assert len(hashes) == 5
    assert load_task(path).sha256 in hashes
    write_rows(path, [GOOD[0], {**GOOD[1], "split": "train"}, GOOD[2]])
    assert load_task(path).sha256 not in hashes
    assert pickle.loads(pickle.dumps(load_task(path))) == load_task(path)


def test_numbers_are_answers_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"input": "a", "answer": 1.50}\n{"input": "b", "answer": 2, "options": [1, 2]}\n')
    examples = {example.input: example for example in all_examples(load_task(path))}
    assert examples == {"a": Example("a", "1.50"), "b": Example("b", "2", ("1", "2"))}
    assert type(examples["a"].answer) is str
    pyarrow.parquet.write_table(pyarrow.table({"input": ["a"], "answer": [7]}), tmp_path / "p.parquet")
    assert all_examples(load_task(tmp_path / "p.parquet")) == [Example("a", "7")]


def test_csv_answers_stay_text_and_long_cells_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"input,answer\n{'x' * 200_000},007\n")
    assert all_examples(load_task(path)) == [Example("x" * 200_000, "007")]


def test_byte_order_mark_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"input": "x", "answer": "\xc3\xa9"}\r\n\n  \n{"input": "y"}\n')
    assert only_fault(lines).rows == (4,)  # the line in the file
    lines.write_bytes(b'\xef\xbb\xbf{"input": "x", "answer": "\xc3\xa9"}\r\n\n')
    cells = tmp_path / "b.csv"
    cells.write_bytes(b"\xef\xbb\xbfinput,answer\nx,\xc3\xa9\n")
    for path in (lines, cells):
        (path.with_name(f"{path.stem}.task.json")).write_bytes(b'\xef\xbb\xbf{"family": "qa"}')
        task = load_task(path)
        assert all_examples(task) == [Example("x", "é")]
        assert task.num_rows == 1


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("answer,text,label,part\nignored,x,yes,test\n")
    write_settings(path, {"columns": {"input": "text", "answer": "label", "split": "part"}})
    assert load_task(path).test == (Example("x", "yes"),)


@pytest.mark.parametrize(
    ("answers", "family", "labels"),
    [
        (["yes", "no"] * 5, "classification", ("no", "yes")),  # 5 rows an answer
        (["yes", "no"] * 4, "qa", ()),
        (["y" * 50] * 5, "classification", ("y" * 50,)),
        (["y" * 51] * 5, "qa", ()),
        (["one\nline"] * 5, "qa", ()),
        ([str(i) for i in range(64)] * 5, "classification", tuple(sorted(str(i) for i in range(64)))),
        ([str(i) for i in range(65)] * 5, "qa", ()),
    ],
)
def test_family_is_told_from_the_answers(tmp_path: Path, answers: list[str], family: str, labels: tuple[str]) -> None:
    rows = [{"input": str(i), "answer": answer} for i, answer in enumerate(answers)]
    task = load_task(write_rows(tmp_path / "t.jsonl", rows))
    assert (task.family, task.labels) == (family, labels)
    assert task.metric == ("accuracy" if family == "classification" else "exact_match")


@pytest.mark.parametrize("family", FAMILIES)
def test_metric_follows_from_family_and_options(tmp_path: Path, family: str) -> None:
    open_metric = {"qa": "exact_match", "summarization": "rouge_l", "math": "math_exact_match"}.get(family, "accuracy")
    closed_metric = "rouge_l" if family == "summarization" else "accuracy"
    path = write_rows(tmp_path / "t.jsonl", [{"input": "a", "answer": "1"}])
    write_settings(path, {"family": family})
    assert load_task(path).metric == open_metric
    write_rows(path, [{"input": "a", "answer": "1", "options": ["1", "2"]}])
    assert load_task(path).metric == closed_metric
    for metric in METRICS:
        write_settings(path, {"family": family, "metric": metric})
        assert load_task(path).metric == metric


def test_labels_are_what_all_rows_share(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    same = [{"input": i, "answer": "b", "options": list(o)} for i, o in [("x", "abc"), ("y", "cba")]]
    assert load_task(write_rows(path, same)).labels == ("a", "b", "c")
    own = [{"input": i, "answer": "b", "options": list(o)} for i, o in [("x", "ab"), ("y", "bc")]]
    assert load_task(write_rows(path, own)).labels == ()
    write_settings(path, {"family": "nli"})
    for count, expected in [(256, 256), (257, 0)]:
        many = [{"input": str(i), "answer": f"label {i}"} for i in range(count)]
        assert len(load_task(write_rows(path, many)).labels) == expected


def test_without_a_split_a_fifth_is_test_and_a_tenth_of_the_rest_validation(tmp_path: Path) -> None:
    rows = [{"input": f"question {i}", "answer": str(i)} for i in range(2000)]
    task = load_task(write_rows(tmp_path / "t.jsonl", rows))
    assert len(task.test) == pytest.approx(400, abs=60)
    assert len(task.validation) == pytest.approx(160, abs=40)
    assert "20 %" in task.split_note

    def share(purpose: str, text: str) -> float:
        return int(hashlib.sha256(f"{purpose}\0{text}".encode()).hexdigest(), 16) / 2**256

    assert all(share("split", example.input) < 0.2 for example in task.test)
    assert all(share("split", example.input) >= 0.2 for example in (*task.train, *task.validation))
    assert all(share("validation", example.input) < 0.1 for example in task.validation)
    assert all(share("validation", example.input) >= 0.1 for example in task.train)


def test_a_file_may_hold_one_split_only(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"input": str(i), "answer": "a", "split": "test"} for i in range(50)])
    task = load_task(path)
    assert (len(task.train), len(task.validation), len(task.test)) == (0, 0, 50)
    write_rows(path, [{"input": str(i), "answer": "a", "split": "train"} for i in range(200)])
    task = load_task(path)
    assert len(task.test) == 0
    assert 0 < len(task.validation) < 50
    assert "10 % of the train rows" in task.split_note


def test_a_named_validation_split_takes_nothing_from_train(tmp_path: Path) -> None:
    rows = [{"input": str(i), "answer": "a", "split": "train"} for i in range(200)]
    task = load_task(write_rows(tmp_path / "t.jsonl", [*rows, {"input": "x", "answer": "a", "split": "val"}]))
    assert len(task.train) == 200
    assert task.validation == (Example("x", "a"),)


def test_repeated_inputs_are_dropped_and_counted(tmp_path: Path) -> None:
    words = [
        ("a", "1", "train"),
        ("a", "2", "train"),  # duplicate with another answer: the first stays
        ("a", "1", "train"),  # duplicate input
        ("b", "1", "train"),  # train/test overlap
        ("b", "1", "test"),
        ("b", "3", "test"),  # duplicate with another answer
        ("b", "1", "validation"),  # train/test overlap
        ("c", "1", "train"),  # train/validation overlap
        ("c", "1", "validation"),
    ]
    rows = [{"input": text, "answer": answer, "split": split} for text, answer, split in words]
    task = load_task(write_rows(tmp_path / "t.jsonl", rows))
    assert task.train == (Example("a", "1"),)
    assert task.validation == (Example("c", "1"),)
    assert task.test == (Example("b", "1"),)
    assert task.dropped == {
        "duplicate input": 1,
        "duplicate with another answer": 2,
        "train/test overlap": 2,
        "train/validation overlap": 1,
    }
    assert task.num_rows == 9


ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["1", "2"])), min_size=1, max_size=30)
SPLIT_NAMES = st.sampled_from([*SPLITS, "dev", "valid", "val"])
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@quick
@given(ROWS, st.lists(SPLIT_NAMES, min_size=30, max_size=30), st.booleans())
def test_every_row_is_kept_or_counted(tmp_path: Path, pairs: list[tuple[str, str]], splits: list[str], named: bool):
    rows = [{"input": text, "answer": answer} for text, answer in pairs]
    if named:
        rows = [{**row, "split": split} for row, split in zip(rows, splits, strict=False)]
    task = load_task(write_rows(tmp_path / "t.jsonl", rows))
    inputs = [example.input for example in all_examples(task)]
    assert len(inputs) + sum(task.dropped.values()) == task.num_rows == len(rows)
    assert sorted(inputs) == sorted({text for text, _ in pairs})  # every input in exactly one split


@pytest.mark.slow
@quick
@given(st.sets(st.text(min_size=1, alphabet="abc 123"), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_split_of_a_row_does_not_depend_on_the_others(tmp_path: Path, texts: set[str], random) -> None:
    texts = {text for text in texts if text.strip()} or {"a"}
    rows = [{"input": text, "answer": "x"} for text in sorted(texts)]
    whole = load_task(write_rows(tmp_path / "t.jsonl", rows))
    random.shuffle(rows)
    part = load_task(write_rows(tmp_path / "t.jsonl", rows[: random.randint(1, len(rows))]))
    for split in SPLITS:
        assert set(getattr(part, split)) <= set(getattr(whole, split))


BROKEN_LINES = [
    ("invalid JSON", b"{oops}", "each line must be one JSON object"),
    ("invalid JSON", b'{"input": "x\x01", "answer": "a"}', "(Invalid control character at character 13); each line"),
    ("invalid JSON", b'{"input": "x", "answer"', "(Expecting ':' delimiter at character 24); each line must be one"),
    ("invalid JSON", b"[" * 100_000, "nested too deeply"),
    ("not an object", b'["x", "y"]', "['x', 'y'] is not an object"),
    ("broken UTF-8", b'{"input": "\xff", "answer": "y"}', "byte 12 of the line is not UTF-8"),
    ("broken Unicode", b'{"input": "\\ud800", "answer": "y"}', "half of a surrogate pair"),
    ("no answer column", b'{"input": "x"}', "no 'answer' column (it has 'input'); add it"),
    ("empty input", b'{"input": " \\n", "answer": "y"}', "input ' \\n' is empty"),
    ("empty answer", b'{"input": "x", "answer": ""}', "answer '' is empty"),
    ("wrong type of input", b'{"input": 5, "answer": "y"}', "input 5 is not a text"),
    ("wrong type of answer", b'{"input": "x", "answer": ["y", ["z"]]}', "answer ['y', ['z']] is not a text, a number"),
    ("wrong type of answer", b'{"input": "x", "answer": {"text": "y"}}', '{"columns": {"answer": "answer.text"}}'),
    ("wrong type of answer", b'{"input": "x", "answer": Infinity}', "answer inf is not a text, a number"),
    ("empty answer", b'{"input": "x", "answer": NaN}', "answer nan is empty"),
    ("empty answer", b'{"input": "x", "answer": []}', "answer None is empty"),
    ("comma after the object", b'{"input": "x", "answer": "y"},', "a comma after the object; remove it"),
    ("single quotes", b"{'input': 'x', 'answer': 'y'}", "write double quotes"),
    ("unknown split", b'{"input": "x", "answer": "y", "split": "trian"}', "did you mean 'train'?"),
    ("unknown split", b'{"input": "x", "answer": "y", "split": 1}', "unknown split 1; write train, validation or test"),
    ("bad options", b'{"input": "x", "answer": "y", "options": "y|z"}', "options 'y|z' are not a list"),
    ("bad options", b'{"input": "x", "answer": "y", "options": ["y", null]}', "hold one that is not a text"),
    ("bad options", b'{"input": "x", "answer": "y", "options": ["y", ""]}', "or an empty one"),
    ("bad options", b'{"input": "x", "answer": "y", "options": ["y", "y"]}', "name one answer twice"),
    ("bad options", b'{"input": "x", "answer": "y", "options": ["y"]}', "leave no choice"),
    ("answer not among its options", b'{"input": "x", "answer": "yes", "options": ["yess", "n"]}', "mean 'yess'?"),
]


@pytest.mark.parametrize(("kind", "line", "text"), BROKEN_LINES)
def test_a_broken_line_is_one_fault(tmp_path: Path, kind: str, line: bytes, text: str) -> None:
    path = tmp_path / "foo.jsonl"
    path.write_bytes(b'{"input": "fine", "answer": "y"}\n' + line + b"\n")
    if kind == "unknown split":
        path.write_bytes(b'{"input": "fine", "answer": "y", "split": "train"}\n' + line + b"\n")
    fault = only_fault(path)
    assert (fault.path, fault.kind, fault.rows, fault.count) == (path, kind, (2,), 1)
    assert fault.message.startswith(f"{path}, row 2: ")
    assert text in fault.message
    with pytest.raises(UserError) as raised:
        load_task(path)
    assert str(raised.value) == fault.message


def test_thousands_of_rows_with_one_mistake_are_one_fault(tmp_path: Path) -> None:
    rows = [{"input": "x", "answer": "y"}] * 2 + [{"input": "x"}] * 1204
    path = write_rows(tmp_path / "foo.jsonl", rows)
    fault = only_fault(path)
    assert (fault.rows, fault.count) == ((3, 4, 5, 6, 7), 1204)
    assert fault.message.startswith(f"{path}, row 3 (and 1,203 more rows): no 'answer' column")
    assert fault.message.endswith("no 'answer' column (it has 'input'); add it")


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"ticket": "x", "team": "y"}, '{"columns": {"input": "ticket", "answer": "team"}}'),
        ({"id": 1, "input": "x", "team": "y"}, '{"columns": {"answer": "team"}}'),
    ],
)
def test_columns_that_are_called_otherwise_are_told_with_the_settings_that_read_them(
    tmp_path: Path, row: dict[str, object], settings: str
) -> None:
    path = write_rows(tmp_path / "foo.jsonl", [row] * 2)
    _, faults = inspect_task(path)
    assert faults[0].message.endswith(f"add it, or say in foo.task.json which it is, such as {settings}")
    (tmp_path / "foo.task.json").write_text(settings)
    assert load_task(path).num_rows == 2


def test_the_error_names_the_first_fault_and_counts_the_others(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "foo.jsonl", [{"input": "x"}, {"input": "", "answer": "y"}, [1], {"input": "z"}])
    task, faults = inspect_task(path)
    assert task is None
    assert [(fault.kind, fault.rows) for fault in faults] == [
        ("no answer column", (1, 4)),
        ("empty input", (2,)),
        ("not an object", (3,)),
    ]
    with pytest.raises(UserError) as raised:
        load_task(path)
    assert str(raised.value) == f"{faults[0].message} (and 2 other faults: run manyicl check {tmp_path})"
    assert "row 1 (and 1 more row): " in faults[0].message


def test_the_folder_that_the_error_names_holds_the_files_of_the_task(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"desk_{split}.csv").write_text("input,answer\nq,\n")
    with pytest.raises(UserError, match=rf"and 1 other fault: run manyicl check {tmp_path}\)$"):
        load_tasks(tmp_path)


def test_some_rows_with_a_split_and_some_without(tmp_path: Path) -> None:
    rows = [*GOOD, {"input": "x", "answer": "y"}, {"input": "z", "answer": "y", "split": None}]
    fault = only_fault(write_rows(tmp_path / "t.jsonl", rows))
    assert (fault.kind, fault.rows, fault.count) == ("split on some rows only", (4, 5), 2)
    assert "but 3 other rows have one" in fault.message


def test_a_split_column_in_other_letters_is_read_and_one_of_another_name_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("input,answer,Split\nx,y,test\n")
    assert load_task(path).test == (Example("x", "y"),)
    path.write_text("input,answer,set\nx,y,train\nz,y,test\n")
    fault = only_fault(path)
    assert fault.rows == ()
    assert "column 'set' holds splits, but is not read; name it \"split\"" in fault.message
    write_settings(path, {"columns": {"split": "part"}})
    assert "no row has the column 'part'" in only_fault(path).message


def test_an_answer_outside_the_labels(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"input": "x", "answer": "yes"}, {"input": "z", "answer": "noo"}])
    write_settings(path, {"labels": ["yes", "no"]})
    fault = only_fault(path)
    assert (fault.kind, fault.rows) == ("answer not among the labels", (2,))
    assert "'noo' is not among the labels" in fault.message
    assert fault.message.endswith("did you mean 'no'?")


CSV_FAULTS = [
    (b"", "no rows", ()),
    (b"input,answer\n", "no rows", ()),
    (b"input,answer,input\nx,y,z\n", "repeated column", ()),
    (b"input,answer\nx,y\ninput,answer\n", "repeated header", (2,)),
    (b"question;answer\nx;y\n", "other columns", ()),
    (b"PK\x03\x04", "not CSV", ()),
    (b"input,answer\nx,y\nz\n", "wrong number of cells", (2,)),
    (b'input,answer\n"x\nx",y\n\nz,y\n"oh,y\nw,y\n', "invalid CSV", (3,)),
    (b'input,answer\n"x\nx",y\nz,\xff\nw,y\n', "not UTF-8", (2,)),
    (b"input,answer\nx,y\n\xffz,y\n", "not UTF-8", (2,)),
    (b"in\xffput,answer\nx,y\n", "not UTF-8", ()),
    (b"input,answer,options\nx,y,[y\n", "bad options", (1,)),
    (b"input,answer,options\nx,y,\nx,y,y|z\nw,y,a|b\n", "answer not among its options", (3,)),
]


@pytest.mark.parametrize(("content", "kind", "rows"), CSV_FAULTS)
def test_faults_of_a_csv_file_name_the_data_row(tmp_path: Path, content: bytes, kind: str, rows: tuple[int]) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    _, faults = inspect_task(path)
    assert (faults[0].kind, faults[0].rows) == (kind, rows)
    assert len(faults) == 1
    assert "quote commas" not in faults[0].message


def test_a_broken_or_empty_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 this is no table")
    assert only_fault(path).kind == "invalid Parquet"
    pyarrow.parquet.write_table(pyarrow.table({"input": [], "answer": []}), path)
    assert only_fault(path).kind == "no rows"
    pyarrow.parquet.write_table(pyarrow.table({"input": ["x", None], "answer": [b"y", b"z"]}), path)
    _, faults = inspect_task(path)
    assert [(fault.kind, fault.rows) for fault in faults] == [
        ("wrong type of answer", (1, 2)),
        ("empty input", (2,)),
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "invalid JSON"),
        ('{"instruction": "\\ud800"}', "surrogates not allowed"),
        ("[1]", "is not an object"),
        ('{"famly": "qa"}', "unknown key 'famly'; did you mean 'family'?"),
        ('{"Metric": "accuracy"}', "unknown key 'Metric'; did you mean 'metric'?"),
        ('{"column": {"input": "text"}}', "unknown key 'column'; did you mean 'columns'?"),
        ('{"family": "clasification"}', "did you mean 'classification'?"),
        ('{"metric": "rouge"}', "did you mean 'rouge_l'?"),
        ('{"metric": 5}', "metric 5 is unknown; known: accuracy"),
        ('{"instruction": ["Add."]}', "instruction ['Add.'] is not a text"),
        ('{"name": "a/b"}', "name 'a/b' is not a name"),
        ('{"name": 5}', "name 5 is not a name"),
        ('{"name": ".."}', "name '..' is not a name"),  # a run of its own would lie in the folder above
        ('{"labels": "yes"}', "are not a list of different, non-empty texts"),
        ('{"labels": []}', "are not a list"),
        ('{"labels": ["a", "a"]}', "are not a list of different"),
        ('{"columns": {"inputs": "text"}}', "did you mean 'input'?"),
        ('{"columns": {"input": 1}}', "does not map"),
        ('{"columns": {"input": "a", "answer": "a"}}', "two of our columns to one"),
    ],
)
def test_a_mistake_in_the_task_json(tmp_path: Path, content: str, text: str) -> None:
    path = write_rows(tmp_path / "t.jsonl", GOOD)
    settings_path = tmp_path / "t.task.json"
    settings_path.write_text(content)
    fault = only_fault(path)
    assert fault.path == settings_path
    assert fault.message.startswith(f"{settings_path}: ")
    assert text in fault.message


@pytest.mark.parametrize("stem", [b"caf\xe9", b"a\x01b"])
def test_a_files_name_that_no_result_could_hold_is_a_fault(tmp_path: Path, stem: bytes) -> None:
    """An evaluation asked everything, and could write neither its Parquet file nor its plots."""
    path = write_rows(tmp_path / os.fsdecode(stem + b".jsonl"), GOOD)
    fault = only_fault(path)
    assert fault.kind == "bad name"
    assert fault.message.endswith(
        f": its name {os.fsdecode(stem)!r} is not a name: a text on one line, without slashes; rename the file, or give"
        ' another "name" in its ' + f"{path.stem}.task.json"
    )
    write_settings(path, {"name": "café"})
    assert load_task(path).name == "café"


@pytest.mark.parametrize("stem", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "f\xa0b"])
def test_a_name_may_have_joiners_and_unbroken_spaces(tmp_path: Path, stem: str) -> None:
    """Persian and Hindi write with joiners, which a file's name could have and a task.json's could not."""
    path = write_rows(tmp_path / f"{stem}.jsonl", GOOD)
    assert load_task(path).name == stem
    write_settings(path, {"name": f"{stem}2"})
    assert load_task(path).name == f"{stem}2"


def test_tasks_come_sorted_by_name_and_can_be_chosen(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", GOOD)
    write_settings(tmp_path / "a.jsonl", {"name": "z"})
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "INDEX.md").write_text("notes")
    assert [source.path.name for source in find_layout(tmp_path).sources] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [task.name for task in load_tasks(str(tmp_path))] == ["b", "c", "z"]
    assert [task.name for task in load_tasks(tmp_path, names=["z", "b"])] == ["b", "z"]
    write_rows(tmp_path / "c.jsonl", [5])
    assert [task.name for task in load_tasks(tmp_path, names=["b"])] == ["b"]  # the broken one is not read
    with pytest.raises(UserError, match=r"c\.jsonl, row 1: 5 is not an object"):
        load_tasks(tmp_path)


def test_an_unknown_task_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    write_rows(tmp_path / "banking77.jsonl", GOOD)
    with pytest.raises(UserError, match="no task 'banking'; did you mean 'banking77'"):
        load_tasks(tmp_path, names=["banking"])


def test_mistakes_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_layout(tmp_path / "absent")
    with pytest.raises(UserError, match="no task in it; add a"):
        find_layout(tmp_path)
    path = write_rows(tmp_path / "foo.jsonl", GOOD)
    with pytest.raises(UserError, match="not a folder"):
        find_layout(path)
    write_settings(tmp_path / "fooo.jsonl", {})
    with pytest.raises(UserError, match=r"fooo\.task\.json: no data file .* did you mean 'foo'"):
        find_layout(tmp_path)
    (tmp_path / "fooo.task.json").unlink()
    (tmp_path / "foo.csv").write_text("input,answer\nx,y\n")
    with pytest.raises(UserError, match=r"foo\.jsonl: foo\.csv is also called 'foo'; rename or remove one"):
        load_tasks(tmp_path)
    (tmp_path / "foo.csv").unlink()
    for name in ("a", "b"):
        write_settings(write_rows(tmp_path / f"{name}.jsonl", GOOD), {"name": "same"})
    with pytest.raises(UserError, match=r"b\.jsonl: a\.jsonl is also called 'same'"):
        load_tasks(tmp_path)
    for name in ("c_train", "c_test", "d_train", "d_test"):
        write_rows(tmp_path / f"{name}.jsonl", GOOD)
    for name in ("c", "d"):
        write_settings(tmp_path / f"{name}.jsonl", {"name": "other"})
    for name in ("a", "b"):
        (tmp_path / f"{name}.task.json").unlink()
    with pytest.raises(UserError, match=r"d_test\.jsonl: c_test\.jsonl is also called 'other'; rename or remove one"):
        load_tasks(tmp_path)


def test_a_path_that_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        load_task(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"cannot read '\.txt' files; known: \.jsonl, \.json, \.csv"):
        inspect_task(tmp_path / "notes.txt")


# --- labels exchanged --------------------------------------------------------------------------------------------


@given(labels=st.lists(st.text(max_size=5), min_size=2, max_size=12, unique=True), seed=st.integers(0, 2**32))
def test_every_label_is_exchanged_for_another_each_once_whatever_their_order(labels: list[str], seed: int) -> None:
    flipped = flip_map(labels, seed=seed)
    assert set(flipped) == set(flipped.values()) == set(labels)
    assert all(label != other for label, other in flipped.items())
    assert flip_map(labels[::-1], seed=seed) == flipped


def test_the_seed_chooses_among_all_exchanges_alike() -> None:
    counts = Counter(tuple(flip_map("abcd", seed=seed).values()) for seed in range(900))
    assert len(counts) == 9  # derangements of four
    assert min(counts.values()) > 60
    assert flip_map(["yes", "no"], seed=5) == {"yes": "no", "no": "yes"}


def test_a_flipped_task_has_exchanged_answers_everywhere_and_all_else_as_it_was() -> None:
    task = make_task("animals")
    flipped, exchanged = flip_labels(task, seed=1), flip_map(task.labels, seed=1)
    back = {new: old for old, new in exchanged.items()}
    for split in SPLITS:
        one, other = getattr(task, split), getattr(flipped, split)
        assert [e.input for e in other] == [e.input for e in one]
        assert [e.answer for e in other] == [exchanged[e.answer] for e in one]
        assert [back[e.answer] for e in other] == [e.answer for e in one]
    assert replace(flipped, **{s: getattr(task, s) for s in SPLITS}, sha256=task.sha256) == task
    assert len({task.sha256, flipped.sha256, flip_labels(task, seed=2).sha256}) == 3
    assert flip_labels(task, seed=1) == flipped


def test_other_right_answers_are_flipped_too() -> None:
    task = make_task("animals")
    first, second, *_ = task.labels
    test = (replace(task.test[0], answer=first, also_right=(second, "no label")),)
    exchanged = flip_map(task.labels, seed=1)
    flipped = flip_labels(replace(task, test=test), seed=1)
    assert flipped.test[0].answers == (exchanged[first], exchanged[second], "no label")


@pytest.mark.parametrize("labels", [(), ("only",)])
def test_a_task_without_two_labels_cannot_be_flipped(labels: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"task 'animals': has fewer than two fixed labels, so none to exchange"):
        flip_labels(replace(make_task("animals"), labels=labels), seed=0)
    with pytest.raises(UserError, match=r"labels \[.*\]: exchanging labels needs two or more; leave the task out"):
        flip_map(labels, seed=0)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not REAL_TASKS.is_dir(), reason="../shared/data/tasks is absent")
def test_the_real_tasks_load_without_a_fault() -> None:
    tasks = {task.name: task for task in load_tasks(REAL_TASKS)}
    assert len(tasks) == 39
    for name, task in tasks.items():
        stated = json.loads((REAL_TASKS / f"{name}.task.json").read_text(encoding="utf-8"))
        assert (task.family, task.metric) == (stated["family"], stated["metric"])
        assert task.labels == tuple(sorted(stated.get("labels", [])))
        assert len(task.train) + len(task.validation) == stated["train_size"]
        assert len(task.test) == stated["test_size"]
        assert task.dropped == {}
        assert 0.05 < len(task.validation) / stated["train_size"] < 0.15
        if task.metric == "accuracy":
            assert all(example.answer in task.choices(example) for example in task.test)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"family": "qa", "family": "nli"}', "has 'family' twice; remove one of them"),
        ('{"family": "qa"}'.encode("utf-16"), "is not UTF-8; save it as UTF-8"),
        (b'{"answer_index": 0}', 'no row has options, but "answer_index" is set; correct foo.task.json'),
    ],
)
def test_more_mistakes_in_a_task_json(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "foo.jsonl").write_text('{"input": "x", "answer": "y"}\n')
    (tmp_path / "foo.task.json").write_bytes(content)
    _, faults = inspect_task(tmp_path / "foo.jsonl")
    assert text in faults[0].message
