"""The command line: its verbs, and no logic."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manyicl.distributed import SharedError
from manyicl.errors import OutOfMemoryError, UserError, find_refusal
from manyicl.evaluation import FILL, Shots

app = typer.Typer(
    name="manyicl",
    help="Many-shot in-context fine-tuning: one model, many tasks; bring examples, not adapters.\n\n"
    "Start with `manyicl demo`. Then: `check` your task files, `show` an episode, `train` a recipe, `eval` or `curve`"
    " the result, and `ask` it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

TaskFolder = Annotated[
    Path, typer.Option("--tasks", help="Folder of task files (*.jsonl, *.json, *.csv, *.tsv, *.parquet).")
]
TaskNames = Annotated[
    list[str] | None, typer.Option("--task", help="A task of the folder; repeat for more. All unless said.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write the result (FILE.json).")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides which shots, queries and episodes are drawn.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", min=1, help="Longest sequence; the budget it was trained on unless said, or all it can see."
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help="Most tokens of a generated answer. Default: as many as the longest train answer has, at most 256.",
    ),
]
ModelPath = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="A checkpoint, an adapter, a run, or a hub name.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Precision = Annotated[
    Literal["auto", "bf16", "fp32"],
    typer.Option("--precision", help="auto: bf16 if the device multiplies it in hardware, else fp32."),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="Write examples as this recipe's \\[template] says; as the model was trained unless said."
    ),
]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyicl.comparison import ComparisonForecast
    from manyicl.evaluation import AskedModel, Evaluation
    from manyicl.planning import Forecast
    from manyicl.tasks import Task


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of task files.")],
    model: Annotated[str | None, typer.Option("--model", help="Count tokens with this model's tokenizer.")] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="TASK", help="Look for its rows in the other tasks; repeat for more."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="A recipe with a \\[compare] section, which says which tasks are held out."),
    ] = None,
) -> None:
    """Audit task files: rows, drops, labels, lengths, and a verdict for each task. Exits 1 if one cannot be used.

    With --held-out or --recipe also: are rows of held-out tasks also rows of tasks that are trained on?
    """
    from manyicl.cli.result_tables import audit_table
    from manyicl.console import make_console
    from manyicl.planning import audit_task, find_overlaps, tell_overlaps
    from manyicl.tasks import load_task, name_sources

    sources = name_sources(folder)
    roles = _choose_roles(list(sources), held_out or (), recipe)
    tokenizer, max_tokens = None, None
    if model:  # only then is torch needed, which takes seconds to import
        from manyicl.episodes import TaskTokenizer, TemplateSettings
        from manyicl.models import ModelSettings, find_max_tokens, load_tokenizer

        tokenizer = TaskTokenizer(load_tokenizer(ModelSettings(path=model)), TemplateSettings())
        max_tokens = find_max_tokens(model)
        if max_tokens is None:
            typer.echo(f"{model}: does not say how long a sequence may be, so long rows are not counted", err=True)
    audits = [audit_task(source, tokenizer=tokenizer, max_tokens=max_tokens) for source in sources.values()]
    console = make_console()
    console.print(audit_table(audits))
    if roles:
        unread = {audit.path for audit in audits if audit.faults}
        read = {name: load_task(sources[name]) for name in roles if sources[name].path not in unread}
        for line in tell_overlaps(find_overlaps(read, trained=[name for name in read if roles[name] == "trained"])):
            console.print(line)
    if not all(audit.usable for audit in audits):
        raise typer.Exit(1)


def _choose_roles(names: Sequence[str], held_out: Sequence[str], recipe: Path | None) -> dict[str, str]:
    """Return task -> "trained" or "held-out", for tasks whose rows are to be compared; {} if none are.

    A recipe that names no held-out tasks, or has no [compare] section, holds out all that it does not train on.
    """
    from manyicl.errors import suggest

    trained = [name for name in names if name not in held_out] if held_out else []
    others, source = list(held_out), "--held-out"
    if recipe is not None:
        from manyicl.comparison import CompareConfig, choose_tasks
        from manyicl.training import load_recipe

        config = load_recipe(recipe, kind=CompareConfig)
        trained = choose_tasks(config, names)
        named = [*config.compare.held_out_tasks, *config.compare.familiar_tasks]
        others = list(held_out) or named or [name for name in names if name not in trained]
        trained, source = [name for name in trained if name not in others], f"--recipe {recipe}"
    for name in (*trained, *others):
        if name not in names:
            raise UserError(f"{source}: no task '{name}' in the folder{suggest(name, names)}")
    if (held_out or recipe) and not (trained and others):
        raise UserError(f"{source}: leaves no task to train on, or none that is held out; name some tasks, but not all")
    return dict.fromkeys(trained, "trained") | dict.fromkeys(others, "held-out")


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="A recipe (*.toml).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    episode: Annotated[int, typer.Option("--episode", min=0, help="Which episode of the plan.")] = 0,
) -> None:
    """Print one episode as training will see it, its trained tokens coloured, and counts below."""
    from manyicl.console import make_console
    from manyicl.planning import preview_recipe, render_episode
    from manyicl.training import load_recipe

    drawn = preview_recipe(load_recipe(recipe, overrides=overrides or ()), number=episode)
    console = make_console()
    console.print(render_episode(drawn), soft_wrap=True)  # a break that is not in the text would mislead
    console.print(f"\n{drawn.counts}", soft_wrap=True)
    if drawn.renaming:
        console.print(drawn.renaming, soft_wrap=True)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (*.toml).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Does it fit, and how long does it take, on this: h100, a100-40, ...")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many of them, each with all weights.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a recipe would train, whether it is sound, its memory and hours. Exits 1 if it would be in vain.

    Of a comparison's recipe, which has a section \\[compare]: what every arm takes, its trials and all that is asked.
    """
    from manyicl.cli.comparison_tables import comparison_forecast_table
    from manyicl.cli.forecast_tables import forecast_table
    from manyicl.comparison import CompareConfig, Grid, forecast_comparison
    from manyicl.console import make_console
    from manyicl.planning import find_device, forecast_run
    from manyicl.training import has_section, load_recipe

    forecast: Forecast | ComparisonForecast
    chosen: dict[str, Any] = {"device": find_device(device) if device else None, "num_devices": devices}
    if has_section(recipe, "compare"):
        compared = load_recipe(recipe, overrides=overrides or (), kind=CompareConfig)
        forecast = forecast_comparison(Grid(recipe.parent, compared), **chosen)
        shown = comparison_forecast_table(forecast)
    else:
        forecast = forecast_run(load_recipe(recipe, overrides=overrides or ()), **chosen)
        shown = forecast_table(forecast)
    if as_json:
        typer.echo(json.dumps(forecast.to_json(), ensure_ascii=False))
    else:
        make_console().print(shown)
    if forecast.blockers:
        raise typer.Exit(1)


@app.command()
def export(
    recipe: Annotated[Path, typer.Argument(help="A recipe (*.toml).")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the rows.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    format_: Annotated[
        Literal["trl"], typer.Option("--format", help="trl: input_ids, labels and seq_lengths as Parquet.")
    ] = "trl",
    rows: Annotated[
        Literal["episodes", "packs"], typer.Option("--rows", help="What a row holds; packs need flash attention there.")
    ] = "episodes",
) -> None:
    """Write the episodes that a recipe trains on for other trainers, such as TRL's SFTTrainer."""
    from manyicl.training import export_trl, load_recipe, prepare_run

    del format_  # there is one so far
    counts = export_trl(prepare_run(load_recipe(recipe, overrides=overrides or ())), out, rows=rows)
    written = " and ".join(f"{count:,} rows for {split}" for split, count in counts.items())
    typer.echo(f"wrote {written} to {out}\nread them: datasets.load_dataset({str(out)!r})")


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (*.toml); not needed with --resume.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.num_steps=20.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; runs/RECIPE-TIME unless said.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
) -> None:
    """Fine-tune as a recipe says, into a run directory that holds everything.

    A run that was stopped, or was out of memory: manyicl train --resume DIR [train.checkpointed_layers=all]
    """
    from manyicl.cli.run_tables import held_out_table, plan_table
    from manyicl.console import make_console
    from manyicl.files import default_folder
    from manyicl.training import Prepared, is_finished, load_recipe, read_run_config
    from manyicl.training import train as train_run

    def show_plan(prepared: Prepared) -> None:
        make_console().print(plan_table(prepared))

    if resume is not None and out is not None:
        raise UserError(f"--out {out}: a run goes on in its own folder; leave --out out")
    if resume is not None:
        if recipe is not None and "=" in recipe.name and not recipe.exists():
            recipe, overrides = None, [str(recipe), *(overrides or ())]
        config = read_run_config(resume, overrides=overrides or ())
        if recipe is not None:
            config = load_recipe(recipe, overrides=overrides or ())
        was_finished = is_finished(resume)
        with _stoppable("train", "--resume", str(resume), kept=resume):
            run = train_run(config, out=resume, resume=True, on_prepared=show_plan)
        if was_finished and run.is_main_process:
            typer.echo(f"{resume}: was finished before; nothing was left to train", err=True)
    elif recipe is None:
        raise UserError("name a recipe (*.toml), or a run to go on with: --resume DIR")
    else:
        folder = out or default_folder(recipe.stem)
        with _stoppable("train", "--resume", str(folder), kept=folder / "config.toml"):
            run = train_run(recipe, out=folder, overrides=overrides or (), on_prepared=show_plan)
    if not run.is_main_process:
        return
    console = make_console()
    if run.held_out:
        console.print(held_out_table(run.held_out))
    config = read_run_config(run.folder)
    asked = (*config.tasks.names, *(row.task for row in run.held_out), "NAME")[0]
    command = shlex.join(["manyicl", "ask", str(run.folder), "--tasks", config.tasks.folder, "--task", asked])
    console.print(f"model: {run.model}\nask it: {command}", soft_wrap=True)


@app.command("eval")
def eval_(
    model: ModelPath,
    tasks: TaskFolder,
    task: TaskNames = None,
    shots: Annotated[
        str, typer.Option("--shots", help="Shot counts, comma-separated; fill: as many as fit, in each draw.")
    ] = "0,1,4,16,64",
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random draws of shots; 10 for a headline.")] = 5,
    queries: Annotated[
        int, typer.Option("--queries", min=1, help="Test rows asked, the same at every k and draw.")
    ] = 200,
    seed: Seed = 0,
    length_normalized: Annotated[
        bool, typer.Option("--length-normalized", help="Choose a known answer by its nats a token, not by their sum.")
    ] = False,
    out: Out = None,
    max_tokens: MaxTokens = None,
    max_new_tokens: MaxNewTokens = None,
    precision: Precision = "auto",
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile pieces of the model: faster on a GPU behind many shots.")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Ask this OpenAI-compatible server to generate.")
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option("--endpoint-model", help="The server's name for it; MODEL_OR_RUN unless said.")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Queries under way at the server.")] = 8,
) -> None:
    """Score against number of shots, by task, with 95 % intervals over draws and queries.

    With --out, a killed evaluation goes on when called again. Several GPUs: accelerate launch -m manyicl eval ...
    """
    from manyicl.cli.result_tables import curve_plot, evaluation_table
    from manyicl.console import make_console, reporting
    from manyicl.distributed import joined_ranks
    from manyicl.evaluation import check_out, evaluate, predictions_path
    from manyicl.tasks import load_tasks

    by: Literal["sum", "mean"] = "mean" if length_normalized else "sum"
    with joined_ranks() as ranks, _stoppable(*sys.argv[1:], kept=out.parent if out else None):
        options: dict[str, Any] = {"shots": parse_shots(shots), "draws": draws, "queries": queries, "seed": seed}
        check_out(out)
        _check_endpoint(endpoint, endpoint_model, precision, by=by, compiled=compiled, num_ranks=ranks.count)
        chosen = load_tasks(tasks, names=task)
        asked = _load_asked(
            model,
            max_tokens,
            recipe,
            precision=precision,
            trust_remote_code=trust_remote_code,
            weights=endpoint is None,
            compiled=compiled,
        )
        with reporting(make_console(stderr=True, quiet=not ranks.is_main)) as report:
            options |= {"max_new_tokens": max_new_tokens, "out": out, "report": report}
            if endpoint is None:
                result = evaluate(asked, chosen, **options, by=by, ranks=ranks)
            else:
                result = _ask_endpoint(asked, chosen, (endpoint, endpoint_model or model, concurrency), **options)
    console = make_console()
    console.print(evaluation_table(result))
    console.print(curve_plot(result, width=min(76, console.width), colour=console.is_terminal))
    if out is not None:
        console.print(f"wrote {out} and {predictions_path(out)}", soft_wrap=True)
    if not result.complete:
        console.print("incomplete: give the same command again to ask what has no answer", soft_wrap=True)
        raise typer.Exit(1)


def _check_endpoint(
    endpoint: str | None,
    endpoint_model: str | None,
    precision: str,
    *,
    by: Literal["sum", "mean"],
    compiled: bool,
    num_ranks: int,
) -> None:
    """Refuse options that would do nothing with, or without, a server."""
    wrong = ""
    if endpoint is None:
        wrong = "--endpoint-model: needs --endpoint" if endpoint_model else ""
    elif precision != "auto":
        wrong = "--precision: is the server's own"
    elif compiled:
        wrong = "--compile: the server runs the model"
    elif by == "mean":
        wrong = "--length-normalized: a server tells no likelihoods"
    elif num_ranks > 1:
        raise UserError(f"--endpoint {endpoint}: one process asks a server; leave accelerate out, raise --concurrency")
    if wrong:
        raise UserError(f"{wrong}; leave it out")


def _ask_endpoint(asked: AskedModel, tasks: Sequence[Task], server: tuple[str, str, int], **options: Any) -> Evaluation:
    """Return what a server (URL, model's name there, concurrency) answers."""
    try:
        from manyicl.evaluation import evaluate_at_endpoint
        from manyicl.inference import EndpointSettings
    except ModuleNotFoundError as error:
        # Not the extra, which pip finds only where the package is on an index.
        raise UserError(f"--endpoint: {error.name} is not installed; pip install httpx2 tenacity") from error

    url, name, concurrency = server
    settings = EndpointSettings(url, model=name, concurrency=concurrency)
    return evaluate_at_endpoint(asked, tasks, endpoint=settings, **options)


@app.command()
def curve(
    model: ModelPath,
    tasks: TaskFolder,
    task: TaskNames = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes of test rows a task.")] = 20,
    seed: Seed = 0,
    out: Out = None,
    max_tokens: MaxTokens = None,
    precision: Precision = "auto",
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
) -> None:
    """Loss and greedy exact match at every k at once: one forward pass over each episode of test rows."""
    from manyicl.cli.result_tables import curve_plot, evaluation_table
    from manyicl.console import make_console, reporting
    from manyicl.evaluation import check_out, one_pass_curve, refuse_other_result
    from manyicl.tasks import load_tasks

    check_out(out)
    chosen = load_tasks(tasks, names=task)
    asked = _load_asked(model, max_tokens, recipe, precision=precision, trust_remote_code=trust_remote_code)
    if out is not None:
        settings = {"model": asked.path, "kind": "one-pass", "seed": seed, "max_tokens": asked.max_tokens}
        refuse_other_result(out, settings, [{"task": t.name, "sha256": t.sha256} for t in chosen])
    with reporting(make_console(stderr=True)) as report:
        result = one_pass_curve(asked, chosen, episodes=episodes, seed=seed, report=report)
    fault = None
    if out is not None:  # first, so that a reader who stops reading loses nothing
        try:
            result.save(out)
        except OSError as error:  # a full disk, say: at least it can be read
            fault = error
    console = make_console()
    console.print(evaluation_table(result))
    console.print(curve_plot(result, width=min(76, console.width), colour=console.is_terminal))
    if fault is not None:
        raise fault
    if out is not None:
        console.print(f"wrote {out}", soft_wrap=True)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result of manyicl eval --out.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another, asked with the same tasks and seed.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with a sentence a cell.")] = False,
) -> None:
    """Which of two results is better: paired differences on the same draws and queries, with 95 % intervals."""
    from manyicl.cli.result_tables import difference_table
    from manyicl.console import make_console
    from manyicl.evaluation import compare_results, read_result

    difference = compare_results(read_result(a), read_result(b))
    if as_json:
        typer.echo(json.dumps(difference.to_json(), ensure_ascii=False))
    else:
        make_console().print(difference_table(difference))


@app.command()
def compare(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with a [compare] section (*.toml).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as compare.draws=10.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A new folder; runs/RECIPE-TIME unless said.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the comparison in this folder.")] = None,
    status: Annotated[Path | None, typer.Option("--status", help="Show what is done of this one, and stop.")] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Do this seed only (repeat for several): one GPU a seed.")
    ] = None,
) -> None:
    """Train the arms of the paper from one recipe, matched, ask them alike, and write a report.

    The arms: base, zero-shot and few-shot fine-tuning, ManyICL, and a dedicated model a task. A killed comparison goes
    on with --resume. To share one out over GPUs, start it once a GPU with --resume DIR --seed N.
    """
    from manyicl.comparison import CompareConfig, check_seeds, open_comparison, refuse_ranks, run_comparison
    from manyicl.console import make_console
    from manyicl.files import default_folder
    from manyicl.report import finish_comparison, grid_table
    from manyicl.training import load_recipe

    console = make_console()
    if status is not None:
        console.print(grid_table(open_comparison(status, None)))
        return
    refuse_ranks()
    if resume is not None and (recipe is not None or out is not None):
        raise UserError(f"--resume {resume}: goes on with its own recipe and folder; leave RECIPE and --out out")
    if recipe is None and resume is None:
        raise UserError("name a recipe (*.toml), or a comparison to go on with: --resume DIR")
    config = load_recipe(recipe, overrides=overrides or (), kind=CompareConfig) if recipe else None
    folder = resume or out or default_folder(recipe.stem if recipe else "")
    comparison = open_comparison(folder, config)
    check_seeds(comparison, seeds)
    some = [word for seed in seeds or () for word in ("--seed", str(seed))]
    with _stoppable("compare", "--resume", str(folder), *some, kept=folder, recipe=folder / "recipe.toml"):
        run_comparison(comparison, seeds=seeds, console=make_console(stderr=True))
    if not finish_comparison(comparison, console=console) and not seeds:
        raise typer.Exit(1)


@app.command()
def ask(
    model: ModelPath,
    tasks: TaskFolder,
    task: Annotated[str, typer.Option("--task", help="The task to answer.")],
    file: Annotated[str, typer.Argument(metavar="[FILE | -]", help="Inputs, one a line; - is standard input.")] = "-",
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="As many as fit unless said.")] = None,
    seed: Seed = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: input, answer, nll, shots, cut, left_out.")
    ] = False,
    max_tokens: MaxTokens = None,
    max_new_tokens: MaxNewTokens = None,
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer one input a line behind the shots that fit; standard error says how many these are."""
    from dataclasses import asdict

    from manyicl.evaluation import ask_inputs, read_inputs, tell_shots
    from manyicl.tasks import load_tasks

    inputs = read_inputs(file)
    chosen = load_tasks(tasks, names=[task])[0]
    asked = _load_asked(model, max_tokens, recipe, precision="auto", trust_remote_code=trust_remote_code)
    answers = ask_inputs(asked, chosen, inputs, shots=shots, seed=seed, max_new_tokens=max_new_tokens)
    if not as_json:
        typer.echo(tell_shots(answers, num_train=len(chosen.train)), err=True)
    for answer in answers:
        typer.echo(json.dumps(asdict(answer), ensure_ascii=False) if as_json else answer.answer)


def _load_asked(
    model: str,
    max_tokens: int | None,
    recipe: Path | None,
    *,
    precision: Literal["auto", "bf16", "fp32"],
    trust_remote_code: bool,
    weights: bool = True,
    compiled: bool = False,
) -> AskedModel:
    """Return the model that a verb asks, in the template of a recipe where one is named."""
    from manyicl.evaluation import load_asked_model
    from manyicl.training import load_recipe

    return load_asked_model(
        model,
        precision=precision,
        max_tokens=max_tokens,
        template=load_recipe(recipe).template if recipe else None,
        trust_remote_code=trust_remote_code,
        weights=weights,
        compiled=compiled,
    )


@app.command()
def merge(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the whole model.")],
) -> None:
    """Fold a run's adapter into its base, into a plain Hugging Face folder."""
    from manyicl.models import merge_adapter

    typer.echo(f"wrote {merge_adapter(model, out)}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a `manyicl compare`.")],
    others: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR ...]", help="The same comparison under other matchings, to stand beside it."),
    ] = None,
) -> None:
    """Write a comparison's report.html and report.md anew, from its comparison.json alone."""
    from manyicl.report import write_report

    page = write_report(folder, others=others or ())
    typer.echo(f"wrote {page} and {page.with_suffix('.md').name}")


@app.command()
def world(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the task files.")],
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="How many tasks; their kinds take turns.")] = 40,
    train: Annotated[int, typer.Option("--train", min=1, help="Train rows a task.")] = 72,
    test: Annotated[int, typer.Option("--test", min=1, help="Test rows a task.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides the tasks and their rows.")] = 0,
) -> None:
    """Write tasks of the embedded world, to try things on; `manyicl eval` knows its seed model by the name `seed`."""
    from manyicl.demo import export_tasks

    export_tasks(folder, num_tasks=tasks, num_train=train, num_test=test, seed=seed)
    typer.echo(f"wrote {tasks} tasks to {folder}\nask them: manyicl eval seed --tasks {folder}")


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Its folder; runs/demo-TIME unless said.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides tasks, episodes, shots and queries.")] = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Training seeds, from --seed on; 5 for intervals.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="In 90 seconds, with wider intervals.")] = False,
) -> None:
    """The paper's comparison in minutes on two cores: base, zero-shot, few-shot, ManyICL and dedicated fine-tuning.

    On the packaged seed model and tasks of the embedded world, in two regimes: many tasks with few examples, and few
    tasks with many. Killed, it goes on when called again with the same --out.
    """
    from manyicl.console import make_console
    from manyicl.demo import run_demo
    from manyicl.files import default_folder

    folder = out or default_folder("demo")
    options = ["--seed", str(seed), "--seeds", str(seeds), *(["--quick"] if quick else [])]
    with _stoppable("demo", "--out", str(folder), *options, kept=folder, recipe=folder / "REGIME" / "recipe.toml"):
        run_demo(out=folder, seed=seed, num_seeds=seeds, quick=quick, console=make_console())


def _is_main() -> bool:
    """Return whether this process tells what all of its launch meet; known before torch is there to ask."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _stoppable(*command: str, kept: Path | None, recipe: Path | None = None) -> Iterator[None]:
    """Say on one line how to go on if the user stops it (Ctrl-C, exit code 130), or memory or the system fail it.

    command: what goes on, behind `manyicl`. kept: exists once there is something to go on with. recipe: where a setting
    is to be changed that takes less memory; the command takes it unless said.
    """
    try:
        yield
    except OutOfMemoryError as error:
        if error.setting is None:
            raise
        setting, where = ([], f"write it into {recipe}, and ") if recipe else ([error.setting], "")
        command_line = shlex.join(["manyicl", *command, *setting])
        raise UserError(f"{error}; {where}go on with: {command_line}") from error
    except UserError:
        raise
    except Exception as error:
        refused = find_refusal(error)
        if refused is None:
            raise
        on = f"what was saved is kept; go on with: {shlex.join(['manyicl', *command])}"
        raise UserError(f"{refused}; {on if kept and kept.exists() else 'nothing is kept'}") from error
    except KeyboardInterrupt:
        on = f"; go on with: {shlex.join(['manyicl', *command])}" if kept and kept.exists() else ", nothing is kept"
        if _is_main():
            typer.secho(f"stopped{on}", err=True, fg=typer.colors.YELLOW)
        raise typer.Exit(130) from None


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


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    # torch and its neighbours warn about their own future on every import; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _open_streams()
    try:
        app()
    except UserError as error:
        if isinstance(error, SharedError) and not _is_main():
            sys.exit(0)  # the main process tells it; a failure here would end that one before it could
        fault = str(error)
    except Exception as error:
        refused = find_refusal(error)
        if refused is None:
            raise  # a bug of ours
        fault = refused
    typer.secho(f"error: {fault}", err=True, fg=typer.colors.RED)
    sys.exit(2)


def _open_streams() -> None:
    """Have a place to print to if a stream is closed, and escapes for what its encoding does not know."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
