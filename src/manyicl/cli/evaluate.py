"""Commands that ask a model: eval, curve, diff, ask."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.cli.options import (
    Calibrate,
    Choose,
    EndpointModel,
    MaxNewTokens,
    MaxTokens,
    ModelPath,
    Normalize,
    NumNearest,
    Out,
    Precision,
    Quantize,
    Recipe,
    Samples,
    Seed,
    Stop,
    TaskFolder,
    TaskNames,
    Temperature,
    TopP,
    Trust,
    check_endpoint,
    count_nearest,
    endpoint_settings,
    load_model,
    stoppable,
)
from manyicl.errors import UserError
from manyicl.evaluation import FILL, Shots

commands = typer.Typer()

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.evaluation import Evaluation


@commands.command("eval")
def eval_(
    model: ModelPath,
    tasks: TaskFolder,
    task: TaskNames = None,
    shots: Annotated[
        str, typer.Option("--shots", help="Shot counts, comma-separated; fill: as many as fit, in each draw.")
    ] = "0,1,4,16,64",
    choose: Choose = "random",
    num_nearest: NumNearest = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random draws of shots; 10 for a headline.")] = 5,
    queries: Annotated[
        int, typer.Option("--queries", min=1, help="Test rows to answer, the same for every number of shots and draw.")
    ] = 200,
    seed: Seed = 0,
    template: Annotated[
        int, typer.Option("--template", min=1, help="Which of a task's templates writes its inputs, from 1.")
    ] = 1,
    normalize: Normalize = "none",
    calibrate: Calibrate = "none",
    out: Out = None,
    max_tokens: MaxTokens = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    samples: Samples = 1,
    precision: Precision = "auto",
    quantize: Quantize = "auto",
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile parts of the model: faster on a GPU after many shots.")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Generate on this OpenAI-compatible server.")
    ] = None,
    endpoint_model: EndpointModel = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Queries in flight at the server. Default: 8.")
    ] = None,
) -> None:
    """Score against number of shots, by task, with 95 % intervals over draws and queries.

    With --out, call a killed evaluation again to resume it. Several GPUs: accelerate launch -m manyicl eval ...
    """
    from manyicl.console import make_console, reporting
    from manyicl.distributed import joined_ranks
    from manyicl.evaluation import check_out, evaluate, predictions_path
    from manyicl.inference import AnswerSettings
    from manyicl.tasks import load_tasks

    settings = AnswerSettings(
        normalize=normalize,
        calibrate=calibrate,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        temperature=temperature,
        top_p=top_p,
        samples=samples,
    )
    with joined_ranks() as ranks, stoppable(*sys.argv[1:], kept=out.parent if out else None):
        counts = parse_shots(shots)
        check_out(out)
        ours = {"precision": precision, "quantize": quantize, "compile": compiled}
        theirs = {"endpoint_model": endpoint_model, "concurrency": concurrency}
        check_endpoint(endpoint, ours=ours, theirs=theirs)
        chosen = load_tasks(tasks, names=task)
        loaded = load_model(
            model,
            recipe=recipe,
            max_tokens=max_tokens,
            precision=precision,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            weights=endpoint is None,
            compiled=compiled,
        )
        server = endpoint_settings(endpoint, endpoint_model or model, concurrency=concurrency or 8)
        with reporting(make_console(stderr=True, quiet=not ranks.is_main)) as on_progress:
            result = evaluate(
                loaded,
                chosen,
                endpoint=server,
                shots=counts,
                draws=draws,
                queries=queries,
                seed=seed,
                answering=settings,
                choose=choose,
                num_nearest=count_nearest(choose, num_nearest),
                template=template,
                out=out,
                ranks=ranks,
                on_progress=on_progress,
            )
    console = make_console()
    _print_evaluation(console, result)
    if out is not None:
        console.print(f"wrote {out} and {predictions_path(out)}", soft_wrap=True)
    if not result.complete:
        console.print("incomplete: run the same command again for the queries without an answer", soft_wrap=True)
        raise typer.Exit(1)


def _print_evaluation(console: Console, result: Evaluation) -> None:
    """Print the table and the plot of a result, and whether its confidences tell which answers are right."""
    from manyicl.cli.tables.results import confidence_table, curve_plot, evaluation_table, reliability_plot

    console.print(evaluation_table(result))
    console.print(curve_plot(result, width=min(76, console.width), colour=console.is_terminal))
    if (surest := confidence_table(result)) is not None:
        console.print(surest)
        console.print(reliability_plot(result, width=min(76, console.width), colour=console.is_terminal))


@commands.command()
def curve(
    model: ModelPath,
    tasks: TaskFolder,
    task: TaskNames = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes of test rows per task.")] = 20,
    seed: Seed = 0,
    out: Out = None,
    max_tokens: MaxTokens = None,
    precision: Precision = "auto",
    quantize: Quantize = "auto",
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
) -> None:
    """Loss and greedy exact match at every k at once: one forward pass over each episode of test rows."""
    from manyicl.console import make_console, reporting
    from manyicl.evaluation import Evaluation, check_out, one_pass_curve, refuse_other_result
    from manyicl.tasks import load_tasks

    check_out(out)
    chosen = load_tasks(tasks, names=task)
    loaded = load_model(
        model,
        recipe=recipe,
        max_tokens=max_tokens,
        precision=precision,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        planned = Evaluation(loaded.path, "one-pass", seed=seed, max_tokens=loaded.max_tokens, curves=())
        refuse_other_result(out, planned, [{"task": t.name, "sha256": t.sha256} for t in chosen])
    with reporting(make_console(stderr=True)) as on_progress:
        result = one_pass_curve(loaded, chosen, episodes=episodes, seed=seed, on_progress=on_progress)
    fault = None
    if out is not None:  # first, so that a reader who stops reading loses nothing
        try:
            result.save(out)
        except OSError as error:  # a full disk, say: at least it can be read
            fault = error
    console = make_console()
    _print_evaluation(console, result)
    if fault is not None:
        raise fault
    if out is not None:
        console.print(f"wrote {out}", soft_wrap=True)


@commands.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result of manyicl eval --out.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another result, with the same tasks and seed.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with a sentence per cell.")] = False,
) -> None:
    """Which of two results is better: paired differences on the same draws and queries, with 95 % intervals."""
    from manyicl import verbs
    from manyicl.cli.tables.results import difference_plot, difference_table
    from manyicl.console import make_console

    difference = verbs.diff(a, b)
    if as_json:
        typer.echo(json.dumps(difference.to_json(), ensure_ascii=False))
    else:
        console = make_console()
        console.print(difference_table(difference))
        plot = difference_plot(difference, width=min(76, console.width), colour=console.is_terminal)
        if plot is not None:
            console.print(plot)


@commands.command("ask")
def ask_(
    model: ModelPath,
    tasks: TaskFolder,
    task: Annotated[str, typer.Option("--task", help="The task to answer.")],
    file: Annotated[str, typer.Argument(metavar="[FILE | -]", help="Inputs, one per line; - is standard input.")] = "-",
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Number of examples in the context. Default: as many as fit.")
    ] = None,
    choose: Choose = "random",
    num_nearest: NumNearest = None,
    seed: Seed = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: input, answer, confidence, unsure and more.")
    ] = False,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            "--min-confidence",
            min=0,
            max=1,
            help="Mark answers with a lower probability as unsure: `unsure (0.53): ANSWER`. Needs labels or --samples.",
        ),
    ] = None,
    normalize: Normalize = "none",
    calibrate: Calibrate = "none",
    max_tokens: MaxTokens = None,
    max_new_tokens: MaxNewTokens = None,
    precision: Precision = "auto",
    quantize: Quantize = "auto",
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    samples: Samples = 1,
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer one input per line, after as many examples as fit; standard error says how many that are.

    Examples are the task's train rows, or all rows of a file that names no splits.
    Line breaks in an answer are written as ⏎; --json keeps them.
    """
    from dataclasses import asdict

    from manyicl.cli.inputs import (
        IDLE_BALANCE,
        describe_answers,
        describe_questions,
        read_inputs,
        tell_idle,
        write_answer,
    )
    from manyicl.inference import AnswerSettings, answer_questions, check_min_confidence, pose_questions
    from manyicl.tasks import NO_SPLIT_NOTE, load_task, load_tasks, name_sources

    inputs = read_inputs(file)
    chosen = load_tasks(tasks, names=[task])[0]
    if chosen.split_note == NO_SPLIT_NOTE:  # no row was set aside for tests by who wrote the file
        chosen = load_task(name_sources(tasks)[task], one_split=True)
    answering = AnswerSettings(
        normalize=normalize,
        calibrate=calibrate,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        temperature=temperature,
        top_p=top_p,
        samples=samples,
    )
    check_min_confidence(min_confidence, has_confidence=bool(chosen.labels) or samples > 1)
    loaded = load_model(
        model,
        recipe=recipe,
        max_tokens=max_tokens,
        precision=precision,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
    )
    questions = pose_questions(
        loaded,
        chosen,
        inputs,
        shots=shots,
        seed=seed,
        answering=answering,
        choose=choose,
        num_nearest=count_nearest(choose, num_nearest),
    )
    if not as_json:  # before the answers, which may take minutes
        num_labels = 0 if choose == "nearest" else len(chosen.labels)
        typer.echo(describe_questions(questions, num_labels=num_labels), err=True)
    if choose == "balanced" and not chosen.labels:
        typer.echo(f"note: {IDLE_BALANCE}", err=True)
    if idle := answering.idle(are_chosen=bool(chosen.labels)):
        typer.echo(f"note: {tell_idle(idle, are_chosen=bool(chosen.labels))}", err=True)
    answers = answer_questions(loaded, questions, seed=seed, answering=answering, min_confidence=min_confidence)
    for answer in answers:
        typer.echo(json.dumps(asdict(answer), ensure_ascii=False) if as_json else write_answer(answer))
    if not as_json and (faults := describe_answers(answers)):
        typer.echo(faults, err=True)


def parse_shots(text: str) -> tuple[Shots, ...]:
    """Return the shot counts of '0,1,4,fill'."""
    try:
        counts = tuple(FILL if part.strip() == FILL else int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--shots {text}: write numbers separated by commas, and fill for as many as fit, such as 0,1,4,16,fill"
        ) from None
    if any(count != FILL and count < 0 for count in counts):
        raise UserError(f"--shots {text}: shots count from 0")
    return counts
