"""The relay's disk cache: bounded, verified, and never without what somebody reads."""

import hashlib
import os
from pathlib import Path

import pytest

from services.relay.disk_cache import DiskCache
from services.runtime.errors import BadInputError, CorruptObjectError, ExhaustedError


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(cache: DiskCache, data: bytes) -> str:
    part = cache.begin(name_of(data))
    for start in range(0, len(data), 100):
        cache.append(part, data[start : start + 100])
    cache.keep(part)
    cache.release(part.object_id)
    return part.object_id


def content(cache: DiskCache, object_id: str) -> bytes | None:
    opened = cache.open(object_id)
    if opened is None:
        return None
    try:
        return os.pread(opened.descriptor, opened.size_bytes, 0)
    finally:
        os.close(opened.descriptor)
        cache.release(object_id)


def test_what_was_kept_is_there_and_after_a_restart_too(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    first = put(cache, b"a" * 250)
    assert content(cache, first) == b"a" * 250
    assert content(DiskCache(tmp_path, 1000), first) == b"a" * 250
    assert content(cache, "0" * 64) is None


def test_only_a_digest_becomes_a_path(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    for name in ("../../etc/passwd", "", "A" * 64, "a" * 63):
        with pytest.raises(BadInputError):
            cache.open(name)
        with pytest.raises(BadInputError):
            cache.begin(name)


@pytest.mark.parametrize("damage", ["flip", "truncate", "append"])
def test_a_damaged_file_is_dropped_when_it_is_opened(tmp_path: Path, damage: str) -> None:
    cache = DiskCache(tmp_path, 1000)
    name = put(cache, b"a" * 250)
    path, times = tmp_path / name, os.stat(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes({"flip": b"b" + data[1:], "truncate": data[:-1], "append": data + b"a"}[damage])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk's own fault would leave it
    assert content(cache, name) is None
    assert not path.exists()
    assert (cache.damaged, cache.used_bytes) == (1, 0)


def test_the_least_recently_used_goes_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    names = [put(cache, bytes([n]) * 300) for n in range(3)]
    assert content(cache, names[0]) is not None  # used again: now 1 is the oldest
    put(cache, b"x" * 300)
    assert [content(cache, name) is not None for name in names] == [True, False, True]
    assert cache.used_bytes <= 1000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == cache.used_bytes


def test_the_order_of_use_outlives_the_process(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    names = [put(cache, bytes([n]) * 300) for n in range(3)]
    for number, name in enumerate(names):
        os.utime(tmp_path / name, ns=(0, 10 - number))
    smaller = DiskCache(tmp_path, 600)
    assert [content(smaller, name) is not None for name in names] == [True, True, False]


def test_what_is_held_is_never_removed_and_a_full_cache_says_so(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    held = put(cache, b"h" * 600)
    opened = cache.open(held)
    assert opened is not None
    part = cache.begin(name_of(b"p" * 500))
    with pytest.raises(ExhaustedError):
        cache.append(part, b"p" * 500)
    assert os.pread(opened.descriptor, 600, 0) == b"h" * 600
    assert (tmp_path / held).exists()
    os.close(opened.descriptor)
    cache.release(held)
    cache.append(part, b"p" * 500)
    assert not (tmp_path / held).exists()


def test_other_bytes_than_the_name_says_are_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    part = cache.begin(name_of(b"right"))
    cache.append(part, b"wrong")
    with pytest.raises(CorruptObjectError):
        cache.keep(part)
    cache.release(part.object_id)
    assert list(tmp_path.iterdir()) == []
    assert put(cache, b"right") == name_of(b"right")


def test_a_part_is_gone_on_with_in_the_same_process_and_dropped_by_the_next(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    part = cache.begin(name_of(b"abcdef"))
    cache.append(part, b"abc")
    cache.release(part.object_id)
    again = cache.begin(part.object_id)
    assert (again.size_bytes, again.settled_bytes) == (3, 0)
    cache.append(again, b"def")
    assert again.settled_bytes == 3, "the last chunk waits for the digest"
    assert DiskCache(tmp_path, 1000).used_bytes == 0


def test_asking_for_what_does_not_exist_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    for number in range(20):
        part = cache.begin(f"{number:064x}")
        cache.release(part.object_id)
    assert list(tmp_path.iterdir()) == []
    assert (cache.used_bytes, cache._parts, cache._sizes) == (0, {}, {})
