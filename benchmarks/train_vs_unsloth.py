"""Training steps against Unsloth: same base, same adapters, same episodes and labels, in turn, on one GPU.

    python benchmarks/train_vs_unsloth.py --base FOLDER [--shape mistral-7b] [--mode lora] [--tokens 4096,32768]
                                          [--kinds filled,packed] [--pairs within:unsloth,auto:none] [--repeats 7]
                                          [--unsloth-path FOLDERS] [--json OUT]

Unsloth runs in a process of its own (unsloth_side.py), because it patches torch and transformers for all that runs
beside it and refuses the transformers that manyicl uses: --unsloth-path is the PYTHONPATH of that process, as in
`pip install --target FOLDER unsloth`; where it is left out, both have the same. --base: a folder of random bf16 weights
of --shape, made if it is not there. LoRA of rank 16 on all projections, whose weights are the same on both sides and
not zero; --mode qlora: on a base in 4 bits (nf4). A row is written as `manyicl export --rows packs` writes it, and
Unsloth reads that file. Filled: one episode a row; packed: episodes of --episode-tokens.

A step is forward and backward of one row under bfloat16 autocast. Ours: as `manyicl train` runs it, layers compiled
(`train.compile`). Unsloth's: FastLanguageModel with its own kernels and fused loss, called as its trainer calls it.
--pairs has what either side does about memory, OURS:UNSLOTH. Ours: "within" recomputes as few layers as fit into the
peak of Unsloth's own step; "auto" what `train.recompute = "auto"` chooses in the memory that is free; "none",
"selective", "full", "offload" and "tiled" as in a recipe. Unsloth's: "unsloth" recomputes all layers and keeps their
inputs in the host's memory (its default), "none" recomputes nothing. Peak: the most that one process allocated on the
GPU in a step, with its weights and without an optimizer; the host's memory does not count. The losses must agree to
2e-3 (bf16 rounds its own way on either side): a row where they do not is marked, and the exit code is 1. Gradients are
compared by their norm, which is reported. Where tokens of an episode in Unsloth's pack move the loss of a later one, it
is said, and its padded way (episodes as rows of one batch) is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, ratios, spread, write_json
from train_vs_trl import stand_in_tokenizer
from unsloth_side import fill_adapters, timed_step

from manyicl.episodes.batch import pad_row
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.attention.segments import forget_kernels, kernels_taken
from manyicl.models.loading import LoraSettings, ModelSettings, load_model
from manyicl.models.loss import row_loss
from manyicl.training.export import as_columns, write_rows
from manyicl.training.memory.choice import USABLE_FRACTION, choose_recompute
from manyicl.training.memory.footprint import Row
from manyicl.training.preparation import row_multiple
from manyicl.training.recompute.layers import prepared_layers, unwidened_inputs

GIB = 1 << 30
LORA = LoraSettings()
LOSSES_AGREE = 2e-3
ABSENT = "Unsloth is not there (pip install unsloth) or does not start: ours is measured alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the random weights; made if not there")
    parser.add_argument("--shape", default="mistral-7b", choices=SHAPES)
    parser.add_argument("--mode", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--tokens", default="4096,32768", help="lengths of rows")
    parser.add_argument("--kinds", default="filled,packed")
    parser.add_argument("--episode-tokens", type=int, default=512, help="of the episodes of a packed row")
    parser.add_argument("--pairs", default="within:unsloth,auto:none", help="OURS:UNSLOTH, several with commas")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are targets")
    parser.add_argument("--repeats", type=int, default=7, help="an interval needs six")
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="our layers uncompiled")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row is begun after so long")
    parser.add_argument("--unsloth-path", help="PYTHONPATH of Unsloth's process")
    parser.add_argument("--unsloth-log", type=Path, default=Path(os.devnull), help="file for what Unsloth prints")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [int(n) for n in options.tokens.split(",")]
    make_base(options.base, options.shape, device=device)
    with Peer(options) as peer:
        peer.begin(options, most_tokens=max(lengths))
        ours = OurSide(options, device=device)  # meanwhile
        versions = peer.versions()
        for num_tokens, kind in ((n, k) for n in lengths for k in options.kinds.split(",")):
            row = make_row(
                make_episodes(
                    num_tokens,
                    episode_tokens=num_tokens if kind == "filled" else options.episode_tokens,
                    target_share=options.share,
                    vocab_size=SHAPES[options.shape]().vocab_size,
                )
            )
            for pair in options.pairs.split(","):
                if time.monotonic() - started > options.seconds:
                    print(f"left out for want of time: {kind}, {num_tokens:,} tokens, {pair}", flush=True)
                    continue
                about = {"mode": options.mode, "shape": options.shape, "kind": kind, "pair": pair}
                rows.append({**about, **compare(ours, peer if versions else None, row, pair, options)})
                print(describe(rows[-1]), flush=True)
                write_json(options.json, {"versions": versions, "rows": rows})
    if any(row.get("losses_agree") is False for row in rows):
        raise SystemExit(1)


def make_base(folder: Path, shape: str, *, device: torch.device) -> None:
    """Write random weights and a tokenizer, for both sides to load."""
    if (folder / "config.json").exists():
        return
    model = make_model(SHAPES[shape](), device=device, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    stand_in_tokenizer().save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def compare(ours: OurSide, peer: Peer | None, row: Any, pair: str, options: Any) -> dict[str, Any]:
    """Take both sides' steps in turn; return times, losses, peaks, and what does not fit."""
    our_way, peer_way = pair.split(":")
    ours.release()
    result: dict[str, Any] = {"tokens": row.num_tokens, "episodes": len(row.segment_lengths)}
    peer_peak = None
    if peer:
        result |= peer.read(row)
        peer.ask("enter", way=peer_way)
        probe = peer.ask("step")
        if "error" in probe:
            return {**result, "unsloth_error": probe["error"]}
        peer_peak = peer.ask("step").get("peak_bytes")  # the first step holds what is compiled and tuned only once
    try:
        with ExitStack() as stack:
            result |= ours.enter(stack, row, our_way, within=peer_peak)
            steps = {"ours": ours.step, **({"unsloth": lambda: peer.ask("step")} if peer else {})}
            taken: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
            for number in range(options.warmups + options.repeats):
                for name, step in steps.items():
                    found = step()
                    if "error" in found:
                        return {**result, f"{name}_error": found["error"]}
                    if number >= options.warmups:
                        taken[name].append(found)
            result["kernels"] = kernels_taken()
    except torch.OutOfMemoryError:
        return {**result, "ours_error": "out of memory"}
    return {**result, **summarise(taken, num_tokens=row.num_tokens)}


def summarise(taken: dict[str, list[dict[str, Any]]], *, num_tokens: int) -> dict[str, Any]:
    """Return medians and the ratio of what was measured in turn."""
    seconds = {name: [step["seconds"] for step in steps] for name, steps in taken.items()}
    result: dict[str, Any] = {
        "time_s": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_s": {name: num_tokens / spread(values)["median"] for name, values in seconds.items()},
    }
    for key in ("loss", "gradient_norm"):
        result[key] = {name: steps[0][key] for name, steps in taken.items()}
    for key in ("peak_bytes", "reserved_bytes"):
        result[key] = {name: max((step[key] or 0) for step in steps) or None for name, steps in taken.items()}
    if "unsloth" in taken:
        result["speedup"] = ratios(seconds["ours"], seconds["unsloth"])
        first, other = (result["loss"][name] for name in ("ours", "unsloth"))
        result["losses_agree"] = abs(first - other) <= LOSSES_AGREE * abs(other)
    return result


class OurSide:
    """A model of ours in its adapter, and the row that it is timed on."""

    def __init__(self, options: Any, *, device: torch.device) -> None:
        self.device, self.compiled = device, not options.no_compile
        self.quantize = "nf4" if options.mode == "qlora" else None
        settings = ModelSettings(path=str(options.base), precision="bf16", quantize=self.quantize, lora=LORA)
        self.model = load_model(settings, trainable=True, device=device).train()
        fill_adapters(self.model)

    def release(self) -> None:
        """Give back the GPU's memory that a row before has left."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def enter(self, stack: ExitStack, row: Any, way: str, *, within: int | None) -> dict[str, Any]:
        """Put attention and layers in place for a row, as `manyicl train` does once a run."""
        multiple = row_multiple(row.num_tokens, device=self.device, compiled=self.compiled)
        self.batch = pad_row(row, multiple=multiple).to(self.device)
        planned = Row(
            num_tokens=self.batch.num_tokens,
            num_targets=len(self.batch.target_positions_N),
            precision="bf16",
            compiled=self.compiled,
            quantize=self.quantize,
        )
        free_bytes = int(within / USABLE_FRACTION) if way == "within" and within else None
        setting: Any = "auto" if way == "within" else int(way) if way.isdecimal() else way
        chosen = choose_recompute(self.model, setting, row=planned, lora=LORA, free_bytes=free_bytes)
        stack.enter_context(segment_attention(self.model, row_tokens=self.batch.num_tokens))
        choice = stack.enter_context(prepared_layers(self.model, chosen, compiled=self.compiled))
        stack.enter_context(unwidened_inputs(self.model, autocast=True))
        forget_kernels()
        return {"recomputed": chosen.num_layers, "keeps_attention": choice.is_kept}

    def step(self) -> dict[str, Any]:
        """Run forward and backward once; return seconds, loss, the gradient's norm, and the peak."""
        return timed_step(torch, self.model, self._loss, device=self.device)

    def _loss(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return row_loss(self.model, self.batch).loss


class Peer:
    """Unsloth's process: commands by a pipe, so that it runs only when it is its turn."""

    def __init__(self, options: Any) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.log = options.unsloth_log.open("w")
        environment = os.environ | ({"PYTHONPATH": options.unsloth_path} if options.unsloth_path else {})
        script = Path(__file__).with_name("unsloth_side.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],  # -P: a module beside it would stand in for a package of its name
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=self.folder.name,  # Unsloth writes what it compiles into the current folder
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()
        self.folder.cleanup()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a command: an object with "error" where it failed, or where the process has ended."""
        self._tell(do, **arguments)
        return self._hear()

    def _tell(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer will be that the process has ended
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else {"error": f"the process ended with {self.process.wait()}"}

    def begin(self, options: Any, *, most_tokens: int) -> None:
        """Have Unsloth and its model loaded."""
        self._tell(
            "open",
            folder=str(options.base.resolve()),
            quantize=options.mode == "qlora",
            most_tokens=most_tokens,
            rank=LORA.rank,
            alpha=LORA.alpha,
        )

    def versions(self) -> dict[str, Any] | None:
        """Wait until all is loaded; return and print versions, or None, with the error printed."""
        answer = self._hear()
        print(f"{answer['error']}\n{ABSENT}" if "error" in answer else json.dumps(answer), flush=True)
        return None if "error" in answer else answer

    def read(self, row: Any) -> dict[str, Any]:
        """Hand a row over as `export` writes it; in padded rows where packs are not isolated, and say which."""
        path = Path(self.folder.name) / "row.parquet"
        write_rows(path, iter([as_columns(row)]))
        self.ask("read", path=str(path), padded=False)
        if len(row.segment_lengths) < 3:  # isolation is judged by an episode after the second
            return {"unsloth_isolates_packs": None, "unsloth_way": "one row"}
        self.ask("enter", way="unsloth")
        answer = self.ask("isolates")
        isolates = answer.get("isolates", False)
        if not isolates:
            self.ask("read", path=str(path), padded=True)
        about = {"unsloth_isolates_packs": isolates, "unsloth_way": "packed" if isolates else "padded rows"}
        return about | ({"packed_error": answer["error"]} if "error" in answer else {})


def describe(result: dict[str, Any]) -> str:
    """Return a few lines for a person."""
    ours, theirs = result["pair"].split(":")
    lines = [
        f"{result['shape']} {result['mode']}, {result['kind']}, {result['tokens']:,} tokens,"
        f" {result['episodes']} episodes, ours {ours}, Unsloth {theirs}:"
    ]
    if result.get("unsloth_isolates_packs") is False:
        why = result.get("packed_error", "does not keep a pack's episodes apart here")
        lines.append(f"  Unsloth, packed: {why}; its padded rows were timed")
    for name in ("ours", "unsloth"):
        if f"{name}_error" in result:
            lines.append(f"  {name}: {result[f'{name}_error']}")
        elif name in result.get("time_s", {}):
            time_s, peak = result["time_s"][name], result["peak_bytes"][name]
            how = f"{result['recomputed']} layers recomputed" if name == "ours" else result["unsloth_way"]
            lines.append(
                f"  {name:7} {result['tokens_per_s'][name]:>9,.0f} tokens/s, {time_s['median']:.3f} s"
                f" ({time_s['min']:.3f} to {time_s['max']:.3f}), {how}"
                + (f", peak {peak / GIB:.2f} GiB, {result['reserved_bytes'][name] / GIB:.2f} taken" if peak else "")
                + f", loss {result['loss'][name]:.6f}, gradient {result['gradient_norm'][name]:.5g}"
            )
    if "speedup" in result:
        faster = result["speedup"]
        interval = "95 % interval {:.2f} to {:.2f}, ".format(*faster["interval"]) if faster["interval"] else ""
        pairs = f"single pairs {faster['min']:.2f} to {faster['max']:.2f}"
        lines.append(f"  ours is {faster['ratio']:.2f} times as fast ({interval}{pairs})")
        if not result["losses_agree"]:
            lines.append("  THE LOSSES DIFFER: the two sides do not do the same")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
