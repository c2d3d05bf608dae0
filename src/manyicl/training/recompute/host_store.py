"""The inputs of recomputed layers in the host's memory, from their forward to their backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor

from manyicl.episodes import power_of_two
from manyicl.errors import UserError
from manyicl.training.memory.host import free_host_memory

# Inputs of layers that are on the GPU at once: the one at hand, and the next one, which is on its way.
INPUTS_AT_ONCE = 2


class HostStore:
    """Keeps the inputs of layers in the host's memory, from their forward to their backward pass.

    Copies run beside the computation: an input leaves while the next layer goes forward, and comes back while the layer
    after it goes backward. Every layer has a pinned buffer of its own, which grows to its largest input and is kept for
    the next row. On a CPU, inputs are copied at once; that is for tests.
    """

    def __init__(self, device: torch.device, *, layers: Sequence[int]) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_layers = len(layers)
        self.before = dict(zip(layers[1:], layers, strict=False))
        self.buffers: dict[int, Tensor] = {}
        self.shapes: dict[int, tuple[torch.Size, torch.dtype]] = {}
        # Layer -> its input on the GPU while it is on its way, and the event that ends its copy.
        self.leaving: dict[int, tuple[Tensor, Any]] = {}
        self.coming: dict[int, tuple[Tensor, Any]] = {}

    def keeping(self, number: int, hidden: Tensor) -> AbstractContextManager[None]:
        """Keep `hidden`, wherever autograd saves it in the block, as the input of layer `number`."""
        address, shape = hidden.data_ptr(), hidden.shape  # autograd keeps `pack`, which must not keep the input

        def pack(saved: Tensor) -> Tensor | int:
            if saved.data_ptr() != address or saved.shape != shape:
                return saved
            self._send(number, saved.detach())
            return number

        def unpack(packed: Tensor | int) -> Tensor:
            return packed if isinstance(packed, Tensor) else self._fetch(packed)

        context: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        return context

    def _send(self, number: int, hidden: Tensor) -> None:
        if number not in self.before:  # the first layer: nothing is left of a row that came to no end
            self._settle(0)
            for _, copied in self.coming.values():
                self._wait(copied)
            self.coming.clear()
        self.shapes[number] = (hidden.shape, hidden.dtype)
        self.leaving[number] = (hidden, self._copy(hidden, self._buffer(number)))
        self._settle(INPUTS_AT_ONCE)

    def _settle(self, most: int) -> None:
        """Let go of all but the last `most` inputs that are leaving. The GPU reuses their memory after their copies."""
        while len(self.leaving) > most:
            _, copied = self.leaving.pop(next(iter(self.leaving)))
            self._wait(copied)

    def _fetch(self, number: int) -> Tensor:
        """Return the input of a layer on the GPU, and have the one before it brought there."""
        if number in self.leaving:
            hidden, _ = self.leaving.pop(number)
        else:
            hidden, copied = self.coming.pop(number) if number in self.coming else self._bring(number)
            self._wait(copied)
        before = self.before.get(number)
        if before is not None and before not in self.leaving:
            self.coming[before] = self._bring(before)
        return hidden

    def _bring(self, number: int) -> tuple[Tensor, Any]:
        shape, dtype = self.shapes[number]
        hidden = torch.empty(shape, dtype=dtype, device=self.device)
        return hidden, self._copy(self._buffer(number), hidden)

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        """Copy after what the computation was given so far, beside what it is given next; return the copy's event."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _wait(self, copied: Any) -> None:
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def _buffer(self, number: int) -> Tensor:
        """Return the host's memory for the input of a layer, in its shape."""
        shape, dtype = self.shapes[number]
        num_bytes = prod(shape) * dtype.itemsize
        buffer = self.buffers.get(number)
        if buffer is None or len(buffer) < num_bytes:
            if not self.buffers:
                self._check_room(num_bytes)
            self.buffers.pop(number, None)
            try:
                buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.stream is not None)
            except RuntimeError as error:
                raise UserError(
                    f"train.recompute: the host's memory cannot hold the input of layer {number},"
                    f" {num_bytes / 2**20:,.0f} MiB; set train.recompute = 'full' and a lower episodes.token_budget"
                ) from error
            self.buffers[number] = buffer
        return buffer[:num_bytes].view(dtype).view(shape)

    def _check_room(self, num_bytes: int) -> None:
        """Refuse inputs of so many bytes that the host cannot hold for all layers: the system would end the process.

        Raises:
            UserError: with what is needed, and what is free.
        """
        needed, free = self.num_layers * power_of_two(num_bytes), free_host_memory()
        if free is not None and needed > free:
            raise UserError(
                f"train.recompute: the inputs of {self.num_layers} layers need {needed / 2**30:,.1f} GiB of the host's"
                f" memory, of which {free / 2**30:,.1f} GiB are free; free some, or set train.recompute = 'full' and a"
                " lower episodes.token_budget"
            )
