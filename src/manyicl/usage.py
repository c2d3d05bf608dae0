"""What a process takes: seconds, and the most memory it held."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most bytes held since it was made: allocated on a GPU, else resident in this process.

    Where a system cannot forget its earlier peak (only Linux does), there is no figure for a CPU.
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

    def read(self) -> int | None:
        """Return the peak in bytes, None where it is not known."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resident_peak() if self.known else None


def resident_peak() -> int | None:
    """Return the peak of this process's resident set in bytes (VmHWM); None where the system does not say."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] * 1024 if found else None
