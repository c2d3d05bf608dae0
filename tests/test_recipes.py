"""Every recipe that ships: it parses, says what it means, and runs (shrunk) on a model of its own class."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig

from manyicl.comparison.settings import CompareConfig
from manyicl.errors import UserError
from manyicl.models.loading import ModelSettings, load_config, load_model
from manyicl.models.saving import merge_adapter
from manyicl.models.structure import check_window
from manyicl.training.ranks import check_launch
from manyicl.training.recipe import dump_config, load_recipe, make_config
from manyicl.training.run import train
from tests.conftest import COMMON, SHARED, make_task, train_tokenizer

RECIPES = Path(__file__).parents[1] / "recipes"
ALL = sorted(path for path in RECIPES.glob("*.toml") if not path.stem.startswith("compare-"))
COMPARISONS = sorted(RECIPES.glob("compare-*.toml"))
# recipe -> (hub name, its config's class and what that config says of positions), shrunk in all else.
LARGE = {
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.3",
        lambda: MistralConfig(**COMMON | {"max_position_embeddings": 32768, "sliding_window": None}),
    ),
    "gemma-7b": (
        "google/gemma-7b",
        lambda: GemmaConfig(**COMMON | {"max_position_embeddings": 8192, "num_key_value_heads": 4, "pad_token_id": 0}),
    ),
    "llama-3-8b": (
        "meta-llama/Llama-3.1-8B",
        lambda: LlamaConfig(
            **COMMON | {"max_position_embeddings": 131072},
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
}


def write_model(folder: Path, name: str) -> Path:
    """Write a shrunk model of the recipe's class, with a tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LARGE[name][1](), dtype=torch.bfloat16).save_pretrained(folder)
    train_tokenizer("bpe").save_pretrained(folder)
    return folder


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    for name, answer in (("animals", "animal"), ("colours", "colour")):
        task = make_task(name, answer=answer)
        rows = [
            {"input": e.input, "answer": e.answer, "split": split}
            for split in ("train", "validation", "test")
            for e in getattr(task, split)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_parses_and_is_read_back_from_its_resolved_form(path):
    config = load_recipe(path)
    assert make_config(tomllib.loads(dump_config(config)), source="config.toml") == config
    assert path.read_text().startswith("# "), "say what it is"
    assert f"recipes/{path.name}" in path.read_text() or path.stem not in LARGE, "say how to start it"


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_parses_and_is_read_back_from_its_resolved_form(path):
    config = load_recipe(path, kind=CompareConfig)
    assert make_config(tomllib.loads(dump_config(config)), source="recipe.toml", kind=CompareConfig) == config
    assert path.read_text().startswith("# "), "say what it is"
    assert f"recipes/{path.name}" in path.read_text(), "say how to start it"
    assert {"base", "few-shot", "manyicl"} <= set(config.compare.arms)
    texts = [Path(file) for file in config.compare.text_files]
    assert all(file.is_absolute() for file in texts)
    assert all(file.is_file() for file in texts if SHARED not in file.parents or SHARED.is_dir())


def test_the_comparison_of_the_paper_measures_forgetting():
    """House row 25: it named no text."""
    assert load_recipe(RECIPES / "compare-mistral-7b.toml", kind=CompareConfig).compare.text_files


def test_the_recipes_of_the_large_models_are_here():
    assert {path.stem for path in ALL} >= set(LARGE)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_is_many_shot_lora_at_32k(name):
    config = load_recipe(RECIPES / f"{name}.toml")
    assert config.model.path == LARGE[name][0]
    assert (config.episodes.token_budget, config.pack_tokens) == (32768, 32768)
    assert (config.episodes.shots, config.episodes.targets) == ("fill", "all")
    assert config.model.precision == "bf16"
    assert config.model.lora is not None
    assert config.model.lora.modules == "all-linear"
    assert config.train.recompute == "auto"
    assert config.train.packs_per_step % 8 == 0, "eight GPUs must share a step"


@pytest.mark.parametrize("name", LARGE)
def test_the_model_of_a_large_recipe_knows_its_budget(name, tmp_path):
    LARGE[name][1]().save_pretrained(tmp_path)
    settings = load_recipe(RECIPES / f"{name}.toml", overrides=[f"model.path={tmp_path}"]).model
    check_window(load_config(settings), num_tokens=32768, what="episodes.token_budget")
    if name == "gemma-7b":  # without the extension it does not
        plain = load_config(ModelSettings(path=str(tmp_path)))
        with pytest.raises(UserError, match="the model knows 8192 positions"):
            check_window(plain, num_tokens=32768, what="episodes.token_budget")


def test_the_extension_that_the_llama_recipe_tells_of_is_one(tmp_path):
    text = (RECIPES / "llama-3-8b.toml").read_text()
    told = re.findall(r"^#   (model\.path\S+) (model\.config\S+)\n#   '(model\.config\..*)'$", text, flags=re.MULTILINE)
    LlamaConfig(**COMMON | {"max_position_embeddings": 8192}).save_pretrained(tmp_path)
    _, *changes = told[0]
    settings = load_recipe(RECIPES / "llama-3-8b.toml", overrides=[*changes, f"model.path={tmp_path}"]).model
    check_window(load_config(settings), num_tokens=32768, what="episodes.token_budget")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_runs_on_a_shrunk_model_of_its_class(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    base, tasks = write_model(tmp_path / "base", name), write_tasks(tmp_path / "tasks")
    overrides = [
        f"model.path={base}",
        f"tasks.folder={tasks}",
        "episodes.token_budget=512",
        "train.num_steps=2",
        "train.validation_tokens=512",
    ]
    run = train(RECIPES / f"{name}.toml", out=tmp_path / "run", overrides=overrides, console=Console(quiet=True))
    assert {row.task for row in run.held_out} == {"animals", "colours"}
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses
    assert all(0 < loss < 10 for loss in losses)
    trained = load_model(ModelSettings(path=str(run.folder), precision="fp32"))
    assert isinstance(trained, PeftModel)
    assert type(trained.get_base_model()) is type(AutoModelForCausalLM.from_pretrained(base))
    moved = [p.abs().max() > 0 for n, p in trained.named_parameters() if "lora_B" in n]
    assert all(moved)
    assert len(moved) == 3 * 7  # layers x linear layers
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides=overrides)
    loaded = load_config(ModelSettings(path=str(run.folder)))
    changed = recipe.model.config.get("max_position_embeddings", LARGE[name][1]().max_position_embeddings)
    assert loaded.max_position_embeddings == changed
    assert loaded.rope_parameters.items() >= recipe.model.config.get("rope_parameters", {}).items()
    merge_adapter(str(run.folder), tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16  # as the base's
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert plain.config.max_position_embeddings == changed
    ids = torch.arange(3, 200)[None]
    with torch.inference_mode():
        theirs, ours = plain.eval()(ids).logits, trained.eval()(ids).logits
    # Each merged weight is rounded to 8 bits.
    assert (theirs - ours).abs().max() < 0.03 * ours.abs().max()


LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_its_config_files_and_sets_up_what_they_say(path, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    # accelerate itself asks whether the GPUs can talk to each other.
    monkeypatch.setattr("accelerate.commands.launch.check_cuda_p2p_ib_support", lambda: True)
    parser = launch_command_parser()
    arguments = ["--config_file", str(path), "--num_processes", "8", "-m", "manyicl", "train"]
    args, _, _ = _validate_launch_command(parser.parse_args(arguments))
    environment = prepare_multi_gpu_env(args)
    assert args.num_processes == 8
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    check_launch(environment, optim="adamw_torch_fused")
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (path.stem == "fsdp2")
    if path.stem == "fsdp2":
        for name, value in environment.items():
            if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert not plugin.cpu_ram_efficient_loading
        assert not plugin.activation_checkpointing
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


def test_there_is_a_config_file_for_either_way():
    assert [path.stem for path in LAUNCHES] == ["ddp", "fsdp2"]
