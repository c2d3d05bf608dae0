"""Task files of lm-evaluation-harness (YAML): their rows, with templates filled in, as rows of a task.

A template is a column's name or a Jinja text, as there. What Python functions do cannot be converted: such a file is
refused, and the function named.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment

from manyicl.conversion.hub import load_from_hub
from manyicl.conversion.material import Material, Part
from manyicl.errors import UserError
from manyicl.tasks import Columns, FaultLog, JsonNumber, data_suffix, read_records

_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
# lm-eval's metrics that a metric of ours computes in the same way.
_METRICS = {"exact_match": "exact_match", "acc": "accuracy", "f1": "token_f1", "rougeL": "rouge_l", "rouge1": "rouge_1"}
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
# Keys that are read, and those that say nothing of rows and scores. All others are named as not converted: they decide
# how the harness asks or scores, or are misspelt.
_READ = {
    *("task", "dataset_path", "dataset_name", "dataset_kwargs", "fewshot_split", "output_type", "description"),
    *("metric_list", *_SPLITS, *_TEMPLATES),
}
_HARMLESS = {"tag", "group", "task_alias", "metadata", "doc_to_decontamination_query"}


class _Function(str):
    """A Python function that a task file names by `!function`."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    """Reads YAML whose `!function` tags are kept as names and never imported."""


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


def read_harness_task(path: Path, *, staging: Path) -> Material:
    """Return the rows of a task file of lm-evaluation-harness.

    staging: a folder for the rows.

    Raises:
        UserError: the file is not such a task file, names a Python function, or its data cannot be read.
    """
    config = _load(path)
    _refuse_functions(path, config)
    if config.get("output_type") == "loglikelihood_rolling":
        raise UserError(
            f"{path}: measures how likely whole texts are (output_type loglikelihood_rolling), and has no answers to"
            " train on; name another file"
        )
    for key in ("dataset_path", "doc_to_text", "doc_to_target"):
        if isinstance(config.get("task"), list):
            raise UserError(f"{path}: is a group of tasks; import its tasks one by one")
        if config.get(key) in (None, ""):
            raise UserError(f"{path}: has no {key}, which a task file of lm-evaluation-harness has; name another file")
    parts = []
    templates = _Templates(path, config)
    for split, files in _find_data(path, config, staging).items():
        part = staging / f"rows_{split}.jsonl"
        with part.open("w", encoding="utf-8") as written:
            for file in files:
                for number, record in _iter_records(file):
                    row = templates.fill(record, number, file)
                    # In ASCII: half of a surrogate pair could not be written, and is a row's fault when it is read.
                    written.write(f"{json.dumps(row, default=str)}\n")
        parts.append(Part(part, split, f"{path.name}, {split}"))
    settings: dict[str, Any] = {}
    unused = [key for key, value in config.items() if key not in _READ | _HARMLESS and value not in (None, {}, [])]
    description = str(config.get("description") or "")
    if "{{" in description:
        unused.append("description")
    elif description:
        settings["instruction"] = description.strip()
    listed = config.get("metric_list")
    metrics = [str(one.get("metric")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    known = [_METRICS[metric] for metric in metrics if metric in _METRICS]
    if known:
        settings["metric"] = known[0]
    unused += [f"metric {metric}" for metric in metrics if metric not in _METRICS]
    notes = (f"of {path.name} not converted: {', '.join(unused)}",) if unused else ()
    return Material(
        str(config.get("task") or path.stem),
        tuple(parts),
        kind="a task file of lm-evaluation-harness",
        settings=settings,
        origin={"source": path.name},
        notes=notes,
    )


def _load(path: Path, *, including: Sequence[Path] = ()) -> dict[str, Any]:
    """Return a task file with what it includes. including: the files that include it."""
    if path.resolve() in including:
        raise UserError(f"{path}: includes itself; correct its include")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a subclass of SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that no calendar has
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a task file of lm-evaluation-harness; it holds no keys")
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        merged |= _load(path.parent / str(other), including=(*including, path.resolve()))
    return merged | config


def _refuse_functions(path: Path, config: Mapping[str, Any]) -> None:
    def named(value: object) -> Iterator[str]:
        if isinstance(value, _Function):
            yield value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from named(inner)

    for key, value in config.items():
        for function in named(value):
            raise UserError(
                f"{path}: {key} is the Python function {function}, which cannot be converted; write what it does as a"
                " Jinja template, or write the rows that it makes into a file and import that"
            )


def _find_data(path: Path, config: Mapping[str, Any], staging: Path) -> dict[str, list[Path]]:
    """Return our split -> the files with its rows."""
    wanted = {str(config[key]): ours for key, ours in _SPLITS.items() if config.get(key)}
    fewshot = config.get("fewshot_split")
    if fewshot and "train" not in wanted.values():
        wanted.setdefault(str(fewshot), "train")
    if not wanted:
        raise UserError(f"{path}: names no training_split, validation_split or test_split; add one")
    given = config.get("dataset_kwargs") or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: dataset_kwargs is {given!r}; write keys and values")
    data_files = given.get("data_files")
    if data_files is None:
        hub = load_from_hub(
            str(config["dataset_path"]),
            config=config.get("dataset_name"),
            revision=given.get("revision"),
            staging=staging,
        )
        by_split = {part.split: [part.path] for part in hub.parts}
    else:
        named = data_files if isinstance(data_files, dict) else {"train": data_files}
        by_split = {
            str(split): [_find_file(path, str(file)) for file in (files if isinstance(files, list) else [files])]
            for split, files in named.items()
        }
    for own in wanted:
        if own not in by_split:
            raise UserError(f"{path}: its data have no split '{own}' (they have {', '.join(by_split)}); correct it")
    return {ours: by_split[own] for own, ours in wanted.items()}


def _find_file(path: Path, name: str) -> Path:
    """Return a data file, which a task file may name from the working directory or from its own folder."""
    found = next((place for place in (Path(name), path.parent / name) if place.is_file()), None)
    if found is None or not data_suffix(found):
        raise UserError(f"{path}: data file {name}: " + ("is not a data file" if found else "no such file"))
    return found


def _iter_records(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    log = FaultLog(path)
    for number, record in read_records(path, columns=Columns({}), log=log):
        if record is not None:
            yield number, record
    if faults := log.list_faults():
        raise UserError(faults[0].message)


def _plain(value: object) -> Any:
    """Return a value with JSON's numbers as numbers, so that templates can count with them."""
    if isinstance(value, JsonNumber):
        return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


class _Templates:
    """Fills in a task file's templates as the harness does."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = config
        # Sandboxed: a task file may come from anywhere.
        self._jinja = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        self._jinja.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(
            pattern, repl, text, count=count
        )

    def fill(self, record: Mapping[str, object], number: int, file: Path) -> dict[str, Any]:
        """Return a row with `input`, `answer`, and `options` if the task has choices.

        Raises:
            UserError: a template is broken, or needs a column that the row lacks.
        """
        where = f"{file.name}, row {number}"
        text, target, choices = (self._evaluate(key, record, where) for key in _TEMPLATES)
        row: dict[str, Any] = {"input": str(text), "answer": target}
        if choices is None:
            return row
        choices = list(choices.values()) if isinstance(choices, dict) else choices
        if not isinstance(choices, list):
            raise UserError(f"{self._path}: doc_to_choice is {choices!r} in {where}; write a list")
        options = [str(choice) for choice in choices]
        targets = target if isinstance(target, list) else [target]
        answers = [_choose(one, options) for one in targets]
        return row | {"answer": answers if isinstance(target, list) else answers[0], "options": options}

    def _evaluate(self, key: str, record: Mapping[str, object], where: str) -> Any:
        """Return the value of a template: of the column that it names, or of its text."""
        template = self._config.get(key)
        if not isinstance(template, str):
            return template  # a list of choices, or a number
        if template in record:
            return record[template]
        try:
            text = self._jinja.from_string(template).render({name: _plain(value) for name, value in record.items()})
        except Exception as error:  # a template computes, and any computation can fail
            raise UserError(f"{self._path}: {key} cannot be filled in for {where} ({error})") from error
        if key == "doc_to_text" or not (key == "doc_to_choice" or text.startswith("[")):
            return text
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError):
            return text
        return value if isinstance(value, list) else text


def _choose(target: object, options: Sequence[str]) -> object:
    """Return the option that a target means by its number, counted from 0; any other target as it is."""
    if isinstance(target, JsonNumber | int) or (isinstance(target, str) and target not in options):
        place = int(target) if str(target).isdecimal() or isinstance(target, int) else len(options)
        return options[place] if 0 <= place < len(options) else str(target)
    return target


def is_harness_task(path: Path) -> bool:
    """Return whether a file is a task file of lm-evaluation-harness by its name."""
    return path.suffix.lower() in (".yaml", ".yml")
