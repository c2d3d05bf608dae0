"""Recipes: what they say, how they are overridden, and how a mistake in one is told."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from manyicl.episodes.plan import EpisodeSettings
from manyicl.episodes.template import TemplateSettings
from manyicl.errors import UserError
from manyicl.models.loading import LoraSettings, ModelSettings
from manyicl.training.recipe import (
    HeldOutSettings,
    RunConfig,
    TaskSettings,
    TrainSettings,
    dump_config,
    load_recipe,
    make_config,
)

SECTIONS = (
    TaskSettings,
    ModelSettings,
    LoraSettings,
    TemplateSettings,
    EpisodeSettings,
    TrainSettings,
    HeldOutSettings,
)
RECIPE = """
seed = 3

[tasks]
folder = "some/tasks"

[model]
path = "some/model"

[train]
num_steps = 7
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Return the error's text after the recipe's name, which every error begins with."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_recipe_needs_tasks_a_model_and_a_number_of_steps_only(tmp_path):
    config = load_recipe(write_recipe(tmp_path))
    assert (config.seed, config.tasks.folder, config.model.path) == (3, "some/tasks", "some/model")
    assert config.train == TrainSettings(num_steps=7)
    assert config.pack_tokens == config.episodes.token_budget == 2048


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.num_steps=20", "train", "num_steps", 20),
        ("train.num_steps = 20", "train", "num_steps", 20),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.compile=true", "train", "compile", True),
        ("train.recompute=3", "train", "recompute", 3),
        ("train.recompute=full", "train", "recompute", "full"),
        ("train.report_to=['tensorboard']", "train", "report_to", ("tensorboard",)),
        ("model.path=org/name", "model", "path", "org/name"),
        ("model.path='org/name'", "model", "path", "org/name"),
        ("model.precision=fp32", "model", "precision", "fp32"),
        ("model.lora.rank=4", "model", "lora", LoraSettings(rank=4)),
        ("model.config.rope_parameters.factor=4.0", "model", "config", {"rope_parameters": {"factor": 4.0}}),
        ('tasks.names=["a", "b c"]', "tasks", "names", ("a", "b c")),
        ("episodes.shots=5", "episodes", "shots", 5),
        ("episodes.shots=[1, 64]", "episodes", "shots", (1, 64)),
        ("episodes.shots=fill", "episodes", "shots", "fill"),
        ('template.input="{input} =\\n"', "template", "input", "{input} =\n"),
        ("template.terminator= ;", "template", "terminator", " ;"),
        ("held_out.episodes=0", "held_out", "episodes", 0),
    ],
)
def test_overrides_change_one_key(tmp_path, override, section, key, value):
    path = write_recipe(tmp_path)
    changed = load_recipe(path, overrides=[override])
    assert getattr(getattr(changed, section), key) == value
    whole = getattr(load_recipe(path), section).model_dump() | {key: getattr(getattr(changed, section), key)}
    assert getattr(changed, section) == type(getattr(changed, section))(**whole)


def test_the_last_override_of_a_key_counts(tmp_path):
    assert load_recipe(write_recipe(tmp_path), overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.num_steps=1", "trian: unknown key; did you mean 'train'?"),
        ("train.num_step=1", "train.num_step: unknown key; did you mean 'num_steps'?"),
        ("model.lora.rnak=1", "model.lora.rnak: unknown key; did you mean 'rank'?"),
        ("held_out.zzz=1", "held_out.zzz: unknown key; known: episodes"),
        ("train.num_steps=0", "train.num_steps = 0: input should be greater than 0"),
        ("train.num_steps=x", "train.num_steps = 'x': input should be a valid integer"),
        ("train.keep=bst", "train.keep = 'bst': input should be 'best' or 'last'"),
        ("train.packs_per_batch=3", "train: packs_per_step = 8 is not a multiple of packs_per_batch = 3"),
        ("train.checkpoint_every_steps=15", "train: checkpoint_every_steps = 15 is not a multiple of log_every_steps"),
        ("train.cuda_graph=maybe", "train.cuda_graph = 'maybe': "),
        ("train.pack_tokens=100", "train.pack_tokens = 100 is less than episodes.token_budget = 2048"),
        ("train=5", "train = 5: is a section; write [train], and below it num_steps, "),
        (
            "model.lora=none",
            "model.lora = 'none': is a section; write [model.lora], and below it rank, alpha, dropout, modules, or"
            " leave it out for none",
        ),
        ("model.lora.dropout=1", "model.lora.dropout = 1: input should be less than 1"),
        ("model.lora.modules=3", "model.lora.modules = 3: does not fit; 'all-linear' "),
        ("model.precision=fp16", "model.precision = 'fp16': input should be 'auto', 'bf16' or 'fp32'"),
        ("model.path=", "model.path = '': string should have at least 1 character"),
        ("tasks.names=a,b", 'tasks.names = \'a,b\': needs a list, such as ["a", "b"]'),
        ("tasks.names=[1]", "tasks.names[0] = 1: input should be a valid string"),
        ("episodes.shots=all", "episodes.shots = 'all': does not fit; 'fill' the budget, a number"),
        ("episodes.shots=[1]", "episodes.shots = [1]: does not fit; 'fill' the budget, a number"),
        ("episodes.shots=[9, 1]", "episodes.shots = [9, 1]: needs 'fill', a number from 0, or a range [low, high]"),
        ("template.input=Q", "template.input = 'Q': needs {input} exactly once, but it occurs 0 times"),
        ("template.terminator=", "template.terminator = '': is empty"),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
        ("num_steps", "override 'num_steps': write key=value, such as train.num_steps=20"),
        ("=3", "override '=3': write key=value"),
        ("seed.deep=3", "override 'seed.deep=3': 'seed' is a value, not a section"),
    ],
)
def test_a_wrong_override_is_told_in_one_line_with_its_key(tmp_path, override, expected):
    message = refusal(write_recipe(tmp_path), override)
    assert message.startswith(expected)
    assert message.count("; did you mean") <= 1


def test_a_cuda_graph_of_recomputed_layers_is_refused_where_the_recipe_is_read(tmp_path):
    path = write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"train: cuda_graph = true: layers are recomputed \(recompute = 'full'\)"):
        load_recipe(path, overrides=["train.cuda_graph=true", "train.recompute=full"])
    for recompute in ("auto", "none", "0"):
        assert load_recipe(path, overrides=["train.cuda_graph=true", f"train.recompute={recompute}"]).train.cuda_graph


def test_a_fault_names_the_file_and_several_stand_in_one_line(tmp_path):
    path = write_recipe(tmp_path, RECIPE + 'steps = 3\nkeep = "none"\n')
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    expected = f"{path}: train.keep = 'none': input should be 'best' or 'last'; train.steps: unknown key"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "tasks: is missing; add a section [tasks]; model: is missing; add a section [model]; train: is missing"),
        ("[tasks]\n[model]\npath = 'm'\n[train]\nnum_steps = 1", "tasks.folder: is missing; give it a value"),
        ("tasks = 3\n[model]\npath = 'm'\n[train]\nnum_steps = 1", "tasks = 3: is a section; write [tasks]"),
        ("[tasks", "not valid TOML: Expected ']' at the end of a table declaration"),
        (f"{RECIPE}\n[train]", "not valid TOML: Cannot declare ('train',) twice"),
    ],
)
def test_a_broken_recipe_is_told_in_one_line(tmp_path, text, expected):
    assert refusal(write_recipe(tmp_path, text)).startswith(expected)


def test_a_recipe_that_cannot_be_read_is_told_in_one_line(tmp_path):
    assert (
        refusal(tmp_path / "no.toml")
        == "cannot be read (No such file or directory); give the path of a recipe (*.toml)"
    )
    assert refusal(tmp_path).startswith("cannot be read (Is a directory)")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    assert refusal(tmp_path / "latin.toml").startswith("not valid TOML: 'utf-8' codec can't decode byte 0xe9")


def test_a_recipe_may_begin_with_a_mark_and_end_its_lines_as_windows_does(tmp_path):
    """Editors of Windows write both; it was "not valid TOML"."""
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(path) == load_recipe(write_recipe(tmp_path, RECIPE))


def test_dotted_paths_are_taken_from_the_recipes_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "sub").mkdir()
    text = RECIPE.replace("some/tasks", "../tasks").replace("some/model", "./model")
    config = load_recipe(write_recipe(tmp_path / "sub", text))
    assert config.tasks.folder == str(tmp_path / "tasks")
    assert config.model.path == str(tmp_path / "sub" / "model")
    config = load_recipe(write_recipe(tmp_path, RECIPE.replace("some/model", "~/model")))
    assert (config.tasks.folder, config.model.path) == ("some/tasks", "/home/someone/model")


def test_packs_are_as_long_as_episodes_unless_said(tmp_path):
    path = write_recipe(tmp_path)
    assert load_recipe(path, overrides=["episodes.token_budget=512"]).pack_tokens == 512
    assert load_recipe(path, overrides=["train.pack_tokens=4096"]).pack_tokens == 4096


@pytest.mark.parametrize("settings", SECTIONS, ids=lambda s: s.__name__)
def test_every_setting_says_what_it_is(settings):
    assert settings.__doc__
    for name, field in settings.model_fields.items():
        is_section = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in (field.annotation,))
        assert field.description or is_section, name


def test_every_section_of_a_recipe_is_known_here():
    named = {field.annotation for field in RunConfig.model_fields.values()} - {int}
    assert named == set(SECTIONS) - {LoraSettings}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
COUNTS = st.integers(1, 10**6)
ENTRIES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def configs(draw) -> RunConfig:
    budget, log_every, per_batch = draw(st.tuples(COUNTS, st.integers(1, 100), st.integers(1, 8)))
    return RunConfig(
        seed=draw(st.integers(0, 2**31)),
        tasks=TaskSettings(folder=draw(TEXTS), names=tuple(draw(st.lists(TEXTS, max_size=3)))),
        model=ModelSettings(
            path=draw(TEXTS),
            revision=draw(st.none() | TEXTS),
            precision=draw(st.sampled_from(["auto", "bf16", "fp32"])),
            config=draw(st.dictionaries(TEXTS, ENTRIES, max_size=3)),
            lora=draw(
                st.none()
                | st.builds(
                    LoraSettings,
                    rank=COUNTS,
                    dropout=st.floats(0, 1, exclude_max=True),
                    modules=TEXTS | st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
                )
            ),
        ),
        template=TemplateSettings(input=draw(TEXTS).replace("{input}", "") + "{input}", terminator=draw(TEXTS)),
        episodes=EpisodeSettings(
            token_budget=budget,
            shots=draw(st.just("fill") | st.integers(0, 99) | st.tuples(st.integers(0, 9), st.integers(9, 99))),
            targets=draw(st.sampled_from(["all", "last"])),
            rename_share=draw(st.floats(0, 1)),
            rename_to=draw(st.sampled_from(["permuted", "words"])),
        ),
        train=TrainSettings(
            num_steps=draw(COUNTS),
            pack_tokens=draw(st.none() | st.just(budget + 1)),
            packs_per_batch=draw(st.sampled_from([per_batch, "auto"])),
            packs_per_step=per_batch * draw(st.integers(1, 8)),
            log_every_steps=log_every,
            checkpoint_every_steps=log_every * draw(st.integers(1, 9)),
            learning_rate=draw(st.floats(1e-300, 1e300)),
            report_to=tuple(draw(st.lists(TEXTS, max_size=2))),
        ),
    )


INFINITE = RunConfig(
    tasks=TaskSettings(folder="t"),
    model=ModelSettings(path="m", config={"limits": [0.0, float("inf")]}),
    train=TrainSettings(num_steps=1),
)


@pytest.mark.slow
@given(configs())
@example(INFINITE)
def test_a_resolved_config_is_read_back_as_it_was(config):
    assert make_config(tomllib.loads(dump_config(config)), source="config.toml") == config


def test_the_resolved_config_says_every_default(tmp_path):
    written: dict[str, Any] = tomllib.loads(dump_config(load_recipe(write_recipe(tmp_path))))
    assert set(written["train"]) == set(TrainSettings.model_fields) - {"pack_tokens", "early_stopping_patience"}
    assert set(written["model"]) == set(ModelSettings.model_fields) - {"revision", "lora", "quantize"}


@pytest.mark.parametrize(
    ("old", "new"), [("0", "none"), ("7", 7), ('"auto"', "auto"), ('"all"', "selective"), ('"whole"', "full")]
)
def test_a_recipe_of_an_earlier_version_names_its_recomputed_layers_by_the_old_setting(tmp_path, old, new):
    path = tmp_path / "old.toml"
    path.write_text(
        f'[tasks]\nfolder = "tasks"\n[model]\npath = "seed"\n[train]\nnum_steps = 1\ncheckpointed_layers = {old}\n'
    )
    told = re.escape(f"{path}: train.checkpointed_layers = {old}".replace('"', "'"))
    with pytest.warns(UserWarning, match=f"^{told} is now train.recompute = {new!r}$") as warned:
        config = load_recipe(path)
    assert config.train.recompute == new
    assert len(warned) == 1
    assert "checkpointed" not in dump_config(config)


def test_an_override_by_the_old_setting_counts_like_one_by_the_new(tmp_path):
    path = tmp_path / "new.toml"
    path.write_text('[tasks]\nfolder = "tasks"\n[model]\npath = "seed"\n[train]\nnum_steps = 1\nrecompute = "none"\n')
    with pytest.warns(UserWarning, match=r"^override 'train\.checkpointed_layers=whole': .* = 'full'$"):
        config = load_recipe(path, overrides=["train.checkpointed_layers=whole"])
    assert config.train.recompute == "full"
    with pytest.raises(UserError, match=r"train\.recompute = 'some': does not fit; layers that are computed again"):
        load_recipe(path, overrides=["train.recompute=some"])
