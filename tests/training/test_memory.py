"""How many packs a row joins: enough to keep a GPU at work, as many as fit, and one where joining gains nothing."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, MistralConfig

from manyicl.errors import UserError
from manyicl.models.costs import count_flops, shape_model
from manyicl.training.memory.choice import GpuShare, choose_packs, predict_memory, resolve_packs
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.recipe import RunConfig, with_batch
from manyicl.training.recompute.layers import Recompute

GIB = 1 << 30
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
MISTRAL_7B = MistralConfig(
    vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, sliding_window=None,
)  # fmt: skip


def recipe(*, pack_tokens: int = 4096, lora: bool = False, **train: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "tasks": {"folder": "t"},
            "model": {"path": "m", "precision": "bf16", **({"lora": {}} if lora else {})},
            "episodes": {"token_budget": pack_tokens},
            "train": {"num_steps": 1, **train},
        }
    )


def row_of(config: RunConfig) -> Row:
    """Return a full row of which a tenth are targets."""
    return Row(config.row_tokens, config.row_tokens // 10, config.model.precision)


def resolve(model_config, config: RunConfig, **options):
    shape = shape_model(model_config, lora=config.model.lora)
    flops = count_flops(shape, [config.pack_tokens], num_targets=config.pack_tokens // 10)
    return resolve_packs(config, model_config=model_config, **{"pack_flops": flops, "row_of": row_of, **options})


@pytest.mark.parametrize(
    ("num_packs", "pack_tokens", "pack_flops", "most_that_fit", "expected"),
    [
        (8, 4096, 3e12, 99, 8),  # a small model: 2.4e13 FLOPs in all packs, which are not enough
        (8, 4096, 6e13, 99, 2),  # 1.2e14 are
        (8, 4096, 3e13, 99, 4),  # 6e13 in two are not, 1.2e14 in four are
        (8, 8192, 3e14, 99, 1),  # a 7B model
        (8, 4096, 3e12, 5, 4),  # of 8, 4, 2 and 1
        (8, 4096, 3e12, 0, 1),  # one is not asked
        (7, 4096, 3e12, 99, 7),
        (7, 4096, 3e12, 6, 1),
        (6, 4096, 4e13, 99, 3),
        (32, 4096, 1e11, 99, 16),  # 65,536 tokens
        (8, 131072, 1e12, 99, 1),  # longer by itself
        (1, 512, 1e9, 99, 1),
    ],
)
def test_a_row_joins_as_few_packs_as_keep_a_gpu_at_work_and_as_fit(
    num_packs, pack_tokens, pack_flops, most_that_fit, expected
):
    chosen = choose_packs(
        num_packs, pack_tokens=pack_tokens, pack_flops=pack_flops, fits=lambda number: number <= most_that_fit
    )
    assert chosen.number == expected


@pytest.mark.parametrize(
    ("num_packs", "pack_flops", "most_that_fit", "reason"),
    [
        (8, 6e13, 99, "a pass has 1.2e+14 FLOPs, which keep a GPU at work"),
        (8, 1e12, 2, "more would not fit the memory"),
        (8, 1e12, 99, "all that a step has for a rank"),
        (32, 1e12, 99, "a row has 65,536 tokens at most"),
    ],
)
def test_why_so_many_packs_are_joined_is_said(num_packs, pack_flops, most_that_fit, reason):
    chosen = choose_packs(num_packs, pack_tokens=4096, pack_flops=pack_flops, fits=lambda n: n <= most_that_fit)
    assert chosen.reason == reason


@pytest.mark.slow
def test_a_small_model_joins_the_packs_of_its_rank_and_a_7b_one_none():
    small, large = recipe(), recipe(pack_tokens=8192, lora=True)
    assert resolve(SMOLLM2, small, free_bytes=130 * GIB).number == 8
    assert resolve(SMOLLM2, small, free_bytes=130 * GIB, num_ranks=4).number == 2
    assert (
        resolve(SMOLLM2, small, free_bytes=130 * GIB, num_ranks=3).reason
        == "3 ranks cannot share the 8 packs of a step"
    )
    assert resolve(MISTRAL_7B, large, free_bytes=130 * GIB).number == 1
    assert resolve(SMOLLM2, small, free_bytes=None).number == 1  # a CPU


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["auto", "none"])
def test_joined_packs_need_no_more_recomputed_layers_than_one(recompute):
    config = recipe(recompute=recompute)
    peaks = {
        n: predict_memory(measure_footprint(SMOLLM2, row_of(with_batch(config, n))), Recompute(0)).total_bytes
        for n in (2, 4)
    }
    assert resolve(SMOLLM2, config, free_bytes=int(peaks[4] / 0.92) + 1).number == 4
    assert resolve(SMOLLM2, config, free_bytes=int(peaks[4] / 0.92) - 1000).number == 2
    assert resolve(SMOLLM2, config, free_bytes=int(peaks[2] / 0.92) - 1000).number == 1
    # Of two processes that see the same memory free, each counts on half.
    assert resolve(SMOLLM2, config, free_bytes=2 * int(peaks[4] / 0.92) + 2, gpu_share=GpuShare(0.5)).number == 4
    assert resolve(SMOLLM2, config, free_bytes=2 * int(peaks[4] / 0.92) - 2000, gpu_share=GpuShare(0.5)).number == 2


@pytest.mark.slow
def test_beside_other_processes_packs_are_joined_that_fit_recomputed():
    """They wait for each other's kernels: five SmolLM2 on a GPU trained three times as much with four packs a row."""
    four = measure_footprint(SMOLLM2, row_of(with_batch(recipe(), 4)))
    peak = predict_memory(four, Recompute(four.num_layers, keep_attention=False)).total_bytes
    free, part = int(peak / 0.92) + 1, GpuShare(is_part=True)
    assert resolve(SMOLLM2, recipe(), free_bytes=free, gpu_share=part).number == 4
    assert resolve(SMOLLM2, recipe(), free_bytes=free - 1000, gpu_share=part).number == 2
    assert resolve(SMOLLM2, recipe(), free_bytes=free).number == 1
    assert resolve(SMOLLM2, recipe(recompute="none"), free_bytes=free, gpu_share=part).number == 1  # as the recipe says


def test_what_is_not_known_is_said_and_no_pack_is_joined():
    def refuse(_: RunConfig) -> Row:
        raise UserError("llama: its memory cannot be predicted")

    chosen = resolve(SMOLLM2, recipe(), free_bytes=130 * GIB, row_of=refuse)
    assert chosen.number == 1
    assert chosen.reason == "the memory of more is not known: llama: its memory cannot be predicted"
    unknown = resolve(SMOLLM2, recipe(), free_bytes=130 * GIB, pack_flops=None)
    assert (unknown.number, unknown.reason) == (1, "the model's FLOPs are not known")
