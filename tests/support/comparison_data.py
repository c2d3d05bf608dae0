"""A comparison as `manyicl compare` would leave it: made up, but with the shapes, gaps and nulls of a real one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SHOTS = (0, 1, 4, 16, 64)
FAMILIES = ("classification", "nli", "qa", "summarization", "math")
ARMS: tuple[dict[str, Any], ...] = (
    {"arm": "base", "title": "Base", "trained_shots": None, "about": "The base model as it is."},
    {"arm": "zero-shot", "title": "Zero-shot", "trained_shots": 0, "about": "One example a sequence."},
    {"arm": "few-shot", "title": "Few-shot", "trained_shots": 5, "about": "Five shots, loss on the last answer."},
    {"arm": "manyicl", "title": "ManyICL", "trained_shots": 48, "about": "Many shots, loss on every answer."},
    {"arm": "dedicated", "title": "Dedicated", "trained_shots": 0, "about": "One model a task, asked without shots."},
)
# arm -> score without shots, gain at the most shots, forgetting in bits per byte.
CHARACTER = {
    "base": (0.12, 0.13, 0.0),
    "zero-shot": (0.41, -0.09, 0.182),
    "few-shot": (0.33, 0.14, 0.121),
    "manyicl": (0.34, 0.27, 0.048),
    "dedicated": (0.57, 0.0, 0.215),
}
LIFT = {"classification": 0.08, "nli": 0.05, "qa": -0.03, "summarization": -0.12, "math": -0.08}
METRIC = {"qa": "exact_match", "summarization": "rouge_l", "math": "number"}
T_97_5 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
ROLES = ("trained", "held-out")


def make_comparison(*, num_seeds: int = 5, num_tasks: int = 30, finished: bool = True, seed: int = 0) -> dict[str, Any]:
    """Return a comparison of five arms; unfinished, the last arm's last seed has no answers and no text."""
    rng = random.Random(seed)
    tasks = [_task(rng, number, num_tasks) for number in range(num_tasks)]
    seeds = list(range(num_seeds))
    content: dict[str, Any] = {
        "schema": 1,
        "name": "world-five-arms",
        "finished": finished,
        "config": 'name = "world-five-arms"\nseeds = [0, 1]\n\n[compare]\nmatch = "tokens"  # <as the paper>\n',
        "versions": {"manyicl": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "git_commit": "076dd11c0ffee",
        "device": "one test GPU",
        "seeds": seeds,
        "shots": list(SHOTS),
        "match": "tokens",
        "arms": [_arm(arm) for arm in ARMS],
        "tasks": tasks,
        "grid": [cell for arm in ARMS for s in seeds for cell in _grid(arm["arm"], s, s == seeds[-1], finished)],
        "costs": [_cost(rng, arm["arm"], s) for arm in ARMS for s in seeds],
        "trials": [_trial(arm["arm"], rate) for arm in ARMS[1:] for rate in (3e-4, 1e-3, 3e-3)],
        "chosen": [_chosen(arm["arm"]) for arm in ARMS],
    }
    by_seed = {
        (arm["arm"], task["task"], k): _seed_scores(rng, arm["arm"], task, k, seeds, finished)
        for arm in ARMS
        for task in tasks
        for k in SHOTS
    }
    content["curves"] = [_curve(tasks, key, scores, num_seeds) for key, scores in by_seed.items() if scores]
    content |= _summaries(content, by_seed)
    content["forgetting"] = _forgetting(rng, content, finished)
    content["shot_losses"] = [
        {"arm": arm, "seed": s, "step": step, "tokens": step * 16384, "shots": shots}
        | {"nats_a_token": round(3.2 * 0.82 ** (place * (1 if arm == "manyicl" else 0.4)) * 0.994**step + 0.4, 4)}
        for arm, buckets in (("few-shot", ("4-7",)), ("manyicl", ("0", "1", "2-3", "4-7", "8-15", "16-31")))
        for s in seeds
        for step in range(20, 401, 20)
        for place, shots in enumerate(buckets)
    ]
    content["flips"] = [_flip(arm["arm"], role) for role in ROLES for arm in ARMS[:4]]
    content["orders"] = [
        {"arm": arm["arm"], "role": role, "shots": 64, "tasks": 8, "spread_of_orders": 0.021, "spread_of_draws": 0.034}
        for role in ROLES
        for arm in ARMS[:4]
    ]
    content["examples"] = [_example(rng, task) for task in tasks[::3] for _ in range(2)]
    return content


def write_comparison(folder: Path, content: dict[str, Any]) -> Path:
    """Write the content as comparison.json of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return folder


def _arm(arm: dict[str, Any]) -> dict[str, Any]:
    rate = None if arm["arm"] == "base" else 1e-3
    return {**arm, "learning_rate": rate, "matched": True, "num_models": 18 if arm["arm"] == "dedicated" else 1}


def _task(rng: random.Random, number: int, num_tasks: int) -> dict[str, Any]:
    family = FAMILIES[number % 5]
    trained = number < num_tasks // 5 * 3
    return {
        "task": f"{family}_{('amber', 'birch', 'cedar', 'delta', 'ember', 'fjord')[number // 5 % 6]}_{number:02}",
        "family": family,
        "metric": METRIC.get(family, "accuracy"),
        "role": "trained" if trained else "held-out",
        "dedicated": trained,
        "num_train": rng.randint(120, 900),
        "num_validation": rng.randint(10, 90),
        "num_test": rng.randint(60, 200),
        "num_labels": rng.randint(2, 8) if family in ("classification", "nli") else None,
        "dropped": {"answer contains the terminator": 3, "too long": 11} if number % 7 == 0 else {},
        "sha256": f"{number:02x}" * 32,
    }


def _grid(arm: str, seed: int, is_last: bool, finished: bool) -> list[dict[str, Any]]:
    lacking = arm == "dedicated" and is_last and not finished
    totals = {"train": 18 if arm == "dedicated" else 1, "validation": 5, "test": 150, "text": 1, "flip": 12, "order": 8}
    done = {"train": 7, "validation": 0, "test": 0, "text": 0, "flip": 0, "order": 0} if lacking else totals
    return [
        {"arm": arm, "seed": seed, "what": what, "done": done[what], "total": total} for what, total in totals.items()
    ]


def _cost(rng: random.Random, arm: str, seed: int) -> dict[str, Any]:
    if arm == "base":
        return {"arm": arm, "seed": seed, "wall_s": None, "peak_bytes": None} | dict.fromkeys(
            (
                "steps",
                "packs",
                "episodes",
                "answers",
                "targets",
                "tokens",
                "flops",
                "head_tokens",
                "train_rows",
                "target_rows",
            ),
            0,
        )
    answers = {"zero-shot": 91_240, "few-shot": 15_310, "manyicl": 88_907, "dedicated": 90_655}[arm]
    return {
        "arm": arm,
        "seed": seed,
        "steps": 400,
        "packs": 12_800,
        "episodes": {"zero-shot": 91_240, "few-shot": 15_310, "manyicl": 2_215, "dedicated": 90_655}[arm],
        "answers": answers,
        "targets": answers * 4 + seed,
        "tokens": 6_553_600 - seed * 17,
        "flops": 5.2e13 + seed * 1e10,
        "head_tokens": {"zero-shot": 3_211_264, "few-shot": 917_504, "manyicl": 65_536, "dedicated": 3_145_728}[arm],
        "train_rows": 40_000,
        "target_rows": 12_800 if arm == "few-shot" else 40_000,
        "wall_s": None if arm == "dedicated" and seed == 1 else 412.7 + rng.random() * 40,
        "peak_bytes": 3_400_000_000,
    }


def _trial(arm: str, rate: float) -> dict[str, Any]:
    score = CHARACTER[arm][0] + 0.05 - abs(rate - 1e-3) * 20
    return {"arm": arm, "learning_rate": rate, "shots": 16, "score": score, "nll": 1.4, "chosen": rate == 1e-3}


def _chosen(arm: str) -> dict[str, Any]:
    asked = {"base": 64, "zero-shot": 0, "few-shot": 4, "manyicl": 64, "dedicated": 0}[arm]
    start, gain, _ = CHARACTER[arm]
    scores = [{"shots": k, "score": start + gain * place / 4} for place, k in enumerate(SHOTS)]
    return {"arm": arm, "shots": asked, "scores": scores if arm in ("base", "few-shot", "manyicl") else []}


def _seed_scores(
    rng: random.Random, arm: str, task: dict[str, Any], k: int, seeds: list[int], finished: bool
) -> list[float | None]:
    """Return one score a seed: null where the task does not fit so many shots, or the cell is missing."""
    if arm == "dedicated" and (k > 0 or not task["dedicated"]):
        return []
    if task["family"] == "summarization" and k == 64:
        return [None] * len(seeds)
    start, gain, _ = CHARACTER[arm]
    level = start + gain * SHOTS.index(k) / (len(SHOTS) - 1) + LIFT[task["family"]]
    level -= 0.1 if task["role"] == "held-out" and arm != "base" else 0.0
    scores: list[float | None] = [min(0.98, max(0.0, level + rng.gauss(0, 0.03))) for _ in seeds]
    if arm == "dedicated" and not finished:
        scores[-1] = None
    return scores


def _spread(values: list[float], num_seeds: int) -> tuple[float, float]:
    half = (
        0.03 if num_seeds < 2 else T_97_5[num_seeds - 1] * stdev(values) / num_seeds**0.5 if len(values) > 1 else 0.03
    )
    return mean(values) - min(half, 0.08), mean(values) + min(half, 0.08)


def _scored(scores: list[float | None], num_seeds: int) -> dict[str, Any]:
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return {"score": mean(known) if known else None, "low": None, "high": None, "seeds": scores}
    low, high = _spread(known, num_seeds)
    return {"score": mean(known), "low": low, "high": high, "seeds": scores}


def _extrapolated(arm: str, k: int) -> bool:
    trained = next(entry["trained_shots"] for entry in ARMS if entry["arm"] == arm)
    return trained is not None and k > trained


def _curve(tasks: list[dict[str, Any]], key: tuple[str, str, int], scores: list[float | None], num_seeds: int) -> Any:
    arm, name, k = key
    number = next(i for i, task in enumerate(tasks) if task["task"] == name)
    scored = _scored(scores, num_seeds)
    known = scored["score"] is not None
    return {
        "arm": arm,
        "task": name,
        "shots": k,
        **scored,
        "other_scores": _other_scores(tasks[number]["family"], scored["score"]),
        "nll": 1.2 if known else None,
        "majority_score": 0.21 if tasks[number]["num_labels"] else None,
        "num_scored": 200 if known else 0,
        "num_unfit": 5 if number % 9 == 0 else 0,
        "num_cut": 2 if number % 11 == 3 and known else 0,
        "num_copies": 1 if number % 13 == 5 and k == 64 else 0,
        "num_near_copies": 4 if number % 13 == 5 and k == 64 else 0,
        "extrapolated": _extrapolated(arm, k),
        "worst_draw": scored["score"] - 0.06 if known else None,
        "best_draw": scored["score"] + 0.05 if known else None,
    }


def _other_scores(family: str, score: float | None) -> dict[str, float]:
    names = {"classification": ("macro_f1",), "nli": ("macro_f1",), "qa": ("token_f1",)}
    names |= {"summarization": ("rouge_1", "rouge_2")}
    return {} if score is None else {name: score / (2 + place) for place, name in enumerate(names.get(family, ()))}


def _mean_scores(content: dict[str, Any], by_seed: Any, arm: str, names: list[str], k: int) -> list[float | None]:
    """Return the mean over tasks, one a seed; null where a task of them has none."""
    rows = [by_seed[arm, name, k] for name in names]
    if not rows or not all(rows):
        return []
    return [
        mean(row[i] for row in rows) if all(row[i] is not None for row in rows) else None
        for i in range(len(content["seeds"]))
    ]


def _summaries(content: dict[str, Any], by_seed: Any) -> dict[str, Any]:
    """Return means, headline, differences and flatness."""
    out: dict[str, Any] = {"means": [], "headline": [], "differences": [], "flatness": []}
    num_seeds = len(content["seeds"])
    chosen = {entry["arm"]: entry["shots"] for entry in content["chosen"]}
    for role in ROLES:
        tasks = [task for task in content["tasks"] if task["role"] == role]
        every = [task["task"] for task in tasks if task["family"] != "summarization"]
        for arm in (entry["arm"] for entry in ARMS):
            for family in (None, *FAMILIES):
                names = every if family is None else [t["task"] for t in tasks if t["family"] == family]
                for k in SHOTS:
                    scores = _mean_scores(content, by_seed, arm, names, k)
                    if scores:
                        entry = {"arm": arm, "role": role, "family": family, "shots": k, **_scored(scores, num_seeds)}
                        entry |= {"tasks": len(names), "majority_score": 0.2, "extrapolated": _extrapolated(arm, k)}
                        out["means"].append(entry)
            for asked, k in (("chosen", chosen[arm]), ("zero", 0), ("most", 64)):
                names = [name for name in every if arm != "dedicated" or by_seed[arm, name, 0]]
                scores = (
                    _mean_scores(content, by_seed, arm, names, k) if role == "trained" or arm != "dedicated" else []
                )
                if scores:
                    scored = _scored(scores, num_seeds)
                    best = num_seeds >= 5 and arm == "manyicl" and asked == "most"
                    out["headline"].append(
                        {"arm": arm, "role": role, "asked": asked, "shots": k, **scored, "best": best}
                    )
            out["flatness"] += _flatness(arm, role) if arm != "dedicated" else []
        out["differences"] += _differences(content, by_seed, role, every, chosen)
    return out


def _flatness(arm: str, role: str) -> list[dict[str, Any]]:
    gain = CHARACTER[arm][1] * (0.5 if arm == "few-shot" else 0.9)
    flat = abs(gain) < 0.01
    title = next(entry["title"] for entry in ARMS if entry["arm"] == arm)
    verb = "rises" if gain > 0 else "falls"
    sentence = f"{title} {verb} by {abs(100 * gain):.1f} points from 1 to 64 shots."
    ends = {"difference": gain, "low": gain - 0.03, "high": gain + 0.03}
    return [{"arm": arm, "role": role, "from_shots": 1, "to_shots": 64, **ends, "flat": flat, "sentence": sentence}]


def _differences(
    content: dict[str, Any], by_seed: Any, role: str, every: list[str], chosen: Any
) -> list[dict[str, Any]]:
    pairs = []
    for b in ("base", "zero-shot", "few-shot", "dedicated"):
        names = [name for name in every if by_seed["manyicl", name, 0] and by_seed[b, name, 0]]
        for asked in ("chosen", "zero", "most"):
            k_a, k_b = {"chosen": (chosen["manyicl"], chosen[b]), "zero": (0, 0), "most": (64, 64)}[asked]
            mine, theirs = (_mean_scores(content, by_seed, arm, names, k) for arm, k in (("manyicl", k_a), (b, k_b)))
            if not mine or not theirs:
                continue
            per_seed = [x - y if x is not None and y is not None else None for x, y in zip(mine, theirs, strict=True)]
            scored = _scored(per_seed, len(content["seeds"]))
            entry = {"role": role, "tasks": len(names), "a": "manyicl", "b": b, "asked": asked}
            entry |= {"shots_a": k_a, "shots_b": k_b, "difference": scored.pop("score"), **scored}
            told = entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0)
            words = f"ManyICL scores {100 * entry['difference']:+.1f} points against {b}"
            entry["sentence"] = words + ("." if told else "; no difference can be told.")
            pairs.append(entry)
    return pairs


def _forgetting(rng: random.Random, content: dict[str, Any], finished: bool) -> dict[str, Any]:
    seeds = content["seeds"]
    held_out = [task["task"] for task in content["tasks"] if task["role"] == "held-out"]
    text, tasks, drift = [], [], []
    for arm, (_, gain, lost) in CHARACTER.items():
        if arm == "base":
            continue
        missing = arm == "dedicated" and not finished
        for file, before in (("prose.txt", 1.214), ("code.txt", 0.871)):
            by_seed = [None if missing and s == seeds[-1] else lost + rng.gauss(0, 0.006) for s in seeds]
            scored = _scored(by_seed, len(seeds))
            difference = scored.pop("score")
            entry = {"arm": arm, "file": file, "num_bytes": 262_144, "before": before, "after": before + difference}
            text.append({**entry, "difference": difference, **scored})
            drift += [
                {"arm": arm, "seed": s, "step": step, "tokens": step * 16384, "file": file}
                | {"bits_per_byte": round(before + lost * (step / 400) ** 0.6 + rng.gauss(0, 0.003), 4)}
                for s in seeds
                for step in range(0, 401, 50)
                if arm != "dedicated"
            ]
        for kind, names in (("forgetting", held_out[:4]), ("transfer", held_out[4:])):
            for k in (0, 64):
                scored = _scored([gain / 3 - lost / 4 + rng.gauss(0, 0.01) for _ in seeds], len(seeds))
                change = scored.pop("score")
                ends = {"before": 0.3, "after": 0.3 + change, "difference": change, **scored}
                if arm != "dedicated":
                    tasks.append({"arm": arm, "kind": kind, "shots": k, "tasks": names, **ends})
    return {"window_tokens": 512, "bos": True, "text": text, "tasks": tasks, "drift": drift}


def _flip(arm: str, role: str) -> dict[str, Any]:
    follows = {"base": 0.21, "zero-shot": 0.06, "few-shot": 0.34, "manyicl": 0.63}[arm]
    ends = {"low": follows - 0.04, "high": follows + 0.04, "seeds": [follows - 0.01, follows + 0.01]}
    return {"arm": arm, "role": role, "shots": 64, "tasks": 6, "follows": follows, "keeps": 0.2, **ends, "plain": 0.7}


def _example(rng: random.Random, task: dict[str, Any]) -> dict[str, Any]:
    asked = {"base": 64, "zero-shot": 0, "few-shot": 4, "manyicl": 64}
    if task["dedicated"]:
        asked["dedicated"] = 0
    right = {arm: rng.random() < 0.5 for arm in asked}
    text = "The red fox carries a blue lamp past the gate, and nobody in the village has seen the miller since. "
    return {
        "task": task["task"],
        "family": task["family"],
        "role": task["role"],
        "input": text * (6 if task["family"] == "summarization" else 1),
        "answer": "lamp",
        "shots": asked,
        "predictions": {
            arm: "lamp" if right[arm] else rng.choice(["fox", "gate", "a very long\nwrong answer", ""]) for arm in asked
        },
        "scores": {arm: float(right[arm]) for arm in asked},
    }
