"""Excel workbooks: cells as a CSV export has them, sheets as splits, and what cannot be read in one line."""

from __future__ import annotations

import datetime
import json
import zipfile

import pytest

from manyicl.conversion import import_tasks
from manyicl.errors import UserError

openpyxl = pytest.importorskip("openpyxl")


def write_workbook(path, sheets):
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.active)
    for name, rows in sheets.items():
        sheet = workbook.create_sheet(name)
        for row in rows:
            sheet.append(row)
    workbook.save(path)


def test_a_sheet_is_read_as_its_csv_would_be(tmp_path):
    rows = [
        [None, None, None],
        ["question", "answer", "options"],
        ["How many?", 3.0, "3|4"],
        [None, None, None],
        ["What,\nreally?", 4, "3|4"],
        ["When?", datetime.datetime(2026, 11, 28), "2026-11-28|2027-01-01"],
        ["Who?", None, "3|4"],
        [None, None, None],
    ]
    write_workbook(tmp_path / "desk.xlsx", {"Sheet1": rows, "empty": []})
    (imported,) = import_tasks(tmp_path / "desk.xlsx", tmp_path / "out").tasks
    written = [json.loads(line) for line in (tmp_path / "out" / "desk.jsonl").read_text().splitlines()]
    assert written == [
        {"input": "How many?", "answer": "3", "options": ["3", "4"]},
        {"input": "What,\nreally?", "answer": "4", "options": ["3", "4"]},
        {"input": "When?", "answer": "2026-11-28", "options": ["2026-11-28", "2027-01-01"]},
    ]
    assert (imported.num_read, imported.left_out) == (5, {"empty answer": 1, "blank row": 1})
    assert imported.examples["empty answer"].startswith("desk.xlsx, row 5: answer '' is empty")


def test_sheets_named_after_splits_are_these_splits_and_others_must_be_chosen(tmp_path):
    sheets = {"Train": [["text", "label"], ["a", "x"], ["b", "y"]], "Test": [["text", "label"], ["c", "x"]]}
    write_workbook(tmp_path / "desk.xlsx", sheets)
    (imported,) = import_tasks(tmp_path / "desk.xlsx").tasks
    assert [example.input for example in imported.task.test] == ["c"]
    assert imported.task.num_rows == 3
    write_workbook(tmp_path / "two.xlsx", {"2025": sheets["Train"], "2026": sheets["Test"]})
    with pytest.raises(UserError, match=r"two\.xlsx: has the sheets '2025', '2026'; name one as `config`$"):
        import_tasks(tmp_path / "two.xlsx")
    assert import_tasks(tmp_path / "two.xlsx", config="2026").tasks[0].num_read == 1
    with pytest.raises(UserError, match=r"two\.xlsx: has no sheet '2024' with rows; did you mean"):
        import_tasks(tmp_path / "two.xlsx", config="2024")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a workbook", b"a,b\n1,2\n"])
def test_what_is_not_a_workbook_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "desk.xlsx").write_bytes(content)
    with pytest.raises(UserError, match=r"^\S+desk\.xlsx: is not a workbook that Excel could open"):
        import_tasks(tmp_path / "desk.xlsx")


def test_a_sheet_of_a_chart_is_passed_over_and_a_damaged_sheet_is_refused(tmp_path):
    rows = [["input", "answer"], ["a", "x"], ["b", "y"]]
    write_workbook(tmp_path / "desk.xlsx", {"rows": rows})
    workbook = openpyxl.load_workbook(tmp_path / "desk.xlsx")
    workbook.create_chartsheet("plot").add_chart(openpyxl.chart.BarChart())
    workbook.save(tmp_path / "desk.xlsx")
    assert import_tasks(tmp_path / "desk.xlsx").tasks[0].num_written == 2
    with zipfile.ZipFile(tmp_path / "desk.xlsx") as whole, zipfile.ZipFile(tmp_path / "cut.xlsx", "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[: len(content) // 2] if name == "xl/worksheets/sheet1.xml" else content)
    with pytest.raises(UserError, match=r"cut\.xlsx: is not a workbook that Excel could open .unclosed token"):
        import_tasks(tmp_path / "cut.xlsx")
