"""Training a 7B-shaped model on one GPU: tokens/s, share of the measured ceiling, peak memory beside the prediction.

    python benchmarks/gpu_7b.py [--shapes mistral-7b,gemma-7b,llama-3-8b] [--modes lora,full,full-fp32]
                                [--tokens 8192,32768] [--checkpointed auto] [--compile both] [--rows 4] [--repeats 3]
                                [--seconds 500] [--json OUT]

Random weights, made on the GPU. --modes: lora, of rank 16 on all projections, with a frozen base in bf16; qlora, the
same on a base in 4 bits, which is written to the folder of temporary files in bf16 and packed as it is read; full, all
weights in bf16; full-fp32, all weights in float32, as manyicl trains them, with --autocast in bf16 products. The
optimizer is left out: it is not what is measured, and at 7B its moments leave no room on most cards. One filled episode
a row, answers of three tokens on --share of its tokens. What is timed is forward and backward of --rows rows, whose
gradients add up, between two waits for the GPU: `manyicl train` waits for it once an optimizer step, which has
train.packs_per_step rows (8 unless said). FLOPs are the model's (costs.count_flops): 4 N a token for LoRA, 6 N for
full, head at targets, causal attention; what is recomputed does not count. --compile adds rows with compiled layers.
Settings that do not fit are said to. Stops taking new settings after --seconds. --layers N makes a shallower model, for
a smoke test: its MFU is its own, and nothing is extrapolated from it. The prediction is that of `manyicl plan`
(footprint.py), made before the row is run; it knows nothing of full weights in bf16. Two ceilings are measured by a
bf16 product: for a tenth of a second, and as the card holds it after HELD_SECONDS, at its power limit, where training
runs too. FlashAttention 3 is used where it is installed; --no-flash leaves it. --autocast runs the rows as `manyicl
train` does in bf16: without it the products of peft's float32 adapters are made in float32.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, spread, synchronize, write_json

from manyicl.episodes.batch import pad_row
from manyicl.models.attention import flash
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.costs import count_flops, shape_model
from manyicl.models.loading import LoraSettings, ModelSettings, add_adapter, load_model
from manyicl.models.loss import row_loss
from manyicl.models.structure import decoder_layers
from manyicl.training.memory.choice import choose_recompute, predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.metrics import measure_ceiling
from manyicl.training.recompute.layers import prepared_layers, unwidened_inputs

GIB = 1 << 30
HELD_SECONDS = 6.0
ADAPTED = ("lora", "qlora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mistral-7b,gemma-7b,llama-3-8b")
    parser.add_argument("--modes", default="lora", help="lora, qlora, full, full-fp32, or several with commas")
    parser.add_argument("--tokens", default="8192,32768")
    parser.add_argument(
        "--checkpointed", default="auto", help="recomputed: auto, none, selective, full, offload, tiled, or numbers"
    )
    parser.add_argument("--compile", default="both", choices=("no", "yes", "both"))
    parser.add_argument("--autocast", action="store_true", help="products in bf16 also where weights are float32")
    parser.add_argument("--widened", action="store_true", help="with peft's casts to float32, for comparison")
    parser.add_argument("--no-flash", action="store_true", help="without FlashAttention 3, also where it is installed")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are targets")
    parser.add_argument("--layers", type=int, help="layers of a shallower model")
    parser.add_argument("--rows", type=int, default=4, help="rows between two waits for the GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=500.0, help="no new setting is begun after so long")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, results = time.monotonic(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.no_flash:
        flash.is_usable = lambda: False
    ceilings = {"mfu": measure_ceiling(device), "mfu_held": measure_ceiling(device, seconds=HELD_SECONDS)}
    if ceilings["mfu"]:
        brief, held = (value / 1e12 for value in ceilings.values())
        print(f"ceiling: {brief:.0f} TFLOP/s (bf16 product), {held:.0f} held for {HELD_SECONDS:.0f} s", flush=True)
    else:
        print("no ceiling is known for a CPU")
    for shape in options.shapes.split(","):
        for mode in options.modes.split(","):
            model, cost = build(shape, mode, num_layers=options.layers, device=device)
            for setting in settings_of(options):
                if time.monotonic() - started > options.seconds:
                    print(f"left out for want of time: {shape} {mode} {setting}")
                    continue
                result = {"shape": shape, "mode": mode, **measure(model, cost, setting, options, mode=mode)}
                if ceilings["mfu"] and "flops_per_s" in result:
                    result |= {name: result["flops_per_s"] / value for name, value in ceilings.items()}
                print(describe(result), flush=True)
                results.append(result)
                write_json(options.json, {"ceilings": ceilings, "rows": results})
            del model
            gc.collect()
            torch.cuda.empty_cache()


def settings_of(options):
    """Return (tokens, checkpointed, compiled) of every row that is asked for."""
    checkpointed = [
        c if c in ("auto", "none", "selective", "full", "offload", "tiled") else int(c)
        for c in options.checkpointed.split(",")
    ]
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[options.compile]
    return [(int(t), c, y) for t in options.tokens.split(",") for c in checkpointed for y in compiled]


def build(shape, mode, *, num_layers, device):
    """Return the model and the shape that its FLOPs are counted from."""
    config = SHAPES[shape]()
    if num_layers:
        config.num_hidden_layers = num_layers
    lora = LoraSettings() if mode in ADAPTED else None
    model = make_model(config, device=device, dtype=torch.float32 if mode == "full-fp32" else torch.bfloat16)
    if mode == "qlora":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model  # packed beside it, it would not fit
            settings = ModelSettings(path=folder, precision="bf16", quantize="nf4", lora=lora)
            model = load_model(settings, trainable=True, device=device)
    elif lora:
        with device:
            model = add_adapter(model, lora)
    return model, shape_model(config, lora=lora)


def measure(model, cost, setting, options, *, mode):
    """Return what one setting does, or that it does not fit."""
    num_tokens, checkpointed, compiled = setting
    device = next(model.parameters()).device
    vocab = model.config.vocab_size
    episodes = make_episodes(num_tokens, episode_tokens=num_tokens, target_share=options.share, vocab_size=vocab)
    batch = pad_row(make_row(episodes), multiple=num_tokens).to(device)
    num_targets = len(batch.target_positions_N)
    flops = count_flops(cost, [num_tokens], num_targets=num_targets)
    model.zero_grad(set_to_none=True)
    model.train()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    about = {"tokens": num_tokens, "targets": num_targets, "asked": checkpointed, "compiled": compiled}
    about |= {"autocast": options.autocast}
    try:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        row = make_plan_row(num_tokens, num_targets, compiled=compiled, mode=mode)
        chosen = choose_recompute(model, checkpointed, row=row, lora=LoraSettings() if mode in ADAPTED else None)
        about |= {
            "checkpointed": chosen.num_layers,
            "keeps_attention": chosen.keep_attention,
            "offload": chosen.offload,
            "tiles": chosen.tiles,
        }
        about |= {"layers": len(decoder_layers(model)), "weights_gib": before / GIB}
        predicted = predict_bytes(model, chosen, setting, num_targets=num_targets, mode=mode)
        about["predicted_gib"] = None if predicted is None else predicted / GIB
        seconds = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        with (
            segment_attention(model, row_tokens=num_tokens),
            prepared_layers(model, chosen, compiled=compiled),
            unwidened_inputs(model, autocast=options.autocast and not options.widened),
        ):
            about["flash"] = flash.flash_implementation()
            for number in range(options.repeats + options.warmups):
                model.zero_grad(set_to_none=True)
                synchronize(device)
                begun = time.perf_counter()
                for _ in range(options.rows):
                    with torch.autocast(device.type, torch.bfloat16, enabled=options.autocast):
                        loss = row_loss(model, batch).loss
                    loss.backward()
                synchronize(device)
                if number >= options.warmups:
                    seconds.append((time.perf_counter() - begun) / options.rows)
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        if device.type == "cuda":  # how often the allocator gave back what it had kept, and asked anew: each one waits
            about["retries"] = torch.cuda.memory_stats()["num_alloc_retries"] - retries
            about["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    except torch.OutOfMemoryError:
        return {**about, "fits": False}
    finally:
        model.zero_grad(set_to_none=True)
    time_s = spread(seconds)
    return {
        **about,
        "fits": True,
        "time_s": time_s,
        "tokens_per_s": num_tokens / time_s["median"],
        "flops_per_s": flops / time_s["median"],
        "peak_gib": peak,
    }


def make_plan_row(num_tokens, num_targets, *, compiled, mode):
    """Return the row as the predictor knows it."""
    packed = "nf4" if mode == "qlora" else None
    return Row(num_tokens=num_tokens, num_targets=num_targets, precision="bf16", compiled=compiled, quantize=packed)


def predict_bytes(model, checkpointed, setting, *, num_targets, mode):
    """Return what `manyicl plan` predicts, less AdamW's moments; of full weights in bf16 it knows nothing."""
    if mode == "full":
        return None
    num_tokens, _, compiled = setting
    row = make_plan_row(num_tokens, num_targets, compiled=compiled, mode=mode)
    if mode in ADAPTED:
        footprint = measure_footprint(model.get_base_model().config, row, lora=LoraSettings())
    else:
        footprint = measure_footprint(model.config, row)
    prediction = predict_memory(footprint, checkpointed)
    return prediction.total_bytes - prediction.optimizer_bytes


def describe(result):
    """Return one line for a person."""
    what = (
        f"{result['shape']:10} {result['mode']} {result['tokens']:>7,} tokens, {result.get('checkpointed', '?')} of"
        f" {result.get('layers', '?')} layers recomputed{'' if result.get('keeps_attention', True) else ' in full'}"
        f"{', inputs in the host' if result.get('offload') else ''}{', in tiles' if result.get('tiles') else ''}"
        f"{', compiled' if result['compiled'] else ''}{', FlashAttention 3' if result.get('flash') == 'FA3' else ''}:"
    )
    if not result["fits"]:
        return f"{what} does not fit"
    line = (
        f"{what} {result['tokens_per_s']:,.0f} tokens/s ({result['time_s']['min']:.2f} to"
        f" {result['time_s']['max']:.2f} s a row), {result['flops_per_s'] / 1e12:.2f} TFLOP/s"
    )
    if "mfu" in result:
        line += f", {100 * result['mfu']:.1f} % of the ceiling, {100 * result['mfu_held']:.1f} % of the held one"
    if result["peak_gib"] is not None:
        line += (
            f", peak {result['peak_gib']:.1f} GiB, {result['peak_gib'] - result['weights_gib']:.1f} beside the weights"
        )
        if result["predicted_gib"] is not None:
            line += f" (predicted {result['predicted_gib']:.1f})"
        line += f", {result['reserved_gib']:.1f} taken by the allocator"
        if result["retries"]:
            line += f", {result['retries']} allocations tried twice"
    return line


if __name__ == "__main__":
    main()
