"""Commands that look at data and recipes, or write tasks and rows: check, show, plan, export, world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from manyicl.console import make_console
from manyicl.errors import UserError

commands = typer.Typer()
_PAIR_EXAMPLES = {"--column": "input=text", "--split": "test=validation"}


@commands.command()
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
    from manyicl import verbs
    from manyicl.cli.tables.results import audit_table
    from manyicl.planning import tell_overlaps

    found = verbs.check(folder, model=model, held_out=held_out or (), recipe=recipe)
    if not found.has_window:
        typer.echo(f"{model}: does not say how long a sequence may be, so long rows are not counted", err=True)
    console = make_console()
    console.print(audit_table(found.audits))
    for line in tell_overlaps(found.overlaps):
        console.print(line)
    if not found.usable:
        raise typer.Exit(1)


@commands.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A file (.jsonl, .json, .csv, .tsv, .parquet, .xlsx), a task file of lm-evaluation-harness (.yaml), a"
            " folder of data files or of a downloaded data set, or the name of a Hugging Face data set."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="A new folder for the task files.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--preview", help="Show what would be; write nothing.")] = False,
    config: Annotated[
        str | None, typer.Option("--config", help="Which configuration of a data set, or sheet of a workbook.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Which commit or tag of a data set.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="OURS=THEIRS",
            help="Where input, answer, options or split is: input=text; with several: input=premise,hypothesis.",
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="OURS=THEIRS", help="Which of its splits is ours: test=validation."),
    ] = None,
    answer_index: Annotated[
        int | None,
        typer.Option("--answer-index", min=0, max=1, help="Answers are numbers of options, counted from 0 or 1."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The task's name. Default: the source's.")] = None,
    family: Annotated[
        Literal["classification", "nli", "qa", "summarization", "math"] | None,
        typer.Option("--family", help="The task's family. Default: classification or qa, by its answers."),
    ] = None,
    rows: Annotated[Literal["jsonl", "parquet"], typer.Option("--rows", help="The format of the rows.")] = "jsonl",
) -> None:
    """Make a folder of tasks from other data: SQuAD, MMLU, ARC, alpaca, chats, Excel, a data set of the Hub, ...

    Shows what it recognised, three rows as they will be read, and how many rows it left out for what reason.
    """
    from manyicl.cli.tables.imports import tell_import
    from manyicl.conversion import import_tasks

    if out is None and not dry_run:
        raise UserError("name a new folder with --out, or only look with --dry-run")
    # A template may hold commas: input={premise}, so {hypothesis}.
    columns = {
        ours: own.split(",") if "," in own and "{" not in own else own
        for ours, own in _pairs("--column", column).items()
    }
    done = import_tasks(
        source,
        None if dry_run else out,
        config=config,
        revision=revision,
        columns=columns,
        splits=_pairs("--split", split),
        answer_index=answer_index,
        name=name,
        family=family,
        rows=rows,
    )
    make_console().print(tell_import(done), soft_wrap=True)


def _pairs(option: str, values: list[str] | None) -> dict[str, str]:
    """Return OURS=THEIRS options as a mapping."""
    from manyicl.tasks import parse_setting

    pairs = {}
    for value in values or ():
        ours, mark, theirs = value.partition("=")
        if not (ours and mark and theirs):
            raise UserError(f"{option} {value}: write OURS=THEIRS, such as {option} {_PAIR_EXAMPLES[option]}")
        if ours.strip() in pairs:
            several = "; several columns are given as input=premise,hypothesis" if option == "--column" else ""
            raise UserError(f"{option} {value}: {ours.strip()} is given twice; leave one out{several}")
        pairs[ours.strip()] = theirs.strip()
        if option == "--column":
            try:
                parse_setting("columns", pairs)
            except ValueError as error:
                raise UserError(f"{option} {value}: {error}") from error
    return pairs


@commands.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="A recipe (*.toml).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    episode: Annotated[int, typer.Option("--episode", min=0, help="Which episode of the plan.")] = 0,
) -> None:
    """Print one episode as training will see it, its trained tokens coloured, and counts below."""
    from manyicl import verbs
    from manyicl.planning import render_episode

    drawn = verbs.show(recipe, overrides=overrides or (), episode=episode)
    console = make_console()
    console.print(render_episode(drawn), soft_wrap=True)  # a break that is not in the text would mislead
    console.print(f"\n{drawn.counts}", soft_wrap=True)
    if drawn.renaming:
        console.print(drawn.renaming, soft_wrap=True)


@commands.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (*.toml).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Does it fit, and how long does it take, on this: h100, a100-40, ...")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many of them, each with all weights.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a recipe would train, whether it is sound, its memory and hours. Exits 1 if training would be pointless.

    For a comparison's recipe, which has a section \\[compare]: what all arms, their trials and their evaluation take.
    """
    from manyicl import verbs
    from manyicl.cli.tables.comparisons import comparison_forecast_table
    from manyicl.cli.tables.forecasts import forecast_table
    from manyicl.planning import Forecast

    forecast = verbs.plan(recipe, overrides=overrides or (), device=device, num_devices=devices)
    shown = forecast_table(forecast) if isinstance(forecast, Forecast) else comparison_forecast_table(forecast)
    if as_json:
        typer.echo(json.dumps(forecast.to_json(), ensure_ascii=False))
    else:
        make_console().print(shown)
    if forecast.blockers:
        raise typer.Exit(1)


@commands.command()
def export(
    recipe: Annotated[Path, typer.Argument(help="A recipe (*.toml).")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the rows.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    rows: Annotated[
        Literal["episodes", "packs"], typer.Option("--rows", help="What a row holds; packs need flash attention there.")
    ] = "episodes",
) -> None:
    """Write the episodes that a recipe trains on for other trainers, such as TRL's SFTTrainer."""
    from manyicl import verbs

    counts = verbs.export(recipe, out, overrides=overrides or (), rows=rows)
    written = " and ".join(f"{count:,} rows for {split}" for split, count in counts.items())
    typer.echo(f"wrote {written} to {out}\nread them: datasets.load_dataset({str(out)!r})")


@commands.command()
def world(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the task files.")],
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="How many tasks; their kinds take turns.")] = 40,
    train: Annotated[int, typer.Option("--train", min=1, help="Train rows per task.")] = 72,
    test: Annotated[int, typer.Option("--test", min=1, help="Test rows per task.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides the tasks and their rows.")] = 0,
) -> None:
    """Write tasks of the embedded world, to try things on; `manyicl eval` knows its seed model by the name `seed`."""
    from manyicl import verbs

    verbs.write_world(folder, num_tasks=tasks, num_train=train, num_test=test, seed=seed)
    typer.echo(f"wrote {tasks} tasks to {folder}\nask them: manyicl eval seed --tasks {folder}")
