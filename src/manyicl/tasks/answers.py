"""What answers mean: those that name an option become its text, and labels that may be the same are found.

An answer can name an option by number, letter or label. Labels may be the same if they differ only in spelling, or if
a rare one is a common one with a mistyped letter.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Protocol

from manyicl.errors import list_some
from manyicl.tasks.faults import FaultLog, near_word, show
from manyicl.tasks.formats import data_suffix, read_list
from manyicl.tasks.rows import FileRows, Row, is_empty, tidy_answer

_BETWEEN = re.compile(r"[\s_\u2010-\u2015-]+")
# Invisible characters.
_UNSEEN = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
# Small letters of Cyrillic and Greek that look like Latin ones, then capitals.
_LOOKS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0455\u0458\u03bf\u03b1\u03bd\u03c1\u03b9"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7",
    "aeopcyxisjoavpiABEKMHOPCTYXABEZHIKMNOPTYX",
)
_SHORT = {"y": "yes", "n": "no", "t": "true", "f": "false"}
_PARTS = re.compile(r"[,;|/+]")
_WHOLE_NUMBER = re.compile(r"(-?[0-9]+)(?:\.0+)?")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
MOST_LABELS = 256
# A file without a family is classification if its answers are within these limits.
MOST_CLASSES = 64
LONGEST_CLASS = 50
_ROWS_PER_CLASS = 5
# If there are at most this many different answers per row, they are treated as labels in warnings.
_MOST_LABELS_PER_ROW = 0.5
# A label with at most this share of the rows of one that differs from it in one letter may be a slip of the pen.
_SLIP_SHARE = 0.1
_SHORTEST_SLIP = 4
_SHOWN_GROUPS = 3
# Returns the option of a row that an answer means, or None if it means none.
_Reading = Callable[[Row, str], str | None]


class Labelled(Protocol):
    """What labels are found from: rows of a file, and examples that are kept elsewhere."""

    @property
    def answer(self) -> str:
        """The right answer."""

    @property
    def options(self) -> tuple[str, ...]:
        """Its own candidate answers; () if it has none."""


def resolve_choices(
    files: Sequence[FileRows], *, answer_index: int | None, settings_name: str, log: FaultLog
) -> list[str]:
    """Replace each answer of a row with options by the text of its option, in place, and return notes about it.

    The meaning of answers is decided for the task as a whole. They are texts, unless some answer is not among its
    options and all answers are labels, numbers or letters of options. A row whose answer means none of its options is
    a fault.

    answer_index: the number of the first option, 0 or 1, if the task.json says that answers are numbers.
    """
    rows = [row for file in files for row in file.rows if row.options]
    if not rows and answer_index is not None and any(file.rows for file in files):
        fix = f"correct {settings_name}"
        log.add("answer_index without options", f'no row has options, but "answer_index" is set; {fix}')
    if not rows:
        return []
    name, reading = _find_reading(rows, answer_index)
    for file in files:
        kept = []
        for row in file.rows:
            answers = [reading(row, answer) for answer in (row.answer, *row.also_right)] if row.options else []
            if None in answers:
                what = partial(_describe_wrong, row, _are_numbers(rows), settings_name)
                log.add("answer not among its options", what, row=row.number, path=file.path)
                file.num_faulty += 1
                continue
            right = tuple(dict.fromkeys(answer for answer in answers if answer is not None))
            kept.append(replace(row, answer=right[0], also_right=right[1:]) if right else row)
        file.rows = kept
    return [f"answers are read as {name}"] if name else []


def resolve_lists(files: Sequence[FileRows], *, log: FaultLog) -> list[str]:
    """Replace answers of tables that are written as lists (["3", "three"]) by their members, in place; return notes.

    Only where all answers of a file are lists of texts: the first is trained, and all are right. An empty list is a
    fault.
    """
    notes = []
    for file in files:
        lists = _read_lists(file)
        if not lists or None in lists:
            continue
        kept = []
        for row, answers in zip(file.rows, lists, strict=True):
            right = tuple(dict.fromkeys(tidy_answer(answer) for answer in answers or () if not is_empty(answer)))
            if right:
                kept.append(replace(row, answer=right[0], also_right=right[1:]))
            else:
                what = f"answer {show(row.answer)} is empty; fill it in or remove the row"
                log.add("empty answer", what, row=row.number, path=file.path)
                file.num_faulty += 1
        file.rows = kept
        notes.append(f"{file.path.name}: answers are read as lists of right answers")
    return notes


def join_number_forms(files: Sequence[FileRows], *, family: str | None, labels: tuple[str, ...] | None) -> list[str]:
    """Write labels that are one whole number alike ("1.0" as "1"), in place, and return a note about it.

    pandas writes a column of 0 and 1 with a gap as 0.0 and 1.0, so that the files of one task can differ in it. Labels
    that the task.json lists are kept as it has them, and answers that are results, not labels, as they are.

    family, labels: those of the task.json; None if it leaves them open.
    """
    counts = Counter(row.answer for file in files for row in file.rows)
    forms = _find_number_forms(counts, listed=labels)
    if not forms:
        return []
    alike = [[_in_one_form(row, forms) for row in file.rows] for file in files]
    if not _are_labels([row for rows in alike for row in rows], family):
        return []
    for file, rows in zip(files, alike, strict=True):
        file.rows = rows
    told = [f"{show(form)} as {show(forms[form])} ({counts[form]:,})" for form in sorted(forms)]
    return [f"labels that are the same number are read alike: {list_some(told, most=_SHOWN_GROUPS, mark='; ')}"]


def _in_one_form(row: Row, forms: Mapping[str, str]) -> Row:
    also_right = tuple(forms.get(answer, answer) for answer in row.also_right)
    return replace(row, answer=forms.get(row.answer, row.answer), also_right=also_right)


def _find_number_forms(answers: Collection[str], *, listed: tuple[str, ...] | None) -> dict[str, str]:
    """Return answer -> the label that is the same whole number, written otherwise: one that is listed, or the shortest.

    >>> _find_number_forms(["0", "0.0", "1.50", "2.0"], listed=None)
    {'0.0': '0'}
    """
    known: dict[str, str] = {}
    for label in sorted(answers if listed is None else listed, key=len, reverse=True):
        if number := _WHOLE_NUMBER.fullmatch(label):
            known[number[1]] = label
    forms = {}
    for answer in answers:
        number = _WHOLE_NUMBER.fullmatch(answer)
        label = known.get(number[1], answer) if number else answer
        if label != answer and answer not in (listed or ()):
            forms[answer] = label
    return forms


def _are_labels(rows: Sequence[Row], family: str | None) -> bool:
    """Return whether the answers of rows without options of their own are a task's labels."""
    return not any(row.options for row in rows) and (family or guess_family(rows)) in ("classification", "nli")


def check_spellings(
    files: Sequence[FileRows], *, family: str | None, labels: tuple[str, ...] | None, settings_name: str, log: FaultLog
) -> None:
    """Take out rows whose label no train row has, but one that differs only in spelling: no answer could be right.

    Each is a fault. Where the rows have no splits, such a label is a rare slip, and `find_warnings` tells it. Labels
    that the task.json lists are meant as they are written.
    """
    rows = [row for file in files for row in file.rows]
    trained = {row.answer for row in rows if row.split == "train"}
    if labels is not None or not trained or not _are_labels(rows, family):
        return
    spelt = {_spelling(answer): answer for answer in sorted(trained, reverse=True)}
    wrong = {a: spelt[_spelling(a)] for a in {row.answer for row in rows} - trained if _spelling(a) in spelt}
    for file in files if wrong else ():
        for row in file.rows:
            if row.answer in wrong:
                seen = f"answer {show(row.answer)} is in no train row, but {show(wrong[row.answer])} is"
                what = f'{seen}; write them alike, or list both as "labels" in {settings_name} if they are two'
                log.add("label written otherwise than in train", what, row=row.number, path=file.path)
                file.num_faulty += 1
        file.rows = [row for row in file.rows if row.answer not in wrong]


def describe_lists(files: Sequence[FileRows]) -> list[str]:
    """Return a warning for each table in which some answers are lists of texts, but not all, after `resolve_lists`."""
    warnings = []
    for file in files:
        found = [row.answer for row, texts in zip(file.rows, _read_lists(file), strict=False) if texts]
        if found:
            what = f"{len(found):,} of {len(file.rows):,} answers of {file.path.name} are written as lists"
            warnings.append(
                f"{what}, such as {show(found[0])}; write all as lists to give several right answers, or none"
            )
    return warnings


def _read_lists(file: FileRows) -> list[list[str] | None]:
    """Return the texts of each answer of a table that is a list of texts, else None; [] if the file is not a table."""
    if not data_suffix(file.path).startswith((".csv", ".tsv")) or not any(r.answer.startswith("[") for r in file.rows):
        return []
    lists = [read_list(row.answer) for row in file.rows]
    return [
        [str(text) for text in texts] if texts is not None and all(type(text) is str for text in texts) else None
        for texts in lists
    ]


def _find_reading(rows: Sequence[Row], answer_index: int | None) -> tuple[str, _Reading]:
    if answer_index is not None:
        return f"numbers of options, counted from {answer_index}", partial(_by_number, answer_index)
    if all(row.answer in row.options for row in rows):
        return "", _by_text
    if all(row.answer in row.option_labels for row in rows):
        return "labels of options", _by_label
    if _are_numbers(rows):
        # Decided only if exactly one way of counting fits every row.
        possible = [n for n in (0, 1) if all(_by_number(n, row, row.answer) is not None for row in rows)]
        if len(possible) == 1:
            return f"numbers of options, counted from {possible[0]}", partial(_by_number, possible[0])
    if all(_by_letter(row, row.answer) is not None for row in rows):
        return "letters of options", _by_letter
    return "", _by_text


def _are_numbers(rows: Sequence[Row]) -> bool:
    return all(row.answer.isdecimal() and len(row.answer) < 5 for row in rows)


def _by_text(row: Row, answer: str) -> str | None:
    return answer if answer in row.options else None


def _by_label(row: Row, answer: str) -> str | None:
    return row.options[row.option_labels.index(answer)] if answer in row.option_labels else None


def _by_number(first: int, row: Row, answer: str) -> str | None:
    if not answer.isdecimal() or len(answer) > 4:
        return None
    place = int(answer) - first
    return row.options[place] if 0 <= place < len(row.options) else None


def _by_letter(row: Row, answer: str) -> str | None:
    place = ord(answer.upper()) - ord("A") if len(answer) == 1 and answer.isascii() and answer.isalpha() else -1
    return row.options[place] if 0 <= place < len(row.options) else None


def _describe_wrong(row: Row, are_numbers: bool, settings_name: str) -> str:
    what = f"answer {show(row.answer)} is not among its options"
    if are_numbers:
        example = '{"answer_index": 0}'
        return f"{what}; if it is an option's number, write {example} (counted from 0, or 1) into {settings_name}"
    return what + near_word(row.answer, row.options)


def guess_family(rows: Sequence[Row]) -> str:
    """Return the family of a task that names none: classification or qa."""
    answers = {row.answer for row in rows}
    are_classes = (
        len(answers) <= MOST_CLASSES
        and len(answers) * _ROWS_PER_CLASS <= len(rows)
        and all(len(answer) <= LONGEST_CLASS and "\n" not in answer for answer in answers)
    )
    return "classification" if are_classes or any(row.options for row in rows) else "qa"


def find_labels(rows: Sequence[Labelled]) -> tuple[str, ...]:
    """Return the answers that are possible in all rows, sorted; () if rows differ in them, or if they are too many."""
    option_sets = {frozenset(row.options) for row in rows}
    if len(option_sets) > 1:  # multiple choice
        return ()
    labels = option_sets.pop() or {row.answer for row in rows}
    return tuple(sorted(labels)) if len(labels) <= MOST_LABELS else ()


def find_lookalikes(counts: Mapping[str, int]) -> list[list[str]]:
    """Return the groups of answers that differ only in spelling, most frequent first within each group.

    Spelling means case, blanks, hyphens and underscores, compatibility forms of characters (NFKC), letters of other
    scripts that look alike, "y" for "yes", invisible characters, outer quotes, a full stop or exclamation mark at the
    end, HTML entities ("&amp;"), forms of a number (1, 1.0, 01; 1,000), and the order of parts separated by a comma,
    semicolon, bar, slash or plus. A rare answer is also put to one that is ten times as frequent and differs by one
    letter that is missing, added or another, or by two that changed places. counts: answer -> number of rows.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for answer in counts:
        groups.setdefault(_spelling(answer), []).append(answer)
    _join_slips(groups, counts)
    return [sorted(group, key=lambda a: (-counts[a], a)) for group in groups.values() if len(group) > 1]


def _join_slips(groups: dict[tuple[str, ...], list[str]], counts: Mapping[str, int]) -> None:
    """Move the answers of each rare group to the common group of which they are a mistyped form."""
    if len(groups) > MOST_LABELS:
        return  # these are no labels, and too many to compare each with each
    sizes = {spelling: sum(counts[answer] for answer in group) for spelling, group in groups.items()}
    for rare in sorted(groups, key=lambda spelling: (sizes[spelling], spelling)):
        larger = (key for key in groups if sizes[rare] <= _SLIP_SHARE * sizes[key])
        found = (key for key in larger if _is_slip(" ".join(rare), " ".join(key)))
        common = max(found, key=sizes.__getitem__, default=None)
        if common is not None:
            groups[common] += groups.pop(rare)


def _is_slip(rare: str, common: str) -> bool:
    """Return whether two texts differ by one slip of the pen in a letter; digits and signs make another text.

    >>> [_is_slip(word, "shipping") for word in ("shiping", "shippnig", "shopping", "skipping it")]
    [True, True, True, False]
    >>> _is_slip("level 1", "level 2")
    False
    """
    if min(len(rare), len(common)) < _SHORTEST_SLIP:
        return False
    start = _count_common(rare, common)
    rare, common = rare[start:], common[start:]
    end = _count_common(rare[::-1], common[::-1])
    rare, common = rare[: len(rare) - end], common[: len(common) - end]
    has_changed_places = len(rare) == 2 and rare == common[::-1]
    return (rare + common).isalpha() and (max(len(rare), len(common)) == 1 or has_changed_places)


def _count_common(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def describe_lookalikes(counts: Mapping[str, int], *, of: Collection[str] | None = None) -> str:
    """Return a warning with counts if some answers may be the same, else "".

    counts: answer -> number of rows. of: only answers that may be the same as one of these; default: all.
    """
    groups = [group for group in find_lookalikes(counts) if of is None or not set(of).isdisjoint(group)]
    if not groups:
        return ""
    shown = groups[:_SHOWN_GROUPS]
    first = "; ".join(", ".join(f"{show(answer)} {counts[answer]:,}" for answer in group[:4]) for group in shown)
    others = len(groups) - len(shown)
    more = f" (and {others:,} more {'group' if others == 1 else 'groups'})" if others else ""
    return f"answers that may be the same: {first}{more}; if they are, write them alike"


def find_warnings(
    rows: Sequence[Row], family: str, *, labels: tuple[str, ...], has_choices: bool, settings_name: str
) -> list[str]:
    """Return warnings about answers: different spellings, and answers that look like labels but are generated."""
    counts = Counter(row.answer for row in rows)
    are_labels = family in ("classification", "nli") or (
        family == "qa"
        and len(counts) <= _MOST_LABELS_PER_ROW * len(rows)
        and all(len(answer) <= LONGEST_CLASS for answer in counts)
    )
    if not are_labels or (has_choices and not labels):  # each row has its own options, so answers are not labels
        return []
    lookalikes = describe_lookalikes(counts)
    warnings = [lookalikes] if lookalikes else []
    # Too many for classes, or too few rows of each to tell. Numbers are rather results than labels.
    is_open = (
        family == "qa"
        and not all(map(_is_number, counts))
        and not 2 <= len(counts) <= min(MOST_CLASSES, len(rows) // _ROWS_PER_CLASS)
    )
    if not has_choices and len(counts) > 1 and (len(counts) > MOST_LABELS or is_open):
        as_class = f'write {{"family": "classification"}} into {settings_name}'
        fix = f'list them as "labels" in {settings_name}' if len(counts) > MOST_LABELS else as_class
        warnings.append(f"{len(counts):,} different answers: they are generated; to choose among them instead, {fix}")
    return warnings


def _spelling(answer: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", html.unescape(answer))).translate(_QUOTES)
    text = text.translate(_LOOKS).casefold().strip().rstrip(".!").strip("\"'") or text
    text = _SHORT.get(text, text)
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
