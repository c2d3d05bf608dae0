"""The loop that evaluates a model: shot curves of many tasks with the files they leave, and one-pass curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from manyicl.distributed import ALONE, Ranks
from manyicl.episodes import Frame, TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.curves import Report, ask_draw, make_curve, score_one_pass
from manyicl.evaluation.points import Prediction
from manyicl.evaluation.results import Evaluation, refuse_other_result
from manyicl.evaluation.shots import FILL, Shots, sort_shots
from manyicl.evaluation.sweep import DEFAULT_SHOTS, Sweep, TaskSweep, refuse_empty
from manyicl.evaluation.unfinished import Parts, package_versions, read_header, sole_writer_of_out
from manyicl.inference import (
    InferenceModel,
    device_of,
    load_for_inference,
    sharing_fault,
    tokenize_for,
    trained_shots_of,
)
from manyicl.models import hash_weights, read_note
from manyicl.seeds import STREAMS, AskPurpose
from manyicl.tasks import Task


@sole_writer_of_out
def evaluate(
    model: str | InferenceModel,
    tasks: Sequence[Task],
    *,
    shots: Sequence[Shots] = DEFAULT_SHOTS,
    draws: int = 5,
    queries: int = 200,
    seed: int = 0,
    by: Literal["sum", "mean"] = "sum",
    max_new_tokens: int | None = None,
    fixed_shots: int | Literal["most"] | None = None,
    most_only: bool = False,
    purpose: AskPurpose = "evaluation",
    allow_empty: bool = False,
    out: str | Path | None = None,
    ranks: Ranks = ALONE,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Return the shot curve of every task: `queries` test rows behind `draws` draws of 0 ... k train shots.

    shots: numbers of shots, and "fill" for as many as fit in each draw. most_only: ask each task only with the largest
    number that it can be asked with.
    by: known answers are chosen by the sum of their tokens' nats, or by the mean, which does not favour short ones.
    max_new_tokens: a generated answer is cut there (counted as `num_cut`); by default at as many tokens as the task's
    longest train answer has, and at most at 256.
    fixed_shots: one of `shots`; all draws hold the same shots up to it, each in another order, so that the spread at
    that number is the order's alone; "most": each task's own most shots. purpose: "choice of settings" draws other
    shots and queries than those that are reported. allow_empty: a sweep of which no task has room for a query is no
    error, and its cells are empty.
    out: FILE.json to write. Finished cells are kept in FILE.json.parts until it is whole, and the same call goes on
    from them. ranks: among which the draws of all tasks are shared out; all of them return the same.

    Raises:
        UserError: a task has no test rows, its answers cannot be written by the tokenizer, nothing can be asked, or
            `out` holds another evaluation, or waits for cells of one.
    """
    asked = load_for_inference(model) if isinstance(model, str) else model
    if out is not None:
        asked = _with_kept_frame(asked, Path(out))
    sweep = make_sweep(
        asked, shots=shots, draws=draws, queries=queries, seed=seed, by=by, max_new_tokens=max_new_tokens
    )
    sweep = replace(sweep, purpose=purpose, most_only=most_only)
    if fixed_shots is not None:
        sweep = fix_shots(sweep, fixed_shots)
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"tasks {', '.join(sorted(names))}: two have one name; their draws would be the same")
    plans = [TaskSweep(tokenize_for(task, asked), tokenizer=asked.tokenizer, sweep=sweep) for task in tasks]
    if not allow_empty:
        refuse_empty(plans)
    path = None if out is None else Path(out)
    if path is not None:
        settings = {"model": asked.path, "kind": "sweep", "by": by, "engine": "local", "seed": seed}
        settings |= {"max_tokens": asked.max_tokens, "fixed_shots": fixed_shots, "streams": STREAMS}
        settings["max_new_tokens"] = max_new_tokens
        refuse_other_result(path, settings, [plan.about for plan in plans])
    parts = Parts(path, _identify(asked, sweep, tasks)) if path is not None else None
    with asked.asking():
        gathered = ranks.gather(lambda: _ask_cells(asked.model, plans, parts=parts, ranks=ranks, report=report))
        fault = sharing_fault(asked.model)
    answered = {cell: rows for cells in gathered for cell, rows in cells.items()}
    curves = [
        make_curve(
            plan,
            {(draw, k): answered[plan.task.name, draw, k] for draw, k in plan.cells},
            trained_shots=trained_shots_of(asked, plan.task),
            shared=not fault,
        )
        for plan in plans
    ]
    result = Evaluation(
        asked.path,
        "sweep",
        seed=seed,
        max_tokens=asked.max_tokens,
        curves=tuple(curves),
        by=by,
        fixed_shots=fixed_shots,
        sharing_fault=fault,
        max_new_tokens=max_new_tokens,
    )
    if path is not None and parts is not None and ranks.is_main:
        result.save(path)
        parts.remove()
    return result


def make_sweep(
    asked: InferenceModel,
    *,
    shots: Sequence[Shots],
    draws: int,
    queries: int,
    seed: int,
    by: Literal["sum", "mean"] = "sum",
    max_new_tokens: int | None = None,
) -> Sweep:
    """Return what is asked of every task.

    Raises:
        UserError: nothing would be asked.
    """
    sweep = Sweep(tuple(shots), num_draws=draws, num_queries=queries, seed=seed, max_tokens=asked.max_tokens, by=by)
    sweep = replace(sweep, max_new_tokens=max_new_tokens)
    if max_new_tokens is not None and not 1 <= max_new_tokens < asked.max_tokens:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: an answer needs at least 1 token, and must leave room for its input in"
            f" {asked.max_tokens:,} tokens"
        )
    if not sweep.shots or any(k != FILL and k < 0 for k in sweep.shots) or draws < 1 or queries < 1:
        raise UserError(f"--shots {list(shots)} --draws {draws} --queries {queries}: need shots from 0, and at least 1")
    return sweep


def fix_shots(sweep: Sweep, fixed_shots: int | Literal["most"]) -> Sweep:
    """Return the sweep with the same shots in all draws, in other orders.

    Raises:
        UserError: the number is not asked, or there is no second order to compare with.
    """
    known = fixed_shots == "most" or (fixed_shots >= 2 and fixed_shots in sweep.shots)
    if not known or sweep.num_draws < 2:
        raise UserError(
            f"fixed_shots = {fixed_shots}: needs one of the shot counts {sort_shots(sweep.shots)} from 2, and at least"
            f" 2 draws; there are {sweep.num_draws}"
        )
    return replace(sweep, fixed_shots=fixed_shots)


def _ask_cells(
    model: Any, plans: Sequence[TaskSweep], *, parts: Parts | None, ranks: Ranks, report: Report
) -> dict[tuple[str, int, Shots], Sequence[Prediction]]:
    """Return this rank's cells by (task, draw, shots): those that were finished before, and the others asked now."""
    mine = ranks.share([(plan, draw) for plan in plans for draw in range(plan.sweep.num_draws)])
    total = sum(len(plan.shots_of(draw)) for plan, draw in mine)
    answered: dict[tuple[str, int, Shots], Sequence[Prediction]] = {}
    if parts is not None:
        for plan, draw in mine:
            for shots in plan.shots_of(draw):
                rows = parts.read(plan.task.name, draw=draw, shots=shots, queries=plan.query_ids)
                answered |= {} if rows is None else {(plan.task.name, draw, shots): rows}
    if answered:
        report("finished before", len(answered), total)
    for plan, draw in mine:
        name = plan.task.name
        finished = [shots for shots in plan.shots_of(draw) if (name, draw, shots) in answered]
        for shots, predictions in ask_draw(model, plan, draw=draw, finished=finished):
            if parts is not None:
                parts.write(predictions)
            answered[name, draw, shots] = predictions
            report(f"{name}, {shots} shots", len(answered), total)
            ranks.check()
    return answered


def _with_kept_frame(asked: InferenceModel, out: Path) -> InferenceModel:
    """Return the model with the text around examples that an unfinished evaluation at `out` began with.

    A base model's chat template may write today's date, and an evaluation that goes on tomorrow must ask the same.
    """
    tokenizer, kept = asked.tokenizer, read_header(out).get("frame")
    if kept is None or tokenizer.settings.style == "plain" or read_note(asked.path).frame is not None:
        return asked
    frame = Frame(**kept)
    again = TaskTokenizer(tokenizer.tokenizer, tokenizer.settings, frame=frame, end_ids=tokenizer.end_ids)
    return replace(asked, tokenizer=again)


def _identify(asked: InferenceModel, sweep: Sweep, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return everything that decides what an evaluation finds, for `Parts`."""
    return {
        "versions": package_versions(),
        "model": {"weights": hash_weights(asked.model), "tokenizer": asked.tokenizer.fingerprint()},
        **({"frame": asdict(asked.tokenizer.frame)} if asked.tokenizer.settings.style == "chat" else {}),
        "device": device_of(asked.model).type + (", compiled" if asked.compiled else ""),
        "sweep": {**asdict(sweep), "shots": sort_shots(sweep.shots)},
        "streams": STREAMS,
        "tasks": {task.name: task.sha256 for task in tasks},
    }


def one_pass_curve(
    model: str | InferenceModel,
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
    asked = load_for_inference(model, max_tokens=token_budget) if isinstance(model, str) else model
    with asked.asking():
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


def shift_report(report: Report, number: int, total: int) -> Report:
    """Report progress over all tasks, in hundredths of one."""
    return lambda what, done, of: report(what, number * 100 + done * 100 // of, total * 100)
