"""The training benchmarks run on tiny shapes: options parse, both sides agree, results are written."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.forked import ForkedPopen

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a benchmark's main and returns its JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_main(name: str, *options: str):
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--json", str(out)])
        __import__(name).main()
        return json.loads(out.read_text())["results"]

    return run_main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*on this CPU its weights are unpacked with wrong scales:UserWarning")
@pytest.mark.parametrize("mode", ["lora", "qlora", "full", "full-fp32"])
def test_gpu_7b_on_a_tiny_shape(run, mode):
    results = run(
        "gpu_7b", "--shapes", "tiny", "--modes", mode, "--tokens", "64", "--checkpointed", "auto,1", "--compile", "no"
    )
    assert results["ceilings"] == {"mfu": None, "mfu_held": None}
    assert [(row["checkpointed"], row["layers"], row["fits"]) for row in results["rows"]] == [
        (0, 2, True),
        (1, 2, True),
    ]
    assert all((row["predicted_gib"] is None) == (mode == "full") for row in results["rows"])


@pytest.mark.slow
def test_gpu_float8_checks_gradients_and_times_both_sides(run):
    options = ("--shape", "tiny", "--check-tokens", "64", "--tokens", "64:none,64:1", "--turn-tokens", "128")
    results = run("gpu_float8", *options, "--repeats", "1", "--no-compile")
    check = {row["kind"]: row["to_fp32"]["cosine"] for row in results["check"]}
    assert check["fp32"] > check["bf16"] > check["float8"] > 0.99
    assert [row["recomputed"] for row in results["rows"]] == [0, 1]
    assert all(row["float8"]["predicted_gib"] < row["bf16"]["predicted_gib"] for row in results["rows"])


def test_float8_quality_pairs_the_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import float8_quality

    for item, score in {"bf16:0": 0.5, "float8:0": 0.4, "bf16:1": 0.7, "float8:1": 0.8, "bf16:2": 0.9}.items():
        found = {"scores": {"agnews": score, "rte": score}, "nats": {"agnews": 1.0, "rte": 1.0}}
        content = {"item": item, **found, "train_s": 1.0, "eval_s": 1.0}
        (tmp_path / f"{item.replace(':', '-')}.json").write_text(json.dumps(content))
    float8_quality.report(SimpleNamespace(out=tmp_path, seeds=3))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scores"]["each"] == pytest.approx([-0.1, 0.1])  # the third seed has no pair yet
    assert "2 seeds: +0.0000 [-1.2706, +1.2706]" in capsys.readouterr().out  # Student's 12.706 * 0.1


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora", "--recompute", "1")], ids=["full", "lora"])
def test_joined_packs_are_the_same_step_in_fewer_passes(run, more):
    options = ("--shape", "tiny", "--tokens", "64", "--episodes", "2", "--packs", "4", "--joined", "1,2,4")
    one, two, all_packs = run("joined_packs", *options, "--repeats", "1", *more)["rows"]
    assert [row["row_tokens"] for row in (one, two, all_packs)] == [64, 128, 256]
    assert all_packs["flops"] == 4 * one["flops"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert (one["speedup"], one["mfu"], one["peak_bytes"]) == (None, None, None)
    assert all_packs["speedup"]["min"] == all_packs["speedup"]["ratio"]  # of one pair


@pytest.mark.slow
def test_objective_counts_answers_of_both_sides(run):
    speed = run("objective", "--shape", "tiny", "--tokens", "256", "--repeats", "1", "--seconds-only")["speed"]
    assert speed[0]["answers"] == {"all": 17, "last": 1}  # MetaICL's 16 shots and a query


def test_exponents_are_those_of_the_powers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cost_growth

    runs = {n: [{"seconds": 1e-6 * n**2, "peak_bytes": 1000 * n}] for n in (1024, 2048, 4096)}
    exponents = cost_growth.summarise(runs)["exponents"]
    assert exponents == pytest.approx({"time": 2.0, "memory": 1.0})


def test_a_ratio_has_the_interval_that_its_pairs_ranks_give(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measuring import ratios

    found = [ratios([1.0] * n, [float(i) for i in range(1, n + 1)])["interval"] for n in (5, 6, 8, 9, 20)]
    # As in tables of the sign test: of 9 values the second and the eighth, of 20 the sixth and the fifteenth.
    assert found == [None, [1, 6], [1, 8], [2, 8], [6, 15]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("more", [(), ("--recompute",), ("--whole",)], ids=["kept", "recomputed", "whole"])
def test_trl_and_ours_begin_with_one_loss_and_trl_isolates_or_it_is_said(run, more):
    pytest.importorskip("trl")
    options = ("--shape", "tiny", "--tokens", "96", "--episode-tokens", "32", "--repeats", "1", "--no-memory")
    filled, packed = run("train_vs_trl", *options, *more)
    assert (filled["kind"], packed["kind"]) == ("filled", "packed")
    for result in (filled, packed):
        for losses in ("first_losses", "exact_losses"):
            assert result[losses][0] == pytest.approx(result[losses][1], rel=1e-4)
    assert packed["trl_isolates_packs"] is True
    assert packed["attention"]["trl"] == "sdpa, padding-free"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_each_sides_peak_is_that_of_a_process_of_its_own(run):
    pytest.importorskip("trl")
    (result,) = run("train_vs_trl", "--shape", "tiny", "--tokens", "64", "--episode-tokens", "32", "--repeats", "1")
    assert set(result["peak_bytes"]) == {"ours", "trl"}
    assert all(peak is None or peak > 0 for peak in result["peak_bytes"].values())


@pytest.mark.slow
def test_without_unsloth_it_is_said_and_ours_is_measured_alone(run, tmp_path, capsys):
    if importlib.util.find_spec("unsloth"):
        pytest.skip("unsloth is installed")
    options = ("--shape", "tiny", "--tokens", "96", "--episode-tokens", "32", "--repeats", "1", "--warmups", "0")
    results = run(
        "train_vs_unsloth", "--base", str(tmp_path / "base"), "--pairs", "auto:none", "--no-compile", *options
    )
    assert results["versions"] is None
    assert [(row["kind"], row["episodes"], set(row["tokens_per_s"])) for row in results["rows"]] == [
        ("filled", 1, {"ours"}),
        ("packed", 3, {"ours"}),
    ]
    assert "ours is measured alone" in capsys.readouterr().out


def test_a_row_for_unsloth_is_what_export_writes_and_padded_rows_hold_the_same_targets(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measuring import make_episodes, make_row
    from unsloth_side import UnslothSide

    from manyicl.training.export import as_columns, write_rows

    row = make_row(make_episodes(80, episode_tokens=32, target_share=0.1, vocab_size=512))
    write_rows(tmp_path / "row.parquet", iter([as_columns(row)]))
    side = UnslothSide()
    side.torch, side.device = torch, torch.device("cpu")
    assert side.read(path=str(tmp_path / "row.parquet"), padded=False) == {"num_tokens": 80, "episodes": 3}
    packed, padded = side.inputs, side.as_inputs(side.row, padded=True)
    assert packed["packed_seq_lengths"].tolist() == [32, 32, 16]
    assert packed["position_ids"][0, [31, 32, 79]].tolist() == [31, 0, 15]
    assert padded["input_ids"].shape == (3, 32)
    assert padded["attention_mask"].sum(1).tolist() == [32, 32, 16]
    # Episodes of 32 tokens have one answer of three tokens each (27 to 29), one of 16 tokens has none.
    for inputs in (packed, padded):
        assert inputs["num_items_in_batch"].item() == (inputs["labels"] != -100).sum().item() == 6
    assert padded["input_ids"][1, 27:30].tolist() == padded["labels"][1, 27:30].tolist()


def test_losses_that_differ_are_marked_and_the_ratio_is_of_the_medians(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_vs_unsloth

    def steps(*seconds, loss):
        return [
            {"seconds": s, "loss": loss, "gradient_norm": 1.0, "peak_bytes": None, "reserved_bytes": None}
            for s in seconds
        ]

    taken = {"ours": steps(1.0, 2.0, 3.0, loss=2.0), "unsloth": steps(3.0, 4.0, 5.0, loss=2.01)}
    found = train_vs_unsloth.summarise(taken, num_tokens=8)
    assert found["tokens_per_s"] == {"ours": 4.0, "unsloth": 2.0}
    assert found["speedup"]["ratio"] == 2.0
    assert found["losses_agree"] is False  # 0.5 % apart
    about = {"pair": "auto:none", "shape": "tiny", "mode": "lora", "kind": "filled", "tokens": 8, "episodes": 1}
    told = train_vs_unsloth.describe({**about, **found, "recomputed": 0, "unsloth_way": "one row"})
    assert "ours is 2.00 times as fast" in told
    assert "THE LOSSES DIFFER" in told


def test_an_error_in_unsloths_process_is_an_answer(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import unsloth_side

    answers = io.StringIO()
    side = SimpleNamespace(add=lambda left, right: {"sum": left + right})
    lines = ['{"do": "add", "left": 1, "right": 2}', '{"do": "add", "left": 1, "right": "2"}']
    unsloth_side.serve(side, lines, answers)
    good, bad = (json.loads(line) for line in answers.getvalue().splitlines())
    assert good == {"sum": 3}
    assert bad["error"].startswith("TypeError: unsupported operand")
    assert "Traceback" in capsys.readouterr().err


def test_launches_of_several_gpus_stand_side_by_side_the_most_important_first(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_many

    options = SimpleNamespace(
        gpus="1,2,4", tokens="8192,32768", mode="lora-ddp,full-fsdp2", models="mistral-7b,gemma-7b", save_full=False
    )
    launches = gpu_many.plan(options)
    gpu_many.place(launches)
    assert [(launch.mode, launch.shape, launch.devices) for launch in launches] == [
        ("lora-ddp", "mistral-7b", (0, 1)),
        ("lora-ddp", "mistral-7b", (2,)),
        ("lora-ddp", "mistral-7b", (3,)),
        ("lora-ddp", "mistral-7b", (0, 1, 2, 3)),
        ("full-fsdp2", "mistral-7b", (0, 1, 2, 3)),
        ("lora-ddp", "mistral-7b", (0, 1)),  # goes on with what four have begun
        ("full-fsdp2", "mistral-7b", (2, 3)),
        ("lora-ddp", "gemma-7b", (0, 1, 2, 3)),
        ("full-fsdp2", "gemma-7b", (0, 1, 2, 3)),
    ]


def test_time_spent_waiting_is_that_of_the_ranks_that_are_not_the_slowest(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from many_ranks import waiting_share

    # Rank 0 has 1 + 1 s, rank 1 has 3 + 1 s: of 8 s in all, 2 are spent waiting.
    assert waiting_share([1.0, 3.0, 1.0, 1.0], ranks=2, per_step=4) == pytest.approx(0.25)


@pytest.mark.slow
def test_gpu_many_on_two_processes_keeps_a_line_of_each_result(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_many

    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)
    options = ["--gpus", "1,2", "--models", "tiny", "--small-shape", "tiny", "--tokens", "256", "--mode", "lora-ddp"]
    monkeypatch.setattr(sys, "argv", ["gpu_many.py", "--out", str(tmp_path), *options, "--no-compile"])
    gpu_many.main()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    done = {(row["gpus"], row["job"]) for row in rows}
    assert len(rows) == len(done)
    assert done == {
        *((1, job) for job in ("same", "save", "eval", "resume")),
        *((2, job) for job in ("ceiling", "same", "save", "stop", "eval", "mixed")),
    }
    losses = {(row["gpus"], row["job"]): row["losses"] for row in rows if "losses" in row}
    for other in ((2, "same"), (1, "resume")):
        assert losses[other] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in losses[1, "same"]]
    monkeypatch.setattr(sys, "argv", ["gpu_many.py", "--table", str(tmp_path)])
    gpu_many.main()
    assert "float32, stopped on 2, resumed on 1" in capsys.readouterr().out


def test_episodes_too_short_for_an_answer_are_told_in_one_line(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measuring = import_module("measuring")
    episodes = measuring.make_episodes(64, episode_tokens=30, target_share=0.1, vocab_size=50)
    assert [len(episode.spans) for episode in episodes] == [1, 1, 0]
    assert measuring.make_row(episodes).num_tokens == 64
    with pytest.raises(SystemExit, match="episodes of 4 tokens or fewer hold no answer; make them longer, or fewer"):
        measuring.make_row(episodes[2:])
