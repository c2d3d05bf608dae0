"""Scores of a comparison: curves, means, the headline, paired differences in plain sentences, and flatness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manyicl.comparison.arms import ARMS, ArmName
from manyicl.comparison.findings import ROLES, AskedAs, Findings, mean_known, one_number, pooled_json
from manyicl.comparison.pooling import Pooled
from manyicl.evaluation import FILL, Shots, tell_asked_with, tell_shot_count
from manyicl.intervals import MIN_SEEDS

# A gain from more shots below one point is called flat, however sure.
FLAT_GAIN = 0.01


def list_curves(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield every arm's score of every task at every number of shots, over all seeds."""
    sums = ("num_scored", "num_unfit", "num_cut")
    for arm, seeds in findings.tests.items():
        for task in [task for role in findings.tasks for task in findings.tasks_of(arm, role)]:
            curves = [{c["shots"]: c for c in asked.entries[task]["curve"]} for asked in seeds if asked]
            for shots in findings.comparison.shots:
                cells = [curve[shots] for curve in curves if shots in curve]
                scored = [cell for cell in cells if cell["score"] is not None]
                pooled = findings.pool(arm, {task: shots})
                if not cells:
                    continue
                values = pooled_json(pooled) if pooled else {"score": None, "low": None, "high": None, "seeds": []}
                yield {
                    "arm": arm,
                    "task": task,
                    "shots": shots,
                    "mean_shots": mean_known([cell["mean_shots"] for cell in scored]) if shots == FILL else shots,
                    **values,
                    "other_scores": _mean_others(scored),
                    "nll": mean_known([cell["nll"] for cell in scored]),
                    "majority_score": mean_known([cell["majority_score"] for cell in scored]),
                    "chance_score": mean_known([cell.get("chance_score") for cell in scored]),
                    **{name: sum(cell[name] for cell in cells) for name in sums},
                    **{
                        name: sum(draw[name] for cell in scored for draw in cell["draws"])
                        for name in ("num_copies", "num_near_copies")
                    },
                    "extrapolated": any(cell["extrapolated"] for cell in cells),
                    "worst_draw": min((c["worst_draw"] for c in scored if c["worst_draw"] is not None), default=None),
                    "best_draw": max((c["best_draw"] for c in scored if c["best_draw"] is not None), default=None),
                }


def _mean_others(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return metric -> its mean over seeds, of the metrics beside the main one that every seed's cell has."""
    others: list[Mapping[str, float]] = [cell.get("other_scores", {}) for cell in cells]
    shared = [metric for metric in (others[0] if others else ()) if all(metric in scores for scores in others)]
    return {metric: sum(scores[metric] for scores in others) / len(others) for metric in shared}


def list_means(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield every arm's mean score of a role's tasks, of all and by family, at every number of shots."""
    tasks = findings.comparison.tasks
    for arm in findings.tests:
        for role in ROLES:
            mine = findings.tasks_of(arm, role)
            families: list[str | None] = [None, *sorted({tasks[task].family for task in mine})]
            for family in families:
                chosen = [task for task in mine if family in (None, tasks[task].family)]
                for shots in findings.comparison.shots:
                    pooled = findings.pool(arm, findings.shots_as(shots, arm, chosen))
                    if pooled is None:
                        continue
                    cells = [
                        cell
                        for asked in findings.tests[arm]
                        for task in findings.shots_as(shots, arm, chosen)
                        for cell in (asked.entries[task]["curve"] if asked else [])
                        if cell["shots"] == shots and cell["score"] is not None
                    ]
                    yield {
                        "arm": arm,
                        "role": role,
                        "family": family,
                        "shots": shots,
                        **pooled_json(pooled),
                        "tasks": pooled.num_tasks,
                        "majority_score": mean_known([cell["majority_score"] for cell in cells]),
                        "chance_score": mean_known([cell.get("chance_score") for cell in cells]),
                        "extrapolated": any(cell["extrapolated"] for cell in cells),
                    }


ShotsByTask = dict[str, Shots]
HEADLINE: tuple[AskedAs, ...] = ("chosen", "zero", "most")


def list_headline(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield the headline: every arm with each task's chosen shots, with none and with each one's most; who is best."""
    for role in ROLES:
        for asked in HEADLINE:
            rows: list[tuple[ArmName, ShotsByTask, Pooled]] = []
            for arm in findings.tests:
                mine = findings.tasks_of(arm, role)
                if len(mine) < len(findings.tasks[role]):
                    continue  # a dedicated arm without a model for every task
                shots = findings.shots_as(asked, arm, mine)
                pooled = findings.pool(arm, shots)
                if pooled is not None:
                    rows.append((arm, shots, pooled))
            for arm, shots, pooled in rows:
                others = [(name, k) for name, k, _ in rows if name != arm]
                best = bool(others) and all(_is_better(findings, (arm, shots), other) for other in others)
                yield {
                    "arm": arm,
                    "role": role,
                    "asked": asked,
                    "shots": one_number(shots.values()),
                    "shots_by_task": shots,
                    "tasks": pooled.num_tasks,
                    **pooled_json(pooled),
                    "best": best,
                }


def _is_better(findings: Findings, one: tuple[ArmName, ShotsByTask], other: tuple[ArmName, ShotsByTask]) -> bool:
    """Return whether an arm beats another surely, over enough seeds to say so."""
    pooled = findings.differ(one[0], other[0], pair_shots(one[1], other[1]))
    enough = pooled is not None and sum(seed is not None for seed in pooled.seeds) >= MIN_SEEDS
    return pooled is not None and enough and pooled.mean > 0 and pooled.excludes_zero


def pair_shots(a: ShotsByTask, b: ShotsByTask) -> dict[str, tuple[Shots, Shots]]:
    """Return task -> (shots of a, shots of b) for the tasks that both were asked."""
    return {task: (shots, b[task]) for task, shots in a.items() if task in b}


def list_differences(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield ManyICL less every other arm (else the first trained arm less the others)."""
    arms = list(findings.tests)
    focus: ArmName = "manyicl" if "manyicl" in arms else next((arm for arm in arms if ARMS[arm].trained), arms[0])
    for role in ROLES:
        for other in [arm for arm in arms if arm != focus]:
            tasks = findings.shared_tasks(focus, other, role)
            for asked in (*HEADLINE, *findings.comparison.shots):
                a, b = (findings.shots_as(asked, arm, tasks) for arm in (focus, other))
                pairs = pair_shots(a, b)
                pooled = findings.differ(focus, other, pairs)
                if pooled is None:
                    continue
                how = asked if asked in HEADLINE else "each"
                told = [_tell_how(how, [pair[place] for pair in pairs.values()]) for place in (0, 1)]
                yield {
                    "role": role,
                    "tasks": pooled.num_tasks,
                    "a": focus,
                    "b": other,
                    "asked": how,
                    "shots_a": one_number(k for k, _ in pairs.values()),
                    "shots_b": one_number(k for _, k in pairs.values()),
                    "shots_by_task": {task: list(pair) for task, pair in pairs.items()},
                    **pooled_json(pooled, mean="difference"),
                    "sentence": tell_difference(pooled, (focus, told[0]), (other, told[1]), role=role),
                }


def _tell_how(asked: str, shots: Sequence[Shots]) -> str:
    """Return how tasks were asked: "at 4 shots", "at each task's most shots"."""
    shared = one_number(shots)
    return f"at each task's {asked} shots" if shared is None else tell_asked_with(shared)


def _tell_end(asked: str, shots: Sequence[Shots]) -> str:
    """Return an end of a curve: "4 shots", "each task's most shots"."""
    shared = one_number(shots)
    return f"each task's {asked} shots" if shared is None else tell_shot_count(shared)


def tell_difference(pooled: Pooled, a: tuple[ArmName, str], b: tuple[ArmName, str], *, role: str) -> str:
    """Return a paired difference as a plain sentence, in points of a hundred.

    a, b: each arm and how it was asked, such as "at 4 shots".
    """
    one, other = (f"{ARMS[arm].title} {how}" for arm, how in (a, b))
    what = f"on {pooled.num_tasks} {role} {'task' if pooled.num_tasks == 1 else 'tasks'}"
    points = f"{100 * abs(pooled.mean):.1f} points"
    if pooled.low is None or pooled.high is None:
        return f"{one} and {other} are {points} apart {what}; a single value tells no difference"
    interval = f"[{100 * pooled.low:+.1f}, {100 * pooled.high:+.1f}]"
    known = sum(seed is not None for seed in pooled.seeds)
    scope = f"over {known} seeds" if known >= MIN_SEEDS else f"for {'this run' if known == 1 else 'these runs'}"
    if not pooled.excludes_zero:
        return (
            f"No difference can be told between {one} and {other} {what}: {100 * pooled.mean:+.1f} {interval}, {scope}"
        )
    if pooled.mean > 0:
        return f"{one} is better than {other} by {points} {interval} {what}, {scope}"
    turned = f"[{-100 * pooled.high:+.1f}, {-100 * pooled.low:+.1f}]"
    return f"{other} is better than {one} by {points} {turned} {what}, {scope}"


def list_flatness(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield what each arm gains from the fewest shots that show the format to the most, each task from its own to its
    own; a task that allows only one number of shots takes no part."""
    for arm in findings.tests:
        for role in ROLES:
            ends = _flat_ends(findings, findings.tasks_of(arm, role))
            pooled = findings.differ(arm, arm, ends)
            if pooled is None:
                continue
            lasts, firsts = ([pair[place] for pair in ends.values()] for place in (0, 1))
            flat = not (pooled.excludes_zero and abs(pooled.mean) >= FLAT_GAIN)
            rise = "rises" if pooled.mean > 0 else "falls"
            told = f"{rise} by {100 * abs(pooled.mean):.1f} points"
            if abs(pooled.mean) < FLAT_GAIN:
                told = f"is flat ({100 * pooled.mean:+.1f} points)"
            elif flat:
                told = f"{rise} by {100 * abs(pooled.mean):.1f} points, which may be chance,"
            yield {
                "arm": arm,
                "role": role,
                "tasks": pooled.num_tasks,
                "from_shots": one_number(firsts),
                "to_shots": one_number(lasts),
                **pooled_json(pooled, mean="difference"),
                "flat": flat,
                "sentence": f"{ARMS[arm].title}: the score on {role} tasks {told} from {_tell_end('fewest', firsts)}"
                f" to {_tell_end('most', lasts)}.",
            }


def _flat_ends(findings: Findings, tasks: Sequence[str]) -> dict[str, tuple[Shots, Shots]]:
    """Return task -> (its most shots, its fewest above none), of the tasks where these are different numbers."""
    ends: dict[str, tuple[Shots, Shots]] = {}
    for task in tasks:
        shots = [k for k in findings.asked_by_task.get(task, []) if k == FILL or k > 0]
        if len(shots) > 1 and findings.num_shots(task, shots[-1]) > findings.num_shots(task, shots[0]):
            ends[task] = shots[-1], shots[0]
    return ends
