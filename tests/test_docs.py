"""The functions, packages, tests and pages that docs/one-batch-one-query.md and the change log name are there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import manyicl
from tests.conftest import make_task

PACKAGE = Path(manyicl.__file__).parent
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "one-batch-one-query.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(manyicl(?:\.\w+){2,})`", PAGE)))


def test_the_walks_name_functions_of_many_packages():
    assert len(NAMES) > 35
    assert {name.split(".")[1] for name in NAMES} == {
        "tasks",
        "episodes",
        "models",
        "inference",
        "training",
        "evaluation",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_a_walk_names_is_there(name):
    found = manyicl
    for part in name.split(".")[1:]:
        place = f"{found.__name__}.{part}" if hasattr(found, "__path__") else ""
        found = importlib.import_module(place) if place else getattr(found, part)
    assert found.__doc__


@pytest.mark.slow
def test_a_question_enters_three_packages():
    model = manyicl.load_for_inference("seed")
    task = make_task("animals", num_examples=18)
    manyicl.ask(model, task, ["the red fox 1"], shots=2)  # what is imported or tried once is done
    entered = set()

    def note(frame, event, argument):
        place = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in place.parents:
            entered.add(place.relative_to(PACKAGE).parts[0])

    sys.setprofile(note)
    try:
        manyicl.ask(model, task, ["the red fox 1"], shots=2)
    finally:
        sys.setprofile(None)
    assert {name for name in entered if not name.endswith(".py")} == {"inference", "episodes", "models"}


def test_the_change_log_names_tests_and_pages_that_exist():
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files = re.findall(r"(?:tests|docs|benchmarks)/[\w/.-]+\.(?:py|md)", log)
    assert len(files) > 80
    assert [file for file in files if not (ROOT / file).is_file()] == []
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", log)
    assert len(names) > 10
    assert [name for name in names if f"def {name}(" not in sources] == []


def test_the_change_log_has_each_finding_of_the_review():
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    labels = [label for row in re.findall(r"^\| ([^|]+) \|", log, flags=re.MULTILINE) for label in row.split(", ")]
    assert labels[1:] == [*(f"A{n}" for n in range(1, 11)), *(f"B{n}" for n in range(1, 13)), "C"]


def test_the_glossary_defines_each_word_once():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]*\|$", glossary, flags=re.MULTILINE)
    words = [word.strip() for row in rows for word in re.split("[;,]", row)]
    assert len(words) > 40
    assert [word for word in words if words.count(word) > 1] == []


def test_commands_in_the_docs_name_scripts_and_options_that_exist():
    commands = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.name == "log.md":
            continue  # of its day
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        commands += re.findall(r"python ((?:benchmarks|scripts)/\w+\.py)([^`\n]*)", text)
        if page.name == "performance.md":  # its prose names options by themselves
            own = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
            assert [name for name in re.findall(r"`(--[a-z][\w-]*)", text) if f'"{name}"' not in own] == []
    assert len(commands) > 10
    for script, options in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [name for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", options) if f'"{name}"' not in source] == []


def test_every_field_trial_has_a_verdict_and_tests_that_exist():
    page = (ROOT / "docs" / "field-trials.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3].strip("| ")]
    trials = [row for row in rows if re.fullmatch(r"\d\d[a-d]?", row[0])]
    assert len(trials) == 86
    verdicts = [row[4].partition(":")[0] for row in trials]
    assert set(verdicts) <= {"pass", "poor"}
    assert verdicts.count("poor") <= 3
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in _tests_of(path)}
    named = re.findall(r"\btest_\w+(?![\w.]*\.py)", " ".join(row[-1] for row in rows if len(row) in (3, 6)))
    assert len(named) > 100
    assert set(named) - known == set()
    assert all(re.search(r"\btest_|check_speed", row[-1]) for row in trials)
    for path in re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", page):
        assert (ROOT / path).is_file(), path


def _tests_of(path: Path) -> list[str]:
    return re.findall(r"(?m)^def (test_\w+)", path.read_text(encoding="utf-8"))
