"""The paper's comparison in minutes on two CPU cores, without a download: generated tasks and the packaged seed model.

It runs two regimes. The headline has many tasks with few examples each, which is what many-shot fine-tuning is for. The
contrast has few tasks with many examples each: they can be learnt by heart, and new tasks gain little from them. The
results are not scripted: another seed draws other tasks, episodes, shots and queries.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from manyicl.comparison import ArmName, CompareConfig, CompareSettings, Grid, open_comparison, run_comparison
from manyicl.console import make_console
from manyicl.demo.regimes import CONTRAST, HEADLINE, Regime, draw_familiar, draw_regime
from manyicl.demo.tasks import write_tasks
from manyicl.episodes import EpisodeSettings
from manyicl.errors import UserError
from manyicl.files import find_others
from manyicl.models import NEUTRAL_TEXT, TEMPLATE, ModelSettings
from manyicl.processes import share_work
from manyicl.report import print_outcome, write_outcome
from manyicl.training import TaskSettings, TrainSettings

# At most this many processes share the work; each takes about 0.7 GB of memory.
MOST_PROCESSES = 4
ARMS_WITH_CEILING: tuple[ArmName, ...] = (
    "base", "zero-shot", "few-shot", "manyicl", "dedicated", "dedicated-tuned",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """How long a regime is trained, and how thoroughly it is evaluated."""

    num_steps: int
    """Optimizer steps of the arms that train one model on all tasks."""
    packs_per_step: int
    learning_rates: tuple[float, ...]
    """Rates that every arm tries."""
    asked_tasks: int
    """Trained tasks that are evaluated."""
    held_out_tasks: int
    """Tasks that no arm is trained on."""
    draws: int
    """Draws of shots per task."""
    queries: int
    """Test rows per task."""
    analysis: bool = True
    """Whether the tuned ceiling is trained too, and labels are exchanged."""
    dedicated_tasks: int = 3
    """Tasks with a model of their own: one of each of the regime's first kinds, which take turns."""
    familiar_tasks: int = 6
    """Tasks that the seed model can already do, to measure forgetting."""
    token_budget: int = 1280
    """Tokens of an episode, and of a pack."""


# Half a decade apart. On many tasks the best rates of plain fine-tuning and of ManyICL are neither the lowest nor the
# highest. On few tasks zero-shot fine-tuning is best at the lowest rate, since with shots no training at all is best.
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
Parts = Sequence[tuple[Regime, Size]]
"""What a demo runs, the headline first."""
FULL: Parts = (
    (HEADLINE, Size(40, 2, RATES, 12, 16, 2, 24, dedicated_tasks=2)),
    (CONTRAST, Size(20, 2, RATES[1:], 4, 8, 2, 16, analysis=False, dedicated_tasks=1)),
)
QUICK: Parts = (
    (HEADLINE, Size(8, 2, RATES[2:4], 4, 4, 2, 4, analysis=False, dedicated_tasks=2, familiar_tasks=2)),
    (CONTRAST, Size(4, 2, RATES[2:4], 4, 2, 2, 4, analysis=False, dedicated_tasks=2, familiar_tasks=2)),
)


def write_regime(folder: Path, regime: Regime, size: Size, *, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Write a regime's tasks as task files; return the names of the trained, held-out and familiar ones."""
    trained, held_out = draw_regime(regime, seed=seed)
    familiar = draw_familiar(count=size.familiar_tasks, seed=seed)
    names = []
    for tasks in (trained, held_out[: size.held_out_tasks], familiar):
        write_tasks(folder, tasks, num_train=regime.num_train, num_test=regime.num_test, seed=seed)
        names.append([task.name for task in tasks])
    return names[0], names[1], names[2]


def demo_config(
    folder: Path, size: Size, *, names: tuple[list[str], list[str], list[str]], seeds: Sequence[int]
) -> CompareConfig:
    """Return the recipe of a regime's comparison.

    names: its trained, held-out and familiar tasks.
    """
    trained, held_out, familiar = names
    return CompareConfig(
        tasks=TaskSettings(folder=str(folder), names=tuple(sorted(trained))),
        model=ModelSettings(path="seed", precision="fp32"),
        template=TEMPLATE,
        episodes=EpisodeSettings(token_budget=size.token_budget, mixture="proportional"),
        train=TrainSettings(
            num_steps=size.num_steps,
            packs_per_step=size.packs_per_step,
            packs_per_batch=size.packs_per_step,
            learning_rate=size.learning_rates[-1],
            warmup_steps=size.num_steps // 10,
            beta2=0.98,
            log_every_steps=2,
            checkpoint_every_steps=max(2, size.num_steps // 4 // 2 * 2),
            validation_tokens=0,
            keep="last",
        ),
        compare=CompareSettings(
            name=folder.parent.name.replace("_", " "),
            arms=ARMS_WITH_CEILING if size.analysis else ARMS_WITH_CEILING[:-1],
            seeds=tuple(seeds),
            held_out_tasks=tuple(held_out),
            familiar_tasks=tuple(familiar),
            dedicated_tasks=tuple(trained[: size.dedicated_tasks]),
            learning_rates=size.learning_rates,
            asked_tasks=size.asked_tasks,
            # 5 is the number that the few-shot arm is trained with, so every arm is evaluated with it anyway.
            shots=(0, 1, 5, 16, 64),
            draws=size.draws,
            queries=size.queries,
            validation_queries=8,
            text_files=(str(NEUTRAL_TEXT),),
            text_windows=12,
            text_window_tokens=256,
            flips=size.analysis,
            orders=False,
            examples=1,
        ),
    )


def run_demo(*, out: Path, seed: int = 0, num_seeds: int = 1, parts: Parts = FULL, console: Console) -> list[Grid]:
    """Run the regimes of `parts` into `out` and return their grids, the headline first.

    The training seeds are `seed` and the following ones, `num_seeds` in all. The demo runs one process per core that
    torch would use, at most `MOST_PROCESSES`. If it was killed, the same call continues.

    Raises:
        UserError: `out` holds something else.
    """
    started = time.monotonic()
    grids = open_demo(out, seeds=range(seed, seed + num_seeds), parts=parts)
    for (regime, _), grid in zip(parts, grids, strict=True):
        console.print(f"\n{tell_regime(regime)}\n", soft_wrap=True)
        _work(grid, console=make_console(stderr=True, quiet=console.quiet))
        print_outcome(write_outcome(grid), grid.folder, console=console)
    minutes = (time.monotonic() - started) / 60
    headline = grids[0]
    trained, asked = headline.folder / f"seed-{seed}" / "manyicl", headline.roles.held_out[0]
    command = [
        "manyicl",
        "eval",
        str(trained),
        "--tasks",
        headline.config.tasks.folder,
        "--task",
        asked,
        "--draws",
        "2",
    ]
    lines = [
        f"{minutes:.1f} minutes. Read {headline.folder / 'report.html'}; ask a model that you have just trained:",
        f"  {shlex.join(command)}",
    ]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    return grids


def _work(grid: Grid, *, console: Console) -> None:
    """Do the missing work, by one process per core: with so small a model a second thread hardly helps."""
    number = max(1, min(MOST_PROCESSES, torch.get_num_threads(), len(grid.missing_models())))
    command = ["compare", "--resume", str(grid.folder)]
    share_work(
        partial(run_comparison, grid, console=console), command, folder=grid.folder, number=number, console=console
    )


def open_demo(out: Path, *, seeds: Sequence[int], parts: Parts = FULL) -> list[Grid]:
    """Begin the regimes of `parts` in `out`, or open those that are there; return their grids.

    All exist before any work is done, so that several processes can share it from the start.

    Raises:
        UserError: `out` holds something else.
    """
    _refuse_other_folder(out, known={regime.name for regime, _ in parts})
    return [_open_regime(out / regime.name, regime, size, seeds=seeds) for regime, size in parts]


def tell_regime(regime: Regime) -> str:
    """Return one line that describes a regime."""
    kind = "the headline" if regime.name == HEADLINE.name else "the contrast"
    return f"{kind}: {regime.num_tasks} tasks of {regime.num_train} examples each, on the packaged seed model"


def _refuse_other_folder(folder: Path, *, known: Set[str]) -> None:
    """Refuse a folder that contains anything but a demo.

    Raises:
        UserError: naming the first other file.
    """
    others = sorted(path.name for path in find_others(folder, known)) if folder.exists() else []
    if others:
        raise UserError(f"out={folder}: is not empty ({others[0]}); name a new folder")


def _open_regime(place: Path, regime: Regime, size: Size, *, seeds: Sequence[int]) -> Grid:
    if (place / "recipe.toml").is_file():
        grid = open_comparison(place, None)
        if list(grid.settings.seeds) != list(seeds) or grid.config.train.num_steps != size.num_steps:
            raise UserError(
                f"out={place.parent}: holds a demo of other seeds or size; repeat that one, or name another"
            )
        return grid
    if place.exists() and any(place.iterdir()) and not (place / "tasks").is_dir():
        raise UserError(f"out={place.parent}: is not empty; name a new folder")
    names = write_regime(place / "tasks", regime, size, seed=seeds[0])
    return open_comparison(place, demo_config(place / "tasks", size, names=names, seeds=seeds))
