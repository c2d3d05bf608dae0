"""How much goes through the model at once: planned from free memory, halved where that was too much."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from manyicl.errors import UserError
from manyicl.models import head_dims, inner_model, key_heads, layer_values

T = TypeVar("T")

# Most tokens of a row, however much memory is free: longer rows are no faster.
ROW_TOKENS = {"cuda": 16384, "cpu": 4096}
# What is planned with on a CPU, where free memory is not asked for: rows must not depend on who else is running.
CPU_BYTES = 1 << 30
FREE_SHARE = 0.5
FEWEST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a token costs in a forward pass, estimated from the config, and what may be spent on a row.

    token_bytes: activations. logit_bytes: one position's float32 logits and their copies. key_bytes: keys and values.
    """

    row_tokens: int
    row_bytes: int
    token_bytes: int
    logit_bytes: int
    key_bytes: int

    def share(self, *, num_tokens: int, num_logits: int, num_keys: int = 0) -> float:
        """Return the share of a row that these tokens, logits and kept keys take up."""
        num_bytes = num_tokens * self.token_bytes + num_logits * self.logit_bytes + num_keys * self.key_bytes
        return max(num_bytes / self.row_bytes, num_tokens / self.row_tokens)


def plan_memory(model: nn.Module) -> MemoryPlan:
    """Return the plan for `model` on its device, from what is free there now."""
    weight = next(model.parameters())
    inner = inner_model(model)
    config = inner.config.get_text_config()
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    dims = head_dims(config)
    heads = zip(layer_values(config, "num_attention_heads", default=1), dims, strict=True)
    inside = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    size = weight.element_size()
    kind = "cuda" if weight.device.type == "cuda" else "cpu"
    row_bytes = CPU_BYTES
    if kind == "cuda":
        reusable = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        row_bytes = int(FREE_SHARE * (torch.cuda.mem_get_info(weight.device)[0] + reusable))
    return MemoryPlan(
        row_tokens=ROW_TOKENS[kind],
        row_bytes=max(1, row_bytes),
        # Residuals, queries, keys, values and the feed-forward in the model's dtype; the merged parts in float32.
        token_bytes=size * (8 * hidden + 4 * inside) + 16 * max(head * dim for head, dim in heads),
        logit_bytes=vocab * 4 * 3,  # always in float32; a cap makes two more of them
        key_bytes=2 * size * sum(group * dim for group, dim in zip(key_heads(config), dims, strict=True)),
    )


def run_rows(items: Iterable[T], *, share: Callable[[T], float], run: Callable[[list[T]], None]) -> None:
    """Run all items, in order, in rows whose shares add up to at most 1, or one item where it alone has more.

    A row that runs out of memory is halved, and so are those after it.

    Raises:
        UserError: one item alone runs out of memory.
    """
    todo, most = deque(items), 1.0
    while todo:
        row, filled = [todo.popleft()], 0.0
        filled = share(row[0])
        while todo and filled + share(todo[0]) <= most:
            filled += share(todo[0])
            row.append(todo.popleft())
        if _fits(lambda row=row: run(row)):  # type: ignore[misc]
            continue
        if len(row) == 1:
            raise UserError(
                "out of memory with one query at a time; shorten it, or use fewer shots or --precision bf16"
            )
        todo.extendleft(reversed(row))
        most = filled / 2


def run_chunks(start: int, end: int, *, most: int, run: Callable[[int, int], None]) -> None:
    """Run the tokens [start, end) in chunks of at most `most`, halved where memory runs out.

    Raises:
        UserError: a chunk of `FEWEST_TOKENS` runs out of memory.
    """
    while start < end:
        stop = min(end, start + most)
        if _fits(lambda start=start, stop=stop: run(start, stop)):  # type: ignore[misc]
            start = stop
        elif stop - start <= FEWEST_TOKENS:
            raise UserError(f"out of memory at {start:,} tokens of shots; use fewer, or --precision bf16")
        else:
            most = (stop - start) // 2


def _fits(run: Callable[[], None]) -> bool:
    try:
        run()
    except torch.OutOfMemoryError:
        pass  # only behind this block does the error, and with it every tensor of the failed pass, go
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
