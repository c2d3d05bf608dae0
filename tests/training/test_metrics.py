"""Peak memory: what a block held at most, not what the process ever held."""

from __future__ import annotations

import mmap

import pytest
import torch

from manyicl.errors import UserError
from manyicl.training import metrics
from manyicl.training.metrics import MetricsLog, PeakMemory, measure_ceiling, resident_peak


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


@pytest.mark.parametrize("line", [b"\0\0\0\n", b"{}\n", b"[1]\n", b'{"step": 2, "lo\n', b"\xff\n"])
def test_a_damaged_line_among_the_metrics_is_named_and_half_a_last_line_is_left_out(tmp_path, line):
    """A run with such a line could not be resumed, nor its comparison be reported: a traceback."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 2.5})
    with log.path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert log.read() == [{"step": 1, "loss": 2.5}]
    log.path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + line)
    with pytest.raises(UserError, match=r"/metrics\.jsonl line 2: is damaged; restore the file, or remove this line$"):
        log.cut_after(1)
