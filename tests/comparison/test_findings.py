"""The findings of a comparison: chosen shots, the best arm, flat curves, flips and forgetting, on made-up results."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manyicl.comparison.analyses import find_forgetting, list_flips
from manyicl.comparison.answers import Pooled
from manyicl.comparison.scores import list_flatness, list_headline, tell_difference
from manyicl.evaluation.points import Prediction
from manyicl.tasks.task import flip_map
from tests.conftest import make_task
from tests.support.comparison_results import HELD_OUT, TRAINED, ask, level, make_curve, make_findings


def rising(gain: float):
    return lambda k, seed, d, q: 0.3 + gain * (k == 4) + 0.02 * ((d + q) % 2) + 0.005 * seed * (k == 4)


def test_the_shots_are_those_of_the_best_mean_validation_score_the_fewest_of_equals(tmp_path):
    scores = {0: (0.2, 0.2), 1: (0.6, 0.4), 4: (0.3, 0.7)}
    validation = [ask(lambda k, s, d, q: scores[k][s], shots=scores, seed=seed) for seed in (0, 1)]
    tests = [ask(level(0.5), shots=(0, 1, 4), seed=seed) for seed in (0, 1)]
    findings = make_findings(tmp_path, {"manyicl": tests}, validation={"manyicl": validation})
    chosen = findings.chosen["manyicl"]
    assert (chosen.shots, chosen.by_task) == (1, {HELD_OUT: 1})
    assert [one.shots for one in chosen.scores] == [0, 1, 4]
    assert [one.score for one in chosen.scores] == pytest.approx([0.2, 0.5, 0.5])


def test_without_validation_an_arm_is_asked_with_the_most_shots_it_was_trained_behind(tmp_path):
    findings = make_findings(
        tmp_path, {arm: [ask(level(0.5), shots=(0, 1, 4))] for arm in ("base", "zero-shot", "few-shot")}
    )
    assert {arm: one.shots for arm, one in findings.chosen.items()} == {"base": 4, "zero-shot": 0, "few-shot": 1}


@pytest.mark.parametrize(("num_seeds", "best"), [(5, True), (4, False)])
def test_an_arm_is_best_only_over_five_seeds(tmp_path, num_seeds, best):
    answers = {
        arm: [ask(level(base), shots=(0, 1, 4), seed=seed, queries=40) for seed in range(num_seeds)]
        for arm, base in (("base", 0.2), ("zero-shot", 0.4), ("manyicl", 0.7))
    }
    rows = [row for row in list_headline(make_findings(tmp_path, answers)) if row.asked == "most"]
    assert {row.arm: row.best for row in rows} == {"base": False, "zero-shot": False, "manyicl": best}
    assert [len(row.seeds) for row in rows] == [num_seeds] * 3


def test_an_arm_that_beats_all_but_one_is_not_best(tmp_path):
    noise = (0.1, -0.1, 0.05, -0.05, 0.02)
    answers = {
        "base": [ask(level(0.2), shots=(4,), seed=seed) for seed in range(5)],
        "zero-shot": [ask(lambda k, s, d, q: 0.69 + noise[s], shots=(4,), seed=seed) for seed in range(5)],
        "manyicl": [ask(level(0.7), shots=(4,), seed=seed) for seed in range(5)],
    }
    rows = [row for row in list_headline(make_findings(tmp_path, answers, shots=(4,))) if row.asked == "most"]
    assert not any(row.best for row in rows)
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("gain", "flat", "told"),
    [
        (0.2, False, "rises by 21.0 points"),
        (-0.2, False, "falls by 19.0 points"),
        (-0.01, True, "is flat (+0.0 points)"),
    ],
)
def test_a_curve_rises_falls_or_is_flat_in_words(tmp_path, gain, flat, told):
    answers = {"manyicl": [ask(rising(gain), shots=(0, 1, 4), seed=seed) for seed in range(5)]}
    row = next(iter(list_flatness(make_findings(tmp_path, answers))))
    assert (row.from_shots, row.to_shots, row.flat) == (1, 4, flat)
    assert row.sentence == f"ManyICL: the score on held-out tasks {told} from 1 shot to 4 shots."


def test_a_gain_that_is_large_but_unsure_is_flat(tmp_path):
    gains = (0.5, -0.3, 0.4, -0.2, 0.1)
    answers = {
        "manyicl": [ask(lambda k, s, d, q: 0.4 + gains[s] * (k == 4), shots=(0, 1, 4), seed=s) for s in range(5)]
    }
    row = next(iter(list_flatness(make_findings(tmp_path, answers))))
    assert row.difference == pytest.approx(0.1)
    assert row.flat is True


@pytest.mark.parametrize(
    ("pooled", "told"),
    [
        (
            Pooled(0.1, 0.05, 0.15, (0.1,) * 5, 2),
            "ManyICL at 4 shots is better than zero-shot FT at 0 shots by 10.0 points [+5.0, +15.0] on 2 held-out"
            " tasks, over 5 seeds",
        ),
        (
            Pooled(-0.1, -0.15, -0.05, (-0.1, None), 1),
            "zero-shot FT at 0 shots is better than ManyICL at 4 shots by 10.0 points [+5.0, +15.0] on 1 held-out task,"
            " for this run",
        ),
        (
            Pooled(0.1, -0.05, 0.25, (0.1, 0.1), 2),
            "No difference can be shown between ManyICL at 4 shots and zero-shot FT at 0 shots on 2 held-out tasks:"
            " +10.0 [-5.0, +25.0], for these runs",
        ),
        (
            Pooled(0.1, None, None, (0.1,), 1),
            "ManyICL at 4 shots and zero-shot FT at 0 shots are 10.0 points apart on 1 held-out task; a single value"
            " has no interval",
        ),
    ],
)
def test_a_difference_in_words(pooled, told):
    assert tell_difference(pooled, ("manyicl", "at 4 shots"), ("zero-shot", "at 0 shots"), role="held-out") == told


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


def test_shots_that_one_arm_was_not_asked_with_are_no_column(tmp_path):
    whole, short = ask(level(0.5), shots=(0, 1, 4)), ask(level(0.5), shots=(0, 1))
    findings = make_findings(tmp_path, {"base": [whole], "manyicl": [short]})
    assert findings.shots_by_task == {HELD_OUT: [0, 1]}
    assert findings.pick_shots("most", "manyicl", [HELD_OUT]) == {HELD_OUT: 1}
    assert findings.pick_shots("chosen", "base", [HELD_OUT]) == {HELD_OUT: 1}  # chosen: 4
    assert findings.pick_shots(4, "base", [HELD_OUT]) == {}


def test_a_seed_that_is_missing_is_none_in_every_mean(tmp_path):
    findings = make_findings(tmp_path, {"manyicl": [ask(level(0.5), shots=(0, 1, 4)), None]})
    pooled = findings.pool("manyicl", {HELD_OUT: 4})
    assert pooled is not None
    assert pooled.seeds == (pytest.approx(0.51), None)
    assert replace(pooled, seeds=()).num_tasks == 1
