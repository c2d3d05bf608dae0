"""A data set by its name, through the datasets library: here a local folder stands for the Hub."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from manyicl.conversion import import_tasks
from manyicl.conversion.hub import load_from_hub, read_class_names
from manyicl.conversion.rows import read_material
from manyicl.errors import UserError


def test_the_datasets_library_gives_splits_and_class_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    for split, rows in (("train", [("fine", 1), ("awful", 0)]), ("test", [("dull", 0), ("who knows", -1)])):
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        (tmp_path / "films").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "films" / f"{split}.parquet")
    (tmp_path / "staging").mkdir()
    material = load_from_hub(str(tmp_path / "films"), config=None, revision="1a2b", staging=tmp_path / "staging")
    kept = read_material(material, columns={}, splits={}, answer_index=None)
    assert [(row.input, row.answer, row.split) for row in kept.rows] == [
        ("fine", "good", "train"),
        ("awful", "bad", "train"),
        ("dull", "bad", "test"),
    ]
    assert (kept.num_read, kept.left_out) == (4, {"empty answer": 1})
    assert kept.examples["empty answer"].startswith(f"{tmp_path / 'films'}, split test, row 2: answer None is empty")
    assert material.origin == {"source": str(tmp_path / "films"), "config": "default", "revision": "1a2b"}
    assert material.notes == ()


def test_a_name_that_the_hub_does_not_give_is_refused_in_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^no-one/no-such-set: no such .*, and the Hub does not give it \("):
        import_tasks("no-one/no-such-set")


def test_a_hub_that_cannot_be_reached_is_asked_once_and_named_in_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:  # bound, but it does not listen: connections are refused
        taken.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as refused:
            import_tasks("no-one/no-such-set")
    assert str(refused.value) == (
        f"no-one/no-such-set: no such file or folder, and the Hub ({hub}) cannot be reached; connect this computer, or"
        " import a folder that was downloaded on another"
    )
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_copy_that_is_read_since_the_hub_cannot_be_reached_is_named_as_one(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "films").mkdir()
    datasets.Dataset.from_dict({"text": ["fine"]}).to_parquet(tmp_path / "films" / "train.parquet")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub)
        material = load_from_hub(str(tmp_path / "films"), config=None, revision=None, staging=tmp_path)
    told = f"the Hub ({hub}) cannot be reached: this is this computer's copy, which may be older than the Hub's"
    assert material.notes == (told,)


def test_without_the_datasets_library_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"^rajpurkar/squad: no such file or folder; .* pip install datasets$"):
        import_tasks("rajpurkar/squad")


def test_class_names_of_a_folder_are_those_of_the_config(tmp_path):
    infos = {
        "en": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}},
        "de": {"features": {"label": {"names": ["nein", "ja"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}},
    }
    (tmp_path / "dataset_infos.json").write_text(json.dumps(infos))
    assert read_class_names(tmp_path, "de") == {"label": ("nein", "ja")}
    assert read_class_names(tmp_path, "fr") == {}
