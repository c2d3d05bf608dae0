"""The card beside a trained model: what Hugging Face reads, what a person reads, and code that runs as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from manyicl.comparison.comparison_file import check_comparison
from manyicl.episodes.tokenized import query_ids, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.models.loading import load_tokenizer
from manyicl.report.model_card import write_model_card
from manyicl.tasks.task import load_tasks
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.support.comparison_data import make_comparison
from tests.trajectory.setting import write_setting


@pytest.fixture(scope="module")
def comparison():
    return check_comparison(make_comparison(num_seeds=2, num_tasks=5))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    return train(write_setting(folder, num_steps=2), out=folder / "run").folder


def metadata(card: Path) -> dict:
    _, head, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.slow
def test_the_metadata_is_what_hugging_face_knows_and_claims_no_license(run, comparison):
    card = write_model_card(run, comparison, "manyicl", 0)
    assert card == run / "model" / "README.md"
    assert metadata(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["manyicl", "in-context-learning"],
    }
    text = card.read_text(encoding="utf-8")
    assert str(run.parent) not in text  # whose machine it was trained on is nobody's business
    assert "- base: start\n" in text
    assert "- trained on 3 tasks: animals, beasts, colours\n" in text


@pytest.mark.slow
def test_an_adapter_is_named_as_one_with_its_base_on_the_hub(tmp_path, comparison, monkeypatch):
    folder = train(write_setting(tmp_path, lora=True, num_steps=2), out=tmp_path / "run").folder
    config = RunFolder(folder).read_config()
    named = config.model_copy(update={"model": config.model.model_copy(update={"path": "some-org/some-base"})})
    monkeypatch.setattr(RunFolder, "read_config", lambda folder: named)
    found = metadata(write_model_card(folder, comparison, "few-shot", 1))
    assert found["library_name"] == "peft"
    assert found["base_model"] == "some-org/some-base"
    assert found["tags"] == ["manyicl", "in-context-learning", "lora"]


def test_the_curve_is_this_seeds_own_as_a_table_and_as_a_picture(run, comparison):
    card = write_model_card(run, comparison, "manyicl", 1)
    names = [task.task for task in comparison.tasks_of("trained")]
    cells = [c for c in comparison.curves if c.arm == "manyicl" and c.task in names and c.shots == 4]
    assert len(cells) == 3
    expected = 100 * sum(cell.seeds[1] for cell in cells) / 3
    line = next(line for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("| trained tasks |"))
    assert line.split(" | ")[3].strip() == f"{expected:.1f}"
    svg = ElementTree.parse(card.parent / "shot-curve.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert "mean score, %" in "".join(svg.itertext())


def trained_scores(card: Path) -> list[str]:
    line = next(line for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("| trained tasks |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_tasks_that_were_trained_on_and_not_evaluated_leave_the_curve_to_the_others(run):
    """A comparison with `asked_tasks` had no curve of trained tasks on any card."""
    content = make_comparison(num_seeds=2, num_tasks=5)
    first, second, third = (task for task in content["tasks"] if task["role"] == "trained")
    third["asked"] = False
    content["curves"] = [curve for curve in content["curves"] if curve["task"] != third["task"]]
    own = [curve for curve in content["curves"] if curve["arm"] == "manyicl"]
    at = {(curve["task"], curve["shots"]): curve["seeds"][0] for curve in own}
    expected = [f"{50 * (at[first['task'], k] + at[second['task'], k]):.1f}" for k in (0, 1, 4, 16, 64)]
    assert trained_scores(write_model_card(run, check_comparison(content), "manyicl", 0)) == expected


def test_the_only_model_of_one_task_has_the_curve_of_that_task(run):
    content = make_comparison(num_seeds=2, num_tasks=5)
    next(arm for arm in content["arms"] if arm["arm"] == "dedicated")["num_models"] = 1
    own = content["tasks"][0]["task"]
    content["curves"] = [curve for curve in content["curves"] if curve["arm"] != "dedicated" or curve["task"] == own]
    expected = [f"{100 * c['seeds'][0]:.1f}" for c in content["curves"] if c["arm"] == "dedicated" and c["shots"] == 0]
    assert len(expected) == 1
    assert trained_scores(write_model_card(run, check_comparison(content), "dedicated", 0))[:1] == expected


@pytest.mark.slow
def test_the_code_on_the_card_runs_and_asks_with_the_ids_of_training(run, comparison):
    text = write_model_card(run, comparison, "manyicl", 0).read_text(encoding="utf-8")
    task = load_tasks(run.parent / "tasks", names=["animals"])[0]
    config = RunFolder(run).read_config()
    tokenizer = TaskTokenizer(load_tokenizer(config.model), config.template)
    tokenized = tokenize_task(task, tokenizer=tokenizer)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("PATH_OF_THIS_FOLDER", str(run / "model"))
    shots = [(e.input, e.answer) for e in task.train[:2]]
    code = code.replace('[("an input", "its answer"), ("another input", "its answer")]', repr(shots))
    code = code.replace('instruction = ""', f"instruction = {task.instruction + chr(10) * 2!r}")
    code = code.replace('"the input to answer"', repr(task.test[0].input))
    space: dict = {}
    exec(code, space)
    train_split = tokenized.splits["train"]
    expected = np.concatenate(
        [
            tokenized.head_ids,
            train_split.ids[: train_split.starts[2]],
            query_ids(tokenized, split="test", index=0, after_shots=True),
        ]
    )
    assert space["ids"] == expected.tolist()


def test_texts_on_the_card_are_shown_as_they_are(run):
    content = make_comparison(num_seeds=2, num_tasks=5)
    content["name"] = "a *b* <script>[c](d)"
    text = write_model_card(run, check_comparison(content), "manyicl", 0).read_text(encoding="utf-8")
    assert r"a \*b\* &lt;script&gt;\[c\](d)" in text


def test_a_card_of_nothing_is_refused_in_one_line(run, comparison, tmp_path):
    for arm, seed in (("nobody", 0), ("manyicl", 7)):
        with pytest.raises(UserError, match="is not in the comparison"):
            write_model_card(run, comparison, arm, seed)
    with pytest.raises(UserError, match=r"no config\.toml"):
        write_model_card(tmp_path, comparison, "manyicl", 0)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(UserError, match="has no model yet"):
        write_model_card(tmp_path / "run", comparison, "manyicl", 0)
