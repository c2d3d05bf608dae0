"""Finds the tasks in a folder of data files: which files form a task, which splits they are, and what is not read.

A data file is a task, unless it is named after a split: train, validation (valid, val, dev) or test. Such a name may
have a task's name before it (`desk_train.csv`) and a shard's number after it (`train-00000-of-00002.parquet`). Files
with the same name before the split, or with none, form one task with these splits; its name is that name, or their
folder's. So do the files in folders named after splits, and files whose names differ only in these words
(`train_en.csv` and `test_en.csv`). A file that is not for training by its name, but whose task is unclear, is refused:
as a task of its own, its rows would be trained on. A folder inside the folder is a task if it holds such files of a
single task.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from manyicl.errors import UserError
from manyicl.tasks.faults import near_word
from manyicl.tasks.formats import SPLIT_WORDS, SUFFIXES, data_suffix
from manyicl.tasks.readers import has_split_column, holds_rows

_SPLIT_NAME = re.compile(
    rf"(?:(?P<prefix>.+?)[-_. ])?(?P<word>{'|'.join(SPLIT_WORDS)})"
    r"(?P<shard>[-_](?:\d{1,5}-of-\d{1,5}|\d{4,5})(?:-[0-9a-f]{16})?)?",
    re.IGNORECASE,
)
_SHARD_NAME = re.compile(r"(?P<prefix>.+?)[-_](?P<number>\d{1,5})-of-(?P<count>\d{1,5})(?:-[0-9a-f]{16})?")
# Names that Spark and similar programs write, or people for parts of a whole; they do not contain a task's name.
_PART_NAME = re.compile(r"part-\d{3,6}(?:-[\w.-]+)?|(?:part|fold|chunk|batch|shard)[-_ ]?\d{1,6}", re.IGNORECASE)
# Words for splits anywhere in a name, longest first; they count only if another name differs in nothing else.
_ANY_WORD = re.compile("|".join(sorted((*SPLIT_WORDS, "trn", "tst"), key=len, reverse=True)), re.IGNORECASE)
# Rests of such a name that are not a task's name: train_set, testdata, "train (1)".
_NO_NAME = re.compile(r"(?:set|data|file|split|final|csv|tsv|jsonl?|\d*)", re.IGNORECASE)
_MARKS = "-_. ()"
# Files that often accompany data: they are ignored without a note.
_DOCUMENTS = re.compile(
    r"(readme|license|licence|notice|citation|index|changelog|croissant|_success|_committed|_started).*|.*\.(md|rst|bib|cff)",
    re.I,
)
_DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"})
_SETTINGS = "task.json"
# What makes a file readable that is not read, by the end of its name.
_FIXES = {
    (".xlsx",): " (give manyicl import the file itself)",
    (".xls", ".ods"): " (save it as CSV UTF-8)",
    (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".7z", ".rar", ".bz2", ".xz", ".zst"): " (unpack it)",
    (".ndjson", ".jsonlines", ".jl"): " (rename it to .jsonl)",
    (".arrow", ".feather", ".pkl", ".pickle", ".sqlite"): " (save it as Parquet or CSV)",
}
# Words for rows that are not trained on, which may mean validation or test.
_UNCLEAR = frozenset({"eval", "evaluation", "holdout", "heldout", "validate", "unseen"})
# Such a word, or one for a split, as a whole word.
_LONE_WORD = re.compile(
    rf"(?<![a-z])(?:{'|'.join(sorted(SPLIT_WORDS | dict.fromkeys(_UNCLEAR)))})(?:set|data)?(?![a-z])", re.IGNORECASE
)
# Folders and what was left unread in them, so that each is logged once.
_logged: set[tuple[str, tuple[str, ...]]] = set()


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one task."""

    path: Path
    """Its data file, or the folder of its files if they are splits or shards."""
    stem: str
    """Its name if its task.json does not give another."""
    files: tuple[tuple[Path, str], ...]
    """Each file with the split in its name, or ""."""
    settings_path: Path
    """Its task.json, which may not exist."""


@dataclass(slots=True)
class Layout:
    """The content of a folder of tasks."""

    folder: Path
    sources: list[Source] = field(default_factory=list)
    """The files of each task, sorted by the task's name."""
    left_out: list[str] = field(default_factory=list)
    """Files and folders that are not read, each with the reason if it is not obvious."""

    def log_left_out(self) -> None:
        """Log in one line what is not read: once per folder, and only on rank 0 of a launch."""
        key = (str(self.folder.resolve()), tuple(self.left_out))
        if self.left_out and key not in _logged and os.environ.get("RANK", "0") == "0":
            _logged.add(key)
            logging.getLogger("manyicl").warning("%s: not read: %s", self.folder, ", ".join(self.left_out))


@dataclass(slots=True)
class _Contents:
    """The entries of one folder, by kind."""

    data: list[Path] = field(default_factory=list)
    """Data files."""
    settings: list[Path] = field(default_factory=list)
    """Files task.json and NAME.task.json."""
    split_folders: list[Path] = field(default_factory=list)
    """Folders named after a split."""
    folders: list[Path] = field(default_factory=list)
    """All other folders."""
    left_out: list[str] = field(default_factory=list)
    """Other files that are worth a note, each with the reason if it is not obvious."""


def source_of(path: Path) -> Source:
    """Return the source of a task of one data file.

    Raises:
        UserError: the file does not exist, or is not a data file.
    """
    if not data_suffix(path):
        is_imported = path.suffix.lower() in (".xlsx", ".yaml", ".yml")
        fix = "; manyicl import makes a task of it" if is_imported else _fix_of(path)
        raise UserError(f"{path}: cannot read '{path.suffix}' files; known: {', '.join(SUFFIXES)}{fix}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _single(path)


def find_layout(folder: str | Path) -> Layout:
    """Return the tasks' sources in a folder, and what is not read in it; hidden files are ignored.

    Raises:
        UserError: there is no such folder, or no task in it; two files have the same name; a task has two task.json
            files; or a task.json has no data.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a folder of tasks")
    contents = _look_into(folder)
    layout = Layout(folder, left_out=contents.left_out)
    own = folder.resolve().name or "task"
    around = {folder.resolve(), *folder.resolve().parents}
    circles = [inner for inner in contents.folders if inner.is_symlink() and inner.resolve() in around]
    layout.left_out += [f"{inner.name}/ (a link to a folder that contains it)" for inner in circles]
    contents.folders = [inner for inner in contents.folders if inner not in circles]
    nested = [(inner, _look_into(inner)) for inner in contents.folders if os.access(inner, os.R_OK | os.X_OK)]
    layout.left_out += [f"{inner.name}/" for inner in contents.folders if not os.access(inner, os.R_OK | os.X_OK)]
    layout.sources = _group(folder, contents, own=own)
    for inner, inside in nested:
        name = own if inner.name == "data" and not layout.sources else _stem(inner)
        found = _group(inner, inside, own=name, beside=folder)
        if len(found) == 1 and found[0].path != found[0].files[0][0]:
            layout.sources += found
            layout.left_out += [f"{inner.name}/{what}" for what in inside.left_out]
            layout.left_out += [f"{inner.name}/{deeper.name}/" for deeper in inside.folders]
        elif found:
            count = len(inside.data)
            layout.left_out.append(f"{inner.name}/ ({count} data {'file' if count == 1 else 'files'})")
        else:
            layout.left_out.append(f"{inner.name}/")
    layout.left_out.sort()
    if not layout.sources:
        unread = f" (not read: {', '.join(layout.left_out)})" if layout.left_out else ""
        raise UserError(f"{folder}: no task in it; add a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file{unread}")
    layout.sources.sort(key=lambda source: source.stem)
    _check_settings(contents.settings, layout.sources)
    return layout


def _stem(path: Path) -> str:
    """Return a data file's name without its suffix, .gz included."""
    return path.name.removesuffix(path.name[len(path.name) - len(data_suffix(path)) :])


def _look_into(folder: Path) -> _Contents:
    """Return the entries of a folder by kind."""
    contents = _Contents()
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from error
    names = {entry.name for entry in entries}
    for entry in entries:
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            (contents.split_folders if _split_of(entry) else contents.folders).append(entry)
        elif entry.name == _SETTINGS or entry.name.endswith(f".{_SETTINGS}"):
            contents.settings.append(entry)
        elif reason := _why_not_data(entry, names):
            contents.left_out.append(f"{entry.name}{reason}".rstrip())
        elif data_suffix(entry) and entry.name not in _DESCRIPTIONS:
            contents.data.append(entry)
    return contents


def _why_not_data(path: Path, names: set[str]) -> str:
    """Return why a file is not read, in brackets, or " " if that is obvious; "" if it is data or not worth a note."""
    if path.name.startswith("~$") or (path.name.startswith(".~lock") and path.name.endswith("#")):
        return " (a lock file)"
    if path.exists() and not path.is_file():
        return " (not a file)"  # such as a pipe, which may never end
    if path.name in _DESCRIPTIONS or _DOCUMENTS.fullmatch(path.name):
        return ""
    if path.name.endswith(".predictions.parquet"):
        return " (predictions of an evaluation)"
    suffix = data_suffix(path)
    if suffix == ".json" and f"{path.name[:-5]}.predictions.parquet" in names:
        return " (result of an evaluation)"
    if suffix in (".json", ".json.gz") and not holds_rows(path):
        return " (not a list of rows)"
    if suffix:
        return ""
    return _fix_of(path) or " "


def _fix_of(path: Path) -> str:
    """Return what makes a file readable that is not read; "" if that is not known."""
    return next((fix for ends, fix in _FIXES.items() if path.name.lower().endswith(ends)), "")


def _group(folder: Path, contents: _Contents, *, own: str, beside: Path | None = None) -> list[Source]:
    """Return the sources in one folder.

    own: name of the task of files that are named after splits alone. beside: the outer folder, which may also have the
    task.json.
    """
    groups: dict[str, list[tuple[Path, str]]] = {}
    for path in contents.data:
        prefix, split = _read_name(_stem(path))
        groups.setdefault(prefix, []).append((path, split))
    _pair_names(groups)
    for inner in contents.split_folders:
        inside = _look_into(inner)
        split = _split_of(inner)
        groups.setdefault("", []).extend((path, split) for path in inside.data)
        unread = [*inside.left_out, *(f"{deeper.name}/" for deeper in (*inside.folders, *inside.split_folders))]
        contents.left_out += [f"{inner.name}/{what}" for what in unread]
        if not inside.data:
            contents.left_out.append(f"{inner.name}/")
    alone = groups.get("", [])
    if len(alone) == 1 and alone[0][1] in ("train", "") and len(groups) > 1 and alone[0][0].parent == folder:
        # A single train file (or part) among files of other tasks is a task called train: no other is beside it.
        groups[_stem(alone[0][0])] = groups.pop("")
        groups[_stem(alone[0][0])][0] = (alone[0][0], "")
    _refuse_unclear(groups)
    _refuse_lonely(groups, contents)
    contents.left_out += _missing_shards([path for files in groups.values() for path, _ in files])
    sources = []
    for prefix, files in groups.items():
        splits = {split for _, split in files} - {""}
        whole = [path for path, split in files if not split]
        if prefix and splits and whole and not all(_is_shard(path) for path in whole):
            part = next(path for path, split in files if split)
            raise UserError(
                f"{part}: is a split of task '{prefix}' by its name, but {whole[0].name} is that task as a whole;"
                f" rename one (to {prefix}_train{data_suffix(whole[0])}, for example)"
            )
        if not prefix or len(splits) > 1 or (len(files) > 1 and all(_is_shard(path) for path, _ in files)):
            if files:
                sources.append(_joined(folder, files, name=prefix or own, beside=beside))
        else:
            sources += [_single(path) for path, _ in files]
    if len(sources) == 1 and beside is not None and len(groups) == 1:
        sources = [replace(source, stem=own) for source in sources]  # the folder is one task, with its name
    return sources


def _refuse_unclear(groups: Mapping[str, Sequence[tuple[Path, str]]]) -> None:
    """Refuse eval.csv beside train.csv: if it were a task of its own, its rows would be trained on."""
    for name, files in groups.items():
        prefix, mark, word = name.rpartition("_") if "_" in name else name.rpartition("-")
        if word.lower() in _UNCLEAR and (prefix if mark else "") in groups:
            path = files[0][0]
            raise UserError(_ask_which_split(path))


def _read_name(stem: str) -> tuple[str, str]:
    """Return the task's name in a file's name, "" if that is just a split, and the split, "" if there is none."""
    match = _SPLIT_NAME.fullmatch(stem)
    if match is not None:
        return match["prefix"] or "", SPLIT_WORDS[match["word"].lower()]
    if _PART_NAME.fullmatch(stem):
        return "", ""
    shard = _SHARD_NAME.fullmatch(stem)
    return (shard["prefix"] if shard else stem), ""


def _split_of(folder: Path) -> str:
    """Return the split in a folder's name, such as "train" or "test_set"; "" if there is none."""
    return SPLIT_WORDS.get(re.sub(r"[-_ ]?(?:set|data|split)$", "", folder.name.lower()), "")


def _pair_names(groups: dict[str, list[tuple[Path, str]]]) -> None:
    """Put files into one group if their names differ only in the word for the split: train-v2.csv and dev-v2.csv.

    groups: task's name -> its files, each with its split or "". It is changed in place.
    """
    paired = {name for name, files in groups.items() if len({split for _, split in files} - {""}) > 1}
    alone = [(name, path) for name, files in groups.items() if name not in paired for path, _ in files]
    found: dict[str, dict[Path, tuple[str, str]]] = {}  # name without the word -> file -> its split, its old group
    for name, path in alone:
        stem = _stem(path)
        for match in _ANY_WORD.finditer(stem):
            split = SPLIT_WORDS.get(match[0].lower()) or {"trn": "train", "tst": "test"}[match[0].lower()]
            found.setdefault(f"{stem[: match.start()]}\0{stem[match.end() :]}".lower(), {})[path] = (split, name)
    for rest, files in found.items():
        splits = {split for split, _ in files.values()}
        if "train" not in splits or len(splits) < 2 or any(path not in (p for _, p in alone) for path in files):
            continue
        stem = _stem(next(iter(files)))  # `rest` is in lower case
        parts = [stem[: rest.index("\0")], stem[len(stem) - len(rest) + rest.index("\0") + 1 :]]
        words = [word for word in (part.strip(_MARKS) for part in parts) if not _NO_NAME.fullmatch(word)]
        key = "_".join(words) if words or "" not in groups else "".join(parts).strip(_MARKS)
        for path, (split, old) in files.items():
            groups[old] = [(other, what) for other, what in groups[old] if other != path]
            if not groups[old]:
                del groups[old]
            groups.setdefault(key, []).append((path, split))
        alone = [(name, path) for name, path in alone if path not in files]


def _refuse_lonely(groups: Mapping[str, Sequence[tuple[Path, str]]], contents: _Contents) -> None:
    """Refuse my_test.csv beside train.csv, and a folder heldout/ beside train/: it is unclear which task they test."""
    kinds = {name: {_kind_of(path, split) for path, split in files} for name, files in groups.items()}
    is_open = any(kind == {"train"} for kind in kinds.values()) or "train" in kinds.get("", ())
    if not is_open:
        return
    for name, files in groups.items():
        if name and "train" not in kinds[name] and "other" in kinds[name]:
            if all(has_split_column(path) for path, _ in files):
                continue  # a task of that name, whose rows say themselves what they are for
            path = next(path for path, split in files if _kind_of(path, split) == "other")
            raise UserError(
                f"{path}: is not for training by its name, but of which task is it? Give a task's files one name"
                " (desk_train.csv and desk_test.csv), or rename it"
            )
    for folder in contents.folders:
        if re.sub(r"[-_ ]", "", folder.name.lower()) in _UNCLEAR:
            raise UserError(_ask_which_split(folder))


def _ask_which_split(path: Path) -> str:
    return f"{path}: is a split by its name, but which one? Name it validation or test, or rename it"


def _kind_of(path: Path, split: str) -> str:
    """Return "train" or "other" if a file is a split by its name or by `split`, else ""."""
    stem = re.sub(r"(?i)(held|hold)[-_ ]?out", "heldout", _stem(path))
    words = [split] if split else [match[0].lower() for match in _LONE_WORD.finditer(stem)]
    if not words:
        return ""
    return "train" if all(word.startswith("train") for word in words) else "other"


def _missing_shards(paths: Iterable[Path]) -> list[str]:
    """Return a note on missing shards: if there is only train-00000-of-00003, two are missing."""
    there: dict[tuple[Path, str, str, int], set[int]] = {}
    for path in paths:
        if match := _SHARD_NAME.fullmatch(_stem(path)):
            key = (path.parent, match["prefix"], data_suffix(path), int(match["count"]))
            there.setdefault(key, set()).add(int(match["number"]))
    return [
        f"{count - len(numbers)} of the {count} shards of {prefix}{suffix} (missing)"
        for (_, prefix, suffix, count), numbers in there.items()
        if len(numbers) < count
    ]


def _is_shard(path: Path) -> bool:
    return _SHARD_NAME.fullmatch(_stem(path)) is not None


def _single(path: Path) -> Source:
    """Return the source of a task of one file."""
    stem = _stem(path)
    return Source(path, stem, ((path, ""),), path.with_name(f"{stem}.{_SETTINGS}"))


def _joined(folder: Path, files: Iterable[tuple[Path, str]], *, name: str, beside: Path | None) -> Source:
    """Return the source of several files that form one task."""
    parts = tuple(sorted(files))
    stems: dict[Path, Path] = {}
    for path, _ in parts:
        bare = path.with_name(_stem(path))
        if bare in stems:
            raise UserError(f"{path}: there is also {stems[bare].name}; rename or remove one")
        stems[bare] = path
    if {split for _, split in parts} == {"train"}:  # without test rows: divided as if no split were named
        parts = tuple((path, "") for path, _ in parts)
    places = [folder / f"{name}.{_SETTINGS}", folder / _SETTINGS]
    if beside is not None:
        places.append(beside / f"{name}.{_SETTINGS}")
    places += [path.with_name(f"{_stem(path)}.{_SETTINGS}") for path, _ in parts]
    there = [place for place in dict.fromkeys(places) if place.is_file()]
    if len(there) > 1:
        raise UserError(f"{there[1]}: task '{name}' also has {there[0].name}; keep one")
    return Source(folder, name, parts, there[0] if there else places[0])


def _check_settings(settings: Iterable[Path], sources: Iterable[Source]) -> None:
    """Refuse a task.json that does not belong to a task."""
    owned = {source.settings_path for source in sources}
    stems = tuple(sorted({source.stem for source in sources}))
    for path in settings:
        if path not in owned:
            stem = path.name.removesuffix(_SETTINGS).removesuffix(".")
            raise UserError(
                f"{path}: no data file {stem or '*'}.jsonl, .csv or .parquet beside it{near_word(stem, stems)}"
            )
