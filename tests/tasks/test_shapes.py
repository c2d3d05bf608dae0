"""Layouts of well-known sets: the shown task.json reads every text that an answer depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyicl.tasks import Example, inspect_task, load_task

# Two rows of each, so that the way options are counted is certain.
PIQA = [
    {"goal": "boil an egg", "sol1": "in water", "sol2": "in sand", "label": 0},
    {"goal": "cut bread", "sol1": "with a spoon", "sol2": "with a knife", "label": 1},
]
WINOGRANDE = [
    {"sentence": "Ann saw Bo; _ ran.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    {"sentence": "Bo met Ann; _ sat.", "option1": "Ann", "option2": "Bo", "answer": "2"},
]
COPA = [
    {"premise": "It rained.", "question": "effect", "choice1": "wet", "choice2": "dry", "label": 0},
    {"premise": "He fell.", "question": "cause", "choice1": "a cake", "choice2": "ice", "label": 1},
]
SOCIAL = [
    {
        "context": "Bo lost.",
        "question": "How is Bo?",
        "answerA": "glad",
        "answerB": "sad",
        "answerC": "tall",
        "label": "2",
    },
    {
        "context": "Bo won.",
        "question": "How is Bo?",
        "answerA": "glad",
        "answerB": "sad",
        "answerC": "old",
        "label": "3",
    },
]
BOOLQ = [
    {"question": "is it wet", "passage": "Rain is water.", "answer": True},
    {"question": "is it dry", "passage": "Rain is water still.", "answer": False},
]
RACE = [
    {"article": "Bo ran.", "question": "Who?", "options": ["Ann", "Bo"], "answer": "B"},
    {"article": "Ann sat.", "question": "Who sat?", "options": ["Ann", "Bo"], "answer": "A"},
]
SCIQ = [
    {
        "question": "What is wet?",
        "distractor1": "sand",
        "distractor2": "air",
        "correct_answer": "water",
        "support": "Rain.",
    },
    {
        "question": "What is hot?",
        "distractor1": "ice",
        "distractor2": "snow",
        "correct_answer": "fire",
        "support": "Ash.",
    },
]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (PIQA, Example("cut bread", "with a knife", ("with a spoon", "with a knife"))),
        (WINOGRANDE, Example("Ann saw Bo; _ ran.", "Ann", ("Ann", "Bo"))),
        (COPA, Example("He fell.\ncause", "ice", ("a cake", "ice"))),
        (SOCIAL, Example("Bo lost.\nHow is Bo?", "sad", ("glad", "sad", "tall"))),
        (BOOLQ, Example("Rain is water.\nis it wet", "true")),
        (RACE, Example("Ann sat.\nWho sat?", "Ann", ("Ann", "Bo"))),
        (SCIQ, Example("Rain.\nWhat is wet?", "water", ("water", "sand", "air"))),
    ],
    ids=["piqa", "winogrande", "copa", "social_i_qa", "boolq", "race", "sciq"],
)
def test_the_shown_task_json_reads_passages_and_options(tmp_path: Path, rows: list[object], expected: Example) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, (fault,) = inspect_task(path)
    (tmp_path / "t.task.json").write_text(fault.message.partition(" write ")[2].removesuffix(" into t.task.json"))
    task, faults = inspect_task(path)
    assert task is not None, faults
    assert expected in (*task.train, *task.validation, *task.test)


@pytest.mark.parametrize(("names", "answers"), [("option1,option2", "12"), ("sol_a,sol_b", "AB"), ("A,B", "AB")])
def test_unread_columns_of_options_are_noted_with_the_task_json(tmp_path: Path, names: str, answers: str) -> None:
    lines = [f"row {n},yes,no,{answers[n % 2]}\n" for n in range(20)]
    (tmp_path / "t.csv").write_text(f"input,{names},answer\n" + "".join(lines))
    task, _ = inspect_task(tmp_path / "t.csv")
    assert task is not None
    columns = json.dumps({"columns": {"options": names.split(",")}})
    told = f"{names.replace(',', ', ')} look like the options; to read them, write {columns} into t.task.json"
    assert told in task.notes
    (tmp_path / "t.task.json").write_text(columns)
    task, _ = inspect_task(tmp_path / "t.csv")
    assert task is not None
    assert {example.answer for example in task.train} == {"yes", "no"}


def test_an_instruction_that_a_template_leaves_out_is_put_into_the_template(tmp_path):
    """A list that holds a template is refused, so the task.json that the note shows must not be one."""
    rows = [{"instruction": "Add.", "a": f"{i}", "b": "1", "answer": f"{i + 1}"} for i in range(9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.task.json").write_text(json.dumps({"columns": {"input": "{a} + {b}"}}))
    note = next(note for note in load_task(tmp_path / "sums.jsonl").notes if "instruction is not read" in note)
    shown = note[note.index("{", note.index("write ")) : note.rindex("}") + 1]
    (tmp_path / "sums.task.json").write_text(shown)
    task = load_task(tmp_path / "sums.jsonl")
    assert {example.input.partition("\n")[0] for example in task.train} == {"Add."}
