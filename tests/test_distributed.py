"""Several processes of one launch: cells shared out, one result, one error."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from manyicl import distributed as ranks_module
from manyicl.distributed import ALONE, Ranks, joined_ranks
from manyicl.errors import UserError
from tests.trajectory.setting import start_process, start_ranks, write_setting

FAILING = str(Path(__file__).parent / "trajectory" / "failing_rank.py")
LEAVING = str(Path(__file__).parent / "trajectory" / "leaving.py")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches processes on the CPU")


def two_ranks() -> tuple[str, ...]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    return ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_alone_it_does_everything_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_ranks() as ranks:
        assert ranks is ALONE
        assert ranks.is_main
        assert ranks.shard([1, 2, 3]) == [1, 2, 3]
        ranks.check()
        assert ranks.gather(lambda: "all") == ["all"]
    with pytest.raises(UserError, match=r"^as it is$"), joined_ranks() as ranks:
        raise UserError("as it is")


def test_every_item_goes_to_exactly_one_rank():
    parts = [Ranks(number=number, count=3).shard(range(8)) for number in range(3)]
    assert [list(part) for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(tmp_path):
    config = write_setting(tmp_path)
    tasks, out = config.tasks.folder, tmp_path / "c.json"
    sizes = ["--shots", "0,1,3", "--draws", "3", "--queries", "5"]
    arguments = ["-m", "manyicl", "eval", str(tmp_path / "start"), "--tasks", tasks, *sizes, "--out", str(out)]
    process = start_ranks(arguments)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("worst draw") == 2  # one rank speaks: a column and its note
    assert process.stdout.count(f"wrote {out}") == 1
    assert not out.with_name("c.json.parts").exists()
    # As a process of its own, with as many threads as a rank: more would add up the same products in another order.
    (tmp_path / "alone").mkdir()
    alone = start_process([*arguments[:-1], str(tmp_path / "alone" / "c.json")])
    assert alone.returncode == 0, alone.stderr
    for name in ("c.json", "c.predictions.parquet"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert len(json.loads(out.read_bytes())["tasks"]) == 3


@pytest.mark.slow
def test_a_mistake_that_all_ranks_meet_is_told_once(tmp_path):
    arguments = ["-m", "manyicl", "eval", str(tmp_path), "--tasks", str(tmp_path / "no")]
    process = start_ranks(arguments)
    assert process.returncode != 0
    (line,) = error_lines(process.stderr)
    assert line.startswith(f"error: {tmp_path / 'no'}: no such folder")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_one_rank_meets_ends_the_other_soon_and_is_told_once(tmp_path, rank):
    config = write_setting(tmp_path)
    process = start_ranks([FAILING, rank, str(tmp_path / "start"), config.tasks.folder])
    assert process.returncode != 0
    assert error_lines(process.stderr) == [f"error: rank {rank} has met something"]
    # Each rank has 13 or 14 of the 27 cells; the other has asked one, or two, when it sees the failure.
    counts = sorted(int(line.split()[1]) for line in process.stdout.splitlines() if line.startswith("asked "))
    assert counts[0] == 0
    assert counts[1] <= 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux tells them")
def test_no_thread_of_a_launch_outlives_python(tmp_path):
    # One that still held a tensor then would abort the process, after its work was done.
    write_setting(tmp_path, num_steps=1)
    process = start_process([LEAVING, str(tmp_path / "run"), str(tmp_path / "recipe.toml")], launcher=two_ranks())
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("gloo's threads: 0") == 2, process.stdout


def test_a_process_that_ends_by_an_error_does_not_wait_for_the_others(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    monkeypatch.setattr(sys, "last_value", RuntimeError(), raising=False)
    ranks_module._leave()
    assert dist.is_initialized()
    monkeypatch.delattr(sys, "last_value")
    ranks_module._leave()
    assert not dist.is_initialized()
    ranks_module._leave()
