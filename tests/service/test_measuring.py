"""Measurements: curves of tasks that improve, or do not, with shots; suspects, duplicates, and work that yields."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from manyicl.errors import UserError
from manyicl.intervals import Interval
from manyicl.service.answering import Answerer
from manyicl.service.library import Library
from manyicl.service.measurement.findings import (
    CurvePoint,
    Doubt,
    Duplicates,
    find_slope,
    find_suspects,
    from_content,
    make_points,
    to_content,
    write_sentence,
)
from manyicl.service.measurement.measuring import Measurer
from manyicl.service.measurement.plans import make_plan
from manyicl.service.prefix_cache import PrefixCache
from manyicl.service.selection import TaskBook
from manyicl.service.served import open_service
from manyicl.service.settings import ServiceSettings, ShotChoice
from tests.service.conftest import INPUTS, QUIET, ROWS, make_rows

SMALL = ServiceSettings(measure_tokens=20_000)


@pytest.mark.slow
def test_the_curve_of_a_task_that_is_learned_from_shots_rises(seed_model):
    with open_service(seed_model, settings=SMALL) as service:
        task = service.add_task(make_rows(160), name="animals")
        found = task.measure(120)
        assert (found.state, found.fraction, found.version) == ("done", 1.0, 1)
        assert [point.shots for point in found.curve][:4] == [0, 1, 2, 4]
        few, most = found.curve[1], found.curve[-1]
        assert most.shots > 50
        assert most.score > few.score + 0.3
        assert most.low > found.majority
        assert found.chance == pytest.approx(0.25)
        assert all(point.low <= point.score <= point.high for point in found.curve)
        assert "That is better than always answering" in found.sentence
        assert found.slope_low <= found.slope <= found.slope_high


@pytest.mark.slow
def test_examples_that_come_later_move_the_curve_and_the_old_one_stays_meanwhile(seed_model):
    with open_service(seed_model, settings=SMALL) as service:
        task = service.add_task(make_rows(60), name="animals")
        before = task.measure(120)
        task.add_examples(make_rows(100, seed=1))
        meanwhile = task.measurement
        assert meanwhile.state in ("waiting", "running")
        assert meanwhile.curve == before.curve
        after = task.measure(120)
        assert after.version == 2
        assert after.curve[-1].shots > before.curve[-1].shots


@pytest.mark.slow
def test_a_task_without_a_rule_is_said_to_be_no_better_than_guessing(seed_model):
    rng = random.Random(0)
    rows = [{**row, "answer": rng.choice(["yes", "no"])} for row in make_rows(120)]
    with open_service(seed_model, settings=SMALL) as service:
        found = service.add_task(rows, name="noise").measure(120)
    assert found.suspects == ()
    assert "better than always answering" not in found.sentence.replace("not clearly better than always", "")


@pytest.mark.slow
def test_wrong_labels_are_suspects(seed_model):
    rows = make_rows(160)
    wrong = {rows[place]["input"]: rows[place] for place in (7, 40, 90)}
    others = {"fox": "owl", "owl": "cat", "cat": "dog", "dog": "fox"}
    rows = [{**row, "answer": others[row["answer"]]} if row["input"] in wrong else row for row in rows]
    with open_service(seed_model, settings=ServiceSettings(measure_tokens=60_000)) as service:
        found = service.add_task(rows, name="animals").measure(120)
    assert {suspect.input for suspect in found.suspects[:3]} & set(wrong)
    for suspect in found.suspects:
        assert suspect.nats_gap >= 3
        assert suspect.likelier != suspect.answer


@pytest.mark.slow
def test_a_small_model_measures_more_by_default(seed_model):
    """13,000 tokens, which a model of 135M parameters gets, are enough for 45 answers: it was blind to the size."""
    with open_service(seed_model) as service:
        found = service.add_task(make_rows(300), name="animals").measure(240)
    assert found.curve[-1].num_scored == 300


@pytest.mark.slow
def test_near_copies_are_found_and_told(seed_model):
    text = "please send the report about the {} to the whole team before the end of this long week"
    rows = [{"input": text.format(word), "answer": "a"} for word in ("red fox", "red  fox", "blue owl")]
    with open_service(seed_model, settings=SMALL) as service:
        task = service.add_task(rows + make_rows(20), name="copies")
        found = task.measure(120)
        ids = {example.input: example.id for example in task.examples()}
    assert (ids[rows[0]["input"]], ids[rows[1]["input"]]) in found.duplicates.pairs
    assert "have a near copy" in found.sentence


@pytest.mark.slow
def test_generated_answers_are_measured_too(seed_model):
    with open_service(seed_model, settings=SMALL) as service:
        found = service.add_task(make_rows(60), name="open", settings={"family": "qa"}).measure(120)
    assert found.state == "done"
    assert found.chance is None
    assert found.suspects == ()
    assert found.curve[-1].num_scored > 10


def test_too_few_examples_are_told(seed_model):
    with open_service(seed_model, settings=SMALL) as service:
        found = service.add_task(make_rows(5), name="few", settings={"family": "classification"}).measure(60)
    assert (found.state, found.curve) == ("done", ())
    assert found.sentence.startswith("5 examples are too few to measure anything")


@pytest.mark.slow
def test_requests_are_answered_while_a_task_is_measured(seed_model):
    with open_service(seed_model, settings=ServiceSettings(measure_tokens=200_000)) as service:
        task = service.add_task(make_rows(400), name="animals")
        while task.measurement.state == "waiting":
            time.sleep(0.01)
        replies = task.predict(INPUTS)
        assert task.measurement.state == "running"
        assert replies[0].timing.queued_s < 3
        assert service.stats().measuring == "animals"


@pytest.mark.slow
def test_a_measurement_is_kept_with_the_task(seed_model, tmp_path):
    with open_service(seed_model, data=tmp_path, settings=SMALL) as service:
        before = service.add_task(make_rows(60), name="animals").measure(120)
    with open_service(seed_model, data=tmp_path, settings=SMALL) as service:
        assert service.task("animals").measure(5) == before
    assert from_content(to_content(before)) == before


def tokenize_rows(model, rows, folder):
    with open_service(model, data=folder, settings=QUIET) as service:
        assert service.add_task(rows, name="animals").measurement.state == "off"
    return TaskBook(Library(folder), model).get("animals")


def test_every_example_is_answered_from_others_only(seed_model, tmp_path):
    plan = make_plan(tokenize_rows(seed_model, ROWS, tmp_path), most_tokens=30_000, query_tokens=10)
    assert sorted(np.concatenate(plan.folds).tolist()) == list(range(80))
    for fold, order in zip(plan.folds, plan.orders, strict=True):
        assert not set(fold.tolist()) & set(order.tolist())
    assert plan.points == (0, 1, 2, 4, 8, 16, 32, 60)
    assert plan.num_last == 20


def test_examples_that_requests_do_not_show_are_answered_after_those_that_they_do(seed_model, tmp_path):
    ids = tokenize_rows(seed_model, make_rows(1000), tmp_path)
    served = np.arange(0, 400, 4)
    plan = make_plan(ids, most_tokens=10_000, query_tokens=15, served=served)
    assert plan.as_served
    assert plan.orders[0].tolist() == served.tolist()
    assert sorted([*plan.folds[0].tolist(), *served.tolist()]) == list(range(1000))
    assert plan.points == (0, 1, 4, 16, 64, 100)
    # With tokens for all of them, those that are shown are answered too.
    all_of_them = make_plan(ids, most_tokens=100_000, query_tokens=15, served=served)
    assert not all_of_them.as_served
    assert sum(map(len, all_of_them.folds)) == 1000
    # If most are shown, too few would be left.
    assert not make_plan(ids, most_tokens=20_000, query_tokens=15, served=np.arange(600)).as_served


@pytest.mark.slow
def test_a_measurement_and_the_first_request_share_one_prefix(seed_model):
    settings = ServiceSettings(measure_tokens=4_000, shot_tokens=600)
    with open_service(seed_model, settings=settings) as service:
        task = service.add_task(make_rows(400), name="animals")
        found = task.measure(120)
        [reply] = task.predict("red fox 1")
        assert found.curve[-1].shots == len(reply.shots)
        assert reply.timing.prefix_cached
        assert service.stats().prefixes["encoded"] == 0
        assert service.stats().prefixes["hits"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("budget", [20_000, 100_000])
def test_the_plan_stays_within_its_tokens(seed_model, tmp_path, budget):
    ids = tokenize_rows(seed_model, make_rows(1000), tmp_path)
    plan = make_plan(ids, most_tokens=budget, query_tokens=15)
    shots = sum(int(ids.tokens.lengths[order[: plan.points[-1]]].sum()) for order in plan.orders)
    rows = ((len(plan.points) - 1) * plan.num_rows + plan.num_last) * len(plan.folds)
    assert shots + rows * 15 < 1.1 * budget


def test_the_slope_compares_the_same_examples():
    scores = {0: {1: 0.0}, 4: {n: float(n < 4) for n in range(10)}, 16: {n: float(n < 6) for n in range(20)}}
    slope = find_slope(scores, task="x")
    assert slope.mean == pytest.approx(0.1)  # 2 of 10 more, in two doublings
    assert slope.low < 0 < slope.high
    assert find_slope({0: {1: 0.0}, 1: {1: 1.0}}, task="x") is None


def test_suspects_need_a_model_that_knows_better():
    examples = service_examples = [type("E", (), {"id": n, "input": f"i{n}", "answer": "a"})() for n in range(3)]
    doubts = [Doubt(0, "b", 3.5), Doubt(1, "b", 1.0), Doubt(2, "b", 9.0)]
    good = CurvePoint(8, 0.9, 0.8, 0.95, 50)
    assert [s.example_id for s in find_suspects(doubts, examples, last=good, majority=0.5)] == [2, 0]
    assert find_suspects(doubts, service_examples, last=good, majority=0.85) == ()


POINTS = make_points({0: dict.fromkeys(range(50), 0.0), 64: {n: float(n % 5 > 0) for n in range(50)}}, task="x")
TELL = {"majority": 0.3, "majority_answer": "yes", "num_examples": 100, "num_shown": 100, "duplicates": Duplicates()}


def test_the_sentence_says_no_more_than_the_intervals():
    words = write_sentence(POINTS, Interval(0.05, 0.02, 0.08), **TELL)
    assert words == (
        "After 64 shots expect a score of 80 % (95 % interval 66 to 89 %). That is better than always answering"
        " 'yes', which scores 30 %. More examples would help: the last doublings of the shots added +5.0 points each"
        " (+2.0 to +8.0 points)."
    )
    assert "would hardly help" in write_sentence(POINTS, Interval(0.0, -0.01, 0.005), **TELL)
    assert "is not clear" in write_sentence(POINTS, Interval(0.02, -0.01, 0.05), **TELL)
    assert "an input is shown 60 of 100 examples" in write_sentence(
        POINTS, Interval(0.05, 0.02, 0.08), **{**TELL, "num_shown": 60}
    )
    assert "not clearly better" in write_sentence(POINTS, None, **{**TELL, "majority": 0.75})
    assert "is worse than always answering" in write_sentence(POINTS, None, **{**TELL, "majority": 0.95})


def test_a_service_that_closes_does_not_wait_for_a_measurement(seed_model):
    service = open_service(seed_model, settings=ServiceSettings(measure_tokens=4_000_000))
    service.add_task(make_rows(500), name="animals")
    closing = threading.Thread(target=service.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive(), "it waits for a measurement of minutes"


class BrokenBook(TaskBook):
    def get(self, name):
        raise UserError("the vocabulary is too small")


def test_a_task_that_cannot_be_read_in_ids_is_a_failed_measurement(seed_model, tmp_path, caplog):
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        service.add_task(ROWS, name="animals")
    library, cache = Library(tmp_path), PrefixCache(seed_model, most_bytes=1)
    answerer = Answerer(seed_model, endpoint=None, cache=cache)
    book = BrokenBook(library, seed_model)
    measurer = Measurer(library, book, answerer, most_tokens=1000, choice=ShotChoice())
    assert measurer.step()
    found = measurer.find(*library.versions()["animals"])
    assert (found.state, found.version) == ("failed", 1)
    assert found.sentence == "The measurement failed (the vocabulary is too small)."
    assert not measurer.step()
    later = measurer.find(library.versions()["animals"][0], 2)
    assert (later.state, later.sentence) == ("waiting", "")
    library.close()


def test_the_measurement_of_a_task_that_is_removed_ends(seed_model, tmp_path):
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        service.add_task(ROWS, name="animals")
    library = Library(tmp_path)
    with Answerer(seed_model, endpoint=None, cache=PrefixCache(seed_model, most_bytes=1)) as answerer:
        measurer = Measurer(library, TaskBook(library, seed_model), answerer, most_tokens=20_000, choice=ShotChoice())
        assert measurer.step()
        assert measurer.current == "animals"
        library.remove_task("animals")
        measurer.step()
        assert measurer.current is None
    library.close()
