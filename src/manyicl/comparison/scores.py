"""The scores of a comparison: curves, means, the headline, paired differences in plain sentences, and flatness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from manyicl.comparison.answers import ROLES, Findings, Pooled, mean_known, shared_shots
from manyicl.comparison.schema import (
    FLAT_GAIN,
    AskedAs,
    CurvePoint,
    Flatness,
    HeadlineScore,
    MeanPoint,
    PairDifference,
    count_seeds,
)
from manyicl.comparison.settings import ARMS, ArmName, Role
from manyicl.console import deciding_digits, tell_estimate, tell_signed, tell_signed_interval
from manyicl.evaluation import FILL, ShotPoint, Shots, tell_asked_with, tell_shot_count
from manyicl.intervals import MIN_SEEDS

ShotsByTask = dict[str, Shots]
HEADLINE: tuple[AskedAs, ...] = ("chosen", "zero", "most")


def list_curves(findings: Findings) -> Iterator[CurvePoint]:
    """Yield every arm's score on every task at every number of shots, over all seeds."""
    for arm, seeds in findings.tests.items():
        for task in [task for role in findings.tasks for task in findings.tasks_of(arm, role)]:
            curves = [{p.shots: p for p in answers.curves[task].points} for answers in seeds if answers]
            for shots in findings.grid.shots:
                points = [curve[shots] for curve in curves if shots in curve]
                if points:
                    yield _pool_points(points, arm, task, shots, pooled=findings.pool(arm, {task: shots}))


def _pool_points(
    points: Sequence[ShotPoint], arm: ArmName, task: str, shots: Shots, *, pooled: Pooled | None
) -> CurvePoint:
    """Return one point of a curve over all seeds.

    points: the same point in the result of each seed. pooled: their scores together.
    """
    scored = [point for point in points if point.score is not None]
    draws = [draw for point in scored for draw in point.draws]
    return CurvePoint(
        arm=arm,
        task=task,
        shots=shots,
        mean_shots=mean_known([point.mean_shots for point in scored]) if shots == FILL else shots,
        **(pooled.as_score if pooled else {}),
        other_scores=_mean_others(scored),
        nll=mean_known([point.nll for point in scored]),
        majority_score=mean_known([point.majority_score for point in scored]),
        chance_score=mean_known([point.chance_score for point in scored]),
        num_scored=sum(point.num_scored for point in points),
        num_unfit=sum(point.num_unfit for point in points),
        num_cut=sum(point.num_cut for point in points),
        num_copies=sum(draw.num_copies for draw in draws),
        num_near_copies=sum(draw.num_near_copies for draw in draws),
        extrapolated=any(point.extrapolated for point in points),
        worst_draw=min((p.worst_draw for p in scored if p.worst_draw is not None), default=None),
        best_draw=max((p.best_draw for p in scored if p.best_draw is not None), default=None),
    )


def _mean_others(points: Sequence[ShotPoint]) -> dict[str, float]:
    """Return metric -> its mean over seeds, of the metrics beside the main one that every seed has."""
    others = [point.other_scores for point in points]
    shared = [metric for metric in (others[0] if others else ()) if all(metric in scores for scores in others)]
    return {metric: sum(scores[metric] for scores in others) / len(others) for metric in shared}


def list_means(findings: Findings) -> Iterator[MeanPoint]:
    """Yield every arm's mean score over a role's tasks, all of them and by family, at every number of shots."""
    tasks = findings.grid.tasks
    for arm in findings.tests:
        for role in ROLES:
            mine = findings.tasks_of(arm, role)
            families: list[str | None] = [None, *sorted({tasks[task].family for task in mine})]
            for family in families:
                chosen = [task for task in mine if family in (None, tasks[task].family)]
                for shots in findings.grid.shots:
                    point = _mean_point(findings, arm, role, family, findings.pick_shots(shots, arm, chosen), shots)
                    if point is not None:
                        yield point


def _mean_point(
    findings: Findings, arm: ArmName, role: Role, family: str | None, by_task: ShotsByTask, shots: Shots
) -> MeanPoint | None:
    """Return one arm's mean over the tasks in `by_task`, all at `shots`; None if it has no score on them."""
    pooled = findings.pool(arm, by_task)
    if pooled is None:
        return None
    points = [
        point
        for answers in findings.tests[arm]
        for task in by_task
        for point in (answers.curves[task].points if answers else ())
        if point.shots == shots and point.score is not None
    ]
    return MeanPoint(
        arm=arm,
        role=role,
        family=family,
        shots=shots,
        **pooled.as_score,
        tasks=pooled.num_tasks,
        majority_score=mean_known([point.majority_score for point in points]),
        chance_score=mean_known([point.chance_score for point in points]),
        extrapolated=any(point.extrapolated for point in points),
    )


def list_headline(findings: Findings) -> Iterator[HeadlineScore]:
    """Yield every arm's score with each task's chosen shots, with none, and with its most; and which arm is best."""
    for role in ROLES:
        for asked in HEADLINE:
            rows: list[tuple[ArmName, ShotsByTask, Pooled]] = []
            for arm in findings.tests:
                mine = findings.tasks_of(arm, role)
                if len(mine) < len(findings.tasks[role]):
                    continue  # a dedicated arm that lacks a model for some task
                shots = findings.pick_shots(asked, arm, mine)
                pooled = findings.pool(arm, shots)
                if pooled is not None:
                    rows.append((arm, shots, pooled))
            for arm, shots, pooled in rows:
                others = [(name, k) for name, k, _ in rows if name != arm]
                yield HeadlineScore(
                    arm=arm,
                    role=role,
                    asked=asked,
                    shots=shared_shots(shots.values()),
                    shots_by_task=shots,
                    tasks=pooled.num_tasks,
                    **pooled.as_score,
                    best=bool(others) and all(_is_better(findings, (arm, shots), other) for other in others),
                )


def _is_better(findings: Findings, one: tuple[ArmName, ShotsByTask], other: tuple[ArmName, ShotsByTask]) -> bool:
    """Return whether an arm beats another: over enough seeds, the paired interval is above zero."""
    pooled = findings.differ(one[0], other[0], pair_shots(one[1], other[1]))
    return pooled is not None and pooled.has_enough_seeds and pooled.mean > 0 and pooled.excludes_zero


def pair_shots(a: ShotsByTask, b: ShotsByTask) -> dict[str, tuple[Shots, Shots]]:
    """Return task -> (shots of a, shots of b) for the tasks that both were asked."""
    return {task: (shots, b[task]) for task, shots in a.items() if task in b}


def list_differences(findings: Findings) -> Iterator[PairDifference]:
    """Yield ManyICL minus every other arm; without ManyICL, the first trained arm minus the others."""
    arms = list(findings.tests)
    focus: ArmName = "manyicl" if "manyicl" in arms else next((arm for arm in arms if ARMS[arm].trained), arms[0])
    for role in ROLES:
        for other in [arm for arm in arms if arm != focus]:
            tasks = findings.shared_tasks(focus, other, role)
            for how in (*HEADLINE, *findings.grid.shots):
                a, b = (findings.pick_shots(how, arm, tasks) for arm in (focus, other))
                pairs = pair_shots(a, b)
                pooled = findings.differ(focus, other, pairs)
                if pooled is None:
                    continue
                pair = PairDifference(
                    role=role,
                    tasks=pooled.num_tasks,
                    a=focus,
                    b=other,
                    asked=str(how) if how in HEADLINE else "each",
                    shots_a=shared_shots(k for k, _ in pairs.values()),
                    shots_b=shared_shots(k for _, k in pairs.values()),
                    shots_by_task=pairs,
                    **pooled.as_difference,
                )
                yield pair.model_copy(update={"sentence": tell_pair(pair, title=_title)})


def tell_pair(pair: PairDifference, *, title: Callable[[str], str], asked: Sequence[str] = ()) -> str:
    """Return a paired difference as a plain sentence, in percentage points; "" if there is none.

    title: arm -> its name for readers. asked: every way of asking that came to these numbers of shots, `pair.asked` if
    none are named.
    """
    if pair.difference is None:
        return ""
    lead, one, other = _tell_asked(pair, title(pair.a), title(pair.b), asked=asked or (pair.asked,))
    tasks = f"on {pair.tasks:,} {pair.role} {'task' if pair.tasks == 1 else 'tasks'}"
    unclear = f"{lead}, no difference between {one} and {other} can be shown {tasks}"
    points, low, high = (None if value is None else 100 * value for value in (pair.difference, pair.low, pair.high))
    if points is None or low is None or high is None:
        return f"{unclear}: {tell_signed(100 * pair.difference)}, a single value that has no interval."
    num_seeds = count_seeds(pair.seeds)
    few = "for this run" if num_seeds == 1 else "for these runs"
    scope = f"over {num_seeds} seeds" if num_seeds >= MIN_SEEDS else few
    if low <= 0 <= high:
        return f"{unclear}: {tell_estimate(points, low, high)}, {scope}."
    if points < 0:
        one, other, points, low, high = other, one, -points, -high, -low
    size = f"{points:.{deciding_digits(low, high)}f} points {tell_signed_interval(low, high)}"
    return f"{lead}, {one} is better than {other} by {size} {tasks}, {scope}."


def _tell_asked(pair: PairDifference, one: str, other: str, *, asked: Sequence[str]) -> tuple[str, str, str]:
    """Return how both arms were asked, as a sentence begins, and their names, with their shots if these differ."""
    if pair.shots_a != pair.shots_b:
        own = ["each task's own" if shots is None else tell_shot_count(shots) for shots in (pair.shots_a, pair.shots_b)]
        return f"With {pair.asked} shots", f"{one} ({own[0]})", f"{other} ({own[1]})"
    names = {"chosen": "the chosen number", "most": "the most"}
    if pair.shots_a is None:
        lead = f"with each task's {pair.asked} shots"
        names.pop(pair.asked, None)
    else:
        lead = tell_asked_with(pair.shots_a)
    also = " and ".join(name for how, name in names.items() if how in asked)
    return f"{lead[0].upper()}{lead[1:]}{also and f' ({also})'}", one, other


def list_flatness(findings: Findings) -> Iterator[Flatness]:
    """Yield what each arm gains from the fewest shots that show the format (at least one) to the most.

    Each task goes from its own fewest to its own most; a task that allows only one number of shots takes no part.
    """
    for arm in findings.tests:
        for role in ROLES:
            ends = _flat_ends(findings, findings.tasks_of(arm, role))
            pooled = findings.differ(arm, arm, ends)
            if pooled is None:
                continue
            lasts, firsts = ([pair[place] for pair in ends.values()] for place in (0, 1))
            flat = Flatness(
                arm=arm,
                role=role,
                tasks=pooled.num_tasks,
                from_shots=shared_shots(firsts),
                to_shots=shared_shots(lasts),
                **pooled.as_difference,
                flat=abs(pooled.mean) < FLAT_GAIN or not pooled.excludes_zero,
            )
            yield flat.model_copy(update={"sentence": tell_flatness(flat, title=_title)})


def tell_flatness(flat: Flatness, *, title: Callable[[str], str]) -> str:
    """Return what more shots change as a plain sentence, in percentage points; "" if it was not measured.

    title: arm -> its name for readers.
    """
    if flat.difference is None:
        return ""
    points, digits, interval = 100 * flat.difference, 1, ""
    if flat.low is not None and flat.high is not None:
        digits = deciding_digits(100 * flat.low, 100 * flat.high)
        interval = f" {tell_signed_interval(100 * flat.low, 100 * flat.high)}"
    change = f"{'rises' if points > 0 else 'falls'} by {abs(points):.{digits}f} points{interval}"
    if abs(flat.difference) < FLAT_GAIN:
        change = f"is flat ({tell_signed(points, digits=digits)} points{interval})"
    elif flat.flat:
        change += ", which may be chance,"
    start, end = (
        f"each task's {how} shots" if shots is None else tell_shot_count(shots)
        for how, shots in (("fewest", flat.from_shots), ("most", flat.to_shots))
    )
    return f"The score of {title(flat.arm)} on {flat.role} tasks {change} from {start} to {end}."


def _title(arm: str) -> str:
    return next(one.title for name, one in ARMS.items() if name == arm)


def _flat_ends(findings: Findings, tasks: Sequence[str]) -> dict[str, tuple[Shots, Shots]]:
    """Return task -> (its most shots, its fewest above none), of the tasks where these are different numbers."""
    ends: dict[str, tuple[Shots, Shots]] = {}
    for task in tasks:
        shots = [k for k in findings.shots_by_task.get(task, []) if k == FILL or k > 0]
        if len(shots) > 1 and findings.num_shots(task, shots[-1]) > findings.num_shots(task, shots[0]):
            ends[task] = shots[-1], shots[0]
    return ends
