"""The demo: its tasks are what they say, and the whole path goes through."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from manyicl.demo import CLUES, NAMES, run_demo, write_tasks
from manyicl.errors import UserError
from manyicl.tasks import load_tasks


def test_the_tasks_are_a_pure_function_of_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tasks(tmp_path / name, seed=seed)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.jsonl")} for name in ("a", "b", "c"))
    assert len(a) == 8
    assert a == b
    assert a != c


def test_every_answer_is_the_topics_name_in_the_words_of_its_task(tmp_path):
    write_tasks(tmp_path, seed=0)
    for task in load_tasks(tmp_path):
        number = int(task.name[-1])
        bits = [number & 1, number >> 1 & 1, number >> 2 & 1]
        assert not {e.input for e in task.train} & {e.input for e in task.test}
        for example in task.test:
            topic = next(t for t, clues in CLUES.items() if set(clues) & set(example.input.split()))
            names, (high, low) = NAMES[topic]
            assert example.answer == names[2 * bits[high] + bits[low]]


def test_no_two_tasks_use_the_same_words():
    schemes = {
        tuple(names[2 * (n >> high & 1) + (n >> low & 1)] for names, (high, low) in NAMES.values()) for n in range(8)
    }
    assert len(schemes) == 8


@pytest.mark.slow
def test_the_demo_runs_from_nothing_to_a_curve(tmp_path):
    console = Console(width=160, record=True, file=io.StringIO())
    result = run_demo(out=tmp_path / "demo", num_steps=3, queries=4, console=console)
    printed = console.export_text()
    assert "Held-out loss per answer" in printed
    assert "shots (log scale)" in printed
    assert [cell.shots for cell in result.curves[0].cells] == [0, 1, 2, 4, 8, 16]
    assert json.loads((tmp_path / "demo" / "curve.json").read_text())["tasks"][7]["task"] == "topic_in_words_7"
    with pytest.raises(UserError, match="exists already"):
        run_demo(out=tmp_path / "demo", console=console)
