"""No input makes a reader fail but in one line, and every row read is kept, or dropped and counted by reason.

A few hundred inputs a reader here; `make fuzz` gives each 100,000 (MANYICL_FUZZ says how many a process makes). With
MANYICL_FUZZ_COUNTS, a file, each test adds a line to it: its name and how many inputs it was given.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyicl.errors import UserError
from manyicl.tasks.faults import FaultLog
from manyicl.tasks.rows import FileRows, read_rows
from manyicl.tasks.task import inspect_task
from manyicl.training.recipe import load_recipe

pytestmark = pytest.mark.fuzz

MAX_EXAMPLES = int(os.environ.get("MANYICL_FUZZ", "200"))
fuzzed = settings(
    max_examples=MAX_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

num_inputs: Counter[str] = Counter()


def fuzz(*given_args: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a test random inputs, and count them."""

    def wrap(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            num_inputs[test.__name__] += 1
            test(*args, **kwargs)

        return fuzzed(given(*given_args)(counted))

    return wrap


@pytest.fixture(autouse=True, scope="module")
def _write_counts() -> Iterator[None]:
    yield
    if path := os.environ.get("MANYICL_FUZZ_COUNTS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{name} {count}\n" for name, count in num_inputs.items())


NAMES = st.sampled_from(["input", "answer", "split", "options", "Input ", "text", "label", "A", "B", "messages", ""])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["train", "test", "eval", " ", "a|b", '["a"]', "\ufeff", "nan", "a;b", "\0"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
CELLS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.just("content"), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(NAMES, CELLS, max_size=5) | st.fixed_dictionaries(
    {"input": TEXTS, "answer": CELLS}, optional={"split": TEXTS, "options": CELLS}
)
VALUES = RECORDS | CELLS
MAPPED = st.sampled_from(["text", "messages.-1.content", "answer.0", "A", "input", "..", "-1"])
SETTINGS = st.dictionaries(
    st.sampled_from(["name", "family", "metric", "labels", "columns", "answer_index", "instruction", "column"]),
    CELLS
    | st.sampled_from(["qa", "accuracy", 0, 1])
    | st.dictionaries(st.sampled_from(["input", "answer", "options", "split"]), MAPPED | st.lists(MAPPED, max_size=3)),
    max_size=4,
)


def check(path: Path, content: bytes, *, num_rows: int | None = None) -> None:
    """Read a file both ways; num_rows: how many it has, if that is known."""
    path.write_bytes(content)
    log = FaultLog(path)
    found: FileRows = read_rows(path, columns={}, split="", settings_name="t.task.json", log=log)
    assert found.num_read == len(found.rows) + found.num_blank + found.num_faulty
    faults = log.list_faults()
    assert found.num_faulty <= sum(fault.count for fault in faults)
    if num_rows is not None and not any(not fault.rows for fault in faults):
        assert found.num_read == num_rows
    task, faults = inspect_task(path)
    assert (task is None) == bool(faults)
    assert all("\n" not in fault.message and str(path.parent) in fault.message for fault in faults)
    if task is not None:
        kept = len(task.train) + len(task.validation) + len(task.test)
        assert kept + sum(task.dropped.values()) == task.num_rows == found.num_read


def write_csv(rows: list[list[str]], separator: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


@pytest.mark.slow
@fuzz(st.lists(VALUES, max_size=6), st.sampled_from([b"\n", b"\r\n", b",\n", b"\n\n"]), st.binary(max_size=4))
def test_json_lines(tmp_path: Path, values: list[object], end: bytes, noise: bytes) -> None:
    lines = [json.dumps(value).encode() for value in values]
    check(tmp_path / "t.jsonl", end.join(lines) + end + noise)
    if lines and lines[0][:1] != b"[" and end != b",\n":
        check(tmp_path / "t.jsonl", b"\n".join(lines), num_rows=len(lines))


@pytest.mark.slow
@fuzz(VALUES | st.lists(RECORDS, max_size=6), st.binary(max_size=4), st.booleans())
def test_json(tmp_path: Path, value: object, noise: bytes, pretty: bool) -> None:
    content = json.dumps(value, indent=1 if pretty else None).encode()
    check(tmp_path / "t.json", content + noise)
    if isinstance(value, list) and value:
        check(tmp_path / "t.json", content, num_rows=len(value))


TABLES = st.lists(st.lists(TEXTS, max_size=4), max_size=6)
HEADERS = st.lists(NAMES | TEXTS, max_size=4) | st.permutations(["input", "answer", "split", "options"])


SEPARATORS, NOISE, CODECS = st.sampled_from(",;\t|"), st.binary(max_size=4), st.sampled_from(["utf-8", "utf-16"])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@fuzz(HEADERS, TABLES, SEPARATORS, NOISE, CODECS)
def test_tables(
    tmp_path: Path,
    suffix: str,
    header: list[str],
    rows: list[list[str]],
    separator: str,
    noise: bytes,
    codec: str,
) -> None:
    path, content = tmp_path / f"t{suffix}", write_csv([header, *rows], separator)
    check(path, content + noise)
    check(path, b"".join((b"input", separator.encode(), b"answer\n", content)))
    check(path, content.decode(errors="replace").encode(codec, errors="replace"))
    check(path, noise + content)


@pytest.mark.slow
@fuzz(st.lists(st.tuples(TEXTS, TEXTS), max_size=6), st.sampled_from(",;\t|"))
def test_the_rows_of_a_whole_table_are_counted(tmp_path: Path, rows: list[tuple[str, str]], separator: str) -> None:
    content = write_csv([["input", "answer"], *(list(row) for row in rows)], separator)
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    # A row of one empty cell is written as a quoted one, so none is a blank line.
    check(tmp_path / "t.csv", content, num_rows=len(rows))
    check(tmp_path / "t.csv.gz", gzip.compress(content, 1, mtime=0), num_rows=len(rows))


@pytest.mark.slow
@fuzz(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"]))
def test_any_bytes(tmp_path: Path, content: bytes, suffix: str) -> None:
    check(tmp_path / f"t{suffix}", content)


PARQUET = st.dictionaries(
    NAMES.filter(bool),
    st.sampled_from(
        [
            ["x", "y", None],
            [1, 0, -1],
            [1.0, float("nan"), 0.5],
            [True, False, None],
            [b"x", b"\xff", None],
            [["a", "b"], [], None],
            [{"text": ["a"]}, {"text": []}, None],
            [{"role": "user", "content": "x"}] * 3,
        ]
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@fuzz(PARQUET, st.binary(max_size=200), st.integers(0, 400), st.booleans())
def test_parquet(tmp_path: Path, columns: dict[str, list[object]], metadata: bytes, place: int, broken: bool) -> None:
    table = pyarrow.table(columns)
    features = json.dumps({"info": {"features": {name: {"_type": "ClassLabel", "names": ["a"]} for name in columns}}})
    buffer = io.BytesIO()
    named = table.replace_schema_metadata({"huggingface": metadata if len(metadata) > 100 else features})
    pyarrow.parquet.write_table(named, buffer)
    content = buffer.getvalue()
    if broken:
        place %= len(content)
        content = content[:place] + metadata[:5] + content[place + len(metadata[:5]) :]
    check(tmp_path / "t.parquet", content, num_rows=None if broken else 3)


def either(what: Callable[[], object]) -> None:
    """Run something that may end in a user's mistake, and in nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(UserError):
            what()


@pytest.mark.slow
@fuzz(SETTINGS | CELLS, st.binary(max_size=3))
def test_task_json(tmp_path: Path, value: object, noise: bytes) -> None:
    rows = [{"input": "x", "answer": ["a", "b"], "text": "y"}, {"input": "z", "answer": "b", "A": "1"}]
    (tmp_path / "t.task.json").write_bytes(json.dumps(value).encode() + noise)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, faults = inspect_task(tmp_path / "t.jsonl")
    assert (task is None) == bool(faults)
    if task is not None:
        assert (
            len(task.train) + len(task.validation) + len(task.test) + sum(task.dropped.values()) == task.num_rows == 2
        )


TOML = st.sampled_from(
    ["[model]", "[tasks]", "path = 'x'", "folder = 'y'", "[train]", "num_steps = -1", "seed = 1e400"]
)


@pytest.mark.slow
@fuzz(
    st.lists(TOML | st.text(max_size=12), max_size=8), st.binary(max_size=4), st.lists(st.text(max_size=12), max_size=2)
)
def test_recipe(tmp_path: Path, lines: list[str], noise: bytes, overrides: list[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass") + noise)
    either(lambda: load_recipe(path))
    path.write_text("[model]\npath = 'x'\n[tasks]\nfolder = 'y'\n")
    either(lambda: load_recipe(path, overrides=overrides))
