"""Peak memory: what a block held at most, not what the process ever held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyicl.training import metrics
from manyicl.training.metrics import PeakMemory, measure_ceiling, resident_peak


@pytest.mark.slow
@pytest.mark.skipif(resident_peak() is None, reason="the system does not tell the resident set")
def test_the_peak_is_that_since_it_was_made():
    big = np.ones(200 << 20, dtype=np.uint8)
    with_big = PeakMemory(torch.device("cpu"))
    if not with_big.known:
        pytest.skip("the system cannot forget a peak")
    size = with_big.read()
    del big
    after = PeakMemory(torch.device("cpu")).read()
    assert size - after > 150 << 20


def test_where_an_earlier_peak_cannot_be_forgotten_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_RESET", tmp_path / "absent" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).read() is None
    monkeypatch.setattr(metrics, "_STATUS", tmp_path / "absent")
    assert resident_peak() is None


def test_a_cpu_has_no_known_ceiling():
    assert measure_ceiling(torch.device("cpu")) is None
