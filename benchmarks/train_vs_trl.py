"""Training steps against TRL's SFTTrainer: same model, same episodes, same labels, in turn, in one process.

    pip install ".[bench]"
    python benchmarks/train_vs_trl.py [--shape small] [--tokens 512,4096] [--episode-tokens 512] [--recompute]
                                      [--whole] [--no-flash] [--json OUT]
    python benchmarks/train_vs_trl.py --model FOLDER [--tokens 4096] [--episodes 1,8,100] [--repeats 30] [--compile]
                                      [--no-graph] [--json OUT]

With --model: full fine-tuning of a real model, float32 weights, on a GPU under bfloat16 autocast. Rows of --tokens hold
1, 8 and 100 episodes. Each is given to TRL in both ways that its users have, and TRL's time is the faster one's:
"packed" (padding-free, what `packing=True` gives) and "padded" (the episodes as rows of one batch; these episodes are
of one length, so that hardly anything is padded). All sides take turns in each round. What `manyicl train` puts in
place once a run (attention, layers, and on a GPU the CUDA graph of a pass, by its own rule; --no-graph leaves it) is
there before a time begins. --compile: both sides compiled, ours layer by layer
(`train.compile`), TRL's as a whole (`torch_compile`); the losses are compared before that.

Without --model:
Filled: one episode a row. Packed: episodes of --episode-tokens in one row. A step is forward and backward of one row,
by each trainer's own loss (ours: manyicl.models.row_loss and the step's sums; TRL: SFTTrainer.compute_loss on what its
own padding-free collator makes of `input_ids`, `labels` and `seq_lengths`), float32 on a CPU and bfloat16 on a GPU.
Neither recomputes a layer; with --recompute each recomputes all, in its own way (long rows need it): ours keep their
attention's output, TRL's do not, and with --whole ours do not either. Ours takes FlashAttention 3 for long rows where
it is installed, TRL what transformers gives it (sdpa); --no-flash leaves it. Before a time is taken: both losses agree
to 1e-3, and to 1e-4 in float32 where that fits the device on both sides (bfloat16 rounds its own way on either), and a
token of a middle episode of TRL's pack is changed to see whether its neighbours' losses move. Where they do, TRL does
not isolate packs by its attention path here, this is said, and its unpacked path (the episodes as padded rows of a
batch) is timed. Peak memory: on a GPU what was allocated; on a CPU the resident peak of a process of its own a side
(--no-memory: not).
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, ratios, run_row, spread, time_in_turn, write_json

from manyicl.episodes.batch import pad_row
from manyicl.models.attention import flash
from manyicl.models.attention.dispatch import IMPLEMENTATION, segment_attention
from manyicl.models.attention.segments import forget_kernels, kernels_taken
from manyicl.models.costs import count_flops, shape_model
from manyicl.models.loading import ModelSettings, load_model
from manyicl.models.loss import row_loss
from manyicl.models.structure import decoder_layers
from manyicl.training.graph import GraphedPass, choose_graph, find_obstacle
from manyicl.training.metrics import PeakMemory, StepSums, measure_ceiling
from manyicl.training.preparation import row_multiple
from manyicl.training.recompute.layers import Recompute, prepared_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="", choices=("", *SHAPES), help="small on a CPU, llama-1b on a GPU")
    parser.add_argument("--model", help="folder of a model: rows of --tokens (4096) with --episodes, full fine-tuning")
    parser.add_argument("--episodes", default="1,8,100", help="of a row, with --model")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast with --model on a CPU as well")
    parser.add_argument("--tokens", help="lengths of rows (512,4096; with --model 4096)")
    parser.add_argument("--episode-tokens", type=int, default=512, help="of the episodes of a packed row")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are targets")
    parser.add_argument("--repeats", type=int, default=7, help="an interval needs six")
    parser.add_argument("--recompute", action="store_true", help="all layers on both sides")
    parser.add_argument("--compile", action="store_true", help="with --model: both sides, each in its own way")
    parser.add_argument("--no-graph", action="store_true", help="with --model: ours without a CUDA graph of the pass")
    parser.add_argument("--whole", action="store_true", help="--recompute, and ours recompute their attention too")
    parser.add_argument("--no-flash", action="store_true", help="without FlashAttention 3, also where it is installed")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # SIDE:TOKENS:EPISODE_TOKENS, in a process of its own
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.no_flash:
        flash.is_usable = lambda: False
    options.recompute |= options.whole
    options.shape = options.shape or ("llama-1b" if device.type == "cuda" else "small")
    if options.peak_of:
        print(peak_of(options, device))
        return
    if options.model:
        compare_real(options, device=device)
        return
    rows = []
    for num_tokens in (int(t) for t in (options.tokens or "512,4096").split(",")):
        for kind, episode_tokens in (("filled", num_tokens), ("packed", options.episode_tokens)):
            if kind == "packed" and num_tokens < 3 * episode_tokens:
                continue  # isolation is judged by a middle episode
            rows.append(compare(options, kind, num_tokens, episode_tokens, device=device))
            print(describe(rows[-1]), flush=True)
            write_json(options.json, rows)


def compare_real(options, *, device):
    """Time a real model's rows on both sides in turn; print each row, and write all of them."""
    autocast = options.autocast or device.type == "cuda"
    num_tokens, counts = int(options.tokens or 4096), [int(n) for n in options.episodes.split(",")]
    model = load_model(ModelSettings(path=options.model, precision="fp32")).to(device).train()
    peer_model = copy.deepcopy(model)
    config, ways = model.config, {}
    shape = shape_model(config)
    made = {number: make_real(number, num_tokens, options, vocab_size=config.vocab_size) for number in counts}
    for number, episodes in made.items():
        ours = OurSide(
            model,
            episodes,
            device=device,
            recompute=options.recompute,
            whole=options.whole,
            autocast=autocast,
            compiled=options.compile,
            graphed=not options.no_graph,
        )
        packed = PeerSide(peer_model, episodes, recompute=options.recompute, autocast=autocast)
        ways[number] = {"ours": ours, "packed": packed}
        if number > 1:
            ways[number]["padded"] = PeerSide(peer_model, episodes, recompute=options.recompute, autocast=autocast)
            ways[number]["padded"].unpack()
    results, isolates = {}, {number: number == 1 or ways[number]["packed"].isolates() for number in counts}
    for number, sides in ways.items():
        if not isolates[number]:
            del sides["packed"]
        check_losses(number, sides, autocast=autocast)
    steps = {(number, name): side.step for number, sides in ways.items() for name, side in sides.items()}
    around = {(number, "ours"): sides["ours"].prepared for number, sides in ways.items()}
    ceiling = measure_ceiling(device, seconds=3.0)
    for sides in ways.values():
        sides["ours"].forget_graph()  # of layers that were not compiled yet
    with compiled_layers(model, peer_model, checkpointed=ours.checkpointed) if options.compile else nullcontext():
        seconds = time_in_turn(steps, repeats=options.repeats, device=device, warmups=3, around=around)
    for number, episodes in made.items():
        own = {name: values for (count, name), values in seconds.items() if count == number}
        peers = {name: values for name, values in own.items() if name != "ours"}
        best = min(peers, key=lambda name: spread(peers[name])["median"])
        lengths = [len(episode.ids) for episode in episodes]
        num_targets = sum(int((episode.spans[:, 1] - episode.spans[:, 0]).sum()) for episode in episodes)
        flops = count_flops(shape, lengths, num_targets=num_targets)
        whole = seconds[counts[0], "ours"]
        results[number] = {
            "tokens": num_tokens,
            "episodes": number,
            "autocast": autocast,
            "compiled": options.compile,
            "cuda_graph": ways[number]["ours"].graph_reason,
            "kernels": ways[number]["ours"].kernels,
            "peer_attention": ways[number][best].attention,
            "peer_packs_isolated": isolates[number],
            "peer_way": best,
            "time_s": {name: spread(values) for name, values in own.items()},
            "tokens_per_s": {name: num_tokens / spread(values)["median"] for name, values in own.items()},
            "mfu": None
            if ceiling is None
            else {name: flops / spread(values)["median"] / ceiling for name, values in own.items()},
            "speedup": ratios(own["ours"], own[best]),
            "share_of_first_row": spread([first / time for first, time in zip(whole, own["ours"], strict=True)]),
        }
        print(describe_real(results[number]), flush=True)
    write_json(options.json, {"model": Path(options.model).name, "ceiling_flops": ceiling, "rows": results})


def make_real(number, num_tokens, options, *, vocab_size):
    """Return so many random episodes, alike in length."""
    lengths = [num_tokens * (n + 1) // number - num_tokens * n // number for n in range(number)]
    return [
        episode
        for length in lengths
        for episode in make_episodes(length, episode_tokens=length, target_share=options.share, vocab_size=vocab_size)
    ]


@contextmanager
def compiled_layers(model, peer_model, *, checkpointed):
    """Compile our layers as `train.compile` does, and TRL's model as the Trainer's `torch_compile` does."""
    peer_model.compile()
    with prepared_layers(model, checkpointed, compiled=True):
        yield


def check_losses(number, sides, *, autocast):
    """Stop if the first losses of a row differ from ours; in float32 they must be alike."""
    losses = {name: side.step() for name, side in sides.items()}
    exact = {name: exact_loss(side) for name, side in sides.items()}
    for name in sides:
        assert differ((losses[name], losses["ours"])) <= (1e-2 if autocast else 1e-3), f"{number} episodes: {losses}"
        known = None not in (exact[name], exact["ours"])
        assert not known or differ((exact[name], exact["ours"])) <= 1e-4, f"{number} episodes, in float32: {exact}"


def describe_real(result):
    """Return a few lines for a person."""
    lines = [f"{result['episodes']} episodes in {result['tokens']:,} tokens:"]
    for name, time_s in result["time_s"].items():
        mfu = f", MFU {result['mfu'][name]:.1%}" if result["mfu"] else ""
        lines.append(
            f"  {name if name == 'ours' else 'TRL ' + name:11} {result['tokens_per_s'][name]:>9,.0f} tokens/s{mfu},"
            f" {1e3 * time_s['median']:.1f} ms ({1e3 * time_s['min']:.1f} to {1e3 * time_s['max']:.1f})"
        )
    kernels = ", ".join(f"{name} ({count} times)" for name, count in result["kernels"].items())
    lines.append(f"  attention: ours {kernels}; TRL {result['peer_attention']}")
    lines.append(f"  ours as a CUDA graph: {result['cuda_graph']}")
    if not result["peer_packs_isolated"]:
        lines.append("  TRL's attention does not keep a pack's episodes apart here: its packed row is not timed")
    faster, share = result["speedup"], result["share_of_first_row"]
    interval = "95 % interval {:.2f} to {:.2f}, ".format(*faster["interval"]) if faster["interval"] else ""
    lines.append(
        f"  ours is {faster['ratio']:.2f} times as fast ({interval}single pairs {faster['min']:.2f} to"
        f" {faster['max']:.2f}); {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) of our first row's"
        " tokens/s"
    )
    return "\n".join(lines)


def compare(options, kind, num_tokens, episode_tokens, *, device):
    """Check that both sides do the same, then time them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = SHAPES[options.shape]()
    gc.collect()  # what the row before has left: a trainer refers to itself
    model = make_model(config, device=device, dtype=dtype)
    episodes = make_episodes(
        num_tokens, episode_tokens=episode_tokens, target_share=options.share, vocab_size=config.vocab_size
    )
    peer = PeerSide(copy.deepcopy(model), episodes, recompute=options.recompute)
    ours = OurSide(model, episodes, device=device, recompute=options.recompute, whole=options.whole)
    isolates = len(episodes) == 1 or peer.isolates()
    if not isolates:
        peer.unpack()
    about = {"kind": kind, "recompute": options.recompute, "whole": options.whole}
    about |= {"tokens": num_tokens, "episodes": len(episodes)}
    full = [name for name, side in (("ours", ours), ("trl", peer)) if not fits(side, recompute=options.recompute)]
    if full:
        return {**about, "out_of_memory": full}
    losses = ours.step(), peer.step()
    exact = [exact_loss(side) for side in (ours, peer)]
    assert differ(losses) <= 1e-3, f"first losses differ: {losses}"
    assert None in exact or differ(exact) <= 1e-4, f"first losses differ in float32: {exact}"
    sides = {"ours": ours.step, "trl": peer.step}
    seconds = time_in_turn(sides, repeats=options.repeats, device=device)
    result = {
        **about,
        "first_losses": losses,
        "exact_losses": exact,
        "attention": {"ours": f"{IMPLEMENTATION}, {ours.flash or 'torch'}", "trl": peer.attention},
        "trl_isolates_packs": None if len(episodes) == 1 else isolates,
        "time_s": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_s": {name: num_tokens / spread(values)["median"] for name, values in seconds.items()},
        "speedup": ratios(seconds["ours"], seconds["trl"]),
    }
    if not options.no_memory and device.type == "cuda":
        result["peak_bytes"] = {"ours": cuda_peak(ours, peer, device), "trl": cuda_peak(peer, ours, device)}
    elif not options.no_memory:
        result["peak_bytes"] = {name: child_peak(options, name, rows=(num_tokens, episode_tokens)) for name in sides}
    return result


def differ(losses):
    """Return by which share of the second the first differs."""
    return abs(losses[0] - losses[1]) / abs(losses[1])


def exact_loss(side):
    """Return a side's loss in float32; None where that does not fit the device's memory."""
    try:
        return side.exact_loss()
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # behind the block, which holds the step's tensors by its traceback
    return None


def fits(side, *, recompute):
    """Return whether a step fits the device's memory; check that its layers run as often as they should."""
    try:
        runs = count_runs(side)
    except torch.OutOfMemoryError:
        runs = None
    if runs is None:  # behind the block, which holds the step's tensors by its traceback
        side.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return False
    assert runs == (2 if recompute else 1), f"{type(side).__name__}: a layer ran {runs} times"
    return True


def count_runs(side):
    """Return how often the first layer runs forward in one step."""
    runs = []
    handle = decoder_layers(side.model)[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        side.step()
    finally:
        handle.remove()
    return len(runs)


class OurSide:
    """One row through ours."""

    def __init__(
        self, model, episodes, *, device, recompute, whole, autocast=False, compiled=False, graphed=False
    ) -> None:
        self.model, self.flash, self.kernels = model, None, {}
        self.is_prepared, self.compiled = False, compiled
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        self.checkpointed = Recompute(len(decoder_layers(model)) if recompute else 0, keep_attention=not whole)
        row = make_row(episodes)
        multiple = row_multiple(row.num_tokens, device=device, compiled=compiled)
        self.batch = (pad_row(row, multiple=multiple) if multiple > 1 else row).to(device)
        self.sums, self.graph = StepSums(device), None
        self.is_graphed, self.graph_reason = choose_graph(
            "auto" if graphed else False,
            obstacle=find_obstacle(
                model, fault="", is_wrapped=False, recompute=self.checkpointed, is_half=autocast, quantize=None
            ),
            pass_flops=count_flops(
                shape_model(model.config), row.segment_lengths, num_targets=len(row.target_positions_N)
            ),
        )

    def step(self) -> float:
        with self.prepared() if not self.is_prepared else nullcontext():
            self.model.zero_grad(set_to_none=True)
            if self.is_graphed and self.graph is None:
                self.graph = GraphedPass(self.run, self.model.parameters(), num_tokens=self.batch.num_tokens)
            scored = self.graph(self.batch) if self.graph is not None else self.run(self.batch)
            self.sums.add(self.batch, scored)
            return float(scored.loss)

    def run(self, batch):
        """Run a row forward and backward."""
        return run_row(self.model, batch, autocast=self.autocast)

    def forget_graph(self) -> None:
        """Have the next step make a new one."""
        self.graph = None

    @contextmanager
    def prepared(self):
        """Put attention and layers in place, as `manyicl train` does once a run."""
        with (
            segment_attention(self.model, row_tokens=self.batch.input_ids_1T.shape[1]),
            nullcontext() if self.compiled else prepared_layers(self.model, self.checkpointed, compiled=False),
        ):
            self.flash = flash.flash_implementation()
            forget_kernels()
            self.is_prepared = True
            try:
                yield
            finally:
                self.is_prepared = False
            self.kernels = kernels_taken() or self.kernels

    def exact_loss(self) -> float:
        """Return the loss in float32."""
        with in_float32(self.model), segment_attention(self.model), torch.no_grad():
            return float(row_loss(self.model, self.batch).loss)


class PeerSide:
    """The same row through TRL's SFTTrainer."""

    def __init__(self, model, episodes, *, recompute, autocast=False) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        self.episodes = episodes
        self.rows = [as_columns([e]) for e in episodes]
        self.folder = tempfile.TemporaryDirectory()
        arguments = SFTConfig(
            output_dir=self.folder.name,
            padding_free=True,
            max_length=None,
            gradient_checkpointing=recompute,  # TRL's own default is to recompute all layers
            bf16=autocast,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        self.trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list([as_columns(episodes)]),
            processing_class=stand_in_tokenizer(),
        )
        if recompute:  # the Trainer would turn it on in train(), which is not run here
            self.trainer.model.activation_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        self.collate = self.trainer.data_collator
        self.attention = f"{model.config._attn_implementation}, padding-free"
        self.inputs = self.prepare([as_columns(episodes)])

    def prepare(self, rows):
        return self.trainer._prepare_inputs(self.collate(rows))

    def step(self) -> float:
        self.trainer.model.zero_grad(set_to_none=True)
        self.trainer.model.train()
        with self.trainer.accelerator.autocast():
            loss = self.trainer.compute_loss(self.trainer.model, dict(self.inputs))
        loss.backward()
        return float(loss.detach())

    @property
    def model(self):
        return self.trainer.model

    def exact_loss(self) -> float:
        """Return the loss in float32."""
        with in_float32(self.model), torch.no_grad():
            return float(self.trainer.compute_loss(self.model, dict(self.inputs)))

    def isolates(self) -> bool:
        """Return whether a changed token of a middle episode moves no loss behind it."""
        changed = [copy.deepcopy(e) for e in self.episodes]
        changed[1].ids[2] = 3 if changed[1].ids[2] != 3 else 4
        found = []
        for episodes in (self.episodes, changed):
            columns = as_columns(episodes)
            bound = len(episodes[0].ids) + len(episodes[1].ids)
            columns["labels"] = [-100] * bound + columns["labels"][bound:]
            with torch.no_grad():
                inputs = self.prepare([columns])
                found.append(float(self.trainer.compute_loss(self.trainer.model, inputs)))
        return found[0] == found[1]

    def unpack(self) -> None:
        """Give the episodes as rows of a padded batch."""
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self.collate = DataCollatorForLanguageModeling(pad_token_id=0)
        rows = [{k: v for k, v in row.items() if k != "seq_lengths"} for row in self.rows]
        self.inputs = self.prepare(rows)
        self.attention = self.attention.replace("padding-free", "padded rows")


@contextmanager
def in_float32(model):
    """Widen the weights in the block; they come back as they were, to the bit. Buffers are float32 as they are."""
    before = next(model.parameters()).dtype
    model.zero_grad(set_to_none=True)
    try:
        cast_weights(model, torch.float32)
        yield
    finally:
        cast_weights(model, before)


def cast_weights(model, dtype):
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def as_columns(episodes):
    """Return a row of TRL's: ids, labels (not shifted), and the lengths of its episodes."""
    ids, labels = [], []
    for episode in episodes:
        own = [-100] * len(episode.ids)
        for start, stop in episode.spans.tolist():
            own[start:stop] = episode.ids[start:stop].tolist()
        ids += episode.ids.tolist()
        labels += own
    return {"input_ids": ids, "labels": labels, "seq_lengths": [len(e.ids) for e in episodes]}


def stand_in_tokenizer():
    """Return a tokenizer that TRL can ask for its special tokens; no text is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def cuda_peak(side, other, device):
    """Return the most that is allocated in a step of one side: its weights, and all that comes to what is there."""
    for each in (side, other):
        each.model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) - sum(p.nbytes for p in side.model.parameters())
    peak = PeakMemory(device)
    side.step()
    return peak.read() - before


def child_peak(options, side, *, rows):
    """Return the resident peak of a step in a process of its own, less what it held before; None where not known."""
    script = [sys.executable, __file__, "--shape", options.shape, "--share", str(options.share)]
    script += [f"--{name}" for name in ("recompute", "whole") if getattr(options, name)]
    done = subprocess.run(
        [*script, "--peak-of", f"{side}:{rows[0]}:{rows[1]}"], capture_output=True, text=True, check=True
    )
    last = done.stdout.split()[-1]
    return None if last == "None" else int(last)


def peak_of(options, device):
    side, num_tokens, episode_tokens = options.peak_of.split(":")
    config = SHAPES[options.shape]()
    model = make_model(config, device=device, dtype=torch.float32)
    episodes = make_episodes(
        int(num_tokens), episode_tokens=int(episode_tokens), target_share=options.share, vocab_size=config.vocab_size
    )
    recompute = options.recompute
    one = (
        OurSide(model, episodes, device=device, recompute=recompute, whole=options.whole)
        if side == "ours"
        else PeerSide(model, episodes, recompute=recompute)
    )
    if side == "trl" and len(episodes) > 1 and not one.isolates():
        one.unpack()
    before = PeakMemory(device).read()
    peak = PeakMemory(device)
    one.step()
    after = peak.read()
    return None if before is None or after is None else after - before


def describe(result):
    """Return a few lines for a person."""
    if "out_of_memory" in result:
        return (
            f"{result['kind']}, {result['tokens']:,} tokens, {result['episodes']} episodes: out of memory:"
            f" {', '.join(result['out_of_memory'])}"
        )
    time_s, speed, faster = result["time_s"], result["tokens_per_s"], result["speedup"]
    lines = [f"{result['kind']}, {result['tokens']:,} tokens, {result['episodes']} episodes:"]
    lines += [
        f"  {name:5} {speed[name]:>9,.0f} tokens/s, {time_s[name]['median']:.3f} s ({time_s[name]['min']:.3f} to"
        f" {time_s[name]['max']:.3f}), attention {result['attention'][name]}"
        + (f", peak {result['peak_bytes'][name] / 2**20:,.0f} MiB" if result.get("peak_bytes", {}).get(name) else "")
        for name in ("ours", "trl")
    ]
    (ours, peers), (exact, exact_peers) = result["first_losses"], result["exact_losses"]
    told = [f"{value:.6f}" if value is not None else "does not fit" for value in (exact, exact_peers)]
    lines.append(f"  losses {ours:.6f} and {peers:.6f}; in float32 {told[0]} and {told[1]}")
    interval = "95 % interval {:.2f} to {:.2f}, ".format(*faster["interval"]) if faster["interval"] else ""
    pairs = f"single pairs {faster['min']:.2f} to {faster['max']:.2f}"
    lines.append(f"  ours is {faster['ratio']:.2f} times as fast ({interval}{pairs})")
    if result["trl_isolates_packs"] is False:
        lines.append("  TRL's attention path does not keep a pack's episodes apart here; its padded rows were timed")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
