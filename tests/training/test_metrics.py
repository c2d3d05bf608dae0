"""Peak memory: what a block held at most, not what the process ever held."""

from __future__ import annotations

import mmap

import pytest
import torch

from manyicl.training import metrics
from manyicl.training.metrics import PeakMemory, measure_ceiling, resident_peak


@pytest.mark.slow
@pytest.mark.skipif(resident_peak() is None, reason="the system does not tell the resident set")
def test_the_peak_is_that_since_it_was_made():
    # A map of its own, which goes back to the system at once, whatever the allocator keeps.
    with mmap.mmap(-1, 200 << 20) as big:
        big.write(bytes(200 << 20))
        with_big = PeakMemory(torch.device("cpu"))
        size = with_big.read()
    without = PeakMemory(torch.device("cpu"))
    if not (with_big.known and without.known):
        pytest.skip("the system cannot forget a peak")
    assert size - without.read() > 150 << 20


def test_a_system_that_ignores_the_reset_gives_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_RESET", tmp_path / "clear_refs")
    monkeypatch.setattr(metrics, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmHWM:  2362096 kB\nVmRSS:   412000 kB\n")
    assert PeakMemory(torch.device("cpu")).read() is None
    (tmp_path / "status").write_text("VmHWM:  412016 kB\nVmRSS:   412000 kB\n")
    assert PeakMemory(torch.device("cpu")).read() == 412016 * 1024


def test_where_an_earlier_peak_cannot_be_forgotten_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_RESET", tmp_path / "absent" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).read() is None
    monkeypatch.setattr(metrics, "_STATUS", tmp_path / "absent")
    assert resident_peak() is None


def test_a_cpu_has_no_known_ceiling():
    assert measure_ceiling(torch.device("cpu")) is None
