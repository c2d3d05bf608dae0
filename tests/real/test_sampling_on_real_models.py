"""Samples with votes on a real base: sums of two numbers, whose majority is right more often than one sample."""

from __future__ import annotations

import json
import random

import pytest

from manyicl.evaluation.loop import evaluate
from manyicl.inference.answering.questions import ask
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import load_tasks

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
SIZES = {"shots": (16,), "draws": 1, "queries": 12, "seed": 1}


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A task of sums of a multiple of ten and a digit, which the base gets right about every second time."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    pairs = [(a, b) for a in range(10, 90, 10) for b in range(1, 10)]
    rng.shuffle(pairs)
    rows = [
        {"input": f"{a} + {b}", "answer": str(a + b), "split": "train" if place < 36 else "test"}
        for place, (a, b) in enumerate(pairs)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.task.json").write_text(json.dumps({"family": "math"}))
    [task] = load_tasks(folder)
    return task


def test_a_vote_of_samples_beats_a_single_one_and_near_zero_is_greedy(smollm2, sums):
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=1024)

    def answer(**settings):
        return evaluate(model, [sums], **SIZES, answering=AnswerSettings(**settings)).curves[0]

    greedy, single = answer(), answer(temperature=1.0)
    voted = answer(temperature=1.0, samples=9)
    assert [p.prediction for p in answer(temperature=1e-4).predictions] == [p.prediction for p in greedy.predictions]
    assert voted.points[0].score > single.points[0].score
    shares = [p.confidence for p in voted.predictions]
    assert all(share in [n / 9 for n in range(1, 10)] for share in shares)
    assert voted.points[0].confidence is not None
    assert [p.nll for p in voted.predictions] == pytest.approx([p.nll for p in greedy.predictions], abs=1e-3)
    # The first sample of a vote is the sample that is taken alone: seed, prompt and number decide it.
    [one] = ask(model, sums, ["30 + 4"], shots=16, seed=1, answering=AnswerSettings(temperature=1.0))
    [again, _] = ask(model, sums, ["30 + 4", "10 + 4"], shots=16, seed=1, answering=AnswerSettings(temperature=1.0))
    assert again.answer == one.answer


def test_a_stop_text_a_limit_and_a_small_top_p_are_kept_to(smollm2, sums):
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=1024)

    def answer(**settings):
        return ask(model, sums, ["30 + 4"], shots=16, seed=1, answering=AnswerSettings(**settings))[0]

    whole = answer()
    assert len(whole.answer) > 1
    assert not whole.cut
    stopped = answer(stop=(whole.answer[1],))
    assert (stopped.answer, stopped.cut) == (whole.answer[0], False)
    assert answer(max_new_tokens=1).cut
    assert answer(temperature=5.0, top_p=1e-6).answer == whole.answer  # one token alone has that probability
