"""Ask a model: shot curves of many tasks with the files they leave, one-pass curves, and plain answers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from manyicl.answering import generate_answers
from manyicl.errors import UserError
from manyicl.files import write_atomically
from manyicl.models import (
    ModelSettings,
    check_window,
    load_config,
    load_model,
    load_tokenizer,
    max_tokens_of,
    read_note,
)
from manyicl.prefix import encode_prefix, score_answers
from manyicl.shot_curve import (
    DEFAULT_SHOTS,
    MAX_ANSWER_TOKENS,
    Prediction,
    Report,
    ShotCurve,
    Sweep,
    evaluate_task,
    score_one_pass,
)
from manyicl.tasks import Task
from manyicl.templates import TemplateSettings, input_text
from manyicl.tokens import (
    TaskTokenizer,
    TokenizedTask,
    check_lost_answers,
    default_cache_dir,
    join_examples,
    tokenize_task,
)

RESULT_SCHEMA = 1
PREDICTION_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("draw", pa.int32()),
        ("shots", pa.int32()),
        ("query", pa.string()),
        ("prediction", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("nll", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class AskedModel:
    """A model ready to be asked, with its tokenizer in the template that it was trained with.

    model: None where a server has the weights. max_tokens: longest sequence it may see. trained_shots: task -> most
    shots trained; empty for a plain checkpoint.
    """

    path: str
    model: Any
    tokenizer: TaskTokenizer
    max_tokens: int
    trained_shots: dict[str, int]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Shot curves of one model: what `manyicl eval` and `manyicl curve` print and write.

    engine: who answered; by 'endpoint' every answer is generated and no likelihood is known. endpoint: that server's
    url and model, and whether prompts were sent as ids or as text.
    """

    model: str
    kind: Literal["sweep", "one-pass"]
    seed: int
    max_tokens: int
    curves: tuple[ShotCurve, ...]
    engine: Literal["local", "endpoint"] = "local"
    endpoint: Mapping[str, str] | None = None

    @property
    def complete(self) -> bool:
        """Whether every query that was asked got its answer."""
        return not any(cell.unanswered for curve in self.curves for cell in curve.cells)

    def to_json(self) -> dict[str, Any]:
        """Return the result file's content (docs/results-format.md), without the predictions' hash."""
        tasks = []
        for curve in self.curves:
            entry = {key: getattr(curve, key) for key in ("task", "family", "metric", "num_queries", "num_draws")}
            tasks.append({**entry, "curve": [asdict(cell) for cell in curve.cells]})
        return {
            "schema": RESULT_SCHEMA,
            "model": self.model,
            "kind": self.kind,
            "engine": self.engine,
            **({"endpoint": dict(self.endpoint)} if self.endpoint else {}),
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "tasks": tasks,
        }

    def save(self, path: Path) -> Path | None:
        """Write the JSON at `path` and, for a sweep, the predictions beside it; return where the predictions are."""
        content = self.to_json()
        predictions: Path | None = None
        if self.kind == "sweep":
            predictions = predictions_path(path)
            data = _predictions_bytes([p for curve in self.curves for p in curve.predictions])
            write_atomically(predictions, data)
            content["predictions"] = {"file": predictions.name, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return predictions


def load_asked_model(
    path: str,
    *,
    precision: Literal["bf16", "fp32"] | None = None,
    max_tokens: int | None = None,
    template: TemplateSettings | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> AskedModel:
    """Load a checkpoint, adapter or run to be asked, on the GPU where there is one.

    precision: bf16 on a GPU and fp32 on a CPU unless said. template: what the model was trained with unless said.
    max_tokens: longest sequence; unless said, of a trained model the budget of its training, else all it can see.
    weights: False where a server has them, and only tokenizer, template and limits are wanted.

    Raises:
        UserError: it cannot be loaded, or `max_tokens` is more than it can see.
    """
    on_gpu = torch.cuda.is_available()
    settings = ModelSettings(
        path=path, precision=precision or ("bf16" if on_gpu else "fp32"), trust_remote_code=trust_remote_code
    )
    config = load_config(settings)
    if max_tokens is not None:
        check_window(config, num_tokens=max_tokens, what="--max-tokens")
    note = read_note(path)
    tokenizer = TaskTokenizer(load_tokenizer(settings), template or note.template)
    model = load_model(settings).to("cuda" if on_gpu else "cpu").eval() if weights else None
    return AskedModel(
        path=path,
        model=model,
        tokenizer=tokenizer,
        max_tokens=max_tokens or min(max_tokens_of(config), note.token_budget or max_tokens_of(config)),
        trained_shots=note.trained_shots,
    )


def evaluate(
    model: str | AskedModel,
    tasks: Sequence[Task],
    *,
    shots: Sequence[int] = DEFAULT_SHOTS,
    draws: int = 5,
    queries: int = 200,
    seed: int = 0,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Return the shot curve of every task: `queries` test rows behind `draws` draws of 0 ... k train shots.

    Raises:
        UserError: a task has no test rows, or its answers cannot be written by the tokenizer.
    """
    asked = load_asked_model(model) if isinstance(model, str) else model
    sweep = make_sweep(asked, shots=shots, draws=draws, queries=queries, seed=seed)
    curves = [
        evaluate_task(
            asked.model,
            tokenize_for(task, asked),
            tokenizer=asked.tokenizer,
            sweep=sweep,
            trained_shots=trained_shots_of(asked, task),
            report=shift_report(report, number, len(tasks)),
        )
        for number, task in enumerate(tasks)
    ]
    return Evaluation(asked.path, "sweep", seed=seed, max_tokens=asked.max_tokens, curves=tuple(curves))


def make_sweep(asked: AskedModel, *, shots: Sequence[int], draws: int, queries: int, seed: int) -> Sweep:
    """Return what is asked of every task.

    Raises:
        UserError: nothing would be asked.
    """
    sweep = Sweep(tuple(shots), num_draws=draws, num_queries=queries, seed=seed, max_tokens=asked.max_tokens)
    if not sweep.shots or min(sweep.shots) < 0 or draws < 1 or queries < 1:
        raise UserError(f"--shots {list(shots)} --draws {draws} --queries {queries}: need shots from 0, and at least 1")
    return sweep


def one_pass_curve(
    model: str | AskedModel,
    tasks: Sequence[Task],
    *,
    episodes: int = 20,
    token_budget: int | None = None,
    seed: int = 0,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Return loss and greedy exact match at every k from one forward pass over each episode of test rows.

    token_budget: length of an episode; as much as the model can see unless said.
    """
    asked = load_asked_model(model, max_tokens=token_budget) if isinstance(model, str) else model
    curves = [
        score_one_pass(
            asked.model,
            tokenize_for(task, asked),
            num_episodes=episodes,
            token_budget=token_budget or asked.max_tokens,
            seed=seed,
            trained_shots=trained_shots_of(asked, task),
            report=shift_report(report, number, len(tasks)),
        )
        for number, task in enumerate(tasks)
    ]
    return Evaluation(
        asked.path, "one-pass", seed=seed, max_tokens=token_budget or asked.max_tokens, curves=tuple(curves)
    )


def trained_shots_of(asked: AskedModel, task: Task) -> int | None:
    """Return the most shots the model was trained with, of a new task those of any; None for a plain checkpoint."""
    return (
        asked.trained_shots.get(task.name, max(asked.trained_shots.values(), default=0))
        if asked.trained_shots
        else None
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What `ask` says of one input.

    nll: nats of the answer with its terminator, None where it was cut. shots: how many stood before the input.
    """

    input: str
    answer: str
    nll: float | None
    shots: int
    cut: bool


def ask_inputs(
    asked: AskedModel, task: Task, inputs: Sequence[str], *, shots: int | None = None, seed: int = 0
) -> list[Answer]:
    """Answer each input behind the shots of one draw that fit, or behind `shots` of them.

    Raises:
        UserError: an empty input, or one that does not fit behind the shots asked for.
    """
    if shots is not None and shots < 0:
        raise UserError(f"--shots {shots}: shots count from 0")
    for number, text in enumerate(inputs, start=1):
        if not text.strip():
            raise UserError(f"line {number}: is empty; give one input a line")
    tokenized = tokenize_for(task, asked)
    train = tokenized.splits["train"]
    order = np.random.default_rng([seed, 0]).permutation(len(train)).astype(np.int32)
    candidates = [a for a in asked.tokenizer.encode_answers(task.labels) if not isinstance(a, str)]
    longest = max(
        (len(a) for a in candidates), default=min(MAX_ANSWER_TOKENS, int(train.answer_lengths.max(initial=1)))
    )
    texts = [input_text(text, settings=asked.tokenizer.settings) for text in inputs]
    between, after = asked.tokenizer.between_ids, asked.tokenizer.before_answer_ids
    queries = [np.asarray(between + ids + after, dtype=np.int32) for ids in asked.tokenizer.encode_texts(texts)]
    room = asked.max_tokens - len(tokenized.head_ids) - longest - max(len(q) for q in queries)
    fitting = int(np.searchsorted(np.cumsum(train.lengths[order]), room, side="right"))
    if room < 0 or (shots is not None and shots > fitting):
        place = int(np.argmax([len(q) for q in queries])) + 1
        raise UserError(
            f"line {place}: the longest input leaves room for {max(fitting, 0)} shots in {asked.max_tokens} tokens"
            f"{f', not {shots}' if shots is not None else ''}; shorten it, or lower --shots"
        )
    num_shots = fitting if shots is None else shots
    before = join_examples(tokenized, split="train", indices=order[:num_shots]).ids
    if not num_shots:
        queries = [query[tokenized.num_between :] for query in queries]
    return _answer_queries(
        asked, task, list(inputs), queries=queries, before=before, num_shots=num_shots, longest=longest
    )


def _answer_queries(
    asked: AskedModel,
    task: Task,
    inputs: Sequence[str],
    *,
    queries: Sequence[Any],
    before: Any,
    num_shots: int,
    longest: int,
) -> list[Answer]:
    prefix = encode_prefix(asked.model, before)
    if task.labels:
        known = list(zip(task.labels, asked.tokenizer.encode_answers(task.labels), strict=True))
        pairs = [(text, ids) for text, ids in known if not isinstance(ids, str)]
        nll, _ = score_answers(asked.model, prefix, [(query, ids) for query in queries for _, ids in pairs])
        table = nll.reshape(len(queries), len(pairs))
        best = table.argmin(axis=1)
        return [
            Answer(text, pairs[place][0], nll=float(row[place]), shots=num_shots, cut=False)
            for text, place, row in zip(inputs, best, table, strict=True)
        ]
    prompts = [np.concatenate([before, query]) for query in queries]
    generated = generate_answers(asked.model, asked.tokenizer, prompts, max_new_tokens=longest)
    told = asked.tokenizer.encode_answers([g.text for g in generated])
    # An answer that was cut, or whose text has no ids that give it back, has no likelihood as a whole answer.
    whole = [n for n, g in enumerate(generated) if not g.cut and not isinstance(told[n], str)]
    nll, _ = score_answers(asked.model, prefix, [(queries[n], told[n]) for n in whole])  # type: ignore[misc]
    costs = dict(zip(whole, nll.tolist(), strict=True))
    return [
        Answer(text, g.text, nll=costs.get(n), shots=num_shots, cut=g.cut)
        for n, (text, g) in enumerate(zip(inputs, generated, strict=True))
    ]


def read_inputs(file: str) -> list[str]:
    """Return the lines of a file, or of standard input for '-'.

    Raises:
        UserError: the file cannot be read, or holds nothing.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a UTF-8 text file with one input a line") from error
    lines = text.removesuffix("\n").split("\n")  # not splitlines: an input may hold other separators
    if not text:
        raise UserError(f"{'standard input' if file == '-' else file}: is empty; give one input a line")
    return lines


def tokenize_for(task: Task, asked: AskedModel) -> TokenizedTask:
    """Return `task` in the model's ids.

    Raises:
        UserError: too many of its answers cannot be used.
    """
    tokenized = tokenize_task(task, tokenizer=asked.tokenizer, cache_dir=default_cache_dir())
    fault = check_lost_answers(tokenized)
    if fault:
        raise UserError(fault)
    return tokenized


def check_out(path: Path | None) -> None:
    """Refuse a place that the result could not be written to, before hours are spent on it.

    Raises:
        UserError: it is a folder, or lies below a file.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file in it, such as {path / 'curve.json'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {path}: cannot be written below {above}; name another place")


def predictions_path(path: Path) -> Path:
    """Return where the predictions of the result at `path` lie."""
    return path.with_name(f"{path.name.removesuffix('.json')}.predictions.parquet")


def read_predictions(path: Path) -> list[Prediction]:
    """Return the rows of a predictions file."""
    return [Prediction(**row) for row in pq.read_table(path).to_pylist()]


def _predictions_bytes(predictions: Sequence[Prediction]) -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([asdict(p) for p in predictions], schema=PREDICTION_SCHEMA)
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def shift_report(report: Report, number: int, total: int) -> Callable[[str, int, int], None]:
    """Report progress over all tasks, in hundredths of one."""
    return lambda what, done, of: report(what, number * 100 + done * 100 // of, total * 100)
