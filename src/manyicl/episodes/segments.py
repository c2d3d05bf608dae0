"""Where the episodes of a row begin and end, in the form that attention kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The segments of one row; made once per row, read by every layer."""

    lengths: tuple[int, ...]
    """Tokens of each segment, in order; they add up to the row. A compiled layer must not read them: they differ from
    row to row, and the layer would be compiled again for each."""
    bounds_S: Tensor
    """int32 on the row's device: where each segment begins, then the end of the row, which may be repeated."""
    longest: int
    """The tokens of the longest segment, rounded up to a power of two."""
    is_one: bool
    """Whether a single segment fills the row."""


def make_segments(lengths: tuple[int, ...], *, bounds_S: Tensor) -> Segments:
    """Return the segments of a row."""
    return Segments(lengths, bounds_S, longest=power_of_two(max(lengths)), is_one=len(lengths) == 1)


def bounds_of(lengths: tuple[int, ...], *, num_bounds: int | None = None) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return where each segment begins, then the end of the row, repeated until there are `num_bounds`.

    >>> bounds_of((3, 2), num_bounds=4).tolist()
    [0, 3, 5, 5]
    """
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return bounds if num_bounds is None else np.pad(bounds, (0, num_bounds - len(bounds)), mode="edge")


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`.

    >>> [power_of_two(n) for n in (1, 5, 8)]
    [1, 8, 8]
    """
    return 1 << (number - 1).bit_length()
