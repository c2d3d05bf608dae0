"""`manyicl serve` and `manyicl token` as commands: mistakes in one line, and what they print."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from manyicl.server.access import load_tokens
from tests.cli.test_app import run_manyicl


def test_a_missing_package_is_one_line_with_what_to_install(capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a))
    code, _, err = run_manyicl(capfd, "serve", "seed")
    assert code == 2
    assert err.startswith(
        "error: manyicl serve: uvicorn is not installed; pip install fastapi uvicorn python-multipart"
    )
    assert err.count("\n") == 1


def test_an_address_that_others_can_reach_needs_tokens(capfd):
    code, _, err = run_manyicl(capfd, "serve", "seed", "--host", "0.0.0.0")
    assert code == 2
    assert err.startswith("error: --host 0.0.0.0: other computers could reach it, and there are no tokens")
    assert "manyicl token --file tokens.txt --role admin" in err


def test_a_port_in_use_is_told_before_the_model_is_loaded(capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run_manyicl(capfd, "serve", "no-such-model", "--port", port)
    assert (code, err) == (2, f"error: --port {port}: another program uses it; choose another, or 0 for a free one\n")


def test_what_is_loaded_is_told_first_because_it_may_take_a_minute(capfd, tmp_path):
    code, _, err = run_manyicl(capfd, "serve", str(tmp_path / "gone"), "--port", "0", "--data", str(tmp_path / "data"))
    told, fault = err.splitlines()[0], err.splitlines()[-1]
    assert (code, told) == (2, f"loading {tmp_path / 'gone'}")
    assert fault.startswith("error: ")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--host", "192.0.2.1", "--token-file", "tokens.txt"], "cannot be read"),
        (["--endpoint-model", "x"], "--endpoint-model: needs --endpoint"),
        (["--endpoint", "http://h", "--precision", "fp32"], "--precision fp32: the server decides it, with --endpoint"),
        (["--endpoint", "http://h", "--quantize", "nf4"], "--quantize nf4: the server decides it, with --endpoint"),
    ],
)
def test_wrong_options_are_one_line(capfd, options, fault):
    code, _, err = run_manyicl(capfd, "serve", "seed", "--port", "0", *options)
    assert code == 2
    assert fault in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--cache-gb", "--spill-gb"])
def test_no_budget_is_infinite(capfd, option):
    code, _, err = run_manyicl(capfd, "serve", "seed", option, "inf")
    assert code == 2
    assert err.startswith(f"error: {option} inf: input should be less than or equal to")


def test_an_address_of_another_computer_is_one_line(capfd, tmp_path):
    path = tmp_path / "tokens.txt"
    assert run_manyicl(capfd, "token", "--file", path)[0] == 0
    code, _, err = run_manyicl(capfd, "serve", "seed", "--host", "192.0.2.1", "--token-file", path)
    assert code == 2
    assert err.startswith("error: --host 192.0.2.1 --port 8300: cannot listen there")


def test_a_token_is_printed_once_and_kept_as_a_hash(capfd, tmp_path):
    path = tmp_path / "tokens.txt"
    code, out, _ = run_manyicl(capfd, "token", "--file", path, "--role", "admin", "--note", "Ada")
    assert code == 0
    assert load_tokens(path).find_role(out.strip()) == "admin"
    assert out.strip() not in path.read_text(encoding="utf-8")
