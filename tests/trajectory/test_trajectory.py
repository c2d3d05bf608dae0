"""The same run by other ways: other micro-batches, other ranks, killed and resumed."""

from __future__ import annotations

import gc
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from manyicl.errors import OutOfMemoryError, UserError
from manyicl.training import trainer
from manyicl.training.preparation import prepare_run
from manyicl.training.recipe import dump_config, load_recipe, make_config
from manyicl.training.recompute import tiles
from manyicl.training.recompute.layers import Recompute
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.support.forked import forked
from tests.trajectory.killed import STAGES
from tests.trajectory.setting import (
    python_process,
    read_metrics,
    read_weights,
    start_process,
    start_ranks,
    write_setting,
)

SHARDED = str(Path(__file__).with_name("sharded.py"))
FSDP_ON_CPUS = str(Path(__file__).with_name("fsdp_on_cpus.py"))
KILLED = str(Path(__file__).with_name("killed.py"))
PACKS_OF_RANKS = str(Path(__file__).with_name("packs_of_ranks.py"))


def assert_same_course(one: Path, other: Path, *, rel: float) -> None:
    """Every logged figure and every weight agree to `rel`; 0 means to the bit."""
    ours, theirs = read_metrics(one), read_metrics(other)
    assert [sorted(record) for record in ours] == [sorted(record) for record in theirs]
    for record, expected in zip(theirs, ours, strict=True):
        assert record == (pytest.approx(expected, rel=rel) if rel else expected)
    weights, expected_weights = read_weights(other), read_weights(one)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        if rel:
            # By tensor, not by entry: Adam makes a full step of a gradient that is nothing but rounding.
            assert (tensor - expected_weights[name]).norm() <= 1e-3 * expected_weights[name].norm(), name
        else:
            assert torch.equal(tensor, expected_weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["answer", "token", "task"])
def test_one_row_of_eight_packs_equals_eight_rows_of_one(tmp_path, normalization):
    for packs in (8, 1):
        config = write_setting(tmp_path, packs_per_batch=packs, normalization=normalization, num_steps=4)
        train(config, out=tmp_path / f"rows-{packs}")
    first = [read_metrics(tmp_path / f"rows-{packs}")[0]["loss"] for packs in (8, 1)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert_same_course(tmp_path / "rows-8", tmp_path / "rows-1", rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares this process with two on the CPU")
@pytest.mark.filterwarnings("ignore:.*each episode goes through the model alone")
def test_two_ranks_equal_one_if_episodes_go_through_the_model_alone(tmp_path):
    config = write_setting(tmp_path, family="lfm2", num_steps=4)
    train(config, out=tmp_path / "one")
    arguments = ["-m", "manyicl", "train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two")]
    process = start_ranks(arguments)
    assert process.returncode == 0, process.stderr
    assert_same_course(tmp_path / "one", tmp_path / "two", rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares this process with two on the CPU")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_of_four_packs_equal_one_of_eight(tmp_path, lora):
    # Packs hold two episodes, and validation has an odd number of rows: one rank repeats the last.
    config = write_setting(tmp_path, lora=lora, num_steps=4, pack_tokens=320)
    assert len(prepare_run(config).validation[1]) == 3
    train(config, out=tmp_path / "one")
    arguments = ["-m", "manyicl", "train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two")]
    process = start_ranks(arguments)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("model:") == 1  # one rank speaks
    assert_same_course(tmp_path / "one", tmp_path / "two", rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares this process with two on the CPU")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
@pytest.mark.parametrize(("how", "recompute"), [("ddp", "selective"), ("fsdp2", 1), ("fsdp2", "full")])
def test_two_ranks_with_compiled_layers_do_the_run_of_one_with_plain_ones(tmp_path, how, recompute):
    # One pack of one episode a row: on a CPU only such attention can be compiled, and kept.
    write_setting(tmp_path, lora=True, num_steps=4, packs_per_batch=1, recompute=recompute)
    recipe, two = tmp_path / "recipe.toml", tmp_path / "two"
    train(load_recipe(recipe), out=tmp_path / "one")
    compiled = tmp_path / "compiled.toml"
    compiled.write_text(dump_config(load_recipe(recipe, overrides=["train.compile=true"])))
    ddp = ["-m", "manyicl", "train", str(compiled), "--out", str(two)]
    script = ddp if how == "ddp" else [FSDP_ON_CPUS, str(two), str(compiled), "never", "0"]
    process = start_ranks(script)
    assert process.returncode == 0, process.stderr
    assert_same_course(tmp_path / "one", two, rel=1e-4)
    # Were it not compiled in one with its recomputation, a layer would be recomputed in full.
    assert json.loads((two / "run.json").read_text())["attention_recomputed"] == (recompute == "full")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_model_sharded_by_fsdp2_has_the_loss_and_gradients_of_the_whole_one(tmp_path, lora):
    write_setting(tmp_path, lora=lora)
    process = start_ranks([SHARDED, str(tmp_path / "recipe.toml")])
    assert process.returncode == 0, process.stderr
    # Three layers of two matrices on each of seven linear ones; or those, two norms a layer, a last one, and both ends.
    expected = "42 gradients of 6144 weights" if lora else "30 gradients of 53472 weights"
    assert expected in process.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares this process with two on the CPU")
@pytest.mark.parametrize(
    ("lora", "family", "recompute"),
    [(False, "llama", "none"), (True, "llama", "selective"), (False, "gemma", 2)],
    ids=["full", "lora", "tied"],
)
def test_two_ranks_under_accelerates_fsdp2_do_the_run_of_one_and_go_on_from_a_checkpoint(
    tmp_path, lora, family, recompute
):
    config = write_setting(tmp_path, lora=lora, family=family, recompute=recompute, pack_tokens=320)
    assert len(prepare_run(config).validation[1]) == 3
    train(config, out=tmp_path / "one")

    def launch(run: str, kind: str, number: str) -> subprocess.CompletedProcess[str]:
        recipe = str(tmp_path / "recipe.toml")
        return start_ranks([FSDP_ON_CPUS, str(tmp_path / run), recipe, kind, number])

    process = launch("two", "never", "0")
    assert process.returncode == 0, process.stderr
    assert_same_course(tmp_path / "one", tmp_path / "two", rel=1e-4)
    # Two micro-batches a step and rank, a checkpoint every two steps: killed in step 6, it goes on behind step 4.
    assert launch("killed", "batch", "11").returncode != 0
    assert [step for step, _ in RunFolder(tmp_path / "killed").checkpoints.all()][-1] == 4
    process = launch("killed", "never", "0")
    assert process.returncode == 0, process.stderr
    assert_same_course(tmp_path / "two", tmp_path / "killed", rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_ranks_of_which_one_finds_a_fault_agree_on_the_packs_that_each_joins(tmp_path):
    write_setting(tmp_path, packs_per_batch="auto")
    process = start_ranks([PACKS_OF_RANKS, str(tmp_path / "recipe.toml")])
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["each episode goes through the model alone"] * 2


@pytest.mark.slow
def test_a_run_killed_at_five_random_moments_equals_an_uninterrupted_one(tmp_path):
    write_setting(tmp_path, num_steps=8)
    recipe = str(tmp_path / "recipe.toml")
    whole = start_process([KILLED, str(tmp_path / "whole"), recipe, "never", "0"])
    assert whole.returncode == 0, whole.stderr
    # Four micro-batches a step, a checkpoint every two steps: a number that 4 does not divide is in mid-accumulation.
    moments = [
        ("batch", random.choice([1, 2, 3, 5, 6, 7])),
        ("save", random.randrange(len(STAGES))),
        ("batch", random.randint(8, 12)),
        ("save", random.randrange(len(STAGES))),
        ("batch", random.randint(1, 8)),
    ]
    for kind, number in moments:
        process = start_process([KILLED, str(tmp_path / "killed"), recipe, kind, str(number)])
        assert process.returncode == -signal.SIGKILL, (moments, process.stderr)
    last = start_process([KILLED, str(tmp_path / "killed"), recipe, "never", "0"])
    assert last.returncode == 0, (moments, last.stderr)
    assert_same_course(tmp_path / "whole", tmp_path / "killed", rel=0)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".saving-*"))


@pytest.mark.slow
def test_a_run_that_the_user_stops_says_how_to_go_on_and_does(tmp_path):
    write_setting(tmp_path, family="gemma", num_steps=30)  # its tied head lies in a checkpoint once
    run = tmp_path / "a run"
    arguments = ["-m", "manyicl", "train", str(tmp_path / "recipe.toml"), "--out", str(run)]
    with forked(arguments, python_process([])["env"], err=str(tmp_path / "told.txt")) as process:
        while not RunFolder(run).checkpoints.all():
            assert process.is_alive()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
    told = (tmp_path / "told.txt").read_text()
    command = f"manyicl train --resume '{run}'"
    assert told.splitlines()[-1] == f"stopped; resume with: {command}"
    going_on = start_process(["-m", *shlex.split(command)])
    assert going_on.returncode == 0, going_on.stderr
    assert "missing" not in going_on.stderr
    assert json.loads((run / "run.json").read_text())["finished"]


@pytest.mark.slow
def test_a_run_that_is_out_of_memory_says_what_takes_less_and_goes_on_with_that(tmp_path, monkeypatch):
    config = write_setting(tmp_path)
    train(config, out=tmp_path / "whole")
    folder, fixes = tmp_path / "run", []
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "row_loss", short_of_memory_at(step=4, original=trainer.row_loss))
        for changes in ({}, {"recompute": "selective"}, {"recompute": "full"}):
            changed = config.model_copy(update={"train": config.train.model_copy(update=changes)})
            with pytest.raises(OutOfMemoryError, match=r"^step [34]: .* memory, with rows of up to 320 ") as caught:
                train(changed, out=folder, resume=folder.exists())
            fixes.append(caught.value.setting)
        patched.setattr(trainer, "device_of", lambda model: torch.device("cuda"))  # which can keep inputs in the host
        for offload, tile_tokens, setting in (
            (False, 64, "train.recompute=offload"),
            (True, 64, "train.recompute=tiled"),
            (True, 320, "train.packs_per_batch=1"),  # a row is one tile
        ):
            patched.setattr(tiles, "TILE_TOKENS", tile_tokens)
            whole = Recompute(3, keep_attention=False, offload=offload)
            patched.setattr(trainer, "choose_recompute", lambda *_, whole=whole, **__: whole)
            with pytest.raises(OutOfMemoryError, match=r"3 of 3 layers recomputed in full") as caught:
                train(changed, out=folder, resume=True)
            assert caught.value.setting == setting
    assert fixes == ["train.recompute=selective", "train.recompute=full", "train.packs_per_batch=1"]
    # The last fix, as the command line takes it: whole layers are in the run's config.toml by now.
    told = start_process(["-m", "manyicl", "train", "--resume", str(folder), "train.packs_per_batch=1"])
    assert told.returncode == 0, told.stderr
    assert_same_course(tmp_path / "whole", folder, rel=1e-4)
    settings = RunFolder(folder).read_config().train
    assert (settings.recompute, settings.packs_per_batch) == ("full", 1)
    assert json.loads((folder / "run.json").read_text())["changes"] == [
        {"after_step": 2, "train.recompute": "selective"},
        {"after_step": 2, "train.recompute": "full"},
        {"after_step": 2, "train.packs_per_batch": 1},
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU joins no packs by itself")
def test_a_run_goes_on_with_the_packs_that_it_joined_by_itself(tmp_path, monkeypatch):
    config = write_setting(tmp_path, packs_per_batch="auto", checkpoint_every_steps=1)
    train(config, out=tmp_path / "whole")
    folder = RunFolder(tmp_path / "run")

    def fail(*, rows: int) -> OutOfMemoryError:
        with monkeypatch.context() as patched:
            # That counts four rows a step.
            patched.setattr(trainer, "row_loss", short_of_memory_at(step=1 + rows // 4, original=trainer.row_loss))
            with pytest.raises(OutOfMemoryError) as caught:
                train(config, out=folder.path, resume=folder.is_started)
        return caught.value

    assert fail(rows=20).setting == "train.recompute=selective"  # eight rows a step: in the third
    assert folder.read_state().packs_per_batch == 1
    assert folder.read_state().packs_reason == "a CPU gains nothing from more"
    folder.update_state(packs_per_batch=4, packs_reason="more would not fit the memory")  # as on a GPU
    failed = fail(rows=4)  # two rows a step
    assert "with rows of up to 640 tokens" in str(failed)
    assert failed.setting == "train.recompute=selective"  # which takes less time than packs one by one
    train(config, out=folder.path, resume=True)
    assert (folder.read_config().train.packs_per_batch, folder.read_state().packs_per_batch) == ("auto", 4)
    assert_same_course(tmp_path / "whole", folder.path, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU joins no packs by itself")
def test_a_number_that_was_fixed_before_is_not_taken_for_the_devices_choice(tmp_path):
    fixed = write_setting(tmp_path, packs_per_batch=4, num_steps=2)
    config = fixed.model_copy(update={"train": fixed.train.model_copy(update={"packs_per_batch": "auto"})})
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.start(prepare_run(config))
    # As a process leaves it that was killed after the setting had changed, and before the device had chosen.
    folder.update_state(packs_per_batch=4, packs_reason="as train.packs_per_batch says")
    train(config, out=folder.path, resume=True)
    state = folder.read_state()
    assert (state.packs_per_batch, state.packs_reason) == (1, "a CPU gains nothing from more")


@pytest.mark.slow
def test_what_a_pass_had_made_is_freed_when_memory_runs_out_although_a_notebook_keeps_the_error(tmp_path, monkeypatch):
    config, made, whole = write_setting(tmp_path, num_steps=2, recompute="full"), [], LlamaMLP.forward

    def run_out(self, hidden):
        if not torch.is_grad_enabled():
            return whole(self, hidden)
        made.append(weakref.ref(hidden))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaMLP, "forward", run_out)
        with pytest.raises(OutOfMemoryError, match="out of memory") as kept:
            train(config, out=tmp_path / "run")
    gc.collect()
    assert [ref() for ref in made] == [None]
    assert kept.value.__cause__ is not None
    assert train(config, out=tmp_path / "run", resume=True).held_out


def short_of_memory_at(*, step, original):
    """Return a `row_loss` that finds no memory from the first training row of a step on, in runs behind it too."""
    rows = {"trained": 0}

    def row_loss(model, batch):
        rows["trained"] += torch.is_grad_enabled()
        if rows["trained"] > 4 * (step - 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch)

    return row_loss


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing_and_says_so(tmp_path):
    config = write_setting(tmp_path, num_steps=2)
    train(config, out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.json"}
    again = train(config, out=tmp_path / "run", resume=True)
    assert again.held_out
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.slow
def test_a_run_started_before_a_setting_was_added_goes_on_with_its_default(tmp_path):
    config = write_setting(tmp_path, num_steps=2)
    train(config, out=tmp_path / "run")
    resolved = tmp_path / "run" / "config.toml"
    lines = resolved.read_text().splitlines(keepends=True)
    resolved.write_text("".join(line for line in lines if not line.startswith("rename_")))
    assert len(resolved.read_text().splitlines()) == len(lines) - 2
    assert train(config, out=tmp_path / "run", resume=True).held_out
    other = config.model_copy(update={"seed": 4})
    with pytest.raises(UserError, match=r"seed would be another than in its config\.toml"):
        train(other, out=tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_run_named_by_relative_paths_goes_on_from_anywhere_but_not_on_other_data(tmp_path, monkeypatch):
    write_setting(tmp_path, num_steps=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    overrides = ["tasks.folder=../tasks", "model.path=../start"]
    train(tmp_path / "recipe.toml", out=tmp_path / "run", overrides=overrides)
    monkeypatch.chdir(tmp_path)
    assert train(RunFolder(tmp_path / "run").read_config(), out=tmp_path / "run", resume=True).held_out
    with (tmp_path / "tasks" / "animals.jsonl").open("a") as file:
        file.write('{"input": "one more fox", "answer": "fox", "split": "train"}\n')
    with pytest.raises(UserError, match="task 'animals' is not what it was"):
        train(RunFolder(tmp_path / "run").read_config(), out=tmp_path / "run", resume=True)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_becomes_the_model(tmp_path):
    # A learning rate that ruins the model after a good start: the best checkpoint is not the last.
    config = write_setting(
        tmp_path, num_steps=6, learning_rate=2.0, schedule="constant", max_grad_norm=0.0, keep="best"
    )
    train(config, out=tmp_path / "run")
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(tmp_path / "run") if "eval_loss" in r}
    best = min(losses, key=losses.__getitem__)
    assert best != 6
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == sorted({f"checkpoint-{best}", "checkpoint-6"})
    last = train(
        make_config(config.model_dump() | {"train": {**config.train.model_dump(), "keep": "last"}}, source=""),
        out=tmp_path / "last",
    )
    kept, final = read_weights(tmp_path / "run"), read_weights(last.folder)
    assert any(not torch.equal(kept[name], final[name]) for name in kept)
