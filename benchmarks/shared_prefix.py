"""Queries a second behind a long shared prefix, beside the matrix products' ceiling measured on the same device.

    python benchmarks/shared_prefix.py            # one GPU: a 7B-shaped Mistral, bf16, 4,096 and 32,768 tokens
    python benchmarks/shared_prefix.py --small    # any CPU: a small one, fp32, 512 and 2,048 tokens
    python benchmarks/shared_prefix.py --try      # the longest prefix only, with what might make it faster, one by one

Weights are random: only speed and agreement are measured. First the engine is compared with transformers' own forward
in fp32 on two layers (exits with 1 where they disagree; in bf16 the difference is only printed, since random weights
differ by some percent from any reference there). Every query has 64 tokens and two answers of one token. FLOPs count
the products with weights (the vocabulary's for one position a query) and those of attention, causal ones by half.

--try measures, each alone and all together, the compiled pieces of `manyicl eval --compile` (fused.py). Each is first
compared in fp32, as above.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.models.attention import partial
from manyicl.models.compiled_pieces import PIECES, fused_pieces

QUERY_TOKENS = 64
OPTIONS = [[5], [6]]
TOLERANCE = 1e-2  # nats, fp32 on a GPU


@dataclass(frozen=True)
class Setting:
    """What is measured where."""

    device: str
    dtype: torch.dtype
    shape: dict[str, int]
    prefixes: tuple[int, ...]
    num_queries: int
    product: int


GPU = Setting(
    device="cuda",
    dtype=torch.bfloat16,
    shape={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    prefixes=(4096, 32768),
    num_queries=1024,
    product=8192,
)
SMALL = Setting(
    device="cpu",
    dtype=torch.float32,
    shape={
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    prefixes=(512, 2048),
    num_queries=64,
    product=1024,
)


def main() -> None:
    """Compare, then measure the ceiling, the kernels and the engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--try", action="store_true", dest="tries", help="compiled pieces, one by one")
    options = parser.parse_args()
    setting = SMALL if options.small else GPU
    if setting.device == "cpu":
        torch.set_num_threads(1)
    compare(setting)
    ceiling = measure_ceiling(setting)
    print(f"ceiling: {ceiling / 1e12:.3f} TFLOP/s ({setting.product} x {setting.product} product, best of 10)")
    if options.tries:
        try_pieces(setting, ceiling=ceiling, repeats=options.repeats)
        return
    measure_kernels(setting)
    model = make_model(setting, dtype=setting.dtype)
    for num_prefix in setting.prefixes:
        measure_engine(model, setting, num_prefix=num_prefix, ceiling=ceiling, repeats=options.repeats)


def make_model(setting, *, dtype, **changes):
    torch.manual_seed(0)
    config = MistralConfig(**{**setting.shape, **changes}, max_position_embeddings=65536, sliding_window=None)
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def draw_ids(setting, num, *, seed):
    return np.random.default_rng(seed).integers(8, setting.shape["vocab_size"], num).astype(np.int32)


def try_pieces(setting, *, ceiling, repeats):
    """Print queries a second with each piece compiled, and with all; stop where fp32 is not near."""
    model = make_model(setting, dtype=setting.dtype)
    before = draw_ids(setting, setting.prefixes[-1], seed=2)
    prefix = encode_prefix(model, before, room=len(before))
    for names in ((), *((name,) for name in PIECES), PIECES, ()):
        label = " + ".join(names) or "as it is"
        with fused_pieces(model, names):
            if names:
                compare(setting, fp32_only=True)
            measure_rate(model, prefix, setting, ceiling=ceiling, repeats=repeats, label=f", {label}")


def compare(setting, *, fp32_only=False):
    """Print the largest difference in nats to a plain forward in fp32 on two layers; exit where fp32 is not near."""
    model = make_model(setting, dtype=torch.float32, num_hidden_layers=2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)  # so that attention matters
    before = draw_ids(setting, 1500, seed=1)
    queries = [draw_ids(setting, n, seed=n) for n in (QUERY_TOKENS, QUERY_TOKENS, 17)]
    plain = []
    for query in queries:
        ids = torch.from_numpy(np.concatenate([before, query]).astype(np.int64)).to(setting.device)[None]
        with torch.inference_mode():
            logprobs = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
        plain.append([-float(logprobs[option[0]]) for option in OPTIONS])
    default = partial.PLAN_SCORES
    cases = [("fp32", torch.float32, default), ("bf16", torch.bfloat16, default)]
    if fp32_only:
        del cases[1:]
    elif setting.device == "cuda":
        cases.append(("bf16, cuDNN's kernel", torch.bfloat16, 0))
    for label, dtype, threshold in cases:
        model = model.to(dtype)
        partial.PLAN_SCORES = threshold
        nats = score_choices(model, encode_prefix(model, before), queries, [OPTIONS] * len(queries))
        difference = float(np.abs(np.array(nats) - plain).max())
        print(f"engine against a plain fp32 forward, two layers, {label}: {difference:.1e} nats of {np.max(plain):.1f}")
        if dtype == torch.float32 and difference > TOLERANCE:
            raise SystemExit(1)
    partial.PLAN_SCORES = default


def measure_ceiling(setting):
    """Return the FLOP/s of a large square product, as fast as it gets."""
    size = setting.product
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return 2 * size**3 / min(time_runs(lambda: a @ b, setting, repeats=10))


@torch.inference_mode()
def measure_kernels(setting):
    """Print the FLOP/s of attention to the longest prefix, as one layer of a full row asks for it, by each kernel."""
    shape, num_keys = setting.shape, setting.prefixes[-1]
    num_groups, head_dim = shape["num_key_value_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    num_rows = (16384 if setting.device == "cuda" else 1024) * shape["num_attention_heads"] // num_groups
    query = torch.randn(1, num_groups, num_rows, head_dim, device=setting.device, dtype=setting.dtype)
    key, value = (
        torch.randn(1, num_groups, num_keys, head_dim, device=setting.device, dtype=setting.dtype) for _ in range(2)
    )
    flops = 4 * num_groups * num_rows * num_keys * head_dim
    default = partial.PLAN_SCORES
    for label, threshold in (("the default kernel", default), ("without cuDNN's", 1 << 62)):
        partial.PLAN_SCORES = threshold
        seconds = min(time_runs(lambda: partial.attend_part(query, key, value, scaling=None), setting))
        print(f"attention to {num_keys:,} keys, {label}: {flops / seconds / 1e12:.3f} TFLOP/s")
    partial.PLAN_SCORES = default


def measure_engine(model, setting, *, num_prefix, ceiling, repeats):
    """Encode a prefix, and print queries a second behind it."""
    before = draw_ids(setting, num_prefix, seed=2)
    encoding = time_runs(lambda: encode_prefix(model, before, room=num_prefix), setting, repeats=1)[0]
    prefix = encode_prefix(model, before, room=num_prefix)
    print(f"{num_prefix:,} tokens are encoded in {encoding:.2f} s")
    measure_rate(model, prefix, setting, ceiling=ceiling, repeats=repeats)


def measure_rate(model, prefix, setting, *, ceiling, repeats, label=""):
    """Print queries a second behind `prefix`, their spread, and the share of the ceiling."""
    queries = [draw_ids(setting, QUERY_TOKENS, seed=n) for n in range(setting.num_queries)]

    def ask():
        score_choices(model, prefix, queries, [OPTIONS] * len(queries))

    rates = [len(queries) / seconds for seconds in time_runs(ask, setting, repeats=repeats)]
    rate = statistics.median(rates)
    flops = query_flops(setting, num_prefix=prefix.num_tokens)
    print(
        f"behind {prefix.num_tokens:,} tokens{label}: {rate:.1f} queries/s"
        f" ({min(rates):.1f} to {max(rates):.1f}), {flops / 1e12:.4f} TFLOP a query,"
        f" {rate * flops / ceiling:.1%} of the ceiling",
        flush=True,
    )


def query_flops(setting, *, num_prefix):
    """Return the FLOPs of one query."""
    s = setting.shape
    head_dim = s["hidden_size"] // s["num_attention_heads"]
    attention = s["hidden_size"] * (2 * s["hidden_size"] + 2 * s["num_key_value_heads"] * head_dim)
    weights = s["num_hidden_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])
    scores = QUERY_TOKENS * (num_prefix + (QUERY_TOKENS + 1) / 2) * s["hidden_size"] * s["num_hidden_layers"]
    return 2 * weights * QUERY_TOKENS + 2 * s["hidden_size"] * s["vocab_size"] + 4 * scores


def time_runs(run, setting, *, repeats=5):
    """Return the seconds of each of some runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    main()
