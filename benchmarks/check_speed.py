"""Seconds and memory of `manyicl check` on one file of a million rows, on one core.

    python benchmarks/check_speed.py [--rows 1000000] [--formats jsonl,csv,parquet]

Prints one JSON line per format: wall seconds, CPU seconds and the peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ANSWERS = ("repair", "sales", "complaint")


def iter_rows(count: int) -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    for number in range(count):
        yield {"input": f"order {number} of bike {rng.randrange(9999)}", "answer": ANSWERS[number % 3]}


def write_rows(path: Path, count: int) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(iter_rows(count))), path)
        return
    with path.open("w", encoding="utf-8") as file:
        if path.suffix == ".csv":
            file.write("input,answer\n")
            file.writelines(f"{row['input']},{row['answer']}\n" for row in iter_rows(count))
        elif path.suffix == ".json":
            json.dump(list(iter_rows(count)), file)
        else:
            file.writelines(f"{json.dumps(row)}\n" for row in iter_rows(count))


def measure(folder: Path) -> dict[str, float]:
    """Return what one `check` of a folder takes, in a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "manyicl", "check", str(folder)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"check of {folder} failed")
    return {
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", default="jsonl,csv,parquet")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, which the child inherits
    for suffix in options.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / f"log.{suffix}", options.rows)
            print(json.dumps({"format": suffix, "rows": options.rows, **measure(Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
