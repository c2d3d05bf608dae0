"""The load benchmark of the service: its arithmetic, and all of it once, tiny, on the seed model."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from dataclasses import asdict

import pytest

from benchmarks import serve_load
from tests.support.forked import ForkedPopen


def level(side: str, clients: int, answered: int) -> serve_load.Level:
    return serve_load.Level(side, clients, answered, 0, seconds=10.0, p50_s=0.5, p99_s=1.0, is_bound=False)


def test_percentiles_are_of_the_requests_that_were_answered():
    took = [float(number) for number in range(1, 101)]
    found = serve_load.summarize("ours", took, clients=8, under_way=3, seconds=20)
    assert (found.throughput, found.p50_s, found.p99_s, found.is_bound) == (5.0, 50.5, 100.0, False)


def test_a_side_that_answered_too_few_has_a_lower_bound():
    found = serve_load.summarize("plain", [4.0], clients=64, under_way=64, seconds=20)
    assert (found.answered, found.p99_s, found.is_bound) == (1, 20, True)
    assert serve_load.summarize("plain", [], clients=1, under_way=1, seconds=20).throughput == 0


def test_the_ratio_is_of_medians_with_the_spread_of_rounds():
    levels = [level("ours", 8, 200), level("plain", 8, 10), level("ours", 8, 100), level("plain", 8, 10)]
    lines = serve_load.describe(levels, ["ours", "plain"])
    assert "ours 15.0 times (10.0 to 20.0)" in lines[1]
    silent = [level("ours", 8, 200), level("plain", 8, 0)]
    assert "did not finish one request" in serve_load.describe(silent, ["ours", "plain"])[1]


def test_results_of_runs_of_one_level_each_are_put_together():
    def result(side: str, answered: int) -> dict[str, object]:
        return {"model": "x", "levels": [asdict(level(side, 8, answered))], "uploads": [{"rows": 5}], "memory": []}

    joined = serve_load.join([result("ours", 200), result("plain", 10)])
    assert "ours 20.0 times" in joined["lines"][1]
    assert joined["lines"][2:] == ["upload: {'rows': 5}"] * 2


def test_no_input_is_sent_twice():
    assert list(itertools.islice(serve_load.number_texts(["a", "b"]), 5)) == ["a", "b", "a (1)", "b (1)", "a (2)"]


def test_a_closed_loop_counts_what_ended_in_its_time():
    async def send(client, text):
        await asyncio.sleep(0.01)

    texts = serve_load.number_texts(["a"])
    found = asyncio.run(serve_load.measure("x", send, texts, clients=4, seconds=0.5))
    assert 60 < found.answered <= 200
    assert 0.009 < found.p50_s < 0.1


@pytest.mark.slow
def test_all_of_it_on_the_seed_model(monkeypatch, capsys, tmp_path):
    arguments = "--model seed --shot-tokens 300 --clients 1,4 --rounds 1 --seconds 1 --peer-seconds 1 --uploads 1"
    out = tmp_path / "out.json"
    monkeypatch.setattr(serve_load, "NUM_ROWS", 80)
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "serve_load.py",
            *arguments.split(),
            "--sides",
            "ours,plain",
            "--requests",
            "40",
            "--threads",
            "1",
            "--out",
            str(out),
        ],
    )
    serve_load.main()
    printed = capsys.readouterr().out
    assert "1 clients  ours" in printed
    assert "upload: {'rows': 80" in printed
    assert "memory: {'requests': 40" in printed
    assert out.is_file()
