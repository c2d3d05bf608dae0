"""One process of gpu_many.py: it trains, saves, resumes and asks random models together with the others of its launch.

gpu_many.py starts it with the variables that `accelerate launch` sets, and with --go: it imports everything, then waits
for that file, so that the launch before it can use the GPUs until the last moment. The jobs are done in order, and the
main process writes a line of JSON after each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from measuring import SHAPES, make_episodes, make_model, make_row, spread, synchronize
from torch import distributed
from torch.utils.data import Dataset
from transformers import TrainerCallback

from manyicl.distributed import Ranks
from manyicl.episodes import EpisodeSettings
from manyicl.episodes.batch import Divisors, join_row, pad_row
from manyicl.episodes.packing import pack_lengths
from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.models import LoraSettings, ModelSettings, add_adapter
from manyicl.models.attention import flash
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.costs import count_flops, shape_model
from manyicl.models.loss import row_loss
from manyicl.models.structure import decoder_layers
from manyicl.training.arguments import training_arguments
from manyicl.training.memory.footprint import Row
from manyicl.training.metrics import MetricsLog, measure_ceiling
from manyicl.training.preparation import row_multiple
from manyicl.training.ranks import balance_steps
from manyicl.training.recipe import RunConfig, TaskSettings, TrainSettings
from manyicl.training.recompute.layers import Recompute, prepared_layers, unwidened_inputs
from manyicl.training.run_folder import RunFolder
from manyicl.training.trainer import AnswerTrainer

GIB = 1 << 30
HELD_SECONDS = 6.0  # as in gpu_7b.py
TARGET_SHARE = 0.1
# Of the small run in float32, whose losses are compared between numbers of GPUs.
SMALL_TOKENS, SMALL_STEPS, STOPPED_STEP = 512, 6, 3
# Of evaluation: draws that are shared out, and queries behind each.
DRAWS, QUERIES, QUERY_TOKENS = 16, 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", required=True, choices=("lora-ddp", "full-fsdp2"))
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--small-shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--jobs", required=True, help="NAME or NAME:TOKENS, with commas")
    parser.add_argument(
        "--packs", type=int, required=True, help="an optimizer step, over all ranks, of the shortest row"
    )
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps that are timed")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", help="train.recompute; default: auto, but selective for long rows under FSDP2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--go", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="no job is begun after it (seconds since 1970)")
    options = parser.parse_args()
    while not options.go.exists():
        time.sleep(0.02)
    state = PartialState(cpu=not torch.cuda.is_available())
    if options.mode == "full-fsdp2" and not torch.cuda.is_available() and state.num_processes > 1:
        _call_cpus_gpus()
    bench = Bench(options, rank=state.process_index, world=state.num_processes)
    for job in options.jobs.split(","):
        bench.do(job)
    if state.num_processes > 1:
        distributed.barrier()
    os._exit(0)  # FSDP2's caches hold the group until the interpreter's end, which would then warn, or abort


def _call_cpus_gpus() -> None:
    """Let accelerate shard on CPUs, for a smoke test: it takes FSDP for a matter of GPUs."""
    original = PartialState.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


class Bench:
    """The jobs of a launch. rank, world: this process among the launch's."""

    def __init__(self, options, *, rank, world) -> None:
        self.options, self.rank, self.world = options, rank, world
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.config = SHAPES[options.shape]()
        if options.layers:
            self.config.num_hidden_layers = options.layers
        self.lora = LoraSettings() if options.mode == "lora-ddp" else None
        self.kind = {"mode": options.mode, "shape": options.shape, "gpus": world}

    def do(self, job) -> None:
        """Do one job and write what it found; a launch that is out of memory ends."""
        name, _, tokens = job.partition(":")
        if time.time() > self.options.deadline:
            self.write({"job": name, "left_out": job})
            return
        started = time.perf_counter()
        try:
            found = getattr(self, f"job_{name}")(*([int(tokens)] if tokens else []))
        except torch.OutOfMemoryError as error:
            self.write({"job": name, "out_of_memory": job, "rank": self.rank, "error": str(error)[:200]}, anyone=True)
            os._exit(1)
        self.write({"job": name, **found, "job_s": round(time.perf_counter() - started, 1)})

    def write(self, found, *, anyone=False) -> None:
        """Append a line to rows.jsonl, on the main process."""
        if self.rank and not anyone:
            return
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        line = json.dumps({**self.kind, "device": device, "torch": torch.__version__, "time": time.time(), **found})
        with (self.options.out / "rows.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def gather(self, value):
        """Return the value of each rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def job_ceiling(self):
        """Measure the ceilings of all GPUs at once, once a host: later launches read the line."""
        brief, held = measure_ceiling(self.device), measure_ceiling(self.device, seconds=HELD_SECONDS)
        return {"brief": self.gather(brief), "held": self.gather(held)}

    def job_row(self, tokens):
        """Time filled rows."""
        return self.time_row(tokens, saves=False)

    def job_save(self, tokens):
        """Time filled rows, a checkpoint and a resume."""
        return self.time_row(tokens, saves=True)

    def time_row(self, tokens, *, saves):
        """Train on filled rows as `manyicl train` does; see gpu_many.py for what is returned."""
        options = self.options
        per_step = self.packs_of(tokens)
        num_steps = 1 + options.steps
        packs = FilledPacks([[tokens]] * per_step * num_steps, per_step=per_step, vocab_size=self.config.vocab_size)
        folder = self.empty_folder(f"row-{options.mode}-{options.shape}-{self.world}-{tokens}")
        clock = StepClock(self.device)
        shape = shape_model(self.config, lora=self.lora)
        trainer = self.make_trainer(
            packs,
            folder=folder,
            num_steps=num_steps,
            precision="bf16",
            callbacks=[clock],
            tokens=tokens,
            compiled=options.compile,
        )
        trainer.saves = saves
        packs.order = balance_steps(packs, shape=shape, num_ranks=self.world, packs_per_batch=1)
        trainer.train_packs(None)
        seconds = clock.seconds[1:]
        flops = count_flops(shape, [tokens] * per_step, num_targets=packs.divisors[0].num_targets)
        found = {
            "tokens": tokens,
            "targets": packs.divisors[0].num_targets // per_step,
            "packs_per_step": per_step,
            "compiled": options.compile,
            "checkpointed": trainer.recompute.num_layers,
            "keeps_attention": trainer.attention.is_kept,
            "layers": self.config.num_hidden_layers,
            "flash": clock.flash,
            "first_step_s": round(clock.seconds[0], 2),
            "step_s": spread(seconds),
            "tokens_per_s": per_step * tokens / spread(seconds)["median"],
            "flops_per_s": flops / spread(seconds)["median"],
            "losses": losses_of(folder) if self.rank == 0 else [],
            "peak_gib": self.gather(clock.peak_gib()),
            "reserved_gib": self.gather(clock.peak_gib(reserved=True)),
        }
        if saves:
            found |= {"checkpoint_s": trainer.save_s, "checkpoint_bytes": size_of(RunFolder(folder).checkpoints.path)}
        self.let_go(trainer)
        if saves:
            found["resume_s"] = self.time_resume(folder, packs, num_steps=num_steps, tokens=tokens)
        return found

    def time_resume(self, folder, packs, *, num_steps, tokens):
        """Return the seconds from the start of training to its first step, on a model that is on the GPU already."""
        longer = FilledPacks(
            [[tokens]] * (len(packs) + packs.packs_per_step),
            per_step=packs.packs_per_step,
            vocab_size=self.config.vocab_size,
        )
        begun = Begun()
        trainer = self.make_trainer(
            longer, folder=folder, num_steps=num_steps + 1, precision="bf16", callbacks=[begun], tokens=tokens
        )
        checkpoint = RunFolder(folder).checkpoints.all()[-1][1]
        with suppress(HasBegunError):
            trainer.train_packs(checkpoint)
        seconds = begun.at - trainer.started_at
        self.let_go(trainer)
        self.remove(folder)
        return seconds

    def job_same(self):
        """Train a small model in float32 on packs of mixed lengths; its losses are those of any number of GPUs."""
        folder, _ = self.train_small(stop=None)
        return {"losses": losses_of(folder) if self.rank == 0 else []}

    def job_stop(self):
        """Stop the small run in the middle, after a checkpoint."""
        folder, trainer = self.train_small(stop=STOPPED_STEP)
        return {"stopped": trainer.state.global_step, "folder": folder.name, "checkpoint_s": trainer.save_s}

    def job_resume(self, from_gpus):
        """Go on with the small run that so many GPUs have stopped."""
        name = f"small-{self.options.mode}-{from_gpus}-stopped"
        folder, trainer = self.train_small(stop=None, resumed=name)
        return {"from_gpus": from_gpus, "losses": losses_of(folder) if self.rank == 0 else [], "step": trainer.step_0}

    def train_small(self, *, stop, resumed=None):
        """Return the folder and the trainer of the small run, trained up to `stop` or to its end."""
        config = SHAPES[self.options.small_shape]()
        name = f"small-{self.options.mode}-{self.world}-{'stopped' if stop else 'whole'}"
        folder = self.options.out / resumed if resumed else self.empty_folder(name)
        per_step = self.options.packs
        packs = FilledPacks(
            mixed_lengths(SMALL_TOKENS, per_step * SMALL_STEPS), per_step=per_step, vocab_size=config.vocab_size
        )
        packs.order = balance_steps(packs, shape=shape_model(config), num_ranks=self.world, packs_per_batch=1)
        model = make_model(config, device=self.device, dtype=torch.float32)
        trainer = self.make_trainer(
            packs,
            folder=folder,
            num_steps=SMALL_STEPS,
            precision="fp32",
            model=model,
            callbacks=[StopAt(stop)] if stop else [],
            tokens=SMALL_TOKENS,
            learning_rate=1e-3,
        )
        trainer.saves = stop is not None
        checkpoint = RunFolder(folder).checkpoints.all()[-1] if resumed else (0, None)
        trainer.step_0 = checkpoint[0]
        trainer.train_packs(checkpoint[1])
        self.let_go(trainer)
        return folder, trainer

    def job_mixed(self, tokens):
        """Time each row of mixed packs alone on its rank, and say what the slowest rank makes the others wait."""
        per_step, num_steps = self.options.packs, self.options.steps
        packs = FilledPacks(
            mixed_lengths(tokens, per_step * num_steps), per_step=per_step, vocab_size=self.config.vocab_size
        )
        shape = shape_model(self.config, lora=self.lora)
        packs.order = balance_steps(packs, shape=shape, num_ranks=self.world, packs_per_batch=1)
        model = self.make_model()
        packs.row_multiple = row_multiple(tokens, device=self.device, compiled=False)
        mine = [place for place in range(len(packs)) if place % self.world == self.rank]
        own = {}
        with (
            segment_attention(model, row_tokens=tokens),
            prepared_layers(model, Recompute(len(decoder_layers(model))), compiled=False),
            unwidened_inputs(model, autocast=True),
        ):
            for place in [mine[0], *mine]:  # the first row is for warming up
                batch = packs.collate([packs[place]]).to(self.device)
                synchronize(self.device)
                started = time.perf_counter()
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = row_loss(model, batch).loss
                loss.backward()
                synchronize(self.device)
                own[packs.order[place]] = time.perf_counter() - started
        del model, loss, batch
        self.empty()
        seconds = {pack: s for part in self.gather(own) for pack, s in part.items()}
        orders = {"balanced": packs.order, "in_plan_order": range(len(packs))}
        return {
            "tokens": tokens,
            "episodes": [len(pack.episodes) for pack in packs.packs],
            "row_s": spread(list(seconds.values())),
            "waiting": {
                f"{how}, {ranks} ranks": waiting_share(
                    [seconds[pack] for pack in order], ranks=ranks, per_step=per_step
                )
                for ranks in sorted({2, 4, 8, self.world})
                if per_step % ranks == 0
                for how, order in self.orders_of(packs, shape=shape, ranks=ranks, given=orders).items()
            },
        }

    def orders_of(self, packs, *, shape, ranks, given):
        """Return the orders of packs for so many ranks: as they were handed out here, or would be there."""
        if ranks == self.world:
            return given
        shape = shape_model(self.config, lora=self.lora)
        balanced = balance_steps(packs, shape=shape, num_ranks=ranks, packs_per_batch=1)
        return {"balanced": balanced, "in_plan_order": range(len(packs))}

    def job_eval(self, tokens):
        """Share draws out over the ranks as `manyicl eval` does, encode each one's shots, ask its queries."""
        model = make_model(self.config, device=self.device, dtype=torch.bfloat16).eval()
        ranks = Ranks(number=self.rank, count=self.world)

        def ask(draw, model=model):
            rng = np.random.default_rng(draw)
            shots = rng.integers(8, self.config.vocab_size, tokens).astype(np.int32)
            queries = list(rng.integers(8, self.config.vocab_size, (QUERIES, QUERY_TOKENS)).astype(np.int32))
            score_choices(model, encode_prefix(model, shots, room=tokens), queries, [[[5], [6]]] * QUERIES)

        ask(DRAWS)
        synchronize(self.device)
        self.gather(None)
        started = time.perf_counter()
        for draw in ranks.shard(range(DRAWS)):
            ask(draw)
        synchronize(self.device)
        self.gather(None)
        seconds = time.perf_counter() - started
        del model
        self.empty()
        return {
            "tokens": tokens,
            "draws": DRAWS,
            "queries": DRAWS * QUERIES,
            "queries_per_s": DRAWS * QUERIES / seconds,
        }

    def packs_of(self, tokens):
        """Return the packs of a step: half as many of rows that are longer than 8k, but one a rank at least."""
        packs = self.options.packs if tokens <= 8192 else self.options.packs // 2
        return max(self.world, packs)

    def make_model(self):
        """Return a model with random weights, the same on all ranks."""
        dtype = torch.bfloat16 if self.lora else torch.float32
        model = make_model(self.config, device=self.device, dtype=dtype)
        if not self.lora:
            return model
        torch.manual_seed(1)
        with self.device:
            return add_adapter(model, self.lora)

    def make_trainer(
        self,
        packs,
        *,
        folder,
        num_steps,
        precision,
        callbacks,
        tokens,
        compiled=False,
        model=None,
        learning_rate=1e-4,
    ):
        """Return the library's trainer on `packs`, whose rows have at most so many tokens."""
        AcceleratorState._reset_state()  # a process may train in two precisions here
        GradientState._reset_state()
        settings = self.settings(
            num_steps=num_steps,
            per_step=packs.packs_per_step,
            tokens=tokens,
            compiled=compiled,
            learning_rate=learning_rate,
        )
        recipe = RunConfig(
            tasks=TaskSettings(folder="none"),
            model=ModelSettings(path="none", precision=precision, lora=self.lora if model is None else None),
            episodes=EpisodeSettings(token_budget=tokens),
            train=settings,
        )
        packs.row_multiple = row_multiple(tokens, device=self.device, compiled=compiled)
        num_targets = max(count([pack]).num_targets for pack in packs.packs)
        args = training_arguments(
            settings,
            folder=RunFolder(folder).checkpoints.path,
            precision=precision,
            seed=0,
            validated=False,
            num_ranks=self.world,
        )
        return TimedTrainer(
            model if model is not None else self.make_model(),
            args=args,
            recipe=recipe,
            packs=packs,
            row=Row(num_tokens=tokens, num_targets=num_targets, precision=precision, compiled=compiled),
            validation=(packs, ()),
            metrics=MetricsLog(folder / "metrics.jsonl"),
            callbacks=callbacks,
        )

    def settings(self, *, num_steps, per_step, tokens=0, compiled=False, learning_rate=1e-4):
        """Return the recipe's [train]."""
        # Under FSDP2 the free memory of one GPU decides for all, which long rows have not been tried with.
        chosen = "selective" if self.lora is None and tokens > 8192 else "auto"
        recompute = self.options.recompute or chosen
        return TrainSettings(
            num_steps=num_steps,
            packs_per_step=per_step,
            packs_per_batch=1,
            compile=compiled,
            recompute=recompute,
            learning_rate=learning_rate,
            log_every_steps=1,
            checkpoint_every_steps=10**6,
            validation_tokens=0,
        )

    def let_go(self, trainer) -> None:
        """Free the GPU of a trainer's model and optimizer, which hold one another."""
        trainer.accelerator.free_memory()
        trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
        trainer.callback_handler.model = trainer.callback_handler.optimizer = None
        trainer.callback_handler.lr_scheduler = None
        self.empty()

    def empty(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def empty_folder(self, name):
        """Return a folder that is empty on all ranks."""
        folder = self.options.out / name
        self.remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove(self, folder) -> None:
        self.gather(None)
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.gather(None)


class Made:
    """A random episode of a pack, with what plans and trainers ask of one."""

    def __init__(self, built, index) -> None:
        self.built, self.index, self.num_tokens = built, index, len(built.ids)


class MadePack:
    """A pack of random episodes."""

    def __init__(self, episodes) -> None:
        self.episodes = tuple(episodes)
        self.num_tokens = sum(episode.num_tokens for episode in episodes)


class FilledPacks(Dataset):
    """Packs of random episodes, with what the trainer asks of `manyicl.episodes.PackDataset`.

    lengths: of each pack's episodes. A pack's contents depend on its place alone.
    """

    def __init__(self, lengths, *, per_step, vocab_size) -> None:
        self.packs_per_step, self.vocab_size = per_step, vocab_size
        self.packs = [MadePack([self.make(n, seed=(i, j)) for j, n in enumerate(p)]) for i, p in enumerate(lengths)]
        steps = [self.packs[start : start + per_step] for start in range(0, len(self.packs), per_step)]
        self.divisors = [count(step) for step in steps]
        self.order, self.row_multiple = range(len(self.packs)), 1
        self.settings = EpisodeSettings()
        self.maker, self.task_names = self, ("made",)

    def make(self, length, *, seed):
        built = make_episodes(length, episode_tokens=length, target_share=TARGET_SHARE, vocab_size=self.vocab_size)[0]
        built.ids[:] = np.random.default_rng(seed).integers(3, self.vocab_size, length)
        return Made(built, seed[0])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, place):
        return self.packs[self.order[place]], self.divisors[place // self.packs_per_step]

    def make_batch(self, packs):
        """Return packs as one row that is normalised by itself."""
        return make_row([episode.built for pack in packs for episode in pack.episodes])

    def collate(self, items):
        """Return one micro-batch; each target counts once in its step."""
        episodes = [episode for pack, _ in items for episode in pack.episodes]
        weights = [np.full(len(e.built.spans), 1.0 / items[0][1].num_targets) for e in episodes]
        batch = join_row(
            [episode.built for episode in episodes],
            targets="all",
            weights=weights,
            tasks=[0] * len(episodes),
            episodes=tuple(episode.index for episode in episodes),
        )
        return pad_row(batch, multiple=self.row_multiple) if self.row_multiple > 1 else batch


def count(packs):
    """Return the divisors of a step."""
    spans = [episode.built.spans for pack in packs for episode in pack.episodes]
    num_targets = sum(int((s[:, 1] - s[:, 0]).sum()) for s in spans)
    num_answers = sum(len(s) for s in spans)
    return Divisors(num_answers=num_answers, num_targets=num_targets, num_answers_by_task={"made": num_answers})


def mixed_lengths(tokens, num_packs):
    """Return the episodes' lengths of so many packs: log-uniform from a 16th of the row to all of it, packed best."""
    rng, lengths = np.random.default_rng(0), []
    while True:
        lengths.append(int(tokens * 16 ** -rng.uniform()))
        if sum(lengths) < num_packs * tokens * 0.95:
            continue
        groups = pack_lengths(lengths, pack_tokens=tokens)
        if len(groups) >= num_packs:
            rng.shuffle(groups)
            return [[lengths[i] for i in group] for group in groups[:num_packs]]


def waiting_share(seconds, *, ranks, per_step):
    """Return the share of all ranks' time that is spent waiting for the slowest one at the end of each step.

    seconds: of each row, in the order in which they are handed to the ranks in turn.

    >>> waiting_share([1.0, 3.0, 1.0, 1.0], ranks=2, per_step=4)
    0.25
    """
    steps = [seconds[start : start + per_step] for start in range(0, len(seconds), per_step)]
    spent = [[sum(step[rank::ranks]) for rank in range(ranks)] for step in steps]
    return 1 - sum(map(sum, spent)) / (ranks * sum(map(max, spent)))


def losses_of(folder):
    """Return [step, loss] of each step that was logged."""
    return [
        [record["step"], record["loss"]] for record in MetricsLog(folder / "metrics.jsonl").read() if "loss" in record
    ]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class TimedTrainer(AnswerTrainer):
    """The library's trainer, which saves only if `saves` says so and measures how long that takes."""

    saves, save_s, started_at, step_0 = False, None, 0.0, 0

    def train(self, *arguments, **options):
        self.started_at = time.perf_counter()
        return super().train(*arguments, **options)

    def _save_checkpoint(self, model, trial) -> None:
        if not self.saves:
            return
        synchronize(self.args.device)
        started = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.save_s = time.perf_counter() - started


class StepClock(TrainerCallback):
    """Times steps, each up to the next one's start, and reads the peak memory of all but the first."""

    def __init__(self, device) -> None:
        self.device, self.seconds, self.last, self.flash = device, [], None, None

    def on_step_begin(self, *_, **__) -> None:
        if self.last is None:
            synchronize(self.device)
            self.last = time.perf_counter()
            self.flash = flash.flash_implementation()

    def on_step_end(self, *_, **__) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if len(self.seconds) == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self, *, reserved=False):
        if self.device.type != "cuda":
            return None
        return (torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()) / GIB


class StopAt(TrainerCallback):
    """Saves and stops after a step."""

    def __init__(self, step) -> None:
        self.step = step

    def on_step_end(self, _, state, control, **__) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class HasBegunError(Exception):
    """Training has reached its first step."""


class Begun(TrainerCallback):
    """Ends training where its first step would begin."""

    at = 0.0

    def on_step_begin(self, *_, **__) -> None:
        self.at = time.perf_counter()
        raise HasBegunError


if __name__ == "__main__":
    main()
