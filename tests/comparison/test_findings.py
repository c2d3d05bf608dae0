"""What is told of scores: chosen shots, the best arm, flat curves, flips and forgetting, on answers made up here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manyicl.comparison.analyses import list_flips
from manyicl.comparison.arms import ARMS
from manyicl.comparison.findings import Asked, Findings
from manyicl.comparison.forgetting import find_forgetting
from manyicl.comparison.pooling import Pooled, tabulate
from manyicl.comparison.scores import list_flatness, list_headline, tell_difference
from manyicl.evaluation.points import Prediction
from manyicl.tasks.task import flip_map
from tests.conftest import make_task

HELD_OUT = "animals"


def ask(score_of, *, shots, seed=0, draws=2, queries=4, task=HELD_OUT, majority=0.25, told=None) -> Asked:
    """Return answers whose score is score_of(shots, seed, draw, query)."""
    predictions = [
        Prediction(
            task, d if k else 0, k, f"q{q}", prediction=told or "x", answer="x", score=score_of(k, seed, d, q), nll=1.0
        )
        for k in shots
        for d in range(draws if k else 1)
        for q in range(queries)
    ]
    tables = tabulate(predictions)
    curve = [
        {
            "shots": k,
            "score": float(tables[task][k].scores.mean()),
            "nll": 1.0,
            "majority_score": majority,
            "extrapolated": False,
        }
        for k in shots
    ]
    return Asked({task: {"task": task, "curve": curve}}, predictions, tables)


def make_findings(answers: dict[str, list[Asked | None]], *, shots=(0, 1, 4), roles=None, **read: Any) -> Findings:
    """Return findings over answers by arm, a seed each; `read` holds those of other kinds of cells."""
    num_seeds = len(next(iter(answers.values())))
    settings = SimpleNamespace(
        seeds=tuple(range(num_seeds)), shots=shots, validation_queries=2 if "validation" in read else 0,
        few_shot_shots=1, text_window_tokens=32,
    )  # fmt: skip
    roles = roles or {"trained": [], "held-out": [HELD_OUT], "familiar": []}
    tasks = {name: make_task(name) for names in roles.values() for name in names}
    config = SimpleNamespace(episodes=SimpleNamespace(shots="fill"))
    comparison: Any = SimpleNamespace(
        settings=settings, shots=list(shots), config=config, arms=[ARMS[arm] for arm in answers],
        asked_trained=roles["trained"], held_out=roles["held-out"], familiar=roles["familiar"],
        tasks=tasks, cells=list, dedicated=[], is_done=lambda cell: False,
        models_of=lambda arm: [None], place=lambda cell: Path("absent"),
    )  # fmt: skip
    findings = Findings(comparison)
    findings.read = lambda what: {"test": answers, **read}[what]  # type: ignore[method-assign]
    return findings


def level(base: float):
    """Return scores that vary a little over seeds, draws and queries, around base."""
    return lambda k, seed, d, q: base + 0.01 * seed + 0.02 * ((d + q) % 2)


def rising(gain: float):
    return lambda k, seed, d, q: 0.3 + gain * (k == 4) + 0.02 * ((d + q) % 2) + 0.005 * seed * (k == 4)


def test_the_shots_are_those_of_the_best_mean_validation_score_the_fewest_of_equals():
    scores = {0: (0.2, 0.2), 1: (0.6, 0.4), 4: (0.3, 0.7)}
    validation = [ask(lambda k, s, d, q: scores[k][s], shots=scores, seed=seed) for seed in (0, 1)]
    tests = [ask(level(0.5), shots=(0, 1, 4), seed=seed) for seed in (0, 1)]
    findings = make_findings({"manyicl": tests}, validation={"manyicl": validation})
    chosen = findings.chosen["manyicl"]
    assert (chosen.shots, chosen.by_task) == (1, {HELD_OUT: 1})
    assert [one["shots"] for one in chosen.scores] == [0, 1, 4]
    assert [one["score"] for one in chosen.scores] == pytest.approx([0.2, 0.5, 0.5])


def test_without_validation_an_arm_is_asked_with_the_most_shots_it_was_trained_behind():
    findings = make_findings({arm: [ask(level(0.5), shots=(0, 1, 4))] for arm in ("base", "zero-shot", "few-shot")})
    assert {arm: one.shots for arm, one in findings.chosen.items()} == {"base": 4, "zero-shot": 0, "few-shot": 1}


@pytest.mark.parametrize(("num_seeds", "best"), [(5, True), (4, False)])
def test_an_arm_is_best_only_over_five_seeds(num_seeds, best):
    answers = {
        arm: [ask(level(base), shots=(0, 1, 4), seed=seed, queries=40) for seed in range(num_seeds)]
        for arm, base in (("base", 0.2), ("zero-shot", 0.4), ("manyicl", 0.7))
    }
    rows = [row for row in list_headline(make_findings(answers)) if row["asked"] == "most"]
    assert {row["arm"]: row["best"] for row in rows} == {"base": False, "zero-shot": False, "manyicl": best}
    assert [len(row["seeds"]) for row in rows] == [num_seeds] * 3


def test_an_arm_that_beats_all_but_one_is_not_best():
    noise = (0.1, -0.1, 0.05, -0.05, 0.02)
    answers = {
        "base": [ask(level(0.2), shots=(4,), seed=seed) for seed in range(5)],
        "zero-shot": [ask(lambda k, s, d, q: 0.69 + noise[s], shots=(4,), seed=seed) for seed in range(5)],
        "manyicl": [ask(level(0.7), shots=(4,), seed=seed) for seed in range(5)],
    }
    rows = [row for row in list_headline(make_findings(answers, shots=(4,))) if row["asked"] == "most"]
    assert not any(row["best"] for row in rows)
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("gain", "flat", "told"),
    [
        (0.2, False, "rises by 21.0 points"),
        (-0.2, False, "falls by 19.0 points"),
        (-0.01, True, "is flat (+0.0 points)"),
    ],
)
def test_a_curve_rises_falls_or_is_flat_in_words(gain, flat, told):
    answers = {"manyicl": [ask(rising(gain), shots=(0, 1, 4), seed=seed) for seed in range(5)]}
    row = next(iter(list_flatness(make_findings(answers))))
    assert (row["from_shots"], row["to_shots"], row["flat"]) == (1, 4, flat)
    assert row["sentence"] == f"ManyICL: the score on held-out tasks {told} from 1 shot to 4 shots."


def test_a_gain_that_is_large_but_unsure_is_flat():
    gains = (0.5, -0.3, 0.4, -0.2, 0.1)
    answers = {
        "manyicl": [ask(lambda k, s, d, q: 0.4 + gains[s] * (k == 4), shots=(0, 1, 4), seed=s) for s in range(5)]
    }
    row = next(iter(list_flatness(make_findings(answers))))
    assert row["difference"] == pytest.approx(0.1)
    assert row["flat"] is True


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
            "No difference can be told between ManyICL at 4 shots and zero-shot FT at 0 shots on 2 held-out tasks:"
            " +10.0 [-5.0, +25.0], for these runs",
        ),
        (
            Pooled(0.1, None, None, (0.1,), 1),
            "ManyICL at 4 shots and zero-shot FT at 0 shots are 10.0 points apart on 1 held-out task; a single value"
            " tells no difference",
        ),
    ],
)
def test_a_difference_in_words(pooled, told):
    assert tell_difference(pooled, ("manyicl", "at 4 shots"), ("zero-shot", "at 0 shots"), role="held-out") == told


@pytest.mark.parametrize(("follows", "keeps"), [(True, False), (False, True), (False, False)])
def test_a_model_that_follows_exchanged_labels_follows_and_one_that_does_not_keeps(follows, keeps):
    labels = make_task(HELD_OUT).labels
    flipped = flip_map(labels, seed=0)
    rows = []
    for q, label in enumerate(labels):
        told = flipped[label] if follows else label if keeps else "none of them"
        rows += [
            Prediction(
                HELD_OUT, d, 4, f"q{q}", told, answer=flipped[label], score=float(told == flipped[label]), nll=1.0
            )
            for d in (0, 1)
        ]
    flip = Asked({}, rows, tabulate(rows))
    findings = make_findings({"manyicl": [ask(level(0.5), shots=(0, 1, 4))]}, flip={"manyicl": [flip]})
    (row,) = list_flips(findings)
    assert (row["arm"], row["role"], row["shots"], row["tasks"]) == ("manyicl", "held-out", 4, 1)
    assert (row["follows"], row["keeps"]) == (float(follows), float(keeps))
    assert row["plain"] == pytest.approx(0.51)


def test_what_the_base_knew_can_be_forgotten_and_the_rest_is_transfer():
    """The base is far above the majority on `familiar` and below it on `animals`; the arm moves both by 20 points."""
    roles = {"trained": [], "held-out": [HELD_OUT], "familiar": ["familiar"]}

    def both(known: float, new: float) -> Asked:
        one = ask(level(known), shots=(0, 4), task="familiar")
        other = ask(level(new), shots=(0, 4))
        rows = [*one.predictions, *other.predictions]
        return Asked({**one.entries, **other.entries}, rows, tabulate(rows))

    findings = make_findings({"base": [both(0.8, 0.1)], "manyicl": [both(0.6, 0.3)]}, shots=(0, 4), roles=roles)
    rows = [row for row in find_forgetting(findings)["tasks"] if row["shots"] == 4]
    told = {row["kind"]: (row["tasks"], round(row["before"], 6), round(row["difference"], 6)) for row in rows}
    assert told == {
        "forgetting": (["familiar"], 0.81, -0.2),
        "transfer": ([HELD_OUT], 0.11, 0.2),
    }


def test_what_the_base_answers_at_chance_cannot_be_forgotten():
    """Review A10: four options a row, so that the majority answer scores next to nothing, and the base 26 %."""
    asked = ask(lambda k, s, d, q: 0.25 + 0.02 * ((d + q) % 2), shots=(0, 4), majority=0.1)
    for cell in asked.entries[HELD_OUT]["curve"]:
        cell["chance_score"] = 0.25 + 0.02
    findings = make_findings({"base": [asked], "manyicl": [asked]}, shots=(0, 4))
    assert {row["kind"] for row in find_forgetting(findings)["tasks"]} == {"transfer"}
    for cell in asked.entries[HELD_OUT]["curve"]:
        cell["chance_score"] = 0.2
    assert {row["kind"] for row in find_forgetting(findings)["tasks"]} == {"forgetting"}


def test_shots_that_one_arm_was_not_asked_with_are_no_column():
    whole, short = ask(level(0.5), shots=(0, 1, 4)), ask(level(0.5), shots=(0, 1))
    findings = make_findings({"base": [whole], "manyicl": [short]})
    assert findings.asked_by_task == {HELD_OUT: [0, 1]}
    assert findings.shots_as("most", "manyicl", [HELD_OUT]) == {HELD_OUT: 1}
    assert findings.shots_as("chosen", "base", [HELD_OUT]) == {HELD_OUT: 1}  # chosen: 4
    assert findings.shots_as(4, "base", [HELD_OUT]) == {}


def test_a_seed_that_is_missing_is_none_in_every_mean():
    findings = make_findings({"manyicl": [ask(level(0.5), shots=(0, 1, 4)), None]})
    pooled = findings.pool("manyicl", {HELD_OUT: 4})
    assert pooled is not None
    assert pooled.seeds == (pytest.approx(0.51), None)
    assert replace(pooled, seeds=()).num_tasks == 1
