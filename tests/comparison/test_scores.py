"""The scores of a comparison on made-up results: which arm is best, flat curves, and differences in words."""

from __future__ import annotations

import re

import pytest

from manyicl.comparison.schema import Flatness, PairDifference
from manyicl.comparison.scores import list_flatness, list_headline, tell_flatness, tell_pair
from manyicl.comparison.settings import ARMS
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
        (-0.01, True, "is flat (0.0 points)"),
    ],
)
def test_a_curve_rises_falls_or_is_flat_in_words(tmp_path, gain, flat, told):
    answers = {"manyicl": [ask(rising(gain), shots=(0, 1, 4), seed=seed) for seed in range(5)]}
    row = next(iter(list_flatness(make_findings(tmp_path, answers))))
    assert (row.from_shots, row.to_shots, row.flat) == (1, 4, flat)
    without_interval = re.sub(r" \[[^]]+\]", "", row.sentence)
    assert without_interval == f"The score of ManyICL on held-out tasks {told} from 1 shot to 4 shots."


def test_a_change_is_told_with_its_interval():
    ends = {"low": -0.02, "high": 0.22, "from_shots": None, "to_shots": "fill"}
    flat = Flatness(arm="manyicl", role="trained", difference=0.1, flat=True, **ends)
    assert tell_flatness(flat, title=str.upper) == (
        "The score of MANYICL on trained tasks rises by 10.0 points [−2.0, +22.0], which may be chance, from each"
        " task's fewest shots to as many shots as fit."
    )


def test_a_gain_that_is_large_but_unsure_is_flat(tmp_path):
    gains = (0.5, -0.3, 0.4, -0.2, 0.1)
    answers = {
        "manyicl": [ask(lambda k, s, d, q: 0.4 + gains[s] * (k == 4), shots=(0, 1, 4), seed=s) for s in range(5)]
    }
    row = next(iter(list_flatness(make_findings(tmp_path, answers))))
    assert row.difference == pytest.approx(0.1)
    assert row.flat is True


def pair(difference: float, ends: tuple[float, float] | None, **changes) -> PairDifference:
    low, high = ends or (None, None)
    entry = {"role": "held-out", "tasks": 2, "a": "manyicl", "b": "zero-shot", "asked": "each", "seeds": (0.1,) * 5}
    entry |= {"shots_a": 4, "shots_b": 4, "difference": difference, "low": low, "high": high}
    return PairDifference.model_validate(entry | changes)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            pair(0.1, (0.05, 0.15)),
            "At 4 shots, ManyICL is better than zero-shot FT by 10.0 points [+5.0, +15.0] on 2 held-out tasks, over 5"
            " seeds.",
        ),
        (
            pair(-0.1, (-0.15, -0.05), tasks=1, seeds=(-0.1, None)),
            "At 4 shots, zero-shot FT is better than ManyICL by 10.0 points [+5.0, +15.0] on 1 held-out task, for this"
            " run.",
        ),
        (
            pair(-0.0004, (-0.05, 0.049), seeds=(0.1, 0.1)),
            "At 4 shots, no difference between ManyICL and zero-shot FT can be shown on 2 held-out tasks: 0.0 [−5.0,"
            " +4.9], for these runs.",
        ),
        (
            pair(0.0237, (0.0004, 0.0469)),
            "At 4 shots, ManyICL is better than zero-shot FT by 2.37 points [+0.04, +4.69] on 2 held-out tasks, over 5"
            " seeds.",
        ),
        (
            # The note above the sentences says of which arm the number is; "10.0 points apart" said it of the other.
            pair(-0.1, None),
            "At 4 shots, no difference between ManyICL and zero-shot FT can be shown on 2 held-out tasks: −10.0, a"
            " single value that has no interval.",
        ),
        (
            pair(0.1, (0.05, 0.15), asked="chosen", shots_a="fill", shots_b=0),
            "With chosen shots, ManyICL (as many shots as fit) is better than zero-shot FT (0 shots) by 10.0 points"
            " [+5.0, +15.0] on 2 held-out tasks, over 5 seeds.",
        ),
        (
            pair(0.1, (0.05, 0.15), asked="most", shots_a=None, shots_b=None),
            "With each task's most shots, ManyICL is better than zero-shot FT by 10.0 points [+5.0, +15.0] on 2"
            " held-out tasks, over 5 seeds.",
        ),
        (
            pair(0.1, (0.05, 0.15), asked="chosen", shots_a=None, shots_b=0),
            "With chosen shots, ManyICL (each task's own) is better than zero-shot FT (0 shots) by 10.0 points [+5.0,"
            " +15.0] on 2 held-out tasks, over 5 seeds.",
        ),
    ],
)
def test_a_difference_in_words(found, told):
    assert tell_pair(found, title=lambda arm: ARMS[arm].title) == told


def test_ways_of_asking_that_are_the_same_numbers_of_shots_are_named_in_one_sentence():
    most = pair(0.1, (0.05, 0.15), asked="chosen", shots_a="fill", shots_b="fill")
    told = tell_pair(most, title=str.upper, asked=("chosen", "most", "each"))
    assert told.startswith(
        "With as many shots as fit (the chosen number and the most), MANYICL is better than ZERO-SHOT"
    )
    own = pair(0.1, (0.05, 0.15), asked="chosen", shots_a=None, shots_b=None)
    told = tell_pair(own, title=str.upper, asked=("chosen", "most"))
    assert told.startswith("With each task's chosen shots (the most), MANYICL is better than ZERO-SHOT by")
