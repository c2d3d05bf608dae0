"""Random inputs for every reader, shared out over processes; prints how many inputs each reader was given.

    python scripts/fuzz.py [--inputs 100000] [--workers 2] [--seconds 0]

Each process runs tests/tasks/test_fuzz_readers.py with a seed of its own and its share of the inputs. With --seconds,
every process begins again with a new seed until the time is over; --inputs is then what all processes give once.
Exits 1 if a test failed; its process's output is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests" / "tasks" / "test_fuzz_readers.py"


def start(folder: Path, *, seed: int, share: int) -> subprocess.Popen[bytes]:
    """Start one process with its share of inputs; it writes to `seed`.log and its counts to `seed`.counts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-m", "fuzz"]
    command += [f"--hypothesis-seed={seed}", "--basetemp", str(folder / f"{seed}.tmp"), str(TESTS)]
    env = {
        **os.environ,
        "MANYICL_FUZZ": str(share),
        "MANYICL_FUZZ_COUNTS": str(folder / f"{seed}.counts"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / f"{seed}.hypothesis"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"{seed}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def run(folder: Path, *, inputs: int, workers: int, seconds: float) -> bool:
    """Run all processes; return whether none failed."""
    share, until, passed, seed = -(-inputs // workers), time.monotonic() + seconds, True, 0
    running: dict[int, subprocess.Popen[bytes]] = {}
    while True:
        for _ in range(workers - len(running) if not seed or (passed and time.monotonic() < until) else 0):
            running[seed] = start(folder, seed=seed, share=share)
            seed += 1
        if not running:
            return passed
        time.sleep(0.2)
        for done in [number for number, process in running.items() if process.poll() is not None]:
            if running.pop(done).returncode != 0:
                passed = False
                print((folder / f"{done}.log").read_text(encoding="utf-8", errors="replace"), flush=True)


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each reader")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    options = parser.parse_args()
    began = time.monotonic()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        passed = run(Path(folder), inputs=options.inputs, workers=options.workers, seconds=options.seconds)
        for path in Path(folder).glob("*.counts"):
            for line in path.read_text(encoding="utf-8").splitlines():
                name, count = line.rsplit(" ", 1)
                counts[name] += int(count)
    for name, count in sorted(counts.items()):
        print(f"{count:>9,} inputs  {name}")
    print(f"{time.monotonic() - began:.0f} s with {options.workers} processes; {'passed' if passed else 'FAILED'}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
