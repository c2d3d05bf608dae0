"""A project that was moved, and checkpoints as people have them (field trials 57, 60, 62, 64, 65, 72, 79)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.inference.model import load_for_inference
from manyicl.models.loading import ModelSettings, load_config, load_model
from manyicl.models.places import fingerprint_weights
from manyicl.tasks.task import load_tasks
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.conftest import tiny_model, train_tokenizer
from tests.trajectory.setting import run_command, write_setting


def load(path: Path):
    return load_model(ModelSettings(path=str(path), precision="fp32"))


@pytest.fixture
def moved(tmp_path) -> tuple[Path, Path]:
    """A project with an adapter's run of one step that was made in the first folder, and lies in the second."""
    old, new = tmp_path / "old", tmp_path / "new"
    config = write_setting(old, lora=True, num_steps=1, checkpoint_every_steps=1)
    train(config, out=old / "run")
    old.rename(new)
    return old, new


@pytest.mark.slow
def test_a_moved_run_is_asked_on_the_base_that_was_moved_with_it(moved):
    _, new = moved
    tasks = load_tasks(new / "tasks", names=["animals"])
    result = evaluate(str(new / "run"), tasks, shots=(0,), draws=1, queries=4)
    assert result.curves[0].points[0].score is not None


@pytest.mark.slow
def test_another_base_of_the_same_name_is_not_taken(moved):
    old, new = moved
    tiny_model("llama", seed=1).save_pretrained(new / "start")
    with pytest.raises(UserError, match=rf"its base {old / 'start'} is not there any more; put it back, or correct"):
        load_for_inference(str(new / "run"), precision="fp32")


@pytest.mark.slow
def test_a_moved_run_goes_on_with_new_paths_where_the_same_files_lie(moved):
    old, new = moved
    run = new / "run"
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"finished": False}))
    with pytest.raises(UserError) as told:
        train(RunFolder(run).read_config(), out=run, resume=True)
    assert str(told.value) == (
        f"resume={run}: tasks.folder = {old / 'tasks'} and model.path = {old / 'start'} is not there any more; if it"
        f" was moved, say where it is now: manyicl train --resume {run} tasks.folder=PATH model.path=PATH"
    )
    # As the command line that is told there: it took the first place for the path of a recipe.
    done = run_command("train", "--resume", run, f"tasks.folder={new / 'tasks'}", f"model.path={new / 'start'}")
    assert (done.returncode, f"model: {run / 'model'}" in done.stdout) == (0, True), done.stderr
    kept = RunFolder(run).read_config()
    assert (kept.tasks.folder, kept.model.path) == (str(new / "tasks"), str(new / "start"))
    assert json.loads((run / "run.json").read_text())["finished"]


@pytest.mark.slow
def test_a_finished_run_takes_new_paths_and_its_adapter_the_base(moved):
    _, new = moved
    run = RunFolder(new / "run")
    (new / "start").rename(new / "elsewhere")
    overrides = [f"tasks.folder={new / 'tasks'}", f"model.path={new / 'elsewhere'}"]
    train(run.read_config(overrides=overrides), out=run.path, resume=True)
    assert run.read_config().model.path == str(new / "elsewhere")
    assert load_for_inference(str(run), precision="fp32").path == str(run)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_weights_or_tasks_in_the_new_place(moved):
    _, new = moved
    run = new / "run"
    tiny_model("llama", seed=1).save_pretrained(new / "other")
    train_tokenizer("bpe").save_pretrained(new / "other")
    overrides = [f"tasks.folder={new / 'tasks'}", f"model.path={new / 'other'}"]
    with pytest.raises(UserError, match=rf"model\.path = {new / 'other'} holds other weights than the run was started"):
        train(RunFolder(run).read_config(overrides=overrides), out=run, resume=True)
    overrides[1] = f"model.path={new / 'start'}"
    with (new / "tasks" / "animals.jsonl").open("a") as file:
        file.write('{"input": "one more fox", "answer": "fox", "split": "train"}\n')
    with pytest.raises(UserError, match="task 'animals' is not what it was"):
        train(RunFolder(run).read_config(overrides=overrides), out=run, resume=True)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_that_knows_no_fingerprint_goes_on(tmp_path):
    config = write_setting(tmp_path, num_steps=1)
    run = tmp_path / "run"
    train(config, out=run)
    state = json.loads((run / "run.json").read_text())
    assert state.pop("weights") == fingerprint_weights(str(tmp_path / "start"))
    (run / "run.json").write_text(json.dumps(state))
    assert train(config, out=run, resume=True).held_out


def test_a_fingerprint_is_of_the_weights_and_not_of_their_place(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "c")
    a, b, c = (fingerprint_weights(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert fingerprint_weights(str(tmp_path)) is None


def test_a_relative_base_of_an_adapter_is_looked_for_beside_it(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    base = AutoModelForCausalLM.from_pretrained("base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained("adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "adapter").eval()(ids).logits, base.eval()(ids).logits)
    (tmp_path / "base").rename(tmp_path / "gone")
    told = r"its base 'base' \(adapter_config\.json\) is not a folder here or beside it, nor on the hub"
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'adapter'))}: .*{told}"):
        load_config(ModelSettings(path=str(tmp_path / "adapter")))


def test_weights_as_pickles_are_named_with_the_line_that_converts_them(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError) as told:
        load(tmp_path)
    fault, _, code = str(told.value).partition("; convert it once, in Python: ")
    assert fault == f"{tmp_path}: has pytorch_model.bin and no safetensors"
    exec(code, {"transformers": __import__("transformers")})
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path, name):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n")
    with pytest.raises(UserError, match=rf"^{tmp_path / name}: is a Git LFS pointer, not the file itself; fetch it: "):
        load(tmp_path)


def test_what_is_not_a_causal_language_model_is_told_by_its_name(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=50, **size)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for folder, kind in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        with pytest.raises(UserError, match=f"^{tmp_path / folder}: is a {kind}, not a causal language model; name"):
            load(tmp_path / folder)


def test_a_tokenizer_that_writes_ids_without_a_row_is_refused_by_numbers_in_training_and_asking(tmp_path):
    config = write_setting(tmp_path, num_steps=1)
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "start")  # its tokenizer knows 390
    told = rf"^{tmp_path / 'start'}: its tokenizer writes token \d+, but the model has only 300; use the tokenizer"
    with pytest.raises(UserError, match=told):
        train(config, out=tmp_path / "run")
    with pytest.raises(UserError, match=told):
        evaluate(config.model.path, load_tasks(config.tasks.folder), shots=(0,), draws=1, queries=2)


def test_a_result_in_the_folder_of_its_tasks_is_not_a_task(tmp_path):
    config = write_setting(tmp_path)
    folder = Path(config.tasks.folder)
    options = {"shots": (0,), "draws": 1, "queries": 2}
    evaluate(config.model.path, load_tasks(folder, names=["animals"]), **options, out=folder / "first.json")
    assert (folder / "first.predictions.parquet").is_file()
    assert [task.name for task in load_tasks(folder)] == ["animals", "beasts", "colours"]


# In a process of its own, since transformers copies a model's code into a cache whose place it reads when imported.
OWN_CODE = """
import json, sys
from pathlib import Path
from manyicl import merge
from manyicl.inference.model import load_for_inference
from manyicl.training.recipe import RunConfig
from manyicl.training.run import train
from tests.trajectory.setting import write_setting

folder = Path(sys.argv[1])
values = write_setting(folder, lora=sys.argv[2] == "lora", num_steps=1, checkpoint_every_steps=1).model_dump()
code = "from transformers import LlamaConfig, LlamaForCausalLM\\n"
code += "class OwnConfig(LlamaConfig):\\n    model_type = 'own'\\n"
code += "class OwnForCausalLM(LlamaForCausalLM):\\n    config_class = OwnConfig\\n"
(folder / "start" / "own.py").write_text(code)
file = folder / "start" / "config.json"
classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
file.write_text(json.dumps(json.loads(file.read_text()) | own))
values["model"]["trust_remote_code"] = True
run = train(RunConfig.model_validate(values), out=folder / "run")
assert len(run.held_out) == 3
load_for_inference(str(run.folder), trust_remote_code=True)
if sys.argv[2] == "lora":
    whole = folder / "whole"
    assert merge(str(run.folder), whole, trust_remote_code=True) == whole
    load_for_inference(str(whole), trust_remote_code=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_model_with_code_of_its_own_is_trained_to_the_end_and_can_be_asked(tmp_path, how):
    """The run ended in an error when its model was loaded for the closing table, without leave to run its code."""
    done = subprocess.run(
        [sys.executable, "-c", OWN_CODE, str(tmp_path), how],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
