"""One fetch from upstream, whatever the number of readers and of breaks."""

import asyncio
import errno
import hashlib
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.relay.bodies import Bodies
from services.relay.disk_cache import DiskCache
from services.runtime.backoff import Backoff
from services.runtime.errors import (
    CorruptObjectError,
    ExhaustedError,
    HeteroRLError,
    ObjectGoneError,
    StorageError,
    UnavailableError,
)

DATA = bytes(range(256)) * 40
NAME = hashlib.sha256(DATA).hexdigest()


class ScriptedSource:
    """Sends DATA in chunks of 1,000 bytes; `breaks` end one fetch each, after so many chunks."""

    def __init__(self, *breaks: tuple[int, HeteroRLError], data: bytes = DATA) -> None:
        self.breaks = list(breaks)
        self.offsets: list[int] = []
        self.data = data
        self.size_bytes: int | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()

    def size_of(self, object_id: str) -> int | None:
        return self.size_bytes

    async def fetch(self, object_id: str, offset: int) -> AsyncGenerator[bytes]:
        self.offsets.append(offset)
        after, error = self.breaks.pop(0) if self.breaks else (None, None)
        for number, start in enumerate(range(offset, len(self.data), 1000)):
            await self.go_on.wait()
            if number == after and error is not None:
                raise error
            yield self.data[start : start + 1000]


def bodies_on(folder: Path, source: ScriptedSource, gone: list[str] | None = None, patience_s: float = 5.0) -> Bodies:
    return Bodies(
        cache=DiskCache(folder, 1 << 20),
        source=source,
        patience_s=patience_s,
        on_gone=(gone if gone is not None else []).append,
        backoff=lambda: Backoff(base_s=0.0, ceiling_s=0.0),
    )


async def read(bodies: Bodies, offset: int = 0) -> bytes:
    found = b""
    async with bodies.reading(NAME) as body:
        while (readable := await body.beyond(offset)) > offset:
            found += os.pread(body.descriptor, readable - offset, offset)
            offset = readable
    return found


async def test_many_readers_cause_one_fetch(tmp_path: Path) -> None:
    source = ScriptedSource()
    bodies = bodies_on(tmp_path, source)
    offsets = [0, 0, 17, 5000, len(DATA)]
    assert await asyncio.gather(*(read(bodies, offset) for offset in offsets)) == [DATA[offset:] for offset in offsets]
    assert source.offsets == [0]
    assert await read(bodies) == DATA
    assert (bodies.misses, bodies.hits, source.offsets) == (1, 1, [0])


async def test_bytes_go_on_to_readers_before_the_object_is_whole(tmp_path: Path) -> None:
    source = ScriptedSource()
    bodies = bodies_on(tmp_path, source)
    async with bodies.reading(NAME) as body:
        assert 0 < await body.beyond(0) < len(DATA)
        assert not body.complete
    await bodies.close()


async def test_a_fetch_that_breaks_is_gone_on_with_where_it_was(tmp_path: Path) -> None:
    cut = UnavailableError("cut")
    source = ScriptedSource((3, cut), (0, cut), (1, cut))
    assert await read(bodies_on(tmp_path, source)) == DATA
    assert source.offsets == [0, 3000, 3000, 4000]


async def test_readers_hear_that_upstream_is_away_and_the_next_one_goes_on(tmp_path: Path) -> None:
    cut = UnavailableError("cut")
    source = ScriptedSource((4, cut), (0, cut))
    bodies = bodies_on(tmp_path, source, patience_s=0.0)
    with pytest.raises(UnavailableError):
        await read(bodies)
    source.breaks.clear()
    assert await read(bodies) == DATA
    assert source.offsets[0] == 0
    assert source.offsets[-1] == 4000, "what had come is not fetched twice"


async def test_nobody_gets_the_end_of_an_object_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    source = ScriptedSource(data=DATA[:-1] + b"?")
    bodies = bodies_on(tmp_path, source)
    async with bodies.reading(NAME) as body:
        seen = [0]

        async def read_all() -> None:
            while True:
                seen.append(await body.beyond(seen[-1]))

        with pytest.raises(CorruptObjectError):
            await read_all()
        assert seen[-1] < len(DATA)
    source.data = DATA
    assert await read(bodies) == DATA
    assert source.offsets == [0, 0]


async def test_an_object_that_is_gone_upstream_is_told_to_whoever_remembers_it(tmp_path: Path) -> None:
    gone: list[str] = []
    with pytest.raises(ObjectGoneError):
        await read(bodies_on(tmp_path, ScriptedSource((0, ObjectGoneError("gone"))), gone))
    assert gone == [NAME]


async def test_a_fetch_outlives_its_reader_and_leaves_nothing_open(tmp_path: Path) -> None:
    source = ScriptedSource()
    source.go_on.clear()
    bodies = bodies_on(tmp_path, source)
    before = len(os.listdir("/proc/self/fd"))
    async with bodies.reading(NAME):
        pass
    source.go_on.set()
    async with asyncio.timeout(5):
        while not (tmp_path / NAME).exists():  # noqa: ASYNC110 - nobody is left to be told
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) == before
    assert await read(bodies) == DATA
    assert source.offsets == [0]


async def test_an_object_that_is_known_to_be_too_large_is_not_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ScriptedSource()
    source.size_bytes = 1 << 30
    with pytest.raises(ExhaustedError, match=r"larger than cache.max_bytes"):
        await read(bodies_on(tmp_path, source))
    assert source.offsets == []
    assert [record.getMessage() for record in caplog.records] == ["object_not_served"]


async def test_a_full_disk_is_a_warning_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bodies = bodies_on(tmp_path, ScriptedSource())
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left on device: free disk space"):
        await read(bodies)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "object_not_served")
    ]
