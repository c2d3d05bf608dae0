"""Servers for tests: `manyicl serve` as a process of its own, and an app on a free port in a thread."""

from __future__ import annotations

import json
import os
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn

from manyicl.server import ServerSettings, create_app
from manyicl.server.access import load_tokens
from manyicl.server.protocol import ImpatientProtocol
from tests.support.forked import forked
from tests.support.slow_service import wait_until

START_S = 120.0


@dataclass
class Served:
    """A server that runs as a process. log: the lines that it has logged so far, as JSON."""

    url: str
    process: BaseProcess
    data: Path
    log: list[dict[str, Any]] = field(default_factory=list)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.process.kill()
        self.process.join()

    def stop(self) -> int | None:
        """Tell it to stop; return its exit status."""
        self.process.terminate()
        self.process.join(timeout=60)
        return self.process.exitcode


@contextmanager
def serving(data: Path, *options: str, model: str = "seed") -> Iterator[Served]:
    """Run `manyicl serve` until the block ends, in a process forked from one that has imported torch."""
    script = ["-m", "manyicl", "serve", model, "--data", str(data), "--port", "0", "--log-json", *options]
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder, "stderr")
        os.mkfifo(pipe)
        with forked(script, {**os.environ, "OMP_NUM_THREADS": "1"}, err=str(pipe)) as process:
            served = Served("", process, data)
            lines: queue.Queue[str | None] = queue.Queue()
            reading = threading.Thread(target=_read_lines, args=(pipe, served, lines), daemon=True)
            reading.start()
            other: list[str] = []
            while not served.url:
                line = lines.get(timeout=START_S)
                assert line is not None, f"the server ended at its start: {''.join(other)}"
                other.append(line)
            yield served
        reading.join(timeout=10)


def _read_lines(pipe: Path, served: Served, lines: queue.Queue[str | None]) -> None:
    with pipe.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("{"):
                entry = json.loads(line)
                served.log.append(entry)
                if entry["event"] == "started":
                    served.url = entry["url"]
            lines.put(line)
    lines.put(None)


@contextmanager
def app_in_thread(service: Any, settings: ServerSettings = ServerSettings()) -> Iterator[str]:  # noqa: B008
    """Serve a service of this process on a free port; give the block its URL."""
    tokens = load_tokens(settings.token_file) if settings.token_file is not None else None
    config = uvicorn.Config(
        create_app(service, settings, tokens=tokens),
        port=0,
        http=ImpatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_s)),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert wait_until(lambda: server.started, seconds=20)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def read_events(lines: Sequence[str] | Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the content of each server-sent event."""
    name = "message"
    for line in lines:
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            content = line.removeprefix("data:").strip()
            yield name, content if content == "[DONE]" else json.loads(content)
            name = "message"
