"""Data files as people have them: formats, separators, columns, options, shapes, labels (issue 18, points 4 and 5)."""

from __future__ import annotations

import decimal
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from manyicl.tasks.task import Example, Fault, Task, inspect_task, load_task, name_sources

ROWS = [{"input": "one", "answer": "a", "split": "train"}, {"input": "two", "answer": "b", "split": "train"}]
EXPECTED = [Example("one", "a"), Example("two", "b")]


def read(tmp_path: Path, name: str, content: str | bytes, settings: object = None) -> tuple[Task | None, list[Fault]]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if settings is not None:
        (tmp_path / f"{name.partition('.')[0]}.task.json").write_text(json.dumps(settings))
    return inspect_task(path)


def examples_of(tmp_path: Path, name: str, content: str | bytes, settings: object = None) -> list[Example]:
    task, faults = read(tmp_path, name, content, settings)
    assert task is not None, faults
    return sorted((*task.train, *task.validation, *task.test), key=lambda example: example.input)


def only_message(tmp_path: Path, name: str, content: str | bytes, settings: object = None) -> str:
    task, faults = read(tmp_path, name, content, settings)
    assert task is None
    assert len(faults) == 1, faults
    return faults[0].message


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "input,answer,split\none,a,train\ntwo,b,train\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", LINES),
        ("t.json", LINES),  # as the hub writes it
        ("t.json", json.dumps(ROWS)),
        ("t.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("t.json", json.dumps({name: {"0": ROWS[0][name], "1": ROWS[1][name]} for name in ROWS[0]})),  # pandas
        ("t.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),  # datasets
        ("t.jsonl", json.dumps(ROWS, indent=1)),  # trial 09b
        ("t.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),  # trial 10
        ("t.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("t.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("t.tsv", TABLE.replace(",", "\t")),
        ("t.csv", TABLE.replace(",", ";")),  # trial 04
        ("t.csv", TABLE.replace(",", "|")),
        ("t.csv", TABLE.replace(",", "\t")),
        ("t.tsv", TABLE),
        ("t.csv", "sep=;\r\n" + TABLE.replace(",", ";")),  # trial 42
        ("t.csv", b"\xef\xbb\xbf\xef\xbb\xbf" + TABLE.encode()),
        ("t.csv", TABLE.replace(",", "\t").encode("utf-16")),  # trial 02
        ("t.csv", TABLE.encode("utf-16-le")),
        ("t.jsonl", LINES.encode("utf-16")),
        ("t.csv", " Input ,ANSWER,Split\none,a,train\ntwo,b,train\n"),  # trial 05
        ("t.csv", "input,answer,split,note,note\none,a,train,1,2\ntwo,b,train,3,4\n"),  # trial 07
        ("t.csv", "input,answer,split,\none,a,train\ntwo,b,train,,,\n"),  # trial 06
    ],
)
def test_every_way_to_write_the_same_rows_is_read(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert examples_of(tmp_path, name, content) == EXPECTED


def test_blank_rows_are_passed_over_and_counted_trial_06(tmp_path: Path) -> None:
    task, _ = read(tmp_path, "t.csv", "input,answer\none,a\n,\n , \ntwo,b\n")
    assert task is not None
    assert (task.num_rows, task.dropped) == (4, {"blank row": 2})
    assert "t.csv: the file has no rows" in only_message(tmp_path, "t.csv", "input,answer\n,\n,\n")


def test_columns_are_named_in_the_order_of_the_file(tmp_path: Path) -> None:
    """A message about a CSV file without a header listed its columns from right to left."""
    _, faults = read(tmp_path, "t.csv", "red,round,apple\nyellow,long,banana\n")
    assert all("(it has 'red', 'round', 'apple')" in fault.message for fault in faults)
    assert [fault.kind for fault in faults] == ["no input column", "no answer column"]


def test_a_separator_in_a_cell_is_told_by_its_name(tmp_path: Path) -> None:
    message = only_message(tmp_path, "t.csv", "input;answer\none;a\ntwo;b;c\n")
    assert "row 2: 3 cells, but the header has 2, separated by a semicolon; " in message
    assert message.endswith("put a cell that holds a semicolon in double quotes")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("t.csv", b"PK\x03\x04...", "is a zip file, as Excel's .xlsx is"),
        ("t.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the data"),
        ("t.csv.gz", b"input,answer\n", "is not compressed by gzip; remove .gz from its name"),
        ("t.csv.gz", gzip.compress(TABLE.encode() * 50, mtime=0)[:-9], "the gzip data are damaged"),
        ("t.json", b"[{]\n\n", "invalid JSON"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_is(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    assert text in only_message(tmp_path, name, content)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"q": {"text": "x"}, "answers": {"text": ["3", "three"]}},
            {"input": "q.text", "answer": "answers.text.0"},
            "3",
        ),
        ({"input": "x", "a.b": "dotted"}, {"answer": "a.b"}, "dotted"),
        (
            {"messages": [{"content": "x"}, {"content": "y"}]},
            {"input": "messages.0.content", "answer": "messages.-1.content"},
            "y",
        ),
        ({"input": "x", "answer": True}, {}, "true"),
        ({"input": "x", "answer": 1.50}, {}, "1.5"),
    ],
)
def test_columns_take_paths_and_answers_any_plain_value(tmp_path, row, columns, expected) -> None:
    assert examples_of(tmp_path, "t.jsonl", json.dumps(row), {"columns": columns}) == [Example("x", expected)]


def test_columns_are_joined_and_empty_ones_left_out_trial_17(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "hi"},
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    settings = {"columns": {"input": ["instruction", "input"], "answer": "output"}}
    assert examples_of(tmp_path, "t.jsonl", content, settings) == [Example("Add.\n1 1", "2"), Example("Greet.", "hi")]


def test_several_right_answers_trials_15b_22(tmp_path: Path) -> None:
    content = json.dumps({"input": "x", "answer": ["3", "three ", "3"]})
    assert examples_of(tmp_path, "t.jsonl", content) == [Example("x", "3", (), ("three",))]


OPTIONS = ["red", "blue", "grey"]


@pytest.mark.parametrize(
    ("answers", "labels", "settings"),
    [
        ([0, 1, 2], None, None),
        ([1, 2, 3], None, None),  # counted from 1: 3 would be none, counted from 0
        (["A", "B", "C"], None, None),
        (["x", "y", "z"], ["x", "y", "z"], {"columns": {"option_labels": "labels"}}),
    ],
)
def test_an_answer_may_name_an_option_trials_19(tmp_path: Path, answers, labels, settings) -> None:
    rows = [{"input": str(n), "answer": a, "options": OPTIONS, "labels": labels} for n, a in enumerate(answers)]
    found = examples_of(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows), settings)
    assert [example.answer for example in found] == OPTIONS


def test_how_numbers_of_options_are_counted_is_asked_for_if_it_is_not_certain(tmp_path: Path) -> None:
    content = "".join(json.dumps({"input": str(n), "answer": n, "options": OPTIONS}) + "\n" for n in (1, 2))
    message = only_message(tmp_path, "t.jsonl", content)
    assert 'if it is an option\'s number, write {"answer_index": 0} (counted from 0, or 1) into t.task.json' in message
    found = examples_of(tmp_path, "t.jsonl", content, {"answer_index": 1})
    assert [example.answer for example in found] == ["red", "blue"]


def test_an_instruction_of_each_row_is_named_with_the_task_json_that_reads_it(tmp_path: Path) -> None:
    """Review C: it was passed over without a word."""
    content = "instruction,input,answer\nadd,1 2,3\nmultiply,1 2,2\n"
    mapped = {"columns": {"input": ["instruction", "input"]}}
    task, _ = read(tmp_path, "t.csv", content)
    assert task is not None
    assert task.notes == (
        "columns not read: instruction",
        f"each row's instruction is not read; to put it before the input, write {json.dumps(mapped)} into t.task.json",
    )
    assert examples_of(tmp_path, "t.csv", content, mapped) == [Example("add\n1 2", "3"), Example("multiply\n1 2", "2")]


def test_options_in_columns_of_their_own_trial_19b(tmp_path: Path) -> None:
    content = "question,A,B,C,answer\none,red,blue,grey,C\ntwo,red,,grey,A\n"
    mapped = {"columns": {"input": "question", "options": ["A", "B", "C"]}}
    assert examples_of(tmp_path, "t.csv", content, mapped) == [
        Example("one", "grey", ("red", "blue", "grey")),
        Example("two", "red", ("red", "grey")),
    ]
    task, _ = read(tmp_path, "t.csv", content, {"columns": {"input": "question"}})
    assert task is not None
    assert "columns not read: A, B, C" in task.notes
    assert f"A, B, C look like the options; to read them, write {json.dumps(mapped)} into t.task.json" in task.notes


SHAPES = [
    ({"instruction": "x", "input": "", "output": "y"}, "alpaca"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, "ShareGPT"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "chat messages"),
    ({"context": "c", "question": "q", "answers": {"text": ["y"], "answer_start": [0]}}, "SQuAD"),
    ({"question": "x", "choices": ["z", "y"], "answer": 1}, "MMLU"),
    ({"question": "x", "A": "z", "B": "y", "answer": "B"}, "MMLU"),
    ({"question": "x", "choices": {"text": ["z", "y"], "label": ["A", "B"]}, "answerKey": "B"}, "ARC"),
    ({"text": "x", "label": "y"}, "'text' looks like the input"),
    ({"premise": "x", "hypothesis": "z", "label": "y"}, "two texts"),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "'prompt' looks like the input and 'chosen' like the answer"),
    ({"question": "x", "ground_truth": "y"}, "'question' looks like the input"),
]


@pytest.mark.parametrize(("row", "name"), SHAPES)
def test_a_known_shape_is_recognised_and_the_shown_task_json_reads_it(tmp_path: Path, row, name: str) -> None:
    content = f"{json.dumps(row)}\n"
    message = only_message(tmp_path, "t.jsonl", content)
    assert name in message
    shown = message.partition(" write ")[2].removesuffix(" into t.task.json")
    if name == "MMLU":
        shown = json.dumps({**json.loads(shown), "answer_index": 0} if "choices" in row else json.loads(shown))
    (example,) = examples_of(tmp_path, "t.jsonl", content, json.loads(shown))
    assert example.answer == "y"
    assert example.input


def test_squads_own_nesting_is_read_row_by_row(tmp_path: Path) -> None:
    question = {"id": 1, "question": "q", "answers": [{"text": "3", "answer_start": 0}, {"text": "three"}]}
    content = json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [question]}]}]})
    settings = {"columns": {"input": ["context", "question"], "answer": "answers.text"}}
    assert examples_of(tmp_path, "t.json", content, settings) == [Example("c\nq", "3", (), ("three",))]


def test_class_names_and_whole_floats_in_parquet_trials_13_14(tmp_path: Path) -> None:
    features = {"answer": {"names": ["repair", "sales"], "_type": "ClassLabel"}, "input": {"_type": "Value"}}
    table = pyarrow.table({"input": ["x", "y"], "answer": [1, 0]})
    named = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(named, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"input": ["x"], "answer": [2.0]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"input": ["x"], "answer": [True]}), tmp_path / "c.parquet")
    answers = {}
    for name in ("a", "b", "c"):
        task = load_task(tmp_path / f"{name}.parquet")
        answers[name] = {e.input: e.answer for e in (*task.train, *task.validation, *task.test)}
    assert answers == {"a": {"x": "sales", "y": "repair"}, "b": {"x": "2"}, "c": {"x": "true"}}


def label_rows(labels: list[str]) -> str:
    return "".join(json.dumps({"input": f"row {n}", "answer": label}) + "\n" for n, label in enumerate(labels))


def test_labels_that_are_one_label_trials_24_24b_41b(tmp_path: Path) -> None:
    task, _ = read(tmp_path, "t.jsonl", label_rows(["caf\u00e9", "cafe\u0301", " bar\n", "bar"] * 10))
    assert task is not None
    assert (task.family, task.labels, task.warnings) == ("classification", ("bar", "caf\u00e9"), ())
    assert task.notes == ("answers tidied: Unicode form (10)", "answers tidied: white space around the answer (10)")


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (["Repair", "repair", "repair"] * 10, "'repair' 20, 'Repair' 10"),
        (["a, b", "b, a", "b, a"] * 10, "'b, a' 20, 'a, b' 10"),  # trial 23
        (["card_lost", "card lost", "card lost"] * 10, "'card lost' 20, 'card_lost' 10"),
        (["-5", "5", "5"] * 10, ""),
        (["+", "-", "-"] * 10, ""),
        (["1.5", "15", "15"] * 10, ""),
        (["shipping"] * 20 + ["Shiping", "billing"] + ["billing"] * 19, "'shipping' 20, 'Shiping' 1"),
        (["billing", "account"] * 15 + ["biling", "acconut"], "'billing' 15, 'biling' 1; 'account' 15, 'acconut' 1"),
        (["billing"] * 9 + ["biling"] * 9, ""),  # as frequent as each other: two labels, however alike
        (["level 1"] * 30 + ["level 2"], ""),
        (["cat"] * 30 + ["car"], ""),
    ],
)
def test_labels_that_may_be_one_are_told_with_counts(tmp_path: Path, labels: list[str], warning: str) -> None:
    task, _ = read(tmp_path, "t.jsonl", label_rows(labels))
    assert task is not None
    told = f"answers that may be the same: {warning}; if they are, write them alike"
    assert task.warnings == ((told,) if warning else ())


def split_rows(train: list[str], test: list[str]) -> str:
    rows = [{"input": f"row {n}", "answer": answer, "split": "train"} for n, answer in enumerate(train)]
    rows += [{"input": f"asked {n}", "answer": answer, "split": "test"} for n, answer in enumerate(test)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_labels_0_and_1_are_those_that_pandas_writes_as_0_0_and_1_0_in_a_column_with_a_gap(tmp_path: Path) -> None:
    task, _ = read(tmp_path, "t.jsonl", split_rows(["0", "1", "1"] * 10, ["0.0", "1.0", "1.0", "1.0", "-2.00", "-2"]))
    assert task is not None
    assert (task.family, task.labels, task.warnings) == ("classification", ("-2", "0", "1"), ())
    assert [example.answer for example in task.test] == ["0", "1", "1", "1", "-2", "-2"]
    assert task.notes == (
        "labels that are the same number are read alike: '-2.00' as '-2' (1); '0.0' as '0' (1); '1.0' as '1' (3)",
    )


def test_a_note_of_labels_that_are_one_number_counts_those_that_it_does_not_show(tmp_path: Path) -> None:
    task, _ = read(tmp_path, "t.jsonl", split_rows(["0", "1", "2", "3", "4"] * 6, ["0.0", "1.0", "2.0", "3.0", "4.0"]))
    assert task is not None
    shown = "'0.0' as '0' (1); '1.0' as '1' (1); '2.0' as '2' (1); and 2 more"
    assert task.notes == (f"labels that are the same number are read alike: {shown}",)


def test_numbers_that_are_no_other_label_stay_as_they_are_written(tmp_path: Path) -> None:
    for answers in (["1.0", "2.0"], ["1.5", "1.50"], ["3.1", "3.10"], ["01", "1"], ["+1", "1"]):
        task, _ = read(tmp_path, "t.jsonl", label_rows(answers * 10))
        assert task is not None
        assert (task.labels, task.notes) == (tuple(sorted(answers)), ())
    results, _ = read(tmp_path, "t.jsonl", label_rows(["1", "1.0"] * 20), {"family": "math"})
    assert results is not None
    assert {example.answer for example in results.train} == {"1", "1.0"}


def test_labels_that_are_listed_decide_which_form_of_a_number_is_meant(tmp_path: Path) -> None:
    rows = label_rows(["1", "1.0", "2"] * 10)
    both, _ = read(tmp_path, "t.jsonl", rows, {"labels": ["1", "1.0", "2"], "family": "classification"})
    assert both is not None
    assert {example.answer for example in both.train} == {"1", "1.0", "2"}
    one, _ = read(tmp_path, "t.jsonl", rows, {"labels": ["1.0", "2.0"], "family": "classification"})
    assert one is not None
    assert {example.answer for example in one.train} == {"1.0", "2.0"}


def test_test_labels_that_train_rows_write_otherwise_are_refused_with_the_fix(tmp_path: Path) -> None:
    rows = split_rows(["Yes", "No", "No"] * 10, ["yes", "no", "maybe"])
    _, faults = read(tmp_path, "t.jsonl", rows)
    assert [fault.message for fault in faults] == [
        f"{tmp_path}/t.jsonl, row 31 (and 1 more row): answer 'yes' is in no train row, but 'Yes' is; write them alike,"
        ' or list both as "labels" in t.task.json if they are two'
    ]
    labels = {"labels": ["Yes", "No", "yes", "no", "maybe"], "family": "classification"}
    listed, _ = read(tmp_path, "t.jsonl", rows, labels)
    assert listed is not None
    assert len(listed.labels) == 5


def test_a_label_written_in_two_ways_in_train_is_told_only(tmp_path: Path) -> None:
    task, _ = read(tmp_path, "t.jsonl", split_rows(["Yes", "yes", "No"] * 10, ["yes", "No"]))
    assert task is not None
    assert task.warnings == ("answers that may be the same: 'yes' 11, 'Yes' 10; if they are, write them alike",)


def test_labels_with_too_few_rows_to_be_known_as_such_are_told_with_the_fix(tmp_path: Path) -> None:
    few, _ = read(tmp_path, "t.jsonl", label_rows(["repair", "sale"] * 3))
    assert few is not None
    assert (few.family, few.labels) == ("qa", ())
    assert few.warnings == (
        '2 different answers: they are generated; to choose among them instead, write {"family": "classification"}'
        " into t.task.json",
    )
    more, _ = read(tmp_path, "t.jsonl", label_rows(["repair", "sale"] * 5))
    assert more is not None
    assert (more.labels, more.warnings) == (("repair", "sale"), ())
    for answers in ([f"answer {n}" for n in range(6)], ["7", "12", "-3"] * 3):
        open_, _ = read(tmp_path, "t.jsonl", label_rows(answers))
        assert open_ is not None
        assert open_.warnings == ()


def test_more_labels_than_are_chosen_among_are_told_with_the_fix_trial_47(tmp_path: Path) -> None:
    task, _ = read(tmp_path, "t.jsonl", label_rows([f"intent {n}" for n in range(77)] * 10))
    assert task is not None
    assert (task.family, task.labels) == ("qa", ())
    assert task.warnings == (
        '77 different answers: they are generated; to choose among them instead, write {"family": "classification"}'
        " into t.task.json",
    )
    task, _ = read(
        tmp_path, "t.jsonl", label_rows([f"intent {n}" for n in range(77)] * 10), {"family": "classification"}
    )
    assert task is not None
    assert (len(task.labels), task.warnings) == (77, ())
    task, _ = read(
        tmp_path, "t.jsonl", label_rows([f"intent {n}" for n in range(300)] * 5), {"family": "classification"}
    )
    assert task is not None
    assert task.warnings[0].endswith('to choose among them instead, list them as "labels" in t.task.json')


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "\ufeffinput,answer,split\r\none,a,train\r\ntwo,b,train\r\n\x1a"),  # the end of a file in DOS
        ("t.csv", 'input, answer, split\n"one", "a", "train"\n"two", "b", "train"\n'),
        ("t.json", json.dumps({"7": ROWS[0], "8": ROWS[1]})),  # pandas, by index
        ("t.jsonl", LINES.replace("\n", "\n\ufeff", 1)),  # two files with marks, put together with cat
        ("t.tsv", TABLE.replace(",", "\t") + ""),
    ],
)
def test_more_ways_to_write_the_same_rows_are_read(tmp_path: Path, name: str, content: str) -> None:
    assert examples_of(tmp_path, name, content) == EXPECTED


def test_a_table_with_tabs_and_quotes_of_its_own_is_read_unquoted_and_a_quoted_one_as_it_says(tmp_path: Path) -> None:
    plain = 'input\tanswer\tsplit\n"open\ta\ttrain\n"word" x\tb\ttrain\n'
    assert [e.input for e in examples_of(tmp_path, "t.tsv", plain)] == ['"open', '"word" x']
    quoted = 'input\tanswer\tsplit\n"one\nmore"\ta\ttrain\n"two ""x"""\tb\ttrain\n'
    assert [e.input for e in examples_of(tmp_path, "t.tsv", quoted)] == ["one\nmore", 'two "x"']


def test_utf_16_without_a_mark_is_read_if_only_its_header_is_ascii(tmp_path: Path) -> None:
    content = "input,answer,split\nприв,да,train\nприв2,нет,train\n".encode("utf-16-le")
    assert examples_of(tmp_path, "t.csv", content) == [Example("прив", "да"), Example("прив2", "нет")]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("t.csv", TABLE.encode("utf-32"), "is text in UTF-32; save it as UTF-8"),
        ("t.csv", b"<!DOCTYPE html>\n<html>a,b</html>\n", "is a web page (HTML), not the data"),
        ("t.parquet", b"<html></html>" * 9, "is a web page (HTML), not the data"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the data"),
        ("t.csv.gz", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the data"),
        ("t.csv", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(99), "is an old Office file"),
        ("t.jsonl", b"\x28\xb5\x2f\xfd....", "is compressed by zstd; unpack it"),
        ("t.csv", LINES.encode(), "is JSON, not a table; name it .jsonl"),
        ("t.csv", json.dumps(ROWS, indent=1).encode(), "is JSON, not a table; name it .json"),
        ("t.jsonl", b"input,answer\n", "row 1: 'input,answer' is not JSON; if the file is a table, name it .csv"),
        ("t.csv", b"# exported\n" + TABLE.encode(), "the header is row 2; remove the row above it"),
        ("t.csv", b"Desk, 2026\n,\n" + TABLE.encode(), "the header is row 3; remove the 2 rows above it"),
        ("t.csv", TABLE.encode() + b"\0" * 4096, "ends in 4,096 NUL bytes, as after a crash"),
        ("t.jsonl", LINES.encode() + b"\0" * 4096, "row 3: 4,096 NUL bytes, as after a crash"),
        ("t.csv", (b"\xef\xbb\xbf" + TABLE.encode()) * 2, "row 3: the row repeats the header; remove it"),
        ("t.jsonl", LINES.replace("\n", " ").encode(), "row 1: more than one value on the line"),
        ("t.jsonl", json.dumps(ROWS[0], indent=1).encode(), "has objects that span several lines"),
        ("t.jsonl", b'{"input": "x", "answer": "a", "answer": "b"}\n', "row 1: the object has 'answer' twice"),
        ("t.csv", "input,answer\nx,\u200b\n".encode(), "row 1: answer '\\u200b' is empty"),
    ],
)
def test_the_message_names_what_is_wrong_with_a_file(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    assert text in only_message(tmp_path, name, content)


@pytest.mark.parametrize(
    ("columns", "row", "text"),
    [
        ({"input": ["context", "qestion"]}, {"context": "x", "question": "y"}, "no row has the column 'qestion'"),
        ({"input": "q", "options": ["A", "B", "CC"]}, {"q": "x", "A": "a", "B": "b", "C": "c"}, "the column 'CC'"),
        ({"input": "q", "options": "c.txt"}, {"q": "x", "c": {"text": ["a", "b"]}}, "no row has the column 'c.txt'"),
        ({"input": "q", "split": "meta.splt"}, {"q": "x", "meta": {"split": "test"}}, "the column 'meta.splt'"),
        ({"input": "meta.text"}, {"meta": {"body": "x"}}, "row 1: 'meta' has no 'text' (it has 'body')"),
        ({"input": "m.2"}, {"m": ["x", "y"]}, "row 1: 'm' has no '2' (it is a list of 2)"),
    ],
)
def test_a_mapped_column_that_is_nowhere_is_told(tmp_path: Path, columns: object, row: dict[str, str], text: str):
    content = json.dumps({**row, "answer": "a"}) + "\n"
    assert text in only_message(tmp_path, "t.jsonl", content, {"columns": columns})


@pytest.mark.parametrize(
    ("column", "cells", "text"),
    [
        ("set", ["train"] * 300 + ["eval"], "column 'set' holds splits, but is not read"),
        ("is_test", ["0", "1"], "column 'is_test' marks rows that are not for training, but is not read"),
        ("fold", ["0", "1"], ""),
        ("group", ["train", "tram"], ""),
    ],
)
def test_a_split_under_another_name_is_not_passed_over(tmp_path: Path, column: str, cells: list[str], text: str):
    content = f"input,answer,{column}\n" + "".join(f"row {n},a,{cell}\n" for n, cell in enumerate(cells))
    task, faults = read(tmp_path, "t.csv", content)
    assert (task is None, "".join(fault.message for fault in faults).count(text) > 0) == (bool(text), True)


def test_numbers_of_parquet_keep_their_digits_and_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    short = pyarrow.array([0.1, 12.5], pyarrow.float32())
    exact = pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("20.00")])
    for column, expected in ((short, {"0.1", "12.5"}), (exact, {"1.50", "20.00"})):
        pyarrow.parquet.write_table(pyarrow.table({"input": ["x", "y"], "answer": column, "split": ["test"] * 2}), path)
        assert {example.answer for example in load_task(path).test} == expected
    twice = pyarrow.Table.from_arrays([["x"], ["a"], ["b"]], names=["input", "answer", "answer"])
    pyarrow.parquet.write_table(twice, path)
    assert [fault.message for fault in inspect_task(path)[1]] == [
        f"{path}: has a column 'answer' twice; rename one of them"
    ]


@pytest.mark.parametrize(
    "labels",
    [
        "1.5|1.50",
        "007|7",
        "1,000|1000",
        "don't|don\u2019t",
        "AT&T|AT&amp;T",
        'yes|"yes"',
        "yes|yes!",
        "ab|a\u200bb",
        "y|yes",
        "f|False",
        "repair|r\u0435p\u0430ir",  # Cyrillic letters that look like Latin ones
        "A|\u0391",  # a Greek one
    ],
)
def test_more_labels_that_may_be_one_are_told(tmp_path: Path, labels: str) -> None:
    rows = [{"input": f"row {n}", "answer": label} for n in range(12) for label in labels.split("|")[n % 2 :][:1]]
    task, faults = read(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert task is not None, faults
    assert "answers that may be the same" in task.warnings[0]


@pytest.mark.parametrize("labels", ["-5|5", "3.5|35", "+|-", "a|b", "y|n", "true|yes"])
def test_labels_that_are_two_are_not_told_to_be_one(tmp_path: Path, labels: str) -> None:
    rows = [{"input": f"row {n}", "answer": labels.split("|")[n % 2]} for n in range(12)]
    task, faults = read(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert task is not None, faults
    assert task.warnings == ()


def test_json_lines_may_end_in_a_carriage_return_alone(tmp_path: Path) -> None:
    content = "".join(json.dumps({"input": f"row {n}", "answer": "a", "split": "test"}) + "\r" for n in range(3))
    for name, text in (("t.jsonl", content), ("u.jsonl", content.replace("\r", "\r\n", 1)), ("v.jsonl", content[:-1])):
        assert [example.input for example in examples_of(tmp_path, name, text)] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "text,label\n",
            "test.csv: its columns are called otherwise than in train.csv; call them alike in all files",
        ),
        ("id,other\n", "test.csv: its columns are called otherwise than in train.csv; call them alike in all files"),
        ("input,id\n", "test.csv: has no answers, unlike train.csv; fill them in, or take the file out of the folder"),
    ],
)
def test_a_file_with_other_columns_than_the_rest_of_its_task_is_not_sent_to_a_task_json(tmp_path, header, message):
    """It was told the "columns" to write, with which the other file could not have been read."""
    (tmp_path / "train.csv").write_text("input,answer\nx,a\ny,b\n")
    (tmp_path / "test.csv").write_text(header + "z,a\nw,b\n")
    (source,) = name_sources(tmp_path).values()
    (fault,) = inspect_task(source)[1]
    assert fault.message.startswith(f"{tmp_path}/{message}")


def test_cells_of_blanks_in_a_table_are_no_quoted_cells(tmp_path):
    """Found by the fuzz test: three blanks begin with a blank, as a quoted cell after a separator may."""
    found = examples_of(tmp_path, "t.csv", "input,answer,note\none,a,   \ntwo,b, \n")
    assert [(example.input, example.answer) for example in found] == [("one", "a"), ("two", "b")]
