"""The same comparison under several matchings (tokens, answers, FLOPs): its differences side by side."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from manyicl.comparison import Comparison
from manyicl.errors import UserError
from manyicl.evaluation import sort_shots
from manyicl.report.numbers import count_noun, tell_change, tell_interval, tell_times
from manyicl.report.tables import ASKED, EMPTY, TableCell
from manyicl.report.verdict import MATCHING, Standing, method_arm, standings

# An arm's training cost is given as a multiple of the cost of the verdict's arm.
SPENT = (("answers", "answers"), ("tokens", "tokens"), ("flops", "FLOPs"))


@dataclass(frozen=True, slots=True)
class MatchingTable:
    """Differences on the tasks of one role: a row per arm, a column per comparison."""

    title: str
    heads: tuple[str, ...]
    """One per comparison."""
    rows: tuple[tuple[str, tuple[TableCell, ...]], ...]
    """(arm's title, one cell per comparison)."""


def check_matchings(comparisons: Sequence[Comparison], names: Sequence[str]) -> None:
    """Refuse comparisons that cannot be shown side by side: they must ask the same rows of the same tasks.

    names: the folder of each, for messages.

    Raises:
        UserError: tasks, their rows, or the shot counts differ, or two comparisons have the same matching.
    """
    first = comparisons[0]
    for comparison, name in zip(comparisons[1:], names[1:], strict=True):
        for what, one, other in (
            ("tasks", _tasks_of(first), _tasks_of(comparison)),
            ("shot counts", sort_shots(first.shots), sort_shots(comparison.shots)),
            ("verdict arm", method_arm(first), method_arm(comparison)),
        ):
            if one != other:
                raise UserError(f"{name}: has other {what} than {names[0]}; give comparisons that differ in matching")
    matches = [comparison.match for comparison in comparisons]
    for place, match in enumerate(matches):
        if match in matches[:place]:
            other = names[matches.index(match)]
            raise UserError(f"{names[place]}: is matched by {match}, as {other} is; give one comparison per matching")


def _tasks_of(comparison: Comparison) -> dict[str, tuple[str, str]]:
    return {task.task: (task.role, task.sha256) for task in comparison.tasks}


def other_settings(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the names of settings that are not the same in all recipes, except for the name and the matching."""
    recipes = [_flatten(tomllib.loads(comparison.config)) for comparison in comparisons]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differs = [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]
    return [key for key in differs if key not in ("compare.name", "compare.match")]


def _flatten(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def matching_tables(comparisons: Sequence[Comparison]) -> list[MatchingTable]:
    """Return the verdict arm's points above each other arm, one table for each role of tasks.

    They are at chosen shots if each comparison chose them on validation rows, else at the most.
    """
    first = comparisons[0]
    arm = method_arm(first)
    heads = tuple(f"equal {MATCHING.get(one.match, one.match)}" for one in comparisons)
    tables = []
    picked_by = next((one for one in comparisons if not one.chooses_shots), first)
    for role in reversed(first.roles) if arm else ():
        asked = picked_by.main_asked(role)
        found = [{one.other: one for one in standings(c, arm or "", role, asked=asked)} for c in comparisons]
        others = [other for other in first.place if any(other in one for one in found)]
        rows = [
            (
                first.title_of(other),
                tuple(_cell(c, arm or "", one.get(other)) for c, one in zip(comparisons, found, strict=True)),
            )
            for other in others
        ]
        if rows:
            title = f"{role.capitalize()} tasks: points of {first.title_of(arm or '')} above each arm, {ASKED[asked]}"
            tables.append(MatchingTable(title, heads, tuple(rows)))
    return tables


def _cell(comparison: Comparison, arm: str, one: Standing | None) -> TableCell:
    if one is None:
        return EMPTY
    notes = [f"{count_noun(one.tasks, 'task')}, {count_noun(one.seeds, 'seed')}"]
    if not comparison.arm_of(one.other).matched:
        notes.append("not matched")
    if not comparison.finished:
        notes.append("unfinished")
    spent = [(noun, _ratio(comparison, one.other, arm, key)) for key, noun in SPENT]
    costs = [f"{noun} \N{MULTIPLICATION SIGN}{tell_times(ratio)}" for noun, ratio in spent if ratio]
    if costs:
        notes.append(", ".join(costs))
    points = tell_change(one.points, unit="points", low=one.low, high=one.high)
    return TableCell(points, one.points, tell_interval(one.low, one.high, unit="points"), tuple(notes))


def _ratio(comparison: Comparison, one: str, other: str, key: str) -> float | None:
    """Return how many times as much one arm spent as another, by means over seeds; None if it is not known."""
    spent = [
        [value for cost in comparison.costs if cost.arm == arm for value in [getattr(cost, key)] if value is not None]
        for arm in (one, other)
    ]
    return mean(spent[0]) / mean(spent[1]) if all(spent) and mean(spent[1]) else None
