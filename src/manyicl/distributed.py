"""The processes of one `accelerate launch`: each takes its part of the work, and an error on one ends all."""

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

# How long ranks wait for the slowest: the work of an evaluation is divided among them once, in parts of unequal size.
WAIT = timedelta(hours=24)
_FAILED = "failed"

T = TypeVar("T")


class SharedError(UserError):
    """An error that is raised on every rank, whichever met it; only the main process prints it."""


class _StoppedError(UserError):
    """Another rank has failed, and its error says why."""


class Ranks:
    """This process and its place among those of a launch; `joined_ranks` finds it, and `ALONE` is the default."""

    def __init__(self, *, number: int = 0, count: int = 1, store: Any = None) -> None:
        self.number, self.count, self._store = number, count, store

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.number == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of items that all ranks have."""
        return items[self.number :: self.count]

    def check(self) -> None:
        """Raise an error if another rank has failed. Work inside `gather` calls it often, to not go on for nothing."""
        if self._store is not None and self._store.check([_FAILED]):
            raise _StoppedError("another rank has failed")

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Return, on every rank, the list of what `work` returns on each rank.

        Raises:
            SharedError: `work` raised a UserError on any rank.
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
        gathered = gather_object([(result, fault)])
        faults = [fault for _, fault in gathered if fault]
        if faults:
            raise SharedError(faults[0])
        return [result for result, _ in gathered]


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of the launch that this one belongs to, if any; a UserError on one rank ends all of them.

    All ranks must call the same `gather`s in the block. After the block only the main process goes on; the others exit.

    Raises:
        SharedError: a UserError on any rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks, leave = _join()
    try:
        yield from _end_together(ranks)
    except UserError:  # only then: after any other error the ranks would wait for each other here
        leave()
        raise
    leave()
    if not ranks.is_main:
        sys.exit(0)


def leave_at_exit() -> None:
    """Make this process leave its launch when Python exits, not earlier: the ranks may work together until then.

    Without it, a gloo thread that frees a tensor during exit aborts the process (pytorch#179291) although its work is
    done, and NCCL warns.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if hasattr(sys, "last_value"):  # Python exits on an error: the other ranks may be busy, and leaving waits for them
        return
    gc.collect()  # a trained model and its trainer refer to each other, and to the group
    distributed.destroy_process_group()


def _end_together(ranks: Ranks) -> Iterator[Ranks]:
    try:
        yield ranks
    except SharedError:
        raise
    except UserError as error:
        ranks.gather(partial(_raise, error))
    ranks.gather(lambda: None)  # here the others learn of an error that came after the last `gather` of the block


def _raise(error: UserError) -> Never:
    raise error


def _join() -> tuple[Ranks, Callable[[], None]]:
    """Return this rank, and a function that leaves the launch."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in its list

    # Without `cpu=`, accelerate ignores a launch on CPUs, and every process believes that it is alone.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False) if state.is_main_process else None
    port = broadcast_object_list([server.port if server else None])[0]
    store = server or TCPStore(host, port, is_master=False)
    return Ranks(number=state.process_index, count=state.num_processes, store=store), state.destroy_process_group
