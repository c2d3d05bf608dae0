"""Commands that compare ways of training: compare, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.cli.options import split_overrides, stoppable
from manyicl.errors import UserError
from manyicl.processes import SHARED_BY, end_with_helped

commands = typer.Typer()


@commands.command()
def compare(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with a [compare] section (*.toml).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as compare.draws=10.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="A new folder, or one of the same recipe, which is continued. Default: runs/RECIPE-TIME."
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Resume the comparison in this folder.")] = None,
    status: Annotated[
        Path | None, typer.Option("--status", help="Show how far the comparison in this folder is, and exit.")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Do only this training seed; repeat for more."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", min=1, help="How many share the work: one or more per GPU, each with an equal part of it."
        ),
    ] = 1,
    shared_by: Annotated[int | None, typer.Option(SHARED_BY, min=1, hidden=True)] = None,
) -> None:
    """Train the arms of the paper from one recipe, matched by tokens, evaluate them alike, and write a report.

    The arms: base, zero-shot and few-shot fine-tuning, ManyICL, and a dedicated model per task. Resume a killed
    comparison with --resume DIR, and one whose files were moved with --resume DIR tasks.folder=PATH (or model.path,
    compare.text_files). To use several GPUs, say --processes N: one or more for each. Several on one GPU do more
    together if the model is small, as its GPU waits for Python.
    """
    from manyicl import verbs
    from manyicl.comparison import open_comparison, run_comparison
    from manyicl.console import make_console
    from manyicl.files import default_folder
    from manyicl.report import grid_table, print_outcome

    console = make_console()
    if status is not None:
        if recipe is not None or out is not None or resume is not None or seeds or processes > 1:
            raise UserError(f"--status {status}: only shows a comparison; leave the other arguments out")
        console.print(grid_table(open_comparison(status, None)))
        return
    if resume is not None and shared_by is not None:  # one of the processes of --processes
        end_with_helped()
        with stoppable("compare", "--resume", str(resume), kept=resume, recipe=resume / "recipe.toml"):
            grid = open_comparison(resume, None)
            run_comparison(grid, shared_by, seeds=seeds, console=make_console(stderr=True))
        return
    if resume is not None:
        recipe, overrides = split_overrides(recipe, overrides)
    folder = resume or out or default_folder(recipe.stem if recipe else "")
    some = [word for seed in seeds or () for word in ("--seed", str(seed))]
    some += ["--processes", str(processes)] if processes > 1 else []
    kept = folder / "recipe.toml"
    with stoppable("compare", "--resume", str(folder), *some, kept=kept, recipe=kept):
        comparison = verbs.compare(
            recipe,
            out=folder if resume is None else out,
            resume=resume,
            overrides=overrides or (),
            seeds=seeds,
            console=make_console(stderr=True),
            processes=processes,
        )
    print_outcome(comparison, folder, console=console)
    if not comparison.finished and not seeds:
        raise typer.Exit(1)


@commands.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a `manyicl compare`.")],
    others: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR ...]", help="The same comparison under other matchings, to stand beside it."),
    ] = None,
) -> None:
    """Write a comparison's report.html and report.md anew, from its comparison.json alone."""
    from manyicl import verbs

    page = verbs.write_report(folder, others=others or ())
    typer.echo(f"wrote {page} and {page.with_suffix('.md').name}")


@commands.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Its folder. Default: runs/demo-TIME.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides tasks, episodes, shots and queries.")] = 0,
    seeds: Annotated[
        int,
        typer.Option("--seeds", min=1, help="Number of training seeds, from --seed on; 5 for intervals over seeds."),
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="In 90 seconds, with wider intervals.")] = False,
) -> None:
    """The paper's comparison in minutes on two cores: base, zero-shot, few-shot, ManyICL and dedicated fine-tuning.

    On the packaged seed model and tasks of the embedded world, in two regimes: many tasks with few examples, and few
    tasks with many. If it was killed, call it again with the same --out.
    """
    from manyicl import verbs
    from manyicl.console import make_console
    from manyicl.files import default_folder

    folder = out or default_folder("demo")
    options = ["--seed", str(seed), "--seeds", str(seeds), *(["--quick"] if quick else [])]
    with stoppable("demo", "--out", str(folder), *options, kept=folder, recipe=folder / "REGIME" / "recipe.toml"):
        verbs.run_demo(folder, seed=seed, num_seeds=seeds, quick=quick, console=make_console())
