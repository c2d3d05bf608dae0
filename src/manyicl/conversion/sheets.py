"""Excel workbooks (.xlsx): a sheet becomes a CSV file, which is then read as any other."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from manyicl.conversion.material import Material, Part
from manyicl.errors import UserError, suggest
from manyicl.tasks import SPLIT_WORDS


def read_workbook(path: Path, *, sheet: str | None, staging: Path) -> Material:
    """Return the rows of a workbook: those of one sheet, or of all sheets if each is named after a split.

    The first row of a sheet that is not empty names its columns. Formulas count as the values that Excel saved.

    sheet: the name of the sheet. Default: the only one that is not empty. staging: a folder for the CSV files.

    Raises:
        UserError: openpyxl is not installed, the file is damaged, or it is unclear which sheet is meant.
    """
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: {error.name} is not installed; pip install openpyxl") from error
    try:
        with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as workbook:
            sheets = {
                sheet.title: list(_iter_rows(sheet)) for sheet in workbook.worksheets
            }  # not those of a chart alone
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # openpyxl raises whatever zipfile and its XML parser raise
        raise UserError(f"{path}: is not a workbook that Excel could open ({error}); save it again") from error
    tables = {name: table for name, table in sheets.items() if table}
    chosen = _choose_sheets(path, tables, sheet)
    parts: list[Part] = []
    for name in chosen:
        file = staging / f"{len(parts)}.csv"
        with file.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written).writerows(tables[name])
        split = name if len(chosen) > 1 else ""
        parts.append(Part(file, split, path.name if len(tables) == 1 else f"{path.name}, sheet {name}"))
    return Material(
        path.stem, tuple(parts), settings_path=path.with_name(f"{path.stem}.task.json"), origin={"source": path.name}
    )


def _choose_sheets(path: Path, tables: dict[str, list[list[str]]], sheet: str | None) -> list[str]:
    if not tables:
        raise UserError(f"{path}: has no rows; add some")
    if sheet is not None:
        if sheet not in tables:
            raise UserError(f"{path}: has no sheet '{sheet}' with rows{suggest(sheet, tables)}")
        return [sheet]
    if len(tables) == 1 or all(name.strip().lower() in SPLIT_WORDS for name in tables):
        return list(tables)
    names = ", ".join(f"'{name}'" for name in tables)
    raise UserError(f"{path}: has the sheets {names}; name one as `config`")


def _iter_rows(sheet: Any) -> Iterator[list[str]]:
    """Yield the rows of a sheet from its first that is not empty to its last."""
    waiting: list[list[str]] = []  # empty rows, which count only if another row follows
    is_first = True
    for cells in sheet.iter_rows(values_only=True):
        row = [_as_cell(value) for value in cells]
        if any(row):
            yield from waiting
            waiting.clear()
            yield row
            is_first = False
        elif not is_first:
            waiting.append(row)


def _as_cell(value: object) -> str:
    """Return a cell as Excel's CSV export would write it, but for dates, which are written as in ISO 8601.

    >>> _as_cell(3.0), _as_cell(datetime.datetime(2026, 11, 28)), _as_cell(True)
    ('3', '2026-11-28', 'TRUE')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(sep=" ")
    return str(value)
