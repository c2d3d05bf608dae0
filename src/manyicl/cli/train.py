"""Commands that make a model: train, merge."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from manyicl.cli.options import ModelPath, Trust, split_overrides, stoppable
from manyicl.errors import UserError

commands = typer.Typer()


@commands.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (*.toml); not needed with --resume.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.num_steps=20.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder. Default: runs/RECIPE-TIME.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Resume the run in this folder.")] = None,
) -> None:
    """Fine-tune as a recipe says, into a run directory that holds everything.

    A run that was stopped, or was out of memory: manyicl train --resume DIR [train.recompute=full]. One whose tasks or
    base were moved: manyicl train --resume DIR tasks.folder=PATH model.path=PATH
    """
    from manyicl.cli.tables.runs import held_out_table, plan_table
    from manyicl.console import make_console
    from manyicl.files import default_folder
    from manyicl.training import Prepared, RunFolder, load_recipe
    from manyicl.training import train as train_run

    def show_plan(prepared: Prepared) -> None:
        make_console().print(plan_table(prepared))

    if resume is not None and out is not None:
        raise UserError(f"--out {out}: a run is resumed in its own folder; omit --out")
    if resume is not None:
        recipe, overrides = split_overrides(recipe, overrides)
        config = RunFolder(resume).read_config(overrides=overrides)
        if recipe is not None:
            config = load_recipe(recipe, overrides=overrides)
        was_finished = RunFolder(resume).is_finished and RunFolder(resume).model.is_dir()
        with stoppable("train", "--resume", str(resume), kept=resume):
            run = train_run(config, out=resume, resume=True, on_prepared=show_plan)
        if was_finished and run.is_main_process:
            typer.echo(f"{resume}: was finished before; nothing was left to train", err=True)
    elif recipe is None:
        raise UserError("name a recipe (*.toml), or a run to resume: --resume DIR")
    else:
        folder = out or default_folder(recipe.stem)
        with stoppable("train", "--resume", str(folder), kept=RunFolder(folder).config_file):
            run = train_run(recipe, out=folder, overrides=overrides or (), on_prepared=show_plan)
    if not run.is_main_process:
        return
    console = make_console()
    if run.held_out:
        console.print(held_out_table(run.held_out))
    config = RunFolder(run.folder).read_config()
    asked = (*config.tasks.names, *(row.task for row in run.held_out), "NAME")[0]
    command = shlex.join(["manyicl", "ask", str(run.folder), "--tasks", config.tasks.folder, "--task", asked])
    state = RunFolder(run.folder).read_state()
    if state.stopped_step is not None:
        console.print(
            f"stopped early, after step {state.stopped_step:,} of {config.train.num_steps:,}: no better validation loss"
            f" in {config.train.early_stopping_patience} validations; the model is that of step {state.model_step:,}",
            soft_wrap=True,
        )
    console.print(f"model: {run.model}\nask it: {command}", soft_wrap=True)


@commands.command()
def merge(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the whole model.")],
    trust_remote_code: Trust = False,
) -> None:
    """Fold a run's adapter into its base, into a plain Hugging Face folder."""
    from manyicl.models import merge_adapter

    typer.echo(f"wrote {merge_adapter(model, out, trust_remote_code=trust_remote_code)}")
