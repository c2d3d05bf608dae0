"""What it is worth to join packs: an optimizer step's forward and backward passes, with n of its packs in each row.

    python benchmarks/joined_packs.py --model FOLDER | --shape NAME [--lora] [--tokens 4096] [--episodes 8] [--packs 8]
                                      [--joined 1,2,4,8] [--recompute auto] [--compile] [--graph] [--repeats 20]
                                      [--json OUT]

A step has --packs packs of --tokens tokens with --episodes episodes each, and all of them go through the model before
the step ends, --joined at a time (`train.packs_per_batch`). All numbers of packs take turns in each round, in one
process, on the same packs; the ratio is to the first number's time, with the 95 % interval of the pairs that ran in
turn. Full fine-tuning with float32 weights, or --lora, rank 16 on all projections of a frozen base; products are in
bfloat16 on a GPU, by autocast, and in float32 on a CPU. The optimizer is left out: its update is the same however packs
are joined. Attention, layers and padding are put in place as `manyicl train` does once a run, outside the times, and
layers are recomputed as it would (--recompute, with compiled layers as many for all as the longest row needs). The
step's losses of all numbers are compared before a time is taken. MFU is the share of a large bf16 product's FLOP/s.
Peak memory is what was allocated on a GPU in one step, weights and gradients included. A number of packs that does not
fit is said to. --graph: each row is a CUDA graph (`train.cuda_graph`), if no layer is recomputed.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, ratios, run_row, spread, time_in_turn, write_json

from manyicl.episodes.batch import pad_row
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.attention.segments import forget_kernels, kernels_taken
from manyicl.models.costs import count_flops, shape_model
from manyicl.models.loading import LoraSettings, ModelSettings, add_adapter, load_model
from manyicl.models.structure import inner_model
from manyicl.training.graph import GraphedPass
from manyicl.training.memory.choice import choose_recompute
from manyicl.training.memory.footprint import Row
from manyicl.training.metrics import PeakMemory, StepSums, measure_ceiling
from manyicl.training.preparation import row_multiple
from manyicl.training.recompute.layers import prepared_layers, unwidened_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder of a model")
    source.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a shape")
    parser.add_argument("--lora", action="store_true", help="an adapter on a frozen base")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--episodes", type=int, default=8, help="of a pack")
    parser.add_argument("--packs", type=int, default=8, help="of an optimizer step")
    parser.add_argument("--joined", default="1,2,4,8", help="packs in a row: numbers that divide --packs")
    parser.add_argument("--recompute", default="auto", help="auto, none, selective, full, or a number of layers")
    parser.add_argument("--compile", action="store_true", help="compiled layers")
    parser.add_argument("--graph", action="store_true", help="rows as CUDA graphs")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are targets")
    parser.add_argument("--repeats", type=int, default=20, help="an interval needs six")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    joined = [int(n) for n in options.joined.split(",")]
    if any(options.packs % n for n in joined):
        parser.error(f"--joined {options.joined}: each number must divide --packs {options.packs}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.graph and device.type != "cuda":
        parser.error("--graph: needs a GPU; leave it out")
    model, lora = build(options, device=device)
    shape = shape_model(inner_model(model).config, lora=lora)
    ceiling = measure_ceiling(device, seconds=3.0)
    sides = {n: Joined(model, n, options, lora=lora, device=device) for n in joined}
    longest = sides[max(joined)]
    with longest.layers() if options.compile else nullcontext():
        fitting = {n: side for n, side in sides.items() if side.try_step()}
        check_losses(fitting)
        seconds = time_in_turn(
            {n: side.step for n, side in fitting.items()},
            repeats=options.repeats,
            device=device,
            warmups=2,
            around={n: side.prepared for n, side in fitting.items()},
        )
    rows = [describe_row(side, seconds, shape=shape, ceiling=ceiling, options=options) for side in sides.values()]
    print("\n".join(as_text(row) for row in rows), flush=True)
    about = {"model": Path(options.model).name if options.model else options.shape, "lora": options.lora}
    about |= {"tokens": options.tokens, "episodes": options.episodes, "packs": options.packs}
    about |= {"compiled": options.compile, "graph": options.graph, "ceiling_flops": ceiling}
    write_json(options.json, {**about, "rows": rows})


def build(options, *, device):
    """Return the model in training, and its adapter's settings."""
    lora = LoraSettings() if options.lora else None
    precision = "bf16" if device.type == "cuda" else "fp32"
    if options.model:
        settings = ModelSettings(path=options.model, precision=precision, lora=lora)
        return load_model(settings, trainable=True, device=device).train(), lora
    dtype = torch.bfloat16 if lora and precision == "bf16" else torch.float32
    model = make_model(SHAPES[options.shape](), device=device, dtype=dtype)
    with device:
        return (add_adapter(model, lora) if lora else model).train(), lora


class Joined:
    """The packs of a step, so many of them in each row."""

    def __init__(self, model, number, options, *, lora, device) -> None:
        self.model, self.number, self.device = model, number, device
        self.autocast, self.compiled = device.type == "cuda", options.compile
        self.num_rows = options.packs // number
        pack = make_pack(options, vocab_size=inner_model(model).config.get_text_config().vocab_size)
        row = make_row(pack * number)
        self.lengths = [len(episode.ids) for episode in pack] * number
        self.row_tokens = number * options.tokens
        multiple = row_multiple(self.row_tokens, device=device, compiled=options.compile)
        self.batch = (pad_row(row, multiple=multiple) if multiple > 1 else row).to(device)
        self.recompute = choose_recompute(
            model,
            int(options.recompute) if options.recompute.isdecimal() else options.recompute,
            row=Row(
                num_tokens=self.batch.input_ids_1T.shape[1],
                num_targets=len(self.batch.target_positions_N),
                precision="bf16" if self.autocast else "fp32",
                compiled=options.compile,
            ),
            lora=lora,
        )
        self.sums, self.graph = StepSums(device), None
        self.is_graphed = options.graph and not self.recompute.num_layers
        self.loss, self.peak_bytes, self.kernels = None, None, {}

    def step(self) -> float:
        """Return the step's loss, of all rows."""
        self.model.zero_grad(set_to_none=True)
        losses = []
        if self.is_graphed and self.graph is None:
            self.graph = GraphedPass(self.run, self.model.parameters(), num_tokens=self.batch.num_tokens)
        for _ in range(self.num_rows):
            scored = self.graph(self.batch) if self.graph is not None else self.run(self.batch)
            self.sums.add(self.batch, scored)
            losses.append(scored.loss / self.num_rows)
        return float(sum(losses))  # one wait for the GPU, as in training

    def run(self, batch):
        """Run a row forward and backward; the gradients are the step's, times its rows."""
        return run_row(
            self.model, batch, autocast=torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        )

    def layers(self):
        """Put the layers in place."""
        return prepared_layers(self.model, self.recompute, compiled=self.compiled)

    @contextmanager
    def prepared(self):
        """Put attention and layers in place; compiled layers are there already, for all."""
        with (
            segment_attention(self.model, row_tokens=self.row_tokens),
            nullcontext() if self.compiled else self.layers(),
            unwidened_inputs(self.model, autocast=self.autocast),
        ):
            forget_kernels()
            yield
            self.kernels = kernels_taken() or self.kernels

    def try_step(self) -> bool:
        """Run one step, keep its loss and peak memory, and return whether it fits the device's memory."""
        try:
            with self.prepared():
                peak = PeakMemory(self.device)
                self.step()  # compiles, makes the CUDA graph, and lets libraries take their workspaces
                if not self.is_graphed:  # the memory that a graph keeps counts where it is made
                    peak = PeakMemory(self.device)
                self.loss = self.step()
                self.peak_bytes = peak.read() if self.device.type == "cuda" else None
        except torch.OutOfMemoryError:
            self.loss = None
        if self.loss is None:  # after the block, which holds the step's tensors by its traceback
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return self.loss is not None


def make_pack(options, *, vocab_size):
    """Return a pack's random episodes, alike in length."""
    bounds = [options.tokens * n // options.episodes for n in range(options.episodes + 1)]
    return [
        episode
        for length in (stop - start for start, stop in pairwise(bounds))
        for episode in make_episodes(length, episode_tokens=length, target_share=options.share, vocab_size=vocab_size)
    ]


def check_losses(sides) -> None:
    """Stop if the step's loss depends on how many packs are in a row. In bfloat16 each kernel rounds in its own way."""
    losses = {n: side.loss for n, side in sides.items()}
    most = 1e-2 if any(side.autocast for side in sides.values()) else 1e-5
    spreads = max(losses.values(), default=1.0) / min(losses.values(), default=1.0) - 1
    assert spreads <= most, f"the step's loss depends on the packs in a row: {losses}"


def describe_row(side, seconds, *, shape, ceiling, options):
    """Return what was found of one number of packs."""
    num_targets = len(side.batch.target_positions_N)
    flops = count_flops(shape, side.lengths, num_targets=num_targets)
    about = {"joined": side.number, "row_tokens": side.row_tokens, "targets": num_targets, "flops": flops}
    about |= {"recompute": asdict(side.recompute), "fits": side.loss is not None}
    if side.loss is None:
        return about
    times = seconds[side.number]
    first = next(iter(seconds))
    time_s = spread(times)
    return {
        **about,
        "loss": side.loss,
        "kernels": side.kernels,
        "time_s": time_s,
        "tokens_per_s": options.packs * options.tokens / time_s["median"],
        "mfu": side.num_rows * flops / time_s["median"] / ceiling if ceiling else None,
        "peak_bytes": side.peak_bytes,
        "against": first,
        "speedup": None if side.number == first else ratios(times, seconds[first]),
    }


def as_text(row) -> str:
    """Return a line for a person."""
    packs = f"{row['joined']} pack{'' if row['joined'] == 1 else 's'}"
    told = f"{packs:>8} in a row of {row['row_tokens']:,} tokens ({row['flops']:.2e} FLOPs a pass):"
    if not row["fits"]:
        return f"{told} does not fit"
    time_s, faster = row["time_s"], row["speedup"]
    told += f" {row['tokens_per_s']:,.0f} tokens/s, {1e3 * time_s['median']:.1f} ms a step"
    told += f" ({1e3 * time_s['min']:.1f} to {1e3 * time_s['max']:.1f})"
    if row["mfu"] is not None:
        told += f", MFU {row['mfu']:.1%}"
    if row["peak_bytes"] is not None:
        told += f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
    if row["recompute"]["num_layers"]:
        told += f", {row['recompute']['num_layers']} layers recomputed"
    if faster is not None:
        told += f"; {faster['ratio']:.2f} times as fast as {row['against']}"
        if faster["interval"]:
            told += " (95 % interval {:.2f} to {:.2f})".format(*faster["interval"])
    kernels = ", ".join(f"{name} ({count} times)" for name, count in row["kernels"].items())
    return f"{told}; attention: {kernels}" if kernels else told


if __name__ == "__main__":
    main()
