"""Files are whole or absent."""

from __future__ import annotations

import os

import pytest

from manyicl.files import sync_folder, sync_tree, write_atomically


@pytest.mark.parametrize(("content", "data"), [(b"\x00\xff", b"\x00\xff"), ("ä\n", b"\xc3\xa4\n"), ("", b"")])
def test_bytes_and_text_are_written_as_they_are(tmp_path, content, data):
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, content)
    assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "a long first content")
    seen = []
    fsync = os.fsync

    def look_and_sync(descriptor):
        seen.append(path.read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look_and_sync)
    write_atomically(path, "second")
    # While the new content goes to the disk the old file stands; the folder is made durable after the rename.
    assert seen == ["a long first content", "second"]
    assert path.read_text() == "second"


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failing_write_leaves_the_old_file_or_none(tmp_path, monkeypatch, before, error):
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new content")
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_what_a_killed_writer_left_behind_is_in_nobodys_way(tmp_path):
    path = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}-0.partial").write_text("half")
    write_atomically(path, "whole")
    assert path.read_text() == "whole"
    assert not list(tmp_path.glob("file*.partial"))  # no name that a reader could look for


def test_sync_tree_makes_every_file_and_folder_durable(tmp_path, monkeypatch):
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    (tmp_path / "a").write_text("a")
    (tmp_path / "inner" / "b").write_text("b")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    everything = [tmp_path, *tmp_path.rglob("*")]
    assert len(everything) == 5
    assert sorted(synced) == sorted(path.stat().st_ino for path in everything)
    assert synced[-1] == tmp_path.stat().st_ino  # the folder last: its entries are durable by then


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "absent")
