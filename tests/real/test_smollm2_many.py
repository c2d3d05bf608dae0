"""The packaged adapter `smollm2-many`: what the README shows of it, and its size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from manyicl.cli.app import app
from manyicl.models.loading import ModelSettings, load_config, read_note
from manyicl.models.places import SMOLLM2_MANY, find_built_base

ROOT = Path(__file__).parents[2]


def test_it_is_a_bf16_adapter_of_at_most_12_mb_on_a_base_by_its_hub_name():
    weights = SMOLLM2_MANY / "adapter_model.safetensors"
    assert weights.stat().st_size < 12_000_000
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (not a dict)
    assert '"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"' in (
        SMOLLM2_MANY / "adapter_config.json"
    ).read_text(encoding="utf-8")
    assert read_note("smollm2-many").token_budget == 8192


def test_a_base_is_taken_from_where_make_bases_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYICL_BASES", str(tmp_path))
    assert find_built_base() is None
    (tmp_path / "smollm2-135m").mkdir()
    assert find_built_base() is None  # begun, not finished
    (tmp_path / "smollm2-135m" / "SOURCE.json").write_text("{}")
    assert find_built_base() == tmp_path / "smollm2-135m"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_session_in_the_readme_prints_what_it_shows(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYICL_BASES", str(smollm2.parent))
    assert load_config(ModelSettings(path="smollm2-many")).num_hidden_layers == 30
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    session = re.search(r"<!-- ask-session -->\n```console\n(.*?)```", readme, flags=re.DOTALL).group(1)
    shown = {
        command: printed.splitlines()
        for command, _, printed in (part.partition("\n") for part in session.split("$ ") if part)
    }
    head, questions, ask = shown
    assert shown[head] == (ROOT / head.split()[-1]).read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "questions.txt").write_text("\n".join(shown[questions]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("docs/") else word for word in shlex.split(ask)[1:]]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert [*result.stderr.splitlines(), *result.stdout.splitlines()] == shown[ask]
