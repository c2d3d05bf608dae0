"""The library: whole transactions whatever happens, and a database that is not ours, newer or damaged is left alone."""

from __future__ import annotations

import itertools
import random
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest

from manyicl.service import library as library_module
from manyicl.service.library import FILE, Library
from manyicl.service.refusals import Closing, LibraryFault, TaskExists, UnknownTask
from manyicl.service.served import open_service
from manyicl.service.settings import ServiceSettings
from manyicl.tasks.task import Example
from tests.service.conftest import QUIET, ROWS
from tests.support.killed_writes import ABOUT, kill_once

EXAMPLES = [Example(f"input {n}", "ab"[n % 2]) for n in range(400)]


def fill(folder):
    library = Library(folder)
    library.add_task("letters", ABOUT, EXAMPLES, source="letters.csv", replace=False, most_tasks=5)
    return library


@pytest.mark.slow
def test_what_is_written_comes_back_in_another_process(tmp_path):
    fill(tmp_path).close()
    code = (
        "from pathlib import Path; from manyicl.service.library import Library\n"
        f"record, examples = Library(Path({str(tmp_path)!r})).read_task('letters')\n"
        "print(record.version, len(examples), examples[3].input, examples[3].source)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "400", "input", "3", "letters.csv"]


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path):
    """Trials at 50 moments are those of `python -m tests.support.killed_writes 50`."""
    rng = random.Random(1)
    for _ in range(4):
        acknowledged, found = kill_once(tmp_path, rng=rng)
        assert acknowledged > 0
        assert found >= acknowledged


def test_a_failed_change_changes_nothing(tmp_path):
    library = fill(tmp_path)

    def fail_after_a_change():
        with library.changing("letters") as change:
            change.add([Example("new", "a")], source="x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_change()
    with pytest.raises(LibraryFault, match="UNIQUE"), library.changing("letters") as change:
        change.add([Example("new", "a"), Example("input 0", "a")], source="x")
    assert library.num_examples(library.task("letters").id) == 400
    assert library.task("letters").version == 1
    with library.changing("letters"):
        pass  # nothing changed
    assert library.task("letters").version == 1


def test_a_removed_task_takes_its_examples_along_and_ids_are_never_given_again(tmp_path):
    library = fill(tmp_path)
    last = library.examples(library.task("letters").id, start=399, limit=1)[0].id
    library.keep_measurement(library.task("letters").id, model="m", version=1, content={"a": 1})
    library.remove_task("letters")
    with pytest.raises(UnknownTask):
        library.remove_task("letters")
    library.add_task("letters", ABOUT, EXAMPLES[:1], source="x", replace=False, most_tasks=5)
    task = library.task("letters")
    assert library.examples(task.id, start=0, limit=10)[0].id == last + 1
    assert library.find_measurement(task.id, model="m") is None
    with pytest.raises(TaskExists):
        library.add_task("letters", ABOUT, EXAMPLES, source="x", replace=False, most_tasks=5)


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    fill(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(
        LibraryFault, match=r"was written by a newer version of manyicl \(database version 99, known: 1\)"
    ):
        Library(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    db.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(LibraryFault, match="is a database of another program"):
        Library(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_text("title,artist\n" * 500)
    with pytest.raises(LibraryFault, match="is damaged"):
        Library(tmp_path)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_damaged_page_is_refused_in_one_line_and_nothing_is_overwritten(tmp_path, place):
    fill(tmp_path).close()
    content = bytearray((tmp_path / FILE).read_bytes())
    page = int(place * len(content)) // 4096 * 4096
    content[page : page + 4096] = random.Random(0).randbytes(4096)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(
        LibraryFault, match=r"library\.sqlite: is damaged \(.*\); nothing was changed; restore"
    ) as refused:
        open_service("seed", data=tmp_path)
    assert "\n" not in str(refused.value)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LibraryFault, match="cannot be made"):
        Library(tmp_path / "file")
    (tmp_path / "folder" / FILE).mkdir(parents=True)
    with pytest.raises(LibraryFault, match="cannot be opened"):
        Library(tmp_path / "folder")
    library = fill(tmp_path / "closed")
    library.close()
    with pytest.raises(Closing, match="the library of tasks is closed"):
        library.tasks()


def test_a_read_that_fails_within_a_change_commits_nothing_of_it(tmp_path):
    library = fill(tmp_path)
    before = library.read_task("letters")
    with pytest.raises(LibraryFault, match="within a transaction"), library.changing("letters") as change:  # noqa: PT012
        change.add([Example("half done", "a")], source="x")
        library.read_task("letters")
    assert library.read_task("letters") == before
    with pytest.raises(UnknownTask):
        library.read_task("digits")
    with library.changing("letters") as change:  # no transaction was left open
        change.add([Example("whole", "a")], source="x")
    assert library.read_task("letters")[1][-1].input == "whole"


FULL_DISK = """
import resource, sys
from pathlib import Path
from manyicl.service.library import Library
from manyicl.service.refusals import LibraryFault
from manyicl.tasks import Example

library = Library(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file may grow beyond
try:
    with library.changing("letters") as change:
        change.add([Example(f"more {n}", "a") for n in range(20_000)], source="x")
except LibraryFault as fault:
    print(fault)
print([library.num_examples(task.id) for task in library.tasks()])
"""


@pytest.mark.slow
def test_a_full_disk_is_refused_in_one_line_and_the_library_goes_on(tmp_path):
    fill(tmp_path).close()
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    refusal, counts = ran.stdout.splitlines()
    assert "disk" in refusal
    assert refusal.endswith("nothing was changed")
    assert counts == "[400]"


def test_two_libraries_write_at_once_and_each_sees_all(tmp_path):
    libraries = [fill(tmp_path), Library(tmp_path)]

    def write(number):
        for step in range(20):
            with libraries[number].changing("letters") as change:
                change.add([Example(f"{number} {step}", "a")], source="x")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for library in libraries:
        record, examples = library.read_task("letters")
        assert (record.version, len(examples)) == (41, 440)


def test_what_one_service_changes_the_other_sees_with_its_next_request(seed_model, tmp_path):
    with (
        open_service(seed_model, data=tmp_path, settings=QUIET) as one,
        open_service(seed_model, data=tmp_path, settings=QUIET) as other,
    ):
        one.add_task(ROWS, name="animals")
        first = other.task("animals").predict("the red fox")[0]
        assert (first.task_version, len(first.shots)) == (1, 80)
        id_ = other.task("animals").add_example("a new fox", "fox")
        second = one.task("animals").predict("the red fox")[0]
        assert (second.task_version, second.shots[-1]) == (2, id_)
        other.remove_task("animals")
        assert one.tasks() == []


@pytest.mark.slow
def test_a_measurement_that_one_service_made_is_not_made_again_by_another(seed_model, tmp_path):
    small = ServiceSettings(measure_tokens=5_000)
    with (
        open_service(seed_model, data=tmp_path, settings=QUIET) as busy,
        open_service(seed_model, data=tmp_path) as idle,
    ):
        busy.add_task(ROWS, name="animals")
        made = idle.task("animals").measure(120)
        with open_service(seed_model, data=tmp_path, settings=small) as third:
            assert third.task("animals").measure(10) == made  # with its own tokens it would have another curve


def test_a_clock_that_jumps_neither_loses_nor_reorders_anything(seed_model, tmp_path, monkeypatch):
    """Orders go by ids and versions, waiting by the monotonic clock; dates are only shown."""
    years = itertools.cycle([2026, 1971, 2099])

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(next(years), 1, 1, tzinfo=tz)

    monkeypatch.setattr(library_module, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: Jumping.now(UTC).timestamp())
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        task = service.add_task(ROWS, name="animals")
        [before] = task.predict("the red fox", timeout=60)
        ids = [task.add_example(f"a late owl {number}", "owl") for number in range(5)]
        [after] = service.task("animals").predict("the red fox", timeout=60)
    assert ids == sorted(ids)
    assert after.shots == (*before.shots, *(id_ for id_ in after.shots if id_ in ids))
    assert set(ids) <= set(after.shots)
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        assert service.task("animals").num_examples == len(ROWS) + 5
        assert service.task("animals").predict("the red fox", timeout=60)[0].shots == after.shots


def test_tasks_are_there_again_when_the_service_is_opened_again(seed_model, tmp_path):
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        before = service.add_task(ROWS, name="animals").predict("the red fox")[0]
    with open_service(seed_model, data=tmp_path, settings=QUIET) as service:
        again = service.task("animals").predict("the red fox")[0]
        assert (again.answer, again.shots, again.nll) == (before.answer, before.shots, before.nll)
        assert again.timing.prefix_cached  # from the disk
        assert service.stats().prefixes["loaded"] == 1
