"""What waits: limits, deadlines, cancellation, turns of tasks, and errors that fail only those whom they concern."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest

from manyicl.errors import UserError
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.endpoint_calls import EndpointCalls
from manyicl.service.refusals import Closing, DeadlinePassed, QueueFull
from manyicl.service.requests import Item, Request, Ticket, WaitingLine, wait_for
from manyicl.service.served import open_service
from manyicl.service.settings import ServiceSettings
from manyicl.service.worker import Worker
from tests.service.conftest import INPUTS, QUIET, ROWS

IDS = np.arange(10, dtype=np.int32)


def make_request(key, *, num=1, group=None, deadline=None):
    items = [Item(place, f"{key} {place}", IDS, limit=10) for place in range(num)]
    return Request(key=key, group=group or key, items=items, ticket=Ticket(), deadline=deadline)


def take_texts(line):
    return [item.text for _, item in line.take(timeout=0)]


def test_tasks_take_turns_and_requests_of_one_group_share_a_pass():
    line = WaitingLine(max_items=100, max_batch_tokens=40)  # two items of 20 tokens
    line.add(make_request("a", num=5))
    line.add(make_request("b"))
    line.add(make_request("b", group="other shots"))
    line.add(make_request("b"))
    assert [take_texts(line) for _ in range(6)] == [
        ["a 0", "a 1"],
        ["b 0", "b 0"],
        ["a 2", "a 3"],
        ["b 0"],
        ["a 4"],
        [],
    ]


def test_a_task_that_comes_during_a_pass_has_the_next_turn():
    line = WaitingLine(max_items=100, max_batch_tokens=40)  # two items of 20 tokens
    line.add(make_request("big", num=5))
    assert take_texts(line) == ["big 0", "big 1"]
    line.add(make_request("small"))  # while that pass is at work
    assert [take_texts(line) for _ in range(4)] == [["small 0"], ["big 2", "big 3"], ["big 4"], []]


def test_inputs_and_options_have_a_limit_of_their_own():
    line = WaitingLine(max_items=100, max_batch_tokens=80, max_read_tokens=25)
    generated = make_request("a", num=3)  # of 10 tokens, and answers of 10
    chosen = make_request("b", num=3)
    for item in chosen.items:
        item.choices, item.limit = [("yes", [1]), ("no", [2])], 0  # of 12 tokens, options included
    line.add(generated)
    line.add(chosen)
    assert [take_texts(line) for _ in range(4)] == [["a 0", "a 1"], ["b 0", "b 1"], ["a 2"], ["b 2"]]


def test_on_a_cpu_a_pass_is_short_unless_its_size_is_set(seed_model):
    sizes = []
    for settings in (QUIET, ServiceSettings(measure=False, max_batch_tokens=8192)):
        with open_service(seed_model, settings=settings) as service:
            replies = service.add_task(ROWS, name="animals").predict([f"the red fox {n} " * 40 for n in range(12)])
            sizes.append(max(reply.timing.batch_size for reply in replies))
    assert sizes[0] < sizes[1] == 12


def test_what_a_client_that_left_had_asked_is_not_answered_with_what_others_ask(seed_model):
    has_left = threading.Event()
    with open_service(seed_model, settings=QUIET) as service:
        task = service.add_task(ROWS, name="animals")
        busy = service.submit_generation(
            "The red fox", answering=AnswerSettings(max_new_tokens=2), on_text=lambda *_: has_left.wait(60)
        )
        left = [task.submit(INPUTS) for _ in range(5)]
        assert all(ticket.cancel() for ticket in left)
        has_left.set()
        [reply] = task.predict("grey dog")
        assert busy.future.done()
        assert reply.timing.batch_size == 1


def test_an_input_larger_than_a_pass_has_one_of_its_own():
    line = WaitingLine(max_items=100, max_batch_tokens=5)
    line.add(make_request("a", num=2))
    assert [take_texts(line) for _ in range(3)] == [["a 0"], ["a 1"], []]


def test_a_full_queue_says_when_there_will_be_room():
    line = WaitingLine(max_items=4, max_batch_tokens=40)
    line.note_pace(20.0, 2)  # seconds for two
    line.add(make_request("a", num=3))
    with pytest.raises(QueueFull, match=r"3 inputs wait already \(at most 4\); try again in 5 s") as refused:
        line.add(make_request("a", num=3))
    assert refused.value.retry_after_s == pytest.approx(4.8)
    with pytest.raises(UserError, match="5 inputs at once are more than may wait") as refused:
        line.add(make_request("b", num=5))
    assert not isinstance(refused.value, QueueFull)  # to try again would be in vain
    line.take(timeout=0)
    line.add(make_request("a", num=3))
    assert line.outcomes == {"refused": 2}


def test_the_late_and_the_cancelled_leave_the_queue():
    line = WaitingLine(max_items=4, max_batch_tokens=400)
    late, gone, kept = make_request("a", deadline=time.monotonic() - 1), make_request("a", num=2), make_request("a")
    for request in (late, gone, kept):
        line.add(request)
    assert gone.ticket.cancel()
    assert take_texts(line) == ["a 0"]
    with pytest.raises(DeadlinePassed, match="no answer within"):
        late.ticket.future.result(0)
    assert line.outcomes == {"late": 1, "cancelled": 1}
    assert len(line) == 0


def test_a_closed_line_takes_no_more_and_fails_what_waits():
    line = WaitingLine(max_items=4, max_batch_tokens=40)
    waiting = make_request("a")
    line.add(waiting)
    line.close(finish=True)
    with pytest.raises(Closing):
        line.add(make_request("a"))
    assert take_texts(line) == ["a 0"]
    other = WaitingLine(max_items=4, max_batch_tokens=40)
    other.add(waiting)
    other.close(finish=False)
    with pytest.raises(Closing, match="was closed before it answered"):
        waiting.ticket.future.result(0)


def test_closing_also_fails_what_a_pass_has_taken():
    line = WaitingLine(max_items=4, max_batch_tokens=20)
    taken, waiting = make_request("a", num=2), make_request("b")
    line.add(taken)
    line.add(waiting)
    assert take_texts(line) == ["a 0"]
    assert take_texts(line) == ["b 0"]
    line.close(finish=False)
    for request in (taken, waiting):
        with pytest.raises(Closing, match="was closed before it answered"):
            request.ticket.future.result(0)
    assert line.outcomes == {"closed": 2}


class InterruptedFuture(Future):
    """Is waited for until Ctrl-C."""

    def result(self, timeout=None):
        raise KeyboardInterrupt


def test_a_caller_who_is_interrupted_leaves_nothing_behind_that_runs_on():
    ticket = Ticket()
    ticket.future = InterruptedFuture()
    with pytest.raises(KeyboardInterrupt):
        wait_for(ticket, timeout=None)
    assert ticket.future.cancelled()


class StubbornAnswerer:
    """Answers by counting, and fails at inputs that say so."""

    def __init__(self):
        self.calls = EndpointCalls()
        self.batches = []
        self.may_go = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answer(self, batch):
        self.may_go.wait(10)
        self.batches.append([item.text for _, item in batch])
        for _, item in batch:
            if item.text.startswith("bug"):
                raise ZeroDivisionError("a bug")
            if item.text.startswith("refused"):
                raise UserError("refused")
        for request, item in batch:
            request.deliver(item.place, item.text)


class PartlyAnswerer(StubbornAnswerer):
    """Answers what comes before an input that it refuses, as passes of several parts do."""

    def answer(self, batch):
        self.may_go.wait(10)
        for request, item in batch:
            if item.text.startswith("refused"):
                raise UserError("refused")
            request.deliver(item.place, item.text)


class NoWork:
    def step(self):
        return False


def test_an_error_fails_its_own_requests_and_the_worker_goes_on(caplog):
    line, answerer = WaitingLine(max_items=100, max_batch_tokens=1000), StubbornAnswerer()
    worker = Worker(answerer, line, make_background=lambda _: NoWork())
    worker.start()
    requests = [make_request(key, group="one") for key in ("good", "refused", "bug")]
    for request in requests:
        request.key = "task"
        line.add(request)
    answerer.may_go.set()
    assert requests[0].ticket.future.result(5) == ["good 0"]
    with pytest.raises(UserError, match="refused"):
        requests[1].ticket.future.result(5)
    later = make_request("later")
    with pytest.raises((ZeroDivisionError, UserError)):
        requests[2].ticket.future.result(5)
    line.add(later)
    assert later.ticket.future.result(5) == ["later 0"]
    line.close(finish=True)
    assert worker.join(5)


def test_what_was_answered_before_a_batch_failed_is_counted():
    line, answerer = WaitingLine(max_items=100, max_batch_tokens=1000), PartlyAnswerer()
    worker = Worker(answerer, line, make_background=lambda _: NoWork())
    good, bad = make_request("good", num=2, group="one"), make_request("refused", group="one")
    for request in (good, bad):
        request.key = "task"
        line.add(request)
    answerer.may_go.set()
    worker.start()
    line.close(finish=True)
    assert worker.join(5)
    assert good.ticket.future.result(0) == ["good 0", "good 1"]
    assert line.outcomes == {"answered": 1, "failed": 1}
    assert worker.served.num_answers == 2


def test_a_request_of_several_passes_is_counted_once_when_it_is_cancelled():
    line, answerer = WaitingLine(max_items=100, max_batch_tokens=20), StubbornAnswerer()
    request = make_request("a", num=3)
    answerer.answer = lambda batch: request.ticket.cancel()
    worker = Worker(answerer, line, make_background=lambda _: NoWork())
    line.add(request)
    worker.start()
    line.close(finish=True)
    assert worker.join(5)
    assert line.outcomes == {"cancelled": 1}


class LastMomentLine(WaitingLine):
    """A line that gets a request, and is closed, in the moment after the worker found it empty."""

    last = None

    def take(self, *, timeout):
        batch = super().take(timeout=timeout)
        if self.last is None:
            self.last = make_request("last")
            self.add(self.last)
            self.close(finish=True)
        return batch


def test_a_request_of_the_last_moment_is_still_finished():
    line, answerer = LastMomentLine(max_items=100, max_batch_tokens=20), StubbornAnswerer()
    answerer.may_go.set()
    worker = Worker(answerer, line, make_background=lambda _: NoWork())
    worker.start()
    assert worker.join(5)
    assert line.last.ticket.future.result(0) == ["last 0"]


def test_nothing_waits_for_ever_for_a_thread_that_has_ended(caplog):
    line, answerer = WaitingLine(max_items=100, max_batch_tokens=20), StubbornAnswerer()
    answerer.answer = lambda batch: (answerer.may_go.wait(10), exec("raise SystemExit"))
    worker = Worker(answerer, line, make_background=lambda _: NoWork())
    worker.start()
    first, second = make_request("a"), make_request("b")
    line.add(first)
    line.add(second)
    answerer.may_go.set()
    for request in (first, second):
        with pytest.raises(Closing):
            request.ticket.future.result(5)
    with pytest.raises(Closing):
        line.add(make_request("c"))


def test_requests_at_once_share_passes(service, animals):
    animals.predict(INPUTS)
    before = service.stats().num_passes
    service.generate("the", answering=AnswerSettings(max_new_tokens=2))
    tickets = [animals.submit(text) for text in INPUTS * 8]
    replies = [ticket.future.result(60)[0] for ticket in tickets]
    assert max(reply.timing.batch_size for reply in replies) > 4
    assert service.stats().num_passes - before < 20
    stats = service.stats()
    assert stats.requests["answered"] == 34
    assert stats.latency_counts[float("inf")] == 34


def test_a_generated_answer_ends_at_its_deadline_or_when_nobody_wants_it(service):
    task = service.add_task(ROWS, name="open", settings={"family": "qa"})
    task.predict("the red fox", answering=AnswerSettings(max_new_tokens=1))
    pieces: list[str] = []
    ticket = service.submit_generation(
        "The red fox", answering=AnswerSettings(max_new_tokens=1000), on_text=lambda _, piece: pieces.append(piece)
    )
    while not pieces:
        time.sleep(0.01)
    assert ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.future.result(0)
    late = service.submit_generation("The red fox", answering=AnswerSettings(max_new_tokens=1000), deadline=0.2)
    with pytest.raises(DeadlinePassed):
        late.future.result(30)
    assert task.predict("the red fox", answering=AnswerSettings(max_new_tokens=1))[0].num_answer_tokens == 1
    assert service.stats().requests["cancelled"] == service.stats().requests["late"] == 1


def test_an_error_in_what_takes_the_text_fails_that_request_alone(service):
    def broken(index, piece):
        raise ValueError("the caller's own bug")

    ticket = service.submit_generation("The red fox", answering=AnswerSettings(max_new_tokens=5), on_text=broken)
    other = service.submit_generation("The red fox", answering=AnswerSettings(max_new_tokens=5))
    with pytest.raises(ValueError, match="the caller's own bug"):
        ticket.future.result(30)
    assert other.future.result(30)[0].num_answer_tokens == 5


def test_closing_at_once_does_not_wait_for_a_long_answer(seed_model):
    service = open_service(seed_model, settings=QUIET)
    pieces: list[str] = []
    ticket = service.submit_generation(
        "The red fox", answering=AnswerSettings(max_new_tokens=1000), on_text=lambda _, piece: pieces.append(piece)
    )
    while not pieces:
        time.sleep(0.01)
    service.close(finish=False)
    with pytest.raises(Closing):
        ticket.future.result(0)


def test_closing_finishes_what_was_taken_or_fails_it(seed_model):
    with open_service(seed_model, settings=QUIET) as service:
        task = service.add_task(ROWS, name="animals")
        tickets = [task.submit(INPUTS) for _ in range(3)]
    assert all(len(ticket.future.result(0)) == 4 for ticket in tickets)
    service = open_service(seed_model, settings=ServiceSettings(measure=False, max_batch_tokens=20))
    task = service.add_task(ROWS, name="animals")
    tickets = [task.submit(INPUTS) for _ in range(20)]
    service.close(finish=False)
    outcomes = [ticket.future.exception(10) for ticket in tickets]
    assert isinstance(outcomes[-1], Closing)
    service.close()
