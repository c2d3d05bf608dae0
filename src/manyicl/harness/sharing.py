"""Which contexts of lm-eval's requests begin alike, so that what they share is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Contexts share a prefix if it is at least this fraction of each of them. Below that, a batch of its own costs more.
LEAST_SHARED = 0.5
# A context that shares nothing and is at least so long is encoded before its options; a shorter one beside others.
LONG_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class SharedContexts:
    """Contexts that are run together after one prefix."""

    prefix: tuple[int, ...]
    """The ids that they all begin with; () if they are run whole, beside each other."""
    contexts: tuple[tuple[int, ...], ...]
    """Each context, prefix included; at least one id of each is not part of the prefix."""


def share_contexts(contexts: Sequence[tuple[int, ...]]) -> list[SharedContexts]:
    """Return contexts in groups, each after the prefix that its members share; every context is in one group.

    >>> [group.prefix for group in share_contexts([(1, 2, 3, 4), (9,), (1, 2, 3, 5)])]
    [(1, 2, 3), ()]
    """
    groups: list[SharedContexts] = []
    alone: list[tuple[int, ...]] = []
    members: list[tuple[int, ...]] = []
    shared = 0

    def close() -> None:
        if len(members) > 1:
            groups.append(SharedContexts(members[0][:shared], tuple(members)))
        elif members and len(members[0]) >= LONG_CONTEXT:
            groups.append(SharedContexts(members[0][:-1], tuple(members)))
        else:
            alone.extend(members)

    for context in sorted(set(contexts)):
        if members:
            longest = max(len(members[-1]), len(context))
            common = min(shared, _num_common(members[-1], context), len(context) - 1)
            if common >= max(1.0, LEAST_SHARED * longest):
                members.append(context)
                shared = common
                continue
            close()
        members, shared = [context], len(context) - 1
    close()
    return groups + ([SharedContexts((), tuple(alone))] if alone else [])


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two contexts have in common at their start."""
    most = min(len(first), len(second))
    low, high = 0, most
    while low < high:  # by halves: comparing slices is fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low
