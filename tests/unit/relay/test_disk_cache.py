"""The relay's disk cache: bounded, verified, and never without what somebody reads."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from services.relay.disk_cache import DiskCache
from services.runtime.errors import BadInputError, CorruptObjectError, ExhaustedError, StorageError


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


def test_a_cache_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "objects", 1000)
    first = put(cache, b"a" * 250)
    shutil.rmtree(tmp_path / "objects")
    assert content(cache, first) is None
    assert content(cache, put(cache, b"a" * 250)) == b"a" * 250
    assert cache.used_bytes == 250


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


def test_an_object_larger_than_the_cache_removes_nothing_where_its_size_is_known(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    kept = put(cache, b"k" * 900)
    with pytest.raises(ExhaustedError, match=r"is larger than cache.max_bytes \(1000\)"):
        cache.begin(name_of(b"l" * 1001), 1001)
    assert content(cache, kept) is not None
    assert (cache.evicted, cache.used_bytes) == (0, 900)


def test_an_object_that_turns_out_to_be_larger_than_the_cache_leaves_no_part_and_is_not_begun_again(
    tmp_path: Path,
) -> None:
    cache = DiskCache(tmp_path, 1000)
    part = cache.begin(name_of(b"l" * 1001))
    cache.append(part, b"l" * 600)
    with pytest.raises(ExhaustedError, match=r"is larger than cache.max_bytes"):
        cache.append(part, b"l" * 401)
    cache.release(part.object_id)
    assert list(tmp_path.iterdir()) == []
    assert cache.used_bytes == 0
    kept = put(cache, b"k" * 900)
    with pytest.raises(ExhaustedError, match=r"is larger than cache.max_bytes"):
        cache.begin(part.object_id)
    assert content(cache, kept) is not None


def test_where_held_objects_leave_no_room_the_others_stay(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    held, idle = put(cache, b"h" * 600), put(cache, b"i" * 300)
    opened = cache.open(held)
    assert opened is not None
    part = cache.begin(name_of(b"p" * 500))
    with pytest.raises(ExhaustedError, match="full of objects that are being fetched"):
        cache.append(part, b"p" * 500)
    assert content(cache, idle) is not None
    os.close(opened.descriptor)


@pytest.fixture
def nothing_can_be_removed(monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[[], None]]:
    """Called, it makes every removal fail until the test ends."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched:
        yield lambda: patched.setattr(Path, "unlink", refuse)


def test_contents_that_are_too_large_and_cannot_be_removed_are_one_sentence_at_the_start(
    tmp_path: Path, nothing_can_be_removed: Callable[[], None]
) -> None:
    put(DiskCache(tmp_path, 1000), b"a" * 600)
    nothing_can_be_removed()
    with pytest.raises(StorageError, match=r"cannot remove .*: Permission denied"):
        DiskCache(tmp_path, 300)


def test_what_cannot_be_removed_for_the_next_object_is_one_sentence(
    tmp_path: Path, nothing_can_be_removed: Callable[[], None]
) -> None:
    cache = DiskCache(tmp_path, 1000)
    put(cache, b"a" * 600)
    part = cache.begin(name_of(b"p" * 500))
    empty = cache.begin(name_of(b"q"))
    nothing_can_be_removed()
    with pytest.raises(StorageError, match=r"cannot remove .*: Permission denied"):
        cache.append(part, b"p" * 500)
    cache.release(empty.object_id)  # called where nobody could hear of an error


def test_a_folder_that_cannot_be_written_is_found_at_the_start() -> None:
    with pytest.raises(StorageError, match="cannot write in folder /proc/self/task: "):  # not even by root
        DiskCache(Path("/proc/self/task"), 1000)


def test_a_folder_with_the_name_of_an_object_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ("0" * 64)).mkdir()
    with pytest.raises(StorageError, match="is named like an object and is no file: remove it"):
        DiskCache(tmp_path, 1)
