"""What a task's own examples say about the answers to come: a curve, suspects, duplicates and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from manyicl.console import deciding_digits, tell_signed
from manyicl.intervals import Interval, Table, difference_interval, score_interval
from manyicl.service.library import ServedExample
from manyicl.tasks import find_copies

State = Literal["waiting", "running", "done", "failed", "off"]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The score after one number of shots."""

    shots: int
    score: float
    """Mean of the task's metric, from 0 to 1."""
    low: float | None
    """Lower end of its 95 % interval; None if one answer gives none."""
    high: float | None
    """Upper end; None if `low` is."""
    num_scored: int
    """Examples that were answered after so many others."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """An example whose given answer the model thinks wrong after many shots of the task."""

    example_id: int
    input: str
    answer: str
    """The given one."""
    likelier: str
    """The model's."""
    nats_gap: float
    """How much likelier: 3 nats are 20 to 1."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Examples with nearly the same input: a score looks better than it is if the answer can be copied."""

    num_examples: int = 0
    """Examples that have a near copy among the others."""
    pairs: tuple[tuple[int, int], ...] = ()
    """The first of them, as pairs of ids."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """How well the model answers a task, found out from the examples alone."""

    state: State
    fraction: float = 0.0
    """How much of it is done."""
    curve: tuple[CurvePoint, ...] = ()
    majority: float | None = None
    """The score of always giving the commonest answer."""
    chance: float | None = None
    """The score of a die; None for open answers."""
    suspects: tuple[Suspect, ...] = ()
    """The most doubtful first."""
    duplicates: Duplicates = Duplicates()
    sentence: str = ""
    """What to expect, and whether more examples would help."""
    slope: float | None = None
    """What the last doublings of the number of shots added to the score, per doubling."""
    slope_low: float | None = None
    """Lower end of its 95 % interval."""
    slope_high: float | None = None
    """Upper end."""
    seconds: float | None = None
    """Time that it took, requests aside; None until it is done."""
    version: int = 0
    """The version of the task that was measured."""


# Fewer examples than this give no curve.
FEWEST_EXAMPLES = 8
# A given answer is suspect if another one is so much likelier: 20 to 1.
SUSPECT_NATS = 3.0
MOST_SUSPECTS = 50
_MOST_PAIRS = 100
# Below this a doubling changes nothing that anybody would notice.
_SMALL = 0.01

Scores = Mapping[int, Mapping[int, float]]  # shots -> index of an example -> its score


@dataclass(frozen=True, slots=True)
class Doubt:
    """How an example's given answer fares beside the likeliest other one."""

    index: int
    likelier: str
    nats_gap: float
    """Nats by which the other one is likelier; negative if the given one is."""


def make_points(scores: Scores, *, task: str) -> tuple[CurvePoint, ...]:
    """Return the points of a curve, by the number of shots. The interval is over examples, one answer each."""
    points = []
    for shots, by_index in sorted(scores.items()):
        if not by_index:
            continue
        names = tuple(map(str, by_index))
        interval = score_interval([{task: Table(np.array([list(by_index.values())]), names)}])
        points.append(CurvePoint(shots, interval.mean, *interval.ends, num_scored=len(names)))
    return tuple(points)


def find_slope(scores: Scores, *, task: str) -> Interval | None:
    """Return the score that a doubling of the shots adds at the end of the curve, with its 95 % interval.

    It compares the most shots with a quarter of them, on the examples that were answered after both, so that hard
    examples count on both sides. None if there are no such points.
    """
    known = sorted(shots for shots, by_index in scores.items() if by_index)
    if not known or known[-1] < 2:
        return None
    most = known[-1]
    before = [shots for shots in known if 0 < shots <= most / 3]
    if not before:
        return None
    common = sorted(scores[most].keys() & scores[before[-1]].keys())
    if len(common) < 2:
        return None
    doublings = math.log2(most / before[-1])
    gains = np.array([[scores[most][index] - scores[before[-1]][index] for index in common]])
    gain = difference_interval([{task: Table(gains, tuple(map(str, common)))}])
    return Interval(gain.mean / doublings, gain.low / doublings, gain.high / doublings)


def find_suspects(
    doubts: Sequence[Doubt], examples: Sequence[ServedExample], *, last: CurvePoint | None, majority: float | None
) -> tuple[Suspect, ...]:
    """Return the examples whose given answer is much less likely than another, the most doubtful first.

    None if the model does no better than the commonest answer: it then knows too little to doubt anybody.
    """
    if last is None or last.low is None or (majority is not None and last.low <= majority):
        return ()
    found = sorted((doubt for doubt in doubts if doubt.nats_gap >= SUSPECT_NATS), key=lambda doubt: -doubt.nats_gap)
    return tuple(
        Suspect(
            examples[one.index].id, examples[one.index].input, examples[one.index].answer, one.likelier, one.nats_gap
        )
        for one in found[:MOST_SUSPECTS]
    )


def find_duplicates(examples: Sequence[ServedExample]) -> Duplicates:
    """Return which examples have nearly the same input as others."""
    inputs = [example.input for example in examples]
    pairs, has_copy = [], set()
    for one, copies in enumerate(find_copies(inputs, shots=inputs)):
        for other in sorted({*copies.exact, *copies.near} - {one}):
            has_copy.add(one)
            if one < other:
                pairs.append((examples[one].id, examples[other].id))
    return Duplicates(len(has_copy), tuple(pairs[:_MOST_PAIRS]))


def write_sentence(
    points: Sequence[CurvePoint],
    slope: Interval | None,
    *,
    majority: float | None,
    majority_answer: str,
    num_examples: int,
    num_shown: int,
    duplicates: Duplicates,
) -> str:
    """Return what to expect, and whether more examples would help, no stronger than the intervals.

    num_shown: how many shots an input gets.
    """
    if not points:
        return (
            f"{num_examples:,} examples are too few to measure anything; add some until there are"
            f" {FEWEST_EXAMPLES} or more."
        )
    last = points[-1]
    sentences = [f"After {last.shots:,} shots expect a score of {_percent(last.score)}{_range(last.low, last.high)}."]
    if majority is not None and last.low is not None:
        commonest = f"always answering '{majority_answer[:40]}', which scores {_percent(majority)}"
        if last.low > majority:
            sentences.append(f"That is better than {commonest}.")
        elif last.high is not None and last.high < majority:
            sentences.append(f"That is worse than {commonest}: the model has not learned this task from its examples.")
        else:
            sentences.append(f"That is not clearly better than {commonest}.")
    sentences.append(_tell_slope(slope, num_examples=num_examples, num_shown=num_shown))
    if duplicates.num_examples > 0.02 * num_examples:
        sentences.append(
            f"{duplicates.num_examples:,} of {num_examples:,} examples have a near copy among the others, which makes"
            " the score look better than it is for new inputs."
        )
    return " ".join(sentences)


def _tell_slope(slope: Interval | None, *, num_examples: int, num_shown: int) -> str:
    if slope is None or math.isnan(slope.low):
        return "There are too few examples to say whether more would help."
    digits = deciding_digits(100 * slope.low, 100 * slope.high)
    low, middle, high = (tell_signed(100 * value, digits=digits) for value in (slope.low, slope.mean, slope.high))
    change = f"{low} to {high} points"
    is_full = num_shown < num_examples - 1
    if slope.low > 0:
        gain = f"the last doublings of the shots added {middle} points each ({change})"
        if is_full:
            return (
                f"More shots would help: {gain}, but an input is shown {num_shown:,} of {num_examples:,} examples; try"
                " the policy 'nearest', or a higher limit of shots."
            )
        return f"More examples would help: {gain}."
    if slope.high < _SMALL:
        return f"More examples would hardly help: a doubling of the shots changes the score by {change}."
    return f"Whether more examples would help is not clear: a doubling of the shots changes the score by {change}."


def _percent(score: float) -> str:
    return f"{100 * score:.0f} %"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def to_content(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as the library keeps it."""
    return asdict(measurement)


def from_content(content: Mapping[str, Any]) -> Measurement:
    """Return a measurement that `to_content` wrote."""
    found = content["duplicates"]
    return Measurement(
        **{
            **content,
            "curve": tuple(CurvePoint(**point) for point in content["curve"]),
            "suspects": tuple(Suspect(**suspect) for suspect in content["suspects"]),
            "duplicates": Duplicates(found["num_examples"], tuple((a, b) for a, b in found["pairs"])),
        }
    )
