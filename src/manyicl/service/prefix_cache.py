"""Encoded prefixes within a budget of memory: the least recently used go to disk, and a longer one extends a shorter.

A prefix is known by its ids, so another version of a task, another choice of shots or another order is another prefix.
A file is known by its ids and by the model's weights, adapter and precision, so it is never read for another model.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError, find_refusal
from manyicl.inference import Engine, InferenceModel, ModelKey, load_prefix, model_key, prefix_key, save_prefix
from manyicl.models import Prefix

SUFFIX = ".safetensors"
# A common beginning of fewer tokens is not worth the copy of it.
_FEWEST_SHARED = 64
# Room for later shots, as part of a prefix, so that extending it copies nothing.
_SPARE_SHARE = 0.1
_logger = logging.getLogger("manyicl")


@dataclass(slots=True)
class CacheCount:
    """What became of the prefixes that passes needed."""

    hits: int = 0
    """In memory, whole."""
    extended: int = 0
    """In memory in part: only the rest was encoded."""
    loaded: int = 0
    """Read from disk."""
    encoded: int = 0
    """Encoded from the first token on."""
    spilled: int = 0
    """Written to disk."""
    dropped: int = 0
    """Forgotten for want of room in memory, without being written."""
    bad_files: int = 0
    """Files that could not be read, and were removed."""
    memory_bytes: int = 0
    """In memory now."""
    disk_bytes: int = 0
    """On disk now, as far as this process knows."""


class PrefixCache:
    """The prefixes of one model. Only the thread that owns the model uses it.

    folder: of the files; None writes none.
    """

    def __init__(
        self, model: InferenceModel, *, most_bytes: int, most_disk_bytes: int = 0, folder: Path | None = None
    ) -> None:
        self.model, self.most_bytes, self.most_disk_bytes = model, most_bytes, most_disk_bytes
        self.folder = folder if most_disk_bytes else None
        self.count = CacheCount()
        self._entries: list[Prefix] = []  # the most recently used last
        self._key: ModelKey | None = None

    def get(
        self, engine: Engine, ids: NDArray[np.int32], *, most: int | None = None, room: int = 0
    ) -> tuple[Prefix, bool]:
        """Return the prefix `ids`, and whether nothing had to be encoded for it.

        most: encode at most so many tokens, and return a beginning of `ids` if they are not enough. Such a call is not
            counted: no request needs the prefix yet.
        room: tokens of the longest prefix to come.

        Raises:
            UserError: memory runs out.
        """
        if engine.server is not None or engine.sharing_fault:
            return engine.encode(ids), True  # nothing is encoded before there is a query
        before = replace(self.count)
        prefix, found = self._get(engine, ids, most=len(ids) if most is None else most, room=room)
        if most is not None:
            self.count.hits, self.count.extended, self.count.encoded = before.hits, before.extended, before.encoded
        return prefix, found

    def _get(self, engine: Engine, ids: NDArray[np.int32], *, most: int, room: int) -> tuple[Prefix, bool]:
        entry, num_shared = self._find_longest(ids)
        if num_shared == len(ids):
            self.count.hits += 1
            self._touch(entry)
            return Prefix(ids, entry.store), True
        loaded = self._load(ids)
        if loaded is not None:
            self.count.loaded += 1
            self._keep(loaded)
            return loaded, True
        if not most:
            return Prefix(ids[:num_shared], entry.store), True
        room = max(room, len(ids)) + int(_SPARE_SHARE * max(room, len(ids)))
        is_whole = entry.store is not None and entry.store.num_tokens == num_shared  # to be extended without a copy
        if num_shared >= _FEWEST_SHARED or is_whole:
            shared = Prefix(entry.ids[:num_shared], entry.store)
            prefix = engine.encode(ids[num_shared : num_shared + most], after=shared, room=room)
            self.count.extended += 1
        else:
            num_shared = 0
            prefix = engine.encode(ids[:most], room=room)
            self.count.encoded += 1
        if num_shared == entry.num_tokens:
            self._entries = [one for one in self._entries if one is not entry]  # the longer one has its tokens
        self._keep(prefix)
        return prefix, False

    def _find_longest(self, ids: NDArray[np.int32]) -> tuple[Prefix, int]:
        """Return the entry with the longest common beginning, and its length."""
        best, longest = Prefix(ids[:0]), 0
        for entry in self._entries:
            most = min(len(ids), entry.num_tokens)
            differs = np.flatnonzero(entry.ids[:most] != ids[:most])
            common = int(differs[0]) if len(differs) else most
            if common >= longest:
                best, longest = entry, common
        return best, longest

    def _touch(self, entry: Prefix) -> None:
        self._entries = [*(one for one in self._entries if one is not entry), entry]

    def _keep(self, prefix: Prefix) -> None:
        self._entries.append(prefix)
        while len(self._entries) > 1 and self._measure() > self.most_bytes:
            oldest = self._entries.pop(0)
            if not self._spill(oldest):
                self.count.dropped += 1
        self.count.memory_bytes = self._measure()

    def _measure(self) -> int:
        """Return the bytes of all entries; what two of them share counts once."""
        stores = {id(entry.store): entry.store for entry in self._entries if entry.store is not None}
        tensors = (x for store in stores.values() for pair in store.buffers.values() for x in pair)
        return sum(x.numel() * x.element_size() for x in tensors)

    def clear(self) -> None:
        """Forget all prefixes in memory."""
        self._entries, self.count.memory_bytes = [], 0

    def spill_all(self) -> None:
        """Write what is in memory to disk, so that the next process need not encode it."""
        for entry in reversed(self._entries):
            self._spill(entry)

    # Files.

    def _path_of(self, ids: NDArray[np.int32]) -> Path:
        assert self.folder is not None
        if self._key is None:
            self._key = model_key(self.model.model)  # reads all weights, so once
        return self.folder / f"{prefix_key(self.model.model, ids, known=self._key).digest}{SUFFIX}"

    def _load(self, ids: NDArray[np.int32]) -> Prefix | None:
        if self.folder is None or not self.folder.is_dir():
            return None
        path = self._path_of(ids)
        if not path.is_file():
            return None
        try:
            prefix = load_prefix(path, model=self.model.model, ids=ids, known=self._key)
        except UserError as error:
            _logger.warning("%s", error)
            self.count.bad_files += 1
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # as the most recently used
        return prefix

    def _spill(self, prefix: Prefix) -> bool:
        """Write a prefix unless its file is there; return whether it is. A full disk is no reason to fail a request."""
        if self.folder is None or prefix.store is None:
            return False
        path = self._path_of(prefix.ids)
        if path.is_file():
            return True
        num_bytes = sum(x.nbytes for layer in prefix.store.buffers for x in prefix.layer(layer))
        if num_bytes > self.most_disk_bytes:
            return False
        try:
            self._make_room(num_bytes)
            save_prefix(path, prefix, model=self.model.model, known=self._key)
        except Exception as error:  # safetensors has errors of its own
            _logger.warning("%s: a prefix cannot be kept there (%s)", self.folder, find_refusal(error) or error)
            return False
        self.count.spilled += 1
        self.count.disk_bytes += num_bytes
        return True

    def _make_room(self, num_bytes: int) -> None:
        """Remove the files that were not used for longest, until there is room for another."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        files = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process may remove it
                found = path.stat()
                if path.name.endswith(".partial") and now - found.st_mtime > 3600:
                    path.unlink()  # of a process that was killed
                elif path.suffix == SUFFIX:
                    files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + num_bytes <= self.most_disk_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        self.count.disk_bytes = total
