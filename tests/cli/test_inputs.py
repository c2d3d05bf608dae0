"""The inputs of `ask`, by pipe as by file."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from manyicl.cli.inputs import read_inputs
from manyicl.errors import UserError


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffthe bell is broken\r\nthe saddle is lost\r\n"
    file = tmp_path / "inputs.txt"
    file.write_bytes(content.encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO(content, newline=""))
    expected = ["the bell is broken", "the saddle is lost"]
    assert read_inputs(str(file)) == read_inputs("-") == expected
    file.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match="is empty; give one input a line"):
        read_inputs(str(file))
