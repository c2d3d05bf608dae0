"""Where a row's input, answer, split and options stand in a record: names, paths into nested values, joined columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

COLUMNS = ("input", "answer", "split", "options", "option_labels")
MISSING = object()
# A key of a record, and the rest of a path inside its value; None if the record has no such key.
_Place = tuple[str, tuple[str, ...]] | None
_Plan = dict[str, list[_Place]]
# More different sets of keys than this in one file are not remembered, so that memory stays bounded.
_MOST_REMEMBERED = 1000


class Columns:
    """Finds our columns in the records of one file.

    mapped: our names (`COLUMNS`) to the file's own, if they differ: a name, a path ("answers.text.0", where a number
    counts from 0, or from the end if it is negative), or a list of these. A name is found in other capitals and with
    blanks around it, too, unless two would do.
    """

    def __init__(self, mapped: Mapping[str, str | Sequence[str]]) -> None:
        self.mapped = mapped
        self.paths: dict[str, tuple[str, ...]] = {}
        for name in COLUMNS:
            own = mapped.get(name, name)
            self.paths[name] = (own,) if isinstance(own, str) else tuple(own)
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._seen: set[str] = set()

    def is_joined(self, name: str) -> bool:
        """Return whether a list of the file's columns was given for `name`."""
        return not isinstance(self.mapped.get(name, name), str)

    def reads(self, own: str) -> bool:
        """Return whether a column of the file is one that we read."""
        folded = _fold(own)
        return any(folded in (_fold(path), _fold(path.split(".")[0])) for path in self._all_paths())

    def missing_from(self, names: Iterable[str]) -> list[str]:
        """Return which of "input" and "answer" a file with these columns does not have."""
        known = tuple(names)
        return [
            name for name in ("input", "answer") if all(_find_place(path, known) is None for path in self.paths[name])
        ]

    def find(self, record: Mapping[str, object]) -> dict[str, list[object]]:
        """Return, for each of our names, one value per column that it stands for; MISSING if that is not there."""
        plan = self._resolve(tuple(record))
        return {
            name: [
                MISSING if place is None else _walk(record[place[0]], place[1]) if place[1] else record[place[0]]
                for place in places
            ]
            for name, places in plan.items()
        }

    def note_names(self, names: Iterable[str]) -> None:
        """Remember which columns a file has, for `unread`."""
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen.update(names)

    def unread(self) -> list[str]:
        """Return the columns that a file has and nobody reads, sorted."""
        return sorted(name for name in self._seen if name.strip() and not self.reads(name))

    def has(self, name: str) -> bool:
        """Return whether any record had one of the columns of `name`."""
        seen = tuple(self._seen)
        return any(_find_place(path, seen) is not None for path in self.paths[name])

    def _all_paths(self) -> list[str]:
        return [path for paths in self.paths.values() for path in paths]

    def _resolve(self, names: tuple[str, ...]) -> _Plan:
        """Return where the columns of each name stand in records with these keys."""
        plan = self._plans.get(names)
        if plan is None:
            plan = {name: [_find_place(path, names) for path in paths] for name, paths in self.paths.items()}
            self.note_names(names)
            if len(self._plans) < _MOST_REMEMBERED:
                self._plans[names] = plan
        return plan


def _fold(name: str) -> str:
    return name.strip().casefold()


def _find_key(name: str, names: tuple[str, ...]) -> str | None:
    """Return the key that is `name`, or the only one that differs in capitals and outer blanks alone."""
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
    """Return what stands at a path inside a value; in a list, a name is taken from every member."""
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


def nested_paths(name: str, value: object) -> list[str]:
    """Return the paths below a column that hold texts, for a message: {"text": ["3"]} gives ["answers.text"]."""
    if isinstance(value, str):
        return [name]
    if isinstance(value, list | tuple) and value:
        if all(isinstance(member, str) for member in value):
            return [name]
        return nested_paths(f"{name}.-1", value[-1]) if isinstance(value[-1], Mapping) else []
    if isinstance(value, Mapping):
        return [path for key, inner in value.items() for path in nested_paths(f"{name}.{key}", inner)]
    return []
