"""The demo's regimes: their sizes, that nothing trained is held out, and that a new task needs its examples."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from manyicl.demo.regimes import CONTRAST, FAMILIAR, HEADLINE, RISING, draw_familiar, draw_regime
from manyicl.demo.tasks import find_kinds, write_tasks

FAMILIES = {"classification", "nli", "qa", "summarization", "math"}


@pytest.mark.parametrize(("regime", "sizes"), [(HEADLINE, (128, 96, 32)), (CONTRAST, (4, 300, 32))])
def test_a_regime_has_its_tasks_of_its_families_and_holds_others_out(regime, sizes):
    trained, held_out = draw_regime(regime, seed=0)
    assert (len(trained), regime.num_train, len(held_out)) == sizes
    told = [task.identity for task in (*trained, *held_out)]
    assert len(set(told)) == len(told)
    assert len({task.name for task in (*trained, *held_out)}) == len(told)
    for tasks in (trained, held_out):
        assert {task.kind.name for task in tasks} == set(regime.kinds)
        families = FAMILIES if regime is HEADLINE else {"classification", "qa"}
        assert {task.kind.family for task in tasks} == families
        counts = Counter(task.kind.name for task in tasks)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_regime_is_a_pure_function_of_the_seed():
    one, again, other = (draw_regime(HEADLINE, seed=seed) for seed in (3, 3, 4))
    names = [[task.name for part in parts for task in part] for parts in (one, again, other)]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


@pytest.mark.parametrize("regime", [HEADLINE, CONTRAST])
def test_every_task_has_inputs_enough(regime, tmp_path):
    trained, held_out = draw_regime(regime, seed=1)
    for task in (*trained[: len(regime.kinds)], *held_out[:2]):
        count = regime.num_train + regime.num_test
        assert len(task.draw_examples(random.Random(0), count=count)) == count
    write_tasks(tmp_path, trained[:1], num_train=regime.num_train, num_test=regime.num_test, seed=0)
    assert len(list(tmp_path.iterdir())) == 2


def test_sixteen_shots_do_not_tell_a_whole_task_and_more_tell_more():
    # How much of a task's answers or table entries the first k examples have shown, where answers are of a table.
    trained, _ = draw_regime(HEADLINE, seed=0)
    shown = {16: [], 64: []}
    for task in trained:
        if task.kind.name in ("keyword", "topic", "recall", "price"):
            answers = [draft.answer for draft in task.draw_examples(random.Random(task.name), count=96)]
            for shots, shares in shown.items():
                shares.append(sum(answer in answers[:shots] for answer in answers[shots:]) / len(answers[shots:]))
    count = len(shown[16])
    assert count > 40
    assert sum(shown[16]) / count < 0.7
    assert sum(shown[64]) / count > 0.9


def test_familiar_tasks_are_of_no_regime():
    assert not set(FAMILIAR) & {*RISING, *HEADLINE.kinds, *CONTRAST.kinds}
    assert {kind.name for kind in find_kinds([*RISING, *FAMILIAR])} == {*RISING, *FAMILIAR}
    tasks = draw_familiar(count=12, seed=0)
    assert [task.kind.name for task in tasks] == [*FAMILIAR, *FAMILIAR]
    assert len({task.identity for task in tasks}) == 12
