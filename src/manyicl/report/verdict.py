"""The verdict and what stands below it: sentences made from paired differences, and no stronger than they are."""

from __future__ import annotations

from dataclasses import dataclass

from manyicl.report.comparison import Comparison, GridCell, PairDifference, Role
from manyicl.report.numbers import (
    count_noun,
    is_known,
    join_words,
    tell_bits,
    tell_interval,
    tell_percent,
    tell_points,
)

METHOD = "manyicl"
WORK = {
    "train": "training",
    "validation": "validation",
    "test": "test answers",
    "text": "plain text",
    "flip": "exchanged labels",
    "order": "orders of the shots",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """How one arm stands to another: points [low, high], and whether a difference can be told."""

    other: str
    points: float
    low: float | None
    high: float | None
    tasks: int

    @property
    def told(self) -> int:
        """1 where the interval lies above zero, -1 below, 0 where it holds zero or there is none."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def method_arm(comparison: Comparison) -> str | None:
    """Return the arm that the verdict is about: ManyICL, or else the one that scores most of those trained alike."""
    if METHOD in comparison.place:
        return METHOD
    role = main_role(comparison)
    scores = {
        cell.arm: cell.score
        for cell in comparison.headline
        if cell.role == role and cell.asked == "chosen" and cell.score is not None
    }
    fair = [arm.arm for arm in comparison.arms if arm.matched and arm.arm in scores]
    return max(fair, key=lambda arm: scores[arm] or 0.0, default=None)


def main_role(comparison: Comparison) -> Role:
    """Return the role that decides: held-out tasks, where there are any."""
    return comparison.roles[-1] if comparison.roles else "trained"


def standings(comparison: Comparison, arm: str, role: str, *, asked: str = "chosen") -> list[Standing]:
    """Return how `arm` stands to every other on the tasks of a role, in the order of the arms."""
    found = {}
    for pair in comparison.differences:
        if (pair.role, pair.asked) == (role, asked) and arm in (pair.a, pair.b) and is_known(pair.difference):
            standing = _orient(pair, arm)
            found[standing.other] = standing
    return [found[other] for other in comparison.place if other in found]


def _orient(pair: PairDifference, arm: str) -> Standing:
    points = pair.difference or 0.0
    if pair.a == arm:
        return Standing(pair.b, points, pair.low, pair.high, pair.tasks)
    low, high = (None if pair.high is None else -pair.high), (None if pair.low is None else -pair.low)
    return Standing(pair.a, -points, low, high, pair.tasks)


def tell_verdict(comparison: Comparison) -> str:
    """Return the one sentence that a reader should take away."""
    arm = method_arm(comparison)
    role = main_role(comparison)
    found = standings(comparison, arm, role) if arm else []
    if arm is None or not found:
        return "Nothing can be told yet: no two arms have answered the same queries."
    title = comparison.title_of(arm)
    where = f"{count_noun(max(one.tasks for one in found), f'{role} task')}"
    start = "" if comparison.finished else "So far, and unfinished: "
    if comparison.few_seeds:
        start += f"{'for' if start else 'For'} these runs ({count_noun(len(comparison.seeds), 'seed')}), "
    untold = [comparison.title_of(one.other) for one in found if one.told == 0]
    parts = [
        f"{word} than {join_words([comparison.title_of(one.other) for one in those])}, {_tell_span(those)}"
        for word, sign in (("better", 1), ("worse", -1))
        for those in [[one for one in found if one.told == sign]]
        if those
    ]
    if not parts:
        what = f"no difference between {title} and {join_words(untold, last='or')} can be told on {where}."
        return start + what if start else what[0].upper() + what[1:]
    rest = f"; no difference from {join_words(untold, last='or')} can be told" if untold else ""
    return f"{start}{title} answers {where} {', but '.join(parts)}{rest}."


def _tell_span(those: list[Standing]) -> str:
    """Return by how much, from the smallest difference to the largest."""
    sizes = sorted((f"{100 * abs(one.points):.1f}" for one in those), key=float)
    return f"by {sizes[0]} points" if sizes[0] == sizes[-1] else f"by {sizes[0]} to {sizes[-1]} points"


def key_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what stands below the verdict: (what it is about, a sentence)."""
    arm = method_arm(comparison)
    if arm is None:
        return []
    facts = []
    for role in reversed(comparison.roles):
        sentence = _tell_role(comparison, arm, role)
        if sentence:
            facts.append((f"{role} tasks".capitalize(), sentence))
    for flat in comparison.flatness:
        if (flat.arm, flat.role) == (arm, main_role(comparison)) and flat.sentence:
            facts.append(("More shots", flat.sentence))
    sentence = _tell_forgetting(comparison)
    if sentence:
        facts.append(("Forgetting", sentence))
    return facts


def _tell_role(comparison: Comparison, arm: str, role: str) -> str:
    cell = comparison.headline_cell(arm, role, "chosen")
    if cell is None or not is_known(cell.score):
        return ""
    shots = "" if cell.shots is None else f" with {count_noun(cell.shots, 'shot')}"
    told = [
        f"{comparison.title_of(one.other)} {tell_points(one.points)}"
        f" {tell_interval(one.low, one.high, unit='points')}".rstrip()
        for one in standings(comparison, arm, role)
    ]
    against = f"; points above {', '.join(told)}" if told else ""
    return f"{comparison.title_of(arm)} {tell_percent(cell.score)} %{shots}{against}."


def _tell_forgetting(comparison: Comparison) -> str:
    """Return how much worse each arm predicts the first neutral text than the base did."""
    changes = comparison.forgetting.text
    first = next((change.file for change in changes if is_known(change.difference)), None)
    told = [
        f"{comparison.title_of(change.arm)} {tell_bits(change.difference, signed=True)}"
        for change in changes
        if change.file == first and is_known(change.difference)
    ]
    return f"Bits per byte lost on {first}: {', '.join(told)}." if told else ""


def tell_missing(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what is missing of an unfinished comparison, in words: (arm and seed, what)."""
    missing: dict[tuple[str, int], list[GridCell]] = {}
    for cell in comparison.grid:
        if cell.done < cell.total:
            missing.setdefault((cell.arm, cell.seed), []).append(cell)
    return [
        (f"{comparison.title_of(arm)}, seed {seed}", "; ".join(_tell_cell(cell) for cell in cells))
        for (arm, seed), cells in missing.items()
    ]


def _tell_cell(cell: GridCell) -> str:
    work = WORK.get(cell.what, cell.what)
    if cell.done == 0:
        return f"{work} not begun ({count_noun(cell.total, 'cell')})"
    return f"{work} {cell.done:,} of {cell.total:,} done"


def tell_progress(comparison: Comparison) -> str:
    """Return how far the whole comparison is."""
    done, total = (sum(getattr(cell, key) for cell in comparison.grid) for key in ("done", "total"))
    return f"{done:,} of {count_noun(total, 'cell')} done"
