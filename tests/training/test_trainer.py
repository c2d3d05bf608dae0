"""The trainer's own promises: non-finite stops before the update, whole checkpoints, logs that can be cut."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainerCallback

from manyicl.episodes.packing import Pack
from manyicl.errors import NonFiniteError, OutOfMemoryError, UserError
from manyicl.training import trainer
from manyicl.training.metrics import MetricsLog, bucket_name
from manyicl.training.preparation import row_multiple, share_rows
from manyicl.training.ranks import agree_on, check_launch, refuse_data_parallel
from manyicl.training.recipe import TrainSettings
from manyicl.training.recompute.layers import Recompute
from manyicl.training.run import train
from manyicl.training.run_folder import Checkpoints, RunFolder
from tests.trajectory.setting import read_metrics, write_setting


def test_bucket_names():
    names = [bucket_name(index) for index in range(12)]
    assert names == [
        "0",
        "1",
        "2-3",
        "4-7",
        "8-15",
        "16-31",
        "32-63",
        "64-127",
        "128-255",
        "256-511",
        "512-1023",
        "1024+",
    ]


def test_metrics_are_cut_back_to_a_step_and_a_half_written_line_is_left_out(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 0.5})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.cut_after(2)
    assert [record["step"] for record in log.read()] == [1, 2]
    assert log.path.read_text().endswith('"loss": 0.5}\n')


def test_checkpoints_are_listed_oldest_first_and_only_whole_ones(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", ".saving-11", "checkpoint-9-backup"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in Checkpoints(tmp_path).all()] == [9, 10]


def test_several_gpus_without_a_launcher_are_refused_with_the_command_to_use():
    with pytest.raises(UserError, match=r"accelerate launch --num_processes 4 -m manyicl train r\.toml"):
        refuse_data_parallel(4, num_ranks=1, command=("manyicl", "train", "r.toml"))
    with pytest.raises(UserError, match=r"-m manyicl train 'my recipe\.toml'`"):
        refuse_data_parallel(4, num_ranks=1, command=("manyicl", "train", "my recipe.toml"))
    refuse_data_parallel(4, num_ranks=4, command=())
    refuse_data_parallel(1, num_ranks=1, command=())


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}


@pytest.mark.parametrize("fine", [{}, FSDP2, PARALLEL, {"PARALLELISM_CONFIG_CP_SIZE": "4"}, PARALLEL | FSDP2])
def test_launches_that_are_supported_are_let_through(fine):
    check_launch(fine, optim="adamw_torch_fused")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (PARALLEL | {"PARALLELISM_CONFIG_CP_SIZE": "4"}, "cp_size = 4: context parallelism is not supported"),
        (PARALLEL | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size = 2: tensor parallelism is not supported"),
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version = 1: is not supported"),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "SHARDED_STATE_DICT: checkpoints would hold no model"),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "only one rank would have the weights"),
    ],
)
def test_launches_that_would_go_wrong_later_are_refused_in_one_line(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        check_launch(environment, optim="adamw_torch_fused")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_optimizers_whose_states_do_not_shard_are_refused_under_fsdp2(optim):
    check_launch({}, optim=optim)
    with pytest.raises(UserError, match=f"train.optim = '{optim}': bitsandbytes cannot shard its states"):
        check_launch(FSDP2, optim=optim)


@pytest.mark.slow
def test_a_run_under_context_parallelism_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(UserError, match="context parallelism is not supported"):
        train(write_setting(tmp_path), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("num_planned", "num_ranks"), [(5, 2), (4, 2), (1, 4), (0, 2), (7, 1)])
def test_every_rank_validates_as_many_rows_and_each_counts_once(num_planned, num_ranks):
    planned = [Pack(index=i, episodes=()) for i in range(num_planned)]
    shares = [share_rows(planned, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = sorted(pack.index for share in shares for pack, counts in share if counts)
    assert counted == list(range(num_planned))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"log_every_steps": 10, "checkpoint_every_steps": 25}, "not a multiple of log_every_steps"),
        ({"packs_per_step": 8, "packs_per_batch": 3}, "not a multiple of packs_per_batch"),
        ({"num_steps": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TrainSettings(**{"num_steps": 5, **wrong})


@pytest.mark.slow
def test_a_non_finite_loss_stops_before_the_update_and_names_the_episode(tmp_path, monkeypatch):
    config = write_setting(tmp_path, num_steps=4, packs_per_batch=1)
    steps = {"batches": 0}
    original = trainer.row_loss
    bad: list[int] = []

    def poisoned(model, batch):
        scored = original(model, batch)
        if torch.is_grad_enabled():
            steps["batches"] += 1
            if steps["batches"] == 19:  # the third batch of step 3
                bad.extend(batch.episodes)
                return replace(scored, loss=scored.loss * float("nan"), nll_A=scored.nll_A * float("nan"))
        return scored

    monkeypatch.setattr(trainer, "row_loss", poisoned)
    with pytest.raises(UserError, match=r"step 3: .* weights were not updated") as caught:
        train(config, out=tmp_path / "run")
    assert f"episodes {bad} have a non-finite loss" in str(caught.value)
    # What was saved before is whole, and the run goes on from there once the cause is gone.
    assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints.all()] == [2]
    monkeypatch.setattr(trainer, "row_loss", original)
    train(config, out=tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.slow
def test_a_transformers_that_divides_gradients_once_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    config = write_setting(tmp_path)
    with pytest.raises(UserError, match=r"^transformers \S+: divides gradients once more; install 5\.23$"):
        train(config, out=tmp_path / "run")


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(tmp_path):
    config = write_setting(tmp_path, num_steps=2, report_to=["tensorboard"])
    run = train(config, out=tmp_path / "run")
    about = json.loads((run.folder / "run.json").read_text())
    assert about["finished"] is True
    assert set(about["tasks"]) == {"animals", "beasts", "colours"}
    assert about["packages"]["torch"] == torch.__version__
    assert about["plan"]["answers"] > 0
    assert 0 < about["plan"]["fill"] <= 1
    assert len(about["held_out"]) == 3
    assert list((run.folder).rglob("events.out.tfevents.*"))
    records = read_metrics(run.folder)
    losses = [r for r in records if "loss" in r]
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens", "answers", "loss_by_shot/0"} <= set(losses[0])
    assert {"eval_loss", "eval_loss/animals"} <= set(next(r for r in records if "eval_loss" in r))
    assert sum(r["tokens"] for r in losses) == about["plan"]["tokens"]
    assert not list((run.folder / "model").glob("*.bin"))
    assert not list(run.folder.rglob("training_args.bin"))


def test_rows_are_padded_for_compiled_layers_and_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert row_multiple(4096, device=cpu, compiled=False) == 1
    assert row_multiple(4096, device=gpu, compiled=False) == 64
    assert row_multiple(4096, device=cpu, compiled=True) == 4096


def test_ranks_agree_on_what_saves_most_memory():
    class TwoRanks:
        device = torch.device("cpu")

        def __init__(self, *other: int) -> None:
            self.other = torch.tensor([other])

        def gather(self, mine):
            return torch.cat([mine, self.other])

    assert agree_on(Recompute(3), accelerator=TwoRanks(5, 0, 0, 0)) == Recompute(5)
    assert agree_on(Recompute(5), accelerator=TwoRanks(3, 0, 0, 0)) == Recompute(5)
    whole = Recompute(32, keep_attention=False)
    assert agree_on(Recompute(5), accelerator=TwoRanks(32, 1, 0, 0)) == whole
    assert agree_on(whole, accelerator=TwoRanks(32, 0, 0, 0)) == whole
    offloaded = Recompute(32, keep_attention=False, offload=True)
    assert agree_on(whole, accelerator=TwoRanks(32, 1, 1, 0)) == offloaded
    assert agree_on(offloaded, accelerator=TwoRanks(32, 1, 1, 1)) == replace(offloaded, tiles=True)


@pytest.mark.slow
def test_kernels_are_chosen_for_the_longest_row_of_training(tmp_path, monkeypatch):
    config = write_setting(tmp_path, num_steps=2, packs_per_batch=2)
    told = []
    original = trainer.row_attention

    def note(model, text, **options):
        told.append(options)
        return original(model, text, **options)

    monkeypatch.setattr(trainer, "row_attention", note)
    train(config, out=tmp_path / "run")
    assert told[0] == {"longest": 160, "row_tokens": 320}  # two packs of 160


@pytest.mark.slow
def test_a_run_with_recomputed_layers_logs_its_flops_and_says_what_it_took(tmp_path):
    config = write_setting(tmp_path, num_steps=4)
    train(config, out=tmp_path / "plain")
    for setting in ("selective", "full"):
        wasteful = config.model_copy(update={"train": config.train.model_copy(update={"recompute": setting})})
        train(wasteful, out=tmp_path / setting)
    names = ("plain", "selective", "full")
    plain, *recomputed = ([r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in names)
    assert recomputed == [pytest.approx(plain, rel=1e-5)] * 2
    said = [json.loads((tmp_path / name / "run.json").read_text()) for name in names]
    used = [(about["recomputed_layers"], about["attention_recomputed"]) for about in said]
    assert used == [(0, False), (3, False), (3, True)]
    assert {about["flash_attention"] for about in said} == {None}
    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["model_flops_per_s"] > 0 and "mfu" not in r for r in lines if "loss" in r)
    about = json.loads((tmp_path / "plain" / "run.json").read_text())
    assert about["wall_s"] > 0
    assert about["peak_bytes"] is None or about["peak_bytes"] > 10**8  # torch alone takes that
    wrong = config.model_copy(update={"train": config.train.model_copy(update={"recompute": 9})})
    with pytest.raises(UserError, match="recompute = 9: the model has 3 layers"):
        train(wrong, out=tmp_path / "wrong")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can have its layers' inputs in the host's memory")
@pytest.mark.parametrize("setting", ["offload", "tiled"])
def test_layers_inputs_cannot_leave_a_cpu_for_the_hosts_memory(setting, tmp_path):
    config = write_setting(tmp_path, recompute=setting)
    with pytest.raises(UserError, match=rf"train\.recompute = '{setting}': needs a GPU, .*; set 'full' or 'auto'"):
        train(config, out=tmp_path / "run")


@pytest.mark.slow
def test_a_run_folder_that_is_not_empty_is_never_overwritten(tmp_path):
    config = write_setting(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty; name another"):
        train(config, out=tmp_path / "run")
    with pytest.raises(UserError, match="no run was started there"):
        train(config, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory\nCUDA kernel errors", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_memory_that_cuda_or_a_library_lacks_is_told_like_that_which_torch_lacks(tmp_path, words):
    class Full(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise RuntimeError(words)

    config = write_setting(tmp_path, num_steps=1)
    with pytest.raises(OutOfMemoryError, match=r"^step 2: the GPU is out of memory, with rows") as refused:
        train(config, out=tmp_path / "run", callbacks=lambda _: [Full()])
    assert refused.value.__cause__.args == (words,)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_weights_and_optimizer_are_free_at_the_end_of_a_training_without_garbage_collection(tmp_path, lora):
    """A callback held the trainer that held it: both stayed until Python came to collect garbage."""
    kept: list[weakref.ref] = []

    class Watching(TrainerCallback):
        def on_train_begin(self, *_, model, optimizer, **__):
            kept.extend(map(weakref.ref, (model, optimizer)))

    config = write_setting(tmp_path, num_steps=2, lora=lora)
    gc.collect()
    gc.disable()
    try:
        train(config, out=tmp_path / "run", callbacks=lambda _: [Watching()])
        alive = [type(thing()).__name__ for thing in kept if thing() is not None]
    finally:
        gc.enable()
    assert len(kept) == 2
    assert alive == []


@pytest.mark.slow
def test_weights_and_optimizer_of_a_training_that_diverged_are_free_as_well(tmp_path):
    """A comparison goes on after a trial that diverged, beside which the next model would not fit."""
    kept: list[weakref.ref] = []

    class Watching(TrainerCallback):
        def on_train_begin(self, *_, model, optimizer, **__):
            kept.extend(map(weakref.ref, (model, optimizer)))

    config = write_setting(tmp_path, num_steps=3, learning_rate=1e38)
    gc.collect()
    gc.disable()
    told = ""
    try:
        try:
            train(config, out=tmp_path / "run", callbacks=lambda _: [Watching()])
        except NonFiniteError as error:
            told = str(error)
        alive = [type(thing()).__name__ for thing in kept if thing() is not None]
    finally:
        gc.enable()
    assert told.startswith("step 2: loss nan, gradient norm nan; ")
    assert len(kept) == 2
    assert alive == []


@pytest.mark.slow
def test_a_model_that_its_last_update_spoilt_is_refused_in_one_line(tmp_path):
    """No step after it saw the loss; the table of held-out losses ended in a traceback."""
    config = write_setting(tmp_path, num_steps=1, learning_rate=1e38)
    with pytest.raises(NonFiniteError) as refused:
        train(config, out=tmp_path / "run")
    told = str(refused.value)
    assert told.startswith(f"{tmp_path / 'run' / 'model'}: gives ")
    assert told.endswith(
        " held-out episodes no finite loss; the last update spoilt it; start a new run with a lower"
        " train.learning_rate, or model.precision = 'fp32'"
    )
    assert RunFolder(tmp_path / "run").read_state().finished is False
