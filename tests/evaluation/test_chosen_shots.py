"""Shots that are chosen for each query: what is asked, that prompts are whole, and that results say how."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import join_examples, query_ids, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.difference import compare_results
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.results import Evaluation
from manyicl.evaluation.shots import FILL
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.drawing import prefix_lengths
from manyicl.inference.engine import score_whole_prompts
from manyicl.inference.model import InferenceModel
from tests.conftest import make_task, tiny_model
from tests.episodes.test_template import CHATML, chat_tokenizer

SWEEP = {"shots": (0, 2, 6), "num_draws": 2, "num_queries": 5, "max_tokens": 300}
NEAREST = {"choose": "nearest", "num_nearest": 3}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return TaskTokenizer(tokenizers["bpe"], TemplateSettings())


def plan_of(tokenizer, **options) -> TaskSweep:
    task = tokenize_task(make_task("animals"), tokenizer=tokenizer)
    return TaskSweep(task, tokenizer=tokenizer, sweep=Sweep(**{**SWEEP, **options}))


def test_nearest_shots_follow_the_first_shots_of_the_random_draw(tokenizer):
    random, nearest = plan_of(tokenizer), plan_of(tokenizer, **NEAREST)
    assert [d.tolist() for d in nearest.draws] == [d.tolist() for d in random.draws]
    assert nearest.queries.tolist() == random.queries.tolist()
    assert [nearest.num_shared(k) for k in (0, 2, 3, 6)] == [0, 0, 0, 3]
    for query in nearest.queries.tolist():
        own = nearest.nearest_shots(1, 6, query)
        assert len(own) == 3
        assert not {*own} & {*nearest.draws[1][:3].tolist()}
        assert len(nearest.nearest_shots(1, 2, query)) == 2
        assert nearest.nearest_shots(0, 0, query) == random.nearest_shots(1, 6, query) == []
        # 'the red fox 7': the last shot has the most words in common.
        words = {*nearest.task.test[query].input.split()}
        common = [len(words & {*nearest.task.train[row].input.split()}) for row in own]
        assert common == sorted(common)
        assert common[-1] >= 2


def test_nearest_shots_of_rows_with_embeddings_are_those_of_the_smallest_angle(tokenizer):
    def turned(rows):
        angles = np.linspace(0, 3, len(rows))
        numbers = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        return tuple(replace(row, embedding=one.tobytes()) for row, one in zip(rows, numbers, strict=True))

    animals = make_task("animals")
    task = replace(animals, train=turned(animals.train), test=turned(animals.test))
    sweep = Sweep(shots=(3,), num_draws=1, num_queries=4, max_tokens=300, **NEAREST)
    plan = TaskSweep(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer, sweep=sweep)
    step = (len(task.train) - 1) / (len(task.test) - 1)
    for query in plan.queries.tolist():
        own = plan.nearest_shots(0, 3, query)
        assert own[-1] == pytest.approx(query * step, abs=1)
        assert max(own) - min(own) == 2  # neighbours, whatever their words


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_prompt_is_the_same_text_as_if_its_shots_were_all_shared(tokenizers, style):
    inner = tokenizers["bpe"] if style == "plain" else chat_tokenizer(tokenizers["bpe"], CHATML)
    plan = plan_of(TaskTokenizer(inner, TemplateSettings(style=style)), **NEAREST)
    for draw, shots in plan.points:
        shared = plan.draws[draw][: plan.num_shared(plan.num_shots(draw, shots))]
        for query in plan.queries.tolist():
            order = np.concatenate([shared, plan.nearest_shots(draw, shots, query)]).astype(np.int32)
            whole = join_examples(plan.tokenized, split="train", indices=order).ids
            asked = query_ids(plan.tokenized, split="test", index=query, after_shots=shots > 0)
            before = np.concatenate([plan.tokenized.head_ids, plan.prefix_ids(draw, start=0, stop=len(shared))])
            assert np.concatenate([before, plan.asked_ids(draw, shots)[query]]).tolist() == [*whole, *asked]
            own = plan.own_tokens(draw, shots)[plan.queries.tolist().index(query)]
            assert own == len(plan.asked_ids(draw, shots)[query]) - len(asked)


def test_a_window_is_filled_by_as_many_shots_as_with_random_ones_and_no_prompt_is_longer(tokenizer):
    random, nearest = (plan_of(tokenizer, shots=(FILL,), **more) for more in ({}, NEAREST))
    assert nearest.num_filling == random.num_filling
    for draw in range(2):
        shared = nearest.num_shared(nearest.num_filling[draw])
        before = int(prefix_lengths(nearest.tokenized, nearest.draws[draw])[shared])
        for query in nearest.queries.tolist():
            assert len(nearest.nearest_shots(draw, FILL, query)) == 3
            # All labels of this task are one token and a terminator.
            assert before + len(nearest.asked_ids(draw, FILL)[query]) + 2 <= 300


@pytest.mark.slow
def test_answers_after_nearest_shots_are_those_of_whole_prompts(tokenizer, tmp_path):
    model = tiny_model("llama")
    asked = InferenceModel("tiny", model, tokenizer=tokenizer, max_tokens=300, trained_shots={})
    options = {"shots": (2, 6), "draws": 2, "queries": 4}
    result = evaluate(asked, [make_task("animals")], **options, **NEAREST, out=tmp_path / "nearest.json")
    plan = plan_of(tokenizer, shots=(2, 6), num_queries=4, **NEAREST)
    given = iter(result.predictions)
    for shots in (2, 6):
        for draw in (0, 1):
            shared = plan.prefix_ids(draw, start=0, stop=plan.num_shared(shots))
            before = np.concatenate([plan.tokenized.head_ids, shared])
            for query in plan.queries.tolist():
                pairs = plan.written[plan.candidates[query]]
                nats = score_whole_prompts(
                    model, before, [plan.asked_ids(draw, shots)[query]], [[ids for _, ids in pairs]]
                )[0]
                told = next(given).choice_nll
                assert [told[text] for text, _ in pairs] == pytest.approx(nats.tolist(), abs=1e-4)


@pytest.mark.slow
def test_a_result_says_how_its_shots_were_chosen_and_is_not_written_over_another(tokenizer, tmp_path):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=300, trained_shots={})
    options = {"shots": (0, 6), "draws": 2, "queries": 4}
    out = {name: tmp_path / f"{name}.json" for name in ("random", "balanced", "nearest")}
    for name, path in out.items():
        more = NEAREST if name == "nearest" else {"choose": name}
        evaluate(asked, [make_task("animals")], **options, **more, out=path)
    kept = {name: json.loads(path.read_text()) for name, path in out.items()}
    assert {name: (one.get("choose"), one.get("num_nearest")) for name, one in kept.items()} == {
        "random": (None, None), "balanced": ("balanced", None), "nearest": ("nearest", 3)
    }  # fmt: skip
    with pytest.raises(UserError, match="holds a finished result with other choose, num_nearest; name another file"):
        evaluate(asked, [make_task("animals")], **options, **NEAREST, out=out["random"])
    loaded = Evaluation.load(out["nearest"])
    assert (loaded.choose, loaded.num_nearest) == ("nearest", 3)
    point = loaded.curves[0].points[1]
    # A draw has no share of labels if each query has shots of its own.
    assert point.draws[0].top_label_share is point.draws[0].num_missing_labels is None

    found = compare_results(Evaluation.load(out["random"]), loaded)
    assert found.num_rows == 4 + 2 * 4
    assert found.a.endswith("random.json), random shots")
    assert found.b.endswith("nearest.json), nearest shots, 3 of each query's own")
    assert not found.unjoined
    same = compare_results(loaded, loaded)
    assert same.a.endswith("nearest.json)")


@pytest.mark.slow
def test_another_number_of_nearest_shots_does_not_join_in_silence(tokenizer):
    asked = InferenceModel("tiny", tiny_model("llama"), tokenizer=tokenizer, max_tokens=300, trained_shots={})
    options = {"shots": (6,), "draws": 1, "queries": 4, "choose": "nearest"}
    two, five = (evaluate(asked, [make_task("animals")], **options, num_nearest=n) for n in (2, 5))
    found = compare_results(two, five)
    assert (found.a, found.b) == tuple(f"tiny, nearest shots, {n} of each query's own" for n in (2, 5))


def test_the_same_nearest_shots_follow_shared_ones_in_other_orders(tokenizer):
    plan = plan_of(tokenizer, num_draws=3, fixed_shots=6, **NEAREST)
    first = [draw[:3].tolist() for draw in plan.draws]
    assert {tuple(sorted(one)) for one in first} == {tuple(sorted(first[0]))}
    query = int(plan.queries[0])
    assert plan.nearest_shots(0, 6, query) == plan.nearest_shots(2, 6, query)
