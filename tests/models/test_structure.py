"""What a config says of its layers, for classes whose layers differ; and that such a class is trained and asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyicl.inference.budget import row_budget
from manyicl.inference.sharing import sharing_fault
from manyicl.models.costs import shape_model
from manyicl.models.isolation import isolation_fault
from manyicl.models.structure import boundaries, common_window, head_dims, key_heads, layer_windows, replaced


@pytest.fixture
def gemma4():
    """A Gemma 4 of two layers: a window of 16 with heads of 8, and full attention with heads of 16."""
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        vocab_size_per_layer_input=400,
        hidden_size_per_layer_input=8,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def test_gemma_4s_layers_have_their_own_heads_and_windows(gemma4):
    """B10: transformers refuses config.head_dim of this class, which ended train and eval in a traceback."""
    config = gemma4.config
    assert head_dims(config) == (8, 16)
    assert key_heads(config) == (2, 2)
    assert layer_windows(config) == (16, None)
    assert (boundaries(config), common_window(config)) == ([16], None)
    assert shape_model(config).head_dims == (8, 16)
    # Keys and values of one token, in float32: 2 heads of 8 and 2 heads of 16.
    assert row_budget(gemma4).key_bytes == 4 * 2 * (2 * 8 + 2 * 16)


def test_gemma_4_trains_packed_and_is_asked_behind_a_prefix(gemma4):
    text = np.random.default_rng(0).integers(3, 399, 700).astype(np.int32)
    assert isolation_fault(gemma4, text, longest=64) == ""
    assert sharing_fault(gemma4, text) == ""


def test_overlapping_blocks_leave_what_was_there_before_all_of_them():
    class Owner:
        own = "own"

    first, second = replaced(Owner, "own", "first"), replaced(Owner, "own", "second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Owner.own == "second"
    second.__exit__(None, None, None)
    assert Owner.own == "own"
    one = Owner()
    with replaced(one, "own", "its"):
        assert one.own == "its"
    assert vars(one) == {}  # it is the class's again
