"""What a run reports as it goes: metrics.jsonl, the sums of a step, a progress bar, its peak and a GPU's ceiling."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from manyicl.console import Bar
from manyicl.episodes import Batch
from manyicl.errors import UserError
from manyicl.files import write_atomically
from manyicl.models import AnswerLoss

# Side and number of the bf16 products that a GPU's ceiling is measured by.
PRODUCT_SIDE, NUM_PRODUCTS = 8192, 20
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
# What a peak that was just reset may lie above the resident set: pages that were given back in between.
RESET_SLACK = 64 << 20
# Losses by shot index are kept in these buckets: the first index of each.
SHOT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, cut back to the checkpoint when a run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines; one that a kill left half-written is left out.

        Raises:
            UserError: another line is damaged.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        return [self._record(line, number) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                return record
        raise UserError(f"{self.path} line {number}: is damaged; restore the file, or remove this line")

    def cut_after(self, step: int) -> None:
        """Drop what was logged after `step`."""
        if self.path.exists():
            kept = [json.dumps(record) + "\n" for record in self.read() if record["step"] <= step]
            write_atomically(self.path, "".join(kept))


class StepSums:
    """Sums of one optimizer step that stay on the device until its one synchronisation.

    Per shot bucket: mean token loss and number of answers; besides the loss itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.edges = torch.tensor(SHOT_BUCKETS[1:], device=device)
        self.sums = torch.zeros(1 + 2 * len(SHOT_BUCKETS), device=device, dtype=torch.float64)

    def add(self, batch: Batch, scored: AnswerLoss) -> None:
        """Add one micro-batch."""
        buckets_A = torch.bucketize(batch.answer_shots_A, self.edges, right=True)
        self.sums[0] += scored.loss.detach()
        self.sums.index_add_(0, 1 + buckets_A, (scored.nll_A / scored.num_tokens_A).double())
        ones_A = torch.ones(len(buckets_A), device=self.sums.device, dtype=torch.float64)
        self.sums.index_add_(0, 1 + len(SHOT_BUCKETS) + buckets_A, ones_A)


def bucket_name(index: int, *, buckets: Sequence[int] = SHOT_BUCKETS) -> str:
    """Return what a bucket of shot indices is called: '0', '2-3', '1024+'. buckets: the first index of each."""
    first = buckets[index]
    if index + 1 == len(buckets):
        return f"{first}+"
    last = buckets[index + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


class BarCallback(TrainerCallback):
    """Moves a bar with the Trainer's steps and shows the last loss and rate beside it."""

    def __init__(self, bar: Bar, what: str) -> None:
        self.bar, self.what, self.note = bar, what, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Move the bar, but for the last step, whose loss comes behind it."""
        if state.global_step < self.bar.total:
            self.bar.update(self.what, state.global_step, note=self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show the last step with its own loss."""
        self.bar.update(self.what, state.global_step, note=self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Remember what to show."""
        if logs and "tokens_per_s" in logs:
            self.note = (
                f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:,.0f} tokens/s, {logs['answers_per_s']:,.0f} answers/s"
            )
            if "mfu" in logs:
                self.note += f", MFU {100 * logs['mfu']:.0f} %"


def measure_ceiling(device: torch.device, *, seconds: float = 0.0) -> float | None:
    """Return the FLOP/s of a large bf16 product on a GPU, the ceiling that MFU is a fraction of; None on a CPU.

    Takes 0.1 s and briefly 400 MB. seconds: how long to warm the GPU up before timing. A card that has reached its
    power limit lowers its clocks, as it does in training: an H100's 781 TFLOP/s are 680 after six seconds.
    """
    if device.type != "cuda":
        return None
    # Random numbers: a GPU is faster on zeros.
    one, other = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = one @ other
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    while True:
        started = time.perf_counter()
        for _ in range(NUM_PRODUCTS):
            torch.mm(one, other, out=out)
        torch.cuda.synchronize(device)
        now = time.perf_counter()
        if now - begun >= seconds:
            break
    del one, other, out
    torch.cuda.empty_cache()
    return 2 * PRODUCT_SIDE**3 * NUM_PRODUCTS / (now - started)


class PeakMemory:
    """The most bytes held since it was made: allocated on a GPU, else resident in this process.

    Where a system cannot forget its earlier peak (Linux can, but not in every container), there is no figure for a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text("5")  # resets VmHWM to what is resident now
        except OSError:
            self.known = False
            return
        # Seen in a sandbox: the write succeeds and the peak stays the one of the process's whole life.
        peak, resident = resident_peak(), resident_now()
        self.known = peak is not None and resident is not None and peak <= resident + RESET_SLACK

    def read(self) -> int | None:
        """Return the peak in bytes, None where it is not known."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resident_peak() if self.known else None


def resident_peak() -> int | None:
    """Return the peak of this process's resident set in bytes (VmHWM); None where the system does not say."""
    return _status_bytes("VmHWM")


def resident_now() -> int | None:
    """Return this process's resident set in bytes (VmRSS); None where the system does not say."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return found[0] * 1024 if found else None
