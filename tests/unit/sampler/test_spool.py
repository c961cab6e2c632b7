import asyncio
import errno
import resource
import signal
import sqlite3
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.runtime import failpoints
from services.runtime.errors import ConfigError, DiskFullError, StorageError
from services.runtime.files import refusal_of
from services.sampler import spool_file
from services.sampler.spool import Spool
from services.sampler.spool_file import _fault, uuid7


async def test_seqs_rise_from_one_without_gaps_and_never_come_again(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    assert [await spool.append(b"group") for _ in range(3)] == [1, 2, 3]
    await spool.delete_through(3)
    assert (spool.groups, spool.bytes, spool.first_seq, spool.next_seq) == (0, 0, 0, 4)
    await spool.close()
    again = await Spool.open(tmp_path / "spool.db", 1 << 20)
    assert await again.append(b"next") == 4
    await again.close()


async def test_reading_returns_whole_groups_within_the_byte_bound_but_one_at_least(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    for size in (100, 100, 500):
        await spool.append(b"x" * size)
    assert [e.seq for e in await spool.read_from(1, 250)] == [1, 2]
    assert [e.seq for e in await spool.read_from(3, 10)] == [3]
    assert await spool.read_from(4, 10) == []
    await spool.close()


async def test_leasing_stops_at_80_percent_and_generating_at_100(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1000)
    seen: list[tuple[bool, bool]] = []
    for _ in range(10):
        await spool.append(b"x" * 100)
        seen.append((spool.leasing_room.is_set(), spool.room.is_set()))
    assert seen == [(True, True)] * 7 + [(False, True)] * 2 + [(False, False)]
    await spool.delete_through(5)
    assert spool.room.is_set()
    assert spool.leasing_room.is_set()
    await spool.close()


async def test_the_spool_of_another_run_is_set_aside_and_kept(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    await spool.bind("first", "eu-1")
    await spool.append(b"of the first run")
    old_id = spool.spool_id
    await spool.bind("first", "eu-1")
    assert (spool.spool_id, spool.groups) == (old_id, 1)
    await spool.bind("second", "eu-1")
    assert spool.spool_id != old_id
    assert spool.groups == 0
    assert await spool.append(b"of the second run") == 1
    await spool.close()
    kept = _set_aside(tmp_path, "run-first")
    with sqlite3.connect(kept) as database:
        assert database.execute("SELECT payload FROM groups").fetchall() == [(b"of the first run",)]
    database.close()


async def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path) -> None:
    (tmp_path / "spool.db").write_bytes(b"this is not a database" * 100)
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    assert await spool.append(b"group") == 1
    await spool.close()
    assert _set_aside(tmp_path, "damaged").read_bytes().startswith(b"this is not")


@pytest.mark.parametrize("damage", ["DROP TABLE meta", "DELETE FROM meta", "DROP TABLE groups"])
async def test_a_file_that_lacks_a_part_is_set_aside_too(tmp_path: Path, damage: str) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    await spool.append(b"group")
    await spool.close()
    with sqlite3.connect(tmp_path / "spool.db") as raw:
        raw.execute(damage)
    raw.close()
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    assert spool.groups == 0
    assert _set_aside(tmp_path, "damaged").is_file()
    assert await spool.append(b"next") == 1
    await spool.close()


async def test_renumbering_starts_a_new_spool_id_at_one_and_keeps_the_groups(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    for index in range(6):
        await spool.append(b"%d" % index)
    await spool.delete_through(3)
    before = await spool.read_from(1, 1 << 20)
    old_id = spool.spool_id
    await spool.renumber()
    after = await spool.read_from(1, 1 << 20)
    assert spool.spool_id != old_id
    assert [e.seq for e in after] == [1, 2, 3]
    assert [(e.group_id, e.payload) for e in after] == [(e.group_id, e.payload) for e in before]
    assert await spool.append(b"next") == 4
    await spool.close()


async def test_a_full_disk_stops_generating_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sampler.spool.RETRY_S", 0.05)
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    failpoints.arm("spool.before_commit=2*error(DiskFullError)->off")
    try:
        appending = asyncio.create_task(spool.append(b"group"))
        rooms = {spool.room.is_set() async for _ in _turns(appending) if spool._refused}
        assert await appending == 1
    finally:
        failpoints.arm("")
    assert rooms == {False}
    assert spool.room.is_set()
    assert [e.payload for e in await spool.read_from(1, 100)] == [b"group"]
    await spool.close()


async def _turns(task: asyncio.Task[int]) -> AsyncIterator[None]:
    """Of the loop, until the task is done."""
    while not task.done():
        await asyncio.sleep(0.005)
        yield


async def test_a_group_given_up_while_the_disk_is_full_leaves_room_for_the_next(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    failpoints.arm("spool.before_commit=1*error(DiskFullError)->off")
    try:
        appending = asyncio.create_task(spool.append(b"group"))
        async for _ in _turns(appending):
            if not spool.room.is_set():
                appending.cancel()
    finally:
        failpoints.arm("")
    assert appending.cancelled()
    assert spool.room.is_set()
    assert await spool.append(b"next") == 1
    await spool.close()


async def test_a_disk_that_fails_is_not_written_to_again(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    failpoints.arm("spool.before_commit=1*error(StorageError)->off")
    try:
        with pytest.raises(StorageError):
            await spool.append(b"group")
    finally:
        failpoints.arm("")
    await spool.close()


async def test_a_disk_too_full_to_forget_keeps_the_groups_until_they_are_forgotten_later(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 10)
    await spool.bind("run", "eu-1")
    await spool.append(b"more than all its room")
    failpoints.arm("spool.before_delete_commit=2*error(DiskFullError)->off")
    try:
        await spool.delete_through(1)
        await spool.forget_owed()
        assert spool.owes
        assert not spool.room.is_set()
        await spool.forget_owed()
    finally:
        failpoints.arm("")
    assert not spool.owes
    assert spool.room.is_set()
    assert spool.empty.is_set()
    await spool.close()


async def test_the_spool_of_another_sampler_is_set_aside_and_kept(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    await spool.bind("run", "eu-1")
    await spool.append(b"for a lease of eu-1")
    old_id = spool.spool_id
    await spool.bind("run", "eu-2")
    assert (spool.groups, spool.spool_id == old_id) == (0, False)
    await spool.close()
    assert _set_aside(tmp_path, "sampler-eu-1").is_file()


async def test_a_spool_of_a_release_that_did_not_name_its_sampler_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = await Spool.open(path, 1 << 20)
    await spool.bind("run", "eu-1")
    await spool.append(b"payload")
    old_id = spool.spool_id
    await spool.close()
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE meta DROP COLUMN sampler_id")
    database.close()
    for sampler_id, groups in (("eu-2", 1), ("eu-2", 1), ("eu-3", 0)):
        spool = await Spool.open(path, 1 << 20)
        await spool.bind("run", sampler_id)
        assert (spool.groups, spool.spool_id == old_id) == (groups, groups == 1)
        await spool.close()


async def test_a_spool_of_a_later_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = await Spool.open(path, 1 << 20)
    await spool.append(b"payload")
    await spool.close()
    for version in (2, 1):
        with sqlite3.connect(path) as database:
            database.execute(f"PRAGMA user_version = {version}")
        database.close()
        if version == 2:
            with pytest.raises(ConfigError, match=r"format 2, this release reads 1: start the release that wrote it"):
                await Spool.open(path, 1 << 20)
    spool = await Spool.open(path, 1 << 20)
    assert spool.groups == 1
    await spool.close()


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE])
def test_a_refused_write_is_tried_again_and_a_failed_fsync_is_not(code: int, tmp_path: Path) -> None:
    refused = sqlite3.OperationalError("disk I/O error")
    refused.sqlite_errorcode = code  # type: ignore[misc]
    assert isinstance(_fault("cannot write", refused, tmp_path / "spool.db"), DiskFullError)
    refused.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC  # type: ignore[misc]
    assert not isinstance(_fault("cannot write", refused, tmp_path / "spool.db"), DiskFullError)


@pytest.mark.parametrize(("refusal", "full"), [(0, True), (errno.EDQUOT, True), (errno.EROFS, False)])
async def test_a_used_up_quota_is_told_apart_from_a_disk_that_became_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int, full: bool
) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 30)
    monkeypatch.setattr(spool_file, "refusal_of", lambda directory: refusal if directory == tmp_path else 0)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # SQLite calls all three an I/O error
    try:
        with pytest.raises(StorageError) as caught:
            spool._file.append(bytes(2_000_000))
        assert refusal_of(tmp_path) == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        assert refusal_of(tmp_path) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(caught.value, DiskFullError) is full
    assert full or "Read-only file system" in str(caught.value)
    spool._file.append(b"there is room again")
    await spool.close()


async def test_a_disk_too_full_to_forget_keeps_the_groups_until_the_next_acknowledgement(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    await spool.bind("run", "eu-1")
    for number in range(3):
        await spool.append(b"group %d" % number)
    failpoints.arm("spool.before_delete_commit=1*error(DiskFullError)->off")
    try:
        await spool.delete_through(1)
        assert (spool.groups, spool.first_seq) == (3, 1)
        await spool.delete_through(2)
        assert (spool.groups, spool.first_seq) == (1, 3)
    finally:
        failpoints.arm("")
    await spool.close()


async def test_registering_again_writes_nothing(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    await spool.bind("run", "eu-1")
    spool._file._db.execute("PRAGMA query_only = ON")
    await spool.bind("run", "eu-1")
    assert spool.run_id == "run"
    await spool.close()


def test_group_ids_are_uuids_of_version_7_in_the_order_of_time() -> None:
    ids = [uuid7(ms, bytes(10)) for ms in (1, 1_700_000_000_000, 1_700_000_000_001)]
    assert ids == sorted(ids)
    parsed = uuid.UUID(uuid7(1_700_000_000_000, b"\xff" * 10))
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == 1_700_000_000_000


def _set_aside(directory: Path, reason: str) -> Path:
    return next(directory.glob(f"spool.{reason}.*.db"))
