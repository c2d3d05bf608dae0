"""A killed evaluation goes on where it stopped, gives the same to the bit, and takes no other's cells for its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate, evaluate_sweep
from manyicl.evaluation.points import Prediction
from manyicl.evaluation.sweep import Sweep
from manyicl.evaluation.unfinished import HEADER, Unfinished
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.model import InferenceModel
from tests.conftest import make_task, tiny_model
from tests.trajectory.setting import start_process, write_setting

KILLED = str(Path(__file__).parents[1] / "trajectory" / "killed_evaluation.py")
TASKS = [make_task("animals"), make_task("colours", answer="colour")]
# Two tasks, two draws, 0 and 2 shots: six points of four answers each, as at 0 shots all draws are one.
SIZES = {"shots": (0, 2), "draws": 2, "queries": 4}
NUM_ANSWERS = 6 * 4


@pytest.fixture(scope="module")
def asked(tokenizers):
    tokenizer = TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    return InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=200, trained_shots={})


class StopError(Exception):
    """Stands for whatever ends a process."""


def stop_after(num_points: int):
    def on_progress(what: str, done: int, total: int) -> None:
        assert total == NUM_ANSWERS
        if done == 4 * num_points:
            raise StopError

    return on_progress


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_leaves_nothing_behind(asked, tmp_path):
    whole = evaluate(asked, TASKS, **SIZES)
    out = tmp_path / "new" / "c.json"
    with pytest.raises(StopError):
        evaluate(asked, TASKS, **SIZES, out=out, on_progress=stop_after(4))
    assert not out.exists()
    assert len(list(out.with_name("c.json.parts").glob("*.parquet"))) == 4
    told = []
    result = evaluate(asked, TASKS, **SIZES, out=out, on_progress=lambda *line: told.append(line))
    assert told == [("finished before", 16, 24), ("colours, 2 shots", 20, 24), ("colours, 2 shots", 24, 24)]
    assert result == whole
    assert {path.name for path in out.parent.iterdir()} == {"c.json", "c.predictions.parquet"}
    whole.save(tmp_path / "c.json")
    for name in ("c.json", "c.predictions.parquet"):
        assert (out.parent / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.slow
def test_a_damaged_or_foreign_part_is_asked_again(asked, tmp_path):
    out = tmp_path / "c.json"
    with pytest.raises(StopError):
        evaluate(asked, TASKS, **SIZES, out=out, on_progress=stop_after(3))
    parts = sorted((tmp_path / "c.json.parts").glob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-20])
    parts[2].write_bytes(parts[1].read_bytes())
    told = []
    result = evaluate(asked, TASKS, **SIZES, out=out, on_progress=lambda *line: told.append(line))
    assert told[0] == ("finished before", 4, 24)
    assert result == evaluate(asked, TASKS, **SIZES)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "sweep.seed was 0 and is 1"),
        ({"shots": (0, 4)}, "sweep.shots was [0, 2] and is [0, 4]"),
        ({"queries": 5}, "sweep.num_queries was 4 and is 5"),
        ({"draws": 3}, "sweep.num_draws was 2 and is 3"),
    ],
)
def test_other_arguments_are_refused_in_one_line(asked, tmp_path, changes, told):
    out = tmp_path / "c.json"
    with pytest.raises(StopError):
        evaluate(asked, TASKS, **SIZES, out=out, on_progress=stop_after(2))
    before = sorted((tmp_path / "c.json.parts").iterdir())
    with pytest.raises(UserError) as refused:
        evaluate(asked, TASKS, **{**SIZES, **changes}, out=out)
    assert f"holds points of an unfinished evaluation that differs: {told};" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted((tmp_path / "c.json.parts").iterdir()) == before


@pytest.mark.slow
def test_a_finished_result_of_other_settings_is_refused_before_anything_is_asked(asked, tmp_path):
    out = tmp_path / "c.json"
    first = evaluate(asked, TASKS, **SIZES, out=out)
    before = out.read_bytes()
    for changes, told in (
        ({"shots": (0, 1)}, "shots"),
        ({"seed": 1}, "seed"),
        ({"answering": AnswerSettings(normalize="tokens")}, "normalize"),
    ):
        with pytest.raises(UserError, match=f"holds a finished result with other {told};"):
            evaluate(asked, TASKS, **{**SIZES, **changes}, out=out, on_progress=stop_after(0))
    assert out.read_bytes() == before
    assert evaluate(asked, TASKS, **SIZES, out=out) == first


@pytest.mark.slow
def test_what_an_earlier_version_began_behind_other_shots_is_refused_in_one_line(asked, tmp_path):
    """A2: results and headers from before purposes were in the seeds say nothing of their streams."""
    unfinished, finished = tmp_path / "a.json", tmp_path / "b.json"
    with pytest.raises(StopError):
        evaluate(asked, TASKS, **SIZES, out=unfinished, on_progress=stop_after(1))
    evaluate(asked, TASKS, **SIZES, out=finished)
    header = tmp_path / "a.json.parts" / "evaluation.json"
    for file in (header, finished):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content.pop("streams") == 2
        file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="points of an unfinished evaluation that differs: streams was None and is 2;"):
        evaluate(asked, TASKS, **SIZES, out=unfinished)
    with pytest.raises(UserError, match="holds a finished result with other streams; name another file"):
        evaluate(asked, TASKS, **SIZES, out=finished)


@pytest.mark.slow
def test_the_same_call_is_taken_again_where_a_number_of_shots_could_not_be_asked(asked, tmp_path):
    sizes = {**SIZES, "shots": (2, 500)}  # no task has so many rows
    first = evaluate(asked, TASKS, **sizes, out=tmp_path / "c.json")
    assert [cell.num_scored for cell in first.curves[0].points] == [8, 0]
    assert evaluate(asked, TASKS, **sizes, out=tmp_path / "c.json") == first


def test_nothing_to_ask_is_an_error_unless_it_is_allowed(asked):
    sizes = {**SIZES, "shots": (500,)}
    with pytest.raises(UserError, match="nothing can be asked: task 'animals' at 500 shots: it has only 40 train rows"):
        evaluate(asked, TASKS, **sizes)
    sweep = Sweep((500,), num_draws=2, num_queries=4, max_tokens=asked.max_tokens)
    assert evaluate_sweep(asked, TASKS, sweep, allow_empty=True).curves[0].points[0].score is None


@pytest.mark.slow
def test_another_model_or_task_is_refused_and_the_same_elsewhere_is_not(asked, tmp_path):
    out = tmp_path / "c.json"
    with pytest.raises(StopError):
        evaluate(asked, TASKS, **SIZES, out=out, on_progress=stop_after(1))
    other = InferenceModel("tiny", tiny_model("llama", seed=1), asked.tokenizer, max_tokens=200, trained_shots={})
    with pytest.raises(UserError, match=r"model\.weights was"):
        evaluate(other, TASKS, **SIZES, out=out)
    with pytest.raises(UserError, match=r"tasks\.colours was colours-colour-60 and is None"):
        evaluate(asked, TASKS[:1], **SIZES, out=out)
    twin = InferenceModel("moved", tiny_model("llama"), asked.tokenizer, max_tokens=200, trained_shots={})
    assert evaluate(twin, TASKS, **SIZES, out=out).model == "moved"


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path):
    (tmp_path / "c.json.parts").mkdir()
    (tmp_path / "c.json.parts" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match=r"c\.json\.parts stands in its way"):
        Unfinished(tmp_path / "c.json", {"tasks": {}})
    assert (tmp_path / "c.json.parts" / "thesis.txt").read_text() == "dear"


def test_a_header_that_another_rank_writes_meanwhile_stands_in_nobodys_way(tmp_path, monkeypatch):
    """A rank looked for it, another one wrote it, and the first found a file in the folder that was none of ours."""
    header, is_file = tmp_path / "c.json.parts" / HEADER, Path.is_file

    def look_too_early(path):
        found = is_file(path)
        if path == header and not found:
            header.parent.mkdir()
            header.write_text('{"tasks": {}}')
        return found

    monkeypatch.setattr(Path, "is_file", look_too_early)
    Unfinished(tmp_path / "c.json", {"tasks": {}})
    assert json.loads(header.read_bytes()) == {"tasks": {}}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_damaged_header_is_told_in_one_line(tmp_path, content):
    parts = Unfinished(tmp_path / "c.json", {"tasks": {}})
    (parts.folder / HEADER).write_bytes(content)
    told = rf"c\.json: {parts.folder / HEADER} is damaged, .*; name another `out`, or remove {parts.folder}$"
    with pytest.raises(UserError, match=told):
        Unfinished(tmp_path / "c.json", {"tasks": {}})


def test_what_a_kill_in_a_write_or_a_removal_leaves_is_no_hindrance(tmp_path):
    identity = {"tasks": {"a/b": "x"}}
    parts = Unfinished(tmp_path / "c.json", identity)
    parts.write([Prediction("a/b", 1, 4, "q", "owl", "owl", 1.0, 0.5)])
    (parts.folder / ".task0-draw1-shots8.parquet.1-ab.partial").write_bytes(b"half")
    again = Unfinished(tmp_path / "c.json", identity)
    assert again.read("a/b", draw=1, shots=8, queries=["q"]) is None
    assert again.read("a/b", draw=1, shots=4, queries=["q"])[0].score == 1.0
    assert again.read("a/b", draw=1, shots=4, queries=["p"]) is None
    assert json.loads((again.folder / HEADER).read_bytes()) == identity
    again.remove()
    assert not again.folder.exists()


@pytest.mark.slow
def test_killed_three_times_it_equals_an_uninterrupted_one_and_asks_no_cell_twice(tmp_path):
    config = write_setting(tmp_path)
    arguments = [str(tmp_path / "start"), config.tasks.folder]
    whole = start_process([KILLED, str(tmp_path / "whole" / "c.json"), *arguments, "never", "0"])
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.split() == ["asked", "9"]  # three tasks
    folder, finished = tmp_path / "killed" / "c.json.parts", {}
    # After a cell is kept; while a cell is being written; while the finished result's parts are removed.
    for kind, number, num_kept in (("kept", 2, 2), ("rename", 4, 5), ("removed", 3, 6)):
        killed = start_process([KILLED, str(tmp_path / "killed" / "c.json"), *arguments, kind, str(number)])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
        assert len(kept) == num_kept
        assert finished.items() <= kept.items() or kind == "removed"
        finished = kept
    assert (tmp_path / "killed" / "c.json").read_bytes() == (tmp_path / "whole" / "c.json").read_bytes()
    last = start_process([KILLED, str(tmp_path / "killed" / "c.json"), *arguments, "never", "0"])
    assert last.stdout.split() == ["asked", "3"], last.stderr  # those that were removed already
    for name in ("c.json", "c.predictions.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"c.json", "c.predictions.parquet"}
