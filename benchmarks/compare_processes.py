"""How much sooner does a comparison end if several processes share it?

    python benchmarks/compare_processes.py RECIPE [KEY=VALUE ...] --processes 2 [--rounds 3]

Each round runs the same comparison twice, from its start to its report: by one process, which has all cores or the
first GPU to itself, and by `--processes`; the order changes from round to round. It prints the seconds and the ratio
of each round. Results differ by rounding, since a process with other threads and memory sums in another order; with the
same threads on a CPU they are equal (tests/comparison/test_grid.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def run(recipe: str, overrides: list[str], *, processes: int, folder: Path) -> float:
    """Run the comparison into `folder`, and return its seconds."""
    command = [sys.executable, "-m", "manyicl", "compare", recipe, *overrides, "--out", str(folder)]
    start = time.perf_counter()
    ended = subprocess.run([*command, "--processes", str(processes)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    return time.perf_counter() - start


def main() -> None:
    """Run the rounds and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe with a [compare] section")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it")
    parser.add_argument("--processes", type=int, default=2, help="that share it")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ratios = []
    for round_ in range(args.rounds):
        seconds = {}
        for processes in sorted((1, args.processes), reverse=bool(round_ % 2)):
            with tempfile.TemporaryDirectory() as place:
                seconds[processes] = run(args.recipe, args.overrides, processes=processes, folder=Path(place) / "run")
            print(f"round {round_ + 1}: {processes} at work, {seconds[processes]:.1f} s", flush=True)
        ratios.append(seconds[1] / seconds[args.processes])
        print(f"round {round_ + 1}: ratio {ratios[-1]:.2f}", flush=True)
    print(f"{args.processes} processes: {median(ratios):.2f} times as fast [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
