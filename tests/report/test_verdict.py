"""The verdict says no more than its differences do (review A8): tasks, matching, finished seeds, signs and margins."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.comparison.comparison_file import Comparison, check_comparison
from manyicl.report.markdown import render_markdown
from manyicl.report.verdict import key_facts, tell_intervals, tell_verdict
from tests.support.comparison_data import make_comparison

TITLES = {
    "base": "base",
    "zero-shot": "zero-shot FT",
    "few-shot": "few-shot FT",
    "manyicl": "ManyICL",
    "dedicated": "dedicated FT",
    "dedicated-free": "dedicated FT, ceiling (not matched)",
}
SMALL = make_comparison(num_seeds=1, num_tasks=5)


def difference(other: str, points: float, half: float | None, **changes: Any) -> dict[str, Any]:
    """Return ManyICL less another arm, in points of a hundred, with an interval of so many points to either side."""
    ends = {} if half is None else {"low": (points - half) / 100, "high": (points + half) / 100}
    entry = {"role": "trained", "tasks": 16, "a": "manyicl", "b": other, "asked": "chosen", "seeds": [0.1] * 5}
    return entry | {"difference": points / 100, **ends} | changes


def compare(differences: list[dict[str, Any]], **changes: Any) -> Comparison:
    """Return a comparison of all arms with these differences alone."""
    arms = [{"arm": arm, "title": title, "matched": arm != "dedicated-free"} for arm, title in TITLES.items()]
    roles = {pair["role"] for pair in differences} or {"trained"}
    tasks = [{**SMALL["tasks"][0], "role": role, "task": role} for role in sorted(roles)]
    empty: dict[str, Any] = {key: [] for key in ("headline", "means", "curves", "flatness", "costs", "chosen")}
    content = {**SMALL, **empty, "arms": arms, "tasks": tasks, "forgetting": {}, "examples": [], "flips": []}
    content |= {"orders": [], "trials": [], "shot_losses": [], "seeds": [0, 1, 2, 3, 4], "differences": differences}
    return check_comparison({**content, **changes})


def test_a_sentence_covers_only_as_many_tasks_as_each_of_its_differences_has():
    found = [
        difference("base", 19, 5),
        difference("zero-shot", 30, 5),
        difference("dedicated", 80, 5, tasks=3),
    ]
    assert tell_verdict(compare(found)) == (
        "At equal training tokens, ManyICL answers 16 trained tasks better than zero-shot FT, by 30.0 points."
        " At equal training tokens, it answers 3 trained tasks better than dedicated FT, by 80.0 points."
        " It answers 16 trained tasks better than base, which is not trained, by 19.0 points."
    )


def test_an_arm_that_is_not_matched_is_in_no_sentence_of_the_verdict():
    found = [difference("few-shot", 5, 1), difference("dedicated-free", 40, 1, tasks=3)]
    assert tell_verdict(compare(found, match="flops")) == (
        "At equal training FLOPs, ManyICL answers 16 trained tasks better than few-shot FT, by 5.0 points."
    )
    assert "ceiling" not in tell_verdict(compare([difference("dedicated-free", 40, 1)]))


def test_seeds_are_counted_that_are_finished_not_that_the_recipe_names():
    """`compare` with five seeds, of which one is done: the interval is over the draws and queries of that run."""
    found = [difference("base", 7, 1, seeds=[0.07, None, None, None, None])]
    comparison = compare(found, finished=False)
    assert tell_verdict(comparison).startswith("So far, and unfinished, for this run (1 seed): ManyICL answers")
    assert tell_intervals(comparison).startswith("1 training seed is finished: intervals cover draws of shots and")
    assert "over seeds" not in render_markdown(comparison)


def test_seeds_of_which_some_arms_have_more_are_told_as_a_range():
    found = [difference("zero-shot", 7, 1), difference("few-shot", 7, 1, seeds=[0.07, 0.07, 0.07, None, None])]
    assert tell_verdict(compare(found)).startswith("For these runs (3 to 5 seeds): at equal training tokens, ManyICL")
    assert tell_intervals(compare(found)).startswith("3 to 5 training seeds are finished: with five or more, ")


def test_a_verdict_on_new_tasks_ends_with_the_arms_that_are_better_on_trained_ones():
    """A reader of the first sentences alone took ManyICL for the best arm of all."""
    new = [difference(arm, 6, 1, role="held-out", tasks=8) for arm in ("zero-shot", "few-shot", "base")]
    trained = [
        difference("zero-shot", -1, 0.9),
        difference("few-shot", 4, 1),
        difference("dedicated", -5, 2),
        difference("dedicated-free", -9, 1),
        difference("base", -2, 3),
    ]
    assert tell_verdict(compare([*new, *trained])) == (
        "At equal training tokens, ManyICL answers 8 held-out tasks better than zero-shot FT and few-shot FT, by 6.0"
        " points. It answers 8 held-out tasks better than base, which is not trained, by 6.0 points. At equal training"
        " tokens, it answers 16 trained tasks worse than zero-shot FT and dedicated FT, by 1.0 to 5.0 points."
    )


def test_without_held_out_answers_at_chosen_shots_the_verdict_falls_back_and_says_so():
    """Review A7: all work of a comparison was done, and the verdict was "Nothing can be told yet"."""
    most = difference("few-shot", 6, 1, role="held-out", asked="most")
    assert tell_verdict(compare([most])) == (
        "With most shots (with chosen shots there is nothing to compare): at equal training tokens, ManyICL answers"
        " 16 held-out tasks better than few-shot FT, by 6.0 points."
    )
    tasks = [{**SMALL["tasks"][0], "role": role, "task": role} for role in ("trained", "held-out")]
    assert tell_verdict(compare([difference("few-shot", 6, 1)], tasks=tasks)) == (
        "On trained tasks (on held-out tasks there is nothing to compare): at equal training tokens, ManyICL answers"
        " 16 trained tasks better than few-shot FT, by 6.0 points."
    )


def test_arms_are_compared_at_the_most_shots_if_none_were_chosen_on_validation_rows():
    """With 5 shots against as many as fit, ManyICL was "better than few-shot FT, by 27.4 points"."""
    found = [difference("few-shot", 27.4, 4), difference("few-shot", -0.5, 2, asked="most")]
    usual = [{"arm": arm, "shots": shots} for arm, shots in (("few-shot", 5), ("manyicl", "fill"))]
    comparison = compare(found, chosen=usual)
    assert tell_verdict(comparison) == (
        "With most shots (no number was chosen on validation rows): at equal training tokens, no difference between"
        " ManyICL and few-shot FT can be shown on 16 trained tasks."
    )
    assert "since none was chosen on validation rows" in render_markdown(comparison)
    most = {"agnews": 562, "clinc150": 1797}
    score = {"arm": "manyicl", "role": "trained", "asked": "most", "shots_by_task": most, "score": 0.6, "seeds": [0.6]}
    fact = dict(key_facts(compare(found, chosen=usual, headline=[score])))["Trained tasks"]
    assert fact.startswith("ManyICL scores 60.0 % with each task's most shots (562 to 1797); points above the other")
    beside_base = compare([*found, difference("base", 5, 2, asked="most")], chosen=usual)
    assert tell_verdict(beside_base).endswith(
        " ManyICL answers 16 trained tasks better than base, which is not trained, by 5.0 points."
    )
    judged = [{**one, "scores": [{"shots": one["shots"], "score": 0.5}]} for one in usual]
    assert "by 27.4 points" in tell_verdict(compare(found, chosen=judged))


def test_there_is_no_verdict_yet_only_while_work_is_missing():
    assert tell_verdict(compare([])) == "No verdict: no two arms have answered the same queries."
    assert tell_verdict(compare([], finished=False)) == "No verdict yet: no arm has answered test queries."
    cells = {arm: {"arm": arm, "task": "t", "shots": 4, "score": 0.5, "num_scored": 9} for arm in ("base", "manyicl")}
    assert tell_verdict(compare([], finished=False, curves=[cells["base"]])) == (
        "No verdict yet: only base has answered test queries."
    )
    assert tell_verdict(compare([], finished=False, curves=list(cells.values()))) == (
        "No verdict yet: base and ManyICL have not answered the same queries with the same seed."
    )


def test_forgetting_of_known_tasks_without_shots_stands_in_the_first_table_beside_bits_per_byte():
    """Review C: the page showed it in a folded table alone."""
    changes = [
        {
            "arm": "manyicl",
            "kind": "forgetting",
            "shots": shots,
            "tasks": ["a"],
            "difference": points,
            "seeds": [points],
        }
        for shots, points in ((0, -0.358), (64, 0.01))
    ]
    comparison = compare([difference("base", 7, 1)], forgetting={"tasks": changes})
    table = render_markdown(comparison).split("## Scores")[1].split("## ")[0]
    assert "Forgetting, points: 0 shots" in table
    assert "| ManyICL | \N{MINUS SIGN}35.8 (1 task) |" in table
    facts = dict(key_facts(comparison))
    assert facts["Forgetting, tasks"] == (
        "Points above the base on 1 task that it could do at 0 shots: ManyICL \N{MINUS SIGN}35.8 [no interval]."
    )


seeds_of = st.lists(st.sampled_from([0.1, None]), min_size=1, max_size=6)
differences_of = st.fixed_dictionaries(
    {
        "points": st.floats(-90, 90).map(lambda value: round(value, 2)),
        "half": st.one_of(st.none(), st.floats(0.01, 60)),
        "tasks": st.integers(1, 4),
        "seeds": seeds_of,
        "turned": st.booleans(),
    }
)


@st.composite
def tables(draw: st.DrawFn) -> Comparison:
    """Return arms x roles x ways of asking with random differences, some missing, some of arms that are not matched."""
    found = []
    for role in ("trained", "held-out"):
        for asked in ("chosen", "most"):
            for other in [arm for arm in TITLES if arm != "manyicl"]:
                if draw(st.booleans()):
                    one = draw(differences_of)
                    pair = difference(
                        other,
                        one["points"],
                        one["half"],
                        role=role,
                        asked=asked,
                        tasks=one["tasks"],
                        seeds=one["seeds"],
                    )
                    found.append(turn(pair) if one["turned"] else pair)
    arms = [
        {"arm": arm, "title": title, "matched": arm in ("base", "manyicl") or draw(st.booleans())}
        for arm, title in TITLES.items()
    ]
    match = draw(st.sampled_from(["tokens", "answers", "flops"]))
    return compare(found, arms=arms, match=match, finished=draw(st.booleans()))


def turn(pair: dict[str, Any]) -> dict[str, Any]:
    """Return the same difference told the other way round."""
    ends = {"low": -pair["high"], "high": -pair["low"]} if "low" in pair else {}
    return {**pair, "a": pair["b"], "b": pair["a"], "difference": -pair["difference"], **ends}


NAME = "|".join(re.escape(title) for title in sorted(TITLES.values(), key=len, reverse=True))
MATCHED = {"tokens": "tokens", "answers": "answers", "flops": "FLOPs"}
SENTENCE = re.compile(
    r"(?P<matched>[Aa]t equal training (?P<match>\w+), )?"
    r"(?:(?:ManyICL|[Ii]t) answers (?P<count>\d+) (?P<role>[\w-]+) tasks?"
    r"(?P<told>.*?)(?:; no difference from (?P<rest>.*?) can be shown)?"
    r"|[Nn]o difference between ManyICL and (?P<untold>.*?) can be shown on (?P<count2>\d+) (?P<role2>[\w-]+) tasks?)"
    r"\.(?= [A-Z]|$)"
)


def arms_in(text: str | None) -> list[str]:
    titles = {title: arm for arm, title in TITLES.items()}
    return [titles[title] for title in re.findall(NAME, text or "")]


def standing_of(comparison: Comparison, other: str, *, role: str, asked: str) -> tuple[float, int, int, int]:
    """Return ManyICL's points above another arm, their sign as far as the interval tells it, tasks, and seeds."""
    (pair,) = [
        p for p in comparison.differences if (p.role, p.asked) == (role, asked) and {p.a, p.b} == {"manyicl", other}
    ]
    sign = 1 if pair.a == "manyicl" else -1
    ends = [] if pair.low is None or pair.high is None else [sign * pair.low, sign * pair.high]
    told = 0 if not ends or min(ends) <= 0 <= max(ends) else 1 if min(ends) > 0 else -1
    assert pair.difference is not None
    return sign * pair.difference, told, pair.tasks, sum(seed is not None for seed in pair.seeds)


def shown(size: float) -> str:
    """Return a size in points to a tenth, or as hundredths if it would be 0.0; `tables` has none below these."""
    return f"{100 * size:.1f}" if f"{100 * size:.1f}" != "0.0" else f"{100 * size:.2f}"


def test_a_difference_that_is_shown_is_never_one_of_no_points():
    assert "better than few-shot FT, by 0.04 points." in tell_verdict(compare([difference("few-shot", 0.04, 0.01)]))


@pytest.mark.slow
@settings(max_examples=400)
@given(tables())
def test_no_sentence_of_the_verdict_is_stronger_than_its_intervals(comparison):
    text = tell_verdict(comparison)
    asked = "most" if "With most shots" in text or "with most shots" in text else "chosen"
    matched = {arm.arm for arm in comparison.arms if arm.matched} - {"manyicl"}
    if text.startswith("No verdict"):
        pairs = {frozenset({p.a, p.b}) for p in comparison.differences}
        assert not any({"manyicl", other} in pairs for other in matched)
        return
    lead, _, claims = text.rpartition(": ")
    sentences = list(SENTENCE.finditer(claims))
    assert " ".join(sentence[0] for sentence in sentences) == claims, "a part of the verdict says something else"
    cited: list[tuple[str, str]] = []
    num_seeds: list[int] = []
    first_role = sentences[0]["role"] or sentences[0]["role2"]
    for sentence in sentences:
        count, role = int(sentence["count"] or sentence["count2"]), sentence["role"] or sentence["role2"]
        told = {0: arms_in(sentence["untold"] or sentence["rest"])}
        for word, sign in (("better", 1), ("worse", -1)):
            part = re.search(rf"{word} than (.*?), by ([\d.]+)(?: to ([\d.]+))? points", sentence["told"] or "")
            told[sign] = arms_in(part[1]) if part else []
            if part:
                sizes = [abs(standing_of(comparison, arm, role=role, asked=asked)[0]) for arm in told[sign]]
                assert part[2] == shown(min(sizes))
                assert (part[3] or part[2]) == shown(max(sizes))
        assert sum(map(len, told.values())) > 0
        for sign, arms in told.items():
            for arm in arms:
                _, known, tasks, seeds = standing_of(comparison, arm, role=role, asked=asked)
                assert known == sign
                assert tasks == count
                assert arm in matched
                assert (sentence["match"] is None) == (arm == "base")
                num_seeds += [seeds] if role == first_role else []
        assert sentence["match"] in (None, MATCHED[comparison.match])
        cited += [(role, arm) for arms in told.values() for arm in arms]
    every = [
        (p.role, arm)
        for p in comparison.differences
        for arm in (p.a, p.b)
        if arm in matched and p.asked == asked
        if p.role == first_role
        or (p.role == "trained" and standing_of(comparison, arm, role="trained", asked=asked)[1] < 0)
    ]
    assert sorted(cited) == sorted(every)
    assert ("unfinished" in lead) == (not comparison.finished)
    runs = re.search(r"(?:this run|these runs) \((\d+)", lead)
    assert (runs is not None) == (min(num_seeds) < 5)
    assert runs is None or int(runs[1]) == min(num_seeds)


@pytest.mark.slow
@settings(max_examples=200)
@given(tables(), st.integers(1, 4))
def test_facts_below_the_verdict_name_tasks_intervals_and_what_is_not_matched(comparison, num_tasks):
    cells = [
        {"arm": "manyicl", "role": role, "asked": "chosen", "shots": 4, "score": 0.5, "seeds": [0.5]}
        for role in comparison.roles
    ]
    told = dict(key_facts(compare_again(comparison, headline=cells)))
    for role in comparison.roles:
        fact = told[f"{role} tasks".capitalize()]
        shared = re.search(r"points above the other arms, on (\d+) tasks?: ", fact)
        pairs = [p for p in comparison.differences if (p.role, p.asked) == (role, "chosen")]
        for pair in pairs:
            other = pair.b if pair.a == "manyicl" else pair.a
            entry = re.search(rf"{re.escape(TITLES[other])} (\S+) (\[[^\]]*\])(?: \(([^)]*)\))?", fact)
            assert entry is not None
            notes = entry[3] or ""
            count = shared or re.search(r"(\d+) tasks?", notes)
            assert count is not None
            assert int(count[1]) == pair.tasks
            is_matched = comparison.arm_of(other).matched
            assert ("not matched" in entry[0]) == (not is_matched or "not matched" in TITLES[other])
            assert (entry[2] == "[no interval]") == (pair.low is None)


def compare_again(comparison: Comparison, **changes: Any) -> Comparison:
    return check_comparison({"schema": 1, **comparison.model_dump(mode="json"), **changes})
