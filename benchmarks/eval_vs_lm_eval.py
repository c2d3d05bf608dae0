"""The engine against lm-evaluation-harness: the same model, shots and queries, token for token.

    pip install ".[bench]"
    python benchmarks/eval_vs_lm_eval.py [--quick] [--model PATH] [--tasks DIR] [--peer-queries N]

Three tasks (77 known answers, 2 known answers, free answers), each behind 64 shots and behind the most that fit. Both
sides are handed one model in one process, so loading is in neither time. The peer runs its Hugging Face backend, its
`first_n` shots, and local task files that hold our template's own text, separators included; its requests
are tokenised and compared with the engine's ids. Its cost a query is constant, so it is timed on fewer
queries (as many as take about two minutes, unless said), and both ratios are printed: of one query's cost on each
side, measured, and of the whole at our number of queries, which multiplies the peer's cost and says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch

from manyicl.evaluation import AskedModel, evaluate, load_asked_model, tokenize_for
from manyicl.models import ModelSettings, load_config, load_model
from manyicl.prefix import encode_prefix, score_choices
from manyicl.sweep import Sweep, TaskSweep
from manyicl.tasks import Task, load_tasks
from manyicl.tokens import TaskTokenizer, join_examples, query_ids

SHARED = Path(__file__).parents[2] / "shared"
TASKS = ("banking77", "pros_cons", "webquestions")  # 77 known answers, 2, and free answers
MAX_TOKENS = 4096
PEER_SECONDS = 120.0
BATCH_SIZES = (1, 4, 16)
# Of a task with free answers, rows with longer ones are left out on both sides: one of them would set the limit of all.
MOST_ANSWER_CHARACTERS = 40


@dataclass(frozen=True)
class Cell:
    """One task behind one number of shots, as both sides are asked. queries: indices into the test split."""

    task: Task
    plan: TaskSweep
    shots: int
    queries: list[int]

    @property
    def name(self) -> str:
        return f"{self.task.name}_{self.shots}"


@dataclass(frozen=True)
class PeerAnswer:
    """What the peer said of one query. likelihoods: of each choice, None where it generated."""

    text: str
    likelihoods: list[float] | None


# What both are asked ---------------------------------------------------------------------------------------------


def load_both(path: str) -> AskedModel:
    """Return the model in fp32, its positions extended to MAX_TOKENS by linear RoPE where it knows fewer."""
    settings = ModelSettings(path=path, precision="fp32")
    known = load_config(settings).max_position_embeddings
    if known < MAX_TOKENS:
        rope = {"rope_type": "linear", "factor": MAX_TOKENS / known}
        changes = {"max_position_embeddings": MAX_TOKENS, "rope_parameters": rope}
        settings = settings.model_copy(update={"config": changes})
        print(f"{path}: {known} positions, extended to {MAX_TOKENS} by linear RoPE")
    plain = load_asked_model(path, weights=False)
    model = load_model(settings).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return AskedModel(path, model, plain.tokenizer, max_tokens=MAX_TOKENS, trained_shots={})


def load_chosen(folder: Path, names: Sequence[str]) -> list[Task]:
    """Return the tasks, free answers kept short."""
    tasks = []
    for task in load_tasks(folder, names=names):
        if not task.labels:
            parts = {
                split: tuple(e for e in getattr(task, split) if len(e.answer) <= MOST_ANSWER_CHARACTERS)
                for split in ("train", "validation", "test")
            }
            num_left_out = sum(len(getattr(task, split)) - len(kept) for split, kept in parts.items())
            print(f"{task.name}: {num_left_out} rows with more than {MOST_ANSWER_CHARACTERS} characters left out")
            task = replace(task, **parts, sha256=f"{task.sha256}-{MOST_ANSWER_CHARACTERS}")  # noqa: PLW2901
        tasks.append(task)
    return tasks


def make_cells(asked: AskedModel, task: Task, *, num_queries: int) -> list[Cell]:
    """Return the task behind 64 shots and behind the most that leave room for every query."""
    tokenized = tokenize_for(task, asked)

    def plan_of(shots: int) -> TaskSweep:
        sweep = Sweep((shots,), num_draws=1, num_queries=num_queries, max_tokens=asked.max_tokens)
        return TaskSweep(tokenized, tokenizer=asked.tokenizer, sweep=sweep)

    low, high = 0, len(tokenized.splits["train"])
    while low < high:  # the most shots behind which no query is left out
        middle = (low + high + 1) // 2
        plan = plan_of(middle)
        fits = bool(plan.asked_shots) and not plan.num_unfit
        low, high = (middle, high) if fits else (low, middle - 1)
    counts = sorted({min(64, low), low})
    return [Cell(task, plan_of(k), k, [int(q) for q in plan_of(k).queries]) for k in counts]


def piece(tokenizer: TaskTokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that `ids` add behind `before`: word-start marks show as they do inside a whole prompt."""
    start = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *ids])
    if not whole.startswith(start):
        raise SystemExit(f"{whole[-80:]!r} does not extend {start[-80:]!r}: this tokenizer's text cannot be cut here")
    return whole[len(start) :]


def task_rows(cell: Cell, *, split: str, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Return the peer's rows: `text` (input segment), `choices` and `gold`, or `target`; terminators included."""
    tokenizer, tokenized = cell.plan.tokenizer, cell.plan.tokenized
    tokens, rows = tokenized.splits[split], []
    terminator = tokenizer.terminator_ids
    head = tokenized.head_ids.tolist()
    for place, index in enumerate(indices):
        # In the peer's prompt a segment stands behind the last shot's terminator, the first one behind the head.
        before = terminator if place or split == "test" else (head or terminator)
        asked = query_ids(tokenized, split=split, index=index, after_shots=bool(place) or split == "test").tolist()
        answer = tokens.ids[tokens.answer_starts[index] : tokens.starts[index + 1]].tolist()
        row: dict[str, Any] = {"text": piece(tokenizer, before, asked)}
        known = cell.plan.written[cell.task.labels] if cell.task.labels else []
        if known:
            row["choices"] = [piece(tokenizer, asked, ids) for _, ids in known]
            row["gold"] = [ids for _, ids in known].index(answer)
        else:
            row["target"] = piece(tokenizer, asked, answer)
        rows.append(row)
    return rows


def task_config(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the peer's task file: all separators are in the rows, so that its own are empty."""
    tokenizer = cell.plan.tokenizer
    head = cell.plan.tokenized.head_ids.tolist()[len(tokenizer.bos_ids) :]
    config: dict[str, Any] = {
        "task": cell.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {
                "train": str(folder / f"{cell.name}.shots.jsonl"),
                "test": str(folder / f"{cell.name}.jsonl"),
            }
        },
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "description": tokenizer.decode(head),
        "doc_to_text": "text",
        "target_delimiter": "",
        "fewshot_delimiter": "",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": cell.shots,
        "metadata": {"version": 1},
    }
    if cell.task.labels:
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        return config | {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": metrics,
        }
    limits = {"until": [tokenizer.terminator], "max_gen_toks": cell.plan.max_new_tokens, "do_sample": False}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    return config | {
        "output_type": "generate_until",
        "doc_to_target": "target",
        "generation_kwargs": limits,
        "metric_list": metrics,
    }


def write_task(cell: Cell, folder: Path) -> None:
    """Write the peer's task file (JSON, which is YAML too) and its rows: shots in our order, queries in ours."""
    shots = cell.plan.draws[0][: cell.shots].tolist()
    for name, split, indices in ((f"{cell.name}.shots", "train", shots), (cell.name, "test", cell.queries)):
        lines = [json.dumps(row, ensure_ascii=False) for row in task_rows(cell, split=split, indices=indices)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{cell.name}.yaml").write_text(json.dumps(task_config(cell, folder), indent=1), encoding="utf-8")


# The peer ------------------------------------------------------------------------------------------------------


class Peer:
    """lm-evaluation-harness on the model that we ask."""

    def __init__(self, asked: AskedModel, folder: Path) -> None:
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise SystemExit('needs lm-evaluation-harness: pip install ".[bench]"') from None
        for name in ("lm_eval", "lm-eval", "transformers", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.asked = asked
        tokenizer = asked.tokenizer.tokenizer
        self.lm: Any = HFLM(pretrained=asked.model, tokenizer=tokenizer, batch_size=1, max_length=asked.max_tokens)
        self.tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def run(self, cell: Cell, *, num_queries: int) -> tuple[list[PeerAnswer], list[Any], float]:
        """Return the peer's answers to the first queries, its samples, and the seconds of the whole evaluation."""
        from lm_eval import simple_evaluate

        started = time.perf_counter()
        with Silence():
            result: Any = simple_evaluate(
                self.lm,
                tasks=[cell.name],
                task_manager=self.tasks,
                limit=num_queries,
                bootstrap_iters=0,
                log_samples=True,
            )
        seconds = time.perf_counter() - started
        samples = sorted(result["samples"][cell.name], key=lambda sample: sample["doc_id"])
        return [self._answer(cell, sample) for sample in samples], samples, seconds

    def _answer(self, cell: Cell, sample: Any) -> PeerAnswer:
        if not cell.task.labels:
            return PeerAnswer(str(sample["filtered_resps"][0]), None)
        likelihoods = [float(pair[0]) for pair in sample["filtered_resps"]]
        known = cell.plan.written[cell.task.labels]
        return PeerAnswer(known[int(np.argmax(likelihoods))][0], likelihoods)

    def request_ids(self, samples: Sequence[Any]) -> Iterator[list[int]]:
        """Yield the ids of each request of the samples, as the peer's own code makes them."""
        for sample in samples:
            for request in (
                sample["arguments"].values() if isinstance(sample["arguments"], dict) else sample["arguments"]
            ):
                context, rest = request.values() if isinstance(request, dict) else request
                if isinstance(rest, str):
                    ids = self.lm._encode_pair(context, rest)
                    yield [*ids[0], *ids[1]]
                else:
                    yield list(self.lm.tok_encode(context))


class Silence:
    """Keep what the peer prints off the terminal; its errors still come through."""

    def __enter__(self) -> None:
        self._null = Path(os.devnull).open("w")
        self._streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self._null

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._streams
        self._null.close()


# Compare ---------------------------------------------------------------------------------------------------------


def our_request_ids(cell: Cell, query: int) -> list[list[int]]:
    """Return what the engine feeds for one query: with each known answer, or up to where it generates."""
    tokenized = cell.plan.tokenized
    shots = cell.plan.draws[0][: cell.shots].astype(np.int32)
    before = join_examples(tokenized, split="train", indices=shots).ids.tolist()
    asked = [*before, *query_ids(tokenized, split="test", index=query, after_shots=cell.shots > 0).tolist()]
    known = cell.plan.written[cell.task.labels] if cell.task.labels else []
    return [[*asked, *ids] for _, ids in known] or [asked]


def check_tokens(cell: Cell, peer: Peer, samples: Sequence[Any]) -> int:
    """Return how many requests were compared; stop where one differs."""
    theirs = list(peer.request_ids(samples))
    ours = [ids for sample in samples for ids in our_request_ids(cell, cell.queries[sample["doc_id"]])]
    if theirs != ours:
        place = next(
            (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        pair = [tokens[place][-40:] if place < len(tokens) else None for tokens in (theirs, ours)]
        raise SystemExit(f"{cell.name}: request {place} differs in its tokens; theirs and ours end in {pair}")
    return len(ours)


def our_likelihoods(asked: AskedModel, cell: Cell, query: int) -> list[float]:
    """Return the engine's likelihood of each known answer to one query (nats, negative)."""
    tokenized = cell.plan.tokenized
    prefix = encode_prefix(asked.model, join_ids(cell))
    ids = query_ids(tokenized, split="test", index=query, after_shots=cell.shots > 0)
    options = [answer for _, answer in cell.plan.written[cell.task.labels]]
    (nats_O,) = score_choices(asked.model, prefix, [ids], [options])
    return (-nats_O).tolist()


def join_ids(cell: Cell) -> Any:
    """Return the ids of head and shots."""
    shots = cell.plan.draws[0][: cell.shots].astype(np.int32)
    return join_examples(cell.plan.tokenized, split="train", indices=shots).ids


def explain_difference(asked: AskedModel, cell: Cell, query: int, *, ours: str, theirs: PeerAnswer) -> str:
    """Return one line: what each said, and by how much each prefers its own answer.

    The peer moves the line break before an answer into the answer, which adds the same to every choice; margins
    between two choices do not see it.
    """
    if theirs.likelihoods is None:
        return f"query {query}: ours {ours!r}, theirs {theirs.text!r}"
    names = [name for name, _ in cell.plan.written[cell.task.labels]]
    mine = our_likelihoods(asked, cell, query)
    a, b = names.index(ours), names.index(theirs.text)
    return (
        f"query {query}: ours {ours!r} by {mine[a] - mine[b]:.2e} nats (ours: {mine[a]:.6f}, {mine[b]:.6f}), theirs"
        f" {theirs.text!r} by {theirs.likelihoods[b] - theirs.likelihoods[a]:.2e} (theirs: {theirs.likelihoods[a]:.6f},"
        f" {theirs.likelihoods[b]:.6f})"
    )


def largest_margin_error(asked: AskedModel, cell: Cell, theirs: Sequence[PeerAnswer]) -> float:
    """Return the largest difference in nats between the two sides' margins of a choice to the first choice."""
    worst = 0.0
    for query, answer in zip(cell.queries, theirs[:5], strict=False):
        mine, other = np.array(our_likelihoods(asked, cell, query)), np.array(answer.likelihoods)
        worst = max(worst, float(np.abs((mine - mine[0]) - (other - other[0])).max()))
    return worst


def run_ours(asked: AskedModel, cell: Cell) -> tuple[list[str], float]:
    """Return the engine's predictions in the order of the cell's queries, and the seconds of the whole evaluation."""
    started = time.perf_counter()
    result = evaluate(asked, [cell.task], shots=(cell.shots,), draws=1, queries=len(cell.queries))
    seconds = time.perf_counter() - started
    return [p.prediction for p in result.curves[0].predictions], seconds


def choose_batch(peer: Peer, cell: Cell) -> tuple[int, float]:
    """Return the peer's fastest batch size on this cell, and its seconds a query there."""
    seconds: dict[int, float] = {}
    whole = our_request_ids(cell, cell.queries[0])
    start = len(whole[0]) - len(cell.plan.written[cell.task.labels][0][1]) if cell.task.labels else 0
    for size in BATCH_SIZES:
        peer.lm.batch_size_per_gpu = size
        started = time.perf_counter()
        if cell.task.labels:  # each choice is a request
            requests = [(("", ""), whole[n % len(whole)][:start], whole[n % len(whole)][start:]) for n in range(size)]
            peer.lm._loglikelihood_tokens(requests, disable_tqdm=True)
            seconds[size] = (time.perf_counter() - started) / size * len(whole)
        else:
            peer.run(cell, num_queries=size)
            seconds[size] = (time.perf_counter() - started) / size
        if min(seconds.values()) < seconds[size]:
            break  # larger ones only pad more
    best = min(seconds, key=seconds.__getitem__)
    peer.lm.batch_size_per_gpu = best
    return best, seconds[best]


def compare_cell(asked: AskedModel, peer: Peer, cell: Cell, options: argparse.Namespace) -> tuple[int, int]:
    """Print one cell's comparison; return (equal, compared) predictions."""
    batch, guess = choose_batch(peer, cell)
    num = options.peer_queries or max(1, int(options.peer_seconds / options.repeats / guess))
    num = min(num, len(cell.queries))
    if options.repeats > 1:
        run_ours(asked, cell)  # both are warm now
    our_s, peer_s = [], []
    for _ in range(options.repeats):  # interleaved, so that a busy machine is busy for both
        ours, seconds = run_ours(asked, cell)
        our_s.append(seconds)
        theirs, samples, seconds = peer.run(cell, num_queries=num)
        peer_s.append(seconds)
    num_requests = check_tokens(cell, peer, samples[:3])
    pairs = list(zip(cell.queries, ours, theirs, strict=False))
    different = [(q, mine, other) for q, mine, other in pairs if mine != other.text]
    per_query = sorted(b / num / (a / len(cell.queries)) for a, b in zip(our_s, peer_s, strict=True))
    print(f"\n{cell.task.name}, {cell.shots} shots of {len(join_ids(cell)):,} tokens, {len(cell.queries)} queries")
    print(f"  tokens: {num_requests} requests of the peer are the engine's, id for id")
    print(f"  equal predictions: {len(pairs) - len(different)} of {len(pairs)}")
    for query, mine, other in different:
        print("    " + explain_difference(asked, cell, query, ours=mine, theirs=other))
    if cell.task.labels:
        print(f"  largest difference of a likelihood's margin: {largest_margin_error(asked, cell, theirs):.1e} nats")
    print(f"  ours: {told(our_s)} s for {len(cell.queries)} queries")
    print(f"  lm-eval: {told(peer_s)} s for {num} queries (batch {batch}, the fastest of those tried)")
    print(f"  a query's cost, lm-eval's over ours: {told(per_query)} times")
    whole = statistics.median(peer_s) / num * len(cell.queries)
    print(
        f"  {len(cell.queries)} queries at lm-eval would take {whole:,.0f} s"
        + ("" if num == len(cell.queries) else f" (extrapolated: {num} measured, its cost a query is constant)")
    )
    return len(pairs) - len(different), len(pairs)


def told(values: Sequence[float]) -> str:
    """Return the median with its lowest and highest."""
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def main() -> None:
    """Run all cells; exit 1 where fewer than 99.9 % of the predictions are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--tasks", type=Path, default=SHARED / "data" / "tasks", help="folder of task files")
    parser.add_argument("--task", action="append", help=f"repeat for more; {', '.join(TASKS)} unless said")
    parser.add_argument("--queries", type=int, default=500, help="ours")
    parser.add_argument("--peer-queries", type=int, help="the peer's; what takes about two minutes a cell unless said")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="20 queries, 10 seconds of the peer a cell, once")
    options = parser.parse_args()
    options.peer_seconds = PEER_SECONDS
    if options.quick:
        options.queries, options.repeats, options.peer_seconds = min(20, options.queries), 1, 10.0
    asked = load_both(options.model)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.model.device}, fp32")
    equal = compared = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
        tasks = load_chosen(options.tasks, options.task or TASKS)
        cells = [cell for task in tasks for cell in make_cells(asked, task, num_queries=options.queries)]
        for cell in cells:
            write_task(cell, Path(name))
        peer = Peer(asked, Path(name))
        for cell in cells:
            sys.stdout.flush()
            num_equal, num_compared = compare_cell(asked, peer, cell, options)
            equal, compared = equal + num_equal, compared + num_compared
    print(f"\nequal predictions: {equal} of {compared} ({100 * equal / compared:.2f} %)")
    if equal < 0.999 * compared:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
