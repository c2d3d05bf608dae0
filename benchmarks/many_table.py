"""The table of gpu_many.py: what rows.jsonl holds, beside one GPU's and beside the prediction."""

from __future__ import annotations

import json
import statistics
from functools import lru_cache

from measuring import SHAPES

from manyicl.models import LoraSettings
from manyicl.models.costs import count_weights
from manyicl.training.memory.choice import predict_memory
from manyicl.training.memory.footprint import GATHERED_UNITS, Row, measure_footprint
from manyicl.training.recompute.layers import Recompute

GIB = 1 << 30


def print_table(folder) -> None:
    """Print a line per result, then what compares them."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ceilings = [row for row in rows if row["job"] == "ceiling" and None not in row["held"]]
    held = statistics.mean(ceilings[0]["held"]) if ceilings else None
    if held:
        print(
            f"ceiling, held: {held / 1e12:.0f} TFLOP/s a GPU"
            f" ({', '.join(f'{x / 1e12:.0f}' for x in ceilings[0]['held'])})"
        )
    timed = [row for row in rows if "step_s" in row]
    for row in timed:
        print(describe_row(row, timed, held=held))
    for row in rows:
        if "out_of_memory" in row or "failed" in row or "left_out" in row:
            print(f"{row['mode']} {row['shape']} on {row['gpus']}: {row}"[:300])
    print_same(rows)
    for row in (row for row in rows if row["job"] == "mixed"):
        for how, share in row["waiting"].items():
            print(f"mixed rows of {row['tokens']:,} tokens, {how}: {share:.1%} of the ranks' time is waiting")
    asked = {row["gpus"]: row["queries_per_s"] for row in rows if row["job"] == "eval"}
    for gpus, rate in sorted(asked.items()):
        times = f", {rate / asked[1]:.2f} times one GPU's" if 1 in asked else ""
        print(f"evaluation on {gpus}: {rate:,.0f} queries/s{times}")


def describe_row(row, timed, *, held):
    """Return a line of a row that was timed."""
    key = ("mode", "shape", "tokens")
    alone = [other for other in timed if other["gpus"] == 1 and all(other[k] == row[k] for k in key)]
    line = (
        f"{row['mode']:10} {row['shape']:10} {row['gpus']} GPUs {row['tokens']:>7,} tokens,"
        f" {row['packs_per_step']} rows a step, {row['checkpointed']} of {row['layers']} layers recomputed:"
        f" {row['tokens_per_s']:,.0f} tokens/s ({row['step_s']['min']:.2f} to {row['step_s']['max']:.2f} s a step)"
    )
    if alone:
        line += f", {row['tokens_per_s'] / row['gpus'] / alone[0]['tokens_per_s']:.1%} of one GPU's per GPU"
    if held:
        line += f", {row['flops_per_s'] / row['gpus'] / held:.1%} of the held ceiling"
    if row["peak_gib"][0] is not None:
        peak, predicted = max(row["peak_gib"]), predict_gib(row)
        line += f", peak {peak:.1f} GiB for predicted {predicted:.1f} ({predicted / peak - 1:+.1%})"
    if row.get("checkpoint_s") is not None:
        line += f", checkpoint {row['checkpoint_bytes'] / 1e9:.2f} GB in {row['checkpoint_s']:.1f} s"
    if "resume_s" in row:
        line += f", resume {row['resume_s']:.1f} s"
    return line


def predict_gib(row):
    """Return the predicted peak of a row's step; under FSDP2 states are shared and three units are whole at once."""
    footprint, unit_bytes = footprint_of(
        row["mode"], row["shape"], row["layers"], row["tokens"], row["targets"], row["compiled"]
    )
    prediction = predict_memory(footprint, Recompute(row["checkpointed"], keep_attention=row["keeps_attention"]))
    if row["mode"] == "lora-ddp" or row["gpus"] == 1:
        return prediction.total_bytes / GIB
    states = prediction.states_bytes / row["gpus"] + GATHERED_UNITS * unit_bytes
    return (states + prediction.activations_bytes) / GIB


@lru_cache
def footprint_of(mode, shape, layers, tokens, targets, compiled):
    """Return a row's footprint, and the bytes of the model's largest unit in float32."""
    config = SHAPES[shape]()
    config.num_hidden_layers = layers
    step = Row(num_tokens=tokens, num_targets=targets, precision="bf16", compiled=compiled)
    footprint = measure_footprint(config, step, lora=LoraSettings() if mode == "lora-ddp" else None)
    ends = config.vocab_size * config.hidden_size
    layer = (count_weights(config).base - ends * (1 if config.tie_word_embeddings else 2)) // layers
    return footprint, 4 * max(layer, ends)


def print_same(rows) -> None:
    """Print by how much the losses of the runs that are to be the same differ."""
    runs = {f"{r['mode']}, float32, {r['gpus']} GPUs": r["losses"] for r in rows if r["job"] == "same"}
    runs |= {
        f"{r['mode']}, float32, stopped on {r['from_gpus']}, resumed on {r['gpus']}": r["losses"]
        for r in rows
        if r["job"] == "resume"
    }
    if runs:
        name, expected = next(iter(sorted(runs.items(), key=lambda item: "1 GPUs" not in item[0])))
        for other, losses in runs.items():
            print(f"losses of {other}: at most {differ(losses, expected):.1e} (relative) from those of {name}")
    timed = [row for row in rows if "step_s" in row]
    for row in timed:
        key = ("mode", "shape", "tokens", "packs_per_step")
        for other in timed:
            if other["gpus"] < row["gpus"] and all(other[k] == row[k] for k in key):
                name = f"{row['mode']} {row['shape']} {row['tokens']:,} tokens, bf16,"
                name += f" {row['gpus']} and {other['gpus']} GPUs"
                print(f"losses of {name}: at most {differ(row['losses'], other['losses']):.1e} (relative) apart")


def differ(losses, expected):
    """Return the largest relative difference of two courses; they must have the same steps."""
    assert [step for step, _ in losses] == [step for step, _ in expected]
    return max(abs(x - y) / abs(y) for (_, x), (_, y) in zip(losses, expected, strict=True))
