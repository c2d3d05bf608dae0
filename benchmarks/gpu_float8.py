"""LoRA on a frozen base in float8 against the same base in bf16: are the gradients right, how fast, in how much memory.

    python benchmarks/gpu_float8.py [--shape mistral-7b] [--tokens 8192:none,32768:auto] [--turn-tokens 16384]
                                    [--repeats 6] [--check-tokens 8192] [--no-compile] [--seconds 140] [--json OUT]

First the check, before anything is timed: two layers of the real shape, random weights, adapters of rank 16 whose two
matrices are both random (an adapter as it is made gets no gradient in its first one). Its gradients by the bf16 base
and the float8 base, layers plain and compiled, beside those in float32: the cosine over all of them, the least cosine
of a matrix, and the ratio of their norms. If a compiled gradient is not the plain one (cosine under 0.99 with bf16,
under 0.95 with float8, some of whose numbers round to the other side), the cosine of every matrix is printed, and the
exit code is 1 in the end.

Then whole models, both in one process: they take turns, about --turn-tokens each time, forward and backward as `manyicl
train` runs them (bf16 autocast, compiled layers), optimizer left out. A ratio is the median over the --repeats turns of
bf16's seconds over float8's, with its 95 % interval by ranks. Behind each length stands what is recomputed: "auto" is
as little as fits beside the weights of both, the same for both. A side's peak memory is without the other's weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, ratios, spread, synchronize, time_in_turn, write_json
from torch.nn.functional import cosine_similarity

from manyicl.episodes.batch import pad_row
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import LoraSettings, add_adapter
from manyicl.models.loss import row_loss
from manyicl.models.quantization.float8 import check_float8, store_in_float8
from manyicl.models.structure import decoder_layers
from manyicl.training.memory.choice import fewest_recomputed, free_memory, predict_memory, resolve_recompute
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.recompute.layers import Recompute, prepared_layers, unwidened_inputs

GIB = 1 << 30
SIDES = ("bf16", "float8")
# Least cosine between the compiled and the plain gradients.
ALIKE = {"fp32": 0.999, "bf16": 0.99, "float8": 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-7b", choices=tuple(SHAPES))
    parser.add_argument("--tokens", default="8192:none,32768:auto", help="lengths of rows, and what is recomputed")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are targets")
    parser.add_argument("--turn-tokens", type=int, default=16384, help="in whole rows, one at least")
    parser.add_argument("--repeats", type=int, default=6, help="turns; an interval needs six")
    parser.add_argument("--check-tokens", type=int, default=8192, help="0: no check")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=140.0, help="no new length is begun after so long")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_float8(device)
    results = {"check": check_gradients(options, device=device) if options.check_tokens else [], "rows": []}
    write_json(options.json, results)
    print(f"checked in {time.monotonic() - started:.0f} s", flush=True)
    models = {side: build(SHAPES[options.shape](), side, device=device) for side in SIDES}
    print(f"built at {time.monotonic() - started:.0f} s", flush=True)
    for entry in options.tokens.split(","):
        tokens, _, asked = entry.partition(":")
        if time.monotonic() - started > options.seconds:
            print(f"left out for want of time: {entry}")
            continue
        results["rows"].append(compare(models, int(tokens), asked or "auto", options, device=device))
        print(describe(results["rows"][-1]), f"(at {time.monotonic() - started:.0f} s)", flush=True)
        write_json(options.json, results)
    if not all(row["alike"] for row in results["check"]):
        raise SystemExit("WRONG: compiled gradients are not the plain ones")


def build(config, kind, *, device):
    """Return a model with an adapter, both of whose matrices are random: the base in fp32, bf16 or float8."""
    model = make_model(config, device=device, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    return adapt(model, kind, device=device)


def adapt(model, kind, *, device):
    """Return `model` with its base in `kind` inside an adapter that is the same for every kind."""
    if kind == "float8":
        store_in_float8(model, dtype=torch.bfloat16, device=device)
    with device:
        model = add_adapter(model, LoraSettings()).train()
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.empty_like(parameter, dtype=torch.float32).normal_(0, 0.02, generator=generator)
    return model


def make_batch(num_tokens, options, *, vocab_size, device):
    """Return a row that one episode fills."""
    episodes = make_episodes(num_tokens, episode_tokens=num_tokens, target_share=options.share, vocab_size=vocab_size)
    return pad_row(make_row(episodes), multiple=num_tokens).to(device)


def run_rows(model, batch, *, num_rows=1, autocast=True):
    """Run rows forward and backward, and return the last loss."""
    model.zero_grad(set_to_none=True)
    for _ in range(num_rows):
        with torch.autocast(batch.input_ids_1T.device.type, torch.bfloat16, enabled=autocast):
            loss = row_loss(model, batch).loss
        loss.backward()
    return loss


def check_gradients(options, *, device):
    """Return how each kind's gradients, plain and compiled, lie to those in float32, and compiled to plain."""
    config = SHAPES[options.shape]()
    config.num_hidden_layers = 2
    batch = make_batch(options.check_tokens, options, vocab_size=config.vocab_size, device=device)
    base = make_model(config, device=device, dtype=torch.bfloat16)
    truth, rows = None, []
    for kind in ("fp32", *SIDES):
        model = copy.deepcopy(base)
        model = adapt(model.float() if kind == "fp32" else model, kind, device=device)
        plain = None
        for compiled in (False,) if kind == "fp32" or options.no_compile else (False, True):
            loss, found = gradients_of(model, batch, compiled=compiled, autocast=kind != "fp32")
            truth, plain = truth or found, plain or found
            row = {"kind": kind, "compiled": compiled, "loss": loss, "to_fp32": liken(found, truth)}
            row["to_plain"] = liken(found, plain)
            row["alike"] = row["to_plain"]["cosine"] >= ALIKE[kind]
            least = row["to_fp32"]
            print(
                f"{kind:6} {'compiled' if compiled else 'plain':8} loss {loss:.5f}; gradients to float32's: cosine"
                f" {least['cosine']:.4f} (least {least['least']:.4f}, {least['where']}), norm {least['norm']:.3f} of"
                f" it; to the plain ones': cosine {row['to_plain']['cosine']:.4f}",
                flush=True,
            )
            if not row["alike"]:
                for name, value in liken(found, plain)["each"].items():
                    print(f"  to the plain one's: {value:7.4f} {name}")
            rows.append(row)
        del model
    return rows


def gradients_of(model, batch, *, compiled, autocast):
    """Return a row's loss and the gradient of each trained matrix, by name, in float32."""
    with (
        segment_attention(model, row_tokens=len(batch.input_ids_1T[0])),
        prepared_layers(model, Recompute(0), compiled=compiled),
        unwidened_inputs(model, autocast=autocast),
    ):
        loss = float(run_rows(model, batch, autocast=autocast).detach())
    return loss, {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def liken(found, truth):
    """Return cosine and ratio of the norms of all gradients together, and the least cosine of one, with its name."""
    assert found.keys() == truth.keys()
    ours, theirs = (torch.cat([side[name].flatten() for name in truth]).double() for side in (found, truth))
    each = {name: float(cosine_similarity(found[name].flatten(), truth[name].flatten(), dim=0)) for name in truth}
    where = min(each, key=each.get)
    short = where.removeprefix("base_model.model.model.layers.").removesuffix(".default.weight")
    return {
        "cosine": float(cosine_similarity(ours, theirs, dim=0)),
        "norm": float(ours.norm() / theirs.norm()),
        "least": each[where],
        "where": short,
        "each": each,
    }


def compare(models, num_tokens, asked, options, *, device):
    """Return tokens/s, peaks and the ratio of both sides at one length."""
    compiled = not options.no_compile
    config = models["bf16"].get_base_model().config
    batch = make_batch(num_tokens, options, vocab_size=config.vocab_size, device=device)
    plans = {side: plan(models, side, batch, compiled=compiled) for side in SIDES}
    recompute = choose(models, plans["bf16"], asked, device=device)
    result = {
        "tokens": num_tokens,
        "compiled": compiled,
        "recomputed": recompute.num_layers,
        "keeps_attention": recompute.keep_attention,
        "layers": len(decoder_layers(models["bf16"])),
    }
    num_rows = max(1, options.turn_tokens // num_tokens)
    held, peaks = {side: held_bytes(model) for side, model in models.items()}, dict.fromkeys(SIDES, 0)

    def turn(side):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run_rows(models[side], batch, num_rows=num_rows)
        models[side].zero_grad(set_to_none=True)
        if device.type == "cuda":
            alone = torch.cuda.max_memory_allocated() - sum(held.values()) + held[side]
            peaks[side] = max(peaks[side], alone)

    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(segment_attention(model, row_tokens=num_tokens))
            stack.enter_context(prepared_layers(model, recompute, compiled=compiled))
            stack.enter_context(unwidened_inputs(model, autocast=True))
        for side in SIDES:  # compiles
            begun = time.perf_counter()
            run_rows(models[side], batch)
            models[side].zero_grad(set_to_none=True)
            synchronize(device)
            result[f"first_row_s_{side}"] = time.perf_counter() - begun
        turns = {side: partial(turn, side) for side in SIDES}
        seconds = time_in_turn(turns, repeats=options.repeats, device=device)
    for side in SIDES:
        predicted = predict_memory(plans[side], recompute)
        each = spread([s / num_rows for s in seconds[side]])
        result[side] = {
            "row_s": each,
            "tokens_per_s": num_tokens / each["median"],
            "peak_gib": peaks[side] / GIB,
            "predicted_gib": (predicted.total_bytes - predicted.optimizer_bytes) / GIB,
        }
    return {**result, "times": ratios(seconds["float8"], seconds["bf16"])}


def held_bytes(model):
    """Return the bytes of a model's weights and buffers."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def plan(models, side, batch, *, compiled):
    """Return the footprint of a side's rows."""
    row = Row(
        num_tokens=len(batch.input_ids_1T[0]),
        num_targets=len(batch.target_positions_N),
        precision="bf16",
        compiled=compiled,
        quantize="float8" if side == "float8" else None,
    )
    return measure_footprint(models[side].get_base_model().config, row, lora=LoraSettings())


def choose(models, footprint, asked, *, device):
    """Return what both sides recompute: for "auto" as little as the bf16 side needs to beside the other's weights."""
    chosen = resolve_recompute(int(asked) if asked.isdigit() else asked, num_layers=footprint.num_layers)
    if chosen is not None:
        return chosen
    if device.type == "cpu":
        return Recompute(0)
    return fewest_recomputed(footprint, free_bytes=free_memory(device) - held_bytes(models["float8"]))


def describe(result):
    """Return lines for a person."""
    how = f"{result['recomputed']} of {result['layers']} layers recomputed"
    how += "" if result["keeps_attention"] else " in full"
    lines = [f"{result['tokens']:,} tokens, {how}{', compiled' if result['compiled'] else ''}:"]
    for side in SIDES:
        found = result[side]
        lines.append(
            f"  {side:6} {found['tokens_per_s']:,.0f} tokens/s ({found['row_s']['min']:.3f} to"
            f" {found['row_s']['max']:.3f} s a row), peak {found['peak_gib']:.1f} GiB (predicted"
            f" {found['predicted_gib']:.1f}); first row {result[f'first_row_s_{side}']:.0f} s"
        )
    times = result["times"]
    interval = "" if times["interval"] is None else f", 95 % {times['interval'][0]:.3f} to {times['interval'][1]:.3f}"
    lines.append(f"  float8 is {times['ratio']:.3f} times as fast ({times['min']:.3f} to {times['max']:.3f}{interval})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
