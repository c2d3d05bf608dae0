"""A service without a model, whose answers take as long as a test wants: for clients that leave, queues and streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from manyicl.inference import EndpointCalls
from manyicl.service import Closing, Generation, Reply, ServiceSettings, Timing, UnknownTask

TIMING = Timing(queued_s=0.0, prefix_s=0.0, model_s=0.1, total_s=0.1, prefix_cached=True, batch_size=1)


class SlowTicket:
    """An answer that comes piece by piece, until it is cancelled."""

    def __init__(
        self, service: SlowService, make: Callable[[], Any], on_text: Callable[[int, str], None] | None
    ) -> None:
        self.future: Future[Any] = Future()
        self.cancelled = threading.Event()
        self._service, self._make, self._on_text = service, make, on_text
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            for piece in self._service.pieces:
                if self.cancelled.wait(self._service.piece_s):
                    self.future.cancel()
                    return
                if self._on_text is not None:
                    self._on_text(0, piece)
            if self._service.failure is not None:
                raise self._service.failure
            self.future.set_result(self._make())
        except Exception as error:
            self.future.set_exception(error)

    def cancel(self) -> None:
        if not self.future.done():
            self.cancelled.set()


class SlowService:
    """One task, `slow`, which answers every input with the same pieces.

    refusal: raised when a question is submitted. failure: what answers end with. tickets: all that were given.
    asked: the settings of each question. labels: of the task.
    """

    def __init__(self, *, pieces: Sequence[str] = ("one ", "two ", "three"), piece_s: float = 0.01) -> None:
        self.pieces, self.piece_s = pieces, piece_s
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.tickets: list[SlowTicket] = []
        self.labels: tuple[str, ...] = ()
        self.is_ready = True
        self.calls = EndpointCalls()
        self.closed = False
        self.settings = ServiceSettings()
        self.asked: list[dict[str, Any]] = []
        self.info = SimpleNamespace(
            base_name="base", version="1", path="base", num_parameters=1, device="cpu", dtype="f"
        )

    def tasks(self) -> list[Any]:
        return [self.task("slow")]

    def task(self, name: str) -> Any:
        if name != "slow":
            raise UnknownTask(f"{name}: there is no such task")
        return SimpleNamespace(name="slow", submit=self.submit, labels=self.labels)

    def submit(self, inputs: Sequence[str], *, on_text: Any = None, **settings: Any) -> SlowTicket:
        self.asked.append(settings)
        return self._give(lambda: [self._reply(text) for text in inputs], on_text)

    def submit_generation(
        self, prompt: Any, *, seed: Sequence[int], on_text: Any = None, **settings: Any
    ) -> SlowTicket:
        self.asked.append({"seed": seed, **settings})
        text = "".join(self.pieces)
        return self._give(lambda: [Generation(text, "length", 4, 3, timing=TIMING) for _ in seed], on_text)

    def _give(self, make: Callable[[], Any], on_text: Any) -> SlowTicket:
        if self.refusal is not None:
            raise self.refusal
        self.tickets.append(SlowTicket(self, make, on_text))
        return self.tickets[-1]

    def _reply(self, text: str) -> Reply:
        return Reply(
            input=text,
            answer="".join(self.pieces),
            probabilities=None,
            confidence=None,
            unsure=False,
            nll=float("nan"),
            shots=(1, 2),
            cut=False,
            finish="stop",
            timing=TIMING,
            num_prompt_tokens=5,
            num_answer_tokens=3,
            task_version=1,
        )

    def stats(self) -> Any:
        raise Closing("it counts nothing")

    def ready(self) -> None:
        self.is_ready = True

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        self.closed = True


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> bool:
    """Return whether a condition came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
