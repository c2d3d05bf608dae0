"""The whole path in minutes, from nothing: generate tasks, train a tiny model on them, and print its shot curve.

A stand-in until a pretrained seed model ships with the package. Each task asks for the animal at one place of a
sentence, and its instruction is left out on purpose: only the shots tell which place is meant. Animals may repeat, so
one shot does not always tell, and the curve shows how many examples the model needs. Nothing is scripted.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyicl.config import RunConfig, TaskSettings
from manyicl.display import curve_plot, evaluation_table, held_out_table, plan_table
from manyicl.episodes import EpisodeSettings
from manyicl.errors import UserError
from manyicl.evaluation import Evaluation, evaluate
from manyicl.files import write_atomically
from manyicl.models import ModelSettings
from manyicl.progress import reporting
from manyicl.runs import prepare_run, train
from manyicl.tasks import load_tasks
from manyicl.templates import TemplateSettings
from manyicl.training import TrainSettings

ANIMALS = ("fox", "owl", "cat", "dog", "hen", "pig")
VERBS = ("sees", "follows", "helps", "meets")
PLACES = ("first", "second", "third")
TOKEN_BUDGET = 512
TRAIN_ROWS, TEST_ROWS = 2000, 200


def write_tasks(folder: Path, *, seed: int) -> None:
    """Write one task for each place of the sentence, as an ordinary folder of task files."""
    for number, place in enumerate(PLACES):
        rng = np.random.default_rng([seed, number])
        rows: dict[str, dict[str, str]] = {}
        while len(rows) < TRAIN_ROWS + TEST_ROWS:
            animals, verbs = rng.choice(ANIMALS, size=3), rng.choice(VERBS, size=2)
            text = f"{animals[0]} {verbs[0]} {animals[1]} {verbs[1]} {animals[2]}"
            split = "test" if len(rows) < TEST_ROWS else "train"
            rows.setdefault(text, {"input": text, "answer": str(animals[number]), "split": split})
        lines = "".join(json.dumps(row) + "\n" for row in rows.values())
        write_atomically(folder / f"{place}_animal.jsonl", lines)
        about = {"family": "classification", "instruction": f"Name the {place} animal.", "labels": sorted(ANIMALS)}
        write_atomically(folder / f"{place}_animal.task.json", json.dumps(about) + "\n")


def write_model(folder: Path, *, seed: int) -> None:
    """Write a tokenizer trained on the generated sentences, and a tiny Llama with random weights."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = " ".join((*ANIMALS, *VERBS))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"Input: {words}\nAnswer:\n{word}\n\n" for word in ANIMALS * 20], trainer)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def demo_config(folder: Path, *, seed: int, num_steps: int) -> RunConfig:
    """Return the demo's recipe."""
    return RunConfig(
        seed=seed,
        tasks=TaskSettings(folder=str(folder / "tasks")),
        model=ModelSettings(path=str(folder / "start"), precision="fp32"),
        template=TemplateSettings(input="{input} ->\n", instruction=False),
        episodes=EpisodeSettings(token_budget=TOKEN_BUDGET),
        train=TrainSettings(
            num_steps=num_steps,
            packs_per_step=16,
            packs_per_batch=16,
            learning_rate=3e-3,
            warmup_steps=20,
            beta2=0.95,
            log_every_steps=10,
            checkpoint_every_steps=100,
            validation_tokens=4096,
        ),
    )


def run_demo(
    *, out: Path | None = None, seed: int = 0, num_steps: int = 300, queries: int = 100, console: Console
) -> Evaluation:
    """Run the demo into `out`; return the curves that it prints.

    Raises:
        UserError: `out` exists.
    """
    folder = out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists():
        raise UserError(f"--out {folder}: exists already; name a new folder")
    started = time.monotonic()
    write_tasks(folder / "tasks", seed=seed)
    write_model(folder / "start", seed=seed)
    config = demo_config(folder, seed=seed, num_steps=num_steps)
    tasks = load_tasks(folder / "tasks")
    console.print("Three tasks share their inputs and labels; only the shots tell which is meant.")
    console.print(plan_table(prepare_run(config)))
    run = train(config, out=folder / "run", console=console)
    console.print(held_out_table(run.held_out))
    with reporting(console) as report:
        result = evaluate(
            str(run.folder), tasks, shots=(0, 1, 2, 4, 8, 16), draws=5, queries=queries, seed=seed, report=report
        )
    result.save(folder / "curve.json")
    console.print(evaluation_table(result))
    console.print(curve_plot(result, colour=console.is_terminal))
    minutes = (time.monotonic() - started) / 60
    console.print(
        f"{minutes:.1f} minutes. The run is in {folder / 'run'}; ask it:\n"
        f"  echo 'owl sees fox helps cat' | manyicl ask {run.folder} --tasks {folder / 'tasks'} --task second_animal",
        highlight=False,
    )
    return result
