"""A real vLLM answers as the model here does. It needs other versions of packages, so it has an environment of its own.

`MANYICL_VLLM` names the Python of that environment; docs/service.md says how to make one.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from manyicl.evaluation.loop import evaluate
from manyicl.inference.endpoint import EndpointSettings
from manyicl.inference.model import load_for_inference
from manyicl.tasks.task import Example
from tests.conftest import make_task

PYTHON = os.environ.get("MANYICL_VLLM") or (sys.executable if importlib.util.find_spec("vllm") else None)
START_S = 180
CAPITALS = (
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Japan", "Tokyo"),
    ("Spain", "Madrid"),
    ("Egypt", "Cairo"),
    ("Norway", "Oslo"),
    ("Greece", "Athens"),
    ("Poland", "Warsaw"),
    ("Peru", "Lima"),
    ("Cuba", "Havana"),
    ("Chile", "Santiago"),
    ("Kenya", "Nairobi"),
    ("Austria", "Vienna"),
    ("Portugal", "Lisbon"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed; MANYICL_VLLM names a Python that has it"),
]


@contextmanager
def vllm(model: Path, log: Path) -> Iterator[str]:
    """Run vLLM on a free port of this machine, as `tiny`; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    # The module, since the command `vllm` of the builds for CPUs does not start: it looks for a package of that name.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port]
    command += ["--model", str(model), "--served-model-name", "tiny", "--generation-config", "vllm"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True) as server,
    ):
        try:
            for _ in range(START_S * 2):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, log.read_text()[-2000:]
                    time.sleep(0.5)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # its workers too


def test_vllm_answers_as_the_engine_does(smollm2, tmp_path):
    rows = tuple(Example(input=f"What is the capital of {country}?", answer=city) for country, city in CAPITALS)
    task = replace(
        make_task("capitals"), family="qa", metric="exact_match", instruction="", labels=(), sha256="capitals"
    )
    task = replace(task, train=rows[:4], validation=(), test=rows[4:])
    asked = load_for_inference(str(smollm2), precision="fp32")
    options = {"shots": (4,), "draws": 1, "queries": 10}
    local = evaluate(asked, [task], **options)
    with vllm(smollm2, tmp_path / "vllm.log") as url:
        settings = EndpointSettings(url, model="tiny", concurrency=2)
        remote = evaluate(replace(asked, model=None), [task], endpoint=settings, **options)
    given = [p.prediction for p in remote.curves[0].predictions]
    assert remote.endpoint["prompts"] == "ids"
    assert len(given) == 10
    assert given == [p.prediction for p in local.curves[0].predictions]
    assert len(set(given)) > 5
