"""Shot curves asked from a server: the engine's queries, shots first, and a file of answers that a killed run keeps.

A server tells no likelihood of a given answer, so every query is generated, and a known answer counts where it is
written exactly. Nats are null in such a result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from manyicl.episodes import join_examples, query_ids
from manyicl.errors import UserError
from manyicl.evaluation.curves import Report, chance_of, make_curve
from manyicl.evaluation.loop import make_sweep, shift_report
from manyicl.evaluation.points import Cell, Prediction, ShotCurve
from manyicl.evaluation.results import Evaluation, refuse_other_result
from manyicl.evaluation.scoring import best_score, majority_score, score_others
from manyicl.evaluation.shots import FILL, Shots
from manyicl.evaluation.sweep import DEFAULT_SHOTS, TaskSweep, refuse_empty
from manyicl.evaluation.unfinished import sole_writer_of_out
from manyicl.files import sync_folder
from manyicl.inference import (
    Endpoint,
    EndpointSettings,
    Generated,
    InferenceModel,
    UnansweredError,
    tokenize_for,
    trained_shots_of,
)
from manyicl.seeds import STREAMS
from manyicl.tasks import Task

# So many queries failed in a row, and the server is taken to be down.
MAX_FAILED_IN_A_ROW = 20


@dataclass(frozen=True, slots=True)
class Question:
    """One query as it is sent. query: its index in the test split. key: what its answer is kept under."""

    query: int
    ids: tuple[int, ...]
    max_new_tokens: int
    key: str


class AnswerLog:
    """The answers that a server has given, one whole line each, kept beside the result until that is complete.

    The key of an answer is a hash of server, model, prompt and limit, so a changed run takes only what is still true.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.answers: dict[str, Generated] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("ab+")
            self._file.seek(0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it, or name another --out") from error
        try:
            self._read(self._file.read())
        except UserError:
            self._file.close()
            raise
        sync_folder(path.parent)

    def _read(self, content: bytes) -> None:
        assert self.path is not None
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                entry = json.loads(line)
                self.answers[entry["key"]] = Generated(text=entry["text"], cut=entry["cut"])
            except (ValueError, LookupError, TypeError) as error:
                if number < len(lines):
                    raise UserError(f"{self.path} line {number}: is no kept answer; remove the file") from error
                # A killed run's last line; what is written next must not be joined to it.
                self._file.truncate(len(content) - len(line))

    def add(self, key: str, answer: Generated) -> None:
        """Keep one answer, safe from a power cut when this returns."""
        self.answers[key] = answer
        if self.path is not None:
            line = json.dumps({"key": key, "text": answer.text, "cut": answer.cut}, ensure_ascii=False)
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Keep the file as it is."""
        if self.path is not None:
            self._file.close()

    def remove(self) -> None:
        """Remove the file: its answers are in a complete result."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def answer_log_path(out: Path) -> Path:
    """Return where the answers of a result at `out` are kept meanwhile."""
    return out.with_name(f"{out.name.removesuffix('.json')}.answers.jsonl")


@sole_writer_of_out
def evaluate_at_endpoint(
    asked: InferenceModel,
    tasks: Sequence[Task],
    *,
    endpoint: EndpointSettings,
    shots: Sequence[Shots] = DEFAULT_SHOTS,
    draws: int = 5,
    queries: int = 200,
    seed: int = 0,
    max_new_tokens: int | None = None,
    out: Path | None = None,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Return the shot curve of every task, answered by a server behind the same shots that the engine would show.

    asked: tokenizer, template and limits; its weights are not needed. out: where the result is written; beside it
    every answer is kept until the result is complete, so that the same call again asks only what is missing.
    max_new_tokens: as in `evaluation.evaluate`.

    Raises:
        UserError: the server refuses or is gone, nothing can be asked, or `out` holds another evaluation.
    """
    sweep = make_sweep(asked, shots=shots, draws=draws, queries=queries, seed=seed, max_new_tokens=max_new_tokens)
    plans = [TaskSweep(tokenize_for(task, asked), tokenizer=asked.tokenizer, sweep=sweep) for task in tasks]
    refuse_empty(plans)
    if out is not None:
        settings = {"model": asked.path, "engine": "endpoint", "endpoint_model": endpoint.model, "seed": seed}
        settings |= {"max_tokens": asked.max_tokens, "max_new_tokens": max_new_tokens, "streams": STREAMS}
        refuse_other_result(out, settings, [plan.about for plan in plans])
    log = AnswerLog(out and answer_log_path(out))
    try:
        with Endpoint(endpoint, asked.tokenizer) as server:
            curves = []
            for number, plan in enumerate(plans):
                tell, trained = shift_report(report, number, len(plans)), trained_shots_of(asked, plan.task)
                curves.append(_ask_task(plan, endpoint=server, log=log, trained_shots=trained, report=tell))
            told = {"url": server.base_url, "model": endpoint.model, "prompts": server.prompts}
    except UserError as error:
        if not (log.path and log.answers):
            raise
        kept = f"{len(log.answers)} answers are kept in {log.path}: give the same command again to go on"
        raise UserError(f"{error}; {kept}") from error
    finally:
        log.close()
    result = Evaluation(
        asked.path,
        "sweep",
        seed=seed,
        max_tokens=asked.max_tokens,
        curves=tuple(curves),
        engine="endpoint",
        endpoint=told,
        max_new_tokens=max_new_tokens,
    )
    if out is not None:
        result.save(out)
        if result.complete:
            log.remove()
    return result


def _ask_task(
    plan: TaskSweep, *, endpoint: Endpoint, log: AnswerLog, trained_shots: int | None, report: Report
) -> ShotCurve:
    """Ask all queries of one cell after the other, draw by draw, so that each prefix extends the one before.

    The answers of a cell that is not complete are in the log alone: they are not a fair part of all.
    """
    answered: dict[tuple[int, Shots], list[Prediction]] = {}
    unanswered: dict[Shots, Counter[str]] = {}
    for place, (draw, shots) in enumerate(plan.cells):
        questions = list(make_questions(plan, draw=draw, shots=shots, endpoint=endpoint))
        start, total = place * len(questions), len(plan.cells) * len(questions)
        tell = _tell(report, f"{plan.task.name}, {shots} shots", start, total)
        replies = ask_questions(questions, endpoint=endpoint, log=log, tell=tell)
        reasons = Counter(reply for reply in replies.values() if isinstance(reply, str))
        unanswered[shots] = unanswered.get(shots, Counter()) + reasons
        given = {query: reply for query, reply in replies.items() if not isinstance(reply, str)}
        answered[draw, shots] = [
            _predict(plan, draw, shots, int(q), given[int(q)]) for q in plan.queries if int(q) in given
        ]
    whole = {(draw, shots): rows for (draw, shots), rows in answered.items() if not unanswered[shots]}
    curve = make_curve(plan, whole, trained_shots=trained_shots)
    cells = []
    for cell in curve.cells:
        if unanswered.get(cell.shots):
            told = [p for (_, shots), rows in answered.items() if shots == cell.shots for p in rows]
            cells.append(_incomplete_cell(plan, cell, told, unanswered[cell.shots]))
        else:
            cells.append(cell)
    return replace(curve, cells=tuple(cells))


def make_questions(plan: TaskSweep, *, draw: int, shots: Shots, endpoint: Endpoint) -> Iterator[Question]:
    """Yield the queries of one cell as they are sent: the ids that the engine's answers are generated behind.

    The limit is that of the engine's generations; where the answers are known, the longest of them.
    """
    num_shots = plan.num_shots(draw, shots)
    indices = plan.draws[draw][:num_shots].astype(np.int32)
    before = join_examples(plan.tokenized, split="train", indices=indices).ids.tolist()
    for query in (int(q) for q in plan.queries):
        ids = (*before, *query_ids(plan.tokenized, split="test", index=query, after_shots=num_shots > 0).tolist())
        known = [len(answer) for _, answer in plan.written.get(plan.candidates[query], ())]
        limit = max(known) if known else plan.max_new_tokens
        said = [endpoint.base_url, endpoint.settings.model, plan.tokenizer.terminator, limit, ids]
        yield Question(query, ids, limit, hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32])


def ask_questions(
    questions: Sequence[Question],
    *,
    endpoint: Endpoint,
    log: AnswerLog,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[int, Generated | str]:
    """Return each query's answer, or the reason why it has none; ask only what the log does not know.

    The first is asked alone, so that the server has the shots in its prefix cache before the others come at once.
    """
    replies: dict[int, Generated | str] = {q.query: log.answers[q.key] for q in questions if q.key in log.answers}
    missing = [q for q in questions if q.query not in replies]
    tell(len(replies))
    with ThreadPoolExecutor(endpoint.settings.concurrency) as pool:
        for group in (missing[:1], missing[1:]):
            futures = {pool.submit(endpoint.generate, q.ids, max_new_tokens=q.max_new_tokens): q for q in group}
            try:
                for future in as_completed(futures):
                    replies[futures[future].query] = _take_answer(future, futures[future], endpoint=endpoint, log=log)
                    tell(len(replies))
            except BaseException:  # also Ctrl-C: nothing more is sent, and what is under way is not tried again
                endpoint.stop()
                pool.shutdown(cancel_futures=True)
                for future, question in futures.items():
                    if not (future.cancelled() or future.exception() or question.query in replies):
                        log.add(question.key, future.result())
                raise
    return replies


def _take_answer(
    future: Future[Generated], question: Question, *, endpoint: Endpoint, log: AnswerLog
) -> Generated | str:
    """Return an answer, and keep it; or the reason why there is none.

    Raises:
        UserError: the server refuses, or has failed too many queries in a row.
    """
    try:
        answer = future.result()
    except UnansweredError as error:
        endpoint.num_failed_in_a_row += 1
        if endpoint.num_failed_in_a_row == MAX_FAILED_IN_A_ROW:
            raise UserError(
                f"--endpoint {endpoint.settings.url}: {MAX_FAILED_IN_A_ROW} queries in a row got no answer ({error});"
                " look at the server's log"
            ) from None
        return str(error)
    endpoint.num_failed_in_a_row = 0
    log.add(question.key, answer)
    return answer


def _predict(plan: TaskSweep, draw: int, shots: Shots, query: int, answer: Generated) -> Prediction:
    example = plan.task.test[plan.tokenized.splits["test"].rows[query]]
    score = best_score(answer.text, answers=example.answers, metric=plan.task.metric)
    return Prediction(
        plan.task.name,
        draw,
        plan.num_shots(draw, shots),
        example.id,
        answer.text,
        example.answer,
        score=score,
        nll=None,
        cut=answer.cut,
        fill=shots == FILL,
        other_scores=score_others(
            answer.text, answers=example.answers, metric=plan.task.metric, family=plan.task.family
        ),
    )


def _incomplete_cell(plan: TaskSweep, cell: Cell, given: Sequence[Prediction], unanswered: Counter[str]) -> Cell:
    """Return a cell without a score: those that were answered are not a fair part of all."""
    rows = plan.tokenized.splits["test"].rows
    return replace(
        cell,
        num_scored=len(given),
        num_unfit=plan.num_unfit,
        majority_score=majority_score(
            [plan.task.test[rows[q]].answers for q in plan.queries],
            train_answers=[e.answer for e in plan.task.train],
            metric=plan.task.metric,
        ),
        chance_score=chance_of(plan),
        num_cut=sum(p.cut for p in given),
        unanswered=dict(sorted(unanswered.items())),
    )


def _tell(report: Report, what: str, start: int, total: int) -> Callable[[int], None]:
    return lambda done: report(what, start + done, total)
