"""Ask a model: shot curves of many tasks with the files they leave, one-pass curves, and plain answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from manyicl.distributed import ALONE, Ranks
from manyicl.episodes import (
    Frame,
    TaskTokenizer,
    TemplateSettings,
    TokenizedTask,
    check_lost_answers,
    default_cache_dir,
    join_examples,
    tokenize_task,
)
from manyicl.errors import UserError
from manyicl.evaluation.curves import Report, ask_draw, make_curve, score_one_pass
from manyicl.evaluation.points import Prediction
from manyicl.evaluation.results import Evaluation, refuse_other_result
from manyicl.evaluation.shots import FILL, Shots, sort_shots
from manyicl.evaluation.sweep import (
    DEFAULT_SHOTS,
    LONG_TRAIN,
    Sweep,
    TaskSweep,
    draw_shots,
    most_answer_tokens,
    prefix_lengths,
    refuse_empty,
    write_answers,
)
from manyicl.evaluation.unfinished import Parts, package_versions, read_header, sole_writer_of_out
from manyicl.inference import (
    TRIAL_TOKENS,
    choose_option,
    device_of,
    encode_prefix,
    generate_behind,
    score_answers,
    score_choices,
    sharing_fault,
)
from manyicl.models import (
    ModelSettings,
    PrecisionChoice,
    check_vocabulary,
    check_window,
    hash_weights,
    load_config,
    load_end_ids,
    load_model,
    load_tokenizer,
    max_tokens_of,
    read_note,
    refuse_unusable,
    resolve_precision,
    trial_ids,
)
from manyicl.seeds import STREAMS, AskPurpose
from manyicl.tasks import Task
from manyicl.training import check_compiler


@dataclass(frozen=True, slots=True)
class AskedModel:
    """A model ready to be asked, with its tokenizer in the template that it was trained with.

    model: None where a server has the weights. max_tokens: longest sequence it may see. trained_shots: task -> most
    shots trained; empty for a plain checkpoint. compiled: pieces of it are, while it is asked (`fused`).
    """

    path: str
    model: Any
    tokenizer: TaskTokenizer
    max_tokens: int
    trained_shots: dict[str, int]
    compiled: bool = False

    def asking(self) -> AbstractContextManager[None]:
        """Return the context in which its model is asked."""
        if not self.compiled:
            return nullcontext()
        from manyicl.models import fused_pieces

        return fused_pieces(self.model)


def load_asked_model(
    model: str | ModelSettings,
    *,
    precision: PrecisionChoice = "auto",
    max_tokens: int | None = None,
    template: TemplateSettings | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    compiled: bool = False,
    frame: Frame | None = None,
) -> AskedModel:
    """Load a checkpoint, adapter or run to be asked, on the GPU where there is one.

    model: its path, or the settings of a base that is to be asked as a recipe changes it (config, revision).
    precision: "auto" is bf16 if the device multiplies it in hardware, else fp32.
    template: None means the one that the model was trained with.
    max_tokens: longest sequence; unless said, of a trained model the budget of its training, else all it can see.
    weights: False where a server has them, and only tokenizer, template and limits are wanted.
    compiled: ask it with compiled pieces, on a GPU; worth their minute where many are asked behind long prefixes.
    frame: the text around examples in the chat style; unless given, the one that the model was trained with, or else
    what its chat template writes today.

    Raises:
        UserError: it cannot be loaded or compiled, its tokens see those after them, or `max_tokens` is more than it can
            see.
    """
    on_gpu = torch.cuda.is_available()
    if compiled and not on_gpu:
        raise UserError("--compile: makes asking faster on a GPU only, and there is none here; leave it out")
    if compiled:
        check_compiler("--compile")
    given = ModelSettings(path=model) if isinstance(model, str) else model
    settings = given.model_copy(
        update={
            "precision": resolve_precision(precision),
            "lora": None,
            "trust_remote_code": trust_remote_code or given.trust_remote_code,
        }
    )
    path = settings.path
    config = load_config(settings)
    if max_tokens is not None:
        check_window(config, num_tokens=max_tokens, what="--max-tokens")
    note = read_note(path)
    if frame is None and template in (None, note.template):
        frame = note.frame
    tokenizer = TaskTokenizer(
        load_tokenizer(settings), template or note.template, frame=frame, end_ids=load_end_ids(settings)
    )
    loaded = load_model(settings).to("cuda" if on_gpu else "cpu").eval() if weights else None
    if loaded is not None:
        text = np.asarray(trial_ids(tokenizer.tokenizer, TRIAL_TOKENS), dtype=np.int32)
        if sharing_fault(loaded, text):
            refuse_unusable(loaded, text)  # its whole prompts would be no better
    return AskedModel(
        path=path,
        model=loaded,
        tokenizer=tokenizer,
        max_tokens=max_tokens or min(max_tokens_of(config), note.token_budget or max_tokens_of(config)),
        trained_shots=note.trained_shots,
        compiled=compiled,
    )


@sole_writer_of_out
def evaluate(
    model: str | AskedModel,
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
    asked = load_asked_model(model) if isinstance(model, str) else model
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
    asked: AskedModel,
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


def _with_kept_frame(asked: AskedModel, out: Path) -> AskedModel:
    """Return the model with the text around examples that an unfinished evaluation at `out` began with.

    A base model's chat template may write today's date, and an evaluation that goes on tomorrow must ask the same.
    """
    tokenizer, kept = asked.tokenizer, read_header(out).get("frame")
    if kept is None or tokenizer.settings.style == "plain" or read_note(asked.path).frame is not None:
        return asked
    frame = Frame(**kept)
    again = TaskTokenizer(tokenizer.tokenizer, tokenizer.settings, frame=frame, end_ids=tokenizer.end_ids)
    return replace(asked, tokenizer=again)


def _identify(asked: AskedModel, sweep: Sweep, tasks: Sequence[Task]) -> dict[str, Any]:
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
    left_out: reason -> train rows that could not be shots.
    """

    input: str
    answer: str
    nll: float | None
    shots: int
    cut: bool
    left_out: Mapping[str, int] = field(default_factory=dict)


def ask_inputs(
    asked: AskedModel,
    task: Task,
    inputs: Sequence[str],
    *,
    shots: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Answer each input behind the shots of one draw that fit, or behind `shots` of them.

    Train rows that leave no room for the longest input are no shots: they are passed over, and counted in `left_out`.
    max_new_tokens: as in `evaluate`; an answer that was cut there says so.

    Raises:
        UserError: an empty input, fewer train rows than `shots`, or an input that does not fit behind the shots.
    """
    if shots is not None and shots < 0:
        raise UserError(f"--shots {shots}: shots count from 0")
    for number, text in enumerate(inputs, start=1):
        if not text.strip():
            raise UserError(f"line {number}: is empty; give one input a line")
    tokenized = tokenize_for(task, asked)
    written = write_answers(asked.tokenizer, task.labels)
    longest = most_answer_tokens(tokenized, written if task.labels else None, limit=max_new_tokens)
    between, after = asked.tokenizer.between_ids, asked.tokenizer.before_answer_ids
    queries = [np.asarray(between + ids + after, dtype=np.int32) for ids in asked.tokenizer.encode_inputs(inputs)]
    room = asked.max_tokens - longest - max(len(q) for q in queries)
    order = draw_shots(tokenized, seed=seed, draw=0, most_tokens=room - len(tokenized.head_ids))
    num_long = len(tokenized.splits["train"]) - len(order)
    fitting = int(np.searchsorted(prefix_lengths(tokenized, order), room, side="right")) - 1
    if fitting < (shots or 0):  # without any shots there is -1 where not even the head fits
        place = int(np.argmax([len(q) for q in queries])) + 1
        raise UserError(
            _tell_no_room(tokenized, num_fitting=fitting, shots=shots, line=place, max_tokens=asked.max_tokens)
        )
    num_shots = fitting if shots is None else shots
    before = join_examples(tokenized, split="train", indices=order[:num_shots].astype(np.int32)).ids
    if not num_shots:
        queries = [query[tokenized.num_between :] for query in queries]
    with asked.asking():
        answers = _answer_queries(
            asked, task, list(inputs), queries=queries, before=before, num_shots=num_shots, longest=longest
        )
    return [replace(answer, left_out={LONG_TRAIN: num_long} if num_long else {}) for answer in answers]


def _tell_no_room(tokenized: TokenizedTask, *, num_fitting: int, shots: int | None, line: int, max_tokens: int) -> str:
    """Return why an input cannot be asked behind so many shots, and what to do."""
    num_train = len(tokenized.splits["train"])
    if shots is not None and shots > num_train:
        return f"--shots {shots}: task '{tokenized.task.name}' has only {num_train} train rows; lower --shots"
    wanted = f", not {shots}" if shots is not None else ""
    return (
        f"line {line}: the longest input leaves room for {max(num_fitting, 0)} shots in {max_tokens} tokens{wanted};"
        " shorten it, or lower --shots"
    )


def tell_shots(answers: Sequence[Answer], *, num_train: int) -> str:
    """Return how many shots stood before the inputs, which train rows could be none, and how many answers were cut."""
    told = f"behind {answers[0].shots:,} of {num_train:,} train rows as shots"
    left_out = "".join(f"; {count:,} {reason}" for reason, count in answers[0].left_out.items())
    num_cut = sum(answer.cut for answer in answers)
    cut = f"; {num_cut:,} of {len(answers):,} answers cut at the token limit (--max-new-tokens raises it)"
    return f"{told}{left_out}{cut if num_cut else ''}"


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
        pairs = write_answers(asked.tokenizer, task.labels)
        options = [ids for _, ids in pairs]
        nats = score_choices(asked.model, prefix, queries, [options] * len(queries))
        best = [choose_option(nats_O, options) for nats_O in nats]
        return [
            Answer(text, pairs[place][0], nll=float(nats_O[place]), shots=num_shots, cut=False)
            for text, place, nats_O in zip(inputs, best, nats, strict=True)
        ]
    generated = generate_behind(asked.model, asked.tokenizer, prefix, queries, max_new_tokens=longest)
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
    """Return the lines of a file, or of standard input for '-', without a byte order mark and carriage returns at ends.

    Raises:
        UserError: the file cannot be read, or holds nothing.
    """
    try:
        if file == "-" and sys.stdin is None:
            raise UserError("standard input: is closed; give a file, or pipe one input a line")
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a UTF-8 text file with one input a line") from error
    text = text.lstrip("\ufeff")
    # Not splitlines: an input may hold other separators.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
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
    if asked.model is not None:
        check_vocabulary(asked.model.config, path=asked.path, num_tokens=tokenized.num_ids)
    return tokenized


def shift_report(report: Report, number: int, total: int) -> Report:
    """Report progress over all tasks, in hundredths of one."""
    return lambda what, done, of: report(what, number * 100 + done * 100 // of, total * 100)
