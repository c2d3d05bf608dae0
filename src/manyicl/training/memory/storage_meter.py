"""The memory of a training step: every storage is counted from its birth to its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from manyicl.episodes import Batch
from manyicl.models import decoder_layers, row_loss
from manyicl.training.recompute.layers import unwidened_inputs


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages that are born inside it and live. peak_bytes: the most since `reset`.

    before: tensors that were there before; a view of one is no new storage.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self.sizes: dict[int, int] = {}
        self.before = {tensor.untyped_storage()._cdata for tensor in before}

    def reset(self) -> None:
        """Begin a new peak at what is live now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes or key in self.before:
            return
        self.sizes[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self.sizes.pop(key)


def meter_step(model: nn.Module, batch: Batch, *, autocast: bool, most_logits: int | None = None) -> tuple[int, int]:
    """Return the peak bytes beside weights and gradients at the head's moment and at the layers', of one step.

    model: inside an attention that takes segments. autocast: products in bfloat16. most_logits: as in `row_loss`.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # counted as a state: it is there from the second row on
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    meter = StorageMeter([*model.parameters(), *model.buffers(), *gradients, batch.input_ids_1T])
    heads: list[int] = []

    def leave_head(_: Tensor) -> None:
        heads.append(meter.peak_bytes)
        meter.reset()

    hook = decoder_layers(model)[-1].register_forward_hook(_on_output(leave_head))
    with meter, unwidened_inputs(model, autocast=autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = row_loss(model, batch, most_logits=most_logits).loss
        loss.backward()
    hook.remove()
    return heads[0], meter.peak_bytes


def _on_output(act: Callable[[Tensor], None]) -> Callable[..., None]:
    """Return a forward hook that calls `act` when the backward pass reaches the module's output."""

    def hook(*hooked: Any) -> None:
        _, _, output = hooked  # module, arguments
        (output[0] if isinstance(output, tuple) else output).register_hook(act)

    return hook
