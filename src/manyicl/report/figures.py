"""The plots of a report and their data: curves, differences, forgetting, losses, and a small plot per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from markupsafe import Markup

from manyicl.comparison import FLAT_GAIN, Change, Comparison, DriftPoint, MeanPoint, ShotLoss, TaskChange
from manyicl.console import is_known
from manyicl.evaluation import Shots, tell_shot_count
from manyicl.report import tables
from manyicl.report.numbers import count_noun, join_words, tell_change, tell_percent
from manyicl.report.plots import (
    Axis,
    Bar,
    Line,
    draw_bars,
    draw_lines,
    draw_sparkline,
    draw_swatch,
    plotting,
    shot_places,
    shots_axis,
)
from manyicl.report.svg import Plots


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot with its caption."""

    title: str
    svg: Markup


def draw_all(comparison: Comparison, plots: Plots) -> dict[str, Any]:
    """Return every plot of the page, by the name that the template uses for it."""
    with plotting():
        return {
            "swatches": [
                plots.embed_symbol(draw_swatch(place), f"swatch-{place}") for place in range(len(comparison.arms))
            ],
            "curves": _role_curves(comparison, plots),
            "family_curves": {role: _family_curves(comparison, plots, role) for role in comparison.roles},
            "flatness": _flatness(comparison, plots),
            "differences": _differences(comparison, plots),
            "forgotten_text": _forgotten_text(comparison, plots),
            "forgotten_tasks": _forgotten_tasks(comparison, plots),
            "drift": _drift(comparison, plots),
            "shot_losses": _shot_losses(comparison, plots),
            "confidence": _confidence(comparison, plots),
            "sparklines": _sparklines(comparison, plots),
        }


def _mean_lines(comparison: Comparison, role: str, family: str | None) -> list[Line]:
    """Return the mean curves of the arms that were asked on all tasks; means over fewer tasks are not comparable."""
    most = comparison.most_tasks(role, family)
    lines = []
    for arm, place in comparison.place.items():
        found = [point for point in comparison.mean_points(arm, role, family) if point.tasks == most]
        if any(is_known(point.score) for point in found):
            hollow = [comparison.is_extrapolated(point) for point in found]
            lines.append(_score_line(place, found, places=shot_places(comparison.shots), hollow=hollow))
    return lines


def _score_line(
    place: int, points: Sequence[MeanPoint], *, places: Mapping[Shots, float], hollow: Sequence[bool]
) -> Line:
    return Line(
        place,
        [places[point.shots] for point in points],
        _scaled([point.score for point in points], 100),
        _scaled([point.low for point in points], 100),
        _scaled([point.high for point in points], 100),
        hollow,
    )


def _top(lines: Sequence[Line]) -> float:
    """Return the upper end of an axis of scores in % that begins at 0."""
    values = [value for line in lines for value in (*line.ys, *line.highs) if value is not None]
    return min(102.0, 1.08 * max(values, default=1.0) + 0.5)


def _tell_lines(comparison: Comparison, lines: Sequence[Line]) -> str:
    """Return the first and last value of each line in words, for readers who do not see the plot."""
    ends = []
    for line in lines:
        known = [y for y in line.ys if y is not None]
        ends.append(f"{comparison.arms[line.place].title} from {known[0]:.1f} to {known[-1]:.1f} %")
    return join_words(ends)


def _curve_panel(
    comparison: Comparison, plots: Plots, role: str, family: str | None, *, top: float, height: float
) -> list[Panel]:
    """Return a panel of score against shots on the tasks of a role, or of a family in it; none without a curve.

    top: the upper end of its axis.
    """
    lines = _mean_lines(comparison, role, family)
    if not lines:
        return []
    points = [point for point in comparison.means if (point.role, point.family) == (role, family)]
    most, shorter = comparison.most_tasks(role, family), tables.tell_shorter_means(comparison, role, family)
    title = f"{role.capitalize()} tasks, mean of {most}" if family is None else f"{family}, {count_noun(most, 'task')}"
    title += f"; {shorter}" if shorter else ""
    majority = next((point.majority_score for point in points if is_known(point.majority_score)), None)
    chance = next((point.chance_score for point in points if is_known(point.chance_score)), None)
    levels = [100 * level for level in (majority, chance) if level is not None]
    asked = {point.shots for point in points}
    places = {k: place for k, place in shot_places(comparison.shots).items() if k in asked}
    figure = draw_lines(lines, shots_axis(places), Axis("score, %", bounds=(0, top), levels=levels), height=height)
    note = "" if majority is None else f"; always giving the most common answer, {tell_percent(majority)} %"
    note += "" if chance is None else f"; chance, {tell_percent(chance)} %"
    alt = f"Score against shots, {title}: {_tell_lines(comparison, lines)}{note}."
    return [Panel(title, plots.embed(figure, alt))]


def _role_curves(comparison: Comparison, plots: Plots) -> list[Panel]:
    top = _top([line for role in comparison.roles for line in _mean_lines(comparison, role, None)])
    return [
        panel for role in comparison.roles for panel in _curve_panel(comparison, plots, role, None, top=top, height=260)
    ]


def _family_curves(comparison: Comparison, plots: Plots, role: str) -> list[Panel]:
    top = _top([line for family in comparison.families for line in _mean_lines(comparison, role, family)])
    return [
        panel
        for family in comparison.families
        for panel in _curve_panel(comparison, plots, role, family, top=top, height=200)
    ]


def _scaled(values: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if value is None else factor * value for value in values]


def _bar(
    comparison: Comparison, arm: str, change: Change, *, unit: str = "points", name: str = "", tag: str = ""
) -> Bar:
    """Return a change in points or bits as a bar in an arm's colour, labelled by `name` (the arm) and its size."""
    value, low, high, *seeds = _scaled(
        [change.difference, change.low, change.high, *change.seeds], 100 if unit == "points" else 1
    )
    points = tell_change(change.difference, unit=unit, low=change.low, high=change.high)
    label = f"{name or comparison.title_of(arm)}  {points}{tag and f', {tag}'}"
    return Bar(comparison.place.get(arm, 0), label, value, low, high, seeds if comparison.few_seeds else ())


def _bars_panel(plots: Plots, title: str, bars: list[Bar], unit: str, **look: Any) -> list[Panel]:
    """Return the bars as one panel; none if nothing was measured."""
    if not any(is_known(bar.value) for bar in bars):
        return []
    labels = join_words([bar.label for bar in bars])
    return [Panel(title, plots.embed(draw_bars(bars, unit, **look), f"{title}, in {unit}: {labels}."))]


def _flatness(comparison: Comparison, plots: Plots) -> dict[str, list[Panel]]:
    panels: dict[str, list[Panel]] = {}
    for role in comparison.roles:
        bars = [
            _bar(comparison, flat.arm, flat, tag=tables.flat_tag(flat))
            for flat in comparison.flatness
            if flat.role == role
        ]
        unit = "points from the fewest shots to the most"
        title = f"{role.capitalize()} tasks"
        panels[role] = _bars_panel(plots, title, bars, unit, filled=False, near_zero=100 * FLAT_GAIN)
    return panels


def _differences(comparison: Comparison, plots: Plots) -> list[Panel]:
    panels = []
    for role in reversed(comparison.roles):
        asked = comparison.main_asked(role)
        bars = [
            _bar(comparison, pair.b, pair, name=f"{comparison.title_of(pair.a)} minus {comparison.title_of(pair.b)}")
            for pair in comparison.differences
            if (pair.role, pair.asked) == (role, asked)
        ]
        panels += _bars_panel(plots, f"{role.capitalize()} tasks, {tables.ASKED[asked]}", bars, "points", filled=False)
    return panels


def _forgotten_text(comparison: Comparison, plots: Plots) -> list[Panel]:
    panels = []
    for file in dict.fromkeys(change.file for change in comparison.forgetting.text):
        changes = [change for change in comparison.forgetting.text if change.file == file]
        bars = [_bar(comparison, change.arm, change, unit="bits") for change in changes]
        panels += _bars_panel(plots, file, bars, "bits per byte, after minus before (right: forgotten)", filled=True)
    return panels


def _forgotten_tasks(comparison: Comparison, plots: Plots) -> list[Panel]:
    titles = {"forgetting": "Tasks the base could do", "transfer": "Tasks the base could not do"}
    panels = []
    changed: dict[tuple[str, str], list[TaskChange]] = {}
    for change in comparison.forgetting.tasks:
        shots = f"{change.asked} shots" if change.shots is None else tell_shot_count(change.shots)
        changed.setdefault((change.kind, shots), []).append(change)
    for (kind, shots), changes in sorted(changed.items()):
        bars = [_bar(comparison, change.arm, change) for change in changes]
        title = f"{titles[kind]}, {shots}"
        panels += _bars_panel(plots, title, bars, "points, after minus before (right: gained)", filled=True)
    return panels


def _mean_by_step(
    points: Sequence[DriftPoint | ShotLoss], key: str, *, scale: float
) -> tuple[list[float], list[float | None]]:
    """Return the tokens trained on at each step and the mean value there.

    Tokens are a mean too: seeds differ in a few of them.
    """
    by_step: dict[int, list[DriftPoint | ShotLoss]] = {}
    for point in points:
        if is_known(getattr(point, key)):
            by_step.setdefault(point.step, []).append(point)
    steps = [by_step[step] for step in sorted(by_step)]
    xs = [mean(point.tokens for point in found) / scale for found in steps]
    return xs, [mean(getattr(point, key) for point in found) for found in steps]


def _tokens_axis(points: Sequence[DriftPoint] | Sequence[ShotLoss]) -> tuple[Axis, float]:
    """Return the axis of tokens trained on, and how many tokens its unit is."""
    most = max((point.tokens for point in points), default=0)
    word, scale = next(
        (
            (word, scale)
            for word, scale in (("billion ", 1e9), ("million ", 1e6), ("thousand ", 1e3))
            if most >= 2 * scale
        ),
        ("", 1.0),
    )
    return Axis(f"{word}tokens trained on"), scale


def _drift(comparison: Comparison, plots: Plots) -> list[Panel]:
    panels = []
    drift = comparison.forgetting.drift
    axis, scale = _tokens_axis(drift)
    for file in dict.fromkeys(point.file for point in drift):
        lines = []
        for arm, place in comparison.place.items():
            points = [point for point in drift if (point.arm, point.file) == (arm, file)]
            xs, ys = _mean_by_step(points, "bits_per_byte", scale=scale)
            if ys:
                lines.append(Line(place, xs, ys))
        if lines:
            figure = draw_lines(lines, axis, Axis("bits per byte"))
            ends = join_words(
                [f"{comparison.arms[line.place].title} from {line.ys[0]:.3f} to {line.ys[-1]:.3f}" for line in lines]
            )
            panels.append(Panel(file, plots.embed(figure, f"Bits per byte of {file} over training: {ends}.")))
    return panels


def _shot_losses(comparison: Comparison, plots: Plots) -> list[Panel]:
    panels = []
    axis, scale = _tokens_axis(comparison.shot_losses)
    for arm, place in comparison.place.items():
        mine = [loss for loss in comparison.shot_losses if loss.arm == arm]
        buckets = sorted({loss.shots for loss in mine}, key=lambda shots: int(shots.split("-")[0].rstrip("+")))
        lines = []
        for number, bucket in enumerate(buckets):
            points = [loss for loss in mine if loss.shots == bucket]
            xs, ys = _mean_by_step(points, "nats_a_token", scale=scale)
            if ys:
                strength = 0.45 + 0.55 * (number + 1) / len(buckets)
                lines.append(Line(place, xs, ys, label=bucket, strength=strength, width=1.6, marked=False))
        if lines:
            figure = draw_lines(lines, axis, Axis("nats per answer token"))
            ends = join_words(
                [f"{line.ys[-1]:.2f} after {line.label} {'shot' if line.label == '1' else 'shots'}" for line in lines]
            )
            alt = f"Training loss by number of shots, {comparison.title_of(arm)}, at the end: {ends}."
            panels.append(Panel(comparison.title_of(arm), plots.embed(figure, alt)))
    return panels


def _confidence(comparison: Comparison, plots: Plots) -> list[Panel]:
    """Return, for each role, score against confidence, and score against the fraction of queries that are answered."""
    panels = []
    for role in comparison.roles:
        found = [one for one in comparison.confidence if one.role == role and one.arm in comparison.place]
        if not found:
            continue
        reliable = [
            Line(
                comparison.place[one.arm],
                [100 * bin_.confidence for bin_ in one.bins],
                [100 * bin_.score for bin_ in one.bins],
            )
            for one in found
        ]
        x, y = Axis("confidence, %"), Axis("score, %", bounds=(0, 102), diagonal=True)
        gaps = join_words([f"{comparison.title_of(one.arm)} {tell_percent(one.ece)} %" for one in found])
        alt = f"Score against confidence, {role} tasks. Expected calibration error: {gaps}."
        panels.append(Panel(f"Reliability, {role} tasks", plots.embed(draw_lines(reliable, x, y), alt)))
        covered = []
        for one in found:
            given = [point for point in reversed(one.coverage) if point.score is not None]
            xs = [100 * point.coverage for point in given]
            covered.append(Line(comparison.place[one.arm], xs, _scaled([point.score for point in given], 100)))
        x, y = Axis("queries answered, %"), Axis("score of the answers, %", bounds=(0, 102))
        areas = join_words([f"{comparison.title_of(one.arm)} {tell_percent(one.aurc)} %" for one in found])
        alt = f"Score of the surest answers against their share, {role} tasks. Area under the error: {areas}."
        panels.append(
            Panel(f"If unsure queries get no answer, {role} tasks", plots.embed(draw_lines(covered, x, y), alt))
        )
    return panels


def sparkline_top(comparison: Comparison) -> float:
    """Return the upper end of the axis of all tasks' small plots: the best score, rounded up to a tenth."""
    best = max((point.score for point in comparison.curves if point.score is not None), default=1.0)
    return max(0.1, math.ceil(10 * best) / 10)


def _sparklines(comparison: Comparison, plots: Plots) -> dict[str, Markup]:
    places = shot_places(comparison.shots)
    bounds = (-0.3, max(places.values(), default=0.0) + 0.3)
    drawn = {}
    for task in comparison.tasks:
        lines = []
        for arm, place in comparison.place.items():
            points = [point for point in comparison.curve_points.get((arm, task.task), []) if is_known(point.score)]
            if points:
                xs, ys = [places[point.shots] for point in points], [point.score for point in points]
                lines.append(Line(place, xs, ys, width=1.1, marked=len(points) == 1))
        if lines:
            ends = _tell_lines(comparison, [Line(line.place, line.xs, _scaled(line.ys, 100)) for line in lines])
            drawn[task.task] = plots.embed(
                draw_sparkline(lines, bounds=bounds, top=sparkline_top(comparison)),
                f"Score against shots: {ends}.",
                kind="sparkline",
            )
    return drawn
