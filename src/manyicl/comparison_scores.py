"""Scores of a comparison: curves, means, the headline, paired differences in plain sentences, and flatness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manyicl.arms import ARMS, ArmName
from manyicl.findings import ROLES, Findings, mean_known, pooled_json
from manyicl.intervals import MIN_SEEDS
from manyicl.pooling import Pooled

# A gain from more shots below one point is called flat, however sure.
FLAT_GAIN = 0.01


def list_curves(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield every arm's score of every task at every number of shots, over all seeds."""
    sums = ("num_scored", "num_unfit", "num_cut")
    for arm, seeds in findings.tests.items():
        for task in [task for role in findings.tasks for task in findings.tasks_of(arm, role)]:
            curves = [{c["shots"]: c for c in asked.entries[task]["curve"]} for asked in seeds if asked]
            for shots in findings.settings.shots:
                cells = [curve[shots] for curve in curves if shots in curve]
                scored = [cell for cell in cells if cell["score"] is not None]
                pooled = findings.pool(arm, [task], shots)
                if not cells:
                    continue
                values = pooled_json(pooled) if pooled else {"score": None, "low": None, "high": None, "seeds": []}
                yield {
                    "arm": arm,
                    "task": task,
                    "shots": shots,
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
                for shots in findings.settings.shots:
                    pooled = findings.pool(arm, chosen, shots)
                    if pooled is None:
                        continue
                    cells = [
                        cell
                        for asked in findings.tests[arm]
                        for task in (chosen if asked else [])
                        for cell in asked.entries[task]["curve"]  # type: ignore[union-attr]
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


def list_headline(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield the headline: every arm with its chosen shots, with none and with the most, and who is best."""
    for role in ROLES:
        for asked in ("chosen", "zero", "most"):
            rows: list[tuple[ArmName, int, Pooled]] = []
            for arm in findings.tests:
                shots = findings.shots_as(asked, arm, role)
                mine = findings.tasks_of(arm, role)
                if shots is None or len(mine) < len(findings.tasks[role]):
                    continue  # a dedicated arm without a model for every task
                pooled = findings.pool(arm, mine, shots)
                if pooled is not None:
                    rows.append((arm, shots, pooled))
            for arm, shots, pooled in rows:
                others = [(name, k) for name, k, _ in rows if name != arm]
                best = bool(others) and all(_is_better(findings, (arm, shots), other, role=role) for other in others)
                yield {"arm": arm, "role": role, "asked": asked, "shots": shots, **pooled_json(pooled), "best": best}


def _is_better(findings: Findings, one: tuple[ArmName, int], other: tuple[ArmName, int], *, role: str) -> bool:
    """Return whether an arm beats another surely, over enough seeds to say so."""
    pooled, _ = findings.differ(one[0], other[0], role, (one[1], other[1]))
    enough = pooled is not None and sum(seed is not None for seed in pooled.seeds) >= MIN_SEEDS
    return pooled is not None and enough and pooled.mean > 0 and pooled.excludes_zero


def list_differences(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield ManyICL less every other arm (else the first trained arm less the others)."""
    arms = list(findings.tests)
    focus: ArmName = "manyicl" if "manyicl" in arms else next((arm for arm in arms if ARMS[arm].trained), arms[0])
    for role in ROLES:
        for other in [arm for arm in arms if arm != focus]:
            columns: list[tuple[str, int, int]] = []
            for asked in ("chosen", "zero", "most"):
                a, b = (findings.shots_as(asked, arm, role) for arm in (focus, other))
                columns += [(asked, a, b)] if a is not None and b is not None else []
            columns += [("each", k, k) for k in findings.asked_shots(role)]
            for asked, a, b in columns:
                pooled, num_tasks = findings.differ(focus, other, role, (a, b))
                if pooled is not None:
                    yield {
                        "role": role,
                        "tasks": num_tasks,
                        "a": focus,
                        "b": other,
                        "asked": asked,
                        "shots_a": a,
                        "shots_b": b,
                        **pooled_json(pooled, mean="difference"),
                        "sentence": tell_difference(pooled, (focus, a), (other, b), role=role),
                    }


def tell_difference(pooled: Pooled, a: tuple[ArmName, int], b: tuple[ArmName, int], *, role: str) -> str:
    """Return a paired difference as a plain sentence, in points of a hundred."""
    one, other = (f"{ARMS[arm].title} at {_shots(k)}" for arm, k in (a, b))
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


def _shots(count: int) -> str:
    return f"{count} shot" if count == 1 else f"{count} shots"


def list_flatness(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield what each arm gains from the fewest shots that show the format to the most."""
    for arm in findings.tests:
        for role in ROLES:
            shots = [k for k in findings.asked_shots(role) if k > 0]
            if len(shots) < 2 or not findings.tasks_of(arm, role):
                continue
            first, last = shots[0], shots[-1]
            pooled, num_tasks = findings.differ(arm, arm, role, (last, first))
            if pooled is None:
                continue
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
                "tasks": num_tasks,
                "from_shots": first,
                "to_shots": last,
                **pooled_json(pooled, mean="difference"),
                "flat": flat,
                "sentence": f"{ARMS[arm].title}: the score on {role} tasks {told} from {_shots(first)} to"
                f" {_shots(last)}.",
            }
