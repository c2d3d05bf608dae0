"""Models in and out: what Hugging Face's classes make of what we save, and how a wrong model is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from manyicl.episodes.template import TemplateSettings
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import (
    MODEL_NOTE,
    LoraSettings,
    ModelNote,
    ModelSettings,
    load_config,
    load_end_ids,
    load_model,
    load_tokenizer,
    read_note,
)
from manyicl.models.places import locate_model
from manyicl.models.saving import hash_weights, merge_adapter, save_model
from manyicl.models.structure import check_window, common_window, max_tokens_of
from tests.conftest import CONFIGS, make_task, tiny_model, train_tokenizer

IDS = torch.arange(3, 60)[None]
EXTENDED = {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}
NOTE = ModelNote(template=TemplateSettings(input="{input} ="), trained_shots={"animals": 7})


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS, use_cache=False).logits


def assert_agree(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of float32, on the scale of the logits."""
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with `base`, an adapter on it, the same with changed positions, and each merged. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "base")
    train_tokenizer("bpe").save_pretrained(folder / "base")
    for name, changes in (("adapter", {}), ("extended-adapter", EXTENDED)):
        model = load_model(base_settings(folder, config=changes, lora=LoraSettings(rank=4)), trainable=True)
        torch.manual_seed(0)
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.data.normal_(0, 0.2)
        save_model(model, load_tokenizer(base_settings(folder)), folder / name, note=NOTE)
        torch.save(logits_of(model), folder / f"{name}.logits")
        merge_adapter(str(folder / name), folder / f"merged-{name}")
    return folder


def base_settings(folder: Path, **changes) -> ModelSettings:
    return ModelSettings(**{"path": str(folder / "base"), "precision": "fp32", **changes})


def refusal(function, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Windows ----------------------------------------------------------------------------------------------------------

# name -> (config, longest sequence): the published settings of each family, with their own config class.
PUBLISHED = {
    "mistral-7b-v0.1": (MistralConfig(max_position_embeddings=32768, sliding_window=4096), 4096),
    "mistral-7b-v0.3": (MistralConfig(max_position_embeddings=32768, sliding_window=None), 32768),
    "llama-3-8b": (LlamaConfig(max_position_embeddings=8192), 8192),
    "llama-3.1-8b": (LlamaConfig(max_position_embeddings=131072), 131072),
    "gemma-7b": (GemmaConfig(max_position_embeddings=8192), 8192),
    "gemma-2-9b": (Gemma2Config(max_position_embeddings=8192, sliding_window=4096), 8192),
    "gemma-3-1b": (Gemma3TextConfig(max_position_embeddings=32768, sliding_window=512), 32768),
    "gemma-3-4b": (Gemma3Config(text_config={"max_position_embeddings": 131072, "sliding_window": 1024}), 131072),
    "qwen3-8b": (Qwen3Config(max_position_embeddings=40960), 40960),
    "qwen3-sliding": (Qwen3Config(max_position_embeddings=40960, use_sliding_window=True, max_window_layers=0), 4096),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_longest_sequence_of_every_family_is_known_and_kept(name):
    config, longest = PUBLISHED[name]
    assert max_tokens_of(config) == longest
    check_window(config, num_tokens=longest, what="episodes.token_budget")
    message = refusal(check_window, config, num_tokens=longest + 1, what="episodes.token_budget")
    assert message.startswith(f"episodes.token_budget = {longest + 1}: ")
    limit = "sliding_window" if name in ("mistral-7b-v0.1", "qwen3-sliding") else "max_position_embeddings"
    assert f"({limit})" in message
    assert str(longest) in message


def test_a_window_counts_only_where_every_layer_slides():
    hybrid = {name: config for name, (config, _) in PUBLISHED.items() if name in ("gemma-2-9b", "gemma-3-1b")}
    assert [common_window(config) for config in hybrid.values()] == [None, None]
    assert common_window(PUBLISHED["mistral-7b-v0.1"][0]) == 4096
    all_sliding = Gemma2Config(sliding_window=64, layer_types=["sliding_attention"] * 26)
    assert common_window(all_sliding) == max_tokens_of(all_sliding) == 64


def test_a_model_that_names_no_longest_sequence_asks_for_one():
    assert refusal(max_tokens_of, MambaConfig()).startswith("`max_tokens`: a mamba model does not say")
    check_window(MambaConfig(), num_tokens=10**6, what="--max-tokens")


# Changes to a config ----------------------------------------------------------------------------------------------


def test_an_extension_of_rope_is_what_the_model_computes_with_and_is_recorded(saved, tmp_path):
    settings = base_settings(saved, config=EXTENDED)
    assert load_config(settings).rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = load_model(settings)
    by_hand = LlamaConfig.from_pretrained(saved / "base")
    by_hand.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    expected = AutoModelForCausalLM.from_pretrained(saved / "base", config=by_hand, dtype=torch.float32)
    assert torch.equal(logits_of(model), logits_of(expected))
    assert not torch.equal(logits_of(model), logits_of(load_model(base_settings(saved))))
    save_model(model, load_tokenizer(settings), tmp_path / "out", note=NOTE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 2048
    assert written["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert torch.equal(
        logits_of(load_model(ModelSettings(path=str(tmp_path / "out"), precision="fp32"))), logits_of(model)
    )


def test_none_switches_an_entry_of_the_config_off(tmp_path):
    tiny_model("mistral-sliding").save_pretrained(tmp_path / "base")
    assert load_config(base_settings(tmp_path)).sliding_window == 16
    settings = base_settings(tmp_path, config={"sliding_window": "none"})
    assert load_config(settings).sliding_window is None
    assert max_tokens_of(load_config(settings)) == 512
    assert not torch.equal(logits_of(load_model(settings)), logits_of(load_model(base_settings(tmp_path))))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"max_position_embedings": 4},
            "model.config.max_position_embedings: llama has no such entry; did you mean 'm",
        ),
        ({"max_position_embeddings": "many"}, "model.config.max_position_embeddings = 'many': Validation error"),
        (
            {"rope_parameters": {"rope_type": "liner"}},
            "{base}: cannot load its model: unknown or missing entry 'liner'",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "{base}: cannot load its model: unknown or missing entry 'factor'",
        ),
        ({"num_hidden_layers": 4}, "{base}: 9 weights of its config are missing, such as model.layers.3.input"),
        ({"intermediate_size": 32}, "{base}: 9 weights of its config have other shapes, such as model.layers.0.mlp.do"),
    ],
    ids=str,
)
def test_a_wrong_change_is_told_with_its_entry(saved, change, expected):
    message = refusal(load_model, base_settings(saved, config=change))
    assert message.startswith(expected.replace("{base}", str(saved / "base")))
    assert all(entry in message for entry in change)


# What Hugging Face's classes make of it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_saved_model_is_a_plain_hugging_face_folder(name, tmp_path):
    model, tokenizer = tiny_model(name), train_tokenizer("bpe")
    with segment_attention(model):  # as it is while it trains
        save_model(model, tokenizer, tmp_path / "out", note=NOTE)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs) is type(model)
    assert torch.equal(logits_of(theirs), logits_of(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a fox").input_ids == tokenizer("a fox").input_ids
    assert "manyicl" not in (tmp_path / "out" / "config.json").read_text()
    assert read_note(str(tmp_path / "out")) == NOTE


FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM

folder = sys.argv[1]
ids = torch.arange(3, 60)[None]

def logits_of(model):
    with torch.inference_mode():
        return model.eval()(ids, use_cache=False).logits

expected = {name: torch.load(f"{folder}/{name}.logits") for name in ("adapter", "extended-adapter")}
assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")), expected["adapter"])
assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(f"{folder}/adapter")), expected["adapter"])
for name, logits in expected.items():
    merged = AutoModelForCausalLM.from_pretrained(f"{folder}/merged-{name}")
    assert (logits_of(merged) - logits).abs().max() < 1e-5 * logits.abs().max()
    assert AutoTokenizer.from_pretrained(f"{folder}/merged-{name}")("a fox").input_ids
assert not any(name.split(".")[0] == "manyicl" for name in sys.modules)
"""


@pytest.mark.slow
def test_a_process_without_this_library_gives_the_same_logits(saved):
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, saved], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_adapter_is_loaded_by_us_and_by_peft_alike(saved):
    expected = torch.load(saved / "adapter.logits")
    ours = load_model(ModelSettings(path=str(saved / "adapter"), precision="fp32"))
    assert isinstance(ours, PeftModel)
    assert torch.equal(logits_of(ours), expected)
    assert (logits_of(load_model(base_settings(saved))) - expected).abs().max() > 0.1
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(saved / "adapter")), expected)
    assert not (saved / "adapter" / "config.json").exists()


def test_an_adapter_on_changed_positions_brings_them_along(saved):
    expected = torch.load(saved / "extended-adapter.logits")
    ours = load_model(ModelSettings(path=str(saved / "extended-adapter"), precision="fp32"))
    assert torch.equal(logits_of(ours), expected)
    assert max_tokens_of(load_config(ModelSettings(path=str(saved / "extended-adapter")))) == 2048
    with pytest.raises(OSError, match="no file named"):  # better than the base's own positions without a word
        AutoModelForCausalLM.from_pretrained(saved / "extended-adapter")
    config = AutoConfig.from_pretrained(saved / "extended-adapter")
    base = AutoModelForCausalLM.from_pretrained(saved / "base", config=config)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, saved / "extended-adapter")), expected)


def test_a_merged_adapter_gives_the_adapters_logits(saved):
    for name in ("adapter", "extended-adapter"):
        merged = load_model(ModelSettings(path=str(saved / f"merged-{name}"), precision="fp32"))
        assert not isinstance(merged, PeftModel)
        assert_agree(logits_of(merged), torch.load(saved / f"{name}.logits"))
        assert read_note(str(saved / f"merged-{name}")) == NOTE


def test_all_who_may_read_a_merged_models_config_may_read_its_weights(saved):
    modes = {path.name: path.stat().st_mode for path in (saved / "merged-adapter").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_nothing_saved_is_a_pickle(saved):
    names = {path.name for name in ("adapter", "merged-adapter") for path in (saved / name).iterdir()}
    assert {"adapter_model.safetensors", "model.safetensors", MODEL_NOTE} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".md", ".jinja"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")  # peft's advice on tied weights
@pytest.mark.parametrize(
    ("modules", "untied"), [(("q_proj", "lm_head"), True), (("embed_tokens",), True), ("all-linear", False)]
)
def test_a_merge_into_tied_weights_gives_the_adapters_logits(tmp_path, modules, untied):
    """Finding B5: folded into weights that head and embedding share, an adapter on one of them changed both."""
    seed = ModelSettings(path="seed", precision="fp32")
    load_model(seed).save_pretrained(tmp_path / "base")  # in float32, so that its merged weights are too
    load_tokenizer(seed).save_pretrained(tmp_path / "base")
    settings = base_settings(tmp_path, lora=LoraSettings(rank=4, modules=modules))
    model = load_model(settings, trainable=True)
    assert model.get_base_model().config.tie_word_embeddings
    torch.manual_seed(0)
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.data.normal_(0, 0.05)
    save_model(model, load_tokenizer(settings), tmp_path / "adapter", note=NOTE)
    said = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert ("head of its own" in said) == untied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == (not untied)
    assert (logits_of(merged) - logits_of(model)).abs().max() <= 1e-4
    trained_on = load_model(ModelSettings(path=str(tmp_path / "adapter"), precision="fp32"), trainable=True)
    assert (logits_of(trained_on) - logits_of(model)).abs().max() <= 1e-4


def test_a_merged_model_has_the_type_of_its_base(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    train_tokenizer("bpe").save_pretrained(tmp_path / "base")
    settings = base_settings(tmp_path, lora=LoraSettings(rank=4))
    save_model(load_model(settings, trainable=True), load_tokenizer(settings), tmp_path / "adapter", note=NOTE)
    said = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert said == f"{tmp_path / 'merged'}: a plain model in bfloat16, as its base"
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_a_killed_merge_does_not_stand_in_the_way_of_the_next(saved, tmp_path):
    leftover = tmp_path / ".whole.partial"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    merge_adapter(str(saved / "adapter"), tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        path.name for path in (saved / "merged-adapter").iterdir()
    }
    assert not leftover.exists()


def test_merging_is_refused_without_an_adapter_or_where_something_is(saved, tmp_path):
    assert refusal(merge_adapter, str(saved / "base"), tmp_path / "out").endswith(
        "has no adapter to merge; its model is whole already"
    )
    message = refusal(merge_adapter, "someone/adapter", tmp_path / "out")
    assert message == "someone/adapter: no such folder; give a run, or the folder of an adapter"
    message = refusal(merge_adapter, str(saved / "adapter"), saved / "base")
    assert message == f"out={saved / 'base'}: exists already; name a new folder"


def test_an_adapter_is_not_trained_on_an_adapter(saved, tmp_path):
    adapter = shutil.copytree(saved / "adapter", tmp_path / "my adapter")
    settings = ModelSettings(path=str(adapter), precision="fp32", lora=LoraSettings())
    assert f"manyicl merge '{adapter}' --out DIR" in refusal(load_model, settings, trainable=True)


def test_all_weights_are_trained_on_top_of_an_adapter(saved):
    model = load_model(ModelSettings(path=str(saved / "adapter"), precision="bf16"), trainable=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_agree(logits_of(model), torch.load(saved / "adapter.logits"))


def test_an_adapter_finds_its_base_from_any_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved)
    model = load_model(ModelSettings(path="base", precision="fp32", lora=LoraSettings(rank=2)), trainable=True)
    save_model(model, load_tokenizer(base_settings(saved)), tmp_path / "adapter", note=NOTE)
    monkeypatch.chdir(tmp_path)
    load_model(ModelSettings(path="adapter", precision="fp32"))


def test_an_adapter_remembers_the_revision_of_its_base(saved):
    settings = base_settings(saved, revision="v2", lora=LoraSettings(rank=2))
    assert load_model(settings, trainable=True).peft_config["default"].revision == "v2"


def test_an_adapter_of_others_is_read_with_its_bases_tokenizer(saved, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((saved / "adapter" / name).read_bytes())
    settings = ModelSettings(path=str(tmp_path), precision="fp32")
    assert load_tokenizer(settings)("a fox").input_ids == load_tokenizer(base_settings(saved))("a fox").input_ids
    assert read_note(str(tmp_path)) == ModelNote()
    assert torch.equal(logits_of(load_model(settings)), torch.load(saved / "adapter.logits"))


def test_adapters_stand_on_every_linear_layer_but_the_head(saved):
    model = load_model(base_settings(saved, lora=LoraSettings(rank=4, alpha=8)), trainable=True)
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ("all-liner", "'all-liner' fits no layer's whole name, such as model.layers.0.self_attn.q_proj; use 'all-l"),
        (("q_proj", "v_prj"), "'v_prj' is not the name of a layer; use 'all-linear', or some of down_proj, embed_tok"),
        (("proj",), "'proj' is not the name of a layer; use 'all-linear', or some of down_proj, embed_tok"),
    ],
)
def test_an_unknown_layer_for_the_adapter_is_told_also_beside_a_known_one(saved, modules, told):
    message = refusal(load_model, base_settings(saved, lora=LoraSettings(modules=modules)), trainable=True)
    assert message.startswith(f"model.lora.modules: {told}")


def test_a_pattern_of_layers_that_is_none_is_one_line(saved):
    message = refusal(load_model, base_settings(saved, lora=LoraSettings(modules="(")), trainable=True)
    assert message.startswith("model.lora.modules = '(': is not a regular expression (missing ), unterminated")


# Where nothing, or something broken, is ---------------------------------------------------------------------------


def test_precision_is_of_frozen_weights_and_trained_ones_stay_fp32(saved):
    assert load_model(base_settings(saved, precision="bf16")).dtype == torch.bfloat16
    assert load_model(base_settings(saved, precision="bf16"), trainable=True).dtype == torch.float32
    adapted = load_model(base_settings(saved, precision="bf16", lora=LoraSettings(rank=2)), trainable=True)
    kinds = {(p.requires_grad, p.dtype) for p in adapted.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("./no/model", "./no/model: no such folder; give a folder in Hugging Face layout, a run, or a name on the hub"),
        ("/no", "/no: no such folder; "),
        ("~/no/model", "~/no/model: no such folder; "),
        ("a/b/c", "a/b/c: no such folder; "),
        ("no-such-model", "no-such-model: cannot load its {what} from the hub (there is no such folder here): "),
        (
            "smollm-many",
            "smollm-many: cannot load its {what} from the hub (there is no such folder here; did you mean"
            " 'smollm2-many'?): ",
        ),
        ("someone/no-such", "someone/no-such: cannot load its {what} from the hub (there is no such folder here): "),
        ("not a name", "not a name: cannot load its {what} from the hub (there is no such folder here): "),
    ],
)
def test_a_model_that_is_not_there_is_told_in_one_line(path, expected, load, capfd):
    message = refusal(load, ModelSettings(path=path))
    kind = "tokenizer" if load is load_tokenizer else "config"
    assert message.startswith(expected.replace("{what}", kind))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("model.safetensors", b"not safetensors at all", "model"),
        ("model.safetensors", None, "model"),
        ("config.json", b"{", "config"),
        ("config.json", b'{"model_type": "lama"}', "config"),
        ("tokenizer.json", b"{", "tokenizer"),
    ],
)
def test_a_broken_model_is_told_in_one_line(saved, tmp_path, file, content, what):
    shutil.copytree(saved / "base", tmp_path / "base")
    (tmp_path / "base" / file).unlink()
    if content is not None:
        (tmp_path / "base" / file).write_bytes(content)
    load = {"model": load_model, "config": load_config, "tokenizer": load_tokenizer}[what]
    assert refusal(load, base_settings(tmp_path)).startswith(f"{tmp_path / 'base'}: cannot load its {what}: ")


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_a_file_is_no_model_and_not_looked_for_on_the_hub(tmp_path, load):
    """It was "the config file", looked for on the hub since "there is no such folder here"."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"")
    fix = "give a folder in Hugging Face layout, a run, or a name on the hub"
    assert refusal(load, ModelSettings(path=str(file))) == f"{file}: is a file, not a folder; {fix}"


def test_a_folder_of_other_things_is_no_model(tmp_path):
    """Asked, it was an "unrecognized model"; merged, its "model is whole already"."""
    (tmp_path / "animals.jsonl").write_text('{"input": "is red", "answer": "cat"}\n')
    fix = "give a folder in Hugging Face layout, a run, or a name on the hub"
    for load in (load_config, load_model):
        message = refusal(load, ModelSettings(path=str(tmp_path)))
        assert message == f"{tmp_path}: has no config.json, so it is no model; {fix}"
    message = refusal(merge_adapter, str(tmp_path), tmp_path / "out")
    assert message == f"{tmp_path}: holds neither an adapter nor a model; give a run, or the folder of an adapter"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_generation_config_is_told_and_not_passed_over(tmp_path, content):
    """Its end tokens were lost in silence, so answers ended elsewhere; `[]` was a traceback."""
    damaged = tmp_path / "generation_config.json"
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"^{damaged}: is damaged; restore it, or remove it$"):
        load_end_ids(ModelSettings(path=str(tmp_path)))


def test_a_folder_without_a_tokenizer_is_told_in_one_line(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    message = refusal(load_tokenizer, base_settings(tmp_path))
    assert message.startswith(f"{tmp_path / 'base'}: has no tokenizer (none of tokenizer.json, ")
    assert message.endswith("tokenizer.save_pretrained(FOLDER)")


def test_a_tokenizer_without_its_vocabulary_is_told_as_that(tmp_path):
    """It was loaded with its special tokens alone, and the first to notice was the template's terminator."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>"}')
    assert refusal(load_tokenizer, ModelSettings(path=str(tmp_path))) == (
        f"{tmp_path}: has a tokenizer of special tokens alone (its vocabulary, such as tokenizer.json, is missing);"
        " save it beside the weights, tokenizer.save_pretrained(FOLDER)"
    )


def test_weights_of_another_class_are_refused_instead_of_drawn_at_random(saved, tmp_path):
    shutil.copytree(saved / "base", tmp_path / "base")
    config = json.loads((saved / "base" / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "weights of its config are missing, such as " in refusal(load_model, base_settings(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": 5}']
)
def test_a_broken_adapter_is_told_in_one_line(saved, tmp_path, content):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    message = refusal(load_model, ModelSettings(path=str(tmp_path / "adapter")))
    assert message.startswith(f"{tmp_path / 'adapter' / 'adapter_config.json'}: is not an adapter's config")


def test_an_adapter_whose_base_is_gone_is_told_in_one_line(saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    message = refusal(load_model, ModelSettings(path=str(tmp_path / "adapter")))
    adapter = tmp_path / "adapter"
    assert message.startswith(f"{adapter}: its base /gone/base is not there any more; put it back, or correct ")
    (tmp_path / "run.json").write_text('{"weig')  # the run's record is damaged too
    assert refusal(load_model, ModelSettings(path=str(adapter))) == message


@pytest.mark.parametrize("content", ["{", '{"template": {"style": "poem"}}', '{"shots": 3}'])
def test_a_broken_note_is_told_in_one_line(tmp_path, content):
    (tmp_path / MODEL_NOTE).write_text(content)
    assert refusal(read_note, str(tmp_path)).startswith(f"{tmp_path / MODEL_NOTE}: ")


def test_a_run_stands_for_its_model(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    message = refusal(locate_model, str(tmp_path))
    command = f"manyicl train --resume {tmp_path}"
    assert message == f"{tmp_path}: this run has not finished, so it has no model; go on with: {command}"
    (tmp_path / "model").mkdir()
    assert locate_model(str(tmp_path)) == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("state", "beside", "told"),
    [
        ('{"finished": false}', False, "not finished, so it has no model; go on with: manyicl train --resume {run}"),
        ('{"finished": false}', True, "not finished, so it has no model; go on with its comparison"),
        ('{"finished": true}', False, "finished, {gone} make it again with: manyicl train --resume {run}"),
        ('{"finished": true}', True, "finished, {gone} delete {run}, and `resume` of its comparison trains it again"),
    ],
)
def test_a_run_without_a_model_says_how_it_gets_one(tmp_path, state, beside, told):
    """One that had finished "has not finished", and one of a comparison was to be resumed alone."""
    run = tmp_path / "manyicl"
    run.mkdir()
    (run / "run.json").write_text(state)
    if beside:
        (tmp_path / "manyicl.plan.json").write_text("{}")
    gone = "but its folder 'model' has gone; put it back, or"
    assert refusal(locate_model, str(run)) == f"{run}: this run has {told.format(run=run, gone=gone)}"


def test_the_hash_of_weights_sees_one_changed_weight_and_no_copy():
    model = tiny_model("llama")
    before = hash_weights(model)
    assert hash_weights(tiny_model("llama")) == before
    assert hash_weights(model.bfloat16()) != before
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert hash_weights(model) != before


def test_the_hash_of_weights_is_the_same_wherever_they_lie_in_memory():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        whole = torch.arange(60).to(dtype)
        hashes = set()
        for part in (whole[:30], whole[1:31], whole[3:33].reshape(2, 3, 5), whole[5], whole[:0]):
            module = torch.nn.Module()
            module.register_buffer("part", part)
            hashes.add(hash_weights(module))
            module.part = part.clone()
            assert hash_weights(module) in hashes
        assert len(hashes) == 5


def test_adapters_are_made_and_loaded_without_a_word_of_what_others_renamed(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        fresh = load_model(base_settings(saved, lora=LoraSettings(rank=2)), trainable=True)
        loaded = load_model(ModelSettings(path=str(saved / "adapter"), precision="fp32"))
    assert isinstance(fresh, PeftModel)
    assert isinstance(loaded, PeftModel)


# Checkpoints as people have them ----------------------------------------------------------------------------------


def test_a_checkpoint_in_shards_is_loaded_whole_trial_58(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits_of(load_model(ModelSettings(path=str(tmp_path), precision="fp32"))), logits_of(model))


@pytest.mark.slow
def test_a_model_with_more_embeddings_than_tokens_answers_as_without_them_trial_61(tmp_path):
    """The 64 rows that no token has are copies of an earlier row, so that they are never the first of the largest."""
    tokenizer, model = train_tokenizer("bpe"), tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    more = tiny_model("llama", vocab_size=464)
    with torch.no_grad():
        for name, parameter in more.named_parameters():
            own = model.get_parameter(name)
            parameter.copy_(torch.cat([own, own[5:6].expand(64, -1)]) if len(parameter) == 464 else own)
    more.save_pretrained(tmp_path / "more")
    answers = []
    task = replace(make_task("open"), family="qa", metric="exact_match", labels=())
    for name in ("model", "more"):
        tokenizer.save_pretrained(tmp_path / name)
        result = evaluate(str(tmp_path / name), [task], shots=(0, 4), draws=1, queries=6)
        answers.append([one.prediction for one in result.curves[0].predictions])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_a_half_precision_checkpoint_is_loaded_as_it_is_trial_69(tmp_path):
    model = tiny_model("llama").half()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    loaded = load_model(ModelSettings(path=str(tmp_path), precision="fp32"))
    assert loaded.dtype == torch.float32
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.float())


def test_a_quantized_checkpoint_names_the_package_that_it_needs_trial_69(saved, tmp_path):
    base = shutil.copytree(saved / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    assert "gptq" in refusal(load_model, base_settings(tmp_path)).lower()
