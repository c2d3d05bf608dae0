"""Which score should choose among known answers: six ways on the same forward passes, real tasks, few and many shots.

    python benchmarks/calibrated_choices.py MODEL --tasks FOLDER --kept KEPT.json [--task NAME ...] [--shots 4 32 fill]

MODEL: a checkpoint, such as one that `make bases` makes. FOLDER: task files (../shared/data/tasks). A choice's
log-probability after shots and input is `s`; the ways are

- none: s. tokens, characters, bytes: s divided by the choice's length (its tokens include the terminator). These are
  lm-evaluation-harness's acc, acc_norm (which divides by characters) and acc_bytes.
- contextual: s - log p, with p the choices' mean probabilities after content-free inputs ("N/A", "[MASK]" and an empty
  one) behind the same shots (Zhao et al. 2021, arXiv 2102.09690).
- pmi: s - the choice's log-probability after the text before every answer alone, without shots and input (PMI_DC,
  Holtzman et al. 2021, arXiv 2104.08315; acc_mutual_info is nearly that).

Prints a table in Markdown: each way's accuracy minus that of `none`, in points, with paired 95 % intervals over draws
and queries. KEPT.json keeps what the model said, task by task: a second call prints the table at once, and a stopped
one goes on. About half an hour a model on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from manyicl.episodes import query_ids
from manyicl.evaluation import Sweep, TaskSweep
from manyicl.files import write_atomically
from manyicl.inference import Engine, InferenceModel, choose_engine, load_for_inference, tokenize_for, write_queries
from manyicl.intervals import Table, difference_interval, score_interval
from manyicl.tasks import load_tasks

# Options of one word, of a few words and of a whole clause; some the same in all rows and some different in each.
TASKS = (
    "sst2", "agnews", "trec_coarse", "tweet_emotion", "rte", "mrpc", "snips", "openbookqa", "arc_easy",
    "piqa", "commonsenseqa", "winogrande",
)  # fmt: skip
CONTENT_FREE = ("N/A", "[MASK]", "")
WAYS = ("none", "tokens", "characters", "bytes", "contextual", "pmi")


def ask_task(engine: Engine, model: InferenceModel, sweep: TaskSweep) -> list[dict[str, Any]]:
    """Return the nats of each query's choices, and of the same choices without content, by draw and shots."""
    queries = sweep.queries.tolist()
    pairs = [sweep.written[sweep.candidates[query]] for query in queries]
    options = [[ids for _, ids in one] for one in pairs]
    test = sweep.tokenized.splits["test"].rows
    rows = []
    bare = [np.asarray(model.tokenizer.bos_ids + model.tokenizer.before_answer_ids, dtype=np.int32)]
    alone = score_apart(engine, engine.encode(bare[0][:0]), bare, options)
    for draw, shots in sweep.points:
        num_shots = sweep.num_shots(draw, shots)
        prefix = engine.encode(sweep.tokenized.head_ids)
        prefix = engine.encode(sweep.prefix_ids(draw, start=0, stop=num_shots), after=prefix)
        asked = [query_ids(sweep.tokenized, split="test", index=query, after_shots=True) for query in queries]
        nats = engine.score(prefix, asked, options)
        free = write_queries(model.tokenizer, CONTENT_FREE, after_shots=True)
        content_free = score_apart(engine, prefix, free, options)
        for place, query in enumerate(queries):
            example = sweep.task.test[test[query]]
            rows.append(
                {
                    "draw": draw,
                    "shots": shots,
                    "query": example.id,
                    "choices": [text for text, _ in pairs[place]],
                    "tokens": [len(ids) for ids in options[place]],
                    "right": list(example.answers),
                    "nats": nats[place].tolist(),
                    "content_free": [one.tolist() for one in content_free[place]],
                    "alone": alone[place][0].tolist(),
                }
            )
    return rows


def score_apart(engine: Engine, prefix: Any, queries: Sequence[Any], options: Sequence[Any]) -> list[list[Any]]:
    """Return the nats of every query's options after each of a few other inputs; equal options are scored once."""
    places: dict[str, int] = {}
    distinct = []
    for one in options:
        if json.dumps(one) not in places:
            places[json.dumps(one)] = len(distinct)
            distinct.append(one)
    scored = [engine.score(prefix, [query] * len(distinct), distinct) for query in queries]
    return [[group[places[json.dumps(one)]] for group in scored] for one in options]


def score_choices(row: Mapping[str, Any], way: str) -> Any:
    """Return the score of each choice, of which the highest is chosen."""
    logprobs = -np.array(row["nats"])
    if way == "tokens":
        return logprobs / np.array(row["tokens"])
    if way == "characters":
        return logprobs / np.array([len(text) for text in row["choices"]])
    if way == "bytes":
        return logprobs / np.array([len(text.encode()) for text in row["choices"]])
    if way == "contextual":
        free = log_softmax(-np.array(row["content_free"]), axis=1)
        return logprobs - (logsumexp(free, axis=0) - np.log(len(free)))
    if way == "pmi":
        return logprobs + np.array(row["alone"])
    return logprobs


def is_right(row: Mapping[str, Any], way: str) -> float:
    """Return 1.0 if a way chooses a right answer, else 0.0."""
    return float(row["choices"][int(np.argmax(score_choices(row, way)))] in row["right"])


def make_tables(rows: Sequence[Mapping[str, Any]], way: str) -> Table:
    """Return right and wrong answers by draw and query."""
    draws = sorted({row["draw"] for row in rows})
    queries = tuple(dict.fromkeys(row["query"] for row in rows))
    cells = {(row["draw"], row["query"]): is_right(row, way) for row in rows}
    return Table(np.array([[cells[draw, query] for query in queries] for draw in draws]), queries)


def print_table(kept: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print accuracy by task, and each way's difference to `none`."""
    print(f"| task | shots | queries | {' | '.join(f'{way}' for way in WAYS)} |")
    print(f"|---|---|---|{'---|' * len(WAYS)}")
    for shots in dict.fromkeys(row["shots"] for rows in kept.values() for row in rows):
        tables: dict[str, dict[str, Table]] = {way: {} for way in WAYS}
        for task, rows in kept.items():
            here = [row for row in rows if row["shots"] == shots]
            if not here:
                continue
            cells = []
            for way in WAYS:
                tables[way][task] = make_tables(here, way)
                scored = score_interval([{task: tables[way][task]}])
                cells.append(f"{100 * scored.mean:.1f} [{100 * scored.low:.0f}, {100 * scored.high:.0f}]")
            print(f"| {task} | {shots} | {len(tables['none'][task].queries)} | {' | '.join(cells)} |")
        base = tables["none"]
        means, cells = [], []
        for way in WAYS:
            means.append(f"{100 * np.mean([table.scores.mean() for table in tables[way].values()]):.1f}")
            gaps = {task: Table(one.scores - base[task].scores, one.queries) for task, one in tables[way].items()}
            gap = difference_interval([gaps])
            cells.append(
                f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]" if way != "none" else ""
            )
        print(f"| **mean of {len(base)}** | {shots} | | {' | '.join(means)} |")
        print(f"| **minus none** | {shots} | | {' | '.join(cells)} |")


def main() -> None:
    """Ask the model what is not kept yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task files")
    parser.add_argument("--task", action="append", help="a task of the folder; repeat for more")
    parser.add_argument("--kept", type=Path, required=True, help="file that keeps what the model said")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--shots", nargs="+", default=["4", "32"], help="numbers of shots; fill: as many as fit")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of shots, input and answer together")
    args = parser.parse_args()
    kept = json.loads(args.kept.read_text()) if args.kept.exists() else {}
    missing = [name for name in args.task or TASKS if name not in kept]
    if missing:
        model = load_for_inference(args.model, precision="fp32", max_tokens=args.max_tokens)
        shots = tuple("fill" if text == "fill" else int(text) for text in args.shots)
        settings = Sweep(shots, num_draws=args.draws, num_queries=args.queries, max_tokens=args.max_tokens)
        with choose_engine(model) as engine:
            for name in missing:
                [task] = load_tasks(args.tasks, names=[name])
                sweep = TaskSweep(tokenize_for(task, model), tokenizer=model.tokenizer, sweep=settings)
                kept[name] = ask_task(engine, model, sweep)
                write_atomically(args.kept, json.dumps(kept))
                print(f"{name}: {len(kept[name])} answers", flush=True)
    print_table(kept)


if __name__ == "__main__":
    main()
