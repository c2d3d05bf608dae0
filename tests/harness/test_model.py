"""lm-evaluation-harness through our engine: the scores, likelihoods and texts of its own `hf` model, to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.models.places import SEED_MODEL
from tests.conftest import ANIMALS, COLOURS

lm_eval = pytest.importorskip("lm_eval")


# Task -> the keys of its file beside those of its data. Each asks the model in another way.
TASKS = {
    # Shots drawn for each query: what its options share is all that is shared.
    "drawn": {"num_fewshot": 3},
    # The same shots for every query, and a description before them.
    "shared": {"num_fewshot": 4, "fewshot_config": {"sampler": "first_n"}, "description": "Which animal?\n\n"},
    "no_shots": {"num_fewshot": 0},
    "generated": {
        "output_type": "generate_until",
        "doc_to_target": "{{animals[label]}}",
        "doc_to_choice": None,
        "num_fewshot": 4,
        "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": [" the", "\n\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}} is a {{animals[label]}}",
        "doc_to_choice": None,
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def write_tasks(folder: Path, *, num_rows: int = 12) -> None:
    rows = [
        {"text": f"the {COLOURS[i % 4]} {ANIMALS[(i + i // 4) % 4]} {i}", "label": (i + i // 4) % 4, "animals": ANIMALS}
        for i in range(2 * num_rows)
    ]
    for split, part in (("train", rows[:num_rows]), ("test", rows[num_rows:])):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    for name, keys in TASKS.items():
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "fewshot_split": "train",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}\nIt is a",
            "doc_to_target": "label",
            "doc_to_choice": "animals",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            **keys,
        }
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / f"{name}.yaml").write_text(json.dumps(kept))


def ask(model: str, arguments: dict[str, object], folder: Path) -> dict[str, object]:
    """Return what the harness says of every task, with each document's responses."""
    from lm_eval.tasks import TaskManager

    import manyicl.harness.model  # noqa: F401  # registers the model

    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )


def compare(pretrained: Path, folder: Path) -> None:
    write_tasks(folder)
    arguments = {"pretrained": str(pretrained), "dtype": "float32"}
    ours, theirs = (ask(model, arguments, folder) for model in ("manyicl", "hf"))
    for name in TASKS:
        for metric, value in theirs["results"][name].items():
            given = ours["results"][name][metric]
            assert given == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (name, metric)
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert one["doc_id"] == other["doc_id"]
            for said, wanted in zip(one["resps"], other["resps"], strict=True):
                if name == "generated":
                    assert said == wanted
                elif name == "rolling":
                    assert said[0] == pytest.approx(wanted[0], abs=1e-3)
                else:
                    assert said[0][0] == pytest.approx(wanted[0][0], abs=1e-3)
                    assert said[0][1] == wanted[0][1]


@pytest.mark.slow
def test_the_harness_says_the_same_through_our_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    compare(SEED_MODEL, tmp_path)


@pytest.mark.slow
@pytest.mark.real_model
def test_the_harness_says_the_same_of_a_real_model(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    compare(smollm2, tmp_path)


@pytest.mark.slow
def test_shared_shots_go_through_the_model_once():
    from lm_eval.api.instance import Instance

    from manyicl.harness.model import ManyICL

    model = ManyICL(str(SEED_MODEL), dtype="float32", device="cpu")
    shots = "the red fox 1\nIt is a fox\n\n" * 40
    requests = [
        Instance("loglikelihood", {}, (f"{shots}the grey owl {i}\nIt is a", f" {animal}"), i)
        for i in range(8)
        for animal in ANIMALS
    ]
    assert len(model.loglikelihood(requests)) == 32
    num_shot_ids = len(model.tok_encode(shots))
    assert num_shot_ids > 200
    assert model.engine.count.num_prefix_tokens <= num_shot_ids + 10  # and not 32 times as many
    assert model.engine.count.num_query_tokens < num_shot_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, r"^dtype=float16: is unknown"),
        ({"device": "gpu"}, r"^device=gpu: cannot be used \(.+\); give cpu, cuda or cuda:N$"),
        ({"parallelise": True}, r"^parallelise=True: the model manyicl has no such argument; known: add_bos_token,"),
    ],
)
def test_an_argument_that_is_not_known_is_refused(arguments, message):
    from manyicl.harness.model import ManyICL

    with pytest.raises(UserError, match=message):
        ManyICL(str(SEED_MODEL), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pretraind": "seed"},
            r"^pretraind=seed: the model manyicl has no such argument; did you mean 'pretr",
        ),
        ({}, r"^pretrained: is missing; name a model, --model_args pretrained=MODEL_OR_RUN$"),
    ],
)
def test_a_model_that_is_not_named_is_one_line(arguments, message):
    from manyicl.harness.model import ManyICL

    with pytest.raises(UserError, match=message):
        ManyICL(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("device", [("--device", "cpu"), ()], ids=["cpu", "none named"])
def test_the_harness_command_line_knows_the_model(device, tmp_path):
    # Without --device the harness asks for cuda:0, also where there is no GPU.
    write_tasks(tmp_path, num_rows=4)
    asked = ["--model", "manyicl", "--model_args", f"pretrained={SEED_MODEL}", *device]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "manyicl.harness",
            "run",
            *asked,
            "--tasks",
            "no_shots",
            "--include_path",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert "|no_shots|" in done.stdout
    assert "|acc " in done.stdout
