"""CSV files without a header whose columns are known all the same: those in which MMLU is distributed."""

from __future__ import annotations

import csv
import shutil
import tempfile
from codecs import BOM_UTF8
from dataclasses import replace
from itertools import islice
from pathlib import Path

from manyicl.conversion.material import Material, Part

_MMLU = ("question", "A", "B", "C", "D", "answer")
_LOOKED_AT = 50  # rows


def add_headers(material: Material, *, staging: Path) -> list[Material]:
    """Return a task's files, with copies that have a header in place of MMLU's own, which have none.

    Those whose names end in _dev, _val and _test are a task for each subject. The rows of dev, which MMLU shows as
    examples, are train rows.

    staging: a folder for the copies.
    """
    if not all(_is_mmlu(part.path) for part in material.parts):
        return [material]
    folder = Path(tempfile.mkdtemp(dir=staging))
    tasks: dict[str, list[Part]] = {}
    for number, part in enumerate(material.parts):
        subject, _, word = part.path.stem.rpartition("_")
        is_mmlus_name = part.split != "" and subject != "" and word in ("dev", "val", "test")
        split = "train" if is_mmlus_name and word == "dev" else part.split
        copied = replace(_copy(part, folder / f"{number}.csv"), split=split)
        tasks.setdefault(subject if is_mmlus_name else material.name, []).append(copied)
    note = "the files have no header; read as MMLU's own: question, four options, letter of the right one"
    return [
        replace(material, name=name, parts=tuple(parts), notes=(*material.notes, note)) for name, parts in tasks.items()
    ]


def _is_mmlu(path: Path) -> bool:
    """Return whether each of the first rows of a CSV file has six cells, of which the last is a letter up to D."""
    if path.suffix.lower() != ".csv":
        return False
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in islice(csv.reader(file, strict=True), _LOOKED_AT) if row]
    except (OSError, UnicodeDecodeError, csv.Error):  # its reader says what is wrong with it
        return False
    return bool(rows) and all(len(row) == len(_MMLU) and row[-1].strip() in {"A", "B", "C", "D"} for row in rows)


def _copy(part: Part, path: Path) -> Part:
    with part.path.open("rb") as source, path.open("wb") as file:  # bytes: what is wrong with them is its reader's
        file.write((",".join(_MMLU) + "\n").encode())
        file.write(source.read(len(BOM_UTF8)).removeprefix(BOM_UTF8))
        shutil.copyfileobj(source, file)
    return replace(part, path=path)
