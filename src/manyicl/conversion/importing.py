"""From a file, folder, workbook, data set of the Hub or lm-eval task file to a folder of tasks, with a preview."""

from __future__ import annotations

import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from manyicl.conversion.harness_tasks import is_harness_task, read_harness_task
from manyicl.conversion.headers import add_headers
from manyicl.conversion.hub import load_from_hub, read_class_names, read_configs
from manyicl.conversion.material import Material, Part
from manyicl.conversion.rows import KeptRows, read_material
from manyicl.conversion.sheets import read_workbook
from manyicl.errors import UserError, take_path
from manyicl.locks import new_folder
from manyicl.tasks import (
    SPLIT_WORDS,
    Row,
    Task,
    data_suffix,
    find_layout,
    inspect_task,
    name_sources,
    parse_setting,
    source_of,
)

_WORKBOOKS = (".xlsx", ".xlsm")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ImportedTask:
    """One task that was imported: `num_read` is `num_written` and the sum of `left_out`."""

    task: Task
    """As it is read from the written folder."""
    shape: str
    """What the source was recognised as, and which columns are read."""
    num_read: int
    num_written: int
    left_out: Mapping[str, int]
    """Reason -> rows that were not written."""
    examples: Mapping[str, str]
    """Reason -> the first row that was left out for it."""
    notes: tuple[str, ...]
    """What else is good to know about how the source was read."""
    files: tuple[str, ...]
    """Names of its files in the folder: rows and task.json."""


@dataclass(frozen=True, slots=True)
class Import:
    """What `import_tasks` found, and wrote unless it only looked."""

    folder: Path | None
    """The new folder of tasks; None if nothing was written."""
    tasks: tuple[ImportedTask, ...]


def import_tasks(
    source: str | Path,
    out: str | Path | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    splits: Mapping[str, str] | None = None,
    answer_index: int | None = None,
    name: str | None = None,
    family: str | None = None,
    rows: Literal["jsonl", "parquet"] = "jsonl",
) -> Import:
    """Write a source's rows as tasks into the new folder `out`, whole or not at all.

    A row that cannot be read is left out and counted by its reason. Without `out` nothing is written: the result shows
    what would be.

    source: a data file (JSON Lines, JSON, CSV, TSV, Parquet), an Excel workbook (.xlsx), a task file of
        lm-evaluation-harness (.yaml), a folder of data files or of a data set of the Hub, or such a data set's name.
    config: the configuration of a data set, or the sheet of a workbook. revision: of a data set of the Hub.
    columns: our column names -> the source's, as in a task.json; what it leaves out is recognised.
    splits: our split -> the source's split that it takes its rows from, such as {"test": "validation"}.
    answer_index: 0 or 1 if answers are numbers of options: the number of the first one.
    name: of the task. Default: the source's. family: of the task, such as "math". Default: found from its answers.
    rows: the format of the rows.

    Raises:
        UserError: `out` exists, the source does not or cannot be read, nobody can tell its columns, no row is left, or
            an argument is wrong.
    """
    if rows not in ("jsonl", "parquet"):
        raise UserError(f"rows={rows}: is unknown; known: jsonl, parquet")
    for key, mapping, example in (("columns", columns, {"input": "text"}), ("splits", splits, {"test": "validation"})):
        if not isinstance(mapping, Mapping | None):
            raise UserError(f"{key}={mapping}: maps nothing; give a mapping, such as {example}")
    given = {key: own if isinstance(own, str) else list(own) for key, own in (columns or {}).items()}
    for key, value in (("columns", given or None), ("name", name), ("family", family), ("answer_index", answer_index)):
        try:
            if value is not None:
                parse_setting(key, value)
        except ValueError as error:
            raise UserError(f"{key}={value}: {error}") from error
    if out is not None and Path(take_path("out", out)).exists():
        raise UserError(f"out={out}: exists already; name a new folder")
    with tempfile.TemporaryDirectory(prefix="manyicl-import-") as staging:
        found = _find_materials(source, config=config, revision=revision, staging=Path(staging))
        materials = [one for material in found for one in add_headers(material, staging=Path(staging))]
        if name is not None and len(materials) > 1:
            raise UserError(f"name={name}: {source} holds {len(materials)} tasks; leave the name out")
        chosen = {key: value for key, value in (("name", name), ("family", family)) if value is not None}
        read = [
            (material, read_material(material, columns=given, splits=splits or {}, answer_index=answer_index))
            for material in (
                replace(material, name=name or material.name, settings={**material.settings, **chosen})
                for material in materials
            )
        ]
        with _folder(out, staging=Path(staging)) as folder:
            tasks = tuple(_write_task(folder, material, kept, rows=rows) for material, kept in read)
            _check_layout(folder, tasks)
    return Import(None if out is None else Path(out), tasks)


@contextmanager
def _folder(out: str | Path | None, *, staging: Path) -> Iterator[Path]:
    """Give the block a folder to write to: the new folder, or one that is thrown away."""
    if out is not None:
        with new_folder(Path(out)) as partial:
            yield partial
    else:
        (staging / "looked-at").mkdir()
        yield staging / "looked-at"


def _find_materials(source: str | Path, *, config: str | None, revision: str | None, staging: Path) -> list[Material]:
    """Return the tasks that a source holds, none of them read yet."""
    path = Path(take_path("source", source)).expanduser()
    if path.exists():
        _refuse_idle("revision", revision, path, what="a data set of the Hub that is named and not a folder or file")
    if path.is_dir():
        return _find_in_folder(path, config=config)
    if path.is_file():
        if path.suffix.lower() in _WORKBOOKS:
            return [read_workbook(path, sheet=config, staging=staging)]
        _refuse_idle("config", config, path, what="a workbook or a data set")
        if is_harness_task(path):
            return [read_harness_task(path, staging=staging)]
        found = source_of(path)
        part = Part(path, "", str(path))
        stem = path.resolve().parent.name if found.stem.lower() in SPLIT_WORDS else found.stem
        return [Material(stem, (part,), settings_path=found.settings_path, origin={"source": path.name})]
    is_file_name = bool(data_suffix(path)) or path.suffix.lower() in _WORKBOOKS or is_harness_task(path)
    if not is_file_name and _HUB_NAME.fullmatch(str(source)):
        return [load_from_hub(str(source), config=config, revision=revision, staging=staging)]
    raise UserError(f"{source}: no such file or folder")


def _refuse_idle(name: str, value: str | None, path: Path, *, what: str) -> None:
    """Refuse an argument that would change nothing. what: the sources that it is for."""
    if value is not None:
        raise UserError(f"{name}={value}: does nothing with {path}, it is for {what}; leave it out")


def _find_in_folder(folder: Path, *, config: str | None) -> list[Material]:
    listed = read_configs(folder, config=config)
    if listed is not None:
        return [listed]
    names = read_class_names(folder, config)
    if not names:
        _refuse_idle("config", config, folder, what="a folder whose README or dataset_infos.json has it")
    layout = find_layout(folder)
    layout.log_left_out()
    return [
        Material(
            found.stem,
            tuple(Part(path, split, str(path)) for path, split in found.files),
            settings_path=found.settings_path,
            class_names=names,
            origin={"source": folder.resolve().name},
        )
        for found in layout.sources
    ]


def _write_task(folder: Path, material: Material, kept: KeptRows, *, rows: Literal["jsonl", "parquet"]) -> ImportedTask:
    """Write one task into a folder, and read it back."""
    stem = re.sub(r"[^\w.-]+", "_", material.name).strip("._") or "task"
    data, settings_path = folder / f"{stem}.{rows}", folder / f"{stem}.task.json"
    if data.exists():
        raise UserError(f"{data.name}: two tasks of the source have this name; import them one by one")
    records = [_as_record(row) for row in kept.rows]
    if rows == "jsonl":
        with data.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    else:
        _write_parquet(data, records)
    # A column of embeddings is read only if it is named.
    settings = kept.settings | ({"columns": {"embedding": "embedding"}} if "embedding" in records[0] else {})
    settings_path.write_text(json.dumps(settings), encoding="utf-8")
    task, faults = inspect_task(data)
    if task is None:
        message = faults[0].message.removeprefix(str(data)).removeprefix(str(settings_path))
        raise UserError(f"{material.parts[0].shown}: {message.lstrip(',: ')}")
    # Also what it is by default, so that a reader sees it and can change it.
    about = settings | {"family": task.family, "metric": task.metric}
    about["imported_from"] = {**material.origin, **({"columns": kept.columns} if kept.columns else {})}
    settings_path.write_text(f"{json.dumps(about, ensure_ascii=False, indent=2)}\n", encoding="utf-8")
    return ImportedTask(
        task,
        kept.shape,
        num_read=kept.num_read,
        num_written=len(kept.rows),
        left_out=dict(Counter(kept.left_out).most_common()),
        examples=kept.examples,
        notes=tuple(kept.notes),
        files=(data.name, settings_path.name),
    )


def _as_record(row: Row) -> dict[str, Any]:
    """Return a row as it is written: answers are texts, and those that name an option are the option's."""
    record: dict[str, Any] = {"input": row.input, "answer": row.answer}
    if row.also_right:
        record["answer"] = [row.answer, *row.also_right]
    if row.options:
        record["options"] = list(row.options)
    if row.embedding:
        record["embedding"] = array("f", row.embedding).tolist()
    return record | ({"split": row.split} if row.split else {})


def _write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow  # slow to import
    import pyarrow.parquet

    has_lists = any(isinstance(record["answer"], list) for record in records)
    known = ("input", "answer", "options", "embedding", "split")
    names = [name for name in known if any(name in record for record in records)]
    table = {name: [record.get(name) for record in records] for name in names}
    if has_lists:
        table["answer"] = [answer if isinstance(answer, list) else [answer] for answer in table["answer"]]
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def _check_layout(folder: Path, tasks: Sequence[ImportedTask]) -> None:
    """Refuse names that the folder's readers would take for splits of one task."""
    found = name_sources(folder)
    if sorted(found) != sorted(imported.task.name for imported in tasks):
        named = ", ".join(imported.files[0] for imported in tasks)
        raise UserError(f"{named}: would not be read as tasks of their own because of their names; give another name")
