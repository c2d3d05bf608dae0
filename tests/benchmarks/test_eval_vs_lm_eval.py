"""The benchmark against lm-evaluation-harness: the task files it writes hold the engine's own text and tokens."""

from __future__ import annotations

import json

import pytest
from benchmarks.eval_vs_lm_eval import (
    Cell,
    Peer,
    Rounds,
    check_tokens,
    compare_answer,
    load_both,
    our_request_ids,
    report,
    run_ours,
    write_task,
)

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.evaluation.loop import tokenize_for
from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.tasks.task import load_tasks
from tests.conftest import SHARED, make_task, needs_shared


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_task_file_and_its_rows_spell_what_the_engine_feeds(tokenizers, kind, tmp_path):
    tokenizer = TaskTokenizer(tokenizers[kind], TemplateSettings())
    task = make_task("animals")
    sweep = Sweep((3,), num_draws=1, num_queries=2, max_tokens=512)
    plan = TaskSweep(tokenize_task(task, tokenizer=tokenizer), tokenizer=tokenizer, sweep=sweep)
    cell = Cell(task, plan, 3, [int(q) for q in plan.queries], str(plan.sweep.shots[0]))
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
        cell = Cell(task, plan, 4, [int(q) for q in plan.queries], str(plan.sweep.shots[0]))
        write_task(cell, tmp_path)
        peer, places = Peer(asked, tmp_path), [0, 2]
        theirs, samples, _ = peer.run(cell, places=places)
        assert check_tokens(cell, peer, samples, places=places) == (4 if task.labels else 2)
        ours, _ = run_ours(asked, cell)
        for place, answer in zip(places, theirs, strict=True):
            found = compare_answer(asked, cell, place, ours=ours[place], theirs=answer)
            assert found["equal"], found
