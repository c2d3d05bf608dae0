"""Finds a row's input, answer, split and options in a record: by name, by a path into nested values, or joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

# A column or path in a template, {premise}; and a brace that stands for itself, written twice.
from manyicl.errors import list_some

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
COLUMNS = ("input", "answer", "split", "options", "option_labels", "embedding")
MISSING = object()
# A key of a record, and the rest of the path inside its value; None if the record has no such key.
_Place = tuple[str, tuple[str, ...]] | None
_Places = dict[str, list[_Place]]
# Sets of keys remembered per file, at most: a file may have new keys in every record, and memory must stay bounded.
_MOST_REMEMBERED = 1000


class Columns:
    """Finds our columns in the records of one file.

    mapped: our names (`COLUMNS`) -> the file's, if they differ: a name, a path, a list of these, or a template of them
    such as "{premise} Therefore: {hypothesis}". In a path such as "answers.text.0" a number is an index into a list,
    from 0, or from the end if negative. A name also matches one that differs only in case and outer blanks, if there is
    just one such name.
    """

    def __init__(self, mapped: Mapping[str, str | Sequence[str]]) -> None:
        self.mapped = mapped
        self.paths: dict[str, tuple[str, ...]] = {}
        self._templates: set[str] = set()
        # A column called "embedding" may be anything: it is read only if the task.json names it.
        for name in COLUMNS if "embedding" in mapped else COLUMNS[:-1]:
            own = mapped.get(name, name)
            fields = template_fields(own) if isinstance(own, str) else ()
            self.paths[name] = fields or ((own,) if isinstance(own, str) else tuple(own))
            if fields:
                self._templates.add(name)
        self._known_places: dict[tuple[str, ...], _Places] = {}
        # Mapped columns that a row may lack, as (our name, index of its path), until a row has them.
        self._unseen = {
            (name, place)
            for name in mapped
            for place in range(len(self.paths[name]))
            if name not in ("input", "answer") or self.is_joined(name)
        }
        self._seen: set[str] = set()

    def is_joined(self, name: str) -> bool:
        """Return whether `name` is mapped to a list of the file's columns, or to a template of them."""
        return not isinstance(self.mapped.get(name, name), str) or self.is_template(name)

    def is_template(self, name: str) -> bool:
        """Return whether `name` is mapped to a template."""
        return name in self._templates

    def fill(self, name: str, texts: Sequence[str], *, template: str | None = None) -> str:
        """Return the template of `name` with the texts of its fields, which are as many as its paths.

        template: another one, of the same fields.
        """
        filling = dict(zip(self.paths[name], texts, strict=True))
        template = str(self.mapped[name]) if template is None else template
        # A brace that is written twice stands for one.
        return _FIELD.sub(lambda found: found[0][0] if found[1] is None else filling[found[1]], template)

    def reads(self, own: str) -> bool:
        """Return whether we read the file's column `own`."""
        folded = _fold(own)
        return any(folded in (_fold(path), _fold(path.split(".")[0])) for path in self._all_paths())

    def missing_from(self, names: Iterable[str]) -> list[str]:
        """Return which of "input" and "answer" is not among a file's columns `names`."""
        known = tuple(names)
        return [
            name for name in ("input", "answer") if all(_find_place(path, known) is None for path in self.paths[name])
        ]

    def find(self, record: Mapping[str, object]) -> dict[str, list[object]]:
        """Return for each of our names the value of each column that it is mapped to; MISSING if there is none."""
        places_by_name = self._resolve(tuple(record))
        found = {
            name: [
                MISSING if place is None else _walk(record[place[0]], place[1]) if place[1] else record[place[0]]
                for place in places
            ]
            for name, places in places_by_name.items()
        }
        if self._unseen:
            self._unseen = {(name, place) for name, place in self._unseen if found[name][place] is MISSING}
        return found

    def never_found(self) -> list[tuple[str, str]]:
        """Return (our name, column or path) of each mapped column that no row has, if it is optional or joined."""
        return [(name, self.paths[name][place]) for name, place in sorted(self._unseen)]

    def note_names(self, names: Iterable[str]) -> None:
        """Remember columns of the file, for `unread` and `has`."""
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen.update(names)

    def unread(self) -> list[str]:
        """Return the file's columns that are not read, sorted."""
        names = tuple(self._seen)
        read = {place[0] for path in self._all_paths() if (place := _find_place(path, names)) is not None}
        return sorted(name for name in names if name.strip() and name not in read and not self._alone_reads(name))

    def has(self, name: str) -> bool:
        """Return whether the file has a column of `name`."""
        seen = tuple(self._seen)
        return any(_find_place(path, seen) is not None for path in self.paths[name])

    def _alone_reads(self, own: str) -> bool:
        """Return whether column `own` is read in rows that have no other column of nearly the same name."""
        return any(self._near_paths(own, names) for names in self._known_places if own in names)

    def _near_paths(self, own: str, names: tuple[str, ...]) -> list[str]:
        places = {path: _find_place(path, names) for path in self._all_paths()}
        return [path for path, place in places.items() if place is not None and place[0] == own]

    def _all_paths(self) -> list[str]:
        return [path for paths in self.paths.values() for path in paths]

    def _resolve(self, names: tuple[str, ...]) -> _Places:
        """Return the places of our columns in records with these keys."""
        places = self._known_places.get(names)
        if places is None:
            places = {name: [_find_place(path, names) for path in paths] for name, paths in self.paths.items()}
            self.note_names(names)
            if len(self._known_places) < _MOST_REMEMBERED:
                self._known_places[names] = places
        return places


def template_fields(text: str) -> tuple[str, ...]:
    """Return the columns and paths in a template, each once, in order; () if the text is no template.

    >>> template_fields("{premise} Therefore: {hypothesis.text}"), template_fields("text")
    (('premise', 'hypothesis.text'), ())
    """
    return tuple(dict.fromkeys(found[1] for found in _FIELD.finditer(text) if found[1] is not None))


def _fold(name: str) -> str:
    return name.strip().casefold()


def _find_key(name: str, names: tuple[str, ...]) -> str | None:
    """Return the key equal to `name`, or the only one that differs just in case and outer blanks."""
    if name in names:
        return name
    near = [key for key in names if _fold(key) == _fold(name)]
    return near[0] if len(near) == 1 else None


def _find_place(path: str, names: tuple[str, ...]) -> _Place:
    if (key := _find_key(path, names)) is not None:
        return key, ()
    root, *rest = path.split(".")
    if rest and (key := _find_key(root, names)) is not None:
        return key, tuple(rest)
    return None


def _walk(value: object, path: tuple[str, ...]) -> object:
    """Return the value at a path inside `value`; a name applied to a list is looked up in every member."""
    for place, part in enumerate(path):
        if isinstance(value, Mapping):
            if part not in value:
                return MISSING
            value = value[part]
        elif isinstance(value, list | tuple):
            if not part.removeprefix("-").isdecimal():
                found = [_walk(member, path[place:]) for member in value]
                return MISSING if MISSING in found else found
            number = int(part) if len(part) < 10 else len(value)
            if not -len(value) <= number < len(value):
                return MISSING
            value = value[number]
        else:
            return value if value is None else MISSING
    return value


def describe_missing(path: str, record: Mapping[str, object]) -> str:
    """Return the part of a path that a record lacks, if it has the root: "'meta' has no 'label' (it has 'text')".

    "" if the record has the whole path, or not even its root.
    """
    place = _find_place(path, tuple(record))
    if place is None:
        return ""
    value, there = record[place[0]], place[0]
    for part in place[1]:
        inner = _walk(value, (part,))
        if inner is MISSING:
            has = list_some(map(repr, value), most=8) if isinstance(value, Mapping) else ""
            has = f"a list of {len(value)}" if isinstance(value, list | tuple) else has or "nothing to look in"
            return f"{there!r} has no {part!r} ({'it is' if isinstance(value, list | tuple) else 'it has'} {has})"
        value, there = inner, f"{there}.{part}"
    return ""


def nested_paths(name: str, value: object) -> list[str]:
    """Return the paths below a column that lead to texts, for a message: for {"text": ["3"]}, ["answers.text"]."""
    if isinstance(value, str):
        return [name]
    if isinstance(value, list | tuple) and value:
        if all(isinstance(member, str) for member in value):
            return [name]
        return nested_paths(f"{name}.-1", value[-1]) if isinstance(value[-1], Mapping) else []
    if isinstance(value, Mapping):
        return [path for key, inner in value.items() for path in nested_paths(f"{name}.{key}", inner)]
    return []
