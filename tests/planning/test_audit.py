"""The supervision audit: what `manyicl check` finds, says, and exits with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from manyicl.episodes.plan import EpisodeSettings
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import lengths_of, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.planning.audit import audit_task
from manyicl.tasks.task import load_task
from tests.cli.test_app import run_manyicl
from tests.conftest import SHARED, needs_shared, tiny_model, train_tokenizer
from tests.episodes.test_template import CHATML, chat_tokenizer
from tests.support.drawn import draw_episode

COLOURS = ("red", "blue")


def good_rows(num_rows: int = 400) -> list[dict[str, object]]:
    """Return rows of a task that has nothing wrong: even labels, its own split, enough test rows."""
    splits = ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    return [
        {"input": f"the {COLOURS[i % 2]} fox {i}", "answer": COLOURS[i % 2], "split": splits[i // 2 % 10]}
        for i in range(num_rows)
    ]


def write_task(folder: Path, rows: Sequence[object], *, name: str = "colours", **about: object) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    if about:
        path.with_name(f"{name}.task.json").write_text(json.dumps(about))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tokenizer() -> TaskTokenizer:
    return TaskTokenizer(train_tokenizer("bpe"), TemplateSettings())


def test_a_good_task_is_called_good_and_fully_counted(tmp_path, tokenizer):
    rows = good_rows()
    rows += [rows[0], {**rows[0], "split": "test"}]
    audit = audit_task(write_task(tmp_path, rows), tokenizer=tokenizer)
    assert (audit.verdict, audit.usable, audit.warnings) == ("good", True, ())
    assert audit.num_rows == 402 == sum(audit.kept.values()) + sum(audit.dropped.values())
    assert audit.kept == {"train": 239, "validation": 80, "test": 81}
    assert audit.dropped == {"train/test overlap": 2}
    assert audit.labels == {"blue": 120 / 239, "red": 119 / 239}
    assert audit.answer_tokens is not None
    assert audit.answer_tokens.median == len(tokenizer.encode_answers(["red"])[0])
    assert audit.fits[2048] * 4 <= audit.fits[8192] <= audit.fits[32768] / 4


def test_test_inputs_with_a_near_duplicate_in_train_are_counted(tmp_path, monkeypatch):
    rows = good_rows()
    tale = "a fox went out on a chilly night and prayed for the moon to give him light"
    rows += [
        {"input": tale, "answer": "red", "split": "train"},
        {"input": tale.title(), "answer": "red", "split": "test"},
    ]
    path = write_task(tmp_path, rows)
    audit = audit_task(path, tokenizer=None)
    assert (audit.num_near_copies, audit.verdict) == (1, "good")
    monkeypatch.setattr("manyicl.planning.audit.MAX_COMPARED", 321)  # 240 + 1 train rows, 80 + 1 test rows
    assert audit_task(path, tokenizer=None).num_near_copies is None


def test_how_many_examples_fit_is_what_an_episode_of_that_budget_holds(tmp_path, tokenizer):
    rows = [{**row, "input": f"the {row['answer']} fox"} for row in good_rows()]
    rows = [{**row, "input": f"{row['input']} {i:03}"} for i, row in enumerate(rows)]
    path = write_task(tmp_path, rows)
    audit = audit_task(path, tokenizer=tokenizer, budgets=(256,))
    drawn = draw_episode(load_task(path), tokenizer.tokenizer, settings=EpisodeSettings(token_budget=256))
    assert abs(audit.fits[256] - len(drawn.tokens.spans)) <= 1


def test_without_a_tokenizer_there_are_no_counts_of_tokens(tmp_path):
    audit = audit_task(write_task(tmp_path, good_rows()), tokenizer=None)
    assert (audit.verdict, audit.input_tokens, audit.answer_tokens, audit.fits) == ("good", None, None, {})


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (
            lambda rows: [r for r in rows if r["split"] != "test" or int(str(r["input"]).split()[-1]) < 60],
            "usable, but only 12 test rows: intervals will be wide",
        ),
        (lambda rows: [*rows, *rows[:30]], "usable, but 30 of 430 rows dropped, most for: duplicate input (30)"),
        (
            lambda rows: [{**r, "answer": "blue" if n % 40 else "red"} for n, r in enumerate(rows)],
            "usable, but lopsided: ",
        ),
    ],
)
def test_a_task_that_is_worth_a_second_look_says_why(tmp_path, change, verdict):
    audit = audit_task(write_task(tmp_path, change(good_rows())), tokenizer=None)
    assert audit.usable
    assert audit.verdict.startswith(verdict)


def test_a_label_that_never_occurs_in_train_is_named(tmp_path):
    audit = audit_task(write_task(tmp_path, good_rows(), labels=["red", "blue", "green"]), tokenizer=None)
    assert audit.verdict == "usable, but labels that never occur in train: 1, such as 'green'"


# manyicl check ----------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[list[dict[str, object]]], list[object]], str]] = {
    "invalid JSON": (lambda rows: [*rows[:2], b'{"input": \n', *rows[2:]], "row 3: invalid JSON"),
    "not an object": (lambda rows: [*rows, [1]], "row 401: [1] is not an object"),
    "missing column": (
        lambda rows: [rows[0], {"input": "x", "label": "red"}, *rows[2:]],
        "row 2: no 'answer' column (it has 'input', 'label')",
    ),
    "empty answer": (lambda rows: [*rows[:4], {**rows[4], "answer": " "}, *rows[5:]], "row 5: answer ' ' is empty"),
    "empty input": (lambda rows: [{**rows[0], "input": ""}, *rows[1:]], "row 1: input '' is empty"),
    "unknown label": (
        lambda rows: [*rows[:9], {**rows[9], "answer": "bleu"}, *rows[10:]],
        "row 10: answer 'bleu' is not among the labels of colours.task.json; did you mean 'blue'?",
    ),
    "unknown option": (
        lambda rows: [{**rows[0], "options": ["blue", "green"]}, *rows[1:]],
        "row 1: answer 'red' is not among its options",
    ),
    "broken UTF-8": (
        lambda rows: [*rows, b'{"input": "caf\xe9", "answer": "red", "split": "test"}\n'],
        "row 401: byte 15 of the line is not UTF-8",
    ),
    "unknown split": (
        lambda rows: [*rows, {**rows[0], "split": "tset"}],
        "row 401: unknown split 'tset'; did you mean 'test'?",
    ),
}


def check(folder: Path, capfd, *options: object) -> tuple[int, str, str]:
    return run_manyicl(capfd, "check", folder, *options)


def test_a_good_folder_exits_0(tmp_path, capfd):
    write_task(tmp_path, good_rows())
    write_task(tmp_path, good_rows(), name="more")
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "colours" in line or "more" in line]
    assert len(lines) == 2
    assert all(line.split("  ")[-1] == "good" for line in lines)
    assert "split: Train, validation and test are as the files give them." in out


def test_with_a_model_tokens_are_counted(tmp_path, capfd):
    write_task(tmp_path, good_rows())
    train_tokenizer("bpe").save_pretrained(tmp_path / "model")
    tiny_model("llama").config.save_pretrained(tmp_path / "model")
    code, out, _ = check(tmp_path, capfd, "--model", tmp_path / "model")
    assert code == 0
    assert all(heading in out for heading in ("input tokens", "answer tokens", "fit 2,048", "fit 8,192", "fit 32,768"))


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_exits_1_and_names_file_and_row(tmp_path, capfd, name):
    change, expected = FAULTS[name]
    path = write_task(tmp_path, change(good_rows()), labels=list(COLOURS))
    write_task(tmp_path, good_rows(), name="other")
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (1, "")
    (line,) = [line for line in out.splitlines() if f"{path}" in line]
    assert f"cannot be read: {path}, {expected}" in line
    assert ("without the faulty rows" in out) == (name != "missing column")  # then every row would be left out
    (good,) = [line for line in out.splitlines() if line.startswith("other ")]
    assert good.split("  ")[-1] == "good"


def test_no_import_is_advised_for_labels_written_otherwise_which_would_leave_out_all_test_rows(tmp_path, capfd):
    rows = good_rows()
    write_task(tmp_path, [{**row, "answer": row["answer"].upper()} if row["split"] == "test" else row for row in rows])
    code, out, _ = check(tmp_path, capfd)
    assert code == 1
    assert "is in no train row, but" in out
    assert "without the faulty rows" not in out


def test_a_table_in_another_encoding_is_saved_anew_since_no_import_reads_it_either(tmp_path, capfd):
    path = tmp_path / "colours.csv"
    path.write_bytes("input,answer\ncafé,red\n".encode("cp1252"))
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (1, "")
    assert f"{path}, row 1: byte 17 of the file is not UTF-8; save it as UTF-8 (Excel calls it CSV UTF-8)" in out
    assert "manyicl import" not in out


def test_no_import_is_advised_for_a_quote_left_open_which_no_import_reads_past(tmp_path, capfd):
    (tmp_path / "colours.csv").write_text('input,answer\nfire,red\n"sea,blue\ngrass,green\n')
    code, out, _ = check(tmp_path, capfd)
    assert code == 1
    assert "close the quote" in out
    assert "manyicl import" not in out


def test_a_wrong_family_exits_1_and_suggests_one(tmp_path, capfd):
    write_task(tmp_path, good_rows(), family="clasification", metric="acuracy")
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (1, "")
    assert "colours.task.json: family 'clasification' is unknown; did you mean 'classification'?" in out
    assert "colours.task.json: metric 'acuracy' is unknown; did you mean 'accuracy'?" in out


def test_thousands_of_rows_with_one_fault_give_one_line(tmp_path, capfd):
    rows = [{**row, "answer": ""} if n >= 100 else row for n, row in enumerate(good_rows(5100))]
    path = write_task(tmp_path, rows)
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (1, "")
    (line,) = [line for line in out.splitlines() if "is empty" in line]
    assert f"{path}, row 101 (and 4,999 more rows): answer '' is empty; fill it in or remove the row" in line


def test_several_kinds_of_fault_are_all_listed(tmp_path, capfd):
    rows = [{**good_rows()[0], "answer": ""}, {"answer": "red"}, *good_rows()]
    path = write_task(tmp_path, rows)
    code, out, _ = check(tmp_path, capfd)
    assert code == 1
    assert f"{path}, row 1: answer '' is empty" in out
    assert f"{path}, row 2: no 'input' column" in out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda rows: [{**r, "split": "train"} for r in rows],
            "cannot be asked: it has no test rows; give some rows the split 'test'",
        ),
        (lambda rows: [{**r, "split": "test"} for r in rows], "cannot be trained: no train rows are left"),
        (lambda rows: [{**r, "answer": "red"} for r in rows], "cannot be learnt: every train row has the same answer"),
    ],
)
def test_a_task_that_cannot_be_used_exits_1_and_says_why(tmp_path, capfd, change, expected):
    write_task(tmp_path, change(good_rows()))
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (1, "")
    (line,) = [line for line in out.splitlines() if line.startswith("colours ")]
    assert expected in line


def test_train_rows_that_were_all_dropped_are_told_with_the_reason(tmp_path: Path) -> None:
    """If the test file is a copy of the train file, the advice was to add train rows."""
    rows = [row for row in good_rows() if row["split"] == "train"]
    audit = audit_task(write_task(tmp_path, [*rows, *({**row, "split": "test"} for row in rows)]), tokenizer=None)
    assert audit.verdict == (
        "cannot be trained: no train rows are left, because 240 rows were dropped (train/test overlap); add others"
    )


def test_a_task_whose_test_rows_another_task_trains_on_is_told(tmp_path, capfd):
    """A file of all rows beside its splits is a task of its own, which is divided by itself."""
    rows = good_rows()
    write_task(tmp_path, rows)
    write_task(tmp_path, [{"input": row["input"], "answer": row["answer"]} for row in rows], name="everything")
    other = [{**row, "answer": "warm" if row["answer"] == "red" else "cold"} for row in rows]
    write_task(tmp_path, other, name="warmth")  # the same inputs with answers of its own
    code, out, _ = check(tmp_path, capfd)
    told = {line.split()[0]: line for line in out.splitlines() if " rows are train rows of task " in line}
    assert (code, sorted(told)) == (0, ["colours", "everything"])
    for name in ("everything", "warmth"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")  # with no other task that can be read, nothing is told
    assert [line for line in check(tmp_path, capfd)[1].splitlines() if " rows are train rows of task " in line] == []
    assert re.search(
        r"usable, but [4-7]\d of its 80 test rows are train rows of task 'everything': a model that is trained on both"
        r" has seen them; remove one of the two$",
        told["colours"],
    )


def test_the_verdict_is_the_cause_trial_41(tmp_path: Path) -> None:
    tokenizer = TaskTokenizer(train_tokenizer("bpe"), TemplateSettings())
    rows = [{**row, "answer": f"Dear customer,\n\n{n}"} for n, row in enumerate(good_rows())]
    audit = audit_task(write_task(tmp_path, rows), tokenizer=tokenizer)
    assert "terminator inside the answer" in audit.verdict
    assert "no train rows are left" in audit.blockers[1]
    assert "all were dropped" in audit.blockers[2]


def test_a_terminator_inside_more_than_1_percent_of_the_answers_exits_1(tmp_path, capfd):
    train_tokenizer("bpe").save_pretrained(tmp_path / "model")
    for num_bad, code in ((4, 0), (5, 1)):
        rows = [{**r, "answer": f"{r['answer']}\n\n{n}"} if n < num_bad else r for n, r in enumerate(good_rows())]
        write_task(tmp_path, rows, family="qa")
        done, out, _ = check(tmp_path, capfd, "--model", tmp_path / "model")
        assert done == code
        assert f"dropped {num_bad}: terminator inside the answer" in out
        expected = "5 of 400 rows lost (terminator inside the answer), more than 1%; set template.terminator"
        assert (expected in out) == bool(code)


@pytest.mark.slow
def test_a_task_too_long_for_any_budget_exits_1(tmp_path, capfd):
    train_tokenizer("bpe").save_pretrained(tmp_path / "model")
    write_task(tmp_path, [{**row, "input": f"{row['input']} {'quark ' * 9000}"} for row in good_rows(60)])
    code, out, _ = check(tmp_path, capfd, "--model", tmp_path / "model")
    assert code == 1
    assert "cannot be trained in 32768 tokens: its shortest example needs " in out


def test_in_the_chat_style_the_first_example_does_not_count_what_stands_between_turns(tmp_path):
    tokenizer = TaskTokenizer(chat_tokenizer(train_tokenizer("bpe"), CHATML), TemplateSettings(style="chat"))
    path = write_task(tmp_path, good_rows())
    lengths = lengths_of(tokenize_task(load_task(path), tokenizer=tokenizer))
    assert lengths.num_between > 0
    shortest = int(lengths.alone.min())
    assert audit_task(path, tokenizer=tokenizer, budgets=(shortest,)).blockers == ()
    (blocker,) = audit_task(path, tokenizer=tokenizer, budgets=(shortest - 1,)).blockers
    assert (
        blocker
        == f"cannot be trained in {shortest - 1} tokens: its shortest example needs {shortest}; shorten its inputs"
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no task in it; add a .jsonl, .json, .csv, .tsv or .parquet file"),
        ({"a.jsonl": "", "a.csv": ""}, "a.csv is also called 'a'; rename or remove one"),
        ({"a.jsonl": "", "b.task.json": "{}"}, "no data file b.jsonl, .csv or .parquet beside it"),
    ],
)
def test_a_mistake_of_the_folder_exits_2(tmp_path, capfd, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    code, out, err = check(tmp_path, capfd)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


def test_no_folder_and_no_model_exit_2(tmp_path, capfd):
    code, _, err = check(tmp_path / "no", capfd)
    assert (code, err) == (2, f"error: {tmp_path / 'no'}: no such folder; give a folder of tasks\n")
    write_task(tmp_path, good_rows())
    code, _, err = check(tmp_path, capfd, "--model", tmp_path / "none")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'none'}: no such folder; give a folder in Hugging Face layout")


def test_texts_of_the_user_are_printed_as_they_are(tmp_path, capfd):
    rows = [{**r, "answer": {"red": "[/b]", "blue": "[bold]:cat:"}[str(r["answer"])]} for r in good_rows()]
    write_task(tmp_path, [*rows, {**rows[1], "input": "one more", "split": "train"}], name="[bold]:owl:")
    code, out, err = check(tmp_path, capfd)
    assert (code, err) == (0, "")
    assert "\n[bold]:owl:  " in out
    assert "  50% [bold]:cat:  " in out


@needs_shared
@pytest.mark.real_data
@pytest.mark.slow
def test_the_real_tasks_are_all_usable(capfd, tmp_path):
    """Of large tasks every third row: that all of them load is tests/tasks/test_task.py's."""
    for path in (SHARED / "data" / "tasks").glob("*.json*"):
        lines = path.read_bytes().splitlines(keepends=True)
        (tmp_path / path.name).write_bytes(b"".join(lines[:: 3 if len(lines) > 6500 else 1]))
    code, out, err = check(tmp_path, capfd, "--model", SHARED / "models" / "stories260K")
    assert (code, err) == (0, "")
    table = out.split("\n", 2)[2].split("\nsplit")[0].splitlines()
    verdicts = [line.split("  ")[-1] for line in table if "  " in line]
    assert len(verdicts) >= 12
    long = re.compile(r"usable, but [\d,]+ t\w+ rows too long to be \w+ \(longest sequence: 512 tokens\)")
    lost = "usable, but 1 text has the mark of a lost character (U+FFFD); convert the source to UTF-8 again"
    assert {verdict for verdict in verdicts if not long.fullmatch(verdict)} <= {"good", lost}
    assert verdicts.count(lost) <= 1
