"""Exchanged labels and forgetting, on made-up results."""

from __future__ import annotations

import pytest

from manyicl.comparison.analyses import find_forgetting, list_flips
from manyicl.evaluation.points import Prediction
from manyicl.tasks.task import flip_map
from tests.conftest import make_task
from tests.support.comparison_results import HELD_OUT, TRAINED, ask, level, make_curve, make_findings


@pytest.mark.parametrize(("follows", "keeps"), [(True, False), (False, True), (False, False)])
def test_a_model_that_follows_exchanged_labels_follows_and_one_that_does_not_keeps(tmp_path, follows, keeps):
    labels = make_task(HELD_OUT).labels
    flipped = flip_map(labels, seed=0)
    rows = []
    for q, label in enumerate(labels):
        given = flipped[label] if follows else label if keeps else "none of them"
        score = float(given == flipped[label])
        rows += [
            Prediction(HELD_OUT, d, 4, f"q{q}", given, answer=flipped[label], score=score, nll=1.0) for d in (0, 1)
        ]
    plain = ask(level(0.5), shots=(0, 1, 4))
    findings = make_findings(tmp_path, {"manyicl": [plain]}, flip={"manyicl": [[make_curve(rows)]]})
    (row,) = list_flips(findings)
    assert (row.arm, row.role, row.shots, row.tasks) == ("manyicl", "held-out", 4, 1)
    assert (row.follows, row.keeps) == (float(follows), float(keeps))
    assert row.plain == pytest.approx(0.51)


def test_what_the_base_knew_can_be_forgotten_and_the_rest_is_transfer(tmp_path):
    """The base is far above the majority on `familiar` and below it on `animals`; the arm moves both by 20 points."""
    roles = {"trained": [TRAINED], "held-out": [HELD_OUT], "familiar": ["familiar"]}

    def both(known: float, new: float):
        return [*ask(level(known), shots=(0, 4), task="familiar"), *ask(level(new), shots=(0, 4))]

    answers = {"base": [both(0.8, 0.1)], "manyicl": [both(0.6, 0.3)]}
    findings = make_findings(tmp_path, answers, shots=(0, 4), roles=roles)
    rows = [row for row in find_forgetting(findings).tasks if row.shots == 4]
    assert {row.kind: (row.tasks, round(row.before, 6), round(row.difference, 6)) for row in rows} == {
        "forgetting": (("familiar",), 0.81, -0.2),
        "transfer": ((HELD_OUT,), 0.11, 0.2),
    }


@pytest.mark.parametrize(("chance", "kind"), [(0.27, "transfer"), (0.2, "forgetting")])
def test_what_the_base_answers_at_chance_cannot_be_forgotten(tmp_path, chance, kind):
    """Review A10: four options a row, so that the majority answer scores next to nothing, and the base 26 %."""
    curves = ask(lambda k, s, d, q: 0.25 + 0.02 * ((d + q) % 2), shots=(0, 4), majority=0.1, chance=chance)
    findings = make_findings(tmp_path, {"base": [curves], "manyicl": [curves]}, shots=(0, 4))
    assert {row.kind for row in find_forgetting(findings).tasks} == {kind}
