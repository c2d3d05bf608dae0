"""FlashAttention 3 in place of torch's own flash kernel, on Hopper, where its package is installed.

torch (2.11 and later) can route its flash-attention operations to another implementation, process-wide. This module
does so inside a `with` block. In most long rows FlashAttention 3 is 10 to 23 % faster than cuDNN's kernel on an H100
(docs/performance.md). What a user activated by torch's `activate_flash_attention_impl`, FlashAttention 4 say, stays.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch.nn import attention

# The package's module, by which transformers too knows it; and the device that its kernels are made for.
PACKAGE = "flash_attn_interface"
HOPPER = 9
# Of a row, from which on it is faster: torch calls it through Python, which takes a third of a millisecond a call, so
# that a step of a 1B model took 9 ms more at 512 tokens (docs/performance.md).
FEWEST_TOKENS = 4096


def flash_implementation() -> str | None:
    """Return the name of the implementation that torch's flash operations run; None: torch's own."""
    name: str | None = attention.current_flash_attention_impl()
    return name


def is_worthwhile(row_tokens: int) -> bool:
    """Return whether FlashAttention 3 can be used, and is faster for rows of this many tokens."""
    return row_tokens >= FEWEST_TOKENS and is_usable()


@contextmanager
def flash_attention_3() -> Iterator[None]:
    """Use FlashAttention 3 in the block. Only valid without attention dropout; does nothing if another is active."""
    if flash_implementation() is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered", category=UserWarning)
        attention.activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def is_usable() -> bool:
    """Return whether the package is installed and the device is one that it is made for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER and _is_installed()


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    """Return whether the package is there and can be loaded; one that cannot is reported once."""
    if importlib.util.find_spec(PACKAGE) is None:
        return False
    try:
        importlib.import_module(PACKAGE)
        missing = [name for name in ("fwd", "bwd") if not hasattr(torch.ops.flash_attn_3, name)]
        if missing:
            raise ImportError(f"it has no {' and no '.join(missing)}")
    except (ImportError, OSError, RuntimeError) as error:  # made for another torch, or another CUDA
        told = " ".join(str(error).split())[:200]
        warnings.warn(
            f"{PACKAGE} is installed and cannot be loaded, so cuDNN's attention is used: {told}", stacklevel=2
        )
        return False
    return True
