"""Each model family goes through training and all ways of asking, as its own class with its own config, shrunk."""

from __future__ import annotations

import pytest

from manyicl.evaluation.loop import evaluate, one_pass_curve
from manyicl.inference.answering.questions import ask
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import load_tasks
from manyicl.training.recipe import make_config
from manyicl.training.run import train
from tests.conftest import CONFIGS, tiny_model
from tests.trajectory.setting import write_setting


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"mistral-sliding"}))
def test_a_family_trains_and_is_asked(tmp_path, name):
    config = write_setting(tmp_path, num_steps=2)
    tiny_model(name).save_pretrained(tmp_path / "start")
    config = make_config(config.model_dump() | {"held_out": {"episodes": 1}}, source="test")
    run = train(config, out=tmp_path / "run")
    assert all(row.after < row.before for row in run.held_out)
    asked = load_for_inference(str(run.folder))
    tasks = load_tasks(tmp_path / "tasks", names=["animals"])
    sweep = evaluate(asked, tasks, shots=(0, 2), draws=2, queries=4)
    assert [cell.num_scored for cell in sweep.curves[0].points] == [4, 8]
    assert one_pass_curve(asked, tasks, episodes=2).curves[0].points[0].num_scored == 2
    assert ask(asked, tasks[0], ["the red cat 77"])[0].answer in tasks[0].labels


@pytest.mark.slow
def test_a_window_where_every_layer_slides_is_refused_before_any_weight_is_loaded(tmp_path):
    from manyicl.errors import UserError

    config = write_setting(tmp_path)
    tiny_model("mistral-sliding").save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match=r"token_budget = 160: .* sees only the last 16 tokens"):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
