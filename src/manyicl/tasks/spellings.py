"""Labels that may be one: other capitals, blanks, hyphens or Unicode forms, or several labels in another order."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from manyicl.tasks.faults import show

_BETWEEN = re.compile(r"[\s_\u2010-\u2015-]+")
# Marks that are not seen, and forms of one: curly quotes, soft hyphens, "&amp;".
_UNSEEN = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
_PARTS = re.compile(r"[,;|/+]")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def find_lookalikes(counts: Mapping[str, int]) -> list[list[str]]:
    """Return the groups of answers that differ in spelling alone, each commonest first.

    counts: answer -> rows. Spelling is capitals, blanks, hyphens and underscores, compatibility forms of characters
    (NFKC), characters that are not seen, quotes around, a full stop or exclamation mark at the end, "&amp;", how a
    number is written (1, 1.0, 01; 1,000), and the order of parts separated by a comma, semicolon, bar, slash or plus.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for answer in counts:
        groups.setdefault(_spelling(answer), []).append(answer)
    return [sorted(group, key=lambda a: (-counts[a], a)) for group in groups.values() if len(group) > 1]


def tell_lookalikes(answers: Sequence[str]) -> str:
    """Return a warning with counts if some answers may be one, "" if none may."""
    counts = Counter(answers)
    groups = find_lookalikes(counts)
    if not groups:
        return ""
    first = ", ".join(f"{show(answer)} {counts[answer]:,}" for answer in groups[0][:4])
    others = len(groups) - 1
    more = f" (and {others:,} more {'group' if others == 1 else 'groups'})" if others else ""
    return f"answers that may be one: {first}{more}; write them alike if they are"


def _spelling(answer: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", html.unescape(answer))).translate(_QUOTES)
    text = text.casefold().strip().rstrip(".!").strip("\"'") or text
    if _PLAIN_NUMBER.fullmatch(text):
        value = text.replace(",", "")
        whole, _, rest = value.lstrip("+").partition(".")
        sign = "-" if whole.startswith("-") else ""
        return (f"{sign}{whole.removeprefix('-').lstrip('0') or '0'}.{rest.rstrip('0')}".rstrip("."),)
    # A sign is not a hyphen: "-5" and "5" are two answers; so are "+" and "-", of which nothing else would be left.
    parts = [_BETWEEN.sub(" ", part.strip()) if not _is_number(part) else part.strip() for part in _PARTS.split(text)]
    return tuple(sorted(parts)) if any(part.strip() for part in parts) and not _is_number(text) else (text,)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+\u2212]?[\d.,/:% -]+\s*", text) is not None
