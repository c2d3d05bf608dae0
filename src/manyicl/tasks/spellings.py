"""Labels that may be the same: they differ only in case, blanks, hyphens, Unicode form, or the order of parts."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from manyicl.tasks.faults import show

_BETWEEN = re.compile(r"[\s_\u2010-\u2015-]+")
# Invisible characters.
_UNSEEN = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
_PARTS = re.compile(r"[,;|/+]")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def find_lookalikes(counts: Mapping[str, int]) -> list[list[str]]:
    """Return the groups of answers that differ only in spelling, most frequent first within each group.

    Spelling means case, blanks, hyphens and underscores, compatibility forms of characters (NFKC), invisible
    characters, outer quotes, a full stop or exclamation mark at the end, HTML entities ("&amp;"), forms of a number
    (1, 1.0, 01; 1,000), and the order of parts separated by a comma, semicolon, bar, slash or plus. counts: answer ->
    number of rows.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for answer in counts:
        groups.setdefault(_spelling(answer), []).append(answer)
    return [sorted(group, key=lambda a: (-counts[a], a)) for group in groups.values() if len(group) > 1]


def describe_lookalikes(answers: Sequence[str]) -> str:
    """Return a warning with counts if some answers may be the same, else ""."""
    counts = Counter(answers)
    groups = find_lookalikes(counts)
    if not groups:
        return ""
    first = ", ".join(f"{show(answer)} {counts[answer]:,}" for answer in groups[0][:4])
    others = len(groups) - 1
    more = f" (and {others:,} more {'group' if others == 1 else 'groups'})" if others else ""
    return f"answers that may be the same: {first}{more}; if they are, write them alike"


def _spelling(answer: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", html.unescape(answer))).translate(_QUOTES)
    text = text.casefold().strip().rstrip(".!").strip("\"'") or text
    if _PLAIN_NUMBER.fullmatch(text):
        value = text.replace(",", "")
        whole, _, rest = value.lstrip("+").partition(".")
        sign = "-" if whole.startswith("-") else ""
        return (f"{sign}{whole.removeprefix('-').lstrip('0') or '0'}.{rest.rstrip('0')}".rstrip("."),)
    # A sign is not a hyphen: "-5" and "5" are two answers. So are "+" and "-", which are nothing but separators here.
    parts = [_BETWEEN.sub(" ", part.strip()) if not _is_number(part) else part.strip() for part in _PARTS.split(text)]
    return tuple(sorted(parts)) if any(part.strip() for part in parts) and not _is_number(text) else (text,)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+\u2212]?[\d.,/:% -]+\s*", text) is not None
