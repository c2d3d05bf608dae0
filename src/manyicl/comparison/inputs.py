"""The files that a comparison began with, by hash, and the text around its examples: work done later must use the same.

`inputs.json` is written before any work is done and never changed. Answers of two arms are paired query by query, which
would be wrong if they had been asked different files, so a comparison whose files have changed is refused. It also
keeps the rows that the tasks share with each other, which take a while to find.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manyicl.comparison.settings import CompareConfig, absolute_texts
from manyicl.episodes import Frame
from manyicl.errors import UserError
from manyicl.evaluation import Evaluation
from manyicl.files import read_object, write_atomically
from manyicl.locks import sole_writer
from manyicl.models import RUN_STATE, fingerprint_weights, locate_model
from manyicl.planning import Overlap
from manyicl.tasks import Task, name_sources
from manyicl.training import RunFolder, dump_config, find_changes, load_recipe, refuse_changes, refuse_gone

RECIPE = "recipe.toml"
INPUTS_FILE = "inputs.json"
FRAME_FILE = "frame.json"
RUN_STATES = f"seed-*/**/{RUN_STATE}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hashes of the files that a comparison reads."""

    tasks: Mapping[str, str]
    """Task -> the sha256 of its rows and settings, as in results and run.json."""
    texts: Mapping[str, str]
    """File of neutral text -> the sha256 of its bytes, in the order of the recipe."""
    weights: str | None = None
    """The fingerprint of the base; None if it is on the hub, or an earlier version began the comparison."""
    overlaps: Mapping[str, Overlap] | None = None
    """Held-out or familiar task -> the rows that it shares with train rows of trained tasks.

    None if an earlier version began the comparison and did not look for them.
    """


def hash_inputs(tasks: Mapping[str, Task], text_files: Sequence[str], *, model: str) -> Inputs:
    """Return the hashes of tasks, text files and the base as they are now.

    model: the path or name of the base.

    Raises:
        UserError: a text file cannot be read.
    """
    texts = {}
    for file in text_files:
        try:
            texts[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"compare.text_files: {file}: cannot be read ({error.strerror}); put it back") from error
    weights = fingerprint_weights(locate_model(model))
    return Inputs({name: task.sha256 for name, task in tasks.items()}, texts, weights)


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Write the hashes into a comparison's folder."""
    overlaps = {name: overlap.model_dump() for name, overlap in (inputs.overlaps or {}).items()}
    hashes = {"tasks": dict(inputs.tasks), "texts": dict(inputs.texts), "weights": inputs.weights}
    content = {**hashes, "overlaps": overlaps}
    write_atomically(folder / INPUTS_FILE, json.dumps(content, indent=1) + "\n")


def read_whole(file: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object of a comparison's own file, which has these keys.

    Raises:
        UserError: the file is damaged or gone.
    """
    content = read_object(file) if file.exists() else None
    if content is None or not content.keys() >= {*keys}:
        raise UserError(f"{file}: is damaged; restore it from a copy, or start a new comparison")
    return content


@contextmanager
def redoable(file: Path) -> Iterator[None]:
    """Say how a result that turns out to be damaged is made again: nothing else of the comparison is lost.

    file: what the block reads. Its own advice, which is for files that nothing could make again, is left out.
    """
    try:
        yield
    except UserError as error:
        fault = str(error).partition("; ")[0]
        raise UserError(f"{fault}; delete {file}, and `resume` does this piece of work again") from error


def read_result(file: Path) -> Evaluation:
    """Return one result of a comparison, with its predictions.

    Raises:
        UserError: it is damaged, or its predictions are.
    """
    with redoable(file):
        return Evaluation.load(file)


def read_inputs(folder: Path) -> Inputs | None:
    """Return the hashes that a comparison began with; None if an earlier version, which kept none, began it."""
    file = folder / INPUTS_FILE
    if not file.is_file():
        return None
    content = read_whole(file)
    overlaps = content.get("overlaps")
    if overlaps is not None:
        overlaps = {name: Overlap.model_validate(overlap) for name, overlap in overlaps.items()}
    return Inputs(content["tasks"], content["texts"], content.get("weights"), overlaps)


def read_recipe(folder: Path, *, overrides: Sequence[str]) -> CompareConfig:
    """Return the recipe of the comparison in `folder`, with the places where its files lie now, if they are given.

    Raises:
        UserError: the files have gone, or an override changes something else than where they lie.
    """
    config = load_recipe(folder / RECIPE, kind=CompareConfig)
    if overrides:
        before, config = config, absolute_texts(load_recipe(folder / RECIPE, overrides=overrides, kind=CompareConfig))
        changes = find_changes(before, config)
        refuse_changes(changes, allowed=config.movable, where=f"resume={folder}", file=RECIPE)
    command = f"manyicl compare --resume {shlex.quote(str(folder))}"
    refuse_gone(config, where=f"resume={folder}", command=command)
    return config


def take_places(folder: Path, config: CompareConfig) -> None:
    """Write into a comparison and all its runs where its files lie now.

    Raises:
        UserError: another process is at work on a run.
    """
    for file in sorted(folder.glob(f"*/**/{RUN_STATE}")):
        run = RunFolder(file.parent)
        if run.is_started:
            with sole_writer(run.path):
                run.take_places(config)
    write_atomically(folder / RECIPE, dump_config(config))  # last: after a kill, all is written again


def refuse_other_inputs(folder: Path, now: Inputs, *, task_folder: str, model: str) -> None:
    """Refuse to continue with other tasks, texts or weights than those that the comparison in `folder` began with.

    A comparison of an earlier version has no inputs.json: the hashes in its finished runs and results take its place.

    Raises:
        UserError: naming the first file that differs, or a task whose results differ from each other.
    """
    began = read_inputs(folder)
    for name, sha256 in began.tasks.items() if began else _hashes_of_results(folder):
        if name in now.tasks and now.tasks[name] != sha256:
            raise UserError(
                f"{_find_file(task_folder, name)}: task '{name}' is not what it was when the comparison in {folder}"
                " began; put the file back, or start a new comparison"
            )
    for before, (file, sha256) in zip(began.texts.items() if began else (), now.texts.items(), strict=False):
        if (Path(before[0]).name, before[1]) != (Path(file).name, sha256):
            raise UserError(
                f"{file}: this text is not what it was when the comparison in {folder} began; put the file back, or"
                " start a new comparison"
            )
    if began and len(began.texts) != len(now.texts):
        raise UserError(
            f"compare.text_files: names {len(now.texts)} texts, but the comparison in {folder} began with"
            f" {len(began.texts)}; name the same ones"
        )
    weights = began.weights if began else None
    if (weights or _weights_of_runs(folder) or now.weights) != now.weights:
        raise UserError(
            f"model.path = {model}: holds other weights than the comparison in {folder} began with; put them back, or"
            " name the folder that they were moved to"
        )


def refuse_other_tasks(folder: Path, asked: Sequence[str]) -> None:
    """Refuse to continue if tasks were evaluated that the recipe no longer asks: an earlier version chose others.

    asked: the tasks that are evaluated now.

    Raises:
        UserError: naming such a task.
    """
    for file in sorted(folder.glob("seed-*/*.test.json")):
        for entry in (read_object(file) or {}).get("tasks", ()):
            if entry["task"] not in asked:
                raise UserError(
                    f"{file}: holds answers of task '{entry['task']}', which the recipe does not ask: an earlier"
                    " version chose other trained tasks; write compare.dedicated_tasks = [] into"
                    f" {folder / RECIPE}, or start a new comparison"
                )


def _weights_of_runs(folder: Path) -> str | None:
    """Return the fingerprint of the base of a comparison's runs; None if none says it."""
    runs = (RunFolder(file.parent).read_state() for file in sorted(folder.glob(RUN_STATES)))
    return next((run.weights for run in runs if run.weights), None)


def _hashes_of_results(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (task, sha256) of every run and every test result in a comparison's folder."""
    for file in sorted(folder.glob(RUN_STATES)):
        tasks = RunFolder(file.parent).read_state().tasks
        yield from ((name, task.sha256) for name, task in tasks.items())
    for file in sorted(folder.glob("seed-*/**/*.test.json")):
        yield from ((entry["task"], entry["sha256"]) for entry in json.loads(file.read_bytes())["tasks"])


def _find_file(task_folder: str, name: str) -> Path:
    """Return the data file of a task, or the folder of its files."""
    source = name_sources(task_folder).get(name)
    return Path(task_folder) / name if source is None else source.path


def read_frame(folder: Path) -> Frame | None:
    """Return the text around examples that a comparison in the chat style began with; None if it has not begun."""
    file = folder / FRAME_FILE
    return Frame(**read_whole(file)) if file.is_file() else None


def keep_frame(folder: Path, frame: Frame | None) -> None:
    """Write the text around examples into a comparison's folder, unless it is there or the style is plain."""
    if frame is not None and not (folder / FRAME_FILE).is_file():
        write_atomically(folder / FRAME_FILE, json.dumps(asdict(frame), indent=1) + "\n")
