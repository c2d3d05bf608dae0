"""Settings of training and asking on a real base: one run with many of them, and answers to the same queries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from manyicl.evaluation.loop import evaluate
from manyicl.inference.answering.questions import ask
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import Task, load_tasks
from manyicl.training.recipe import make_config
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.trajectory.setting import read_metrics

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
PLACES = ("Rome", "Oslo", "Bonn", "Lima", "Cairo", "Delhi")
MOODS = {
    "positive": ("I love it", "Great film", "Very good", "So nice"),
    "negative": ("I hate it", "Awful", "So bad", "A bore"),
}


def write_folder(folder: Path) -> Path:
    """Two tasks of 40 rows: moods by two templates of two columns, and sums with two right answers each."""
    folder.mkdir()
    moods = [
        {"text": text, "place": place, "label": label, "split": "test" if place == "Delhi" else "train"}
        for label, texts in MOODS.items()
        for text in texts
        for place in PLACES
    ]
    sums = [
        {"input": f"{a} + {b}", "answer": [str(a + b), f"{a + b}.0"], "split": "train"}
        for a in range(10, 60, 10)
        for b in range(1, 10)
    ]
    templates = ["{text}, seen in {place}", "In {place}: {text}"]
    for name, rows, settings in (
        ("moods", moods, {"columns": {"answer": "label"}, "templates": templates}),
        ("sums", sums, {"family": "qa"}),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.task.json").write_text(json.dumps(settings))
    return folder


def test_a_run_with_every_setting_of_a_practitioner(smollm2, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("tensorboard")
    values = {
        "tasks": {
            "folder": str(write_folder(tmp_path / "tasks")),
            "weights": {"sums": 3.0},
            "max_rows": 20,
        },
        "model": {
            "path": str(smollm2),
            "quantize": "nf4",
            "lora": {"rank": 4},
            "config": {"num_hidden_layers": 6},
        },
        "template": {"style": "chat", "system": "Answer in one word."},
        "episodes": {"token_budget": 128, "mixture": "uniform"},
        "train": {
            "num_steps": 8,
            "packs_per_step": 2,
            "learning_rate": 0.3,  # far too high: the validation loss rises at once
            "optim": "adamw_8bit",
            "schedule": "constant",
            "checkpoint_every_steps": 1,
            "log_every_steps": 1,
            "validation_tokens": 256,
            "keep": "best",
            "early_stopping_patience": 1,
            "report_to": ["tensorboard"],
        },
        "held_out": {"episodes": 0},
    }
    train(make_config(values, source="test"), out=tmp_path / "run")
    state = RunFolder(tmp_path / "run").read_state()
    losses = [record["eval_loss"] for record in read_metrics(tmp_path / "run") if "eval_loss" in record]
    assert state.stopped_step == len(losses) == losses.index(min(losses)) + 2 < 8
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert plan["tokens_by_task"]["sums"] / plan["tokens"] == pytest.approx(0.75, abs=0.1)
    assert set(plan["templates"]["moods"]) == {"{text}, seen in {place}", "In {place}: {text}"}
    assert list((tmp_path / "run" / "checkpoints" / "runs").rglob("events.out.tfevents.*"))
    asked = load_for_inference(str(tmp_path / "run"))
    [answer] = ask(asked, load_tasks(tmp_path / "tasks")[0], ["So nice, seen in Rome"], shots=4)
    assert answer.answer in MOODS


@pytest.fixture(scope="module")
def moods(tmp_path_factory) -> Task:
    return load_tasks(write_folder(tmp_path_factory.mktemp("asked") / "tasks"))[0]


def test_how_choices_are_made_and_how_sure_they_are(smollm2, moods):
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=512)

    def answer(task=moods, **settings):
        return evaluate(model, [task], shots=(4,), draws=2, queries=8, answering=AnswerSettings(**settings)).curves[0]

    plain, calibrated = answer(), answer(calibrate="contextual")
    # Only the choice changes: likelihoods stay as they are.
    for one, other in zip(calibrated.predictions, plain.predictions, strict=True):
        assert one.choice_nll == pytest.approx(other.choice_nll, abs=1e-4)
    assert [p.confidence for p in calibrated.predictions] != [p.confidence for p in plain.predictions]
    for prediction in answer(normalize="bytes").predictions:
        per_byte = {label: nats / len(label.encode()) for label, nats in prediction.choice_nll.items()}
        assert prediction.prediction == min(per_byte, key=per_byte.get)
    point = plain.points[0]
    assert (point.chance_score, point.majority_score) == (0.5, 0.5)
    assert [c.coverage for c in point.confidence.coverage] == sorted(
        (c.coverage for c in point.confidence.coverage), reverse=True
    )

    query = moods.test[0].input
    [sure] = ask(model, moods, [query], shots=4, min_confidence=0.0)
    [unsure] = ask(model, moods, [query], shots=4, min_confidence=1.0)
    assert (sure.unsure, unsure.unsure) == (False, True)
    assert sure.answer == unsure.answer


def test_the_best_of_several_right_answers_counts(smollm2, moods):
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=512)
    free = replace(moods, name="free", family="qa", metric="exact_match", labels=(), sha256="free")
    first = evaluate(model, [free], shots=(4,), draws=1, queries=8).curves[0]
    # With what was said as a second right answer everything is right; the first is what likelihoods are of.
    said = {p.query: p.prediction for p in first.predictions}
    also = tuple(replace(example, also_right=(said[example.id],)) for example in free.test)
    both = evaluate(model, [replace(free, test=also, sha256="both")], shots=(4,), draws=1, queries=8).curves[0]
    assert both.points[0].score == 1.0
