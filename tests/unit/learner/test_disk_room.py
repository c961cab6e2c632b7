"""Waiting for room on the disk."""

import asyncio

import pytest

from services.learner import disk_room
from services.learner.disk_room import DiskRoom
from services.runtime.errors import DiskFullError, StorageError


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_room, "_RETRY_S", 0.01)


class Disk:
    """Refuses so many writes, then takes them."""

    def __init__(self, refusals: int, error: type[StorageError] = DiskFullError) -> None:
        self.left = refusals
        self.error = error

    async def write(self) -> str:
        if self.left:
            self.left -= 1
            raise self.error("no room")
        return "written"


async def test_what_was_refused_is_written_when_there_is_room_and_both_are_told() -> None:
    room, disk = DiskRoom(), Disk(3)
    assert await room.until_written("a", disk.write) == "written"
    assert (disk.left, room.full) == (0, False)
    room.refused("groups", DiskFullError("no room"))
    assert await room.change() is True
    room.written("groups")
    assert await room.change() is False


async def test_what_nobody_brings_again_does_not_say_for_ever_that_the_disk_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disk_room, "_FORGOTTEN_S", 0.02)
    room = DiskRoom()
    room.refused("groups", DiskFullError("no room"))
    assert await room.change() is True
    async with asyncio.timeout(5):
        while await room.change():
            pass
    assert not room.full


async def test_room_for_one_thing_is_not_room_for_all() -> None:
    room = DiskRoom()
    room.refused("groups", DiskFullError("no room"))
    await room.until_written("a", Disk(1).write)
    assert room.full


async def test_another_fault_and_the_end_of_the_process_end_the_waiting() -> None:
    stopping = asyncio.Event()
    room = DiskRoom(stopping)
    with pytest.raises(StorageError, match="no room"):
        await room.until_written("a", Disk(1, StorageError).write)
    waiting = asyncio.create_task(room.until_written("a", Disk(10**9).write))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    stopping.set()
    with pytest.raises(DiskFullError):
        await waiting
