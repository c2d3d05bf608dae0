"""The library: tasks and their examples in an SQLite database. What was acknowledged outlives a kill and a power cut.

Several processes may share it, and every one may write: a write is one short transaction, and another process sees it
with its next read, because each request reads the task's version first.
"""

from __future__ import annotations

import json
import operator
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from manyicl.errors import UserError, find_refusal, suggest_near
from manyicl.service.refusals import Closing, LibraryFault, TaskExists, UnknownExample, UnknownTask
from manyicl.tasks import Example

FILE = "library.sqlite"
# How long a write waits for another process's.
BUSY_TIMEOUT_S = 15.0
# "myic": tells our databases from others'.
_APPLICATION_ID = 0x6D796963
# One script per version of the database; a database runs those that it has not run. They are only added to.
_MIGRATIONS = (
    """
    CREATE TABLE tasks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        about TEXT NOT NULL,
        version INTEGER NOT NULL,
        created TEXT NOT NULL,
        changed TEXT NOT NULL
    ) STRICT;
    CREATE TABLE examples (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        task INTEGER NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
        input TEXT NOT NULL,
        answer TEXT NOT NULL,
        options TEXT NOT NULL,
        also_right TEXT NOT NULL,
        batch INTEGER NOT NULL,
        added TEXT NOT NULL,
        source TEXT NOT NULL,
        UNIQUE (task, input)
    ) STRICT;
    CREATE INDEX examples_of_task ON examples (task, id);
    CREATE TABLE measurements (
        task INTEGER NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
        model TEXT NOT NULL,
        version INTEGER NOT NULL,
        content TEXT NOT NULL,
        PRIMARY KEY (task, model)
    ) STRICT;
    """,
)


@dataclass(frozen=True, slots=True)
class ServedExample:
    """One example in the library."""

    id: int
    """Stays the same when the answer is corrected, and is never given to another example."""
    input: str
    answer: str
    added: str
    """When, in UTC."""
    source: str
    """The file that it came from, or how else it came."""
    options: tuple[str, ...] = ()
    """Its own candidate answers."""
    also_right: tuple[str, ...] = ()
    """Other answers that count as right."""
    batch: int = 1
    """The version of the task that it came with."""

    def to_example(self) -> Example:
        """Return it as the readers of data files do."""
        return Example(self.input, self.answer, self.options, self.also_right)


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What the library knows of a task besides its examples."""

    id: int
    name: str
    about: Mapping[str, Any]
    """Family, metric, instruction, labels and so on, as `registering` writes them."""
    version: int
    created: str
    changed: str


class Library:
    """An open library. Its methods may be called from any thread; each that writes has written to disk when it returns.

    folder: where the database lies; made if it is not there.

    Raises:
        LibraryFault: it is corrupt, from a newer version, not a library, or cannot be read or written. All methods too.
            Closing: it was closed, by another thread perhaps while this one was at work. All methods.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock, self._is_closed = threading.RLock(), False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LibraryFault(f"{folder}: cannot be made ({error.strerror or error}); name another folder") from error
        with self._guarding():
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None)
        try:
            with self._guarding():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close it; nothing is waiting to be written."""
        with self._lock, self._guarding():
            self._is_closed = True
            self._db.close()

    def _open(self) -> None:
        """Look before anything is written, then bring the database to this version."""
        version, found = self._number("user_version"), self._number("application_id")
        num_tables = self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if found != _APPLICATION_ID and (num_tables or found or version):
            raise LibraryFault(f"{self.path}: is a database of another program; name another folder")
        if version > len(_MIGRATIONS):
            raise LibraryFault(
                f"{self.path}: was written by a newer version of manyicl (database version {version}, known:"
                f" {len(_MIGRATIONS)}); install that version, or name another folder"
            )
        faults = [row[0] for row in self._db.execute("PRAGMA quick_check(1)")]
        if faults != ["ok"]:
            raise self._corrupt(str(faults[0]))
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA journal_mode = WAL")
        if version == len(_MIGRATIONS):
            return
        with self._writing() as db:
            for number in range(self._number("user_version") + 1, len(_MIGRATIONS) + 1):  # another process may be first
                for statement in _MIGRATIONS[number - 1].split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    def _number(self, pragma: str) -> int:
        return int(self._db.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _corrupt(self, why: str) -> LibraryFault:
        words = " ".join(why.replace("*", " ").split())
        return LibraryFault(f"{self.path}: is damaged ({words[:200]}); nothing was changed; restore it from a copy")

    @contextmanager
    def _guarding(self) -> Iterator[None]:
        """Turn SQLite's errors into one line each."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._corrupt(str(error)) from error
            reasons = {
                sqlite3.SQLITE_FULL: "the disk is full; free some space",
                sqlite3.SQLITE_BUSY: f"another process has been writing for {BUSY_TIMEOUT_S:g} s; try again",
                sqlite3.SQLITE_READONLY: "may not be written; change its permissions, or name another folder",
                sqlite3.SQLITE_CANTOPEN: "cannot be opened; name a folder that can be written",
                sqlite3.SQLITE_IOERR: "the disk failed to read or write, or is full",
            }
            if self._is_closed:
                raise Closing("the library of tasks is closed; open it again") from error
            why = reasons.get(code) or find_refusal(error) or str(error)
            raise LibraryFault(f"{self.path}: {why}; nothing was changed") from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._guarding():
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block's changes are on disk at its end, or none."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db
            db.execute("COMMIT")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """A transaction of which only what the block commits is kept."""
        with self._reading() as db:
            db.execute(begin)
            try:
                yield db
            finally:
                if db.in_transaction:  # SQLite itself ends one at some errors, such as a full disk
                    db.execute("ROLLBACK")

    # Reading.

    def tasks(self) -> list[TaskRecord]:
        """Return all tasks by name."""
        with self._reading() as db:
            rows = db.execute(f"{_SELECT_TASK} ORDER BY name").fetchall()
        return [_to_record(row) for row in rows]

    def task(self, name: str) -> TaskRecord:
        """Return a task.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._reading() as db:
            return self._task(db, name)

    def _task(self, db: sqlite3.Connection, name: str) -> TaskRecord:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UnknownTask("task: its name holds half of a surrogate pair; no task has it") from None
        row = db.execute(f"{_SELECT_TASK} WHERE name = ?", (name,)).fetchone()
        if row is None:
            names = [known for (known,) in db.execute("SELECT name FROM tasks LIMIT 1000")]
            raise UnknownTask(f"task {name[:100]!r}: there is none of this name{suggest_near(name[:100], names)}")
        return _to_record(row)

    def versions(self) -> dict[str, tuple[int, int]]:
        """Return name -> (id, version) of each task."""
        with self._reading() as db:
            rows = db.execute("SELECT name, id, version FROM tasks ORDER BY id").fetchall()
        return {name: (id_, version) for name, id_, version in rows}

    def read_task(self, name: str) -> tuple[TaskRecord, list[ServedExample]]:
        """Return a task and all of its examples, by id, as they are at one moment.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._transaction("BEGIN") as db:
            record = self._task(db, name)
            return record, _all_examples(db, record.id)

    def examples(self, task: int, *, start: int, limit: int) -> list[ServedExample]:
        """Return some of a task's examples, by id, from the `start`-th on."""
        with self._reading() as db:
            query = f"{_SELECT} WHERE task = ? ORDER BY id LIMIT ? OFFSET ?"
            return [_to_example(row) for row in db.execute(query, (task, limit, start)).fetchall()]

    def num_examples(self, task: int) -> int:
        """Return how many examples a task has."""
        with self._reading() as db:
            return _count_examples(db, task)

    def find_measurement(self, task: int, *, model: str) -> tuple[int, dict[str, Any]] | None:
        """Return version and content of the last measurement of a task with a model; None if there is none."""
        with self._reading() as db:
            query = "SELECT version, content FROM measurements WHERE task = ? AND model = ?"
            row = db.execute(query, (task, model)).fetchone()
        return None if row is None else (int(row[0]), json.loads(row[1]))

    # Writing.

    def add_task(
        self,
        name: str,
        about: Mapping[str, Any],
        examples: Sequence[Example],
        *,
        source: str,
        replace: bool,
        most_tasks: int,
    ) -> None:
        """Keep a task with its examples.

        replace: in place of a task of this name, if there is one, whose version goes on.

        Raises:
            TaskExists: there is one, and `replace` is False.
            UserError: there are `most_tasks` others already.
        """
        with self._writing() as db:
            row = db.execute("SELECT id, version, created FROM tasks WHERE name = ?", (name,)).fetchone()
            if row is not None and not replace:
                raise TaskExists(f"task {name!r}: is there already; replace it, or add examples to it")
            if row is None and db.execute("SELECT count(*) FROM tasks").fetchone()[0] >= most_tasks:
                raise UserError(f"task {name!r}: there are {most_tasks:,} tasks already, the limit; remove one")
            now, version = _now(), 1
            if row is None:
                values = (name, json.dumps(about), version, now, now)
                query = "INSERT INTO tasks (name, about, version, created, changed) VALUES (?, ?, ?, ?, ?)"
                task = int(db.execute(query, values).lastrowid or 0)
            else:
                task, version = int(row[0]), int(row[1]) + 1
                db.execute("DELETE FROM examples WHERE task = ?", (task,))
                query = "UPDATE tasks SET about = ?, version = ?, changed = ? WHERE id = ?"
                db.execute(query, (json.dumps(about), version, now, task))
            _insert(db, task, examples, batch=version, source=source)

    def remove_task(self, name: str) -> None:
        """Remove a task with its examples.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._writing() as db:
            db.execute("DELETE FROM tasks WHERE id = ?", (self._task(db, name).id,))

    @contextmanager
    def changing(self, name: str) -> Iterator[TaskChange]:
        """Give the block a task to change in one transaction; its version goes up if the block changed anything.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._writing() as db:
            record = self._task(db, name)
            change = TaskChange(db, record)
            yield change
            if change.has_changed:
                values = (json.dumps(change.about), record.version + 1, _now(), record.id)
                db.execute("UPDATE tasks SET about = ?, version = ?, changed = ? WHERE id = ?", values)

    def keep_measurement(self, task: int, *, model: str, version: int, content: Mapping[str, Any]) -> None:
        """Keep a finished measurement; nothing happens if the task is gone."""
        with self._writing() as db:
            if db.execute("SELECT 1 FROM tasks WHERE id = ?", (task,)).fetchone():
                query = "INSERT OR REPLACE INTO measurements (task, model, version, content) VALUES (?, ?, ?, ?)"
                db.execute(query, (task, model, version, json.dumps(content)))


class TaskChange:
    """A task within the transaction that changes it. about: may be replaced."""

    def __init__(self, db: sqlite3.Connection, record: TaskRecord) -> None:
        self._db, self.record = db, record
        self.about: Mapping[str, Any] = record.about
        self.has_changed = False

    def examples(self) -> list[ServedExample]:
        """Return all examples by id."""
        return _all_examples(self._db, self.record.id)

    def find(self, id_: int) -> ServedExample:
        """Return an example.

        Raises:
            UnknownExample: the task has none with this id.
        """
        try:
            id_ = operator.index(id_)  # also numpy's
        except TypeError:
            told = f"example {id_!r}: is not a whole number; give the `id` of one of the task's examples"
            raise UnknownExample(told) from None
        query = f"{_SELECT} WHERE task = ? AND id = ?"
        row = self._db.execute(query, (self.record.id, id_)).fetchone() if abs(id_) < 1 << 63 else None
        if row is None:
            raise UnknownExample(f"example {id_}: task '{self.record.name}' has none with this id")
        return _to_example(row)

    def find_input(self, text: str) -> ServedExample | None:
        """Return the example with this input, if there is one."""
        row = self._db.execute(f"{_SELECT} WHERE task = ? AND input = ?", (self.record.id, text)).fetchone()
        return None if row is None else _to_example(row)

    def num_examples(self) -> int:
        """Return how many examples it has."""
        return _count_examples(self._db, self.record.id)

    def add(self, examples: Sequence[Example], *, source: str) -> list[int]:
        """Add examples with new inputs; return their ids."""
        if examples:
            self.has_changed = True
        return _insert(self._db, self.record.id, examples, batch=self.record.version + 1, source=source)

    def correct(self, id_: int, answer: str) -> None:
        """Change the answer of an example, which has no other right answers from then on."""
        self.has_changed = True
        self._db.execute("UPDATE examples SET answer = ?, also_right = '[]' WHERE id = ?", (answer, id_))

    def remove(self, ids: Sequence[int]) -> None:
        """Remove examples."""
        if ids:
            self.has_changed = True
        self._db.executemany("DELETE FROM examples WHERE id = ?", [(id_,) for id_ in ids])


_SELECT_TASK = "SELECT id, name, about, version, created, changed FROM tasks"
_SELECT = "SELECT id, input, answer, added, source, options, also_right, batch FROM examples"


def _all_examples(db: sqlite3.Connection, task: int) -> list[ServedExample]:
    return [_to_example(row) for row in db.execute(f"{_SELECT} WHERE task = ? ORDER BY id", (task,)).fetchall()]


def _count_examples(db: sqlite3.Connection, task: int) -> int:
    return int(db.execute("SELECT count(*) FROM examples WHERE task = ?", (task,)).fetchone()[0])


def _insert(db: sqlite3.Connection, task: int, examples: Sequence[Example], *, batch: int, source: str) -> list[int]:
    now = _now()
    query = (
        "INSERT INTO examples (task, input, answer, options, also_right, batch, added, source)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    )
    ids = []
    for example in examples:
        options, also_right = json.dumps(example.options), json.dumps(example.also_right)
        values = (task, example.input, example.answer, options, also_right, batch, now, source)
        ids.append(int(db.execute(query, values).lastrowid or 0))
    return ids


def _to_record(row: Sequence[Any]) -> TaskRecord:
    return TaskRecord(int(row[0]), row[1], json.loads(row[2]), int(row[3]), row[4], row[5])


def _to_example(row: Sequence[Any]) -> ServedExample:
    options, also_right = (tuple(json.loads(row[place])) for place in (5, 6))
    return ServedExample(int(row[0]), row[1], row[2], row[3], row[4], options, also_right, int(row[7]))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
