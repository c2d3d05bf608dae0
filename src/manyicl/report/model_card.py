"""The card of one trained model: a README.md with Hugging Face metadata, its shot curve, and how to use it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from manyicl.comparison import Comparison
from manyicl.episodes import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation import Shots, sort_shots
from manyicl.files import write_atomically
from manyicl.models import ModelSettings, load_tokenizer, read_note
from manyicl.report import numbers
from manyicl.report.markdown import escape
from manyicl.report.plots import Axis, Line, draw_lines, plotting, shot_places, shots_axis
from manyicl.report.svg import Plots, make_environment
from manyicl.training import RunConfig, RunFolder, RunState

CURVE_NAME = "shot-curve.svg"


def write_model_card(run_folder: Path, comparison: Comparison, arm: str, seed: int) -> Path:
    """Write README.md and shot-curve.svg into the run's model folder; return the path of the card.

    The curve is that of this model alone: the scores of its arm with its seed, averaged over the tasks that were
    evaluated. If the model was trained on one task, it is the curve of that task.

    Raises:
        UserError: `run_folder` is not a finished run, or the comparison has no such arm or seed.
    """
    if arm not in comparison.place or seed not in comparison.seeds:
        raise UserError(f"arm '{arm}', seed {seed}: is not in the comparison {comparison.name}")
    folder = RunFolder(run_folder)
    config, run, model = folder.read_config(), folder.read_state(), folder.model
    if not model.is_dir():
        command = f"manyicl train --resume {shlex.quote(str(run_folder))}"
        raise UserError(f"{run_folder}: has no model yet; continue with {command}")
    curve = _seed_curve(comparison, arm, seed, trained=list(run.tasks))
    content = _describe(model, config, run) | _describe_curve(curve)
    title = f"{comparison.title_of(arm)}, {comparison.name}, seed {seed}"
    about = comparison.arm_of(arm).about
    entry = {"title": title, "about": about, "seed": seed, "seeds": comparison.seeds, "comparison": comparison}
    if curve:
        write_atomically(model / CURVE_NAME, _draw_curve(comparison, curve, arm, alt=content["alt"]))
    card = model / "README.md"
    write_atomically(card, _environment().get_template("model_card.md.jinja").render(content | entry))
    return card


def _seed_curve(
    comparison: Comparison, arm: str, seed: int, *, trained: list[str]
) -> dict[str, dict[Shots, float | None]]:
    """Return role -> shots -> this seed's mean score over the tasks that the arm answers; None if one was not scored.

    A model that was trained on one task is asked on that task only.
    """
    place = comparison.seeds.index(seed)
    has_others = comparison.arm_of(arm).num_models > 1
    curve: dict[str, dict[Shots, float | None]] = {}
    for role in comparison.roles:
        asked = [task.task for task in comparison.tasks_of(role) if (arm, task.task) in comparison.curve_points]
        names = [name for name in asked if not has_others or name in trained]
        points = [point for name in names for point in comparison.curve_points[arm, name]]
        for shots in sort_shots(point.shots for point in points):
            found = [p.seeds[place] if len(p.seeds) > place else None for p in points if p.shots == shots]
            known = [score for score in found if score is not None]
            curve.setdefault(role, {})[shots] = mean(known) if len(known) == len(names) else None
    # A number of shots that does not fit some task has no mean, and no column.
    shown = {k for scores in curve.values() for k, score in scores.items() if score is not None}
    kept = {role: {k: score for k, score in scores.items() if k in shown} for role, scores in curve.items()}
    return {role: scores for role, scores in kept.items() if any(score is not None for score in scores.values())}


def _describe(model: Path, config: RunConfig, run: RunState) -> dict[str, Any]:
    """Return what the card says of the model itself."""
    base = config.model.path
    # A local path says something about the user's machine, and nothing to anyone else.
    is_hub_name = not Path(base).is_absolute() and not Path(base).exists() and base.count("/") == 1
    note = read_note(str(model))
    template = config.template
    tokenizer = TaskTokenizer(load_tokenizer(ModelSettings(path=str(model))), template, frame=note.frame)
    is_adapter = (model / "adapter_config.json").is_file()
    return {
        "library": "peft" if is_adapter else "transformers",
        "is_adapter": is_adapter,
        "base_model": base if is_hub_name else None,
        "base_name": base if is_hub_name else Path(base).name,
        "tasks": list(run.tasks),
        "plan": run.plan,
        "targets": config.episodes.targets,
        "most_shots": max(note.trained_shots.values(), default=0),
        "token_budget": config.episodes.token_budget,
        "learning_rate": config.train.learning_rate,
        "style": template.style,
        "input_template": template.input,
        "terminator": tokenizer.terminator,
        "terminator_ids": list(tokenizer.terminator_ids),
        "bos_ids": list(tokenizer.bos_ids),
    }


def _describe_curve(curve: dict[str, dict[Shots, float | None]]) -> dict[str, Any]:
    shots = sort_shots(k for scores in curve.values() for k in scores)
    rows = [(f"{role} tasks", [scores.get(k) for k in shots]) for role, scores in curve.items()]
    ends = []
    for role, cells in rows:
        known = [numbers.tell_percent(value) for value in cells if value is not None]
        ends.append(f"{role} from {known[0]} to {known[-1]} %")
    return {"shots": shots, "rows": rows, "alt": f"Mean score against shots: {numbers.join_words(ends)}."}


def _draw_curve(comparison: Comparison, curve: dict[str, dict[Shots, float | None]], arm: str, *, alt: str) -> str:
    """Return the curve as a complete SVG file that follows the reader's light or dark theme."""
    plots = Plots()
    place = comparison.place[arm]
    places = shot_places(k for scores in curve.values() for k in scores)
    lines = []
    for number, (role, scores) in enumerate(curve.items()):
        known = {k: score for k, score in scores.items() if score is not None}
        xs, ys = [places[k] for k in known], [100 * score for score in known.values()]
        lines.append(Line(place, xs, ys, label=role, strength=1.0 if number == len(curve) - 1 else 0.5))
    top = min(102.0, 1.1 * max(float(y or 0.0) for line in lines for y in line.ys) + 1)
    with plotting():
        figure = draw_lines(lines, shots_axis(places), Axis("mean score, %", bounds=(0, top)))
        return plots.stand_alone(figure, alt)


def _environment() -> jinja2.Environment:
    # No autoescape: this is Markdown, so texts of the user's go through escape_markdown instead.
    environment = make_environment(keep_trailing_newline=True)
    environment.filters["escape_markdown"] = lambda text: escape(str(text))
    environment.filters["tojson_plain"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment
