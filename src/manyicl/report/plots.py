"""Plots drawn by matplotlib: curves with bands, bars with intervals, curves as small as a word; and curves of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import plotext
from rich.text import Text

from manyicl.console import is_known
from manyicl.evaluation import FILL, Shots, sort_shots
from manyicl.report.svg import INK, LINE, MUTED, PAPER, arm_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Marks and colours of plotext, in the order of the arms; marks differ so that colour is not needed.
_MARKS = ("o", "x", "+", "*", "#", "@", "%", "&")
_COLOURS = ("white", "orange", "red", "blue", "green", "magenta", "cyan", "gray")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
# In points; the page stretches plots to the available width, and 360 is that of a phone.
PLOT_WIDTH = 360
ROW_HEIGHT = 30
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "manyicl",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot."""

    place: int
    """The place of its arm in the tables, which decides colour and marker."""
    xs: Sequence[float]
    ys: Sequence[float | None]
    lows: Sequence[float | None] = ()
    """The lower ends of its band; () for none."""
    highs: Sequence[float | None] = ()
    hollow: Sequence[bool] = ()
    """Which points are extrapolated, and so hollow."""
    label: str = ""
    """Text at its right end."""
    strength: float = 1.0
    """Opacity; 1 is the arm's full colour."""
    width: float = 1.8
    marked: bool = True
    """Whether its points have markers."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One signed number with its interval."""

    place: int
    """The place of its arm in the tables, which decides its colour."""
    label: str
    value: float | None
    """None if it was not measured."""
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float | None] = ()
    """One value per seed, shown as ticks."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale and its unit."""

    label: str
    ticks: Sequence[float] = ()
    """Where its ticks are; () leaves that to matplotlib."""
    names: Sequence[str] = ()
    """The texts of its ticks."""
    bounds: tuple[float, float] | None = None
    levels: Sequence[float] = ()
    """Values that are marked by a dotted line across the plot."""
    diagonal: bool = False
    """Whether the line on which both axes are equal is dotted."""


@contextmanager
def plotting() -> Iterator[None]:
    """Draw in the report's style inside the block."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _new_figure(width: float, height: float, margins: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """Return an empty figure of a size in points.

    margins: left, bottom, right, top.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    left, bottom, right, top = margins
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def shots_axis(places: Mapping[Shots, float]) -> Axis:
    """Return the axis of numbers of shots.

    places: number of shots -> its position.
    """
    return Axis("shots (log scale)", list(places.values()), [str(k) for k in places])


def shot_places(shots: Iterable[Shots]) -> dict[Shots, float]:
    """Return the positions of numbers of shots on an axis, ascending: log2(k + 1), so that 0 has one too.

    `fill` is another number on each task; it is placed one step after the others.
    """
    places: dict[Shots, float] = {}
    for k in sort_shots(shots):
        places[k] = max(places.values(), default=-1.0) + 1 if k == FILL else math.log2(k + 1)
    return places


def draw_curves(
    curves: Mapping[int, Mapping[Shots, float]], title: str, *, size: tuple[int, int], colour: bool
) -> Text:
    """Return curves of scores in % against shots, on an axis that begins a little below the lowest.

    curves: which mark and colour a curve has (`mark_of`) -> its score by number of shots.
    """
    plotext.clf()
    plotext.theme("pro" if colour else "clear")
    plotext.plotsize(*size)
    places = shot_places({shots for curve in curves.values() for shots in curve})
    for number, curve in curves.items():
        xs = [places[shots] for shots in curve]
        hue = _COLOURS[number % len(_COLOURS)]
        plotext.plot(xs, list(curve.values()), marker="braille", color=hue)
        plotext.scatter(xs, list(curve.values()), marker=mark_of(number), color=hue)
    plotext.xticks(list(places.values()), [str(shots) for shots in places])
    scores = [score for curve in curves.values() for score in curve.values()]
    margin = max(1.0, 0.1 * (max(scores) - min(scores)))  # from 0 on, curves that lie close would be one line
    plotext.ylim(max(0.0, min(scores) - margin), min(100.0, max(scores) + margin))
    plotext.title(title)
    return Text.from_ansi(plotext.build().rstrip("\n"))


def mark_of(number: int) -> str:
    """Return the mark of the points of a curve."""
    return _MARKS[number % len(_MARKS)]


def draw_lines(lines: Sequence[Line], x: Axis, y: Axis, *, height: float = 240) -> Figure:
    """Return a plot of lines with bands; extrapolated points are hollow, with dashes leading to them."""
    figure, axes = _new_figure(PLOT_WIDTH, height, (40, 38, 46 if any(line.label for line in lines) else 10, 24))
    axes.grid(axis="y")
    for level in y.levels:
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    if y.diagonal:
        axes.axline((0, 0), slope=1, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    for line in lines:
        if sum(is_known(value) for value in line.ys) == 1 and line.marked:
            level = next(float(value) for value in line.ys if value is not None)
            axes.axhline(level, color=arm_colour(line.place), linewidth=1, alpha=0.6)
        _draw_line(axes, line, size=5)
    axes.set_xlabel(x.label)
    # The unit is above the axis, where it can be read without turning one's head.
    axes.text(0, height - 12, y.label, transform=None, color=MUTED, va="center")
    if x.ticks:
        axes.set_xticks(x.ticks, x.names)
    axes.set_ylim(*(y.bounds or (None, None)))
    _label_ends(axes, [line for line in lines if line.label])
    axes.tick_params(length=3)
    return figure


def _draw_line(axes: Axes, line: Line, *, size: float) -> None:
    known = [i for i, y in enumerate(line.ys) if is_known(y)]
    colour: Any = arm_colour(line.place)
    banded = [i for i in known if line.lows and is_known(line.lows[i]) and is_known(line.highs[i])]
    if banded:
        xs = [line.xs[i] for i in banded]
        lows, highs = ([float(ends[i] or 0.0) for i in banded] for ends in (line.lows, line.highs))
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.12, linewidth=0)
    hollow = line.hollow or [False] * len(line.xs)
    look: Any = {"color": colour, "alpha": line.strength, "linewidth": line.width}
    for dashed in (False, True):
        style: Any = (0, (3, 2)) if dashed else "solid"
        for run in _runs(known, [hollow[i] == dashed for i in known]):
            axes.plot([line.xs[i] for i in run], [float(line.ys[i] or 0.0) for i in run], linestyle=style, **look)
    marker: Any = {"linestyle": "", "marker": MARKERS[line.place % len(MARKERS)], "color": colour, "markersize": size}
    for inside, wanted in ((colour, False), (PAPER, True)) if line.marked else ():
        points = [i for i in known if hollow[i] == wanted]
        ys = [float(line.ys[i] or 0.0) for i in points]
        axes.plot([line.xs[i] for i in points], ys, markerfacecolor=inside, markeredgewidth=size / 4, **marker)


def _runs(points: Sequence[int], reached: Sequence[bool]) -> list[list[int]]:
    """Return the stretches of points whose later ends are all `reached` alike, each with the point it starts from."""
    runs: list[list[int]] = []
    for number in range(1, len(points)):
        if not reached[number]:
            continue
        if runs and runs[-1][-1] == points[number - 1]:
            runs[-1].append(points[number])
        else:
            runs.append([points[number - 1], points[number]])
    return runs


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name beside its last point, pushed apart where they would overlap."""
    ends = []
    for line in lines:
        last = max((i for i, y in enumerate(line.ys) if is_known(y)), default=None)
        if last is not None:
            ends.append((float(line.ys[last] or 0.0), line.xs[last], line.label))
    if not ends:
        return
    ends.sort()
    low, high = axes.get_ylim()
    space = (high - low) * 11 / axes.get_window_extent().height
    places = spread_apart([y for y, _, _ in ends], space=space, lowest=low)
    for place, (_, x, label) in zip(places, ends, strict=True):
        at: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (x, place), fontsize=9.5, color=INK, annotation_clip=False, **at)


def spread_apart(places: Sequence[float], *, space: float, lowest: float) -> list[float]:
    """Return rising `places`, moved as little as possible (least squares) to be `space` apart and not below `lowest`.

    >>> spread_apart([0.0, 0.0, 9.0], space=2.0, lowest=-5.0)
    [-1.0, 1.0, 9.0]
    """
    # After subtracting the required spacing, places must not fall; neighbours that do get their mean.
    pools: list[list[float]] = []
    for number, place in enumerate(places):
        pools.append([place - number * space])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    levels = [max(mean(pool), lowest) for pool in pools for _ in pool]
    return [level + number * space for number, level in enumerate(levels)]


def draw_bars(bars: Sequence[Bar], unit: str, *, filled: bool, near_zero: float = 0.0) -> Figure:
    """Return one row per bar with its name above it: a bar from zero, or a point, with its interval.

    near_zero: differences up to this size lie in a shaded band.
    """
    height = ROW_HEIGHT * len(bars) + 44
    figure, axes = _new_figure(PLOT_WIDTH, height, (10, 38, 10, 6))
    axes.grid(axis="x")
    axes.axvline(0, color=INK, linewidth=1)
    if near_zero:
        axes.axvspan(-near_zero, near_zero, color=LINE, alpha=0.6, linewidth=0)
    for row, bar in enumerate(bars):
        _draw_bar(axes, bar, -row, filled=filled)
    axes.set_ylim(-len(bars) + 0.35, 0.75)
    _set_span(axes, [x for bar in bars for x in (bar.value, bar.low, bar.high, 0.0, *bar.seeds) if x is not None])
    for row, bar in enumerate(bars):
        # A background of its own keeps grid lines from running through the name.
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        place: Any = {"transform": axes.get_yaxis_transform(), "va": "bottom", "bbox": paper}
        axes.text(0, -row + 0.3, bar.label, fontsize=10, **place)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit)
    axes.tick_params(length=3)
    return figure


def _set_span(axes: Axes, values: Sequence[float]) -> None:
    known = [value for value in values if is_known(value)]
    low, high = min(known), max(known)
    pad = 0.06 * ((high - low) or 1.0)
    axes.set_xlim(low - pad, high + pad)


def _draw_bar(axes: Axes, bar: Bar, y: float, *, filled: bool) -> None:
    colour = arm_colour(bar.place)
    if bar.value is None or not is_known(bar.value):
        axes.text(0, y, "not measured", color=MUTED, fontsize=9.5, va="center")
        return
    if filled:
        axes.barh(y, bar.value, height=0.36, color=colour, alpha=0.55, linewidth=0)
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
    if not filled:
        axes.plot([bar.value], [y], marker=MARKERS[bar.place % len(MARKERS)], color=colour, markersize=6)
    known = [value for value in bar.seeds if value is not None]
    if known:
        axes.plot(known, [y - 0.02] * len(known), "|", color=INK, markersize=7, markeredgewidth=1)


def draw_sparkline(lines: Sequence[Line], *, bounds: tuple[float, float], top: float) -> Figure:
    """Return curves as small as a word, from 0 to `top`; the head of their column names the axes."""
    figure, axes = _new_figure(104, 45, (3, 3, 3, 3))
    for line in lines:
        _draw_line(axes, line, size=2)
    axes.set_xlim(*bounds)
    axes.set_ylim(-0.04 * top, 1.04 * top)
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.axhline(top, color=LINE, linewidth=0.8)
    axes.set_axis_off()
    return figure


def draw_swatch(place: int) -> Figure:
    """Return the line and marker of an arm, for legends and tables."""
    figure, axes = _new_figure(24, 12, (0, 0, 0, 0))
    _draw_line(axes, Line(place, [0, 1], [0.5, 0.5], marked=False), size=5)
    _draw_line(axes, Line(place, [0.5], [0.5]), size=5.5)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
    return figure
