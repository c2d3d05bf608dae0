"""The one kind of error a user can cause, and how a misspelt word is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input, told in one line: where, what value, and the fix.

    The command line prints it without a traceback and exits with code 2. Everything else that escapes is a bug of ours.
    """


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
