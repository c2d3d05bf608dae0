"""The whole path in minutes, from nothing: generate tasks, train a tiny model on them, and print its shot curve.

A stand-in until a pretrained seed model ships with the package. Eight tasks share their sentences and ask for the same
thing, the topic, but each in words of its own; their instruction is left out on purpose. So without shots nobody can
know which word is wanted; one shot narrows it down, as words are shared between tasks; a few shots tell. Nothing is
scripted: another seed gives other numbers.
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
from manyicl.evaluation import evaluate
from manyicl.files import write_atomically
from manyicl.models import ModelSettings
from manyicl.progress import reporting
from manyicl.results import Evaluation
from manyicl.runs import prepare_run, train
from manyicl.tasks import load_tasks
from manyicl.templates import TemplateSettings
from manyicl.training import TrainSettings

# topic -> words that give it away in a sentence.
CLUES = {
    "animal": ["fox", "owl", "cat", "dog", "hen", "pig", "duck", "bear", "wolf", "goat"],
    "food": ["bread", "soup", "rice", "cake", "plum", "bean", "pie", "stew", "corn", "nut"],
    "tool": ["saw", "axe", "drill", "rake", "hoe", "nail", "rope", "pump", "lamp", "clamp"],
    "weather": ["rain", "snow", "fog", "wind", "hail", "frost", "storm", "sun", "mist", "thaw"],
}
# topic -> the four words it is called by, and which two of a task's three bits choose among them.
NAMES = {
    "animal": (["beast", "creature", "fauna", "critter"], (0, 1)),
    "food": (["meal", "dish", "snack", "feast"], (1, 2)),
    "tool": (["device", "gear", "gadget", "utensil"], (0, 2)),
    "weather": (["sky", "climate", "season", "air"], (0, 1)),
}
OPENINGS = ("we know the", "there was a", "she drew a", "they like the", "he spoke of", "look at the")
ENDINGS = ("today", "again", "at home", "in the book", "last year", "by the gate", "twice", "too")
TOKEN_BUDGET = 256
TRAIN_ROWS, TEST_ROWS = 1000, 200


def write_tasks(folder: Path, *, seed: int) -> None:
    """Write the eight tasks as an ordinary folder of task files."""
    for task in range(8):
        rng = np.random.default_rng([seed, task])
        bits = (task & 1, task >> 1 & 1, task >> 2 & 1)
        rows: dict[str, dict[str, str]] = {}
        while len(rows) < TRAIN_ROWS + TEST_ROWS:
            topic = str(rng.choice(list(CLUES)))
            text = f"{rng.choice(OPENINGS)} {rng.choice(CLUES[topic])} {rng.choice(ENDINGS)}"
            names, (high, low) = NAMES[topic]
            split = "test" if len(rows) < TEST_ROWS else "train"
            rows.setdefault(text, {"input": text, "answer": names[2 * bits[high] + bits[low]], "split": split})
        name = f"topic_in_words_{task}"
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))
        about = {"family": "qa", "metric": "exact_match", "instruction": "Name the topic."}
        write_atomically(folder / f"{name}.task.json", json.dumps(about) + "\n")


def write_model(folder: Path, *, seed: int) -> None:
    """Write a tokenizer trained on the generated sentences, and a tiny Llama with random weights."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f"{opening} {clue} {ending}"
        for opening in OPENINGS
        for clues in CLUES.values()
        for clue in clues
        for ending in ENDINGS
    ]
    texts += [f"a ->\n{name}\n\n" for names, _ in NAMES.values() for name in names] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
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
            packs_per_step=32,
            packs_per_batch=32,
            learning_rate=8e-3,
            warmup_steps=20,
            beta2=0.95,
            log_every_steps=20,
            checkpoint_every_steps=100,
            validation_tokens=4096,
        ),
    )


def run_demo(
    *, out: Path | None = None, seed: int = 0, num_steps: int = 500, queries: int = 100, console: Console
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
    console.print(
        "Eight tasks ask for the topic of the same sentences, each in its own words; only the shots tell which."
    )
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
        f"  echo 'they like the plum today' | manyicl ask {run.folder}"
        f" --tasks {folder / 'tasks'} --task topic_in_words_3",
        highlight=False,
    )
    return result
