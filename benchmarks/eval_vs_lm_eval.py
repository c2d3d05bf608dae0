"""The engine against lm-evaluation-harness: the same model, shots and queries, token for token.

    pip install ".[bench]"
    python benchmarks/eval_vs_lm_eval.py --minutes 30 --out cells.jsonl [--device cuda] [--threads N] [--model MODEL]

Three tasks (77 known answers, 2 known answers, free answers), each behind 64 shots and behind the most that fit 4,096
tokens. Both sides are handed one model in one process, so loading is in neither time. The peer runs its Hugging Face
backend with the fastest batch size of those tried, its own sampler over our shots in our order, and local task files
that hold our template's own text, separators included; its requests are tokenised and compared with the engine's ids.

Ours is timed whole, with tokenising, statistics and audits, over all queries. The peer, which encodes the whole prompt
for every option of every query, is timed inside `loglikelihood` and `generate_until` alone (its set-up, in its favour,
is not), on random queries, some more each round; its mean time a query has a 95 % t interval over the rounds, and its
time for all queries is that mean times their number. Rounds alternate: ours, then the peer, cell by cell. Every query
that the peer has answered is compared, and each difference is printed with the margins of both sides.

Rounds go on until --minutes are over, or all queries are compared and --repeats done. Each finished round is a line of
--out; the same call again goes on from there. `--report` prints what the file holds and runs nothing.

MODEL: `seed`, the package's own (it has 4,096 positions, reads its context, and anyone has it); a path; or
random:WIDTHxLAYERS, a Llama of random weights, to see how the ratio depends on the model's size.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from transformers import AutoModelForCausalLM, LlamaConfig

from manyicl.cells import Prediction
from manyicl.evaluation import AskedModel, evaluate, load_asked_model, tokenize_for
from manyicl.intervals import t_interval
from manyicl.models import ModelSettings, load_config, load_model
from manyicl.sweep import Sweep, TaskSweep
from manyicl.tasks import Task, load_tasks
from manyicl.tokens import TaskTokenizer, join_examples, query_ids

SHARED = Path(__file__).parents[2] / "shared"
TASKS = ("banking77", "pros_cons", "webquestions")  # 77 known answers, 2, and free answers
MAX_TOKENS = 4096
BATCH_SIZES = {"cpu": (1, 4, 16), "cuda": (1, 4, 16, 64)}
# A choice between answers that are so near is rounding's, in float32.
TIE_NATS = 1e-3
# Of a task with free answers, rows with longer ones are left out on both sides: one of them would set the limit of all.
MOST_ANSWER_CHARACTERS = 40


@dataclass  # not frozen: it keeps its rows
class Cell:
    """One task behind one number of shots, as both sides are asked. queries: indices into the test split."""

    task: Task
    plan: TaskSweep
    shots: int
    queries: list[int]

    @property
    def name(self) -> str:
        return f"{self.task.name}_{self.shots}"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The queries as the peer's task file has them."""
        return task_rows(self, split="test", indices=self.queries)


@dataclass(frozen=True)
class PeerAnswer:
    """What the peer said of one query. likelihoods: of each choice, None where it generated."""

    text: str
    likelihoods: list[float] | None


# What both are asked ---------------------------------------------------------------------------------------------


def load_both(path: str, *, device: str = "cpu") -> AskedModel:
    """Return the model in fp32, its positions extended to MAX_TOKENS by linear RoPE where it knows fewer."""
    if path.startswith("random:"):
        plain = load_asked_model("seed", weights=False)
        model = random_llama(path.removeprefix("random:"), vocab_size=len(plain.tokenizer.tokenizer))
        return AskedModel(path, model.to(device), plain.tokenizer, max_tokens=MAX_TOKENS, trained_shots={})
    settings = ModelSettings(path=path, precision="fp32")
    known = load_config(settings).max_position_embeddings
    if known < MAX_TOKENS:
        rope = {"rope_type": "linear", "factor": MAX_TOKENS / known}
        changes = {"max_position_embeddings": MAX_TOKENS, "rope_parameters": rope}
        settings = settings.model_copy(update={"config": changes})
        print(f"{path}: {known} positions, extended to {MAX_TOKENS} by linear RoPE")
    plain = load_asked_model(path, weights=False)
    model = load_model(settings).to(device).eval()
    return AskedModel(path, model, plain.tokenizer, max_tokens=MAX_TOKENS, trained_shots={})


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
        self.seconds = 0.0  # inside its requests
        self.lm.loglikelihood = self._timed(self.lm.loglikelihood)
        self.lm.generate_until = self._timed(self.lm.generate_until)
        self.tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def run(self, cell: Cell, *, places: Sequence[int]) -> tuple[list[PeerAnswer], list[Any], float]:
        """Return the peer's answers to the cell's queries at `places`, its samples, and the seconds of its requests."""
        from lm_eval import simple_evaluate

        before = self.seconds
        with Silence():
            result: Any = simple_evaluate(
                self.lm,
                tasks=[cell.name],
                task_manager=self.tasks,
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


def run_ours(asked: AskedModel, cell: Cell) -> tuple[list[Prediction], float]:
    """Return the engine's predictions in the order of the cell's queries, and the seconds of the whole evaluation."""
    started = time.perf_counter()
    result = evaluate(asked, [cell.task], shots=(cell.shots,), draws=1, queries=len(cell.queries))
    return list(result.curves[0].predictions), time.perf_counter() - started


def join_ids(cell: Cell) -> Any:
    """Return the ids of head and shots."""
    shots = cell.plan.draws[0][: cell.shots].astype(np.int32)
    return join_examples(cell.plan.tokenized, split="train", indices=shots).ids


def compare_answer(
    asked: AskedModel, cell: Cell, place: int, *, ours: Prediction, theirs: PeerAnswer
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
    names = [name for name, _ in cell.plan.written[cell.task.labels]]
    assert ours.choice_nll is not None
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
def plain_answer(asked: AskedModel, cell: Cell, place: int) -> dict[str, Any]:
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


def choose_batch(peer: Peer, cell: Cell) -> tuple[int, float]:
    """Return the peer's fastest batch size on this cell, and its seconds a query there."""
    seconds: dict[int, float] = {}
    whole = our_request_ids(cell, cell.queries[0])
    start = len(whole[0]) - len(cell.plan.written[cell.task.labels][0][1]) if cell.task.labels else 0
    for size in BATCH_SIZES[peer.asked.model.device.type]:
        peer.lm.batch_size_per_gpu = size
        try:
            for _ in range(1 + (not seconds)):  # the first one warms up
                started = time.perf_counter()
                if cell.task.labels:  # each choice is a request
                    requests = [
                        (("", ""), whole[n % len(whole)][:start], whole[n % len(whole)][start:]) for n in range(size)
                    ]
                    peer.lm._loglikelihood_tokens(requests, disable_tqdm=True)
                    seconds[size] = (time.perf_counter() - started) / size * len(whole)
                else:
                    seconds[size] = peer.run(cell, places=range(min(size, len(cell.queries))))[2] / size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if min(seconds.values()) < seconds[size]:
            break  # larger ones only pad more
    best = min(seconds, key=seconds.__getitem__)
    return best, seconds[best]


# Rounds ----------------------------------------------------------------------------------------------------------


class Rounds:
    """The finished rounds, one JSON line each behind a line that says what was measured where."""

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self.path, self.lines = path, [setting]
        if path is None:
            return
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if self.lines[0] != json.loads(json.dumps(setting)):
                raise SystemExit(f"{path}: holds {self.lines[0]}, not {setting}; name another --out")
        else:
            path.write_text(json.dumps(setting) + "\n", encoding="utf-8")

    def of(self, cell: str) -> list[dict[str, Any]]:
        return [line for line in self.lines[1:] if line["cell"] == cell]

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def run_round(asked: AskedModel, peer: Peer, cell: Cell, rounds: Rounds, *, seconds: float, end: float) -> float:
    """Run ours once and the peer on further random queries, as many as fit `seconds` in all; return the seconds.

    Where not one would be done by `end`, the round is left out, and takes forever.
    """
    started, before = time.perf_counter(), rounds.of(cell.name)
    if before:
        batch, guess = before[-1]["batch"], before[-1]["peer_s"] / before[-1]["num"]
    else:
        batch, guess = choose_batch(peer, cell)
        run_ours(asked, cell)  # both are warm now
    ours, our_s = run_ours(asked, cell)
    if time.perf_counter() + guess > end:
        return float("inf")
    order = random.Random(cell.name).sample(range(len(cell.queries)), len(cell.queries))
    done = sum(line["num"] for line in before)
    # Once all are compared the same queries are timed again.
    seconds = min(seconds, end - time.perf_counter())
    num = max(1, min(int((seconds - our_s) / guess), len(order) - done or len(order)))
    start = done % len(order)
    places = sorted(order[start : start + num])
    peer.lm.batch_size_per_gpu = batch
    theirs, samples, peer_s = peer.run(cell, places=places)
    num_requests = check_tokens(cell, peer, samples[:3], places=places[:3])
    answers = [
        compare_answer(asked, cell, place, ours=ours[place], theirs=answer)
        for place, answer in zip(places, theirs, strict=True)
    ]
    line = {
        "cell": cell.name,
        "shots": cell.shots,
        "shot_tokens": len(join_ids(cell)),
        "most_new": cell.plan.max_new_tokens if not cell.task.labels else None,
        "queries": len(cell.queries),
        "our_s": our_s,
        "peer_s": peer_s,
        "num": len(places),
        "batch": batch,
        "same_requests": num_requests,
        "answers": answers,
    }
    rounds.add(line)
    ratio = peer_s / len(places) / (our_s / len(cell.queries))
    print(
        f"{cell.name}: ours {our_s:.2f} s for {len(cell.queries)}, lm-eval {peer_s:.1f} s for {len(places)}, a query"
        f" {ratio:.0f} times; equal {sum(a['equal'] for a in answers)} of {len(answers)}",
        flush=True,
    )
    return time.perf_counter() - started


def run_rounds(
    asked: AskedModel, peer: Peer, cells: Sequence[Cell], rounds: Rounds, options: argparse.Namespace
) -> None:
    """Run rounds, always of the cell that has had the fewest, until time is over or nothing is left to learn."""
    end = time.perf_counter() + 60 * options.minutes
    seconds = 0.9 * 60 * options.minutes / (len(cells) * options.repeats)
    took: dict[str, float] = {}
    while True:
        open_cells = [
            cell
            for cell in cells
            if len(rounds.of(cell.name)) < options.repeats
            or sum(line["num"] for line in rounds.of(cell.name)) < len(cell.queries)
        ]
        # Another round takes as long as the last; what would not end in time is left to the next call.
        fitting = [cell for cell in open_cells if time.perf_counter() + took.get(cell.name, 0.0) < end]
        if not fitting:
            return
        cell = min(fitting, key=lambda cell: len(rounds.of(cell.name)))
        first = cell.name not in took
        took[cell.name] = run_round(asked, peer, cell, rounds, seconds=seconds, end=end)
        if first and took[cell.name] < float("inf"):
            took[cell.name] = min(took[cell.name], seconds)  # its first round chose a batch size too


# Report ----------------------------------------------------------------------------------------------------------


def report(rounds: Rounds) -> tuple[int, int]:
    """Print every cell; return (equal, compared) predictions, each query counted once."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in rounds.lines[0].items()))
    equal = compared = 0
    for name in dict.fromkeys(line["cell"] for line in rounds.lines[1:]):
        lines = rounds.of(name)
        answers = {answer["place"]: answer for line in lines for answer in line["answers"]}
        num_equal = sum(answer["equal"] for answer in answers.values())
        equal, compared = equal + num_equal, compared + len(answers)
        report_times(name, lines)
        print(f"  equal predictions: {num_equal} of {len(answers)}")
        errors = [answer["margin_error"] for answer in answers.values() if "margin_error" in answer]
        if errors:
            print(f"  largest difference of a likelihood's margin: {max(errors):.1e} nats")
        for answer in answers.values():
            if not answer["equal"]:
                print(f"    {tell_difference(answer)}")
    return equal, compared


def report_times(name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    first, num_queries = lines[0], lines[0]["queries"]
    ours = [line["our_s"] for line in lines]
    each = np.array([line["peer_s"] / line["num"] for line in lines])
    num_asked = sum(line["num"] for line in lines)
    mean = sum(line["peer_s"] for line in lines) / num_asked
    interval = t_interval(each)
    spread = f" [{interval.low:.3f}, {interval.high:.3f}]" if len(lines) > 1 else ""
    ratios = sorted(num_queries * b / a for a, b in zip(ours, each, strict=True))
    ratio = statistics.median(ratios)
    limit = f", at most {first['most_new']} new tokens" if first["most_new"] else ""
    print(f"\n{name}: {first['shots']} shots of {first['shot_tokens']:,} tokens, {num_queries} queries{limit}")
    print(f"  ours: {told(ours)} s for {num_queries} queries, {len(lines)} rounds")
    print(
        f"  lm-eval: {mean:.3f}{spread} s a query, {num_asked} queries in {len(lines)} rounds, batch {first['batch']}"
    )
    print(f"  lm-eval for {num_queries} queries: {mean * num_queries:,.0f} s (a query's mean times their number)")
    print(f"  ratio: {ratio:.0f} times ({ratios[0]:.0f} to {ratios[-1]:.0f} by round)")


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
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seed")
    parser.add_argument("--tasks", type=Path, default=SHARED / "data" / "tasks", help="folder of task files")
    parser.add_argument("--task", action="append", help=f"repeat for more; {', '.join(TASKS)} unless said")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all rounds of this call")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of a cell at least")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines of the finished rounds")
    parser.add_argument("--report", action="store_true", help="only print what --out holds")
    return parser.parse_args()


def describe(options: argparse.Namespace, asked: AskedModel) -> dict[str, Any]:
    """Return what is measured where: rounds of two settings are never mixed."""
    on_gpu = options.device == "cuda"
    return {
        "model": options.model,
        "parameters": sum(weight.numel() for weight in asked.model.parameters()),
        "precision": "fp32",
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {options.threads} threads",
        "torch": torch.__version__,
        "queries": options.queries,
    }


def main() -> None:
    """Run rounds and report; exit 1 where fewer than 99.9 % of the predictions are equal."""
    options = parse_options()
    if options.report:
        lines = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
        rounds = Rounds(None, lines[0])
        rounds.lines = lines
    else:
        torch.set_num_threads(options.threads)
        asked = load_both(options.model, device=options.device)
        rounds = Rounds(options.out, describe(options, asked))
        with tempfile.TemporaryDirectory() as name:
            os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
            tasks = load_chosen(options.tasks, options.task or TASKS)
            cells = [cell for task in tasks for cell in make_cells(asked, task, num_queries=options.queries)]
            for cell in cells:
                write_task(cell, Path(name))
            run_rounds(asked, Peer(asked, Path(name)), cells, rounds, options)
    equal, compared = report(rounds)
    if not compared:
        raise SystemExit("no round has ended; give more --minutes")
    print(f"\nequal predictions: {equal} of {compared} ({100 * equal / compared:.2f} %)")
    if equal < 0.999 * compared:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
