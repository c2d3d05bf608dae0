"""Evaluations and their files: a JSON of curves, and the predictions that it was made from (docs/results-format.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from manyicl.errors import UserError, list_some, take_path
from manyicl.evaluation.points import (
    PlainPath,
    Prediction,
    ShotCurve,
    curve_from_json,
    known_fields,
    predictions_bytes,
    read_predictions,
    sum_plain_paths,
)
from manyicl.evaluation.shots import record_choice
from manyicl.files import write_atomically
from manyicl.inference import DEFAULT_ANSWERS, AnswerSettings, ShotPolicy
from manyicl.seeds import STREAMS

RESULT_SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Shot curves of one model: what `evaluate` and `one_pass_curve` return, and `manyicl eval` and `curve` write."""

    model: str
    """The checkpoint, adapter, run or hub name that was evaluated."""
    kind: Literal["sweep", "one-pass"]
    """A sweep over numbers of shots, or one forward pass over each episode."""
    seed: int
    """Decides shots, queries and episodes."""
    max_tokens: int
    """The longest sequence."""
    curves: tuple[ShotCurve, ...]
    """One per task."""
    answering: AnswerSettings = DEFAULT_ANSWERS
    """How queries were answered."""
    engine: Literal["local", "endpoint"] = "local"
    """Who answered: the model on this machine, or a server, which generates every answer and knows no likelihoods."""
    endpoint: Mapping[str, str] | None = None
    """The server's URL and model, and whether prompts were sent as ids or as text; None without a server."""
    fixed_shots: int | Literal["most"] | None = None
    """Up to which number all draws hold the same shots (`Sweep.fixed_shots`)."""
    sharing_fault: str = ""
    """Why every prompt was processed as a whole, instead of sharing the encoded shots; "" if they were shared."""
    choose: ShotPolicy = "random"
    """How shots were chosen (`Sweep.choose`)."""
    num_nearest: int | None = None
    """Most shots of a query's own; None if the nearest were not chosen."""
    prompt_template: Mapping[str, Any] | None = None
    """The template that wrote the prompts (`TemplateSettings`); None in files of earlier versions."""
    path: Path | None = field(default=None, compare=False)
    """The file that it was loaded from."""

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Return the sweep that was written at `path`, with the predictions beside it.

        Raises:
            UserError: it is not such a file, or its predictions are missing or another's.
        """
        path = Path(take_path("path", path))
        content = _read_sweep(path)
        predictions: dict[str, list[Prediction]] = {}
        try:
            for prediction in _read_beside(path, content["predictions"]):
                predictions.setdefault(prediction.task, []).append(prediction)
            curves = [curve_from_json(entry, predictions.get(entry["task"], ())) for entry in content["tasks"]]
            read = {"curves": tuple(curves), "path": path, "answering": read_answering(content)}
            return cls(**known_fields(cls, content) | read)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is not a result of manyicl eval --out; give its FILE.json") from error

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The predictions of all curves."""
        return tuple(prediction for curve in self.curves for prediction in curve.predictions)

    @property
    def plain_path(self) -> PlainPath | None:
        """What whole prompts cost in all tasks together; None if the encoded shots were shared."""
        return sum_plain_paths(curve.plain_path for curve in self.curves)

    @property
    def complete(self) -> bool:
        """Whether every query got its answer."""
        return not any(point.unanswered for curve in self.curves for point in curve.points)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result beside its tasks, under the keys of the result file."""
        keys = ("model", "kind", "engine", "fixed_shots", "seed", "max_tokens")
        values = {key: getattr(self, key) for key in keys} | asdict(self.answering) | {"streams": STREAMS}
        # Files of earlier versions do not say that shots were chosen at random.
        chosen = record_choice(self.choose, self.num_nearest)
        return values | {"choose": chosen.get("choose"), "num_nearest": self.num_nearest}

    def to_json(self) -> dict[str, Any]:
        """Return the result file's content (docs/results-format.md), without the predictions' hash."""
        keys = ("task", "family", "metric", "sha256", "num_queries", "num_draws", "num_encoded_tokens")
        tasks = []
        for curve in self.curves:
            entry = {key: getattr(curve, key) for key in keys} | {"left_out": dict(curve.left_out)}
            if curve.template is not None:
                entry["template"] = curve.template
            if curve.plain_path is not None:
                entry["plain_path"] = asdict(curve.plain_path)
            tasks.append({**entry, "curve": [asdict(point) for point in curve.points]})
        return {
            "schema": RESULT_SCHEMA,
            "model": self.model,
            "kind": self.kind,
            "answering": asdict(self.answering) | {"stop": list(self.answering.stop)},
            "engine": self.engine,
            **({"endpoint": dict(self.endpoint)} if self.endpoint else {}),
            **({} if self.fixed_shots is None else {"fixed_shots": self.fixed_shots}),
            **({"sharing_fault": self.sharing_fault} if self.sharing_fault else {}),
            **record_choice(self.choose, self.num_nearest),
            "seed": self.seed,
            "streams": STREAMS,
            "max_tokens": self.max_tokens,
            **({} if self.prompt_template is None else {"prompt_template": dict(self.prompt_template)}),
            "tasks": tasks,
        }

    def __repr__(self) -> str:
        """Say what it is in one line: its points and predictions would fill a screen."""
        return f"Evaluation({self.model!r}, {self.kind}, of {list_some(curve.task for curve in self.curves)})"

    def save(self, path: str | Path) -> Path | None:
        """Write the JSON at `path` and, for a sweep, the predictions beside it; return where the predictions are."""
        path = Path(take_path("path", path))
        content = self.to_json()
        predictions = predictions_path(path) if self.kind == "sweep" else None
        if predictions is not None:
            data = predictions_bytes(self.predictions)
            write_atomically(predictions, data)
            content["predictions"] = {"file": predictions.name, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return predictions


def read_answering(content: Mapping[str, Any]) -> AnswerSettings:
    """Return the settings of a result file's answers; earlier versions wrote `by` and `max_new_tokens`."""
    if "answering" in content:
        return AnswerSettings(**known_fields(AnswerSettings, content["answering"]))
    normalize: Literal["none", "tokens"] = "tokens" if content.get("by") == "mean" else "none"
    return AnswerSettings(normalize=normalize, max_new_tokens=content.get("max_new_tokens"))


def predictions_path(path: Path) -> Path:
    """Return where the predictions of the result at `path` lie."""
    return path.with_name(f"{path.name.removesuffix('.json')}.predictions.parquet")


def refuse_other_result(
    path: Path, planned: Evaluation, tasks: Sequence[Mapping[str, Any]], *, endpoint_model: str | None = None
) -> None:
    """Refuse to write over a finished result of other settings, or over another kind of file: it may be all there is.

    planned: the evaluation before anything is asked.
    tasks: for each task what its entry in the file must have, and the shot counts by the name `shots`.
    endpoint_model: the server's name for the model, if one answers.

    Raises:
        UserError: naming what differs.
    """
    if not path.exists():
        return
    settings = planned.settings | {"endpoint_model": endpoint_model}
    try:
        content = json.loads(path.read_bytes())
        content["endpoint_model"] = (content.get("endpoint") or {}).get("model")
        content |= asdict(read_answering(content))
        found = {key: content.get(key) for key in settings}
        kept = {e["task"]: {**e, "shots": [point["shots"] for point in e["curve"]]} for e in content["tasks"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"out={path}: exists, and is not a result of manyicl; name another file") from error
    differs = [key for key, value in settings.items() if found[key] != value]
    if kept.keys() != {task["task"] for task in tasks}:
        differs.append("tasks")
    elif tasks:
        differs += [key for key in tasks[0] if any(kept[t["task"]].get(key) != t[key] for t in tasks)]
    if differs:
        raise UserError(
            f"out={path}: holds a finished result with other {', '.join(differs)}; name another file, or remove it"
        )


def _read_sweep(path: Path) -> dict[str, Any]:
    """Return the JSON of a sweep of this schema."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        schema, kind = content["schema"], content["kind"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a result of manyicl eval --out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result of manyicl eval --out; give its FILE.json") from error
    if schema != RESULT_SCHEMA:
        raise UserError(f"{path}: has schema {schema}, not {RESULT_SCHEMA}; evaluate again with this version")
    if kind != "sweep":
        raise UserError(f"{path}: is a {kind} curve, which keeps no predictions; give a result of manyicl eval")
    return content


def _read_beside(path: Path, entry: Mapping[str, str]) -> list[Prediction]:
    """Return the predictions of the result at `path`, checked against the hash in its entry."""
    beside, sha256 = path.with_name(entry["file"]), entry["sha256"]
    try:
        if hashlib.sha256(beside.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{beside}: is not the predictions file that {path} was written with; evaluate again")
        return read_predictions(beside)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{beside}: cannot be read ({error}); it belongs beside {path}") from error


def check_out(path: Path | None) -> None:
    """Refuse a place that the result could not be written to, before hours are spent on it.

    Raises:
        UserError: it is a folder, a device or a pipe, or lies below a file.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"out={path}: is a folder; name a file in it, such as {path / 'curve.json'}")
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet", ".gz"):
        raise UserError(f"out={path}: is written as JSON, with its predictions beside it; name it {path.stem}.json")
    if path.exists() and not path.is_file():  # it would be read as an earlier result, without end, or replaced
        raise UserError(f"out={path}: is a device or a pipe, not a file; name a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"out={path}: cannot be written below {above}; name another place")
