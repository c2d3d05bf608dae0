"""Forgetting in a comparison: each arm less the base, on neutral text, on tasks that the base knew, and on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.comparison.arms import ArmName
from manyicl.comparison.findings import Findings, mean_known, metrics_of, one_number, pooled_json
from manyicl.comparison.grid import Grid
from manyicl.comparison.pooling import make_pooled
from manyicl.evaluation import Shots, window_table
from manyicl.intervals import mean_interval


def find_forgetting(findings: Findings) -> dict[str, Any]:
    """Return what each arm that trains one model lost: text, untrained tasks, and text on the way."""
    texts = _read_texts(findings.comparison)
    has_bos = any(one["bos"] for cell in texts.values() for one in cell)
    return {
        "window_tokens": findings.settings.text_window_tokens,
        "bos": has_bos,
        "text": list(_forgotten_text(findings, texts)),
        "tasks": list(_forgotten_tasks(findings)),
        "drift": list(_drift(findings.comparison, texts)),
    }


def _read_texts(comparison: Grid) -> dict[tuple[ArmName, int], list[dict[str, Any]]]:
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
            by_seed = {
                seed: {file["file"]: window_table(one, num_bytes_W)} for seed, one in zip(pairs, lost, strict=True)
            }
            interval = mean_interval(list(by_seed.values()))
            pooled = make_pooled(interval, seeds=[by_seed.get(seed) for seed in findings.seeds])
            yield {
                "arm": arm,
                "file": file["file"],
                "num_bytes": int(num_bytes_W.sum()),
                "unknown_tokens": file["unknown_tokens"],
                "before": before,
                "after": before + pooled.mean,
                **pooled_json(pooled, mean="difference"),
            }


def _forgotten_tasks(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield each arm less the base on held-out tasks: those where the base had a score to lose, and the others."""
    if "base" not in findings.tests:
        return
    untrained = [*findings.tasks["held-out"], *findings.tasks["familiar"]]
    fewest, most = (findings.shots_as(asked, "base", untrained) for asked in ("fewest", "most"))
    for asked, shots in (("fewest", fewest), ("most", most)) if most != fewest else (("fewest", fewest),):
        known = {task: k for task, k in shots.items() if _had_a_score(findings, task, k)}
        kinds = {"forgetting": known, "transfer": {task: k for task, k in shots.items() if task not in known}}
        for kind, tasks in kinds.items():
            before = findings.pool("base", tasks)
            for arm in [arm.name for arm in findings.comparison.arms if arm.trained and not arm.per_task]:
                pooled = findings.differ(arm, "base", {task: (k, k) for task, k in tasks.items()})
                if pooled is None or before is None:
                    continue
                yield {
                    "arm": arm,
                    "kind": kind,
                    "asked": asked,
                    "shots": one_number(tasks.values()),
                    "shots_by_task": tasks,
                    "tasks": list(tasks),
                    "before": before.mean,
                    "after": before.mean + pooled.mean,
                    **pooled_json(pooled, mean="difference"),
                }


def _had_a_score(findings: Findings, task: str, shots: Shots) -> bool:
    """Return whether the base beats the majority and chance by its interval: only such a score can be forgotten."""
    pooled = findings.pool("base", {task: shots})
    cells = [c for a in findings.tests["base"] if a for c in a.entries[task]["curve"] if c["shots"] == shots]
    known = [mean_known([cell.get(name) for cell in cells]) for name in ("majority_score", "chance_score")]
    return pooled is not None and pooled.low is not None and pooled.low > max(level or 0.0 for level in known)


def _drift(
    comparison: Grid, texts: Mapping[tuple[ArmName, int], Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for arm in [arm.name for arm in comparison.arms if arm.trained and not arm.per_task]:
        for seed in comparison.settings.seeds:
            for file in texts.get(("base", seed), []) if (arm, seed) in texts else []:
                start = float(np.sum(file["bits"]) / np.sum(file["bytes"]))
                yield {"arm": arm, "seed": seed, "step": 0, "tokens": 0, "file": file["file"], "bits_per_byte": start}
    for arm, seed, record in metrics_of(comparison):
        for name in [key for key in record if key.startswith("drift/")]:
            yield {
                "arm": arm,
                "seed": seed,
                "step": record["step"],
                "tokens": record["tokens"],
                "file": name.removeprefix("drift/"),
                "bits_per_byte": record[name],
            }
