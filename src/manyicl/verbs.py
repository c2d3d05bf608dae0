"""A function for each verb of the command line that is not one of a package: check, show, plan, compare and so on.

`manyicl train`, `eval`, `curve` and `ask` are `train`, `evaluate`, `one_pass_curve` and `ask` of those packages. The
command line calls these functions and prints what they return. Libraries that take seconds to load are imported inside
them, so that `check` and `diff` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from manyicl.console import make_console
from manyicl.errors import UserError, check_list, check_text, suggest, take_path, take_whole

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.comparison import Comparison, ComparisonForecast
    from manyicl.evaluation import Difference
    from manyicl.inference import EndpointSettings, InferenceModel
    from manyicl.planning import DrawnEpisode, Forecast, Overlap, TaskAudit
    from manyicl.service import Service, ServiceSettings
    from manyicl.training import RunConfig


@dataclass(frozen=True, slots=True)
class Check:
    """What `check` found in a folder of task files."""

    audits: tuple[TaskAudit, ...]
    """One per task, in the order of their names."""
    overlaps: Mapping[str, Overlap]
    """Held-out task -> its rows that are also rows of trained tasks; empty if no task was named as held out."""
    has_window: bool = True
    """False if the model does not say how long a sequence may be, so that rows too long for it are not counted."""

    @property
    def usable(self) -> bool:
        """Whether every task can be trained on or evaluated."""
        return all(audit.usable for audit in self.audits)


def check(
    folder: str | Path,
    *,
    model: str | None = None,
    held_out: Sequence[str] = (),
    recipe: str | Path | None = None,
) -> Check:
    """Audit a folder of task files: rows, drops by reason, labels, lengths, and a verdict for each task.

    model: counts tokens with its tokenizer. Default: lengths in characters.
    held_out: tasks whose rows are looked for in all others, exactly and nearly.
    recipe: a comparison's recipe (TOML), which says which tasks are trained on and which are held out.

    Raises:
        UserError: there is no such folder, it holds no task, or no task has the name.
    """
    from manyicl.planning import audit_tasks, find_overlaps
    from manyicl.tasks import load_task, name_sources

    check_list("held_out", held_out)
    sources = name_sources(Path(take_path("folder", folder)))
    roles = _choose_roles(list(sources), held_out, Path(take_path("recipe", recipe)) if recipe is not None else None)
    tokenizer, max_tokens = None, None
    if model:  # only then is torch needed, which takes seconds to import
        from manyicl.episodes import TaskTokenizer, TemplateSettings
        from manyicl.models import ModelSettings, find_max_tokens, load_tokenizer

        tokenizer = TaskTokenizer(load_tokenizer(ModelSettings(path=model)), TemplateSettings())
        max_tokens = find_max_tokens(model)
    audits = audit_tasks(sources.values(), tokenizer=tokenizer, max_tokens=max_tokens)
    overlaps: Mapping[str, Overlap] = {}
    if roles:
        faulty = {name for name, audit in zip(sources, audits, strict=True) if audit.faults}
        read = {name: load_task(sources[name]) for name in roles if name not in faulty}
        overlaps = find_overlaps(read, trained=[name for name in read if roles[name] == "trained"])
    return Check(audits, overlaps, has_window=model is None or max_tokens is not None)


def _choose_roles(names: Sequence[str], held_out: Sequence[str], recipe: Path | None) -> dict[str, str]:
    """Return task -> "trained" or "held-out", for tasks whose rows are to be compared; {} if none are.

    A recipe that names no held-out tasks, or has no [compare] section, holds out all that it does not train on.
    """
    trained = [name for name in names if name not in held_out] if held_out else []
    others, source = list(held_out), "held_out="
    if recipe is not None:
        from manyicl.comparison import CompareConfig, choose_tasks
        from manyicl.training import load_recipe

        config = load_recipe(recipe, kind=CompareConfig)
        trained = choose_tasks(config, names)
        named = [*config.compare.held_out_tasks, *config.compare.familiar_tasks]
        others = list(held_out) or named or [name for name in names if name not in trained]
        trained, source = [name for name in trained if name not in others], f"recipe={recipe}"
    for where, chosen in (("held_out=", held_out), (source, (*trained, *others))):
        for name in chosen:
            if name not in names:
                raise UserError(f"{where}: no task '{name}' in the folder{suggest(name, names)}")
    if (held_out or recipe) and not (trained and others):
        raise UserError(f"{source}: leaves no task to train on, or none that is held out; name some tasks, but not all")
    return dict.fromkeys(trained, "trained") | dict.fromkeys(others, "held-out")


def show(recipe: str | Path | RunConfig, *, overrides: Sequence[str] = (), episode: int = 0) -> DrawnEpisode:
    """Return one episode as training will see it.

    recipe: a file (TOML), or what `load_recipe` made of one. overrides: changes to a file's, such as
        `tasks.folder=my-tasks`. episode: its number in the plan.

    Raises:
        UserError: the recipe is wrong, its tasks cannot be read, or the plan has no such episode.
    """
    from manyicl.planning import preview_recipe
    from manyicl.training import take_recipe

    number = take_whole("episode", episode, least=0)
    return preview_recipe(take_recipe(recipe, overrides=overrides), number=number)


def plan(
    recipe: str | Path | RunConfig, *, overrides: Sequence[str] = (), device: str | None = None, num_devices: int = 1
) -> Forecast | ComparisonForecast:
    """Return what a recipe would train, whether it is sound, its memory and hours; nothing is trained.

    For a comparison's recipe, which has a section [compare]: what every arm, its trials and its evaluation take.

    recipe, overrides: as `show` takes them; a comparison's is a file.
    device: a GPU by name, such as h100 or a100-40. Default: no memory or hours of a device.
    num_devices: how many of them, each with all weights.

    Raises:
        UserError: the recipe is wrong, its tasks cannot be read, or no device has the name.
    """
    from manyicl.comparison import CompareConfig, Grid, forecast_comparison
    from manyicl.planning import find_device, forecast_run
    from manyicl.training import RunConfig, has_section, load_recipe, take_recipe

    if device is not None:
        check_text("device", device, "h100")
    chosen = None if device is None else find_device(device)
    num_devices = take_whole("num_devices", num_devices, least=1)
    if not isinstance(recipe, RunConfig) and has_section(path := Path(take_path("recipe", recipe)), "compare"):
        compared = load_recipe(path, overrides=overrides, kind=CompareConfig)
        return forecast_comparison(Grid(path.parent, compared), device=chosen, num_devices=num_devices)
    return forecast_run(take_recipe(recipe, overrides=overrides), device=chosen, num_devices=num_devices)


def export(
    recipe: str | Path | RunConfig,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    rows: Literal["episodes", "packs"] = "episodes",
) -> dict[str, int]:
    """Write the episodes that a recipe trains on as Parquet for TRL's SFTTrainer; return split -> number of rows.

    recipe, overrides: as `show` takes them. out: a new folder.
    rows: what a row holds; packs need flash attention in the other trainer.

    Raises:
        UserError: the recipe is wrong, or `out` is there already.
    """
    from manyicl.training import export_trl, prepare_run, take_recipe

    folder = Path(take_path("out", out))  # before the tasks are read
    return export_trl(prepare_run(take_recipe(recipe, overrides=overrides)), folder, rows=rows)


def diff(a: str | Path, b: str | Path) -> Difference:
    """Return the paired differences of two results of `evaluate(..., out=FILE.json)`, B minus A, with intervals.

    Raises:
        UserError: a file is not a result, or the two have no task, draw and query in common.
    """
    from manyicl.evaluation import Evaluation, compare_results

    return compare_results(Evaluation.load(Path(take_path("a", a))), Evaluation.load(Path(take_path("b", b))))


def compare(
    recipe: str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    processes: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Train and evaluate the arms of a comparison, write its report, and return what its comparison.json holds.

    recipe: a file (TOML) with a section [compare], or None with `resume`.
    out: a new folder, or that of a comparison with the same recipe, which goes on. Default: runs/RECIPE-TIME.
    resume: the folder of a comparison that was stopped.
    overrides: changes to the recipe, such as `compare.draws=10`; with `resume`, only where its files lie now, such as
        `tasks.folder=PATH`, and they must be the same files.
    seeds: only these of its training seeds. Default: all.
    processes: so many share the work, spread over all GPUs, but no more than there are models left; each takes an equal
        part of its GPU's memory, which nobody else should use, and of the cores.
    console: where progress is printed. Default: nowhere.

    Raises:
        UserError: the recipe is wrong, both or neither of `recipe` and `resume` are given, `resume` comes with `out` or
            with overrides of what must stay as it is, this is one of several ranks, or no process could end its work.
    """
    from manyicl.comparison import CompareConfig, check_seeds, open_comparison, refuse_ranks, run_comparison
    from manyicl.files import default_folder
    from manyicl.processes import share_work
    from manyicl.report import write_outcome
    from manyicl.training import load_recipe

    refuse_ranks()
    check_list("seeds", seeds, of=int)
    if processes < 1:
        raise UserError(f"processes={processes}: at least one must do the work; give 1 or more")
    if (recipe is None) == (resume is None):
        raise UserError("compare: give either a recipe (*.toml), or resume=FOLDER of a comparison that was stopped")
    if resume is not None and out is not None:
        raise UserError(f"resume={resume}: keeps its own folder; omit `out`")
    given = {"recipe": recipe, "resume": resume, "out": out}
    named = {name: Path(take_path(name, path)) for name, path in given.items() if path is not None}
    config = load_recipe(named["recipe"], overrides=overrides, kind=CompareConfig) if "recipe" in named else None
    folder = named.get("resume") or named.get("out") or default_folder(named["recipe"].stem)
    if config is not None:
        check_seeds(config.compare, seeds)  # before the folder is made
    grid = open_comparison(folder, config, overrides=overrides if config is None else ())
    check_seeds(grid.settings, seeds)
    console = console or make_console(quiet=True)
    some = [word for seed in seeds or () for word in ("--seed", str(seed))]
    command = ["compare", "--resume", str(folder), *some]
    share_work(
        partial(run_comparison, grid, seeds=seeds, console=console),
        command,
        folder=folder,
        number=min(processes, max(1, len(grid.missing_models(seeds)))),
        console=console,
    )
    return write_outcome(grid)


def write_report(folder: str | Path, *, others: Sequence[str | Path] = ()) -> Path:
    """Write report.html and report.md from a comparison's comparison.json alone; return the page's path.

    others: folders of the same comparison under other matchings, whose differences stand beside its own.

    Raises:
        UserError: comparison.json is missing or broken, or the folders cannot stand side by side.
    """
    from manyicl import report

    check_list("others", others)
    return report.write_report(
        Path(take_path("folder", folder)), others=[Path(take_path("others", other)) for other in others]
    )


def open(
    model: str | Path | InferenceModel,
    data: str | Path | None = None,
    *,
    endpoint: EndpointSettings | None = None,
    settings: ServiceSettings | None = None,
) -> Service:
    """Open a service in this process: tasks are added from examples, measured at once, and answered (docs/service.md).

    >>> with manyicl.open("seed") as service:  # doctest: +SKIP
    ...     service.add_task("banking.csv").predict("my card was swallowed")

    model: a checkpoint, an adapter, a run, or a hub name; or a model that is loaded.
    data: the folder in which tasks are kept. None: nothing is kept.
    endpoint: a server that runs the model.

    Raises:
        UserError: the model or the data cannot be used.
    """
    from manyicl.service import open_service

    return open_service(model, data=data, endpoint=endpoint, settings=settings)


def merge(model: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Fold a run's adapter into its base; return the new folder, which plain Hugging Face code loads.

    trust_remote_code: run Python code that comes with the base.

    Raises:
        UserError: there is no adapter, or `out` is there already.
    """
    from manyicl.models import merge_adapter

    folder = Path(take_path("out", out))
    merge_adapter(str(take_path("model", model)), folder, trust_remote_code=trust_remote_code)
    return folder


def write_world(
    folder: str | Path, *, num_tasks: int = 40, num_train: int = 72, num_test: int = 20, seed: int = 0
) -> None:
    """Write generated tasks, whose rules only their examples tell, to try things on.

    Raises:
        UserError: `folder` is there already.
    """
    from manyicl.demo import export_tasks

    out = Path(take_path("folder", folder))
    export_tasks(
        out,
        num_tasks=take_whole("num_tasks", num_tasks),
        num_train=take_whole("num_train", num_train),
        num_test=take_whole("num_test", num_test),
        seed=take_whole("seed", seed),
    )


def run_demo(
    out: str | Path, *, seed: int = 0, num_seeds: int = 1, quick: bool = False, console: Console | None = None
) -> None:
    """Run the paper's comparison on the packaged 1.3M-parameter model, in minutes on two cores; resumes in `out`.

    console: where tables and progress are printed. Default: nowhere.
    """
    from manyicl import demo

    demo.run_demo(
        out=Path(take_path("out", out)),
        seed=take_whole("seed", seed),
        num_seeds=take_whole("num_seeds", num_seeds),
        parts=demo.QUICK if quick else demo.FULL,
        console=console or make_console(quiet=True),
    )
