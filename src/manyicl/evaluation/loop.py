"""The loop that evaluates a model: shot curves of many tasks with the files they leave, and one-pass curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manyicl.distributed import ALONE, Ranks
from manyicl.episodes import Frame, TaskTokenizer
from manyicl.errors import UserError, check_kind, take_whole
from manyicl.evaluation.answering import PointAnswers, answer_draw
from manyicl.evaluation.curves import OnProgress, make_curve, score_one_pass
from manyicl.evaluation.results import Evaluation, refuse_other_result
from manyicl.evaluation.shots import Shots, sort_shots
from manyicl.evaluation.sweep import DEFAULT_SHOTS, Sweep, TaskSweep, check_sweep, refuse_empty
from manyicl.evaluation.unfinished import (
    Unfinished,
    answer_log_path,
    read_header,
    sole_writer_of_out,
)
from manyicl.inference import (
    DEFAULT_ANSWERS,
    NUM_NEAREST,
    AnswerSettings,
    Engine,
    InferenceModel,
    ShotPolicy,
    choose_engine,
    load_for_inference,
    tokenize_for,
    trained_shots_of,
)
from manyicl.models import device_of, hash_weights, read_note
from manyicl.seeds import STREAMS
from manyicl.tasks import Task, with_template
from manyicl.training import package_versions

if TYPE_CHECKING:  # it needs packages that only those who use a server install
    from manyicl.inference import EndpointSettings

_Point = tuple[str, int, Shots]  # task, draw, number of shots


def evaluate(
    model: str | Path | InferenceModel,
    tasks: Sequence[Task],
    *,
    endpoint: EndpointSettings | None = None,
    shots: Sequence[Shots] = DEFAULT_SHOTS,
    draws: int = 5,
    queries: int = 200,
    seed: int = 0,
    answering: AnswerSettings = DEFAULT_ANSWERS,
    choose: ShotPolicy = "random",
    num_nearest: int = NUM_NEAREST,
    fixed_shots: int | Literal["most"] | None = None,
    template: int = 1,
    out: str | Path | None = None,
    ranks: Ranks = ALONE,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Return the shot curve of every task: `queries` test rows after `draws` draws of 0 ... k train shots.

    endpoint: a server that answers instead of the model's own weights. It reports no likelihoods, so every answer is
        generated, and a known answer counts if it is written exactly.
    shots: numbers of shots, and "fill" for as many as fit in each draw.
    answering: how a query is answered: which known answer is chosen, or how an open one is generated.
    choose: how shots are chosen: at "random"; "balanced", labels taking turns; or "nearest", shared random shots and
        after them those most like the query (BM25), the most similar one last.
    num_nearest: most shots of a query's own, if the nearest are chosen.
    fixed_shots: one of `shots`: all draws hold the same shots up to that number, each in another order, so that the
        spread at that number is due to the order alone. "most": each task's own largest number.
    template: which of a task's templates writes shots and queries, from 1.
    out: FILE.json to write. What is finished is kept beside it until the result is complete (`unfinished`); the same
        call resumes from there.
    ranks: processes among which the draws of all tasks are divided; all of them return the same.
    on_progress: called with what is under way, how many queries are answered, and how many there are in all.

    Raises:
        UserError: `tasks` or `shots` is no list, a task has no test rows, its answers cannot be written by the
            tokenizer, nothing can be asked, a task has no such template, the server refuses, or `out` holds another
            evaluation, finished or not.
    """
    tasks = _list_tasks(tasks)
    if isinstance(shots, str) or not isinstance(shots, Iterable):
        raise UserError(f"shots={shots}: give a list, such as [0, 1, 4, 'fill']")
    check_kind("answering", answering, AnswerSettings)
    number = take_whole("template", template)
    tasks = [with_template(task, number) for task in tasks]
    loaded = model if isinstance(model, InferenceModel) else load_for_inference(model, weights=endpoint is None)
    sweep = Sweep(
        tuple(k if isinstance(k, str) else take_whole("shots", k, advice=", or 'fill'") for k in shots),
        num_draws=take_whole("draws", draws),
        num_queries=take_whole("queries", queries),
        seed=take_whole("seed", seed),
        max_tokens=loaded.max_tokens,
        answering=answering,
        fixed_shots=fixed_shots if isinstance(fixed_shots, str | None) else take_whole("fixed_shots", fixed_shots),
        choose=choose,
        num_nearest=take_whole("num_nearest", num_nearest),
    )
    return evaluate_sweep(loaded, tasks, sweep, endpoint=endpoint, out=out, ranks=ranks, on_progress=on_progress)


@sole_writer_of_out
def evaluate_sweep(
    loaded: InferenceModel,
    tasks: Sequence[Task],
    sweep: Sweep,
    *,
    endpoint: EndpointSettings | None = None,
    allow_empty: bool = False,
    out: str | Path | None = None,
    ranks: Ranks = ALONE,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Return the shot curve of every task, as `evaluate` does, with all settings of a sweep.

    allow_empty: return empty points, instead of an error, if no task has room for a query.
    """
    if endpoint is not None:
        _check_server(endpoint, sweep.answering, ranks=ranks)
    check_sweep(sweep)
    path = None if out is None else Path(out)
    if path is not None and endpoint is None:
        loaded = _with_kept_frame(loaded, path)
    sweeps = _plan_sweeps(loaded, tasks, sweep)
    if not allow_empty:
        refuse_empty(sweeps)
    result = Evaluation(
        loaded.path,
        "sweep",
        seed=sweep.seed,
        max_tokens=loaded.max_tokens,
        curves=(),
        answering=sweep.answering,
        engine="local" if endpoint is None else "endpoint",
        fixed_shots=sweep.fixed_shots,
        prompt_template=loaded.tokenizer.settings.model_dump(),
        **sweep.choice,
    )
    if path is not None:
        server_model = None if endpoint is None else endpoint.model
        refuse_other_result(path, result, [one.about for one in sweeps], endpoint_model=server_model)
    unfinished = Unfinished(path, _identify(loaded, sweep, tasks) if path is not None and endpoint is None else None)
    try:
        with choose_engine(loaded, endpoint=endpoint, kept=unfinished.answers) as engine:
            work = partial(_answer_points, engine, sweeps, unfinished=unfinished, ranks=ranks, on_progress=on_progress)
            answers = {point: one for part in ranks.gather(work) for point, one in part.items()}
    except UserError as error:
        if path is None or not unfinished.answers:
            raise
        kept = f"{len(unfinished.answers)} answers are kept in {answer_log_path(path)}; repeat the evaluation to go on"
        raise UserError(f"{error}; {kept}") from error
    finally:
        unfinished.close()
    curves = [
        make_curve(
            one,
            {(draw, shots): answers[one.task.name, draw, shots] for draw, shots in one.points},
            trained_shots=trained_shots_of(loaded, one.task),
            shared=None if engine.sharing_fault is None else not engine.sharing_fault,
        )
        for one in sweeps
    ]
    result = replace(
        result,
        curves=tuple(curves),
        endpoint=engine.server,
        sharing_fault=engine.sharing_fault or "",
    )
    if path is not None and ranks.is_main:
        result.save(path)
        if result.complete:
            unfinished.remove()
    return result


def _check_server(endpoint: EndpointSettings, answering: AnswerSettings, *, ranks: Ranks) -> None:
    """Refuse settings of another kind, and what a server cannot do."""
    from manyicl.inference import EndpointSettings

    check_kind("endpoint", endpoint, EndpointSettings)
    for name in ("normalize", "calibrate"):
        if getattr(answering, name) != "none":
            raise UserError(
                f"{name}={getattr(answering, name)}: a server reports no likelihoods to choose by; leave it out"
            )
    if ranks.count > 1:
        raise UserError(f"`endpoint`: {ranks.count} processes; let one process ask the server, several queries at once")


def _plan_sweeps(model: InferenceModel, tasks: Sequence[Task], settings: Sweep) -> list[TaskSweep]:
    """Return what is asked of each task.

    Raises:
        UserError: two tasks have one name, or the answers of one cannot be used.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"tasks {', '.join(sorted(names))}: two have one name; their draws would be the same")
    return [TaskSweep(tokenize_for(task, model), tokenizer=model.tokenizer, sweep=settings) for task in tasks]


def _answer_points(
    engine: Engine,
    sweeps: Sequence[TaskSweep],
    *,
    unfinished: Unfinished,
    ranks: Ranks,
    on_progress: OnProgress,
) -> dict[_Point, PointAnswers]:
    """Return this rank's answers by point: those that were finished before, and the others asked now."""
    mine = ranks.shard([(sweep, draw) for sweep in sweeps for draw in range(sweep.settings.num_draws)])
    total = sum(len(sweep.shots_of(draw)) * len(sweep.queries) for sweep, draw in mine)
    answers: dict[_Point, PointAnswers] = {}
    done = 0  # answers, of `total`
    for sweep, draw in mine:
        for shots in sweep.shots_of(draw):
            rows = unfinished.read(sweep.task.name, draw=draw, shots=shots, queries=sweep.query_ids)
            if rows is not None:
                answers[sweep.task.name, draw, shots] = PointAnswers(rows)
                done += len(rows)
    if answers:
        on_progress("finished before", done, total)

    reached = done  # answers of the points that are kept
    for sweep, draw in mine:
        name = sweep.task.name

        def count(shots: Shots, number: int, name: str = name) -> None:
            nonlocal done
            done += number
            on_progress(f"{name}, {shots} shots", done, total)

        finished = [shots for shots in sweep.shots_of(draw) if (name, draw, shots) in answers]
        for shots, one in answer_draw(engine, sweep, draw=draw, finished=finished, on_answer=count):
            if not one.unanswered:
                unfinished.write(one.predictions)
            answers[name, draw, shots] = one
            reached += len(sweep.queries)
            if done < reached:  # a server's answers were counted as they came
                count(shots, reached - done)
            ranks.check()
    return answers


def _with_kept_frame(model: InferenceModel, out: Path) -> InferenceModel:
    """Return the model with the text around examples that an unfinished evaluation at `out` began with.

    A base model's chat template may write today's date, and an evaluation that goes on tomorrow must ask the same.
    """
    tokenizer, kept = model.tokenizer, read_header(out).get("frame")
    if kept is None or tokenizer.settings.style == "plain" or read_note(model.path).frame is not None:
        return model
    frame = Frame(**kept)
    again = TaskTokenizer(tokenizer.tokenizer, tokenizer.settings, frame=frame, end_ids=tokenizer.end_ids)
    return replace(model, tokenizer=again)


def _identify(model: InferenceModel, sweep: Sweep, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return everything that decides what an evaluation finds, for `Unfinished`."""
    return {
        "versions": package_versions(),
        "model": {"weights": hash_weights(model.model), "tokenizer": model.tokenizer.fingerprint},
        **({"frame": asdict(model.tokenizer.frame)} if model.tokenizer.settings.style == "chat" else {}),
        "device": device_of(model.model).type + (", compiled" if model.compiled else ""),
        "sweep": {
            **{key: value for key, value in asdict(sweep).items() if key not in ("choose", "num_nearest")},
            "shots": sort_shots(sweep.shots),
            **sweep.choice,
        },
        "streams": STREAMS,
        "tasks": {task.name: task.sha256 for task in tasks},
    }


def _list_tasks(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks; raise a UserError for one task, a folder or something else in place of a list of tasks."""
    if isinstance(tasks, Task):
        raise UserError(f"tasks: is one task, {tasks.name!r}; give a list of tasks, [task]")
    if isinstance(tasks, str | Path):
        raise UserError(f"tasks={tasks}: is a name, no list of tasks; give manyicl.load_tasks({str(tasks)!r})")
    listed = list(tasks) if isinstance(tasks, Iterable) else [tasks]
    if not all(isinstance(task, Task) for task in listed):
        raise UserError(f"tasks={str(tasks)[:60]}: is not a list of tasks; give that of manyicl.load_tasks(FOLDER)")
    if not listed:
        raise UserError("tasks: is empty; give a list of tasks, such as that of manyicl.load_tasks(FOLDER)")
    return listed


def one_pass_curve(
    model: str | Path | InferenceModel,
    tasks: Sequence[Task],
    *,
    episodes: int = 20,
    token_budget: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Return loss and greedy exact match at every k from one forward pass over each episode of test rows.

    token_budget: length of an episode. Default: as much as the model can see.

    Raises:
        UserError: `tasks` is no list, `episodes` or `token_budget` is out of range, no test row of a task fits, or a
            likelihood is not finite.
    """
    tasks = _list_tasks(tasks)
    episodes, seed = take_whole("episodes", episodes), take_whole("seed", seed)
    token_budget = None if token_budget is None else take_whole("token_budget", token_budget)
    loaded = model if isinstance(model, InferenceModel) else load_for_inference(model, max_tokens=token_budget)
    budget = loaded.max_tokens if token_budget is None else token_budget
    if episodes < 1 or not 1 <= budget <= loaded.max_tokens:
        raise UserError(
            f"episodes={episodes}, token_budget={budget}: need at least 1 episode, of 1 to {loaded.max_tokens:,}"
            " tokens, which is as much as the model can see"
        )
    with loaded.answering():
        curves = [
            score_one_pass(
                loaded.model,
                tokenize_for(task, loaded),
                num_episodes=episodes,
                token_budget=budget,
                seed=seed,
                trained_shots=trained_shots_of(loaded, task),
                on_progress=_shift_progress(on_progress, number, len(tasks)),
            )
            for number, task in enumerate(tasks)
        ]
    written = loaded.tokenizer.settings.model_dump()
    return Evaluation(
        loaded.path, "one-pass", seed=seed, max_tokens=budget, curves=tuple(curves), prompt_template=written
    )


def _shift_progress(on_progress: OnProgress, number: int, total: int) -> OnProgress:
    """Return what reports the episodes of task `number` as those of all tasks, of which each has as many."""
    return lambda what, done, of: on_progress(f"{what}, episodes", number * of + done, total * of)
