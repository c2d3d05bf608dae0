"""The scores of a comparison on made-up results: which arm is best, flat curves, and differences in words."""

from __future__ import annotations

import pytest

from manyicl.comparison.answers import Pooled
from manyicl.comparison.scores import list_flatness, list_headline, tell_difference
from tests.support.comparison_results import ask, level, make_findings


def rising(gain: float):
    return lambda k, seed, d, q: 0.3 + gain * (k == 4) + 0.02 * ((d + q) % 2) + 0.005 * seed * (k == 4)


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
