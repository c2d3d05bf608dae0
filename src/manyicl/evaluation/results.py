"""Evaluations and their files, a JSON of curves and the predictions behind it (docs/results-format.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from manyicl.errors import UserError
from manyicl.evaluation.points import (
    PlainPath,
    Prediction,
    ShotCurve,
    predictions_bytes,
    read_predictions,
    sum_plain_paths,
)
from manyicl.files import write_atomically
from manyicl.seeds import STREAMS

RESULT_SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Shot curves of one model: what `manyicl eval` and `manyicl curve` print and write.

    by: how a known answer was chosen (sweep.Sweep); None where none was. engine: who answered; by 'endpoint' every
    answer is generated and no likelihood is known. endpoint: that server's url and model, and whether prompts were sent
    as ids or as text. fixed_shots: where all draws hold the same shots (sweep.Sweep). sharing_fault: why the queries
    could not share the encoded shots, so that every prompt was processed as a whole; '' if they did.
    max_new_tokens: limit of generated answers, None for each task's own.
    """

    model: str
    kind: Literal["sweep", "one-pass"]
    seed: int
    max_tokens: int
    curves: tuple[ShotCurve, ...]
    by: Literal["sum", "mean"] | None = None
    engine: Literal["local", "endpoint"] = "local"
    endpoint: Mapping[str, str] | None = None
    fixed_shots: int | Literal["most"] | None = None
    sharing_fault: str = ""
    max_new_tokens: int | None = None

    @property
    def plain_path(self) -> PlainPath | None:
        """What whole prompts cost in all tasks together; None if the encoded shots were shared."""
        return sum_plain_paths(curve.plain_path for curve in self.curves)

    @property
    def complete(self) -> bool:
        """Whether every query that was asked got its answer."""
        return not any(cell.unanswered for curve in self.curves for cell in curve.cells)

    def to_json(self) -> dict[str, Any]:
        """Return the result file's content (docs/results-format.md), without the predictions' hash."""
        keys = ("task", "family", "metric", "sha256", "num_queries", "num_draws", "num_encoded_tokens")
        tasks = []
        for curve in self.curves:
            entry = {key: getattr(curve, key) for key in keys} | {"left_out": dict(curve.left_out)}
            if curve.plain_path is not None:
                entry["plain_path"] = asdict(curve.plain_path)
            tasks.append({**entry, "curve": [asdict(cell) for cell in curve.cells]})
        return {
            "schema": RESULT_SCHEMA,
            "model": self.model,
            "kind": self.kind,
            "by": self.by,
            "engine": self.engine,
            **({"endpoint": dict(self.endpoint)} if self.endpoint else {}),
            **({} if self.fixed_shots is None else {"fixed_shots": self.fixed_shots}),
            **({"sharing_fault": self.sharing_fault} if self.sharing_fault else {}),
            **({} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}),
            "seed": self.seed,
            "streams": STREAMS,
            "max_tokens": self.max_tokens,
            "tasks": tasks,
        }

    def save(self, path: Path) -> Path | None:
        """Write the JSON at `path` and, for a sweep, the predictions beside it; return where the predictions are."""
        content = self.to_json()
        predictions = predictions_path(path) if self.kind == "sweep" else None
        if predictions is not None:
            data = predictions_bytes([p for curve in self.curves for p in curve.predictions])
            write_atomically(predictions, data)
            content["predictions"] = {"file": predictions.name, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return predictions


@dataclass(frozen=True, slots=True)
class Result:
    """A sweep read back from its files. content: the JSON. predictions: the rows of the file beside it."""

    path: Path
    content: Mapping[str, Any]
    predictions: Sequence[Prediction]


def predictions_path(path: Path) -> Path:
    """Return where the predictions of the result at `path` lie."""
    return path.with_name(f"{path.name.removesuffix('.json')}.predictions.parquet")


def refuse_other_result(path: Path, settings: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to write over a finished result of other settings, or over a file that is none: it may be all there is.

    settings: those of `Evaluation` that are known before it is asked, and `endpoint_model`. tasks: of each, what its
    entry in the file must have, and the shot counts by the name `shots`.

    Raises:
        UserError: naming what differs.
    """
    if not path.exists():
        return
    try:
        content = json.loads(path.read_bytes())
        content["endpoint_model"] = (content.get("endpoint") or {}).get("model")
        found = {key: content.get(key) for key in settings}
        kept = {e["task"]: {**e, "shots": [cell["shots"] for cell in e["curve"]]} for e in content["tasks"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--out {path}: exists, and is no result of manyicl; name another file") from error
    differs = [key for key, value in settings.items() if found[key] != value]
    if kept.keys() != {task["task"] for task in tasks}:
        differs.append("tasks")
    elif tasks:
        differs += [key for key in tasks[0] if any(kept[t["task"]].get(key) != t[key] for t in tasks)]
    if differs:
        raise UserError(
            f"--out {path}: holds a finished result with other {', '.join(differs)}; name another file, or remove it"
        )


def read_result(path: Path) -> Result:
    """Return the sweep that `manyicl eval --out PATH` wrote.

    Raises:
        UserError: it is no such file, or the predictions beside it are missing or not its own.
    """
    try:
        content = json.loads(path.read_bytes())
        schema, kind = content["schema"], content["kind"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a result of manyicl eval --out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no result of manyicl eval --out; give its FILE.json") from error
    if schema != RESULT_SCHEMA:
        raise UserError(f"{path}: has schema {schema}, not {RESULT_SCHEMA}; evaluate again with this version")
    if kind != "sweep":
        raise UserError(f"{path}: is a {kind} curve, which keeps no predictions; give a result of manyicl eval")
    beside = path.with_name(content["predictions"]["file"])
    try:
        if hashlib.sha256(beside.read_bytes()).hexdigest() != content["predictions"]["sha256"]:
            raise UserError(f"{beside}: is not the predictions file that {path} was written with; evaluate again")
        return Result(path, content, read_predictions(beside))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{beside}: cannot be read ({error}); it belongs beside {path}") from error


def check_out(path: Path | None) -> None:
    """Refuse a place that the result could not be written to, before hours are spent on it.

    Raises:
        UserError: it is a folder, or lies below a file.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file in it, such as {path / 'curve.json'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {path}: cannot be written below {above}; name another place")
