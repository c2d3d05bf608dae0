#!/usr/bin/env python3
"""Write docs/models.md: what each of transformers' causal language models can do here, tried on a shrunk model.

    python scripts/model_classes.py [--seconds 60] [CLASS ...]

Every class of transformers' own mapping is built with few and small layers and random weights, and goes through the
trials that a real model goes through when it is loaded. Each class runs in a process of its own, with a time limit. A
class that cannot be shrunk to a model whose own forward pass works is not judged: it is listed as not tried.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from manyicl.episodes.batch import Batch, join_row
from manyicl.episodes.tokenized import TokenizedEpisode
from manyicl.errors import UserError
from manyicl.inference.sharing import sharing_fault
from manyicl.models.isolation import isolation_fault, row_attention
from manyicl.models.loss import row_loss

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TEXT_TOKENS, LONGEST = 600, 512
MOST_WEIGHTS = 20_000_000
# Sizes by the names that configs give them. Only those that a class's own config has are set.
SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "n_embd": 32, "n_head": 4, "n_layer": 2, "d_model": 32, "n_heads": 4, "n_layers": 2, "ffn_dim": 64,
    "ffn_hidden_size": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "rotary_dim": 8, "embedding_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16, "intermediate_size_mlp": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "first_k_dense_replace": 1, "mamba_d_state": 8, "state_size": 8, "lru_width": 32,
}  # fmt: skip
# What some classes need besides: their layers of each kind, or sizes that depend on one another.
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
}


def shrink(name: str) -> Any:
    """Return a small model of a class, with weights large enough that attention matters.

    Heads of keys stand to heads of queries as in the class's own default: an attention that compresses keys (MLA) has
    as many of each, and takes its head dimension from others. A default head dimension of none stays none.
    """
    known = AutoConfig.for_model(name).to_dict()
    if "text_config" in known or "vision_config" in known:
        raise ValueError("its config holds several models; its text model may be a class of its own")
    values = {key: value for key, value in SMALL.items() if known.get(key) is not None or key.endswith("token_id")}
    if known.get("num_key_value_heads") is not None and known.get("num_attention_heads") is not None:
        heads, key_heads = known["num_attention_heads"], known["num_key_value_heads"]
        values["num_key_value_heads"] = 4 if key_heads == heads else 1 if key_heads == 1 else 2
    if known.get("head_dim") is not None and "qk_rope_head_dim" not in known:
        values["head_dim"] = 8
    kinds = known.get("layer_types")
    if kinds:
        values["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:2]
    config = AutoConfig.for_model(name, **(values | OWN.get(name, {})))
    torch.manual_seed(0)
    with torch.device("meta"):
        num_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if num_weights > MOST_WEIGHTS:
        raise ValueError(f"the sizes known here leave it {num_weights / 1e6:,.0f}M weights")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in key:
                parameter.normal_(0, 0.15)
        logits = model(input_ids=torch.arange(3, 43)[None]).logits
    if not torch.isfinite(logits).all():
        raise ValueError("the shrunk model's logits are not finite")
    return model


def make_row(ids: np.ndarray) -> Batch:
    """Return two episodes in one row."""
    built = [TokenizedEpisode(part.astype(np.int32), np.array([[10, 14]])) for part in (ids[:20], ids[20:44])]
    return join_row(built, targets="all", weights=[np.ones(1)] * 2, tasks=[0, 0], episodes=(0, 1))


def try_training(model: Any, text: np.ndarray) -> dict[str, str]:
    """Return why the model cannot be trained packed, and why not alone; '' for what it can."""
    try:
        packed = isolation_fault(model, text, longest=LONGEST)
    except UserError as error:
        refused = str(error).removeprefix("model.path: ")
        return {"packed": refused, "alone": refused}
    try:
        with row_attention(model, text, longest=LONGEST):
            row_loss(model.train(), make_row(text)).loss.backward()
    except Exception as error:
        return {"packed": packed or "fails", "alone": f"a step of training FAILS UNREFUSED ({tell(error)})"}
    return {"packed": packed, "alone": ""}


def try_class(name: str) -> dict[str, str]:
    """Return what a class can do: '' for yes, else why not; or under "untried" why it was not tried."""
    try:
        model = shrink(name)
    except Exception as error:
        return {"untried": tell(error)}
    text = np.random.default_rng(0).integers(3, 399, TEXT_TOKENS).astype(np.int32)
    found = try_training(model, text)
    model.zero_grad(set_to_none=True)
    return {**found, "behind": sharing_fault(model.eval(), text)}


def tell(error: Exception) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:100].rstrip()


def run_class(name: str, pipe: Any) -> None:
    """Try a class and send what was found."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    pipe.send(try_class(name))


def run_limited(name: str, *, seconds: float) -> dict[str, str]:
    """Return what was found of a class within the time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_class, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else {"untried": f"took more than {seconds:g} s"}
    except EOFError:
        return {"untried": "its process ended"}
    finally:
        process.kill()
        process.join()


def render(found: dict[str, dict[str, str]]) -> str:
    """Return the page."""
    tried = {name: about for name, about in sorted(found.items()) if "untried" not in about}
    counts = [sum(not about[key] for about in tried.values()) for key in ("packed", "alone", "behind")]
    lines = [
        "# Which models",
        "",
        f"Made by `python scripts/model_classes.py` with transformers {transformers.__version__}, on models of each",
        "class with two small layers and random weights in float32. A real model is tried anew when it is loaded; the",
        "table says what to expect, by the name of the class in a model's config.json (`model_type`).",
        "",
        "- *Train packed*: the episodes of a row go through the model at once, and none sees another.",
        "- *Train alone*: if not packed, each episode goes through the model alone: the same objective, slower.",
        "- *Ask after a prefix*: shots are encoded once for all queries; if not, once per prompt, which is slower.",
        "",
        f"Of {len(tried)} classes {counts[0]} train packed, {counts[1]} train at all, and {counts[2]} are asked after a"
        " prefix.",
        "",
        "| class | train packed | train alone | ask after a prefix | why not |",
        "|---|---|---|---|---|",
    ]
    for name, about in tried.items():
        marks = ["no" if about[key] else "yes" for key in ("packed", "alone", "behind")]
        reasons = dict.fromkeys(about[key] for key in ("alone", "packed", "behind") if about[key])
        why = "; ".join(reason[:110] for reason in reasons).replace("|", "/")
        lines.append(f"| `{name}` | {' | '.join(marks)} | {why} |")
    lines += [
        "",
        "## Not tried",
        "",
        "No verdict: the script could not shrink these to a working model.",
        "",
    ]
    lines += [f"- `{name}`: {about['untried']}" for name, about in sorted(found.items()) if "untried" in about]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all classes, or those named, and write the page if all were tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="all if none is named")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of one class")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.classes or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[name] = run_limited(name, seconds=options.seconds)
        print(name, json.dumps(found[name]), flush=True)
    if not options.classes:
        PAGE.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
