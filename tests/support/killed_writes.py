"""A process that writes to a library until it is killed, and a look at what is left: nothing acknowledged is lost.

By hand: `python -m tests.support.killed_writes 50` kills 50 writers at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from manyicl.service.library import Library
from manyicl.tasks import Example
from tests.support.forked import ROOT

ABOUT = {"family": "classification", "metric": "accuracy", "instruction": "", "labels": ["a", "b"], "settings": {}}
BATCH = 20


def write_on(folder: Path) -> None:
    """Add examples in batches and replace a task, and print how many examples there are once they are acknowledged."""
    library = Library(folder)
    versions = library.versions()
    if "appended" not in versions:
        library.add_task("appended", ABOUT, [Example("first", "a")], source="x", replace=False, most_tasks=10)
    number = library.num_examples(library.task("appended").id)
    while True:
        with library.changing("appended") as change:
            change.add([Example(f"{number} {place}", "ab"[place % 2]) for place in range(BATCH)], source="x")
        number += BATCH
        upload = [Example(f"{number} {place}", "a") for place in range(200)]
        library.add_task("uploaded", {**ABOUT, "number": number}, upload, source="x", replace=True, most_tasks=10)
        print(number, flush=True)


def kill_once(folder: Path, *, rng: random.Random) -> tuple[int, int]:
    """Start a writer, kill it at a random moment; return the examples that it acknowledged, and those that are there.

    Raises:
        AssertionError: a transaction is there in part.
    """
    code = (
        f"from pathlib import Path; from tests.support.killed_writes import write_on; write_on(Path({str(folder)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().splitlines()[-1:])])
    library = Library(folder)
    record, examples = library.read_task("appended")
    uploaded, rows = library.read_task("uploaded")
    library.close()
    assert len(examples) % BATCH == 1
    assert len({example.input for example in examples}) == len(examples)
    assert record.version == 1 + len(examples) // BATCH
    assert [example.input for example in rows] == [f"{uploaded.about['number']} {place}" for place in range(200)]
    return acknowledged, len(examples)


def main(num_kills: int) -> None:
    """Kill writers, and print how many acknowledged examples were lost."""
    rng, lost = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        for kill in range(num_kills):
            acknowledged, found = kill_once(Path(folder), rng=rng)
            lost += max(0, acknowledged - found)
            print(f"kill {kill + 1}: {acknowledged} acknowledged, {found} there")
    print(f"{num_kills} kills, {lost} acknowledged examples lost")


if __name__ == "__main__":
    main(int(sys.argv[1]))
