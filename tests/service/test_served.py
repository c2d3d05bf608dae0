"""A service in process: tasks from files and rows, answers as `manyicl eval` gives them, and what is refused."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

import manyicl
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.inference.model import tokenize_for
from manyicl.service.library import Library
from manyicl.service.refusals import (
    BadExamples,
    Closing,
    DeadlinePassed,
    InputTooLong,
    TaskExists,
    UnknownExample,
    UnknownTask,
)
from manyicl.service.selection import TaskBook, choose_shots
from manyicl.service.served import open_service
from manyicl.service.settings import ServiceSettings, ShotChoice
from manyicl.tasks.task import load_tasks
from tests.service.conftest import INPUTS, QUIET, ROWS, make_rows
from tests.trajectory.setting import ROOT


def write_task(folder, rows, name="animals", **settings):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings:
        (folder / f"{name}.task.json").write_text(json.dumps(settings))
    return folder / f"{name}.jsonl"


def assert_answers_are_those_of_evaluate(model, path, *, shots, expect_choices):
    """Ask the test rows of `manyicl eval` after the very shots of its draw 0."""
    task = load_tasks(path.parent)[0]
    sweep = Sweep(shots=(shots,), num_draws=1, num_queries=12)
    evaluation = evaluate(model, [task], shots=(shots,), draws=1, queries=12)
    predictions = evaluation.curves[0].predictions
    own = TaskSweep(tokenize_for(task, model), tokenizer=model.tokenizer, sweep=sweep)
    shown = [task.train[own.tokenized.splits["train"].rows[n]] for n in own.draws[0][:shots]]
    by_id = {example.id: example for example in task.test}
    with open_service(model, settings=QUIET) as service:
        served = service.add_task(path)
        ids = {example.input: example.id for example in served.examples(limit=1000)}
        choice = ShotChoice("fixed", ids=tuple(ids[example.input] for example in shown))
        inputs = [by_id[p.query].input for p in predictions]
        options = [by_id[p.query].options for p in predictions]
        replies = served.predict(inputs, options=options, shots=choice)
    assert [reply.answer for reply in replies] == [p.prediction for p in predictions]
    assert [reply.cut for reply in replies] == [p.cut for p in predictions]
    assert all(reply.shots == choice.ids for reply in replies)
    if expect_choices:
        for reply, p in zip(replies, predictions, strict=True):
            assert reply.nll == pytest.approx(min(p.choice_nll.values()), abs=1e-3)
            assert sum(reply.probabilities.values()) == pytest.approx(1)
            assert max(reply.probabilities, key=reply.probabilities.get) == reply.answer
    else:
        assert all(reply.probabilities is None for reply in replies)


def test_labels_are_chosen_as_evaluate_chooses_them(seed_model, tmp_path):
    path = write_task(tmp_path / "tasks", ROWS, instruction="Name the animal.")
    assert_answers_are_those_of_evaluate(seed_model, path, shots=20, expect_choices=True)


def test_answers_are_generated_as_evaluate_generates_them(seed_model, tmp_path):
    path = write_task(tmp_path / "tasks", ROWS, family="qa")
    assert_answers_are_those_of_evaluate(seed_model, path, shots=10, expect_choices=False)


def test_options_of_a_row_are_chosen_from_as_evaluate_does(seed_model, tmp_path):
    rows = [{**row, "options": sorted({row["answer"], "fox", "emu"})} for row in ROWS]
    path = write_task(tmp_path / "tasks", rows)
    assert_answers_are_those_of_evaluate(seed_model, path, shots=10, expect_choices=True)


def test_an_option_that_cannot_be_an_answer_is_refused_by_name(service):
    task = service.add_task(ROWS, name="animals")
    with pytest.raises(
        UserError, match=r"options of input 2: the model's tokenizer cannot write 'a\\n\\nb'; leave it out"
    ):
        task.predict(INPUTS[:2], options=[["fox", "owl"], ["fox", "a\n\nb"]])


def test_replies_below_the_wanted_confidence_are_unsure(service):
    task = service.add_task(ROWS, name="animals")
    for reply in task.predict(INPUTS[:3], min_confidence=0.7):
        assert reply.confidence == reply.probabilities[reply.answer] == max(reply.probabilities.values())
        assert reply.unsure == (reply.confidence < 0.7)
    assert not any(reply.unsure for reply in task.predict(INPUTS[:3]))
    opened = service.add_task(ROWS, name="open", settings={"family": "qa"})
    with pytest.raises(UserError, match="generated answers have no confidence"):
        opened.predict(INPUTS[:1], min_confidence=0.7)


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model_chooses_as_evaluate_does(smollm2, tmp_path):
    model = manyicl.load_for_inference(str(smollm2), precision="fp32", max_tokens=512)
    path = write_task(tmp_path / "tasks", ROWS, instruction="Name the animal.")
    assert_answers_are_those_of_evaluate(model, path, shots=12, expect_choices=True)


def test_every_row_with_an_answer_is_an_example_whatever_its_split(service, tmp_path):
    splits = ("train", "validation", "test", "train")
    rows = [{**row, "split": splits[n % 4]} for n, row in enumerate(ROWS)]
    task = service.add_task(write_task(tmp_path / "tasks", [*rows, rows[0], {**rows[1], "answer": "emu"}]))
    assert (task.name, task.family, task.metric) == ("animals", "classification", "accuracy")
    assert [example.input for example in task.examples(limit=1000)] == [row["input"] for row in ROWS]
    registration = task.registration
    assert (registration.kept, registration.dropped) == (80, {"duplicate input": 1, "duplicate with another answer": 1})
    assert task.examples(start=78) == task.examples(limit=1000)[78:]


def test_an_upload_is_tokenised_once(service, monkeypatch):
    tokenised = []
    real = TaskTokenizer.tokenize_examples

    def count(self, examples):
        tokenised.extend(example.input for example in examples)
        return real(self, examples)

    monkeypatch.setattr(TaskTokenizer, "tokenize_examples", count)
    task = service.add_task(ROWS, name="animals")
    task.predict("the red fox")
    assert sorted(tokenised) == sorted(row["input"] for row in ROWS)
    task.add_examples([{"input": "a late fox", "answer": "fox"}])
    task.predict("the red fox")
    assert sorted(tokenised) == sorted([*(row["input"] for row in ROWS), "a late fox"])


def test_rows_are_added_by_our_names_whatever_the_columns_of_the_file_were(service, tmp_path):
    rows = [{"text": row["input"], "label": row["answer"]} for row in ROWS]
    columns = {"input": "text", "answer": "label"}
    task = service.add_task(write_task(tmp_path / "tasks", rows, columns=columns))
    assert task.add_example("a late fox", "fox") > 0
    assert task.add_examples(write_task(tmp_path / "more", [{"text": "an owl", "label": "owl"}])).kept == 1
    assert (task.num_examples, task.labels) == (82, ("cat", "dog", "fox", "owl"))


def test_as_many_shots_as_fit_are_shown_and_the_window_is_kept(seed_model):
    model = replace(seed_model, max_tokens=300)
    with open_service(model, settings=QUIET) as service:
        task = service.add_task(ROWS, name="animals")
        short, long = task.predict(["the red fox", "the red fox and " * 28])
        assert 300 >= short.num_prompt_tokens + short.num_answer_tokens > 200
        assert long.num_prompt_tokens + long.num_answer_tokens <= 300
        assert 0 < len(long.shots) < len(short.shots) < 80
        assert long.shots == short.shots[: len(long.shots)]
        with pytest.raises(InputTooLong, match=r"^input 2: .* do not fit the model's 300 tokens; shorten it"):
            task.predict(["the red fox", "the red fox and " * 200])
        ids = tuple(example.id for example in task.examples())
        with pytest.raises(InputTooLong, match=r"shots\.ids: 80 examples leave no room for the input"):
            task.predict("the red fox", shots=ShotChoice("fixed", ids=ids))
        assert task.predict("x", shots=ShotChoice(count=0))[0].shots == ()


def test_on_a_cpu_shots_are_bounded_unless_they_are_counted(seed_model):
    settings = ServiceSettings(measure=False, shot_tokens=100)
    with open_service(seed_model, settings=settings) as service:
        task = service.add_task(ROWS, name="animals")
        assert len(task.predict("the red fox")[0].shots) < 15
        assert len(task.predict("the red fox", shots=ShotChoice(count=50))[0].shots) == 50
    assert ServiceSettings().shot_tokens is None


def test_each_label_comes_early_and_evenly(animals):
    shown = animals.predict("the red fox")[0].shots
    answers = {example.id: example.answer for example in animals.examples()}
    assert len(shown) == len(set(shown)) == 80
    assert {answers[id_] for id_ in shown[:8]} == {"fox", "owl", "cat", "dog"}
    assert animals.predict("the red fox", shots=ShotChoice(seed=1))[0].shots != shown
    assert animals.predict("the red fox", shots=ShotChoice(count=5))[0].shots == shown[:5]


def test_the_nearest_examples_come_last_behind_a_random_part(animals):
    choice = ShotChoice("nearest", count=20)
    first, second = animals.predict(["the red fox 3", "the grey dog 7"], shots=choice)
    assert first.shots[:10] == second.shots[:10]
    assert first.shots[10:] != second.shots[10:]
    assert len(first.shots) == len(set(first.shots)) == 20
    answers = {example.id: example.input for example in animals.examples()}
    assert "fox" in answers[first.shots[-1]]
    assert "dog" in answers[second.shots[-1]]


def test_more_examples_extend_the_order_of_the_shots_and_the_prefix(service, animals):
    before = animals.predict("the red fox")[0]
    assert (before.timing.prefix_cached, service.stats().prefixes["encoded"]) == (False, 1)
    registration = animals.add_examples(
        [{"input": "a late fox", "answer": "fox"}, {"input": "an emu", "answer": "emu"}]
    )
    assert (registration.kept, len(registration.ids)) == (2, 2)
    assert (animals.version, animals.num_examples) == (2, 82)
    assert animals.labels == ("cat", "dog", "emu", "fox", "owl")
    after = animals.predict("the red fox")[0]
    assert after.shots[:80] == before.shots
    assert sorted(after.shots[80:]) == sorted(registration.ids)
    assert after.task_version == 2
    assert service.stats().prefixes["extended"] == 1
    assert animals.predict("the red fox")[0].timing.prefix_cached


def test_a_corrected_or_removed_example_changes_what_is_shown(service, animals):
    first = animals.predict("the red fox")[0].shots[40]
    animals.correct(first, "owl")
    assert next(e for e in animals.examples() if e.id == first).answer == "owl"
    assert animals.predict("the red fox")[0].task_version == 2
    animals.remove_examples([first])
    assert first not in animals.predict("the red fox")[0].shots
    with pytest.raises(UnknownExample, match=f"example {first}: task 'animals' has none with this id"):
        animals.correct(first, "owl")
    with pytest.raises(UnknownExample):
        animals.remove_examples([animals.examples()[0].id, 10**30])
    assert animals.num_examples == 79
    with pytest.raises(BadExamples, match="would have no examples left"):
        animals.remove_examples([example.id for example in animals.examples()])
    with pytest.raises(BadExamples, match="is an example of task 'animals' already"):
        animals.add_example(animals.examples()[0].input, "cat")
    assert animals.add_example("a new cat", "cat") > max(e.id for e in animals.examples()[:79])


def test_labels_that_come_with_more_examples_are_told(service, animals):
    assert animals.add_examples([{"input": "an owl at night", "answer": "owl"}]).notes == ()
    told = animals.add_examples([{"input": "a yak", "answer": "yak"}, {"input": "an owl by day", "answer": "Owl"}])
    assert told.notes == ("new labels: 'Owl', 'yak'",)
    assert [w.partition(";")[0] for w in told.warnings] == ["answers that may be the same: 'owl' 19, 'Owl' 1"]
    # A task of open answers has no labels.
    open_ = service.add_task([{"input": f"{n} and {n}", "answer": str(2 * n)} for n in range(9)], name="sums")
    assert open_.add_examples([{"input": "9 and 9", "answer": "18"}]).notes == ()


def test_a_new_label_that_comes_with_a_correction_is_reported_as_with_an_upload(service, animals):
    owl, fox = (next(e.id for e in animals.examples() if e.answer == animal) for animal in ("owl", "fox"))
    slip = animals.correct(owl, "Owl")
    assert slip.notes == ("new labels: 'Owl'",)
    assert slip.warnings == ("answers that may be the same: 'owl' 17, 'Owl' 1; if they are, write them alike",)
    assert (slip.kept, slip.ids, animals.labels) == (1, (owl,), ("Owl", "cat", "dog", "fox", "owl"))
    meant = animals.correct(fox, "yak")
    assert (meant.notes, meant.warnings) == (("new labels: 'yak'",), ())
    known = animals.correct(owl, "owl")
    assert (known.notes, known.warnings, known.ids) == ((), (), (owl,))
    assert animals.correct(owl, "owl") == known  # changes nothing
    # A task of open answers has no labels.
    open_ = service.add_task([{"input": f"{n} and {n}", "answer": str(2 * n)} for n in range(9)], name="sums")
    assert open_.correct(open_.examples()[0].id, "18").notes == ()


def test_the_labels_of_the_settings_are_the_only_ones(service):
    task = service.add_task(ROWS, name="animals", settings={"labels": ["fox", "owl", "cat", "dog", "emu"]})
    assert task.labels == ("cat", "dog", "emu", "fox", "owl")
    with pytest.raises(BadExamples, match="row 1: answer 'yak' is not among the labels") as refused:
        task.add_examples([{"input": "a yak", "answer": "yak"}])
    assert refused.value.faults[0].count == 1
    with pytest.raises(BadExamples, match="'yak' is not among its answers"):
        task.correct(task.examples()[0].id, "yak")
    assert task.version == 1


def test_tasks_are_replaced_and_removed(service, animals):
    with pytest.raises(TaskExists, match="task 'animals': is there already"):
        service.add_task(ROWS, name="animals")
    assert service.add_task(ROWS[:30], name="animals", replace=True).num_examples == 30
    assert animals.version == 2
    assert animals.replace_examples(ROWS[:40]).kept == 40
    assert [task.name for task in service.tasks()] == ["animals"]
    with pytest.raises(UnknownTask, match=r"task 'animal': there is none of this name; did you mean 'animals'\?"):
        service.task("animal")
    service.remove_task("animals")
    with pytest.raises(UnknownTask, match="task 'animals': there is none of this name"):
        animals.predict("the red fox")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "x" * 101, "\ud800"])
def test_a_name_that_cannot_be_one_is_refused(service, name):
    with pytest.raises(BadExamples, match=r"cannot be a task's name|has 101 characters"):
        service.add_task(ROWS, name=name)
    with pytest.raises(UnknownTask):
        service.task(name)


def test_rows_that_cannot_be_read_are_refused_with_all_their_faults(service, tmp_path):
    rows = [*ROWS, {"input": "a", "answer": ""}, {"input": 3, "answer": "fox"}]
    with pytest.raises(BadExamples, match=r"^examples, row 81: answer '' is empty; .*\(and 1 more kind of mistakes\)"):
        service.add_task(rows, name="animals")
    with pytest.raises(BadExamples, match=r"animals\.jsonl, row 81: answer '' is empty") as refused:
        service.add_task(write_task(tmp_path, rows))
    assert [fault.rows for fault in refused.value.faults] == [(81,), (82,)]
    with pytest.raises(BadExamples, match="examples: there are no rows; give some"):
        service.add_task([], name="animals")
    with pytest.raises(BadExamples, match="name: is missing"):
        service.add_task(ROWS)
    with pytest.raises(BadExamples, match="row 1: 'answer' is not made of texts"):
        service.add_task([{"input": "a", "answer": {1, 2}}], name="x")
    assert service.tasks() == []


def test_other_columns_are_refused_with_the_settings_that_read_them(service, tmp_path):
    read = r"""to read it, write {"columns": {"input": "text", "answer": "label"}} into """
    rows = [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    path = write_task(tmp_path, rows)
    with pytest.raises(BadExamples, match=re.escape(read + "animals.task.json")):
        service.add_task(path)
    with pytest.raises(BadExamples, match=re.escape(read + "`settings`")):
        service.add_task(rows, name="x")
    with pytest.raises(BadExamples, match=r"^settings: unknown key 'famly'; did you mean 'family'"):
        service.add_task(path, settings={"famly": "nli"})
    assert service.add_task(path, settings={"columns": {"input": "text", "answer": "label"}}).num_examples == 2
    task = service.add_task(ROWS, name="y")
    with pytest.raises(BadExamples, match=re.escape(read + "`settings` when you replace the task")):
        task.add_examples(rows)


def test_limits_of_the_service(seed_model):
    settings = ServiceSettings(measure=False, max_tasks=1, max_examples=90, max_input_chars=50)
    with open_service(seed_model, settings=settings) as service:
        task = service.add_task(ROWS, name="animals")
        with pytest.raises(UserError, match="there are 1 tasks already, the limit") as refused:
            service.add_task(ROWS, name="more")
        assert not isinstance(refused.value, TaskExists)  # the page would ask for another name
        with pytest.raises(BadExamples, match="would have 100 examples, more than 90"):
            task.add_examples(make_rows(20, seed=1))
        with pytest.raises(InputTooLong, match="input 1: has 51 characters, more than 50"):
            task.predict("x" * 51)
    with pytest.raises(Closing):
        service.task("animals")


class ClosingRows(list):
    """Rows of an upload during which the service is closed, as by a SIGTERM."""

    def __init__(self, rows, service):
        super().__init__(rows)
        self.service = service

    def __iter__(self):
        self.service.close(finish=False)
        return super().__iter__()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_service_that_is_closed_during_an_upload_refuses_it_as_closing(seed_model, tmp_path, is_new):
    service = open_service(seed_model, data=tmp_path, settings=QUIET)
    service.add_task(ROWS, name="animals")
    rows = ClosingRows(make_rows(20, seed=1), service)
    with pytest.raises(Closing, match="closed"):
        service.add_task(rows, name="more") if is_new else service.append("animals", rows)


def test_values_of_another_kind_are_refused_in_one_line(service, animals):
    for inputs in (5, None):
        with pytest.raises(UserError, match=r"^inputs=.*: give a text, or a list of texts$"):
            animals.predict(inputs)
    for table in ({"input": "fox"}, pa.table({"input": ["fox"]})):
        with pytest.raises(UserError, match=r"^inputs: is a table; give one of its columns"):
            animals.predict(table)
    with pytest.raises(UserError, match=r"^shots=nearest: give a manyicl\.ShotChoice$"):
        animals.predict("fox", shots="nearest")
    with pytest.raises(UserError, match=r"^answering=\{'samples': 3\}: give a manyicl\.AnswerSettings$"):
        animals.predict("fox", answering={"samples": 3})
    with pytest.raises(UserError, match=r"^min_confidence='0\.5': is not a probability"):
        animals.predict("fox", min_confidence="0.5")
    with pytest.raises(UserError, match=r"^ids=3: is one value, not a list; give \[3\]$"):
        animals.remove_examples(3)
    with pytest.raises(UnknownExample, match=r"^example '3': is not a whole number; give the `id`"):
        animals.correct("3", "owl")
    with pytest.raises(BadExamples, match=r"^example 3: answer 4 is not a text; write it as text$"):
        animals.correct(np.int64(3), 4)
    with pytest.raises(UserError, match=r"^options=\[\[1, 2\]\]: give a list of answers for each input"):
        animals.predict("fox", options=[[1, 2]])
    for rows in (5, None, {"input": "a", "answer": "b"}):
        with pytest.raises(BadExamples, match=r"^examples=.*: give a file, a folder of one task, or a list of rows$"):
            service.add_task(rows, name="x")
    with pytest.raises(BadExamples, match=r"^examples, row 1: 'input' is not a row; .* table\.to_dict\('records'\)$"):
        service.add_task(["input", "answer"], name="x")  # what a table of pandas gives
    assert {manyicl.ShotChoice, manyicl.ServiceSettings} == {ShotChoice, ServiceSettings}


@pytest.mark.parametrize("given", ["", "  ", [], ["fox", ""], ["\ud800"], [3]])
def test_inputs_that_are_none_are_refused_in_one_line(animals, given):
    with pytest.raises(manyicl.UserError, match="input") as refused:
        animals.predict(given)
    assert "\n" not in str(refused.value)


def test_text_of_generated_answers_comes_in_pieces_that_join_to_them(service):
    task = service.add_task(ROWS, name="open", settings={"family": "qa"})
    pieces: dict[int, list[str]] = {0: [], 1: []}
    ticket = task.submit(
        INPUTS[:2],
        answering=AnswerSettings(max_new_tokens=12),
        on_text=lambda index, piece: pieces[index].append(piece),
    )
    replies = ticket.future.result(60)
    assert ["".join(pieces[n]) for n in (0, 1)] == [reply.answer for reply in replies]
    assert all(reply.num_answer_tokens <= 12 for reply in replies)


def test_a_chosen_answer_comes_as_one_piece(animals):
    pieces = []
    reply = animals.submit("the red fox", on_text=lambda index, piece: pieces.append((index, piece))).future.result(60)
    assert pieces == [(0, reply[0].answer)]


def test_a_plain_generation_stops_where_it_is_told(service):
    whole = service.generate("The red fox", answering=AnswerSettings(max_new_tokens=8))
    assert (whole.finish, whole.num_answer_tokens) == ("length", 8)
    word = whole.text.split()[1]
    pieces = []
    ticket = service.submit_generation(
        "The red fox",
        answering=AnswerSettings(max_new_tokens=8, stop=(word,)),
        on_text=lambda _, piece: pieces.append(piece),
    )
    [cut] = ticket.future.result(60)
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(word)], "stop")
    assert "".join(pieces) == cut.text
    assert cut.num_answer_tokens < 8
    with pytest.raises(manyicl.UserError, match="messages: this model has no chat template"):
        service.generate([{"role": "user", "content": "hello"}])


def test_each_seed_gives_a_completion_of_its_own(service):
    sampled = AnswerSettings(max_new_tokens=6, temperature=1.5)
    made = service.submit_generation("The red fox", answering=sampled, seed=[1, 2, 1]).future.result(60)
    assert made[0].text == made[2].text != made[1].text
    assert service.generate("The red fox", answering=sampled, seed=2).text == made[1].text
    with pytest.raises(manyicl.UserError, match="seed: is empty"):
        service.submit_generation("The red fox", answering=sampled, seed=[])


def test_each_input_can_have_a_seed_of_its_own(service):
    task = service.add_task(ROWS, name="open", settings={"family": "qa"})
    sampled = AnswerSettings(max_new_tokens=6, temperature=1.5)
    replies = task.submit(["the red fox"] * 3, answering=sampled, seed=[1, 2, 1]).future.result(60)
    assert replies[0].answer == replies[2].answer != replies[1].answer
    with pytest.raises(manyicl.UserError, match="there are 2 for 3 inputs"):
        task.submit(["the red fox"] * 3, answering=sampled, seed=[1, 2])


@pytest.mark.slow
def test_many_threads_get_each_its_own_answers(animals):
    wanted = {text: reply.answer for text in INPUTS for reply in animals.predict(text)}
    found: list[tuple[str, str]] = []

    def ask(number):
        for text in INPUTS[number % 4 :] + INPUTS[: number % 4]:
            found.extend((reply.input, reply.answer) for reply in animals.predict([text, "the green owl"])[:1])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    assert all(wanted[text] == answer for text, answer in found)


@pytest.mark.slow
def test_memory_is_flat_over_many_requests(service, animals):
    animals.predict(INPUTS)
    before = service.stats()
    for number in range(200):
        animals.predict(f"the red fox {number}")
    after = service.stats()
    assert after.prefix_bytes == before.prefix_bytes
    assert after.num_answers == before.num_answers + 200
    assert after.waiting == {}


@pytest.mark.slow
def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "banking.csv").write_text("input,answer\n" + "".join(f"{r['input']},{r['answer']}\n" for r in ROWS))
    exec(example.replace('"runs/first"', '"seed"'), {})
    answer, sentence = capsys.readouterr().out.splitlines()
    assert answer.startswith(("cat {", "dog {", "fox {", "owl {"))
    assert sentence.startswith("After 60 shots expect a score of")
    assert (tmp_path / "my-library" / "library.sqlite").is_file()


def test_a_service_is_ready_after_a_forward_pass_and_late_answers_are_refused(service, animals):
    assert not service.is_ready
    service.ready()
    assert service.is_ready
    with pytest.raises(DeadlinePassed, match="no answer within 0 s"):
        animals.predict("the red fox", timeout=0)


class ClearedMeanwhile(dict):
    """What another thread empties as soon as something is put in."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.clear()


def test_shots_are_chosen_while_another_thread_forgets_the_old_choices(seed_model, tmp_path):
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        service.add_task(ROWS, name="animals")
    library = Library(tmp_path)
    ids = TaskBook(library, seed_model).get("animals")
    library.close()
    choice = ShotChoice(count=3)
    assert len(choose_shots(replace(ids, orders=ClearedMeanwhile()), choice).order) == 3


def test_removing_no_examples_changes_nothing(animals):
    animals.remove_examples([])
    assert animals.version == 1


def test_settings_that_no_file_can_hold_are_refused_in_one_line(service):
    with pytest.raises(BadExamples, match="settings: are not made of texts, numbers and lists"):
        service.add_task(ROWS, name="animals", settings={"metric": object()})


class RowsOfAReplacedTask(list):
    """Rows of which the first is read when another server has just replaced the task."""

    replace = None

    def __iter__(self):
        self.replace()
        return super().__iter__()


def test_rows_are_not_added_to_a_task_of_another_kind_that_came_meanwhile(service, animals):
    rows = RowsOfAReplacedTask([{"input": "a new one", "answer": "fox"}])
    rows.replace = lambda: service.add_task(make_rows(5), name="animals", settings={"family": "qa"}, replace=True)
    with pytest.raises(BadExamples, match="was replaced meanwhile"):
        animals.add_examples(rows)
    assert animals.num_examples == 5
