"""FlashAttention 3 in place of torch's own flash kernel, on Hopper, where its package is installed.

torch (2.11 and later) puts another implementation behind its own flash operations, for a process, when told to; here it
is told to for a block. On an H100 it does 10 to 20 % more than cuDNN's kernel (docs/performance.md). What a user has
put there by torch's `activate_flash_attention_impl`, FlashAttention 4 say, is left there.
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


def in_place() -> str | None:
    """Return the name of the implementation that stands behind torch's flash operations; None: torch's own."""
    name: str | None = attention.current_flash_attention_impl()
    return name


@contextmanager
def flash_attention_3() -> Iterator[None]:
    """Put it in place in the block; where it cannot be, or another stands there, all stays as it is.

    It knows no dropout: attention that drops must not come near it.
    """
    if in_place() is not None or not is_usable():
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
    """Return whether the package is there and can be loaded; one that cannot be is told of, once."""
    if importlib.util.find_spec(PACKAGE) is None:
        return False
    try:
        importlib.import_module(PACKAGE)
    except (ImportError, OSError, RuntimeError) as error:  # made for another torch, or another CUDA
        told = " ".join(str(error).split())[:200]
        warnings.warn(
            f"{PACKAGE} is installed and cannot be loaded, so cuDNN's attention is used: {told}", stacklevel=2
        )
        return False
    return True
