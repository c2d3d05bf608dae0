"""How much goes through the model at once: estimated from free memory, and halved if that was too much."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from manyicl.errors import UserError, is_out_of_memory
from manyicl.models import head_dims, inner_model, key_heads, layer_values

T = TypeVar("T")

# Most tokens of a row, however much memory is free: longer rows are no faster.
ROW_TOKENS = {"cuda": 16384, "cpu": 4096}
# Bytes for a row on a CPU. Its free memory is not used: rows must not depend on what else is running.
CPU_BYTES = 1 << 30
# Of the memory that asking may count on, for a row; the rest is for encoded shots and for copies of the row's keys.
ROW_FRACTION = 0.5
FEWEST_TOKENS = 16
# What CUDA takes of a GPU for each process, beside the memory that torch hands out.
CONTEXT_BYTES = 700 << 20

_share: ContextVar[Callable[[], float]] = ContextVar("_share", default=lambda: 1.0)


@contextmanager
def sharing_gpu(share: Callable[[], float]) -> Iterator[None]:
    """Count on a fraction of a GPU's free memory in the block, for processes that see the same memory free at once.

    share: returns the fraction. It is asked for every batch, because other processes come and go.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


@contextmanager
def part_of_gpu(num_processes: int | None) -> Iterator[None]:
    """Let this process have an equal part of its GPU and no more in the block: `num_processes` start on it at once.

    num_processes: None leaves it all that is free, as does a machine without a GPU.

    Raises:
        UserError: so many would have nothing left beside what CUDA itself takes.
    """
    if num_processes is None or not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.mem_get_info()[1]
    part = total / num_processes - CONTEXT_BYTES
    if part <= 0:
        raise UserError(
            f"{num_processes} processes on a GPU of {total / 2**30:.0f} GiB: CUDA alone takes"
            f" {CONTEXT_BYTES / 2**30:.2g} GiB for each; start fewer"
        )
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(part / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def process_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can have, those that it holds by now included.

    That is what nobody else holds, and no more than its part if it has one (`part_of_gpu`).
    """
    free, total = torch.cuda.mem_get_info(device)
    # Unlike the others, this one does not take a device without an index.
    part = int(torch.cuda.get_per_process_memory_fraction(device if device.index is not None else None) * total)
    return min(int(free) + torch.cuda.memory_reserved(device), part)


def usable_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that asking may count on: its share of what is free, or held by this process for later.

    What the weights and encoded shots take is not free any more.
    """
    return int(_share.get()() * (process_memory(device) - torch.cuda.memory_allocated(device)))


@dataclass(frozen=True, slots=True)
class RowBudget:
    """What a row may spend, and what a token costs in a forward pass, estimated from the config."""

    row_tokens: int
    """Most tokens of a row."""
    row_bytes: int
    """Most bytes of a row."""
    token_bytes: int
    """Activations of one token."""
    logit_bytes: int
    """One position's float32 logits and their copies."""
    key_bytes: int
    """Keys and values of one token, in all layers."""

    def fraction(self, *, num_tokens: int, num_logits: int, num_keys: int = 0) -> float:
        """Return the part of a row that these tokens, logits and kept keys take up."""
        num_bytes = num_tokens * self.token_bytes + num_logits * self.logit_bytes + num_keys * self.key_bytes
        return max(num_bytes / self.row_bytes, num_tokens / self.row_tokens)


def row_budget(model: nn.Module, *, row_tokens: int | None = None) -> RowBudget:
    """Return the budget of `model` on its device, from the memory that it may count on there now.

    row_tokens: most tokens of a row. Default: its device's `ROW_TOKENS`.
    """
    weight = next(model.parameters())
    inner = inner_model(model)
    config = inner.config.get_text_config()
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    dims = head_dims(config)
    heads = zip(layer_values(config, "num_attention_heads", default=1), dims, strict=True)
    inside = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    size = weight.element_size()
    kind = "cuda" if weight.device.type == "cuda" else "cpu"
    row_bytes = int(ROW_FRACTION * usable_memory(weight.device)) if kind == "cuda" else CPU_BYTES
    return RowBudget(
        row_tokens=row_tokens or ROW_TOKENS[kind],
        row_bytes=max(1, row_bytes),
        # Residuals, queries, keys, values and the feed-forward in the model's dtype; the merged parts in float32.
        token_bytes=size * (8 * hidden + 4 * inside) + 16 * max(head * dim for head, dim in heads),
        logit_bytes=vocab * 4 * 3,  # always in float32; a cap makes two more of them
        key_bytes=2 * size * sum(group * dim for group, dim in zip(key_heads(config), dims, strict=True)),
    )


def run_rows(items: Iterable[T], *, fraction: Callable[[T], float], run: Callable[[list[T]], None]) -> None:
    """Run all items, in order, in rows whose fractions add up to at most 1; an item with more has a row of its own.

    A row that runs out of memory is halved, and so are those after it.

    Raises:
        UserError: one item alone runs out of memory.
    """
    todo, most = deque((item, fraction(item)) for item in items), 1.0
    while todo:
        row = [todo.popleft()]
        filled = row[0][1]
        while todo and filled + todo[0][1] <= most:
            filled += todo[0][1]
            row.append(todo.popleft())
        if _fits(lambda row=row: run([item for item, _ in row])):  # type: ignore[misc]
            continue
        if len(row) == 1:
            raise UserError(
                "out of memory with one query at a time; free it from other programs, shorten the query, or use fewer"
                " shots or `precision` bf16"
            )
        todo.extendleft(reversed(row))
        most = filled / 2


def run_chunks(start: int, end: int, *, most: int, run: Callable[[int, int], None]) -> None:
    """Run the tokens [start, end) in chunks of at most `most`, halved if memory runs out.

    Raises:
        UserError: a chunk of `FEWEST_TOKENS` runs out of memory.
    """
    while start < end:
        stop = min(end, start + most)
        if _fits(lambda start=start, stop=stop: run(start, stop)):  # type: ignore[misc]
            start = stop
        elif stop - start <= FEWEST_TOKENS:
            raise UserError(
                f"out of memory at {start:,} tokens of shots; free it from other programs, or use fewer shots or"
                " `precision` bf16"
            )
        else:
            most = (stop - start) // 2


def _fits(run: Callable[[], None]) -> bool:
    try:
        run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The error holds every tensor of the failed pass until this block is left.
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
