"""Errors that a user can cause, and refusals of the operating system, each in one line."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; name a folder that can be written",
    errno.EACCES: "permission is denied; name another place, or change its permissions",
    errno.EPERM: "permission is denied; name another place, or change its permissions",
    errno.EIO: "the device failed to read or write",
    errno.EFBIG: "the file is larger than a limit of this process (see ulimit -f) or of the file system",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EEXIST: "a file stands in its way; name another place",
    errno.ELOOP: "is a link that cannot be followed; remove it",
    errno.ENOTDIR: "a folder of this path is a file",
    errno.EISDIR: "is a folder, not a file",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ESTALE: "the network file system has lost it; try again",
}
# Libraries in Rust and C++ raise errors of their own, with the system's number in the text.
_NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)
# torch.save gives no number: it says only that it could not write.
_TORCH_WRITES = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+")

# tempfile, which torch uses while it is imported, tries some folders and reports only that none can be written to.
_NO_TEMPORARY = "No usable temporary directory"
# pathlib gives neither a class nor the path.
_NO_HOME = "Could not determine home directory"
# torch has a class for it only where its own allocator finds a GPU full, not where CUDA or its libraries do.
_GPU_FULL = re.compile(r"\bout of memory\b|CUBLAS_STATUS_ALLOC_FAILED")
# Names of our own that the user has not seen: DIR/.lock, DIR/.NAME.lock and DIR/.NAME.4711-0a1b2c3d.partial.
_OURS = re.compile(r"(?<![^/\\])\.([^/\\]+?)(?:\.lock|\.\d+-[0-9a-f]{8}\.partial)$|[/\\]\.lock$")

# Of many tasks, columns or labels, a message names so many, and says how many more there are.
MOST_NAMED = 3


class UserError(Exception):
    """A mistake in the user's input. The message is one line: the place, the value and the fix.

    The command line prints it without a traceback and exits with code 2. Any other exception that escapes is a bug of
    this library.
    """


class NonFiniteError(UserError):
    """A loss or a likelihood is not finite: a training diverged, or its model was broken before."""


class TerminatedError(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers do; it stops as after Ctrl-C."""


class OutOfMemoryError(UserError):
    """A GPU ran out of memory in training.

    setting: a setting that needs less memory, as KEY=VALUE; None if there is none.
    """

    def __init__(self, why: str, setting: str | None) -> None:
        super().__init__(why if setting is None else f"{why}; {setting} takes less")
        self.setting = setting


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or a list of the known words if none is similar to `word`.

    >>> suggest("clasification", ["classification", "nli"])
    "; did you mean 'classification'?"
    """
    choices = sorted(known)
    return suggest_near(word, choices) or f"; known: {', '.join(choices)}"


def suggest_near(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `; did you mean 'x'?` for the known word that is most similar to `word`, '' if none is.

    cutoff: least similarity, from 0 to 1, as difflib measures it.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""


def list_some(words: Iterable[str], *, most: int = MOST_NAMED, mark: str = ", ") -> str:
    """Return the first of some words in a row, and how many more there are.

    most: words that are named. mark: what stands between two.

    >>> list_some(["snips", "sst2", "mawps"]), list_some(["snips", "sst2", "mawps"], most=1)
    ('snips, sst2, mawps', 'snips, and 2 more')
    """
    known = list(words)
    rest = f"{mark}and {len(known) - most:,} more" if len(known) > most else ""
    return mark.join(known[:most]) + rest


def check_list(name: str, values: object, *, of: type[str] | type[int] = str) -> None:
    """Refuse one text, path or number in place of a list of them: Python would take a text letter by letter.

    of: what the list holds, for the advice.

    Raises:
        UserError: naming the parameter.
    """
    if isinstance(values, str | PathLike) or not isinstance(values, Iterable | None):
        shown = str(values) if of is int and str(values).isdecimal() else repr(str(values))
        raise UserError(f"{name}={values}: is one value, not a list; give [{shown}]")


def refuse_tables(name: str, values: object) -> None:
    """Refuse a mapping or a data frame in place of a list of texts: Python would take the names of its columns.

    Raises:
        UserError: naming the parameter.
    """
    if isinstance(values, Mapping) or hasattr(values, "columns"):
        raise UserError(f"{name}: is a table; give one of its columns, such as table['input']")


def take_whole(name: str, value: Any, *, least: int | None = None, advice: str = "") -> int:
    """Return a whole number that a parameter was given, also one of numpy's, as an int; refuse another thing.

    least: of the numbers that are right. advice: what else can be given, for the message.

    Raises:
        UserError: naming the parameter.

    >>> take_whole("draws", "5")
    Traceback (most recent call last):
        ...
    manyicl.errors.UserError: draws='5': give a whole number
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        shown = repr(str(value)[:60]) if isinstance(value, str) else str(value)[:60]
        above = "" if least is None else f" from {least}"
        raise UserError(f"{name}={shown}: give a whole number{above}{advice}")
    return number


def take_number(name: str, value: Any) -> float:
    """Return a number that a parameter was given, also one of numpy's, as a float; refuse another thing in its place.

    Raises:
        UserError: naming the parameter.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}={str(value)[:60]!r}: is not a number; give one")
    return float(value)


def take_path(name: str, value: object) -> str | PathLike[str]:
    """Return a path, as a text or a Path, that a parameter was given; refuse a number or another thing in its place.

    Raises:
        UserError: naming the parameter.
    """
    if not isinstance(value, str | PathLike):
        raise UserError(f"{name}={str(value)[:60]}: is not a path; give one as a text or a pathlib.Path")
    return value


def check_text(name: str, value: object, example: str) -> None:
    """Refuse a value that is not a text.

    Raises:
        UserError: naming the parameter, with an example of its values.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}={str(value)[:60]}: is not a text; give one, such as {example!r}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse a value that is not of the class of settings that a parameter takes, such as a dict of them.

    kind: a class that `manyicl` exports. None passes: it stands for the default.

    Raises:
        UserError: naming the parameter.
    """
    if not isinstance(value, kind | None):
        raise UserError(f"{name}={str(value)[:60]}: give a manyicl.{kind.__name__}")


def find_refusal(error: BaseException) -> str | None:
    """Return why the system refused an operation, with the path if it is known; None if `error` has another cause."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return "this computer is out of memory; use a smaller model or fewer rows"
        if is_out_of_memory(cause):
            return "the GPU is out of memory; free it from other programs, or use a smaller model"
        if _NO_TEMPORARY in str(cause):
            return "no temporary file can be written (the disk is full, or read-only?); free some space, or set TMPDIR"
        if _NO_HOME in str(cause):
            if "HOME" not in os.environ:
                return "no home folder is known for this user; set HOME"
            return "a path begins with ~ and names no user of this computer; write the whole path"
        if isinstance(cause, FileNotFoundError) and _is_nowhere():
            return "the folder that this was called in has been removed; go to another, or to a new one of that name"
        path = cause.filename if isinstance(cause, OSError) else None
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None:
            found = _NUMBER.search(str(cause))
            number = int(found[1]) if found else None
        if number is None and _TORCH_WRITES.search(str(cause)):
            number = errno.ENOSPC
        if number in _REASONS:
            place = _OURS.sub(lambda found: found[1] or "", str(path or ""))
            return f"{place}: {_REASONS[number]}" if place else _REASONS[number]
    return None


def _is_nowhere() -> bool:
    """Return whether the folder that this process works in has been removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch says that a GPU's memory is used up, whoever found that: torch or a library."""
    return isinstance(error, RuntimeError) and _GPU_FULL.search(str(error)) is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, then the errors that led to it (`__cause__`, else `__context__`), each once."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and not any(cause is one for one in seen):
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
