"""A saved prefix is the one that was encoded, or an error that says which part of its key differs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from manyicl.errors import UserError
from manyicl.inference.prefix import encode_prefix
from manyicl.inference.prefix_files import load_prefix, prefix_key, save_prefix
from manyicl.models.attention.dispatch import EMPTY_PREFIX
from tests.conftest import CONFIGS, tiny_model
from tests.inference.test_prefix import some_ids
from tests.support.answers import answer_nats


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_prefix_comes_back_to_the_bit_and_can_be_extended(tmp_path, name):
    model, ids = tiny_model(name), some_ids(40)
    prefix = encode_prefix(model, ids[:30])
    save_prefix(tmp_path / "p.safetensors", prefix, model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    loaded = load_prefix(tmp_path / "p.safetensors", model=model, ids=ids[:30])
    asked = [(some_ids(5), [3, 4])]
    assert answer_nats(model, loaded, asked) == answer_nats(model, prefix, asked)
    longer = [encode_prefix(model, ids[30:], after=p) for p in (prefix, loaded)]
    assert answer_nats(model, longer[0], asked) == answer_nats(model, longer[1], asked)


def test_a_prefix_of_something_else_is_refused_and_the_part_is_named(tmp_path):
    model, ids, path = tiny_model("llama"), some_ids(20), tmp_path / "p.safetensors"
    save_prefix(path, encode_prefix(model, ids), model=model)
    with pytest.raises(UserError, match=r"p\.safetensors: was encoded with other token ids than asked for; encode it"):
        load_prefix(path, model=model, ids=ids[:19])
    with pytest.raises(UserError, match="other weights than"):
        load_prefix(path, model=tiny_model("llama", seed=1), ids=ids)
    with pytest.raises(UserError, match="other config and weights than"):
        load_prefix(path, model=tiny_model("mistral", seed=1), ids=ids)
    with pytest.raises(UserError, match="other weights and dtype than"):
        load_prefix(path, model=tiny_model("llama").bfloat16(), ids=ids)


def test_an_adapter_is_part_of_the_key(tmp_path):
    model, ids, path = tiny_model("llama"), some_ids(20), tmp_path / "p.safetensors"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    save_prefix(path, encode_prefix(adapted, ids), model=adapted)
    with adapted.disable_adapter(), pytest.raises(UserError, match="other adapter than"):
        load_prefix(path, model=adapted, ids=ids)
    assert load_prefix(path, model=adapted, ids=ids).num_tokens == 20
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_A" in n)[0, 0] += 1
    with pytest.raises(UserError, match="other adapter than"):
        load_prefix(path, model=adapted, ids=ids)


def test_any_one_changed_weight_changes_the_key_and_nothing_else_does():
    model, ids = tiny_model("llama"), some_ids(5)
    key = prefix_key(model, ids)
    assert prefix_key(tiny_model("llama"), ids.copy()) == key
    assert prefix_key(model.train(), ids).digest == key.digest
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert prefix_key(model, ids).weights != key.weights
    assert prefix_key(model, ids).digest != key.digest
    assert prefix_key(model, ids).config == key.config


def test_a_file_that_is_no_prefix_is_one_line(tmp_path):
    model, ids, path = tiny_model("llama"), some_ids(5), tmp_path / "p.safetensors"
    with pytest.raises(UserError, match="cannot be read as a saved prefix"):
        load_prefix(path, model=model, ids=ids)
    path.write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read as a saved prefix"):
        load_prefix(path, model=model, ids=ids)
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match="is not a saved prefix"):
        load_prefix(path, model=model, ids=ids)
    with pytest.raises(ValueError, match="cannot be saved"):
        save_prefix(path, EMPTY_PREFIX, model=model)


def test_a_cut_file_is_refused(tmp_path):
    model, ids, path = tiny_model("llama"), some_ids(20), tmp_path / "p.safetensors"
    save_prefix(path, encode_prefix(model, ids), model=model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as a saved prefix"):
        load_prefix(path, model=model, ids=np.asarray(ids))
