"""Why the service refuses: each a UserError of its own class, so that a caller can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence

from manyicl.errors import UserError
from manyicl.tasks import Fault


class UnknownTask(UserError):  # noqa: N818  # it is a refusal, and the name says which
    """No task has this name."""


class UnknownExample(UserError):  # noqa: N818
    """The task has no example with this id."""


class TaskExists(UserError):  # noqa: N818
    """A task of this name is there already."""


class BadExamples(UserError):  # noqa: N818
    """Examples that cannot be read or kept; nothing was changed.

    faults: each kind of mistake with the first rows that have it; () if the message says it all.
    """

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class InputTooLong(UserError):  # noqa: N818
    """An input that does not fit the model's window, or the limit of characters."""


class QueueFull(UserError):  # noqa: N818
    """Too many inputs wait already.

    retry_after_s: when there will be room, estimated from the measured pace.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlinePassed(UserError):  # noqa: N818
    """No answer in the time that the caller allowed."""

    @classmethod
    def after(cls, seconds: float) -> DeadlinePassed:
        """Return the refusal of a request that waited so long for its answer."""
        shown = f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
        return cls(f"no answer within {shown} s; try again later, or allow more time")


class Closing(UserError):  # noqa: N818
    """The service is closed, or takes no more requests because it is being closed."""


class LibraryFault(UserError):  # noqa: N818
    """The library of tasks cannot be read or written: corrupt, from a newer version, locked, or the disk is full."""
