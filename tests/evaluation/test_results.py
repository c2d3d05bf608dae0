"""Result files read back, and every way in which one is not what it should be."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.points import Prediction, ShotCurve, ShotPoint
from manyicl.evaluation.results import Evaluation, check_out, predictions_path, refuse_other_result
from manyicl.inference.answering.settings import AnswerSettings

ROWS = (Prediction("t", 0, 4, "q", "owl", "owl", 1.0, 0.5, choice_nll={"owl": 0.5, "fox": 1.0}),)
CELL = ShotPoint(4, 1.0, None, None, 0.5, 1, 0, None)
CURVE = ShotCurve("t", "qa", "exact_match", num_queries=1, num_draws=1, points=(CELL,), predictions=ROWS, sha256="abc")


def save(path, kind="sweep"):
    Evaluation("some/model", kind, seed=3, max_tokens=512, curves=(CURVE,)).save(path)
    return path


def test_a_result_comes_back(tmp_path):
    path = save(tmp_path / "a.json")
    assert predictions_path(path) == tmp_path / "a.predictions.parquet"
    result = Evaluation.load(path)
    assert result == Evaluation("some/model", "sweep", seed=3, max_tokens=512, curves=(CURVE,))
    assert (result.path, result.predictions) == (path, ROWS)
    written = json.loads(path.read_text())
    assert written.pop("predictions")["file"] == "a.predictions.parquet"
    assert json.loads(json.dumps(result.to_json())) == written


def test_a_result_of_an_earlier_version_comes_back(tmp_path):
    """It lacks what was added since, and may hold what is no longer read."""
    path = save(tmp_path / "a.json")
    content = json.loads(path.read_text())
    (task,) = content["tasks"]
    (point,) = task["curve"]
    for entry, keys in (
        (content, ["answering"]),
        (task, ["left_out"]),
        (point, ["mean_shots", "why_not", "other_scores"]),
    ):
        for key in keys:
            del entry[key]
    path.write_text(json.dumps({**content, "told": 3}))
    result = Evaluation.load(path)
    assert result.curves[0].points[0] == CELL
    assert result == Evaluation("some/model", "sweep", seed=3, max_tokens=512, curves=(CURVE,))


def test_how_an_earlier_version_chose_answers_is_read(tmp_path):
    path = save(tmp_path / "a.json")
    content = json.loads(path.read_text())
    del content["answering"]
    path.write_text(json.dumps({**content, "by": "mean", "max_new_tokens": 7}))
    assert Evaluation.load(path).answering == AnswerSettings(normalize="tokens", max_new_tokens=7)


def test_shots_that_were_the_same_in_all_draws_are_told_and_others_are_not(tmp_path):
    plain = Evaluation("some/model", "sweep", seed=3, max_tokens=512, curves=(CURVE,))
    assert "fixed_shots" not in plain.to_json()
    replace(plain, fixed_shots=4).save(tmp_path / "a.json")
    assert Evaluation.load(tmp_path / "a.json").fixed_shots == 4


def test_what_is_no_result_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json: cannot be read \(No such file or directory\)"):
        Evaluation.load(path)
    for text in (
        "",
        "[]",
        "{}",
        "\x00",
        '{"schema": 2}',
        '{"schema": 2, "kind": "sweep", "tasks": []}',
        '{"schema": 2, "kind": "sweep", "predictions": [], "tasks": []}',
        '{"schema": 2, "kind": "sweep", "predictions": {"file": "../a", "sha256": ""}, "tasks": []}',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json: is not a result of manyicl eval --out"):
            Evaluation.load(path)
    with pytest.raises(UserError, match="is a one-pass curve, which keeps no predictions"):
        Evaluation.load(save(path, kind="one-pass"))
    save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 1}))
    with pytest.raises(UserError, match="has schema 1, not 2; evaluate again"):
        Evaluation.load(path)


def test_predictions_that_are_not_its_own_are_refused(tmp_path):
    path = save(tmp_path / "a.json")
    beside = predictions_path(path)
    beside.write_bytes(beside.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"a\.predictions\.parquet: is not the predictions file that .* was written"):
        Evaluation.load(path)
    beside.unlink()
    with pytest.raises(UserError, match=r"a\.predictions\.parquet: cannot be read .* it belongs beside"):
        Evaluation.load(path)


def test_a_finished_result_is_replaced_by_one_of_the_same_settings_only(tmp_path):
    settings = Evaluation("some/model", "sweep", seed=3, max_tokens=512, curves=())
    task = {"task": "t", "sha256": "abc", "shots": [4], "num_queries": 1, "num_draws": 1}
    refuse_other_result(tmp_path / "a.json", settings, [task])  # there is none yet
    path = save(tmp_path / "a.json")
    refuse_other_result(path, settings, [task])
    for changed, tasks, told in (
        ({"seed": 4, "model": "other"}, [task], "model, seed"),
        ({}, [task | {"shots": [0, 4], "num_draws": 5}], "shots, num_draws"),
        ({}, [task | {"sha256": "abd"}], "sha256"),
        ({}, [task, task | {"task": "u"}], "tasks"),
        ({"kind": "one-pass"}, [], "kind, tasks"),
    ):
        with pytest.raises(UserError, match=rf"out=.*a\.json: holds a finished result with other {told}; name another"):
            refuse_other_result(path, replace(settings, **changed), tasks)


@pytest.mark.parametrize("text", ["", "thesis", "[]", "{}", '{"tasks": [3]}', '{"tasks": {"t": 1}}'])
def test_a_file_that_is_no_result_is_not_written_over(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: exists, and is not a result of manyicl; name another file"):
        refuse_other_result(tmp_path / "a.json", Evaluation("m", "sweep", 0, 9, curves=()), [{"task": "t"}])


def test_a_result_is_not_written_in_place_of_a_device_or_a_pipe(tmp_path):
    """With --out /dev/full it read the device as an earlier result, until memory was used up."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^out=.*pipe: is a device or a pipe, not a file; name a file$"):
        check_out(tmp_path / "pipe")
    check_out(tmp_path / "r.json")


def test_a_result_is_not_given_the_name_of_a_data_file(tmp_path):
    """JSON under the name of a table, in a folder of tasks, would be a task that cannot be read."""
    for name in ("r.csv", "r.parquet", "r.jsonl"):
        with pytest.raises(UserError, match=r"is written as JSON, with its predictions beside it; name it r\.json$"):
            check_out(tmp_path / name)
