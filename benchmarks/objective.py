"""All answers as targets against the last alone: supervised answers a second, and steps to a given held-out loss.

    python benchmarks/objective.py [--tokens 1024,4096] [--seconds-only] [--steps 200] [--seeds 0,1,2] [--json OUT]

Speed: steps (forward and backward of one filled row) of one model on the same episodes, targets = all and = last in
turn: a last-target step makes fewer logits, and supervises one answer. The first length is MetaICL's own setting, 16
shots and a query in 1,024 tokens; the second is a filled row. Course: the packaged seed model, trained on tasks of the
embedded world by both objectives, same packs, seed and schedule; the loss is that of validation rows on all answers for
both, and each arm's first step at which it is no higher than the best that last-target reaches is printed. One table of
one model on one kind of task: it says nothing of others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, ratios, spread, time_in_turn, write_json

from manyicl.demo.tasks import KINDS, iter_tasks, write_tasks
from manyicl.episodes.batch import BatchMaker
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import load_model
from manyicl.models.loss import row_loss
from manyicl.training.arguments import training_arguments
from manyicl.training.metrics import MetricsLog
from manyicl.training.preparation import largest_row, plan_validation, prepare_run
from manyicl.training.recipe import make_config
from manyicl.training.recompute.layers import Recompute, prepared_layers
from manyicl.training.run_folder import RunFolder
from manyicl.training.trainer import AnswerTrainer, LastStepCallback

META_ICL_EXAMPLES = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="", choices=("", *SHAPES), help="small on a CPU, llama-1b on a GPU")
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds-only", action="store_true", help="only the speed")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--budget", type=int, default=1024, help="tokens of an episode in training")
    parser.add_argument("--num-tasks", type=int, default=20)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.shape = options.shape or ("llama-1b" if device.type == "cuda" else "small")
    results = {"speed": [], "course": []}
    for number, num_tokens in enumerate(int(t) for t in options.tokens.split(",")):
        results["speed"].append(compare_speed(options, num_tokens, metaicl=number == 0, device=device))
        print(describe_speed(results["speed"][-1]), flush=True)
        write_json(options.json, results)
    for seed in [] if options.seconds_only else [int(s) for s in options.seeds.split(",")]:
        results["course"].append(compare_course(options, seed))
        print(describe_course(results["course"][-1]), flush=True)
        write_json(options.json, results)


def compare_speed(options, num_tokens, *, metaicl, device):
    """Time steps of both objectives on one row."""
    config = SHAPES[options.shape]()
    model = make_model(config, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    share = 3 * META_ICL_EXAMPLES / num_tokens if metaicl else 0.1
    episodes = make_episodes(num_tokens, episode_tokens=num_tokens, target_share=share, vocab_size=config.vocab_size)
    batches = {targets: make_row(episodes, targets=targets).to(device) for targets in ("all", "last")}

    def step(batch):
        model.zero_grad(set_to_none=True)
        with segment_attention(model), prepared_layers(model, Recompute(0), compiled=False):
            row_loss(model, batch).loss.backward()

    sides = {targets: lambda batch=batch: step(batch) for targets, batch in batches.items()}
    seconds = time_in_turn(sides, repeats=options.repeats, device=device)
    answers = {targets: len(batch.answer_shots_A) for targets, batch in batches.items()}
    return {
        "tokens": num_tokens,
        "answers": answers,
        "time_s": {targets: spread(values) for targets, values in seconds.items()},
        "answers_per_s": {t: answers[t] / spread(values)["median"] for t, values in seconds.items()},
        "step_time_ratio": ratios(seconds["last"], seconds["all"]),
    }


def compare_course(options, seed):
    """Train the seed model by both objectives and return their validation losses by step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = iter_tasks(KINDS, seed=seed, pool="open")
        tasks = [next(kinds) for _ in range(options.num_tasks)]
        write_tasks(folder / "tasks", tasks, num_train=72, num_test=20, seed=seed)
        courses = {t: train_by(t, folder, options, seed=seed) for t in ("all", "last")}
    goal = min(courses["last"].values())
    first = {t: next((s for s, loss in course.items() if loss <= goal), None) for t, course in courses.items()}
    return {"seed": seed, "courses": courses, "goal": goal, "first_step": first}


def train_by(targets, folder, options, *, seed):
    """Return {step: validation loss on all answers} of a run."""
    every = max(1, options.steps // 20)
    config = make_config(
        {
            "seed": seed,
            "tasks": {"folder": str(folder / "tasks")},
            "model": {"path": "seed", "precision": "fp32"},
            "template": {"input": "{input} ->\n"},
            "episodes": {"token_budget": options.budget, "targets": targets},
            "train": {
                "num_steps": options.steps,
                "packs_per_step": 2,
                "packs_per_batch": 2,
                "learning_rate": 1e-3,
                "warmup_steps": max(1, options.steps // 20),
                "log_every_steps": every,
                "checkpoint_every_steps": every,
            },
        },
        source="objective",
    )
    prepared = prepare_run(config)
    # Both are judged on all answers of the same episodes.
    maker = BatchMaker(prepared.tasks, targets="all", split="validation")
    planned = plan_validation(
        maker, settings=config.episodes, num_tokens=options.budget, pack_tokens=config.pack_tokens, seed=seed
    )
    arguments = training_arguments(
        config.train,
        folder=RunFolder(folder / targets).checkpoints.path,
        precision="fp32",
        seed=seed,
        validated=True,
        num_ranks=1,
    )
    torch.manual_seed(seed)
    metrics = MetricsLog(folder / targets / "metrics.jsonl")
    trainer = AnswerTrainer(
        load_model(config.model, trainable=True).to(arguments.device),
        args=arguments,
        recipe=config,
        packs=prepared.packs,
        row=largest_row(prepared.packs, config=config),
        validation=(maker, planned),
        metrics=metrics,
        callbacks=[LastStepCallback()],
    )
    trainer.train_packs(None)
    return {record["step"]: record["eval_loss"] for record in metrics.read() if "eval_loss" in record}


def describe_speed(result):
    """Return a few lines for a person."""
    lines = [f"{result['tokens']:,} tokens, {result['answers']['all']} answers:"]
    for targets in ("all", "last"):
        time_s = result["time_s"][targets]
        lines.append(
            f"  {targets:4} {result['answers_per_s'][targets]:>9,.1f} answers/s, {time_s['median']:.3f} s a step"
            f" ({time_s['min']:.3f} to {time_s['max']:.3f})"
        )
    ratio = result["answers_per_s"]["all"] / result["answers_per_s"]["last"]
    step = result["step_time_ratio"]
    lines.append(
        f"  {ratio:.1f} times the supervised answers a second; a step takes {step['ratio']:.2f} times as long"
        f" ({step['min']:.2f} to {step['max']:.2f})"
    )
    return "\n".join(lines)


def describe_course(result):
    """Return a line for a person."""
    first = {t: f"at step {s}" if s is not None else "never" for t, s in result["first_step"].items()}
    return (
        f"seed {result['seed']}: validation loss {result['goal']:.4f}, the best of last-target, is reached by"
        f" all-targets {first['all']}, by last-target {first['last']}"
    )


if __name__ == "__main__":
    main()
