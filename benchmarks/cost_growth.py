"""How time and memory of a training step grow with its length: measured, fitted exponents, a plot.

    python benchmarks/cost_growth.py [--shape small] [--tokens 1024,2048,4096,8192] [--json OUT] [--plot PNG]

A filled episode a row, and a row packed with episodes of --episode-tokens, forward and backward. Each length and kind
is run in a process of its own, whose resident peak less what it held before is the memory; the lengths take turns. The
exponent is the slope of a straight line through the logarithms: 1 is linear, 2 quadratic; attention makes the filled
rows' time bend upwards, and nothing the memory's. The plot is drawn in the terminal; --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import plotext
import torch
from measuring import SHAPES, make_episodes, make_model, make_row, spread, synchronize, write_json

from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import row_loss
from manyicl.training.metrics import PeakMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=tuple(SHAPES))
    parser.add_argument("--tokens", default="1024,2048,4096,8192")
    parser.add_argument("--episode-tokens", type=int, default=512, help="of the episodes of a packed row")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are targets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # TOKENS:EPISODE_TOKENS, in a process of its own
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options)))
        return
    lengths = [int(t) for t in options.tokens.split(",")]
    found = {kind: {n: [] for n in lengths} for kind in ("filled", "packed")}
    for _ in range(options.repeats):
        for num_tokens in lengths:
            for kind, episode_tokens in (("filled", num_tokens), ("packed", options.episode_tokens)):
                found[kind][num_tokens].append(run_child(options, num_tokens, episode_tokens))
    results = {kind: summarise(by_length) for kind, by_length in found.items()}
    for kind, result in results.items():
        for point in result["points"]:
            memory = "" if point["peak_mib"] is None else f", peak {point['peak_mib']['median']:,.0f} MiB"
            print(
                f"{kind} {point['tokens']:>6,} tokens: {point['time_s']['median']:.3f} s ({point['time_s']['min']:.3f}"
                f" to {point['time_s']['max']:.3f}){memory}"
            )
        print(f"{kind}: exponents " + ", ".join(f"{what} {e:.2f}" for what, e in result["exponents"].items()))
    draw(results)
    if options.plot:
        save_plot(results, options.plot)
    write_json(options.json, results)


def run_child(options, num_tokens, episode_tokens):
    script = [sys.executable, __file__, "--shape", options.shape, "--share", str(options.share)]
    done = subprocess.run(
        [*script, "--one", f"{num_tokens}:{episode_tokens}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(options):
    """Return the seconds of a second step, and the peak of the first above what was held before it."""
    num_tokens, episode_tokens = (int(n) for n in options.one.split(":"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SHAPES[options.shape]()
    model = make_model(config, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    episodes = make_episodes(
        num_tokens, episode_tokens=episode_tokens, target_share=options.share, vocab_size=config.vocab_size
    )
    batch = make_row(episodes).to(device)

    def step():
        model.zero_grad(set_to_none=False)
        with segment_attention(model):
            row_loss(model, batch).loss.backward()
        synchronize(device)

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # held before, as they do not grow with the row
    before = PeakMemory(device).read()
    peak = PeakMemory(device)
    step()
    after = peak.read()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": None if before is None or after is None else after - before}


def summarise(by_length):
    """Return the points and the exponents of time and memory."""
    points = []
    for num_tokens, runs in by_length.items():
        peaks = [run["peak_bytes"] / 2**20 for run in runs if run["peak_bytes"] is not None]
        time_s = spread([run["seconds"] for run in runs])
        points.append({"tokens": num_tokens, "time_s": time_s, "peak_mib": spread(peaks) if peaks else None})
    logs = np.log([p["tokens"] for p in points])
    exponents = {"time": float(np.polyfit(logs, np.log([p["time_s"]["median"] for p in points]), 1)[0])}
    if all(p["peak_mib"] and p["peak_mib"]["median"] > 0 for p in points):
        exponents["memory"] = float(np.polyfit(logs, np.log([p["peak_mib"]["median"] for p in points]), 1)[0])
    return {"points": points, "exponents": exponents}


def draw(results):
    """Draw the times in the terminal, both axes logarithmic."""
    plotext.clear_figure()
    plotext.plot_size(70, 18)
    plotext.theme("clear")
    for kind, result in results.items():
        points = result["points"]
        plotext.plot(
            [float(np.log2(p["tokens"])) for p in points],
            [float(np.log2(p["time_s"]["median"])) for p in points],
            label=kind,
            marker="braille" if kind == "filled" else "dot",
        )
    plotext.xlabel("log2 tokens")
    plotext.ylabel("log2 seconds")
    plotext.show()


def save_plot(results, path):
    """Save time and memory side by side."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, NullLocator

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for axis, what, unit in zip(axes, ("time_s", "peak_mib"), ("seconds a row", "MiB a row"), strict=True):
        for kind, result in results.items():
            points = [p for p in result["points"] if p[what]]
            exponent = result["exponents"].get(what.split("_")[0].replace("peak", "memory"))
            label = kind if exponent is None else f"{kind}, exponent {exponent:.2f}"
            axis.loglog([p["tokens"] for p in points], [p[what]["median"] for p in points], marker="o", label=label)
        lengths = sorted({p["tokens"] for result in results.values() for p in result["points"]})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.xaxis.set_minor_locator(NullLocator())
        lowest, highest = axis.get_ylim()
        heights = [n * 10.0**e for e in range(-3, 7) for n in (1, 2, 5) if lowest <= n * 10.0**e <= highest]
        axis.set_yticks(heights, [f"{height:,g}" for height in heights])
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("tokens of the row")
        axis.set_ylabel(unit)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
