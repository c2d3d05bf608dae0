"""Prefixes in memory and on disk: found, extended, spilled, and encoded anew if a file is damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from manyicl.inference.engine import choose_engine
from manyicl.service.prefix_cache import SUFFIX, PrefixCache
from tests.inference.test_prefix import some_ids
from tests.support.answers import answer_nats

QUERY = [(some_ids(5), [3, 4])]


@pytest.fixture
def engine(seed_model):
    with choose_engine(seed_model) as entered:
        yield entered


def nats_after(engine, prefix):
    return answer_nats(engine.model, prefix, QUERY)


def test_a_prefix_is_found_and_a_longer_one_extends_it(seed_model, engine):
    cache, ids = PrefixCache(seed_model, most_bytes=1 << 30), some_ids(300)
    whole, cached = cache.get(engine, ids[:200])
    assert not cached
    assert cache.get(engine, ids[:200])[1]
    assert cache.get(engine, ids[:150])[1]  # a beginning of it
    encoded = engine.count.num_prefix_tokens
    longer, _ = cache.get(engine, ids)
    assert engine.count.num_prefix_tokens == encoded + 100
    fresh = engine.encode(ids)
    assert nats_after(engine, longer) == pytest.approx(nats_after(engine, fresh), rel=1e-4)
    assert nats_after(engine, whole) == pytest.approx(nats_after(engine, engine.encode(ids[:200])), rel=1e-4)
    assert (cache.count.hits, cache.count.encoded, cache.count.extended) == (2, 1, 1)


def test_a_prefix_is_encoded_in_pieces_that_are_not_counted_as_requests(seed_model, engine):
    cache, ids = PrefixCache(seed_model, most_bytes=1 << 30), some_ids(300)
    assert cache.get(engine, ids, most=0)[0].num_tokens == 0
    assert [cache.get(engine, ids, most=30)[0].num_tokens for _ in range(3)] == [30, 60, 90]
    assert cache.get(engine, ids, most=0)[0].num_tokens == 90
    assert (cache.count.encoded, cache.count.extended) == (0, 0)
    whole, cached = cache.get(engine, ids)
    assert not cached
    assert (cache.count.encoded, cache.count.extended) == (0, 1)
    assert engine.count.num_prefix_tokens == 300
    np.testing.assert_allclose(nats_after(engine, whole), nats_after(engine, engine.encode(ids)), rtol=1e-5)


def test_of_a_changed_prefix_the_common_beginning_is_kept(seed_model, engine):
    cache, ids = PrefixCache(seed_model, most_bytes=1 << 30), some_ids(300)
    cache.get(engine, ids)
    other = ids.copy()
    other[200] += 1
    encoded = engine.count.num_prefix_tokens
    changed, _ = cache.get(engine, other)
    assert engine.count.num_prefix_tokens == encoded + 100
    assert nats_after(engine, changed) == pytest.approx(nats_after(engine, engine.encode(other)), rel=1e-4)
    assert cache.get(engine, ids)[1]


def test_the_least_recently_used_goes_to_disk_and_comes_back_to_the_bit(seed_model, engine, tmp_path):
    one = PrefixCache(seed_model, most_bytes=1 << 30)
    size = one.get(engine, some_ids(200))[0] and one.count.memory_bytes
    cache = PrefixCache(seed_model, most_bytes=int(2.5 * size), most_disk_bytes=1 << 30, folder=tmp_path)
    prompts = [np.roll(some_ids(200), n + 1) for n in range(3)]
    first = nats_after(engine, cache.get(engine, prompts[0])[0])
    for ids in prompts[1:]:
        cache.get(engine, ids)
    assert cache.count.memory_bytes <= 2.5 * size
    assert [path.suffix for path in tmp_path.iterdir()] == [SUFFIX]
    prefix, cached = cache.get(engine, prompts[0])
    assert cached
    assert nats_after(engine, prefix).tolist() == first.tolist()
    assert (cache.count.encoded, cache.count.loaded, cache.count.spilled) == (3, 1, 2)


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_a_damaged_file_is_dropped_counted_and_encoded_anew(seed_model, engine, tmp_path, damage):
    settings = {"most_bytes": 1 << 30, "most_disk_bytes": 1 << 30, "folder": tmp_path}
    cache, ids = PrefixCache(seed_model, **settings), some_ids(100)
    wanted = nats_after(engine, cache.get(engine, ids)[0])
    cache.spill_all()
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "bit": content, "other": b"no prefix"}[damage])
    again = PrefixCache(seed_model, **settings)
    prefix, cached = again.get(engine, ids)
    assert not cached
    assert nats_after(engine, prefix) == pytest.approx(wanted, rel=1e-5)
    assert (again.count.bad_files, again.count.encoded) == (1, 1)
    assert not path.exists()


def test_the_files_stay_within_their_budget(seed_model, engine, tmp_path):
    cache = PrefixCache(seed_model, most_bytes=1, most_disk_bytes=1 << 30, folder=tmp_path)
    cache.get(engine, some_ids(100))
    cache.get(engine, np.roll(some_ids(100), 1))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    small = PrefixCache(seed_model, most_bytes=1, most_disk_bytes=int(2.5 * size), folder=tmp_path)
    for turn in range(2, 8):
        small.get(engine, np.roll(some_ids(100), turn))
    assert len(list(tmp_path.iterdir())) == 2
    none = PrefixCache(seed_model, most_bytes=1, most_disk_bytes=10, folder=tmp_path / "none")
    none.get(engine, some_ids(100))
    none.get(engine, np.roll(some_ids(100), 1))
    assert none.count.dropped == 1
    assert not (tmp_path / "none").exists()


def test_a_file_of_other_weights_is_another_file(seed_model, engine, tmp_path):
    settings = {"most_bytes": 1 << 30, "most_disk_bytes": 1 << 30, "folder": tmp_path}
    cache, ids = PrefixCache(seed_model, **settings), some_ids(100)
    cache.get(engine, ids)
    cache.spill_all()
    weight = next(seed_model.model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        other = PrefixCache(replace(seed_model), **settings)
        assert not other.get(engine, ids)[1]
        assert other.count.bad_files == 0
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1
