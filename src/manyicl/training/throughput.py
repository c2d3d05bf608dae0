"""How fast training goes: tokens, answers and model FLOPs a second; and packs shared out so that no rank waits long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from manyicl.episodes import PackDataset
from manyicl.models import ModelShape, count_flops

# Side and number of the bf16 products that a GPU's ceiling is measured by.
PRODUCT_SIDE, NUM_PRODUCTS = 8192, 20


def balance_steps(packs: PackDataset, *, shape: ModelShape | None, num_ranks: int, packs_per_batch: int) -> list[int]:
    """Return the order of the packs in which the ranks have alike to do in each optimizer step.

    A step's packs, its divisors and so its gradient do not change. shape: if it is not known (None), the cost of a pack
    is taken to be the sum of the squares of its episodes' lengths, since attention is what makes packs differ.
    """
    lengths = [[episode.num_tokens for episode in pack.episodes] for pack in packs.packs]
    costs = [count_flops(shape, row, num_targets=0) if shape else sum(n * n for n in row) for row in lengths]
    return [
        start + place
        for start in range(0, len(costs), packs.packs_per_step)
        for place in balance_packs(
            costs[start : start + packs.packs_per_step], num_ranks=num_ranks, packs_per_batch=packs_per_batch
        )
    ]


def count_step_flops(packs: PackDataset, shape: ModelShape, *, steps: range) -> int:
    """Return the model FLOPs of consecutive optimizer steps. FLOPs add up: all their packs are counted as one row."""
    of_steps = packs.packs[steps.start * packs.packs_per_step : steps.stop * packs.packs_per_step]
    lengths = [episode.num_tokens for pack in of_steps for episode in pack.episodes]
    return count_flops(shape, lengths, num_targets=sum(packs.divisors[step].num_targets for step in steps))


def balance_packs(costs: Sequence[float], *, num_ranks: int, packs_per_batch: int) -> list[int]:
    """Return the order in which the packs of one optimizer step are handed out, so that all ranks have alike to do.

    Batches go to the ranks in turn, so places m * num_ranks * packs_per_batch + r * packs_per_batch + i are those of
    rank r. The dearest pack goes to the rank that has least so far (longest processing time first), each rank having as
    many packs as the others. A single rank keeps the plan's order.

    >>> balance_packs([1, 9, 8, 2], num_ranks=2, packs_per_batch=1)  # rank 0: 9 and 1, rank 1: 8 and 2
    [1, 2, 0, 3]
    """
    if num_ranks == 1:
        return list(range(len(costs)))
    share = len(costs) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    spent = [0.0] * num_ranks
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < share), key=lambda r: (spent[r], r))
        ranks[rank].append(pack)
        spent[rank] += costs[pack]
    return [
        pack
        for start in range(0, share, packs_per_batch)
        for packs in ranks
        for pack in packs[start : start + packs_per_batch]
    ]


def measure_ceiling(device: torch.device, *, seconds: float = 0.0) -> float | None:
    """Return the FLOP/s of a large bf16 product on a GPU, the ceiling that MFU is a share of; None on a CPU.

    Takes a tenth of a second and 400 MB for a moment. seconds: for which it is repeated first. A card that has reached
    the power it may draw lowers its clocks, as it does in training: an H100's 781 TFLOP/s are 680 after six seconds.
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


_STATUS = Path("/proc/self/status")


_RESET = Path("/proc/self/clear_refs")


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
