"""A tiny comparison on the embedded world and the packaged seed model, written to disk as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyicl.comparison.settings import CompareConfig
from manyicl.demo.regimes import Regime, draw_familiar, draw_regime
from manyicl.demo.tasks import write_tasks
from manyicl.models.places import TEMPLATE
from manyicl.training.recipe import dump_config, make_config

# Tables of words, so that all have labels but `price`, whose answers are open.
TINY = Regime(
    "tiny", num_tasks=4, num_train=48, num_test=24, num_held_out=2, kinds=("topic", "keyword", "group", "price")
)
TEXT = (
    "The tide came in at four, and the boats that lay on the sand began to move. A girl counted them twice; the second"
    " time there was one more than before. Nobody on the quay had seen it come. It was painted grey, it had no name,"
    " and in its bow sat a dog that looked as if it had somewhere to be.\n"
) * 3


def write_world(folder: Path, *, regime: Regime = TINY) -> tuple[list[str], list[str], list[str]]:
    """Write `tasks` and `neutral.txt` under `folder`; return the names of trained, held-out and familiar tasks."""
    trained, held_out = draw_regime(regime, seed=0)
    familiar = draw_familiar(count=1, seed=0)
    for tasks in (trained, held_out, familiar):
        write_tasks(folder / "tasks", tasks, num_train=regime.num_train, num_test=regime.num_test, seed=0)
    (folder / "neutral.txt").write_text(TEXT, encoding="utf-8")
    names = [[task.name for task in tasks] for tasks in (trained, held_out, familiar)]
    return names[0], names[1], names[2]


def make_recipe(
    folder: Path,
    names: tuple[list[str], list[str], list[str]],
    *,
    episodes: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **compare: Any,
) -> CompareConfig:
    """Return the recipe of a comparison on the tasks of `write_world`; also written to recipe.toml in `folder`."""
    trained, held_out, familiar = names
    values: dict[str, Any] = {
        "seed": 0,
        "tasks": {"folder": str(folder / "tasks"), "names": sorted(trained)},
        "model": {"path": "seed", "precision": "fp32"},
        "template": TEMPLATE.model_dump(exclude_none=True),
        "episodes": {"token_budget": 192, **(episodes or {})},
        "train": {
            "num_steps": 3,
            "pack_tokens": 384,
            "packs_per_step": 2,
            "packs_per_batch": 2,
            "learning_rate": 1e-3,
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
            "validation_tokens": 0,
            "keep": "last",
            **(train or {}),
        },
        "compare": {
            "arms": ["base", "zero-shot", "few-shot", "manyicl", "dedicated"],
            "seeds": [0, 1],
            "few_shot_shots": 3,
            "held_out_tasks": held_out,
            "familiar_tasks": familiar,
            "dedicated_tasks": trained[:2],
            "asked_tasks": 3,
            "shots": [0, 1, 4],
            "draws": 2,
            "queries": 3,
            "validation_queries": 2,
            "text_files": [str(folder / "neutral.txt")],
            "text_windows": 3,
            "text_window_tokens": 32,
            "examples": 1,
            **compare,
        },
    }
    config = make_config(values, source="test", kind=CompareConfig)
    (folder / "recipe.toml").write_text(dump_config(config), encoding="utf-8")
    return config
