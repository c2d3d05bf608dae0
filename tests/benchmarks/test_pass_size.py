"""How large a pass of the service may be."""

from __future__ import annotations

import sys

import pytest

from benchmarks import pass_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["choices", "texts"])
def test_each_size_is_measured_in_each_round(monkeypatch, capsys, kind):
    options = ["seed", "--sizes", "auto,64", "--rounds", "2", "--inputs", "4", "--tokens", "40", "--kind", kind]
    monkeypatch.setattr(sys, "argv", ["pass_size.py", *options])
    pass_size.main()
    lines = capsys.readouterr().out.splitlines()
    begins = [line.split(": ")[0] for line in lines]
    assert begins == ["round 1, auto", "round 1, 64", "round 2, 64", "round 2, auto", "auto", "64"]
    assert "auto: 1 passes" in lines[0]
    assert "64: 4 passes" in lines[1]
