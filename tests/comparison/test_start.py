"""A comparison that could not end is refused before its first model is trained, and leaves no folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from manyicl.comparison.forecast import forecast_comparison
from manyicl.comparison.grid import Grid, open_comparison
from manyicl.comparison.settings import CompareConfig, refuse_ignored
from manyicl.errors import UserError
from manyicl.verbs import compare
from tests.support.comparison_setting import make_recipe, write_world

RATES = [1e-3, 3e-3]


def refusal(folder: Path, config: CompareConfig) -> str:
    """Return why a comparison is not begun; `plan` says the same, and there is no folder."""
    out = folder / "out"
    with pytest.raises(UserError) as refused:
        open_comparison(out, config)
    assert not (out / "recipe.toml").exists()
    assert forecast_comparison(Grid(out, config)).blockers == (str(refused.value),)
    return str(refused.value)


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"max_tokens": 100_000}, "compare.max_tokens = 100000"),
        ({"episodes": {"token_budget": 100_000}, "train": {"pack_tokens": None}}, "episodes.token_budget = 100000"),
    ],
)
def test_sequences_longer_than_the_model_sees_are_refused(tmp_path, sections: dict[str, Any], setting):
    config = make_recipe(tmp_path, write_world(tmp_path), **sections)
    assert refusal(tmp_path, config).startswith(f"{setting}: the model knows 4096 positions")


def test_a_task_of_which_no_test_row_fits_is_refused(tmp_path):
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["base"], max_tokens=5)
    fault = refusal(tmp_path, config)
    assert fault.endswith("no test row fits compare.max_tokens = 5; raise it, or leave the task out")


def test_rates_that_no_validation_row_could_choose_are_refused(tmp_path):
    # No task has 60 rows to show.
    names = write_world(tmp_path)
    config = make_recipe(tmp_path, names, arms=["manyicl"], shots=[60], learning_rates=RATES)
    assert "no validation row fits episodes.token_budget = 192 with its shots, so no rate of ManyICL can" in refusal(
        tmp_path, config
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed", 7, "seed = 7: does nothing in a comparison, as its models are trained with compare.seeds"),
        (
            "held_out",
            {"episodes": 9},
            "held_out.episodes = 9: does nothing in a comparison, as it asks",
        ),
        ("episodes", {"targets": "last"}, "episodes.targets = 'last': does nothing in a comparison, as each arm has"),
    ],
)
def test_a_setting_of_a_run_that_no_arm_would_have_is_refused(tmp_path, key, value, told):
    """Each was replaced in silence: `seed=7` trained with seed 0."""
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["base"])
    values = config.model_dump()
    values[key] = {**values[key], **value} if isinstance(value, dict) else value
    assert refusal(tmp_path, CompareConfig.model_validate(values)).startswith(told)


@pytest.mark.parametrize(
    ("match", "arms", "is_refused"),
    [
        ("answers", ["zero-shot", "few-shot"], True),
        ("flops", ["base", "metaicl", "dedicated"], True),
        ("answers", ["base", "few-shot", "dedicated-tuned"], False),
        ("answers", ["zero-shot", "dedicated"], False),
        ("answers", ["few-shot", "manyicl"], False),
        ("tokens", ["zero-shot", "few-shot"], False),
    ],
)
def test_arms_that_would_be_matched_to_an_arm_that_is_not_compared_are_refused(tmp_path, match, arms, is_refused):
    """Zero-shot trained on 220 answers, few-shot on 91, "at equal training answers"."""
    config = make_recipe(tmp_path, ([], [], []), arms=arms, match=match)
    told = f"compare.match = '{match}': arms are matched to ManyICL, which is not compared; "
    with pytest.raises(UserError, match=told) if is_refused else nullcontext():
        refuse_ignored(config)


def test_shots_that_no_task_can_be_asked_with_are_refused_and_some_of_them_noted(tmp_path):
    """Every model was trained, and none was asked anything."""
    names = write_world(tmp_path)
    told = refusal(tmp_path, make_recipe(tmp_path, names, arms=["base"], shots=[60]))
    assert told.startswith("compare.shots = [60]: no task can be asked with any of them (task '")
    assert "' with 60: it has only 46 train rows); lower them, raise episodes.token_budget, or give" in told
    some = Grid(tmp_path / "some", make_recipe(tmp_path, names, arms=["base"], shots=[0, 60, "fill"]))
    (note,) = forecast_comparison(some).notes
    assert note.startswith("compare.shots: no task is asked with 60 shots; task '")
    assert note.endswith("': it has only 46 train rows")


@pytest.mark.slow
def test_shots_that_no_episode_holds_are_refused(tmp_path):
    """The arm was trained with as many as fitted, and only `trained_shots` in a file said so."""
    config = make_recipe(tmp_path, write_world(tmp_path), arms=["few-shot", "manyicl"], few_shot_shots=40)
    told = refusal(tmp_path, config)
    assert told.startswith(
        "compare.few_shot_shots = 40: few-shot FT: at most 19 of its 40 shots in training, on 4 of 4"
    )
    assert told.endswith("because its episodes of 192 tokens hold no more; lower it to 19")


def test_a_seed_that_is_not_the_comparisons_leaves_no_folder(tmp_path):
    make_recipe(tmp_path, write_world(tmp_path), arms=["base"])
    with pytest.raises(UserError, match=r"seed=7: is none of this comparison's \[0, 1\]"):
        compare(tmp_path / "recipe.toml", out=tmp_path / "out", seeds=[7])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_comparison_names_what_differs(tmp_path):
    names = write_world(tmp_path)
    out = tmp_path / "out"
    open_comparison(out, make_recipe(tmp_path, names, arms=["base"]))
    with pytest.raises(UserError, match=r"holds a comparison with another compare\.draws, compare\.queries; go on"):
        open_comparison(out, make_recipe(tmp_path, names, arms=["base"], draws=1, queries=2))
