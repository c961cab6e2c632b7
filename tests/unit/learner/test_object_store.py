"""Objects of the learner: who reads one holds it, and leaves nothing open."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from services.learner import object_store
from services.learner.object_store import GRACE_S, ObjectStore, OpenObject
from services.runtime.errors import ObjectGoneError, StorageError
from services.wire.objects import MAX_CHUNK_BYTES


class SlowlyOpened(ObjectStore):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory, clock=lambda: self.now_s)
        self.now_s = 0.0
        self.opening, self.go_on = threading.Event(), threading.Event()
        self.closed = asyncio.Event()

    def open(self, object_id: str) -> OpenObject:
        self.opening.set()
        assert self.go_on.wait(10)
        return super().open(object_id)

    def close(self, opened: OpenObject) -> None:
        super().close(opened)
        self.closed.set()


async def read_on(store: ObjectStore, object_id: str) -> None:
    async with store.reading(object_id):
        await asyncio.Event().wait()


async def cancelled_while_it_is_opened(store: SlowlyOpened, object_id: str) -> None:
    reader = asyncio.create_task(read_on(store, object_id))
    await asyncio.to_thread(store.opening.wait, 10)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    store.go_on.set()


async def test_a_reader_that_leaves_while_its_object_is_opened_leaves_nothing_open(tmp_path: Path) -> None:
    store = SlowlyOpened(tmp_path)
    ref = store.put(b"weights")
    await cancelled_while_it_is_opened(store, ref.object_id)
    async with asyncio.timeout(10):
        await store.closed.wait()
    store.now_s = 2 * GRACE_S
    assert store.collect(()) == ref.size_bytes, "nobody holds it"


async def test_an_object_that_is_gone_when_its_reader_has_left_is_nobodys_error(tmp_path: Path) -> None:
    store = SlowlyOpened(tmp_path)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    await cancelled_while_it_is_opened(store, "0" * 64)
    with pytest.raises(ObjectGoneError):
        async with store.reading("0" * 64):
            pass
    assert complaints == []


@pytest.mark.parametrize("which", [1, 2, 3], ids=["the file", "its folder", "the folder of folders"])
def test_what_the_disk_lost_when_it_was_to_be_durable_is_written_anew(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk says once that it has lost what was written: a second fsync of the same file would succeed."""
    store = ObjectStore(tmp_path)
    ref = store.write(b"object")
    calls: list[int] = []

    def fsync_fails_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == which:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync_fails_once)
    with pytest.raises(StorageError, match="Input/output error"):
        store.sync(ref)
    assert not store.path_of(ref.object_id).exists()
    assert store.put(b"object") == ref
    assert store.path_of(ref.object_id).read_bytes() == b"object"


def test_collection_leaves_what_is_being_written_and_a_folder_that_somebody_made(tmp_path: Path) -> None:
    now_s = [0.0]
    store = ObjectStore(tmp_path, clock=lambda: now_s[0])
    ref = store.put(b"object")
    stray = store.path_of(ref.object_id).with_name("notes")
    stray.mkdir()
    being_written = stray.with_name(f".{ref.object_id}.0123.tmp")
    being_written.touch()
    now_s[0] = GRACE_S + 1
    assert store.collect([]) == len(b"object")
    assert not store.path_of(ref.object_id).exists()
    assert stray.is_dir()
    assert being_written.exists(), "it is about to get its name"


def test_an_object_that_cannot_be_looked_at_is_the_disks_error(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    path = store.path_of(store.write(b"object").object_id)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StorageError, match="symbolic links"):
        store.open(path.name)


def test_the_bytes_of_the_last_small_objects_are_at_hand_without_the_disk(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    large = store.put(bytes(MAX_CHUNK_BYTES + 1))
    written = [bytes((number,)) * MAX_CHUNK_BYTES for number in range(12)]
    refs = [store.write(data) for data in written]
    for path in tmp_path.glob("*/*"):
        path.unlink()
    assert [store.fresh(ref.object_id) for ref in refs] == [None] * 4 + written[4:]
    assert store.fresh(large.object_id) is None


def test_a_new_folder_is_durable_with_its_first_object_and_not_waited_for_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(tmp_path)
    synced: list[Path] = []
    monkeypatch.setattr(object_store, "sync_directory", synced.append)
    ref = store.write(b"object")
    assert synced == []
    store.sync(ref)
    folder = store.path_of(ref.object_id).parent
    assert synced == [folder, tmp_path]
    store.sync(ref)
    assert synced == [folder, tmp_path, folder]
