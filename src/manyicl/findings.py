"""The finished cells of a comparison, put together: comparison.json (docs/comparison-format.md)."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manyicl.arms import ARMS, Arm, ArmName
from manyicl.cells import Prediction
from manyicl.comparison import Comparison, GridCell, What, mean_by_shots
from manyicl.config import dump_config
from manyicl.files import write_atomically
from manyicl.forgetting import ratio_interval
from manyicl.intervals import t_interval
from manyicl.parts import package_versions
from manyicl.pooling import MIN_SEEDS, Pooled, Table, make_pooled, pool_differences, pool_means, tabulate
from manyicl.results import read_result
from manyicl.runs import git_commit
from manyicl.tasks import flip_map
from manyicl.training import MetricsLog

COMPARISON_SCHEMA = 1
COMPARISON_FILE = "comparison.json"
# A gain from more shots below one point is called flat, however sure.
FLAT_GAIN = 0.01
ROLES = ("trained", "held-out")


@dataclass(frozen=True, slots=True)
class Asked:
    """One arm's answers with one seed: the result's task entries by name, its predictions, and their scores."""

    entries: Mapping[str, Mapping[str, Any]]
    predictions: Sequence[Prediction]
    tables: Mapping[str, Mapping[int, Table]]


class Findings:
    """What a comparison has found so far."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.settings = comparison.settings
        self.seeds = self.settings.seeds
        self.tasks = {"trained": comparison.asked_trained, "held-out": comparison.held_out}

    @cached_property
    def tests(self) -> dict[ArmName, list[Asked | None]]:
        """Arm -> its answers to the test rows, a seed each."""
        return self._read("test")

    def _read(self, what: What) -> dict[ArmName, list[Asked | None]]:
        arms = self.comparison.arms
        return {arm.name: [self._read_cells(arm, seed, what) for seed in self.seeds] for arm in arms}

    def _read_cells(self, arm: Arm, seed: int, what: What) -> Asked | None:
        """Return an arm's answers, those of all its models together; None where one is missing."""
        cells = [GridCell(arm.name, seed, what, task) for task in self.comparison.models_of(arm)]
        if not all(self.comparison.is_done(cell) for cell in cells):
            return None
        results = [read_result(self.comparison.place(cell)) for cell in cells]
        predictions = [p for result in results for p in result.predictions]
        entries = {task["task"]: task for result in results for task in result.content["tasks"]}
        return Asked(entries, predictions, tabulate(predictions))

    def tasks_of(self, arm: ArmName, role: str) -> list[str]:
        """Return the tasks of a role that an arm answers."""
        if not ARMS[arm].per_task:
            return self.tasks[role]
        return [task for task in self.tasks[role] if task in self.comparison.dedicated]

    def pool(self, arm: ArmName, tasks: Sequence[str], shots: int) -> Pooled | None:
        """Return an arm's mean score over those of the tasks that were asked with so many shots."""
        seeds: list[list[Table] | None] = []
        for asked in self.tests[arm]:
            tables = [asked.tables[t][shots] for t in tasks if shots in asked.tables.get(t, {})] if asked else []
            seeds.append(tables or None)
        return pool_means(seeds)

    def differ(self, a: ArmName, b: ArmName, role: str, shots: tuple[int, int]) -> tuple[Pooled | None, int]:
        """Return a - b on the tasks that both answer, and how many these are."""
        tasks = [task for task in self.tasks_of(a, role) if task in self.tasks_of(b, role)]
        one, other = ([asked and asked.tables for asked in self.tests[arm]] for arm in (a, b))
        pooled = pool_differences(one, other, tasks=tasks, shots=shots)
        return pooled, pooled.num_tasks if pooled else 0

    @cached_property
    def chosen(self) -> dict[ArmName, tuple[int, list[dict[str, Any]]]]:
        """Arm -> the number of shots it is asked with in the headline, and the validation scores that chose it."""
        found: dict[ArmName, tuple[int, list[dict[str, Any]]]] = {}
        validation = self._read("validation") if self.settings.validation_queries else {}
        for arm in self.comparison.arms:
            asked = [one for one in validation.get(arm.name, []) if one is not None]
            curves = [mean_by_shots(list(one.entries.values())) for one in asked]
            shared = sorted(set.intersection(*map(set, curves))) if curves else []
            scores = [{"shots": k, "score": float(np.mean([c[k][0] for c in curves]))} for k in shared]
            best = max(scores, key=lambda one: (one["score"], -one["shots"]))["shots"] if scores else self._usual_shots(arm)
            found[arm.name] = best, scores
        return found

    def _usual_shots(self, arm: Arm) -> int:
        """Return the shots of an arm that has no validation score: the most that it was trained behind."""
        most = self.trained_shots(arm)
        return max(k for k in self.settings.shots if most is None or k <= most or k == min(self.settings.shots))

    def trained_shots(self, arm: Arm) -> int | None:
        """Return the most shots that an answer was trained behind; None of the base, and where it differs by task."""
        if arm.name in ("zero-shot", "dedicated", "dedicated-free"):
            return 0
        if arm.name == "few-shot":
            return self.settings.few_shot_shots
        if not arm.trained or arm.per_task:
            return None
        notes = [self.comparison.place(GridCell(arm.name, s, "train")) / "model" / "manyicl.json" for s in self.seeds]
        known = [json.loads(note.read_bytes())["trained_shots"] for note in notes if note.is_file()]
        return max((max(shots.values()) for shots in known), default=None)

    def asked_shots(self, role: str) -> list[int]:
        """Return the numbers of shots that every task of a role was asked with, by every arm that has been asked."""
        shared: set[int] | None = None
        for arm, seeds in self.tests.items():
            for asked in seeds:
                for task in self.tasks_of(arm, role) if asked else []:
                    shots = set(asked.tables.get(task, {})) if asked else set()
                    shared = shots if shared is None else shared & shots
        return sorted(shared or ())

    def shots_as(self, asked: str, arm: ArmName, role: str) -> int | None:
        """Return the shots of a headline column: 'chosen', 'zero' or 'most'; None where it was not asked so."""
        shots = self.asked_shots(role)
        wanted = {"chosen": self.chosen[arm][0], "zero": 0, "most": max(shots, default=-1)}[asked]
        return wanted if wanted in shots else None


def collect_findings(comparison: Comparison) -> dict[str, Any]:
    """Return comparison.json of the cells that are done; one that is missing is null or absent, never 0."""
    findings = Findings(comparison)
    grid = list(_grid(comparison))
    return {
        "schema": COMPARISON_SCHEMA,
        "name": comparison.folder.name,
        "finished": all(entry["done"] == entry["total"] for entry in grid),
        "config": dump_config(comparison.config),
        "versions": {"python": platform.python_version(), **package_versions()},
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "seeds": list(findings.seeds),
        "shots": list(comparison.settings.shots),
        "match": comparison.settings.match,
        "arms": [_describe_arm(findings, arm) for arm in comparison.arms],
        "tasks": [_describe_task(comparison, name) for name in comparison.tasks],
        "grid": grid,
        "costs": list(_costs(comparison)),
        "trials": list(_trials(comparison)),
        "chosen": [{"arm": arm, "shots": k, "scores": scores} for arm, (k, scores) in findings.chosen.items()],
        "curves": list(_curves(findings)),
        "means": list(_means(findings)),
        "headline": list(_headline(findings)),
        "differences": list(_differences(findings)),
        "flatness": list(_flatness(findings)),
        "forgetting": _forgetting(findings),
        "shot_losses": list(_shot_losses(comparison)),
        "flips": list(_flips(findings)),
        "orders": list(_orders(findings)),
        "examples": list(_examples(findings)),
    }


def write_findings(comparison: Comparison) -> dict[str, Any]:
    """Write comparison.json, and return it."""
    content = collect_findings(comparison)
    write_atomically(comparison.folder / COMPARISON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def _describe_arm(findings: Findings, arm: Arm) -> dict[str, Any]:
    rates = {plan["learning_rate"] for _, _, plan, _ in _runs_of(findings.comparison, arm)}
    return {
        "arm": arm.name,
        "title": arm.title,
        "trained_shots": findings.trained_shots(arm),
        "learning_rate": rates.pop() if len(rates) == 1 else None,
        "matched": arm.matched,
        "num_models": len(findings.comparison.models_of(arm)),
        "about": arm.about,
    }


def _describe_task(comparison: Comparison, name: str) -> dict[str, Any]:
    task = comparison.tasks[name]
    return {
        "task": name,
        "family": task.family,
        "metric": task.metric,
        "role": "held-out" if name in comparison.held_out else "trained",
        "asked": name in comparison.held_out or name in comparison.asked_trained,
        "dedicated": name in comparison.dedicated and any(arm.per_task for arm in comparison.arms),
        "num_train": len(task.train),
        "num_validation": len(task.validation),
        "num_test": len(task.test),
        "num_labels": len(task.labels) or None,
        "dropped": dict(task.dropped),
        "sha256": task.sha256,
    }


def _grid(comparison: Comparison) -> Iterator[dict[str, Any]]:
    total: Counter[tuple[ArmName, int, What]] = Counter()
    done: Counter[tuple[ArmName, int, What]] = Counter()
    for cell in comparison.cells():
        if cell.rate is None:
            total[cell.arm, cell.seed, cell.what] += 1
            done[cell.arm, cell.seed, cell.what] += comparison.is_done(cell)
    for (arm, seed, what), count in total.items():
        yield {"arm": arm, "seed": seed, "what": what, "done": done[arm, seed, what], "total": count}


def _runs_of(comparison: Comparison, arm: Arm) -> Iterator[tuple[int, Path, dict[str, Any], dict[str, Any]]]:
    """Yield (seed, folder, what its plan spends, its run.json) of every finished run of an arm."""
    for seed in comparison.settings.seeds:
        for task in comparison.models_of(arm) if arm.trained else []:
            cell = GridCell(arm.name, seed, "train", task)
            if comparison.is_done(cell):
                folder = comparison.place(cell)
                plan = json.loads(folder.with_name(f"{folder.name}.plan.json").read_bytes())
                yield seed, folder, plan, json.loads((folder / "run.json").read_bytes())


def _costs(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield what each arm spent with each seed, all its models together, once they are all trained."""
    counts = ("steps", "packs", "episodes", "short_episodes", "answers", "targets", "tokens", "flops")
    for arm in comparison.arms:
        runs = list(_runs_of(comparison, arm))
        for seed in comparison.settings.seeds:
            mine = [(plan, run) for run_seed, _, plan, run in runs if run_seed == seed]
            if len(mine) < len(comparison.models_of(arm)) and arm.trained:
                continue
            walls = [run.get("wall_s") for _, run in mine]
            peaks = [run.get("peak_bytes") for _, run in mine if run.get("peak_bytes")]
            yield {
                "arm": arm.name,
                "seed": seed,
                **{count: sum(plan[count] for plan, _ in mine) for count in counts},
                "wall_s": None if None in walls else sum(walls),
                "peak_bytes": max(peaks, default=None),
            }


def _trials(comparison: Comparison) -> Iterator[dict[str, Any]]:
    rates = comparison.settings.learning_rates
    for arm in [arm for arm in comparison.arms if arm.trained]:
        cells = {
            rate: [GridCell(arm.name, comparison.settings.seeds[0], "validation", t, rate) for t in comparison.models_of(arm)]
            for rate in rates
        }
        done = [rate for rate in rates if all(comparison.is_done(cell) for cell in cells[rate])]
        for rate in done:
            scores = mean_by_shots(comparison.read_validation(arm.name, rate))
            shots, (score, nll) = max(scores.items(), key=lambda item: (item[1][0], -item[1][1]))
            is_chosen = len(done) == len(rates) and comparison.chosen_rate(arm.name) == rate
            yield {
                "arm": arm.name,
                "learning_rate": rate,
                "shots": shots,
                "score": score,
                "nll": nll,
                "chosen": is_chosen,
            }


def _pooled_json(pooled: Pooled, *, mean: str = "score") -> dict[str, Any]:
    low, high = pooled.low, pooled.high
    if mean == "score":  # what a score can be
        low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (low, high))
    return {mean: pooled.mean, "low": low, "high": high, "seeds": list(pooled.seeds)}


def _curves(findings: Findings) -> Iterator[dict[str, Any]]:
    sums = ("num_scored", "num_unfit", "num_cut")
    for arm, seeds in findings.tests.items():
        for task in [task for role in ROLES for task in findings.tasks_of(arm, role)]:
            curves = [{c["shots"]: c for c in asked.entries[task]["curve"]} for asked in seeds if asked]
            for shots in findings.settings.shots:
                cells = [curve[shots] for curve in curves if shots in curve]
                scored = [cell for cell in cells if cell["score"] is not None]
                pooled = findings.pool(arm, [task], shots)
                if not cells:
                    continue
                values = _pooled_json(pooled) if pooled else {"score": None, "low": None, "high": None, "seeds": []}
                yield {
                    "arm": arm,
                    "task": task,
                    "shots": shots,
                    **values,
                    "nll": _mean([cell["nll"] for cell in scored]),
                    "majority_score": _mean([cell["majority_score"] for cell in scored]),
                    **{name: sum(cell[name] for cell in cells) for name in sums},
                    **{
                        name: sum(draw[name] for cell in scored for draw in cell["draws"])
                        for name in ("num_copies", "num_near_copies")
                    },
                    "extrapolated": any(cell["extrapolated"] for cell in cells),
                    "worst_draw": min((c["worst_draw"] for c in scored if c["worst_draw"] is not None), default=None),
                    "best_draw": max((c["best_draw"] for c in scored if c["best_draw"] is not None), default=None),
                }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _means(findings: Findings) -> Iterator[dict[str, Any]]:
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
                        **_pooled_json(pooled),
                        "tasks": pooled.num_tasks,
                        "majority_score": _mean([cell["majority_score"] for cell in cells]),
                        "extrapolated": any(cell["extrapolated"] for cell in cells),
                    }


def _headline(findings: Findings) -> Iterator[dict[str, Any]]:
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
                best = bool(others) and all(
                    _is_better(findings, (arm, shots), other, role=role) for other in others
                )
                yield {"arm": arm, "role": role, "asked": asked, "shots": shots, **_pooled_json(pooled), "best": best}


def _is_better(findings: Findings, one: tuple[ArmName, int], other: tuple[ArmName, int], *, role: str) -> bool:
    """Return whether an arm beats another surely, over enough seeds to say so."""
    pooled, _ = findings.differ(one[0], other[0], role, (one[1], other[1]))
    enough = pooled is not None and sum(seed is not None for seed in pooled.seeds) >= MIN_SEEDS
    return pooled is not None and enough and pooled.mean > 0 and pooled.excludes_zero


def _differences(findings: Findings) -> Iterator[dict[str, Any]]:
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
                        **_pooled_json(pooled, mean="difference"),
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
        return f"No difference can be told between {one} and {other} {what}: {100 * pooled.mean:+.1f} {interval}, {scope}"
    better, worse = (one, other) if pooled.mean > 0 else (other, one)
    return f"{better} is better than {worse} by {points} {interval} {what}, {scope}"


def _shots(count: int) -> str:
    return f"{count} shot" if count == 1 else f"{count} shots"


def _flatness(findings: Findings) -> Iterator[dict[str, Any]]:
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
            told = "is flat" if flat else f"{rise} by {100 * abs(pooled.mean):.1f} points"
            yield {
                "arm": arm,
                "role": role,
                "tasks": num_tasks,
                "from_shots": first,
                "to_shots": last,
                **_pooled_json(pooled, mean="difference"),
                "flat": flat,
                "sentence": f"{ARMS[arm].title}: the score on {role} tasks {told} from {_shots(first)} to {_shots(last)}",
            }


def _forgetting(findings: Findings) -> dict[str, Any]:
    texts = _read_texts(findings.comparison)
    has_bos = any(one["bos"] for cell in texts.values() for one in cell)
    return {
        "window_tokens": findings.settings.text_window_tokens,
        "bos": has_bos,
        "text": list(_forgotten_text(findings, texts)),
        "tasks": list(_forgotten_tasks(findings)),
        "drift": list(_drift(findings.comparison, texts)),
    }


def _read_texts(comparison: Comparison) -> dict[tuple[ArmName, int], list[dict[str, Any]]]:
    """Return (arm, seed) -> what its windows of each text file cost."""
    cells = [cell for cell in comparison.cells() if cell.what == "text" and comparison.is_done(cell)]
    return {(cell.arm, cell.seed): json.loads(comparison.place(cell).read_bytes())["texts"] for cell in cells}


def _forgotten_text(
    findings: Findings, texts: Mapping[tuple[ArmName, int], Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for arm in [arm.name for arm in findings.comparison.arms if arm.trained and not arm.per_task]:
        pairs = {s: (texts["base", s], texts[arm, s]) for s in findings.seeds if {("base", s), (arm, s)} <= set(texts)}
        if not pairs:
            continue
        for place, file in enumerate(next(iter(pairs.values()))[0]):
            num_bytes_W = np.array(file["bytes"])
            lost: list[NDArray[np.float64]] = [
                np.array(after[place]["bits"]) - np.array(before[place]["bits"]) for before, after in pairs.values()
            ]
            before = float(np.sum(file["bits"]) / num_bytes_W.sum())
            by_seed = dict(zip(pairs, [float(one.sum() / num_bytes_W.sum()) for one in lost], strict=True))
            interval = (
                t_interval(np.array(list(by_seed.values())))
                if len(by_seed) >= MIN_SEEDS
                else ratio_interval(np.mean(lost, axis=0), num_bytes_W)
            )
            pooled = make_pooled(interval, seeds=[by_seed.get(seed) for seed in findings.seeds], num_tasks=0)
            yield {
                "arm": arm,
                "file": file["file"],
                "num_bytes": int(num_bytes_W.sum()),
                "unknown_tokens": file["unknown_tokens"],
                "before": before,
                "after": before + pooled.mean,
                **_pooled_json(pooled, mean="difference"),
            }


def _forgotten_tasks(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield each arm less the base on held-out tasks: those where the base had a score to lose, and the others."""
    if "base" not in findings.tests:
        return
    shots = findings.asked_shots("held-out")
    for k in sorted({*shots[:1], *shots[-1:]}):
        known = [task for task in findings.tasks["held-out"] if _beats_majority(findings, task, k)]
        kinds = {"forgetting": known, "transfer": [task for task in findings.tasks["held-out"] if task not in known]}
        for kind, tasks in kinds.items():
            before = findings.pool("base", tasks, k)
            for arm in [arm.name for arm in findings.comparison.arms if arm.trained and not arm.per_task]:
                one, other = ([asked and asked.tables for asked in findings.tests[name]] for name in (arm, "base"))
                pooled = pool_differences(one, other, tasks=tasks, shots=(k, k)) if tasks else None
                if pooled is None or before is None:
                    continue
                yield {
                    "arm": arm,
                    "kind": kind,
                    "shots": k,
                    "tasks": tasks,
                    "before": before.mean,
                    "after": before.mean + pooled.mean,
                    **_pooled_json(pooled, mean="difference"),
                }


def _beats_majority(findings: Findings, task: str, shots: int) -> bool:
    pooled = findings.pool("base", [task], shots)
    cells = [c for a in findings.tests["base"] if a for c in a.entries[task]["curve"] if c["shots"] == shots]
    majority = _mean([cell["majority_score"] for cell in cells])
    return pooled is not None and pooled.low is not None and pooled.low > (majority or 0.0)


def _metrics_of(comparison: Comparison) -> Iterator[tuple[ArmName, int, dict[str, Any]]]:
    """Yield (arm, seed, record) of the shared arms' metrics.jsonl, each record with the tokens processed until then."""
    for arm in [arm for arm in comparison.arms if not arm.per_task]:
        for seed, folder, _, _ in _runs_of(comparison, arm):
            tokens = 0
            for record in MetricsLog(folder / "metrics.jsonl").read():
                tokens += record.get("tokens", 0)
                yield arm.name, seed, record | {"tokens": tokens}


def _drift(
    comparison: Comparison, texts: Mapping[tuple[ArmName, int], Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for arm in [arm.name for arm in comparison.arms if arm.trained and not arm.per_task]:
        for seed in comparison.settings.seeds:
            for file in texts.get(("base", seed), []) if (arm, seed) in texts else []:
                start = float(np.sum(file["bits"]) / np.sum(file["bytes"]))
                yield {"arm": arm, "seed": seed, "step": 0, "tokens": 0, "file": file["file"], "bits_per_byte": start}
    for arm, seed, record in _metrics_of(comparison):
        for name in [key for key in record if key.startswith("drift/")]:
            yield {
                "arm": arm,
                "seed": seed,
                "step": record["step"],
                "tokens": record["tokens"],
                "file": name.removeprefix("drift/"),
                "bits_per_byte": record[name],
            }


def _shot_losses(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for arm, seed, record in _metrics_of(comparison):
        for name in [key for key in record if key.startswith("loss_by_shot/")]:
            yield {
                "arm": arm,
                "seed": seed,
                "step": record["step"],
                "tokens": record["tokens"],
                "shots": name.removeprefix("loss_by_shot/"),
                "nats_a_token": record[name],
            }


def _flips(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield how often an arm goes along with exchanged labels, and how often it stays with the true one."""
    for arm, role, seeds in _asked_by_role(findings, "flip"):
        follows: list[list[Table] | None] = []
        keeps, plain, num_shots = [], [], max(findings.settings.shots)
        for seed, asked, tasks in seeds:
            tables = [asked.tables[task][num_shots] for task in tasks]
            follows.append(tables or None)
            for task in tasks:
                back = {new: old for old, new in flip_map(findings.comparison.tasks[task].labels, seed=seed).items()}
                rows = [p for p in asked.predictions if p.task == task]
                keeps.append(float(np.mean([p.prediction == back[p.answer] for p in rows])))
                test = findings.tests[arm][findings.seeds.index(seed)]
                table = test.tables.get(task, {}).get(num_shots) if test else None
                plain += [] if table is None else [float(table.mean())]
        pooled = pool_means(follows)
        if pooled is not None:
            yield {
                "arm": arm,
                "role": role,
                "shots": num_shots,
                "tasks": pooled.num_tasks,
                **_pooled_json(pooled, mean="follows"),
                "keeps": float(np.mean(keeps)),
                "plain": _mean(plain),
            }


def _asked_by_role(
    findings: Findings, what: What
) -> Iterator[tuple[ArmName, str, list[tuple[int, Asked, list[str]]]]]:
    """Yield (arm, role, [(seed, answers, tasks that were asked)]) of an analysis at the most shots."""
    most = max(findings.settings.shots)
    for arm, answers in findings._read(what).items():
        for role in ROLES:
            seeds = []
            for seed, asked in zip(findings.seeds, answers, strict=True):
                tasks = [task for task in findings.tasks[role] if asked and most in asked.tables.get(task, {})]
                seeds += [(seed, asked, tasks)] if asked and tasks else []
            if seeds:
                yield arm, role, seeds


def _orders(findings: Findings) -> Iterator[dict[str, Any]]:
    most = max(findings.settings.shots)
    for arm, role, seeds in _asked_by_role(findings, "order"):
        orders, draws = [], []
        for seed, asked, tasks in seeds:
            test = findings.tests[arm][findings.seeds.index(seed)]
            for task in tasks:
                table = test.tables.get(task, {}).get(most) if test else None
                if table is not None and len(table) > 1:
                    orders.append(_spread(asked.tables[task][most]))
                    draws.append(_spread(table))
        if orders:
            yield {
                "arm": arm,
                "role": role,
                "shots": most,
                "tasks": len(seeds[0][2]),
                "spread_of_orders": float(np.mean(orders)),
                "spread_of_draws": float(np.mean(draws)),
            }


def _spread(table_DQ: Table) -> float:
    return float(table_DQ.mean(axis=1).std(ddof=1))


def _examples(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield a few queries a task with every arm's answer, those first on which the arms disagree most."""
    comparison = findings.comparison
    answers: dict[str, dict[str, dict[ArmName, Prediction]]] = {}  # task -> query -> arm -> its answer
    for arm, seeds in findings.tests.items():
        k = findings.chosen[arm][0]
        for p in seeds[0].predictions if seeds[0] and comparison.settings.examples else []:
            if p.draw == 0 and p.shots == k:
                answers.setdefault(p.task, {}).setdefault(p.query, {})[arm] = p
    for task, queries in sorted(answers.items()):
        texts = {example.id: example for example in comparison.tasks[task].test}
        order: Callable[[str], float] = lambda query: -float(np.std([p.score for p in queries[query].values()]))  # noqa: E731, B023
        for query in sorted(queries, key=order)[: comparison.settings.examples]:
            told = queries[query]
            yield {
                "task": task,
                "family": comparison.tasks[task].family,
                "role": "held-out" if task in comparison.held_out else "trained",
                "input": texts[query].input,
                "answer": texts[query].answer,
                "shots": {arm: p.shots for arm, p in told.items()},
                "predictions": {arm: p.prediction for arm, p in told.items()},
                "scores": {arm: p.score for arm, p in told.items()},
            }
