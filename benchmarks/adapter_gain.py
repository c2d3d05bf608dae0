"""What the packaged adapter `smollm2-many` gains over its base on tasks that it was not trained on, in minutes.

    python benchmarks/adapter_gain.py OUT [--tasks FOLDER] [--task NAME ...] [--max-tokens 2048] [--queries 15] \
        [--shots 0,16,fill]

Both answer the same queries after the same shots. A table shows their mean scores and the paired difference with its
95 % interval over draws and queries, a plot both curves. OUT keeps both results (`manyicl diff` reads them), and a run
that was stopped resumes. It needs SmolLM2-135M-Instruct: `make bases`, or a hub that can be reached.

Without --tasks: 12 tasks generated as 10 of the 20 that the adapter was trained on, from another seed and so with other
rules. With --tasks ../shared/data/tasks, or any folder that has them: the 16 public tasks of the adapter's card. Fewer
tokens, queries and draws than the card's keep it within a quarter of an hour on 2 cores; the card's own curve is

    python benchmarks/adapter_gain.py OUT --tasks FOLDER --max-tokens 8192 --queries 120 --draws 2 \
        --shots 0,1,4,16,64,fill
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean

import torch

import manyicl
from manyicl.cli.evaluate import parse_shots
from manyicl.cli.tables.results import difference_plot
from manyicl.console import make_console, reporting, tell_seconds
from manyicl.evaluation import Difference, compare_results
from manyicl.models.places import find_source

# Neither trained on nor used to choose among the adapter's variants (src/manyicl/models/smollm2_many/README.md).
PUBLIC_TASKS = (
    "aeslc", "agnews", "arc_easy", "atis", "commonsenseqa", "dialogsum", "mawps", "openbookqa", "rte", "sick", "snips",
    "snli", "sst2", "trec_coarse", "trec_fine", "tweet_emotion",
)  # fmt: skip
# Generated ones: how many, with how many rows, of a seed that is not the training's (77, scripts/smollm2_many.py).
WORLD_TASKS, WORLD_TRAIN, WORLD_TEST, WORLD_SEED = 12, 200, 40, 5
ADAPTER = "smollm2-many"


def tell_table(difference: Difference) -> str:
    """Return mean scores and the gain, by number of shots, in Markdown; a score in %, a difference in points."""
    lines = ["| shots | base, % | smollm2-many, % | gained, points |", "|---|---|---|---|"]
    for mean in difference.means:
        cells = [cell for cell in difference.cells if cell.shots == mean.shots and cell.task in mean.tasks]
        base, adapter = (100 * fmean(scores) for scores in zip(*((cell.a, cell.b) for cell in cells), strict=True))
        interval = "" if mean.low is None else f" [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"
        lines.append(f"| {mean.shots} | {base:.1f} | {adapter:.1f} | {100 * mean.difference:+.1f}{interval} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=Path, help="folder of task files; default: generated tasks")
    parser.add_argument("--task", nargs="+", help="tasks of the folder; default: the 16 of the adapter's card")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--shots", default="0,16,fill", help="comma-separated; fill: as many as fit")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    options = parser.parse_args()
    started = time.monotonic()
    folder, names = options.tasks, options.task or PUBLIC_TASKS
    if folder is None:
        folder, names = options.out / "tasks", None
        if not folder.exists():
            manyicl.write_world(
                folder, num_tasks=WORLD_TASKS, num_train=WORLD_TRAIN, num_test=WORLD_TEST, seed=WORLD_SEED
            )
    tasks = manyicl.load_tasks(folder, names=names)
    results = []
    for name, path in (("base", find_source(ADAPTER, "config.json")[0]), (ADAPTER, ADAPTER)):
        model = manyicl.load_for_inference(path, precision=options.precision, max_tokens=options.max_tokens)
        with reporting(make_console(stderr=True)) as on_progress:
            result = manyicl.evaluate(
                model,
                tasks,
                shots=parse_shots(options.shots),
                draws=options.draws,
                queries=options.queries,
                out=options.out / f"{name}.json",
                on_progress=on_progress,
            )
        results.append(result)
    gain = compare_results(*results)
    print(tell_table(gain))
    make_console().print(difference_plot(gain, names=("base", ADAPTER), colour=False) or "")
    spent = tell_seconds(time.monotonic() - started)
    print(f"\n{len(tasks)} tasks, {options.max_tokens:,} tokens, {torch.get_num_threads()} threads, {spent}")


if __name__ == "__main__":
    main()
