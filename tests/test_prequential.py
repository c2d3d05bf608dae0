"""The prequential score: halves of the train rows, and what one pass over unseen rows costs."""

from __future__ import annotations

import pytest

from manyicl.evaluation import load_asked_model, tokenize_for
from manyicl.prequential import prequential_nats, write_halves
from manyicl.shot_curve import score_one_pass
from manyicl.tasks import load_tasks
from manyicl.world.seed import TEMPLATE
from tests.comparison_setting import write_world


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    trained, _, _ = write_world(folder)
    tasks = load_tasks(folder / "tasks", names=trained[:2])
    write_halves(folder / "halves", tasks)
    return tasks, load_tasks(folder / "halves")


def test_each_train_row_is_in_one_half_and_no_other_row_in_any(halves):
    for task, half in zip(*halves, strict=True):
        assert (half.name, half.family, half.metric, half.labels) == (task.name, task.family, task.metric, task.labels)
        assert half.instruction == task.instruction
        trained, unseen = {e.input for e in (*half.train, *half.validation)}, {e.input for e in half.test}
        assert not trained & unseen
        assert trained | unseen == {e.input for e in task.train}
        assert abs(len(trained) - len(unseen)) <= 1


def test_the_score_is_the_mean_over_all_answers_of_the_pass(halves):
    asked = load_asked_model("seed", max_tokens=192, template=TEMPLATE)
    nats = prequential_nats(asked, halves[1], seed=0)
    task = halves[1][0]
    curve = score_one_pass(asked.model, tokenize_for(task, asked), num_episodes=99, token_budget=192)
    total = sum(cell.nll * cell.num_scored for cell in curve.cells)
    assert sum(cell.num_scored for cell in curve.cells) == len(task.test)  # each row once
    assert nats[task.name] == pytest.approx(total / len(task.test))
    assert set(nats) == {task.name for task in halves[1]}
