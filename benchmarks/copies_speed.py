"""Seconds and memory of looking for near-duplicates of inputs among others (copies.py).

    python benchmarks/copies_speed.py [--rows 100000] [--words 20]

Prints one JSON line: CPU seconds, the resident memory before (the inputs themselves) and at its peak, and how many
inputs have a near-duplicate: every tenth, by its making.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time

from manyicl.tasks.duplicates import CopyIndex


def write_inputs(count: int, *, words: int) -> tuple[list[str], list[str]]:
    """Return inputs, and others of which every tenth is one of them in capitals and without its full stop."""
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(5000)]
    shown = [f"{' '.join(rng.choices(known, k=words))}." for _ in range(count)]
    asked = [
        shown[n].upper().rstrip(".") if n % 10 == 0 else " ".join(rng.choices(known, k=words)) for n in range(count)
    ]
    return asked, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=20)
    options = parser.parse_args()
    asked, shown = write_inputs(options.rows, words=options.words)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    index = CopyIndex(shown, groups=[0] * len(shown))
    found = {query for query, _ in index.find_similar(asked)}
    told = {
        "rows": options.rows,
        "words": options.words,
        "cpu_s": round(time.process_time() - began, 1),
        "before_gib": round(before / 2**20, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "found": len(found),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
