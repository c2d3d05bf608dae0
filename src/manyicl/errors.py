"""The kind of error that a user can cause, and how a misspelt word is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input, told in one line: where, what value, and the fix.

    The command line prints it without a traceback and exits with code 2. Everything else that escapes is a bug of ours.
    """


class OutOfMemoryError(UserError):
    """A GPU that ran out of memory in training. setting: KEY=VALUE that takes less, None where none does."""

    def __init__(self, why: str, setting: str | None) -> None:
        super().__init__(why if setting is None else f"{why}; {setting} takes less")
        self.setting = setting


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the known words where none is near `word`.

    >>> suggest("clasification", ["classification", "nli"])
    "; did you mean 'classification'?"
    """
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(choices)}"
