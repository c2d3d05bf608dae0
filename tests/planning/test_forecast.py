"""What `manyicl plan` tells: counts that add up, faults that are found, changes that do make a run fit."""

from __future__ import annotations

import io
import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import BartConfig, LlamaConfig, MambaConfig, MambaForCausalLM, PretrainedConfig, T5Config

from manyicl.cli.tables.forecasts import forecast_table
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.models.costs import count_flops, shape_model
from manyicl.models.loading import LoraSettings, load_config
from manyicl.planning import forecast as forecasting
from manyicl.planning.devices import DEVICES, Device, find_device
from manyicl.planning.fit import suggest_changes
from manyicl.planning.forecast import are_exact_prefixes, count_unterminated, forecast_run
from manyicl.planning.notes import note_settings
from manyicl.training.memory.choice import USABLE_FRACTION, PacksChoice, predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.metrics import bucket_name
from manyicl.training.preparation import count_plan, largest_row, prepare_run
from manyicl.training.recipe import RunConfig, make_config, with_batch
from manyicl.training.recompute import tiles
from manyicl.training.recompute.layers import Recompute
from manyicl.training.run import train
from tests.conftest import tiny_model
from tests.trajectory.setting import write_setting


def changed(config: RunConfig, **sections) -> RunConfig:
    values = config.model_dump()
    for section, entries in sections.items():
        values[section] = {**values[section], **entries}
    return make_config(values, source="test")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return write_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def prepared(config):
    return prepare_run(config)


@pytest.fixture(scope="module")
def forecast(config):
    return forecast_run(config, device=find_device("H100"), num_devices=2)


@pytest.mark.slow
def test_the_parts_of_a_forecast_add_up_to_the_plan(forecast, prepared):
    plan = count_plan(prepared.packs, pack_tokens=160)
    assert forecast.plan == plan
    for name in ("episodes", "tokens", "answers", "targets"):
        assert sum(getattr(task, f"num_{name}") for task in forecast.tasks) == plan[name]
    for task in forecast.tasks:
        assert sum(task.answers_by_shots.values()) == task.num_answers
        assert task.answers_by_shots["0"] == task.num_episodes
        # 40 train rows an epoch; the last episode of one may be short, but none is lost.
        assert task.num_answers / 40 == pytest.approx(task.epochs, rel=0.02)
        assert (task.num_unterminated, task.num_torn) == (0, 0)
        assert task.num_checked == 12  # first, middle and last of four episodes
    assert forecast.blockers == ()
    assert forecast.longest_tokens <= 160
    assert forecast.known_positions == 512


@pytest.mark.slow
def test_last_targets_are_one_answer_an_episode(config):
    last = forecast_run(changed(config, episodes={"targets": "last"}))
    for task in last.tasks:
        assert task.num_answers == task.num_episodes
        assert sum(task.answers_by_shots.values()) == task.num_episodes


def test_flops_are_those_of_the_rows_and_hours_those_of_the_device(forecast, prepared):
    shape = shape_model(load_config(prepared.config.model))
    expected = 0
    for first in range(0, 48, 2):  # two packs a row
        batch = prepared.packs.collate([prepared.packs[first], prepared.packs[first + 1]])
        expected += count_flops(shape, batch.segment_lengths, num_targets=len(batch.target_positions_N))
    assert forecast.flops == expected
    # So small a model waits for its host: 1 ms per layer and pass, of which a row takes three.
    num_rows, num_layers = 24, load_config(prepared.config.model).num_hidden_layers
    assert forecast.waits
    assert forecast.hours == pytest.approx(num_rows * 3 * num_layers * 0.001 / 2 / 3600)
    busy = replace(forecast, layer_passes=0)
    assert not busy.waits
    assert busy.hours == pytest.approx(expected / (2 * 0.3 * 989.5e12) / 3600)


@pytest.mark.parametrize("together", [1, 2, 8])
def test_the_largest_row_is_as_long_as_the_longest_that_any_packs_of_a_step_make(config, together):
    config = with_batch(changed(config, episodes={"shots": 4}), together)  # packs of 104 to 149 tokens
    packs = prepare_run(config).packs
    steps = [range(first, first + 8) for first in range(0, 48, 8)]
    rows = [packs.collate([packs[i] for i in some]) for step in steps for some in combinations(step, together)]
    largest = largest_row(packs, config=config)
    multiple = max(1, 160 * together // 64)  # on a GPU rows have one of 64 lengths
    assert largest.num_tokens == math.ceil(max(row.num_tokens for row in rows) / multiple) * multiple
    assert largest.num_targets == max(len(row.target_positions_N) for row in rows)


def test_a_terminator_that_is_missing_is_counted(prepared):
    task = prepared.tasks["animals"]
    tokenizer = TaskTokenizer(prepared.tokenizer, prepared.config.template)
    train = task.splits["train"]
    ids = train.ids.copy()
    ids[train.starts[1] - 1] += 1
    ids[train.starts[8] - 1] += 1
    broken = replace(task, splits={**task.splits, "train": replace(train, ids=ids)})
    assert count_unterminated(task, tokenizer=tokenizer) == 0
    assert count_unterminated(broken, tokenizer=tokenizer) == 2


def test_a_query_that_is_fed_otherwise_than_trained_is_found(prepared):
    tokenizer = TaskTokenizer(prepared.tokenizer, prepared.config.template)
    episode = next(e for pack in prepared.packs.packs for e in pack.episodes if len(e.examples) > 2)
    task = prepared.tasks[episode.task]
    assert are_exact_prefixes(task, episode, queries=[0, 2], tokenizer=tokenizer) == [True, True]
    train = task.splits["train"]
    ids = train.ids.copy()
    ids[train.starts[episode.examples[1]]] += 1  # as a stale cache would have it
    broken = replace(task, splits={**task.splits, "train": replace(train, ids=ids)})
    assert are_exact_prefixes(broken, episode, queries=[0, 2], tokenizer=tokenizer) == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "blocker"),
    [
        ({"episodes": {"token_budget": 600}}, "the model knows 512 positions"),
        ({"episodes": {"token_budget": 5}}, "no train example fits episodes.token_budget = 5"),
        (
            {"train": {"num_steps": 1, "packs_per_step": 1, "packs_per_batch": 1}},
            "in no episode of the run, with train.num_steps = 1;",
        ),
        ({"episodes": {"token_budget": 40}}, "no episode holds two examples"),
    ],
)
def test_what_would_be_in_vain_is_said_in_words(config, sections, blocker):
    told = forecast_run(changed(config, **sections)).blockers
    assert any(blocker in line for line in told), told
    assert all("\n" not in line for line in told)


@pytest.mark.slow
def test_tasks_with_the_same_fault_share_a_line(config):
    """A demo's recipe of 100 tasks and 8 steps gave a line for each."""
    one_step = {"num_steps": 1, "packs_per_step": 1, "packs_per_batch": 1}
    told = [line for line in forecast_run(changed(config, train=one_step)).blockers if "in no episode" in line]
    assert len(told) == 1
    assert told[0].startswith("2 of 3 tasks (")


@pytest.mark.slow
def test_a_task_with_one_answer_blocks(config, tmp_path):
    (tmp_path / "same.jsonl").write_text(
        "".join(json.dumps({"input": f"n {i}", "answer": "a"}) + "\n" for i in range(40))
    )
    told = forecast_run(changed(config, tasks={"folder": str(tmp_path)}))
    assert "task 'same': every train row has the same answer" in told.blockers[0]


def test_more_layers_to_recompute_than_the_model_has_block_before_anything_is_read(config):
    forecast = forecast_run(changed(config, train={"recompute": 9}, tasks={"folder": "absent"}))
    assert forecast.blockers == ("train.recompute = 9: the model has 3 layers; set at most that, or 'selective'",)


@pytest.mark.slow
def test_too_many_epochs_are_noted(config):
    notes = forecast_run(changed(config, train={"num_steps": 300})).notes
    assert any(
        note.startswith("train rows of 3 of 3 tasks (") and "are seen over 50 times each" in note for note in notes
    )


@pytest.mark.slow
def test_epochs_are_those_of_the_rows_that_fit(config, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(config.tasks.folder, folder)
    lengthened = sorted(folder.glob("*.jsonl"))[0]
    row = json.loads(lengthened.read_text().splitlines()[0])
    with lengthened.open("a") as file:
        file.write(json.dumps({**row, "input": "the red fox " * 2000, "split": "train"}) + "\n")
    forecast = forecast_run(changed(config, tasks={"folder": str(folder)}))
    (task,) = [task for task in forecast.tasks if task.dropped]
    assert (task.num_train, task.num_fitting) == (41, 40)
    assert task.num_answers / 40 == pytest.approx(task.epochs, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("together", "fault"),
    [
        (2, "cannot be shared by 3 ranks with train.packs_per_batch = 2; make it a multiple of 6"),
        ("auto", "cannot be shared by 3 ranks; make it a multiple of 3"),
    ],
)
def test_ranks_that_cannot_share_a_step_block_as_training_refuses_them(config, together, fault):
    config = changed(config, train={"packs_per_batch": together})
    forecast = forecast_run(config, device=find_device("h100"), num_devices=3)
    assert forecast.blockers == (f"train.packs_per_step = 8: {fault}",)
    if together == "auto":
        assert forecast.joined == PacksChoice(1, "3 ranks cannot share the 8 packs of a step")


@pytest.mark.slow
def test_rows_that_no_episode_holds_are_counted(config):
    # Each of the three tasks has 40 train rows, and eight or nine of them fit the 160 tokens of a pack.
    forecast = forecast_run(changed(config, train={"num_steps": 1, "packs_per_step": 6, "packs_per_batch": 2}))
    counts = [(task.num_fitting, task.num_seen, task.num_answers) for task in forecast.tasks]
    assert all(fitting == 40 and seen == answers < 40 for fitting, seen, answers in counts), counts
    [note] = [line for line in forecast.notes if "in no episode" in line]
    assert note.startswith("train rows of 3 of 3 tasks (")
    assert all(f"{task.name} {40 - task.num_seen} of 40" in note for task in forecast.tasks)
    assert not any("in no episode" in line for line in forecast_run(changed(config, train={"num_steps": 4})).notes)


@pytest.mark.slow
def test_the_share_of_each_task_is_told_and_rows_beyond_a_cap_are_counted(config):
    names = [task.name for task in forecast_run(config).tasks]
    mixing = {"weights": {names[0]: 3.0}, "temperature": 2.0, "max_rows": 30}
    forecast = forecast_run(changed(config, tasks=mixing, episodes={"mixture": "proportional"}))
    for task in forecast.tasks:
        assert task.dropped == {"beyond tasks.max_rows": 10}
        assert task.num_fitting == 30
    shown = io.StringIO()
    Console(file=shown, width=110).print(forecast_table(forecast))
    # Three tasks of nearly one size, one of them with three times the weight.
    row = next(line for line in shown.getvalue().splitlines() if line.startswith(names[0]))
    assert float(next(cell for cell in row.split() if "%" in cell).rstrip("%")) == pytest.approx(60, abs=6)


def test_a_mixture_that_means_nothing_is_refused(config):
    with pytest.raises(UserError, match=r"tasks.weights: task 'colors' is not trained; did you mean 'colours'"):
        prepare_run(changed(config, tasks={"weights": {"colors": 2.0}}))
    with pytest.raises(UserError, match=r"tasks.weights = .*: does not fit; task -> number above 0"):
        changed(config, tasks={"weights": {"colours": 0}})
    with pytest.raises(UserError, match=r"tasks.temperature = 2.0: does nothing with episodes.mixture = 'uniform'"):
        changed(config, tasks={"temperature": 2.0}, episodes={"mixture": "uniform"})


@pytest.mark.slow
def test_a_warm_up_that_never_ends_and_a_rank_beyond_the_model_are_noted(config):
    settings = {"model": {"lora": {"rank": 32}}, "train": {"warmup_steps": 6}}
    notes = forecast_run(changed(config, **settings)).notes
    assert any(note.startswith("train.warmup_steps = 6: the learning rate is still rising") for note in notes)
    assert any(note.startswith("model.lora.rank = 32: the model's layers have 32 features") for note in notes)
    gentle = {"model": {"lora": {"rank": 31}}, "train": {"warmup_steps": 5}}
    assert not any("warmup" in note or "rank" in note for note in forecast_run(changed(config, **gentle)).notes)


def test_steps_of_one_task_are_noted(config):
    one_pack = changed(config, train={"num_steps": 10, "packs_per_step": 1, "packs_per_batch": 1, "warmup_steps": 1})

    def note(*episodes: int) -> list[str]:
        return list(note_settings(one_pack, PretrainedConfig(), episodes))

    assert note(4, 4, 4) == [
        "train.packs_per_step = 1: a step has 1.2 episodes, so most have one task; 4 or more would mix tasks and take"
        " no more memory"
    ]  # fmt: skip
    assert note(6, 7, 7) == note(12) == []


def test_bf16_that_this_cpu_would_emulate_is_noted_unless_a_device_is_named(config, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    half = changed(config, model={"precision": "bf16"})
    assert "precision bf16: this CPU has no units for it" in forecast_run(half).notes[0]
    for forecast in (forecast_run(half, device=find_device("H100")), forecast_run(config)):
        assert not [note for note in forecast.notes if "this CPU" in note]


def test_a_model_whose_memory_is_unknown_has_its_counts_all_the_same(config, monkeypatch):
    def refuse(*_, **__):
        raise UserError("llama: its memory cannot be predicted")

    monkeypatch.setattr(forecasting, "measure_footprint", refuse)
    forecast = forecast_run(config, device=find_device("3090"))
    assert forecast.memory is None
    assert forecast.flops is not None
    assert forecast.notes[0] == "llama: its memory cannot be predicted"
    assert forecast.blockers == ()


@pytest.mark.slow
def test_without_a_device_memory_is_that_of_a_cpu_which_recomputes_no_layer(config):
    """It was that of all layers recomputed, which nothing did: 2.3 GiB of a run that took 3.2."""
    planned = forecast_run(config)
    assert planned.memory == forecast_run(changed(config, train={"recompute": "none"})).memory
    assert planned.memory.layers_bytes > 0
    shown = io.StringIO()
    Console(file=shown, width=200).print(forecast_table(planned))
    assert "no layer is recomputed, as on a CPU" in shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "can"), [("a100-80", False), ("3090", False), ("h100", True), ("4090", True)])
def test_a_card_without_products_in_8_bits_is_no_device_for_a_base_in_them(config, name, can):
    config = changed(config, model={"quantize": "float8", "precision": "bf16", "lora": {"rank": 4}})
    blockers = forecast_run(config, device=find_device(name)).blockers
    assert blockers == (
        () if can else (f"model.quantize = 'float8': the {name} has no products in 8 bits; leave it out",)
    )


@pytest.mark.parametrize(
    ("model", "num_devices", "obstacle"),
    [
        ({}, 1, None),
        ({}, 2, "the model is in DDP or FSDP"),
        ({"lora": {"rank": 4, "dropout": 0.1}}, 1, "there is dropout"),
        ({"precision": "fp32"}, 1, "products are in float32, whose attention goes segment by segment"),
        ({"quantize": "nf4", "lora": {"rank": 4}}, 1, "the base is kept in nf4"),
        ({"config": {"attention_dropout": 0.1}}, 1, "there is dropout"),
        (
            {"config": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
            1,
            "the host waits for the longest position (rope_type 'dynamic')",
        ),
        ({"config": {"head_dim": 100}}, 1, "attention goes segment by segment (heads of 100)"),
    ],
)
def test_a_graph_that_cannot_be_blocks_a_plan(config, model, num_devices, obstacle):
    """It was refused by training alone, after a plan had found nothing in its way."""
    train = {"cuda_graph": True, "recompute": "none", "packs_per_batch": 1, "packs_per_step": 2}
    config = changed(config, model={"precision": "bf16"} | model, train=train)
    blockers = forecast_run(config, device=find_device("h100"), num_devices=num_devices).blockers
    told = f"train.cuda_graph = true: {obstacle}; set it to 'auto' or false"
    assert blockers == (() if obstacle is None else (told,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"cuda_graph": True}, "train.cuda_graph = true: there is no GPU; set it to 'auto' or false"),
        ({"recompute": "tiled"}, "train.recompute = 'tiled': needs a GPU, whose memory it saves; set 'full' or 'auto'"),
    ],
)
def test_what_needs_a_gpu_is_planned_for_one_that_is_named(config, train, told):
    config = changed(config, train=train)
    assert forecast_run(config).blockers == (f"{told}, or name the device that will train",)
    assert forecast_run(changed(config, model={"precision": "bf16"}), device=find_device("h100")).blockers == ()


@pytest.mark.slow
def test_a_graph_is_refused_and_given_up_where_auto_recomputes_layers_to_fit(config):
    train = {"recompute": "auto", "cuda_graph": True, "packs_per_batch": 1}
    config = changed(config, model={"precision": "bf16"}, train=train)
    forecast = forecast_run(config, device=find_device("h100"))
    assert forecast.blockers == ()
    less = replace(find_device("h100"), memory_bytes=int(forecast.memory.total_bytes / USABLE_FRACTION) - 1000)
    (blocker,) = forecast_run(config, device=less).blockers
    assert blocker.startswith("train.cuda_graph = true: layers are recomputed, so that a step fits the memory; set it")
    kept = changed(config, train={"recompute": "none"})
    (blocker,) = forecast_run(kept, device=less).blockers
    assert "train.recompute=auto train.cuda_graph=auto needs" in blocker


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"quantize": "nf4"}, "model.quantize = 'nf4': packed weights cannot be trained; train an adapter"),
        ({"quantize": "float8"}, "model.quantize = 'float8': packed weights cannot be trained; train an adapter"),
        ({"quantize": "float8", "lora": {}}, "model.quantize = 'float8': its products are in bfloat16; set model.prec"),
        ({"lora": {"modules": ["q_proj", "k_prj"]}}, "model.lora.modules: 'k_prj' is not the name of a layer; use"),
    ],
)
def test_what_no_machine_can_train_blocks_a_plan_and_leaves_no_folder_of_a_run(config, model, told, tmp_path):
    config = changed(config, model=model)
    (blocker,) = forecast_run(config).blockers
    assert blocker.startswith(told)
    with pytest.raises(UserError) as refused:
        train(config, out=tmp_path / "run")
    assert str(refused.value) == blocker
    assert not (tmp_path / "run").exists()


def test_a_base_in_8_bits_is_prepared_where_this_machine_could_not_train_it(config, tmp_path, monkeypatch):
    monkeypatch.setattr("manyicl.models.loading.resolve_precision", lambda precision: "fp32")
    config = changed(config, model={"quantize": "float8", "precision": "auto", "lora": {"rank": 4}})
    assert prepare_run(config).packs.packs  # as `show` and `export` do
    with pytest.raises(
        UserError, match=r"model.quantize = 'float8': its products are in bfloat16; set model.precision"
    ):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_in_4_bits_is_planned_without_bitsandbytes_but_not_trained(config, tmp_path, monkeypatch):
    config = changed(config, model={"quantize": "nf4", "lora": {"rank": 4}})
    monkeypatch.setattr("manyicl.models.quantization.nf4.find_spec", lambda name: None)
    assert forecast_run(config).blockers == ()
    with pytest.raises(UserError, match=r"model.quantize = 'nf4': bitsandbytes is not installed; pip install bits"):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_change_that_is_proposed_fits_and_the_gentler_ones_did_not(config, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 100)
    config = changed(config, train={"recompute": "none"})
    model_config = load_config(config.model)
    row = Row(302, 60, "fp32")  # as in no other test: what is known is not run again
    weights = shape_model(model_config).weights
    footprint = measure_footprint(model_config, row)
    kept = predict_memory(footprint, Recompute(0)).total_bytes
    recomputed = [Recompute(3), Recompute(3, False), Recompute(3, False, offload=True)]
    recomputed.append(replace(recomputed[-1], tiles=True))
    every, whole, offloaded, tiled = (predict_memory(footprint, recompute).total_bytes for recompute in recomputed)

    def propose(total_bytes):
        device = Device("small", memory_bytes=int(total_bytes / 0.92) + 1, peak_flops_per_s=1e12)
        return suggest_changes(config, model_config, row=row, device=device, weights=weights)

    assert tiled < offloaded < whole < every < kept
    for total_bytes in (every, whole, offloaded, tiled):
        checkpointed = propose(total_bytes)
        assert checkpointed.overrides == ("train.recompute=auto",)
        assert checkpointed.total_bytes == total_bytes
    smaller = propose(tiled - 1000)
    assert smaller.overrides == ("train.recompute=auto", "train.packs_per_batch=1")
    assert smaller.total_bytes < tiled - 1000
    assert propose(weights.base) is None


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["auto", "full", "offload", "none"])
def test_a_change_that_makes_room_by_itself_is_proposed_by_itself(config, setting):
    """Layers were to run in tiles too, since that had been tried in vain before."""
    config = changed(config, train={"recompute": setting, "packs_per_batch": 1}, model={"precision": "bf16"})
    model_config, row = LlamaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=4), Row(64, 16, "bf16")
    footprint = measure_footprint(model_config, row, lora=LoraSettings())
    needed = predict_memory(footprint, Recompute(0)).total_bytes
    device = Device("small", math.ceil(needed / USABLE_FRACTION) + 1, peak_flops_per_s=1e12)
    weights = shape_model(model_config).weights
    assert 16 * weights.base > device.memory_bytes  # of full fine-tuning: weight, gradient and two moments, float32
    change = suggest_changes(config, model_config, row=row, device=device, weights=weights)
    assert change.overrides == ("model.lora={}",)
    assert change.total_bytes <= needed


@pytest.mark.slow
def test_packs_of_several_episodes_are_made_shorter_before_the_episodes_are(config):
    """Only packs that were as many times as long as an episode as before were tried: nothing was said to fit."""
    train = {"recompute": "full", "packs_per_batch": 1, "pack_tokens": 8192}
    model = {"lora": {}, "precision": "bf16"}
    config = changed(config, episodes={"token_budget": 512}, train=train, model=model)
    model_config, lora = load_config(config.model), config.model.lora
    row = Row(8192, 2048, "bf16")
    footprint = measure_footprint(model_config, Row(512, 128, "bf16", quantize="nf4"), lora=lora)
    needed = predict_memory(footprint, Recompute(footprint.num_layers, False, offload=True)).total_bytes
    device = Device("tiny", math.ceil(needed / USABLE_FRACTION) + 1, peak_flops_per_s=1e12)
    weights = shape_model(model_config, lora=lora).weights
    change = suggest_changes(config, model_config, row=row, device=device, weights=weights)
    assert change.overrides == ("train.recompute=offload", "model.quantize=nf4", "train.pack_tokens=512")
    assert change.total_bytes == needed


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_is_told_what_to_change(config):
    config = changed(config, train={"recompute": "none"})
    tiny = Device("tiny", memory_bytes=3_000_000, peak_flops_per_s=1e12)
    forecast = forecast_run(config, device=tiny)
    assert forecast.change is not None
    assert (
        f"the tiny has 0.0, of which 0.0 are counted on; {' '.join(forecast.change.overrides)} needs"
        in forecast.blockers[0]
    )
    # The proposal is one that the command line takes, and it does fit.
    sections: dict[str, dict[str, object]] = {}
    for override in forecast.change.overrides:
        key, value = override.split("=")
        section, entry = key.split(".")
        sections.setdefault(section, {})[entry] = value
        with suppress(json.JSONDecodeError):  # not a word
            sections[section][entry] = json.loads(value)
    assert forecast_run(changed(config, **sections), device=tiny).blockers == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "num_devices", "number", "told"),
    [
        ("h100", 1, 8, "rows: 8 packs go through the model at once on h100: all that a step has for a rank"),
        ("h100", 2, 4, "rows: 4 packs go through the model at once on h100: all that a step has for a rank"),
        (None, 1, 1, "rows: 1 pack goes through the model at once: no device is named, and a CPU gains nothing from"),
    ],
)
def test_the_packs_that_a_row_joins_are_told(config, device, num_devices, number, told):
    config = changed(config, train={"packs_per_batch": "auto"})
    found = forecast_run(config, device=device and find_device(device), num_devices=num_devices)
    fixed = changed(config, train={"packs_per_batch": number})
    same = forecast_run(fixed, device=device and find_device(device), num_devices=num_devices)
    assert found.joined.number == number
    assert (found.memory, found.layer_passes) == (same.memory, same.layer_passes)
    shown = io.StringIO()
    Console(file=shown, width=200).print(forecast_table(found))
    assert told in shown.getvalue()
    assert same.joined is None


@pytest.mark.slow
def test_a_device_with_little_memory_joins_fewer_packs(config):
    config = changed(config, train={"packs_per_batch": "auto"})
    needed = forecast_run(changed(config, train={"packs_per_batch": 2}), device=find_device("h100")).memory.total_bytes
    found = forecast_run(config, device=Device("small", math.ceil(needed / USABLE_FRACTION) + 1, 1e12))
    assert (found.joined.number, found.joined.reason) == (2, "more would not fit the memory")
    assert found.memory.total_bytes == needed
    assert found.blockers == ()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_everything_at_any_width(forecast, width):
    console = Console(width=width, record=True, file=io.StringIO(), markup=False)
    console.print(forecast_table(forecast))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "\u2026" not in text  # nothing is cut off
    for word in ("animals", "beasts", "colours", "64-255", "optimizer", "h100", "nothing stands in its way"):
        assert word in text
    assert "120 of 120 answers" in " ".join(text.split())


def test_a_forecast_as_json_holds_what_the_table_shows(forecast):
    content = json.loads(json.dumps(forecast.to_json()))
    assert content["tasks"][0]["name"] == "animals"
    assert content["memory"]["total_bytes"] == forecast.memory.total_bytes
    assert content["hours"] == forecast.hours
    assert content["assumed_utilization"] == 0.3


def test_devices_by_name():
    assert find_device("H100").memory_bytes == 80 * 10**9
    assert all(device.name == name for name, device in DEVICES.items())
    with pytest.raises(UserError, match="device=h10: is not known; did you mean 'h100'"):
        find_device("h10")


def test_buckets_of_shots():
    assert [bucket_name(i, buckets=forecasting.SHOT_EDGES) for i in range(6)] == [
        "0",
        "1-3",
        "4-15",
        "16-63",
        "64-255",
        "256+",
    ]
    assert np.all(np.diff(forecasting.SHOT_EDGES) > 0)


def test_a_model_that_is_not_a_causal_language_model_is_refused_by_plan_as_by_training(tmp_path):
    """Plan ended in a traceback, or found that nothing stood in the way."""
    config = write_setting(tmp_path)
    for other in (T5Config(), BartConfig()):
        other.save_pretrained(tmp_path / "start")
        told = f"{tmp_path / 'start'}: is a {other.model_type}, not a causal language model; name one whose"
        [blocker] = forecast_run(config).blockers
        assert blocker.startswith(told)
        with pytest.raises(UserError) as refused:
            train(config, out=tmp_path / "run")
        assert str(refused.value) == blocker


@pytest.mark.slow
def test_a_model_without_attention_is_planned_and_trained_without_its_flops(tmp_path):
    """It ended in an AttributeError."""
    config = write_setting(tmp_path, num_steps=1, packs_per_batch="auto")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(vocab_size=tiny_model("llama").config.vocab_size, **size))
    model.save_pretrained(tmp_path / "start")
    planned = forecast_run(config)
    assert (planned.flops, planned.memory, planned.blockers) == (None, None, ())
    assert planned.notes[0] == "mamba: what layers without attention cost is not known here"
    with pytest.warns(UserWarning, match="does not keep the episodes of a row apart"):
        assert train(config, out=tmp_path / "run").model.is_dir()
