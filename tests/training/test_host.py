"""The host's free memory, read from the files in which Linux says it."""

from __future__ import annotations

from pathlib import Path

from manyicl.training.memory.host import free_host_memory


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_proc(folder: Path, *, group: str) -> Path:
    meminfo = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\n"
    return write_files(folder / "proc", {"meminfo": meminfo, "self/cgroup": f"4:memory:/old\n0::{group}\n"})


def test_what_is_available_counts_without_a_limit(tmp_path):
    groups = write_files(tmp_path / "groups", {"memory.max": "max\n", "memory.current": "1000\n"})
    assert free_host_memory(proc=write_proc(tmp_path, group="/"), groups=groups) == 4000 * 1024
    assert free_host_memory(proc=write_proc(tmp_path, group="/gone/job"), groups=groups) == 4000 * 1024


def test_the_tightest_limit_of_a_containers_or_a_jobs_groups_counts(tmp_path):
    groups = write_files(
        tmp_path / "groups",
        {
            "slurm/memory.max": "2000000\n",
            "slurm/memory.current": "1900000\n",
            "slurm/memory.stat": "anon 1000000\ninactive_file 850000\n",  # read files, which make room
            "slurm/job/memory.max": "3000000\n",
            "slurm/job/memory.current": "1000000\n",
        },
    )
    proc = write_proc(tmp_path, group="/slurm/job")
    assert free_host_memory(proc=proc, groups=groups) == 2_000_000 - 1_900_000 + 850_000
    (groups / "slurm/job/memory.current").write_text("2900000\n")
    assert free_host_memory(proc=proc, groups=groups) == 100_000


def test_processes_of_one_launch_share_the_host(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_memory(proc=write_proc(tmp_path, group="/"), groups=tmp_path) == 1000 * 1024


def test_a_system_that_does_not_say_is_not_known(tmp_path):
    assert free_host_memory(proc=tmp_path / "proc", groups=tmp_path / "groups") is None
