"""Mathematical answers compared by value: numbers, fractions, percent, tuples, intervals, sets; else by their text.

The answer of a text is what follows its last `####` (GSM8K's mark), else what its last `\\boxed{}` holds (MATH's), else
the last value in it. LaTeX is read as far as single values need it; algebra is not done: `x + 1` is the text `x+1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Context, Decimal

# The thread's own decimal context must not decide whether two answers are equal.
_DECIMALS = Context(prec=60)
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
# A hyphen is a sign only if it does not join two things: "5-3" ends in 3, "= -3" in -3.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).}])[-\u2212])?[$\u20ac\u00a3]?(?P<inner_sign>(?<=[$\u20ac\u00a3])[-\u2212])?"
    rf"(?:(?P<whole>[0-9]+)?\\frac\{{(?P<top_sign>-)?(?P<top>{_PLAIN})\}}\{{(?P<bottom>{_PLAIN})\}}"
    rf"|(?P<number>{_PLAIN})(?:/(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
    r"(?:\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\^\{?(?P<power>-?[0-9]{1,3})\}?)?)"
    r"(?P<percent>\s*%)?"
)
_INSIDE = re.compile(r"(?:\^|_|\\sqrt(?:\[[0-9]+\])?)\{?-?$")  # before a number that is a part of something else
_BRACKETS = re.compile(r"(\\\{|[(\[])([^()\[\]]*?,[^()\[\]]*?)(\\\}|[)\]])")
# LaTeX that changes how a value looks, not which it is.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\(?:left|right|bigl?|bigr?|displaystyle)(?![a-z])|\\[!,;: ]|~|\\q?quad", ""),
        (r"\\(?:text|mathrm|mbox|textbf|mathbf|textit)\s*\{([^{}]*)\}", r"\1"),
        (r"\\([%$])", r"\1"),
        (r"\{,\}", ","),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\u00b0", ""),
        (r"\\[()\[\]]", " "),
    )
)


@dataclass(frozen=True, slots=True)
class _Number:
    value: Decimal
    is_percent: bool


@dataclass(frozen=True, slots=True)
class _Group:
    """A tuple, an interval, a set in braces, or solutions without brackets ("", "")."""

    brackets: str
    items: tuple[_Number | str, ...]


_Value = _Number | _Group


def is_same_answer(prediction: str, *, answer: str) -> bool:
    """Return whether `prediction` arrives at the value of `answer`, or at its very text if it has none."""
    wanted, given = _final_part(answer), _final_part(prediction)
    value = _parse(wanted)
    if value is None and _is_prose(wanted):
        value = final_value(answer)
    if value is None:
        texts = {_squeeze(given), _squeeze(re.split(r"=|:|\bis\b", given)[-1])}
        return bool(_squeeze(wanted)) and _squeeze(wanted) in texts
    found = _parse(given)
    if isinstance(value, _Group):
        groups = [found] if isinstance(found, _Group) else [v for v in _values(given) if isinstance(v, _Group)]
        return bool(groups) and _is_same(groups[-1], value)
    found = found if isinstance(found, _Number) else final_value(prediction)
    return found is not None and _is_same(found, value)


def final_value(text: str) -> _Value | None:
    """Return the value that a text arrives at: the first after a mark, else the last."""
    part, is_marked = _final_part(text), "####" in text
    values = list(_values(part))
    if not values:
        return None
    return values[0] if is_marked else values[-1]


def _final_part(text: str) -> str:
    """Return the answer's part of a text, with LaTeX that only changes its looks taken out."""
    _, mark, marked = text.rpartition("####")
    if mark:
        text = marked
    elif r"\boxed{" in text:
        start = text.rindex(r"\boxed{") + len(r"\boxed{")
        depth, stop = 1, start
        while stop < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[stop], 0)
            stop += 1
        text = text[start : stop - 1] if not depth else text[start:]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    # Dollar signs on both sides are LaTeX's, before a number only they are a currency's.
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text


def _values(text: str) -> Iterator[_Value | None]:
    """Yield the values of a text in their order; None is a division by zero."""
    place = 0
    while place < len(text):
        group = _group_at(text, place)
        if group is not None:
            yield group[0]
            place = group[1]
            continue
        match = _NUMBER.match(text, place)
        if match is None:
            place += 1
            continue
        place = match.end()
        if not _INSIDE.search(text, 0, match.start()):
            yield _read_number(match)


def _parse(text: str) -> _Value | None:
    """Return the value that the whole of a text is, None if it is none or more than one."""
    text = text.rstrip(".").strip()
    text = re.sub(r"^[A-Za-z]\s*(?:=|\\in)\s*", "", text)  # x = 5
    number = _NUMBER.fullmatch(text)
    if number is not None:
        return _read_number(number)
    group = _group_at(text, 0)
    if group is not None and group[1] == len(text):
        return group[0]
    parts = re.split(r",\s*|\s+(?:and|or)\s+", text)
    numbers = [_NUMBER.fullmatch(part.strip()) for part in parts]
    if len(parts) > 1 and all(numbers):
        items = [_read_number(match) for match in numbers if match]
        return _Group("", tuple(item for item in items if item))
    return None


def _group_at(text: str, place: int) -> tuple[_Group, int] | None:
    """Return the tuple, interval or set that begins at a place, and where it ends."""
    match = _BRACKETS.match(text, place)
    if match is None or (match[1] == r"\{") != (match[3] == r"\}"):
        return None
    if re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", match[2]) and match[1] + match[3] == "()" and place:
        return None  # a number in brackets, in the middle of a sentence
    items: list[_Number | str] = []
    for part in match[2].split(","):
        number = _NUMBER.fullmatch(part.strip())
        item = _read_number(number) if number else _squeeze(part).replace("+\\infty", "\\infty")
        if not item or (isinstance(item, str) and re.search(r"[A-Za-z]{2,}", item.replace("\\infty", ""))):
            return None  # words in brackets
        items.append(item)
    return _Group(match[1] + match[3], tuple(items)), match.end()


def _read_number(match: re.Match[str]) -> _Number | None:
    if match["number"] is not None:
        value: Decimal | None = Decimal(match["number"].replace(",", ""))
        if match["divisor"] is not None:
            value = _divide(value, Decimal(match["divisor"]))
        if value is not None and match["power"]:
            value = value.scaleb(int(match["power"]), context=_DECIMALS)
    else:
        value = _divide(Decimal(match["top"].replace(",", "")), Decimal(match["bottom"].replace(",", "")))
        if value is not None:
            value = value.copy_negate() if match["top_sign"] else value
            value = _DECIMALS.add(Decimal(match["whole"] or 0), value)
    if value is None:
        return None
    if match["sign"] or match["inner_sign"]:
        value = value.copy_negate()
    return _Number(value, is_percent=match["percent"] is not None)


def _divide(top: Decimal | None, bottom: Decimal) -> Decimal | None:
    return _DECIMALS.divide(top, bottom) if top is not None and bottom else None


def _is_same(given: _Value | str, wanted: _Value | str) -> bool:
    """Return whether two values are equal; 50% is 50, as graders have it, and 0.5."""
    if isinstance(given, _Number) and isinstance(wanted, _Number):
        if given.is_percent == wanted.is_percent or given.value == wanted.value:
            return given.value == wanted.value
        percent, other = (given, wanted) if given.is_percent else (wanted, given)
        return _DECIMALS.divide(percent.value, Decimal(100)) == other.value
    if not isinstance(given, _Group) or not isinstance(wanted, _Group):
        return given == wanted
    if given.brackets != wanted.brackets or len(given.items) != len(wanted.items):
        return False
    if wanted.brackets in ("", r"\{\}"):  # solutions and sets have no order
        rest = list(given.items)
        for item in wanted.items:
            place = next((n for n, one in enumerate(rest) if _is_same(one, item)), None)
            if place is None:
                return False
            del rest[place]
        return True
    return all(map(_is_same, given.items, wanted.items))


def _is_prose(text: str) -> bool:
    """Return whether a number stands among words, as in an answer with its reasoning."""
    words = re.sub(r"\\[A-Za-z]+", " ", text)
    return bool(re.search(r"[0-9]", words) and re.search(r"[A-Za-z]{2,}", words))


def _squeeze(text: str) -> str:
    """Return a text without white space, dollar signs and the full stop at its end."""
    return re.sub(r"[\s$]", "", text).rstrip(".")
