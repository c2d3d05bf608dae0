"""The benchmark against lm-evaluation-harness: the task files it writes hold the engine's own text and tokens."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from benchmarks.eval_vs_lm_eval import (
    Cell,
    Peer,
    Rounds,
    check_tokens,
    compare_answer,
    load_both,
    next_places,
    our_request_ids,
    report,
    report_precisions,
    run_ours,
    run_rounds,
    write_task,
)

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference.model import tokenize_for
from manyicl.tasks.task import load_tasks
from tests.conftest import SHARED, make_task, needs_shared


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_task_file_and_its_rows_spell_what_the_engine_feeds(tokenizers, kind, tmp_path):
    tokenizer = TaskTokenizer(tokenizers[kind], TemplateSettings())
    task = make_task("animals")
    sweep = Sweep((3,), num_draws=1, num_queries=2, max_tokens=512)
    plan = TaskSweep(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer, sweep=sweep)
    cell = Cell(task, plan, 3, [int(q) for q in plan.queries], str(plan.settings.shots[0]))
    write_task(cell, tmp_path)
    config = json.loads((tmp_path / "animals_3.yaml").read_text())
    shots, queries = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("animals_3.shots.jsonl", "animals_3.jsonl")
    )
    assert (len(shots), len(queries)) == (3, 2)
    before = config["description"] + "".join(row["text"] + row["choices"][row["gold"]] for row in shots)
    for query, row in zip(cell.queries, queries, strict=True):
        told = [before + row["text"] + choice for choice in row["choices"]]
        assert told == [tokenizer.decode(ids) for ids in our_request_ids(cell, query)]
        assert task.labels[row["gold"]] == row["choices"][row["gold"]].strip()
    assert (config["target_delimiter"], config["fewshot_delimiter"]) == ("", "")


def test_rounds_are_kept_and_told_and_never_mixed_with_others(tmp_path, capsys):
    path, setting = tmp_path / "rounds.jsonl", {"model": "seed", "precision": "fp32", "queries": 10}
    same = {"place": 0, "ours": "owl", "theirs": "owl", "equal": True, "margin_error": 1e-6}
    tie = same | {"place": 4, "theirs": "fox", "equal": False, "margins": [1e-6, 2e-6]}
    tie |= {"our_nats": [-1.0, -1.000001], "their_nats": [-1.000002, -1.0]}
    first = {"row": "animals:3", "shots": 3, "shot_tokens": 50, "most_new": None, "queries": 10, "batch": 4}
    first |= {"options": 4, "asked_options": 4}
    Rounds(path, setting).add(
        first | {"our_s": 2.0, "peer_s": 40.0, "num": 2, "requests": 8, "ratio": 100.0, "answers": [same, tie]}
    )
    again = Rounds(path, setting)
    # The same query once more: it is timed, and counted once.
    again.add(first | {"our_s": 2.0, "peer_s": 22.0, "num": 1, "requests": 4, "ratio": 110.0, "answers": [same]})
    assert report(Rounds(path, setting)) == (1, 2)
    told = capsys.readouterr().out
    assert "ratio: 105 times (100 to 110 by round)" in told  # 500 and 550 ms a query against 5
    assert "3 queries in 2 rounds" in told
    assert "query 4: ours 'owl', theirs 'fox'; ours by 1.0e-06 nats" in told
    assert "rounding" in told
    with pytest.raises(SystemExit, match="name another --out"):
        Rounds(path, setting | {"model": "other"})


def test_rounds_go_through_all_queries_and_then_through_them_again():
    cell = Cell(make_task("animals"), None, 3, [10, 11, 12, 13, 14], "3")
    rounds = [next_places(cell, done=done, most=3) for done in (0, 3, 5, 10)]
    assert sorted(rounds[0] + rounds[1]) == [0, 1, 2, 3, 4]
    assert rounds[0] == rounds[2] == rounds[3]
    assert len(next_places(cell, done=0, most=0)) == 1


@pytest.mark.slow
@needs_shared
@pytest.mark.real_data
def test_lm_eval_is_asked_the_engines_tokens_and_says_the_same(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = load_both(str(SHARED / "models" / "stories260K"))
    for task in load_tasks(SHARED / "data" / "tasks", names=["pros_cons", "mawps"]):
        sweep = Sweep((4,), num_draws=1, num_queries=3, max_tokens=asked.max_tokens)
        plan = TaskSweep(tokenize_for(task, asked), tokenizer=asked.tokenizer, sweep=sweep)
        cell = Cell(task, plan, 4, [int(q) for q in plan.queries], str(plan.settings.shots[0]))
        write_task(cell, tmp_path)
        peer, places = Peer(asked, tmp_path), [0, 2]
        theirs, samples, _ = peer.run(cell, places=places)
        assert check_tokens(cell, peer, samples, places=places) == (4 if task.labels else 2)
        ours, _ = run_ours(asked, cell)
        for place, answer in zip(places, theirs, strict=True):
            found = compare_answer(asked, cell, place, ours=ours[place], theirs=answer)
            assert found["equal"], found


def test_answers_in_bf16_are_counted_against_those_in_float32(capsys):
    exact = [{"place": place, "ours": "owl", "theirs": "owl"} for place in range(3)]
    half = [exact[0], exact[1] | {"theirs": "fox"}, exact[2] | {"ours": "fox", "theirs": "fox"}]
    files = []
    for precision, answers in (("fp32", exact), ("bf16", half)):
        rounds = Rounds(None, {"model": "seed", "precision": precision})
        rounds.add({"row": "animals:3", "options": 4, "asked_options": 4, "answers": answers})
        rounds.add({"row": "birds:3", "options": 4, "asked_options": 2, "answers": answers})  # other options each time
        files.append(rounds)
    report_precisions(files)
    told = capsys.readouterr().out
    assert told == "animals:3: of 3 answers, bf16 keeps float32's in 2 of ours and 1 of lm-eval's\n"


@pytest.mark.slow
@needs_shared
@pytest.mark.real_data
def test_a_batch_that_does_not_fit_is_halved_and_no_failure_ends_the_other_rows(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = load_both(str(SHARED / "models" / "stories260K"), precision="bf16")
    room = {"sdpa": 3, "eager": 1}

    def refuse(module, args, options):
        """Stand for a device with room for so many prompts at a time."""
        ids = args[0] if args else options["input_ids"]
        if len(ids) > room[module.config._attn_implementation]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 35.16 GiB. GPU 0 is full")

    # Ours attends by segments, and is never refused here.
    room["manyicl_segments"] = 10**6
    asked.model.register_forward_pre_hook(refuse, with_kwargs=True)
    cells = []
    for task in load_tasks(SHARED / "data" / "tasks", names=["pros_cons", "mawps"]):
        sweep = Sweep((4,), num_draws=1, num_queries=4, max_tokens=asked.max_tokens)
        plan = TaskSweep(tokenize_for(task, asked), tokenizer=asked.tokenizer, sweep=sweep)
        cells.append(Cell(task, plan, 4, [int(q) for q in plan.queries], "4"))
    peer = Peer(asked, tmp_path)
    for cell in cells:
        halved = peer.run_in_memory(cell, places=range(4), batch=8)
        assert halved.batch == 2
        # Four queries are eight requests with two options each, and four that generate.
        assert halved.failed == dict.fromkeys((8, 4), "CUDA out of memory")
        peer.lm.batch_size_per_gpu = 2
        answers, _, _ = peer.run(cell, places=range(4))
        assert halved.answers == answers
    options = argparse.Namespace(minutes=5.0, repeats=1, peer_minutes=1.0)

    def run_once(name: str) -> Rounds:
        rounds = Rounds(tmp_path / name, {"model": "m", "precision": "bf16"})
        run_rounds(asked, peer, cells, rounds, options)
        return rounds

    rounds = run_once("eager_fits_one.jsonl")
    # The peer's trial of its batch sizes (1, 4, 16) has found that 4 prompts do not fit.
    assert {line["row"]: line["batch"] for line in rounds.lines[1:]} == {"pros_cons:4": 1, "mawps:4": 1}
    assert all(line["failed"] == {} for line in rounds.lines[1:])
    for line in rounds.lines[1:]:
        assert line["eager"] | {"seconds": 0} == {"num": 4, "seconds": 0, "batch": 1, "fault": ""}
        assert all("peer_equals_itself" in answer for answer in line["answers"])

    room["eager"] = 0  # the row stands without it
    rounds = run_once("eager_fits_none.jsonl")
    for line in rounds.lines[1:]:
        assert (line["num"], line["eager"]["num"], line["eager"]["fault"]) == (4, 0, "CUDA out of memory")
    assert report(rounds)[1] == 8

    room["sdpa"] = 0
    rounds = run_once("none_fits.jsonl")
    assert rounds.lines[1:] == []
    assert rounds.failed == dict.fromkeys(("pros_cons:4", "mawps:4"), "CUDA out of memory")
