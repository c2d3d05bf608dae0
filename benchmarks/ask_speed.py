"""How soon does `manyicl ask` answer, from a cold start, and how fast go the next hundred questions?

    python benchmarks/ask_speed.py [MODEL] [--tasks FOLDER --task NAME] [--rounds 3]

Each round starts the command twice: with one question, and with that one and a hundred more, which are the inputs of
the task in turn. It prints the seconds of the first and, from the difference, the questions per second of the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median

from manyicl.tasks import load_tasks

TICKETS = Path(__file__).parents[1] / "docs" / "example" / "tickets"
NUM_MORE = 100


def ask(model: str, tasks: Path, task: str, questions: list[str]) -> float:
    """Ask in a new process, and return its seconds from its start to its end.

    Raises:
        SystemExit: it failed, or did not answer each question.
    """
    command = [sys.executable, "-m", "manyicl", "ask", model, "--tasks", str(tasks), "--task", task]
    start = time.perf_counter()
    ended = subprocess.run(command, input="\n".join(questions), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if ended.returncode or len(ended.stdout.splitlines()) != len(questions):
        raise SystemExit(ended.stderr[-2000:] or f"{len(ended.stdout.splitlines())} answers to {len(questions)}")
    return seconds


def main() -> None:
    """Run the rounds and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-many")
    parser.add_argument("--tasks", type=Path, default=TICKETS)
    parser.add_argument("--task", default="tickets")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    (task,) = load_tasks(args.tasks, names=[args.task])
    inputs = [" ".join(example.input.split()) for example in task.train]  # a question is one line
    questions = list(islice(cycle(inputs), 1 + NUM_MORE))
    firsts, rates = [], []
    for round_ in range(args.rounds):
        first, all_ = (ask(args.model, args.tasks, args.task, questions[:number]) for number in (1, 1 + NUM_MORE))
        firsts.append(first)
        rates.append(NUM_MORE / max(all_ - first, 1e-3))
        print(f"round {round_ + 1}: first answer {first:.1f} s, then {rates[-1]:.1f} a second", flush=True)
    print(f"first answer {median(firsts):.1f} s [{min(firsts):.1f}, {max(firsts):.1f}]")
    print(f"the next {NUM_MORE}: {median(rates):.1f} a second [{min(rates):.1f}, {max(rates):.1f}]")


if __name__ == "__main__":
    main()
