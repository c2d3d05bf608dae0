"""Training and asking 7B-shaped models on several GPUs of one host: what runs, how fast, in how much memory.

    python benchmarks/gpu_many.py --out DIR [--gpus 1,2,4] [--models mistral-7b,llama-3-8b,gemma-7b]
                                  [--mode lora-ddp,full-fsdp2] [--tokens 8192,32768] [--minutes 5]
                                  [--recompute auto|none|selective|full]
    python benchmarks/gpu_many.py --table DIR

Random weights, made on the GPUs. lora-ddp: LoRA of rank 16 on all projections, a frozen base in bf16, DDP. full-fsdp2:
all weights in float32, AdamW, FSDP2. Both by the library's own trainer (manyicl.training) in the processes that
`accelerate launch` would start, layers compiled (--no-compile: not), "auto" or all layers recomputed. A step has
--packs rows of up to 8,192 tokens, or half as many longer ones, over all GPUs, so that any number of GPUs trains the
same rows; each row is one filled episode. After one step that is not counted, --steps are timed, from the end of one to
the end of the next. The most important rows come first, and launches that do not share a GPU run side by side. Each
result is a line of DIR/rows.jsonl as soon as it is known, so that a run that is cut keeps what it has; at the end of
--minutes everything is ended, and the jobs that were not done are named.

Jobs of a launch:
    ceiling      a bf16 product on each GPU, for a tenth of a second and held for six (as in gpu_7b.py)
    same         a small model in float32, six steps: the losses of any number of GPUs
    row:TOKENS   tokens/s, peak memory
    save:TOKENS  the same, then the seconds of a checkpoint and of a resume (from the start of training to the first
                 step, with a model on the GPU already); of full fine-tuning only with --save-full, which writes 87 GB
    mixed:TOKENS rows of mixed lengths, each timed alone: the share of the ranks' time that goes into waiting for the
                 slowest, as the library hands rows out, and in the plan's order
    eval:TOKENS  draws shared out over the ranks as `manyicl eval` does: queries/s, encoding the shots included
    stop         the small run, stopped after three steps; resume:N goes on with it on another number of GPUs than N

--table prints rows.jsonl with the ratios to one GPU and the predicted peaks (on any machine: the prediction needs no
GPU). For FSDP2 it is manyicl.footprint's with weights, gradients and moments shared by the GPUs, and three units whole,
as train.recompute = "auto" counts; `manyicl plan` itself predicts one GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
# Launches that import while others run.
AHEAD = 2


@dataclass
class Launch:
    """Processes that do jobs together. devices: which GPUs; processes: once they are started."""

    mode: str
    shape: str
    gpus: int
    jobs: tuple[str, ...]
    devices: tuple[int, ...] = ()
    processes: list = field(default_factory=list)
    went: bool = False
    ended: bool = False
    go: Path | None = None

    def describe(self) -> str:
        return f"{self.mode} {self.shape} on {self.gpus}: {' '.join(self.jobs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for rows.jsonl, logs and checkpoints")
    parser.add_argument("--gpus", default="1,2,4")
    parser.add_argument("--models", default="mistral-7b,llama-3-8b,gemma-7b")
    parser.add_argument("--mode", default="lora-ddp,full-fsdp2")
    parser.add_argument("--tokens", default="8192,32768")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--packs", type=int, default=8, help="an optimizer step, over all GPUs")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that are timed")
    parser.add_argument("--layers", type=int, help="layers of shallower models, for a smoke test")
    parser.add_argument("--small-shape", default="llama-1b", help="of the run in float32")
    parser.add_argument("--save-full", action="store_true", help="a checkpoint of full fine-tuning too, at the end")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--recompute", help="auto, none, selective or full; default: see many_ranks.py")
    parser.add_argument("--table", type=Path, help="print what a folder holds, and nothing else")
    options = parser.parse_args()
    if options.table:
        from many_table import print_table  # it needs the library, which this process does without

        print_table(options.table)
        return
    if options.out is None:
        parser.error("--out is missing")
    launches = plan(options)
    place(launches)
    run(launches, options)


def plan(options):
    """Return the launches, the most important first."""
    gpus = sorted(int(n) for n in options.gpus.split(","))
    tokens = sorted(int(t) for t in options.tokens.split(","))
    modes, models = options.mode.split(","), options.models.split(",")
    most, first = gpus[-1], models[0]
    rows = tuple(f"row:{t}" for t in tokens)
    saved = (f"save:{tokens[0]}", *rows[1:])
    asked = f"eval:{tokens[0] // 2}"
    launches = []
    if "lora-ddp" in modes:
        for n in reversed(gpus[:-1]):  # side by side, so each length for itself
            launches += [Launch("lora-ddp", first, n, ("same", saved[0], *([asked] if n == 1 else [])))]
            launches += [Launch("lora-ddp", first, n, (row,)) for row in rows[1:] if n == 1]
        more = ("stop", asked, f"mixed:{tokens[-1] // 2}")
        launches += [Launch("lora-ddp", first, most, ("ceiling", "same", *saved, *more))]
    if "full-fsdp2" in modes:
        ceiling = () if "lora-ddp" in modes else ("ceiling",)
        launches += [Launch("full-fsdp2", first, most, (*ceiling, "same", *rows, "stop"))]
    # A checkpoint of FSDP2's is read by FSDP2 alone, so not by one process.
    launches += [Launch(m, first, most // 2, (f"resume:{most}",)) for m in modes if most // 2 > (m == "full-fsdp2")]
    launches += [Launch(mode, model, most, rows) for model in models[1:] for mode in modes]
    if options.save_full and "full-fsdp2" in modes:
        launches += [Launch("full-fsdp2", first, most, (f"save:{tokens[0]}",))]
    return launches


def place(launches) -> None:
    """Give each launch its GPUs: the next free ones after those of the launch before it, or the first."""
    total, at = max(launch.gpus for launch in launches), 0
    for launch in launches:
        at = 0 if at + launch.gpus > total else at
        launch.devices = tuple(range(at, at + launch.gpus))
        at += launch.gpus


def run(launches, options) -> None:
    """Run the launches, each once those before it have left its GPUs; end all at the deadline."""
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * options.minutes
    while not all(launch.ended for launch in launches) and time.time() < deadline:
        for number, launch in enumerate(launches):
            is_blocked = any(
                not other.ended and set(other.devices) & set(launch.devices) for other in launches[:number]
            )
            waiting = sum(bool(other.processes) and not other.went for other in launches)
            if not launch.processes and (not is_blocked or waiting < AHEAD):
                start(launch, number, options, deadline=deadline)
            if not launch.went and not is_blocked:
                launch.go.touch()
                launch.went = True
                print(f"{time.strftime('%H:%M:%S')} {launch.describe()} (GPUs {launch.devices})", flush=True)
            if launch.went and not launch.ended:
                watch(launch, number, options)
        time.sleep(0.1)
    for launch in launches:
        if not launch.ended:
            end(launch)
            print(f"cut or left out for want of time: {launch.describe()}", flush=True)


def start(launch, number, options, *, deadline) -> None:
    """Start a launch's processes, which import everything and wait."""
    launch.go = options.out / f".go-{number}"
    launch.go.unlink(missing_ok=True)
    (options.out / "logs").mkdir(exist_ok=True)
    script = [sys.executable, str(ROOT / "benchmarks" / "many_ranks.py")]
    script += ["--mode", launch.mode, "--shape", launch.shape, "--jobs", ",".join(launch.jobs)]
    script += ["--small-shape", options.small_shape, "--packs", str(options.packs), "--steps", str(options.steps)]
    script += ["--out", str(options.out), "--go", str(launch.go), "--deadline", str(deadline)]
    script += ["--layers", str(options.layers)] if options.layers else []
    script += [] if options.no_compile else ["--compile"]
    script += ["--recompute", options.recompute] if options.recompute else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(launch.gpus):
        environment = {**os.environ, **say_launch(launch, rank, port=port)}
        with (options.out / "logs" / f"{number}-{rank}.txt").open("w") as log:
            launch.processes.append(
                subprocess.Popen(script, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )


def say_launch(launch, rank, *, port):
    """Return the variables that `accelerate launch` would set; FSDP2's as recipes/accelerate/fsdp2.yaml says."""
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ",".join(map(str, launch.devices))}
    variables |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    if launch.gpus > 1:
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(launch.gpus), "LOCAL_RANK": str(rank)}
        variables |= {"LOCAL_WORLD_SIZE": str(launch.gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launch.mode == "full-fsdp2" and launch.gpus > 1:
        variables["ACCELERATE_USE_FSDP"] = "true"
        for line in RECIPE.read_text().splitlines():
            if line.startswith("  fsdp_"):
                name, value = line.split("#")[0].split(":")
                variables[name.strip().upper()] = value.strip()
    return variables


def watch(launch, number, options) -> None:
    """Note that a launch has ended; where one of its processes fails, the others would wait for it for ever."""
    codes = [process.poll() for process in launch.processes]
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        end(launch)
        tail = (options.out / "logs" / f"{number}-{failed[0]}.txt").read_text()[-1500:]
        found = {"job": "launch", "mode": launch.mode, "shape": launch.shape, "gpus": launch.gpus, "failed": tail}
        with (options.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps({**found, "jobs": launch.jobs}) + "\n")
        print(f"{launch.describe()}: process {failed[0]} failed: {tail[-300:]}", flush=True)
    launch.ended = bool(failed) or None not in codes


def end(launch) -> None:
    for process in launch.processes:
        process.kill()
    for process in launch.processes:
        process.wait()


if __name__ == "__main__":
    main()
