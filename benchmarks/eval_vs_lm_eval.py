"""The engine against lm-evaluation-harness: the same model, shots and queries, token for token.

    pip install ".[bench]"
    python benchmarks/eval_vs_lm_eval.py --model MODEL --out rows.jsonl [--rows banking77:64,gsm8k:most]
                                         [--precision fp32] [--peer-minutes 20] [--device cuda] [--threads N]
    python benchmarks/eval_vs_lm_eval.py --report rows.jsonl [more.jsonl ...]

A row is a task and a number of shots: 64, or the most that fit 4,096 tokens. Rows are independent, so several can run
as processes of their own (`taskset -c 0,1 python ... --rows banking77:64 --out 1.jsonl`). Both sides are given one
model in one process, so loading is in neither time. The peer runs its Hugging Face backend with the fastest batch size
of those tried, its own sampler over our shots in our order, and local task files with our template's text, separators
included; its requests are tokenised by its own code and compared with the engine's ids.

Ours is timed whole, with tokenising, statistics and audits, over all queries. Where that takes less than OURS_S
seconds, it is run once untimed, as the peer's batch sizes are, and then as often as fits OURS_S; the round has the
median. The peer encodes the whole prompt for every option of every query. It is timed inside `loglikelihood` and
`generate_until` only (leaving out its set-up is in its favour), on random queries, further ones in each round, as many
as --peer-minutes per row allow. If one query is longer than a round's part of that time, the peer is given some of its
options only: the ratio is then per request, and the predictions are compared among these options; the output says so.
Rounds alternate: ours, then the peer.

Every query that the peer has answered is compared, and each difference is printed with the margins of both sides. In
bf16 two correct kernels differ, so the peer answers part of the queries again with another attention kernel ("eager"
instead of "sdpa", not timed): its agreement with itself is what our agreement with it is judged by. If `--report` is
given the files of both precisions, it also counts how often each side gives its float32 answer in bf16.

A batch of the peer's that fails, as when its logits of batch x tokens x vocabulary do not fit the memory, is halved
until it runs. Only the run that succeeds is timed; the row names each size that failed and why.

Each finished round is one JSON line of --out; the same call again goes on from there.

MODEL: `seed`, the package's own (4,096 positions; anyone has it); a folder; or random:WIDTHxLAYERS, a Llama with random
weights, to see how the ratio depends on the model's size.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from manyicl.episodes.tokenized import join_examples, query_ids
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.points import Prediction
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.model import InferenceModel, load_for_inference, tokenize_for
from manyicl.intervals import t_interval
from manyicl.models.lean_layers import join_projections
from manyicl.models.loading import ModelSettings, load_config, load_model
from manyicl.models.precision import Precision
from manyicl.tasks.task import Task, load_tasks

SHARED = Path(__file__).parents[2] / "shared"
# 77 known answers, 2 known answers, short free answers, and worked solutions, of which fewer than 64 fit.
ROWS = "banking77:64,banking77:most,pros_cons:64,pros_cons:most,webquestions:64,webquestions:most,gsm8k:most"
MAX_TOKENS = 4096
BATCH_SIZES = {"cpu": (1, 4, 16), "cuda": (1, 4, 16, 64)}
# A choice between answers that are so near is rounding's, in float32.
TIE_NATS = 1e-3
# Task -> characters. Rows with a longer free answer are left out on both sides: one would set the limit of all.
MOST_ANSWER_CHARACTERS = {"webquestions": 40}
# Seconds that ours is timed for in a round, in whole evaluations, at least one.
OURS_S = 3.0
# Prompts in one batch of its eager attention, which writes all weights of attention to memory.
EAGER_BATCH = 8


@dataclass  # not frozen: it keeps its rows
class Cell:
    """One task behind one number of shots, as both sides are asked. queries: indices into the test split."""

    task: Task
    plan: TaskSweep
    shots: int
    queries: list[int]
    label: str  # "64" or "most", as it is named in --rows
    options: tuple[int, ...] = ()  # those of the known answers that the peer is asked; empty: all

    @property
    def row(self) -> str:
        return f"{self.task.name}:{self.label}"

    @property
    def name(self) -> str:
        """The peer's task."""
        part = "_options_" + "_".join(map(str, self.options)) if self.options else ""
        return f"{self.task.name}_{self.label}{part}"

    @property
    def known(self) -> list[tuple[str, Any]]:
        """The known answers that both are compared on, with their ids; empty of a task with free answers."""
        known = self.plan.written[self.task.labels] if self.task.labels else []
        return [known[place] for place in self.options] or list(known)

    @property
    def requests(self) -> int:
        """Requests of the peer per query."""
        return len(self.known) or 1

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The queries as the peer's task file has them."""
        return task_rows(self, split="test", indices=self.queries)


@dataclass(frozen=True)
class PeerAnswer:
    """What the peer said of one query. likelihoods: of each choice, None where it generated."""

    text: str
    likelihoods: list[float] | None


@dataclass(frozen=True)
class PeerRun:
    """Queries that the peer has answered, with its samples. seconds: of the run that succeeded.

    batch: requests per forward pass in it. failed: larger sizes that were tried, each with its error.
    """

    answers: list[PeerAnswer]
    samples: list[Any]
    seconds: float
    batch: int
    failed: dict[int, str]


# What both are asked ---------------------------------------------------------------------------------------------


def load_both(path: str, *, device: str = "cpu", precision: Precision = "fp32") -> InferenceModel:
    """Return the model, its positions extended to MAX_TOKENS by linear RoPE if it knows fewer."""
    if path.startswith("random:"):
        plain = load_for_inference("seed", weights=False)
        model = random_llama(path.removeprefix("random:"), vocab_size=len(plain.tokenizer.tokenizer))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return InferenceModel(path, model.to(device, dtype), plain.tokenizer, max_tokens=MAX_TOKENS, trained_shots={})
    settings = ModelSettings(path=path, precision=precision)
    known = load_config(settings).max_position_embeddings
    if known < MAX_TOKENS:
        rope = {"rope_type": "linear", "factor": MAX_TOKENS / known}
        changes = {"max_position_embeddings": MAX_TOKENS, "rope_parameters": rope}
        settings = settings.model_copy(update={"config": changes})
        print(f"{path}: {known} positions, extended to {MAX_TOKENS} by linear RoPE")
    plain = load_for_inference(path, weights=False)
    model = load_model(settings).to(device).eval()
    if device == "cuda":  # as `load_for_inference` does; the peer's own code reads the same weights
        join_projections(model)
    tokenizer = split_at_terminators(plain.tokenizer)
    return InferenceModel(path, model, tokenizer, max_tokens=MAX_TOKENS, trained_shots={})


def split_at_terminators(tokenizer: TaskTokenizer) -> TaskTokenizer:
    """Return a tokenizer that gives a whole prompt the ids of its segments, for both sides.

    The engine joins the ids of segments; the peer tokenises one string, in which a terminator before a letter may
    become other tokens. Here a terminator is always a piece of its own.
    """
    text = f"yes{tokenizer.terminator}Input"
    apart = [i for part in ("yes", tokenizer.terminator, "Input") for i in plain_ids(tokenizer.tokenizer, part)]
    if plain_ids(tokenizer.tokenizer, text) == apart:
        return tokenizer
    changed = copy.deepcopy(tokenizer.tokenizer)
    before = changed.backend_tokenizer.pre_tokenizer
    split = pre_tokenizers.Split(tokenizer.terminator, "isolated")
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, before] if before else [split])
    print("tokenizer: changed on both sides so that every terminator is a piece of its own")
    return TaskTokenizer(changed, tokenizer.settings, frame=tokenizer.frame, end_ids=tokenizer.end_ids)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of the text without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def random_llama(shape: str, *, vocab_size: int) -> Any:
    """Return a Llama of random weights; shape: WIDTHxLAYERS, heads of 64."""
    width, layers = (int(part) for part in shape.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=MAX_TOKENS,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def load_rows(asked: InferenceModel, options: argparse.Namespace) -> list[Cell]:
    """Return the chosen rows in their order."""
    named = [row.partition(":")[::2] for row in options.rows.split(",")]
    if not options.tasks.is_dir():
        raise SystemExit(
            f"--tasks {options.tasks}: no such folder; name one with task files (`manyicl world FOLDER` writes some),"
            " and its tasks in --rows"
        )
    tasks = {task.name: shorten(task) for task in load_tasks(options.tasks, names=[name for name, _ in named])}
    return [make_cell(asked, tasks[name], label, num_queries=options.queries) for name, label in named]


def shorten(task: Task) -> Task:
    """Return the task without the rows that have too long a free answer."""
    most = MOST_ANSWER_CHARACTERS.get(task.name, 0)
    if not most:
        return task
    parts = {
        split: tuple(e for e in getattr(task, split) if len(e.answer) <= most)
        for split in ("train", "validation", "test")
    }
    num_left_out = sum(len(getattr(task, split)) - len(kept) for split, kept in parts.items())
    print(f"{task.name}: {num_left_out} rows with more than {most} characters left out")
    return replace(task, **parts, sha256=f"{task.sha256}-{most}")


def make_cell(asked: InferenceModel, task: Task, label: str, *, num_queries: int) -> Cell:
    """Return the task after so many shots, or after the most that leave room for every query."""
    tokenized = tokenize_for(task, asked)

    def plan_of(shots: int) -> TaskSweep:
        sweep = Sweep((shots,), num_draws=1, num_queries=num_queries, max_tokens=asked.max_tokens)
        return TaskSweep(tokenized, tokenizer=asked.tokenizer, sweep=sweep)

    low, high = 0, len(tokenized.splits["train"])
    while low < high:  # the most shots after which no query is left out
        middle = (low + high + 1) // 2
        plan = plan_of(middle)
        fits = bool(plan.asked_shots) and not plan.num_unfit
        low, high = (middle, high) if fits else (low, middle - 1)
    if label != "most" and not (label.isdigit() and int(label) <= low):
        raise SystemExit(f"--rows {task.name}:{label}: give a number of shots up to {low}, or 'most'")
    shots = low if label == "most" else int(label)
    plan = plan_of(shots)
    return Cell(task, plan, shots, [int(q) for q in plan.queries], label)


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
        if split == "test" and cell.task.labels:
            row["choices"] = [piece(tokenizer, asked, ids) for _, ids in cell.known]
            row["gold"] = next((n for n, (_, ids) in enumerate(cell.known) if ids == answer), 0)
        elif cell.task.labels:
            row["choices"], row["gold"] = [piece(tokenizer, asked, answer)], 0
        else:
            row["target"] = piece(tokenizer, asked, answer)
        rows.append(row)
    return rows


def task_config(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the peer's task file: all separators are in the rows, so that its own are empty."""
    tokenizer = cell.plan.tokenizer
    head = cell.plan.tokenized.head_ids.tolist()
    if list(tokenizer.tokenizer("a")["input_ids"])[: len(tokenizer.bos_ids)] == tokenizer.bos_ids:
        head = head[len(tokenizer.bos_ids) :]  # the peer's tokenizer writes it
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
    for name, rows in (
        (f"{cell.name}.shots", task_rows(cell, split="train", indices=shots)),
        (cell.name, cell.rows),
    ):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{cell.name}.yaml").write_text(json.dumps(task_config(cell, folder), indent=1), encoding="utf-8")


# The peer ------------------------------------------------------------------------------------------------------


class Peer:
    """lm-evaluation-harness on the model that we ask."""

    def __init__(self, asked: InferenceModel, folder: Path) -> None:
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise SystemExit('needs lm-evaluation-harness: pip install ".[bench]"') from None
        for name in ("lm_eval", "lm-eval", "transformers", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.asked = asked
        tokenizer = asked.tokenizer.tokenizer
        # Sums of log-probabilities in float32 on both sides: bf16 rounds them to a sixteenth of a nat.
        self.lm: Any = HFLM(
            pretrained=asked.model,
            tokenizer=tokenizer,
            batch_size=1,
            max_length=asked.max_tokens,
            softmax_dtype="float32",
        )
        self.seconds = 0.0  # inside its requests
        self.lm.loglikelihood = self._timed(self.lm.loglikelihood)
        self.lm.generate_until = self._timed(self.lm.generate_until)
        self.folder, self.manager = folder, TaskManager
        self.written: dict[str, Any] = {}

    def tasks_of(self, cell: Cell) -> Any:
        """Return the peer's own view of the cell's task file, which is written the first time."""
        if cell.name not in self.written:
            write_task(cell, self.folder)
            self.written[cell.name] = self.manager(include_path=str(self.folder), include_defaults=False)
        return self.written[cell.name]

    def run(self, cell: Cell, *, places: Sequence[int]) -> tuple[list[PeerAnswer], list[Any], float]:
        """Return the peer's answers to the cell's queries at `places`, its samples, and the seconds of its requests."""
        from lm_eval import simple_evaluate

        before = self.seconds
        with Silence():
            result: Any = simple_evaluate(
                self.lm,
                tasks=[cell.name],
                task_manager=self.tasks_of(cell),
                samples={cell.name: list(places)},
                bootstrap_iters=0,
                log_samples=True,
            )
        # Its numbers of samples start anew in each subset.
        samples = sorted(result["samples"][cell.name], key=lambda sample: sample["doc_id"])
        texts = [sample["doc"]["text"] for sample in samples]
        if texts != [cell.rows[place]["text"] for place in places]:
            raise SystemExit(f"{cell.name}: the peer asked other queries than those it was given")
        return [self._answer(cell, sample) for sample in samples], samples, self.seconds - before

    def run_in_memory(self, cell: Cell, *, places: Sequence[int], batch: int) -> PeerRun:
        """Run the queries at `places` with `batch` requests at a time, halved until a whole run succeeds.

        Raises:
            RuntimeError: one request at a time fails as well.
        """
        failed: dict[int, str] = {}
        free_memory()  # what our side has cached is the peer's now
        while True:
            self.lm.batch_size_per_gpu = batch
            done, fault = attempt(lambda: self.run(cell, places=places), last=batch == 1)
            if done is not None:
                return PeerRun(*done, batch=batch, failed=failed)
            print(f"{cell.row}: lm-eval fails with {batch} requests at a time ({fault}); {batch // 2} are next")
            failed[batch] = fault
            batch //= 2

    def _timed(self, ask: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return ask(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return run

    def _answer(self, cell: Cell, sample: Any) -> PeerAnswer:
        if not cell.task.labels:
            return PeerAnswer(str(sample["filtered_resps"][0]), None)
        likelihoods = [float(pair[0]) for pair in sample["filtered_resps"]]
        return PeerAnswer(cell.known[int(np.argmax(likelihoods))][0], likelihoods)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Let the model attend by its eager code in the block."""
        model = self.asked.model
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(before)

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


def attempt(run: Callable[[], Any], *, last: bool) -> tuple[Any, str]:
    """Return (what `run` returns, ''), or (None, its error) if it fails; the `last` attempt raises its error.

    Every RuntimeError counts: memory that has run out is a torch.OutOfMemoryError on a GPU, but a plain RuntimeError on
    a CPU and in CUDA's libraries.
    """
    try:
        return run(), ""
    except RuntimeError as error:
        if last:
            raise
        fault = first_line(error)
    free_memory()  # after the block: until then the error's traceback holds the tensors of the failed run
    return None, fault


def first_line(error: Exception) -> str:
    """Return the error's first sentence."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def free_memory() -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    return [[*asked, *ids] for _, ids in cell.known] or [asked]


def check_tokens(cell: Cell, peer: Peer, samples: Sequence[Any], *, places: Sequence[int]) -> int:
    """Return how many requests were compared; stop where one differs."""
    theirs = list(peer.request_ids(samples))
    ours = [ids for place in places for ids in our_request_ids(cell, cell.queries[place])]
    if theirs != ours:
        place = next(
            (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        pair = [tokens[place][-40:] if place < len(tokens) else None for tokens in (theirs, ours)]
        raise SystemExit(f"{cell.name}: request {place} differs in its tokens; theirs and ours end in {pair}")
    return len(ours)


def run_ours(asked: InferenceModel, cell: Cell, *, queries: int = 0) -> tuple[list[Prediction], float]:
    """Return the engine's predictions in the order of the cell's queries, and the seconds of the whole evaluation.

    queries: 0 means all of the cell's.
    """
    started = time.perf_counter()
    result = evaluate(asked, [cell.task], shots=(cell.shots,), draws=1, queries=queries or len(cell.queries))
    return list(result.curves[0].predictions), time.perf_counter() - started


def time_ours(asked: InferenceModel, cell: Cell) -> tuple[list[Prediction], list[float]]:
    """Return the engine's predictions, and the seconds of each timed run: one if it is long, else several warm ones."""
    predictions, seconds = run_ours(asked, cell)
    if seconds >= OURS_S:
        return predictions, [seconds]
    times: list[float] = []
    while not times or sum(times) + min(times) < OURS_S:
        times.append(run_ours(asked, cell)[1])
    return predictions, times


def join_ids(cell: Cell) -> Any:
    """Return the ids of head and shots."""
    shots = cell.plan.draws[0][: cell.shots].astype(np.int32)
    return join_examples(cell.plan.tokenized, split="train", indices=shots).ids


def compare_answer(
    asked: InferenceModel, cell: Cell, place: int, *, ours: Prediction, theirs: PeerAnswer
) -> dict[str, Any]:
    """Return what both said of one query; where they differ, by how much each prefers its own answer.

    The peer moves the line break before an answer into the answer, which adds the same to every choice; margins
    between two choices do not see it. It leaves special tokens out of its text, so ours are left out as well.
    """
    mine = ours.prediction
    if theirs.likelihoods is None:
        for special in asked.tokenizer.tokenizer.all_special_tokens:
            mine = mine.replace(special, "")
        found: dict[str, Any] = {"place": place, "ours": mine, "theirs": theirs.text, "equal": mine == theirs.text}
        return found if found["equal"] else found | plain_answer(asked, cell, place)
    names = [name for name, _ in cell.known]
    assert ours.choice_nll is not None
    if cell.options:
        mine = min(names, key=ours.choice_nll.__getitem__)
    logs = -np.array([ours.choice_nll[name] for name in names]), np.array(theirs.likelihoods)
    found = {
        "place": place,
        "ours": mine,
        "theirs": theirs.text,
        "equal": mine == theirs.text,
        "margin_error": float(np.abs((logs[0] - logs[0][0]) - (logs[1] - logs[1][0])).max()),
    }
    if not found["equal"]:
        a, b = names.index(mine), names.index(theirs.text)
        pairs = [[float(side[a]), float(side[b])] for side in logs]
        margins = [pairs[0][0] - pairs[0][1], pairs[1][1] - pairs[1][0]]
        found |= {"our_nats": pairs[0], "their_nats": pairs[1], "margins": margins}
    return found


@torch.inference_mode()
def plain_answer(asked: InferenceModel, cell: Cell, place: int) -> dict[str, Any]:
    """Return transformers' own greedy answer to the prompt alone, and the smallest lead of a token in it, in nats."""
    (ids,) = our_request_ids(cell, cell.queries[place])
    prompt = torch.tensor([ids], device=asked.model.device)
    output = asked.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=cell.plan.max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    told = output.sequences[0, len(ids) :].tolist()
    leads = [float(first - second) for first, second in (step[0].float().topk(2).values for step in output.logits)]
    text = asked.tokenizer.tokenizer.decode(told, skip_special_tokens=True).split(asked.tokenizer.terminator)[0]
    return {"alone": text, "margins": [min(leads)]}


def choose_batch(peer: Peer, cell: Cell, *, seconds: float) -> tuple[int, float]:
    """Return the peer's fastest batch size on this cell, and its seconds per query there.

    seconds: a size is tried only if it should take no longer.
    """
    found: dict[int, float] = {}
    for size in BATCH_SIZES[peer.asked.model.device.type]:
        if found and min(found.values()) / cell.requests * size > seconds:
            break
        for _ in range(1 + (not found)):  # the first one warms up
            took, fault = attempt(lambda size=size: try_batch(peer, cell, size), last=size == 1)
        if fault:
            print(f"{cell.row}: lm-eval fails with {size} requests at a time ({fault})")
            break
        found[size] = took
        if min(found.values()) < took:
            break  # larger ones only pad more
    best = min(found, key=found.__getitem__)
    return best, found[best]


def try_batch(peer: Peer, cell: Cell, size: int) -> float:
    """Return the peer's seconds per query of the cell's with one batch of `size` requests."""
    peer.lm.batch_size_per_gpu = size
    if not cell.known:
        places = range(min(size, len(cell.queries)))
        return peer.run(cell, places=places)[2] / len(places)
    # The peer runs requests that differ only in their last token as one, so they would not fill a batch.
    prompts: dict[tuple[int, ...], int] = {}  # ids -> where the answer starts
    alike: set[tuple[int, ...]] = set()
    per_query = 0
    for query in cell.queries:
        for ids, (_, answer) in zip(our_request_ids(cell, query), cell.known, strict=True):
            if tuple(ids[:-1]) not in alike:
                alike.add(tuple(ids[:-1]))
                prompts[tuple(ids)] = len(ids) - len(answer)
        per_query = per_query or len(prompts)
        if len(prompts) >= size:
            break
    requests = [(("", ""), list(ids[:start]), list(ids[start:])) for ids, start in list(prompts.items())[:size]]
    started = time.perf_counter()
    peer.lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return (time.perf_counter() - started) / len(requests) * per_query


# Rounds ----------------------------------------------------------------------------------------------------------


class Rounds:
    """The finished rounds, one JSON line each after a line that says what was measured where.

    failed: rows that could not be run by this process, each with its error.
    """

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self.path, self.lines = path, [setting]
        self.failed: dict[str, str] = {}
        if path is None:
            return
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if self.lines[0] != json.loads(json.dumps(setting)):
                raise SystemExit(f"{path}: holds {self.lines[0]}, not {setting}; name another --out")
        else:
            path.write_text(json.dumps(setting) + "\n", encoding="utf-8")

    def of(self, row: str) -> list[dict[str, Any]]:
        return [line for line in self.lines[1:] if line["row"] == row]

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def run_round(asked: InferenceModel, peer: Peer, cell: Cell, rounds: Rounds, *, seconds: float) -> None:
    """Run ours once and the peer on further random queries, as many as fit `seconds`; add the round's line."""
    before = rounds.of(cell.row)
    in_bf16 = asked.model.dtype == torch.bfloat16
    if before:
        batch, guess = before[-1]["batch"], before[-1]["peer_s"] / before[-1]["requests"] * cell.requests
    else:
        batch, guess = choose_batch(peer, cell, seconds=seconds / 2)
        run_ours(asked, cell, queries=min(16, len(cell.queries)))  # both are warm now
    ours, our_times = time_ours(asked, cell)
    our_s = statistics.median(our_times)
    done = sum(line["num"] for line in before)
    share = seconds / 2 if in_bf16 else seconds
    part = choose_part(cell, share=share / guess, seed=len(before))
    places = next_places(cell, done=done, most=int(share / guess))
    theirs = peer.run_in_memory(part, places=places, batch=batch)
    num_requests = check_tokens(part, peer, theirs.samples[:3], places=places[:3])
    answers = [
        compare_answer(asked, part, place, ours=ours[place], theirs=answer)
        for place, answer in zip(places, theirs.answers, strict=True)
    ]
    eager = ask_again(peer, part, answers, batch=min(theirs.batch, EAGER_BATCH), seconds=share) if in_bf16 else {}
    requests = len(places) * part.requests
    line = {
        "row": cell.row,
        "shots": cell.shots,
        "shot_tokens": len(join_ids(cell)),
        "most_new": cell.plan.max_new_tokens if not cell.task.labels else None,
        "queries": len(cell.queries),
        "options": cell.requests,
        "asked_options": part.requests,
        "our_s": our_s,
        "our_times": our_times,
        "peer_s": theirs.seconds,
        "num": len(places),
        "requests": requests,
        "ratio": theirs.seconds / requests / (our_s / (len(cell.queries) * cell.requests)),
        "batch": theirs.batch,
        "failed": theirs.failed,
        "eager": eager,
        "same_requests": num_requests,
        "answers": answers,
    }
    rounds.add(line)
    print(tell_round(line), flush=True)


def next_places(cell: Cell, *, done: int, most: int) -> list[int]:
    """Return the places of at most so many queries that come next in the row's random order, at least one.

    Once all are compared the same queries are timed again.
    """
    order = random.Random(cell.row).sample(range(len(cell.queries)), len(cell.queries))
    start = done % len(order)
    return sorted(order[start : start + max(1, most)])


def choose_part(cell: Cell, *, share: float, seed: int) -> Cell:
    """Return the cell with random ones of its options, two at least, if only a `share` of one query can be asked."""
    if share >= 1 or cell.requests < 3:
        return cell
    num = max(2, int(share * cell.requests))
    return replace(cell, options=tuple(sorted(random.Random(seed).sample(range(cell.requests), num))))


def ask_again(
    peer: Peer, cell: Cell, answers: Sequence[dict[str, Any]], *, batch: int, seconds: float
) -> dict[str, Any]:
    """Note in as many answers as `seconds` allow whether the peer gives them with eager attention as well.

    Return how many, their seconds, the batch, and the error that ended it (''): the round counts without them too.
    """
    num, took, fault = 0, 0.0, ""
    size = min(1, len(answers))  # the first one tells how long the others take
    while size > 0:
        asked = answers[num : num + size]
        try:
            with peer.eager():
                again = peer.run_in_memory(cell, places=[answer["place"] for answer in asked], batch=batch)
        except RuntimeError as error:
            fault = first_line(error)
            break
        for answer, one in zip(asked, again.answers, strict=True):
            answer["peer_equals_itself"] = answer["theirs"] == one.text
        num, took, batch = num + size, took + again.seconds, again.batch
        size = min(len(answers) - num, int((seconds - took) * num / took))
    if fault:
        free_memory()
    return {"num": num, "seconds": took, "batch": batch, "fault": fault}


def tell_round(line: Mapping[str, Any]) -> str:
    answers = line["answers"]
    asked = f"{line['num']} queries"
    if line["asked_options"] < line["options"]:
        asked += f" with {line['asked_options']} of {line['options']} options; per request"
    again = [a["peer_equals_itself"] for a in answers if "peer_equals_itself" in a]
    itself = f"; the peer equals itself on {sum(again)} of {len(again)}" if again else ""
    if line["eager"].get("fault"):
        itself += f"; its eager attention fails ({line['eager']['fault']})"
    times = line["our_times"]
    spread = f" (median of {len(times)}, {min(times):.3f} to {max(times):.3f})" if len(times) > 1 else ""
    return (
        f"{line['row']}: ours {line['our_s']:.3f} s{spread} for {line['queries']},"
        f" lm-eval {line['peer_s']:.1f} s for {asked}:"
        f" {line['ratio']:.0f} times; equal {sum(a['equal'] for a in answers)} of {len(answers)}{itself}"
    )


def run_rounds(
    asked: InferenceModel, peer: Peer, cells: Sequence[Cell], rounds: Rounds, options: argparse.Namespace
) -> None:
    """Run the rounds that --out does not hold yet, each row's first before any row's second.

    A row that fails even with one request at a time is left, and its error kept; the others go on.
    """
    end = time.perf_counter() + 60 * options.minutes
    took: dict[str, float] = {}
    for number in range(options.repeats):
        for cell in cells:
            started = time.perf_counter()
            # Another round takes as long as the last; one that would not end in time is left to the next call.
            if (
                cell.row in rounds.failed
                or len(rounds.of(cell.row)) > number
                or started + took.get(cell.row, 0.0) > end
            ):
                continue
            try:
                run_round(asked, peer, cell, rounds, seconds=60 * options.peer_minutes / options.repeats)
            except RuntimeError as error:
                rounds.failed[cell.row] = first_line(error)
                print(f"{cell.row}: no round ({first_line(error)})", flush=True)
            took[cell.row] = time.perf_counter() - started
            free_memory()


# Report ----------------------------------------------------------------------------------------------------------


def report(rounds: Rounds) -> tuple[int, int]:
    """Print every row; return (equal, compared) predictions, each query counted once."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in rounds.lines[0].items()))
    equal = compared = 0
    for name in dict.fromkeys(line["row"] for line in rounds.lines[1:]):
        lines = rounds.of(name)
        report_times(name, lines)
        answers = list({answer["place"]: answer for line in lines for answer in line["answers"]}.values())
        num_equal = sum(answer["equal"] for answer in answers)
        equal, compared = equal + num_equal, compared + len(answers)
        print(f"  equal predictions: {num_equal} of {len(answers)} ({num_equal / len(answers):.2%})")
        again = [answer for answer in answers if "peer_equals_itself" in answer]
        if again:
            num_same, num_ours = sum(a["peer_equals_itself"] for a in again), sum(a["equal"] for a in again)
            print(
                f"  of {len(again)} of these, the peer equals itself with eager attention: {num_same}; ours: {num_ours}"
            )
        for fault in {line["eager"]["fault"] for line in lines if line.get("eager")} - {""}:
            print(f"  its eager attention fails: {fault}")
        errors = [answer["margin_error"] for answer in answers if "margin_error" in answer]
        if errors:
            print(f"  largest difference of a likelihood's margin: {max(errors):.1e} nats")
        for answer in answers:
            if not answer["equal"] and rounds.lines[0]["precision"] == "fp32":
                print(f"    {tell_difference(answer)}")
    return equal, compared


def report_times(name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    first, num_queries = lines[0], lines[0]["queries"]
    ours = [line["our_s"] for line in lines]
    # Seconds per query with all of its options, from the requests that were made.
    each = np.array([line["peer_s"] / line["requests"] * line["options"] for line in lines])
    num_asked, num_requests = sum(line["num"] for line in lines), sum(line["requests"] for line in lines)
    mean = sum(line["peer_s"] for line in lines) / num_requests * first["options"]
    interval = t_interval(each) if len(lines) > 1 else None
    spread = f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else ""
    ratios = sorted(line["ratio"] for line in lines)
    limit = f", at most {first['most_new']} new tokens" if first["most_new"] else ""
    print(f"\n{name}: {first['shots']} shots of {first['shot_tokens']:,} tokens, {num_queries} queries{limit}")
    print(f"  ours: {told(ours)} s for {num_queries} queries, {len(lines)} rounds")
    print(
        f"  lm-eval: {mean:.3f}{spread} s per query, {num_asked} queries in {len(lines)} rounds, batch {first['batch']}"
    )
    for size, fault in {size: fault for line in lines for size, fault in line.get("failed", {}).items()}.items():
        print(f"  lm-eval fails with {size} requests at a time: {fault}")
    parts = sorted({line["asked_options"] for line in lines})
    if parts[0] < first["options"]:
        print(
            f"  it was given {', '.join(map(str, parts))} of the {first['options']} options of a query, {num_requests}"
            " requests in all: the ratio is per request, and predictions are compared among these options"
        )
    print(f"  lm-eval for {num_queries} queries: {mean * num_queries:,.0f} s (a query's mean times their number)")
    print(f"  ratio: {statistics.median(ratios):.0f} times ({ratios[0]:.0f} to {ratios[-1]:.0f} by round)")


def report_precisions(files: Sequence[Rounds]) -> None:
    """Print how often each side gives, in bf16, the answer that it gives in float32, for rows of both precisions.

    Only queries that were asked with all of their options count.
    """
    said: dict[str, dict[tuple[str, str, int], Any]] = {"fp32": {}, "bf16": {}}
    for rounds in files:
        for line in rounds.lines[1:]:
            if line["asked_options"] == line["options"]:
                for answer in line["answers"]:
                    said[rounds.lines[0]["precision"]][rounds.lines[0]["model"], line["row"], answer["place"]] = answer
    both = said["fp32"].keys() & said["bf16"].keys()
    for name in sorted({row for _, row, _ in both}):
        pairs = [(said["fp32"][key], said["bf16"][key]) for key in both if key[1] == name]
        ours, theirs = (sum(exact[side] == half[side] for exact, half in pairs) for side in ("ours", "theirs"))
        print(f"{name}: of {len(pairs)} answers, bf16 keeps float32's in {ours} of ours and {theirs} of lm-eval's")


def tell_difference(answer: Mapping[str, Any]) -> str:
    """Return one line: what each said, by how much each prefers its own answer, and whether that is rounding."""
    tie = all(abs(margin) < TIE_NATS for margin in answer["margins"])
    verdict = "rounding" if tie else "NOT EXPLAINED"
    said = f"query {answer['place']}: ours {answer['ours']!r}, theirs {answer['theirs']!r}"
    if "alone" in answer:
        return (
            f"{said}; transformers alone {answer['alone']!r}, its smallest lead {answer['margins'][0]:.1e}: {verdict}"
        )
    return (
        f"{said}; ours by {answer['margins'][0]:.1e} nats ({answer['our_nats']}), theirs by"
        f" {answer['margins'][1]:.1e} ({answer['their_nats']}): {verdict}"
    )


def told(values: Sequence[float]) -> str:
    """Return the median with its lowest and highest."""
    return f"{statistics.median(values):,.3f} ({min(values):,.3f} to {max(values):,.3f})"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seed")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tasks", type=Path, default=SHARED / "data" / "tasks", help="folder of task files")
    parser.add_argument(
        "--rows", default=ROWS, help="TASK:SHOTS,...; SHOTS is a number or 'most' (default: %(default)s)"
    )
    parser.add_argument("--queries", type=int, default=500, help="of ours, per row")
    parser.add_argument("--peer-minutes", type=float, default=20.0, help="of the peer, per row, in all its rounds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round that would end later")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines of the finished rounds")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only print what such files hold")
    return parser.parse_args()


def describe(options: argparse.Namespace, asked: InferenceModel) -> dict[str, Any]:
    """Return what is measured where: rounds of two settings are never mixed."""
    on_gpu = options.device == "cuda"
    return {
        "model": Path(options.model).name,
        "parameters": sum(weight.numel() for weight in asked.model.parameters()),
        "precision": options.precision,
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {options.threads} threads",
        "torch": torch.__version__,
        "queries": options.queries,
    }


def read_rounds(path: Path) -> Rounds:
    """Return what a file holds."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rounds = Rounds(None, lines[0])
    rounds.lines = lines
    return rounds


def run(options: argparse.Namespace) -> Rounds:
    """Run what --out does not hold yet."""
    torch.set_num_threads(options.threads)
    asked = load_both(options.model, device=options.device, precision=options.precision)
    rounds = Rounds(options.out, describe(options, asked))
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
        run_rounds(asked, Peer(asked, Path(name)), load_rows(asked, options), rounds, options)
    return rounds


def main() -> None:
    """Run rounds and report; exit 1 if a row fails, or fewer than 99.9 % of the predictions are equal in fp32."""
    options = parse_options()
    files = list(map(read_rounds, options.report)) if options.report else [run(options)]
    failed = False
    for rounds in files:
        equal, compared = report(rounds)
        for row, fault in rounds.failed.items():
            print(f"\n{row} could not be run: {fault}")
        if not compared:
            raise SystemExit("no round has ended; give more --minutes")
        print(f"\nequal predictions: {equal} of {compared} ({equal / compared:.2%})")
        failed |= bool(rounds.failed) or (rounds.lines[0]["precision"] == "fp32" and equal < 0.999 * compared)
    report_precisions(files)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
