"""Commands that look at data and recipes, or write tasks and rows: check, show, plan, export, world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manyicl.errors import UserError

commands = typer.Typer()

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyicl.comparison import ComparisonForecast
    from manyicl.planning import Forecast


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


@commands.command()
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


@commands.command()
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


@commands.command()
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
