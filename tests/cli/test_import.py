"""`manyicl import` as a user meets it: the preview, the folder, the next command, and mistakes in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.test_app import refusal, run_manyicl
from tests.conversion.test_importing import SQUAD


def test_the_command_shows_what_it_would_write_and_then_writes_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("squad.json").write_text(json.dumps(SQUAD))
    code, looked, _ = run_manyicl(capfd, "import", "squad.json", "--dry-run")
    assert code == 0
    assert looked.splitlines() == [
        "squad: a row like SQuAD's: input from context and question, answer from answers.text",
        "3 rows read, 2 written, 1 left out",
        "  left out: empty answer 1 (squad.json, row 3: answer None is empty; fill it in or remove the row)",
        "as it will be read: 2 train, 0 validation, 0 test; family qa, metric exact_match",
        "  No split is given: 20 % are test and 10 % of the rest validation, by a hash of the input.",
        "  input    Rain is water. It falls.⏎What is rain?",
        "  answer   water | Water",
        "  input    Rain is water. It falls.⏎What does it do?",
        "  answer   falls",
        "",
        "nothing is written; to write it, give --out FOLDER instead of --dry-run",
    ]
    assert not Path("mine").exists()
    _, done, _ = run_manyicl(capfd, "import", "squad.json", "--out", "mine")
    assert done.splitlines()[-2:] == ["wrote squad.jsonl, squad.task.json to mine", "next: manyicl check mine"]
    assert sorted(path.name for path in Path("mine").iterdir()) == ["squad.jsonl", "squad.task.json"]


def test_rows_are_shown_with_pictures_of_what_a_terminal_would_obey(tmp_path, capfd):
    row = {"input": "a\x1b]0;mine\x07", "answer": "b\x1b[2J", "split": "train"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row))
    _, looked, _ = run_manyicl(capfd, "import", str(tmp_path / "odd.jsonl"), "--dry-run")
    assert "  input    a␛]0;mine␇\n  answer   b␛[2J\n" in looked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t.csv"], "name a new folder with --out, or only look with --dry-run"),
        (["t.csv", "--dry-run", "--column", "input"], "--column input: write OURS=THEIRS, such as --column input=text"),
        (
            ["t.csv", "--dry-run", "--column", "answer=answer", "--column", "input =a"],
            "t.csv: no row is left; no input column 1 (t.csv, row 1: no 'a' column (it has 'input', 'answer'); correct"
            ' "columns" in the arguments (--column, --answer-index))',
        ),
        (
            ["t.csv", "--dry-run", "--column", "answer=answer", "--column", "text=input"],
            "--column text=input: maps an unknown name 'text'; known: answer, embedding, input, option_labels,"
            " options, split",
        ),
        (["t.csv", "--dry-run", "--split", "=x"], "--split =x: write OURS=THEIRS, such as --split test=validation"),
        (
            ["t.csv", "--dry-run", "--column", "input=a", "--column", "input=b"],
            "--column input=b: input is given twice; leave one out; several columns are given as"
            " input=premise,hypothesis",
        ),
        (
            ["t.csv", "--dry-run", "--split", "test=dev", "--split", "test=val"],
            "--split test=val: test is given twice; leave one out",
        ),
        (
            ["t.csv", "--dry-run", "--revision", "main"],
            "--revision main: does nothing with t.csv, it is for a data set of the Hub that is named and not a folder"
            " or file; leave it out",
        ),
        (
            ["t.csv", "--dry-run", "--config", "en"],
            "--config en: does nothing with t.csv, it is for a workbook or a data set; leave it out",
        ),
        (
            [".", "--dry-run", "--config", "en"],
            "--config en: does nothing with ., it is for a folder whose README or dataset_infos.json has it; leave it"
            " out",
        ),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("input,answer\na,b\n")
    assert refusal(capfd, "import", *arguments) == message


def test_a_template_on_the_command_line_may_hold_commas(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("who,what,label\nAnn,ran,x\n")
    columns = ["--column", "input={who}, who {what}", "--column", "answer=label"]
    code, done, _ = run_manyicl(capfd, "import", "t.csv", "--dry-run", *columns)
    assert code == 0
    assert "  input    Ann, who ran" in done.splitlines()


def test_the_columns_that_the_message_shows_are_read_as_it_shows_them(tmp_path, monkeypatch, capfd):
    """The shell took a name with a space apart, and the command one with a comma."""
    monkeypatch.chdir(tmp_path)
    Path("form.csv").write_text('Ticket Subject,"Kind, if known"\nIt leaks.,repair\n')
    told = refusal(capfd, "import", "form.csv", "--dry-run")
    shown = "'input=Ticket Subject' and 'answer={Kind, if known}'"
    assert told.endswith(f"say which they are with --column, such as {shown}")
    columns = [word for pair in shlex.split(shown) if "=" in pair for word in ("--column", pair)]
    _, done, _ = run_manyicl(capfd, "import", "form.csv", "--dry-run", *columns)
    assert "  input    It leaks.\n  answer   repair\n" in done


def test_the_page_shows_what_the_command_prints(tmp_path, monkeypatch, capfd):
    page = Path(__file__).parents[2] / "docs" / "other-tools.md"
    monkeypatch.chdir(tmp_path)
    Path("squad.json").write_text(json.dumps(SQUAD))
    code, done, _ = run_manyicl(capfd, "import", "squad.json", "--out", "mine")
    assert code == 0
    session = page.read_text(encoding="utf-8").split("<!-- import-session -->\n```console\n")[1].split("```")[0]
    assert session.splitlines() == ["$ manyicl import squad.json --out mine", *done.splitlines()]
