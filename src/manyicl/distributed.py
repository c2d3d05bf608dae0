"""The processes of one `accelerate launch`: who does what, and one error for all of them."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Never, TypeVar

from manyicl.errors import UserError

# Ranks wait this long for the slowest: the cells of an evaluation are shared out once and differ in size.
WAIT = timedelta(hours=24)
_FAILED = "failed"

T = TypeVar("T")


class SharedError(UserError):
    """An error that every rank has, whichever met it; the main process alone tells it."""


class _StoppedError(UserError):
    """Another rank has failed, and tells why."""


class Ranks:
    """This process among those of a launch; alone unless made by `joined_ranks`."""

    def __init__(self, *, number: int = 0, count: int = 1, store: Any = None) -> None:
        self.number, self.count, self._store = number, count, store

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.number == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of what all ranks hold alike."""
        return items[self.number :: self.count]

    def check(self) -> None:
        """Stop a `gather` where another rank has failed, before more work is done for nothing."""
        if self._store is not None and self._store.check([_FAILED]):
            raise _StoppedError("another rank has failed")

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns on each rank, to all ranks.

        Raises:
            SharedError: a UserError on any of them.
        """
        if self.count == 1:
            return [work()]
        from accelerate.utils import gather_object

        result: T | None = None
        fault = None
        try:
            result = work()
        except _StoppedError:
            fault = ""
        except UserError as error:
            fault = str(error)
            self._store.set(_FAILED, "")
        told = gather_object([(result, fault)])
        faults = [fault for _, fault in told if fault]
        if faults:
            raise SharedError(faults[0])
        return [result for result, _ in told]


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of the launch that this one belongs to, if any; a UserError of one ends all of them.

    All ranks do the same `gather`s in the block. Only the main process goes on behind it; the others exit.

    Raises:
        SharedError: a UserError on any of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks, leave = _join()
    try:
        yield from _end_together(ranks)
    except UserError:  # behind any other error the others may never answer
        leave()
        raise
    leave()
    if not ranks.is_main:
        sys.exit(0)


def leave_at_exit() -> None:
    """Have this process leave its launch when Python ends, and not before: more may be done together until then.

    A thread of gloo that lets go of a tensor after that aborts the process (pytorch#179291), its work done; NCCL warns.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if hasattr(sys, "last_value"):  # Python ends by an error: the others may be waiting, and never answer
        return
    gc.collect()  # a trained model and its trainer hold each other, and the group
    distributed.destroy_process_group()


def _end_together(ranks: Ranks) -> Iterator[Ranks]:
    try:
        yield ranks
    except SharedError:
        raise
    except UserError as error:
        ranks.gather(partial(_raise, error))
    ranks.gather(lambda: None)  # an error behind the last `gather` of the block is met here by the others


def _raise(error: UserError) -> Never:
    raise error


def _join() -> tuple[Ranks, Callable[[], None]]:
    """Return this rank, and what to call in the end."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in its list

    # Told so, accelerate joins a CPU launch's processes too; else each would take itself for the only one.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False) if state.is_main_process else None
    port = broadcast_object_list([server.port if server else None])[0]
    store = server or TCPStore(host, port, is_master=False)
    return Ranks(number=state.process_index, count=state.num_processes, store=store), state.destroy_process_group
