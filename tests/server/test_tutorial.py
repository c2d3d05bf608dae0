"""Each block of docs/serve.md runs, in the order of the page."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


def read_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of each block that is to be run."""
    found = re.findall(r"(<!-- not run: [^>]*-->\n)?```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    return [(language, content) for marked, language, content in found if not marked]


@pytest.mark.slow
def test_every_block_of_the_tutorial_runs(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "manyicl").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m manyicl "$@"\n', encoding="utf-8")
    (tmp_path / "bin" / "manyicl").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "MANYICL_DATA": str(tmp_path / "data"),
        "NO_COLOR": "1",
    }
    blocks = read_blocks(PAGE.read_text(encoding="utf-8").replace("8300", str(port)))
    assert len(blocks) >= 9
    printed, server = [], None
    try:
        for language, content in blocks:
            if content.startswith("manyicl serve"):
                server = subprocess.Popen(["bash", "-c", f"exec {content}"], cwd=tmp_path, env=environment)
                wait_until_ready(f"http://127.0.0.1:{port}/readyz", server)
                continue
            command = ["bash", "-ec", content] if language == "bash" else [sys.executable, "-c", content]
            options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
            ran = subprocess.run(command, **options, timeout=120, check=False)
            assert ran.returncode == 0, f"{content}\n{ran.stdout}\n{ran.stderr}"
            assert '"urn:manyicl:' not in ran.stdout, f"{content}\n{ran.stdout}"
            printed.append(ran.stdout)
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
    whole = "\n".join(printed)
    assert '"num_examples":30' in whole
    assert '"probabilities":{' in whole
    assert "'seed:tickets'" in whole
    assert "manyicl-" in printed[-1]


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended by itself"
        try:
            if httpx2.get(url).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{url} did not become ready")
